"""Names that the tests of the experiments share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from experiments.config import RunConfig

ROOT = Path(__file__).parents[2]

Compose = Callable[..., RunConfig]  # from command-line overrides
