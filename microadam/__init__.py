"""MicroAdam: an Adam variant with about 0.96 bytes of optimizer state per parameter, not 8.

Modoranu et al., "MicroAdam: Accurate Adaptive Optimization with Low Space Overhead and Provable
Convergence", NeurIPS 2024, arXiv:2405.15593.
"""

from microadam.gradient_release import GradientRelease, enable_gradient_release
from microadam.layout import BlockLayout
from microadam.optimizer import MicroAdam

__all__ = [
    "BlockLayout",
    "GradientRelease",
    "MicroAdam",
    "__version__",
    "enable_gradient_release",
]
__version__ = "0.1.0"
