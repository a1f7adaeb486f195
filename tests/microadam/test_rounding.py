"""Stochastic rounding: it is unbiased, and its random bits depend only on what they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from microadam import MicroAdam, ops, reference
from microadam.rounding import philox, round_to_dtype
from tests.microadam.judge import FORMATS, to_numpy


def one_step(start: Tensor, gradient: Tensor, seed: int | None, **changes: Any) -> Tensor:
    """A parameter after one step with all coordinates kept; rounded to nearest without a seed."""
    p = start.clone().requires_grad_()
    p.grad_dtype = None
    p.grad = gradient
    rounding = {"stochastic_rounding": seed is not None, "seed": seed or 0}
    MicroAdam([p], **{"lr": 1e-3, "density": 1.0} | rounding | changes).step()
    return p.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_updates_survive_on_average(dtype: torch.dtype) -> None:
    """To nearest, an update of a tenth of a unit in the last place is lost altogether.

    Every coordinate moves by lr on the first step, so a share of 0.1 must move by a whole unit.
    With 10^5 coordinates the share's standard error is 0.001.
    """
    numel = 100_000
    unit = torch.finfo(dtype).eps
    start, gradient = torch.ones(numel, dtype=dtype), torch.full((numel,), -1.0, dtype=dtype)
    result = one_step(start, gradient, seed=1, lr=0.1 * unit)
    is_moved = result != 1
    assert torch.all(result[is_moved] == 1 + unit)
    assert is_moved.double().mean().item() == pytest.approx(0.1, abs=0.004)
    assert torch.equal(one_step(start, gradient, None, lr=0.1 * unit), start)


@pytest.mark.parametrize("scale", [1.0, 1e-6], ids=["normal", "subnormal_in_float16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mean_rounding_error_is_zero(
    dtype: torch.dtype, scale: float, rng: np.random.Generator
) -> None:
    """In units in the last place; 10^5 errors of at most 1 have a mean known to 0.0016."""
    start = torch.from_numpy(rng.standard_normal(100_000) * scale).to(dtype)
    gradient = torch.from_numpy(rng.standard_normal(100_000)).float()
    rounded = to_numpy(one_step(start, gradient, seed=5, lr=0.01 * scale))
    exact = to_numpy(one_step(start.float(), gradient, None, lr=0.01 * scale))
    below, above = (FORMATS[dtype].round(exact, f) for f in (np.floor, np.ceil))
    assert np.all((rounded == below) | (rounded == above))
    is_rounded = above > below
    error = (rounded - exact)[is_rounded] / (above - below)[is_rounded]
    assert error.size > 50_000
    assert abs(error.mean()) < 0.008


def test_stochastic_rounding_depends_on_seed_parameter_step_and_element_only(
    rng: np.random.Generator,
) -> None:
    start = torch.ones(1000, dtype=torch.bfloat16)
    gradient = torch.ones(1000, dtype=torch.bfloat16)
    first = one_step(start, gradient, seed=1)
    assert torch.equal(one_step(start, gradient, seed=1), first)
    assert not torch.equal(one_step(start, gradient, seed=2), first)
    assert not torch.equal(one_step(start, gradient, seed=1 + 2**40), first)

    twins = [start.clone().requires_grad_() for _ in range(2)]
    optimizer = MicroAdam(twins, density=1.0, stochastic_rounding=True, seed=1)
    movements = []
    for _ in range(2):
        before = [p.detach().clone() for p in twins]
        for p in twins:
            p.grad = gradient
        optimizer.step()
        movements += [p.detach() - old for p, old in zip(twins, before, strict=True)]
    assert torch.equal(movements[0] + 1, first)
    for i in range(4):
        for j in range(i):
            assert not torch.equal(movements[i], movements[j])


def test_random_bits_are_those_of_philox() -> None:
    """Random123's known answers for Philox4x32-10; the native kernels have the same bits."""
    answers = {
        (0,) * 6: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (0xFFFFFFFF,) * 6: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    }
    for (*counter, key0, key1), expected in answers.items():
        words = philox([torch.tensor([word]) for word in counter], (key0, key1))
        assert tuple(word.item() for word in words) == expected


def test_stochastic_rounding_does_not_depend_on_the_blocks() -> None:
    """With every coordinate kept, blocks only determine the order in which work is done."""
    start = torch.ones(1000, dtype=torch.bfloat16)
    gradient = torch.ones(1000, dtype=torch.bfloat16)
    results = [
        one_step(start, gradient, seed=1, block_size=block_size, bucket_size=6)
        for block_size in (6, 12, 18, 4092)
    ]
    assert all(torch.equal(result, results[0]) for result in results)


def test_stochastic_rounding_does_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference takes a large parameter in pieces; here they start at odd elements."""
    start = torch.ones(1000, dtype=torch.bfloat16)
    gradient = torch.ones(1000, dtype=torch.bfloat16)
    whole = one_step(start, gradient, seed=1, block_size=18, bucket_size=6)
    monkeypatch.setattr(ops, "step_", reference.step_)
    monkeypatch.setitem(reference._MAX_ELEMENTS_AT_ONCE, "cpu", 1)
    assert torch.equal(one_step(start, gradient, 1, block_size=18, bucket_size=6), whole)


def test_stochastic_rounding_leaves_torchs_generator_and_float32_alone(
    rng: np.random.Generator,
) -> None:
    generator_state = torch.get_rng_state()
    start, gradient = torch.randn(300), torch.randn(300)
    torch.set_rng_state(generator_state)
    stochastic = one_step(start, gradient, seed=1)
    assert torch.equal(torch.get_rng_state(), generator_state)
    nearest = one_step(start, gradient, None)
    assert torch.equal(stochastic, nearest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_never_leaves_the_finite_range(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    start = torch.tensor([largest, -largest, 0.0, torch.finfo(dtype).smallest_normal])
    gradient = torch.tensor([1.0, -1.0, 1.0, -1.0])
    result = one_step(start.to(dtype), gradient.to(dtype), seed=3, lr=1e-9)
    assert result.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_nan_stays_one(dtype: torch.dtype) -> None:
    """A GPU's NaN has all bits set but the sign: adding random bits turned it into -0."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32)
    nans = bits.view(torch.float32).repeat(1000)
    assert round_to_dtype(nans, dtype, (1, 0), 1, 0).isnan().all()
