"""What the benchmarks count; their timings are not tested."""

from __future__ import annotations

import pytest
import torch

from benchmarks import optimizers, step
from microadam import BlockLayout, MicroAdam


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_memory_sectors_with_an_update_are_counted(dtype: torch.dtype) -> None:
    """Blocks and sectors counted by hand: the parameter ends in a shorter block."""
    numel = 4096 + 1000
    contestant = step.Contestant(MicroAdam, [(numel,)], dtype, "cpu")
    grad = torch.zeros(numel, dtype=dtype)
    grad[[0, 3, 17, 4095, 4096, 5000]] = 1.0
    contestant.step([grad])
    (p,) = contestant.params
    window = contestant.optimizer.state[p]["window_indices"]
    per_sector = 32 // p.element_size()
    expected = set()
    for block, k in ((0, 41), (1, 10)):
        for slot in range(10):
            for index in window[block, slot, :k].tolist():
                expected.add((4096 * block + index) // per_sector)
    assert {0, 17 // per_sector, 4096 // per_sector, 5000 // per_sector} <= expected
    num_bytes = step._updated_bytes(contestant, p, BlockLayout(numel))
    assert num_bytes == 32 * len(expected)


def test_state_that_parameters_share_counts_once() -> None:
    """Such as bitsandbytes' maps, which were counted for each of 200 parameters."""
    params = [torch.nn.Parameter(torch.zeros(10)) for _ in range(3)]
    optimizer = torch.optim.SGD(params)
    shared = torch.zeros(256)
    for p in params:
        optimizer.state[p] = {"own": torch.zeros(10), "map": shared, "step": 1}
    assert optimizers.state_bytes(optimizer) == 3 * 40 + 1024
