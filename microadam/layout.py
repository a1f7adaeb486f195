"""How the elements of a parameter are split into top-k blocks and quantization buckets.

Every shape, dtype and byte count of the optimizer state is determined here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from numbers import Integral, Real
from typing import Any

import torch

# (window_size, density, bucket_size, block_size): with numel, this determines a layout.
Geometry = tuple[int, float, int, int]


def is_number(value: object) -> bool:
    """Whether it is a real number, of Python or NumPy."""
    return isinstance(value, Real)


def is_int(value: object) -> bool:
    """Whether it is an integer, of Python or NumPy, and not a truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class Segment:
    """Consecutive blocks of one length: all full blocks of a parameter, or its shorter last one."""

    first_block: int
    num_blocks: int
    length: int  # elements per block
    k: int  # elements kept per block

    @property
    def blocks(self) -> slice:
        """The range of its blocks among those of the parameter."""
        return slice(self.first_block, self.first_block + self.num_blocks)

    def elements(self, block_size: int) -> slice:
        """The range of its elements in the flattened parameter."""
        first = self.first_block * block_size
        return slice(first, first + self.num_blocks * self.length)


@dataclass(frozen=True)
class BlockLayout:
    """The block and bucket geometry of a parameter with ``numel`` elements.

    The elements, in the parameter's own storage order, form consecutive *blocks* of
    ``block_size``; Top-K works within a block. Each block consists of *buckets* of ``bucket_size``
    elements that share one quantization range. The last block and the last bucket may be shorter.
    (Paper, section 3: "Efficient Implementation".) `microadam.MicroAdam` explains the arguments.

    Raises:
        ValueError: names an argument, its value, and what it must be.
    """

    numel: int
    window_size: int = 10
    density: float = 0.01
    bucket_size: int = 64
    block_size: int = 4096

    def __post_init__(self) -> None:
        def require(is_valid: bool, name: str, remedy: str) -> None:
            if not is_valid:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {remedy}")

        window_size, density = self.window_size, self.density
        bucket_size, block_size = self.bucket_size, self.block_size
        require(is_int(window_size) and window_size >= 1, "window_size", "an integer of 1 or more")
        require(
            is_number(density) and 0 < float(density) <= 1,
            "density",
            "a number greater than 0 and at most 1",
        )
        require(
            is_int(bucket_size) and bucket_size >= 2 and bucket_size % 2 == 0,
            "bucket_size",
            "an even integer of 2 or more (two 4-bit codes share a byte)",
        )
        require(
            is_int(block_size) and 0 < block_size <= 32_768 and block_size % bucket_size == 0,
            "block_size",
            f"a multiple of bucket_size={bucket_size} and at most 32768, so that an index inside a "
            "block fits int16",
        )

    @classmethod
    @cache
    def of(
        cls, numel: int, window_size: int, density: float, bucket_size: int, block_size: int
    ) -> BlockLayout:
        """The layout for these values; equal arguments share one object."""
        return cls(numel, window_size, density, bucket_size, block_size)

    def k_of(self, length: int) -> int:
        """Elements kept of a block of ``length`` elements: ``max(1, ceil(density * length))``."""
        return max(1, math.ceil(self.density * length))

    @cached_property
    def num_blocks(self) -> int:
        """Number of blocks, including a shorter last one."""
        return -(-self.numel // self.block_size)

    @cached_property
    def num_buckets(self) -> int:
        """Number of buckets, including a shorter last one."""
        return -(-self.numel // self.bucket_size)

    @cached_property
    def k(self) -> int:
        """Elements kept of the parameter's longest block, which is the width of a window slot."""
        return self.k_of(min(self.numel, self.block_size))

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The full blocks, then the shorter last block; either is left out if there is none."""
        num_full, rest = divmod(self.numel, self.block_size)
        full = Segment(0, num_full, self.block_size, self.k_of(self.block_size))
        last = Segment(num_full, 1, rest, self.k_of(rest))
        return ((full,) if num_full else ()) + ((last,) if rest else ())

    @cached_property
    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every state tensor, by its key in ``optimizer.state[p]``.

        - ``step``: steps this parameter has taken; the newest window slot is
          ``(step - 1) % window_size``.
        - ``window_indices``, ``window_values``: the sliding window of sparse gradients. Slots of a
          block shorter than the others use only their first entries.
        - ``error``: the 4-bit codes of the error feedback, two per byte. In byte ``j`` of a bucket,
          the low half is code ``j`` and the high half code ``j + bucket_size / 2``.
        - ``error_min``, ``error_max``: the quantization range of each bucket.
        """
        window = (self.num_blocks, self.window_size, self.k)
        return {
            "step": ((), torch.int64),
            "window_indices": (window, torch.int16),
            "window_values": (window, torch.bfloat16),
            "error": ((self.num_buckets * self.bucket_size // 2,), torch.uint8),
            "error_min": ((self.num_buckets,), torch.bfloat16),
            "error_max": ((self.num_buckets,), torch.bfloat16),
        }

    @cached_property
    def state_bytes(self) -> int:
        """Bytes that the state of this parameter takes."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.state_spec.values())

    def new_state(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The state before the first step: step 0, an empty window, zero error feedback."""
        return {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in self.state_spec.items()
        }


def geometry_of(group: Mapping[str, Any]) -> Geometry:
    """The hyperparameters of a parameter group that determine its division into blocks."""
    return group["window_size"], group["density"], group["bucket_size"], group["block_size"]


def layout_of(numel: int, group: Mapping[str, Any]) -> BlockLayout:
    """How ``numel`` elements are split into blocks under a parameter group's hyperparameters."""
    return BlockLayout.of(numel, *geometry_of(group))
