"""How elements are split into blocks and buckets, and how much memory the state takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microadam import BlockLayout
from tests.microadam import oracle

BLOCK_SIZES = [(64, 64), (128, 64), (4096, 64), (36, 6), (32_768, 64)]  # block, bucket


@given(
    numel=st.integers(0, 50_000),
    sizes=st.sampled_from(BLOCK_SIZES),
    density=st.floats(0.0001, 1.0),
)
def test_blocks_cover_every_element_once(
    numel: int, sizes: tuple[int, int], density: float
) -> None:
    block_size, bucket_size = sizes
    layout = BlockLayout(numel, 10, density, bucket_size, block_size)
    lengths = [segment.length for segment in layout.segments for _ in range(segment.num_blocks)]
    expected = oracle.block_ranges(numel, block_size)
    assert lengths == [stop - start for start, stop in expected]
    assert layout.num_blocks == len(expected)
    assert layout.num_buckets == len(oracle.block_ranges(numel, bucket_size))


@given(
    numel=st.integers(0, 50_000),
    sizes=st.sampled_from(BLOCK_SIZES),
    density=st.floats(0.0001, 1.0),
)
def test_every_block_keeps_at_least_one_and_at_most_all(
    numel: int, sizes: tuple[int, int], density: float
) -> None:
    block_size, bucket_size = sizes
    layout = BlockLayout(numel, 10, density, bucket_size, block_size)
    for segment in layout.segments:
        assert 1 <= segment.k <= segment.length
        assert density * segment.length <= segment.k < density * segment.length + 1
        assert segment.k <= layout.k


@given(numel=st.integers(0, 50_000), sizes=st.sampled_from(BLOCK_SIZES))
def test_new_state_is_what_the_specification_says(numel: int, sizes: tuple[int, int]) -> None:
    block_size, bucket_size = sizes
    layout = BlockLayout(numel, 10, 0.01, bucket_size, block_size)
    state = layout.new_state(torch.device("cpu"))
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == layout.state_spec
    assert layout.state_bytes == sum(t.untyped_storage().nbytes() for t in state.values())
    assert not any(t.any() for t in state.values())


def test_state_of_a_large_parameter_takes_less_than_a_byte_an_element() -> None:
    """4 bits of error, 4 bytes per bucket of 64, and 10 slots of 41 4-byte entries per 4096."""
    layout = BlockLayout(1 << 24)
    expected = 1 / 2 + 4 / 64 + 10 * 41 * 4 / 4096
    assert layout.state_bytes / layout.numel == pytest.approx(expected, rel=1e-6)


def test_equal_arguments_share_one_layout() -> None:
    """A layout is looked up at every step of every parameter; its properties are computed once."""
    assert BlockLayout.of(1000, 10, 0.01, 64, 4096) is BlockLayout.of(1000, 10, 0.01, 64, 4096)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("window_size", 0), ("density", 0.0), ("bucket_size", 63), ("block_size", 65_536)],
)
def test_an_impossible_geometry_is_refused(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{argument}={value}: must be "):
        BlockLayout(1000, **{argument: value})
