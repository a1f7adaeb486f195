"""Every step of the optimizer is the step of the oracle.

Block and bucket sizes are small here, so that a parameter of a few hundred elements has many
blocks, a shorter last one and a shorter last bucket. `judge.step_and_judge` makes the assertions; a
test only sets the scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microadam import MicroAdam, ops, reference
from tests.microadam import oracle
from tests.microadam.helpers import (
    DEVICES,
    DTYPES,
    SMALL_BLOCKS,
    new_parameter,
    set_gradient,
)
from tests.microadam.judge import step_and_judge


@dataclass(frozen=True)
class GradientKind:
    """Kinds of numbers that break a selection, a quantization or a rounding."""

    name: str
    scale: float = 1.0
    num_distinct: int = 0  # draw from this many equally spaced numbers: ties; 0 for no ties
    share_of_zeros: float = 0.0

    def draw(self, numel: int, rng: np.random.Generator) -> np.ndarray:
        numbers = rng.standard_normal(numel)
        if self.num_distinct:
            numbers = rng.integers(-self.num_distinct, self.num_distinct + 1, numel)
        return numbers * self.scale * (rng.random(numel) >= self.share_of_zeros)


GRADIENT_KINDS = (
    GradientKind("normal"),
    GradientKind("tiny", scale=1e-12),
    GradientKind("ties", num_distinct=2),
    GradientKind("mostly_zero", share_of_zeros=0.97),
    GradientKind("all_zero", share_of_zeros=1.0),
    GradientKind("all_equal_magnitude", num_distinct=1),
    GradientKind("denormal", scale=2.0**-149, num_distinct=40),
    GradientKind("huge", scale=1e30),
    GradientKind("square_overflows", scale=1e19),
)


@st.composite
def hyperparameter_sets(draw: st.DrawFn) -> dict:
    bucket_size = draw(st.sampled_from([6, 16, 64]))
    return {
        "lr": draw(st.sampled_from([0.0, 1e-5, 1e-3, 0.5])),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.0, 0.0), (0.5, 0.9), (0.99, 0.9999)])),
        "eps": draw(st.sampled_from([1e-8, 1e-12, 1e-3])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "alpha": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "window_size": draw(st.integers(1, 5)),
        "density": draw(st.sampled_from([0.01, 0.07, 0.3, 1.0])),
        "bucket_size": bucket_size,
        "block_size": bucket_size * draw(st.integers(1, 4)),
        "stochastic_rounding": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**64 - 1)),
    }


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=200)
@given(
    hyper=hyperparameter_sets(),
    numel=st.sampled_from([0, 1, 2, 63, 64, 65]) | st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    grad_dtype=st.sampled_from(DTYPES),
    kinds=st.lists(st.sampled_from(GRADIENT_KINDS), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_steps_agree_with_the_oracle(
    device: str,
    hyper: dict,
    numel: int,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    kinds: list[GradientKind],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    p = new_parameter(numel, dtype, rng, device)
    optimizer = MicroAdam([p], **hyper)
    for kind in kinds:
        set_gradient(p, kind.draw(numel, rng), grad_dtype)
        step_and_judge(optimizer)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=100)
@given(
    hyper=hyperparameter_sets(),
    numel=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    bad_numbers=st.lists(
        st.sampled_from([np.nan, np.inf, -np.inf, 2.0**120, -(2.0**121)]), min_size=1, max_size=3
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_non_finite_blocks_stay_as_they_were(
    device: str, hyper: dict, numel: int, dtype: torch.dtype, bad_numbers: list[float], seed: int
) -> None:
    """Contract 8. The good steps that follow must see no trace of the bad one."""
    rng = np.random.default_rng(seed)
    p = new_parameter(numel, dtype, rng, device)
    optimizer = MicroAdam([p], **hyper)
    for is_bad in (False, True, False, True, False):
        gradient = rng.standard_normal(numel)
        if is_bad:
            gradient[rng.integers(0, numel, len(bad_numbers))] = bad_numbers
        set_gradient(p, gradient, torch.float32)
        step_and_judge(optimizer)
    assert optimizer.num_skipped_blocks() > 0
    assert p.isfinite().all()
    for name in ("window_values", "error_min", "error_max"):
        assert optimizer.state[p][name].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", GRADIENT_KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_gradient_past_a_full_window(
    device: str, kind: GradientKind, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(1)
    p = new_parameter(300, dtype, rng, device)
    optimizer = MicroAdam([p], **SMALL_BLOCKS)
    for _ in range(2 * SMALL_BLOCKS["window_size"] + 1):
        set_gradient(p, kind.draw(300, rng), torch.float32)
        step_and_judge(optimizer)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numel", [0, 1, 2, 63, 64, 65, 4095, 4096, 4097, 100_003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_blocks_at_awkward_sizes(device: str, numel: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(numel)
    p = new_parameter(numel, dtype, rng, device)
    optimizer = MicroAdam([p])
    for _ in range(2):
        set_gradient(p, rng.standard_normal(numel))
        step_and_judge(optimizer)


@pytest.mark.parametrize("device", DEVICES)
def test_largest_block_reaches_the_end_of_int16(device: str) -> None:
    """Index 32,767 is the last that int16 holds."""
    rng = np.random.default_rng(0)
    p = new_parameter(32_768 + 5, torch.float32, rng, device)
    optimizer = MicroAdam([p], block_size=32_768, density=0.001)
    for _ in range(2):
        gradient = rng.standard_normal(p.numel())
        gradient[[0, 32_767, 32_768, 32_772]] = 100.0
        set_gradient(p, gradient)
        step_and_judge(optimizer)
    assert optimizer.state[p]["window_indices"].max() == 32_767


@pytest.mark.parametrize("device", DEVICES)
def test_lower_index_wins_a_tie(device: str) -> None:
    """torch.topk promises no order among equals: on a GPU it may return other indices."""
    p = torch.zeros(256, device=device, requires_grad=True)
    optimizer = MicroAdam([p], block_size=128, bucket_size=64, density=0.02)
    p.grad = torch.ones(256, device=device)
    p.grad[100] = -1.0
    step_and_judge(optimizer)
    assert optimizer.state[p]["window_indices"][:, 0].tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("device", DEVICES)
def test_half_a_unit_is_quantized_upwards(device: str) -> None:
    """floor(x + 0.5), not round() to even; limits of 0 and 15 make the unit 1 and ties exact."""
    p = torch.zeros(64, device=device, requires_grad=True)
    optimizer = MicroAdam([p])
    gradient = np.zeros(64)
    gradient[:8] = [0.0, 0.5, 1.5, 2.5, 2.4375, 13.5, 14.5, 15.0]
    gradient[63] = 100.0  # goes to the window
    set_gradient(p, gradient)
    step_and_judge(optimizer)
    low_half = optimizer.state[p]["error"][:8] & 15
    assert low_half.tolist() == [0, 1, 2, 3, 2, 14, 15, 15]


@pytest.mark.parametrize("device", DEVICES)
def test_alpha_takes_its_share_out_of_the_error_feedback(device: str) -> None:
    """p -= lr * alpha * e, and (1 - alpha) * e stays; limits of 0 and 15 make all of it exact."""
    p = torch.zeros(64, device=device, requires_grad=True)
    optimizer = MicroAdam([p], lr=0.5, alpha=0.25)
    gradient = np.arange(64.0) % 16
    gradient[63] = 100.0  # goes to the window
    set_gradient(p, gradient)
    step_and_judge(optimizer)
    assert p.detach()[:63].tolist() == (-0.5 * 0.25 * gradient[:63]).tolist()
    assert optimizer.state[p]["error_min"].item() == 0.0
    assert optimizer.state[p]["error_max"].item() == 0.75 * 15
    step_and_judge(optimizer)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_from_any_state(device: str) -> None:
    """Late in training, when beta^step has vanished, with arbitrary window and error contents."""
    rng = np.random.default_rng(2)
    p = new_parameter(300, torch.float32, rng, device)
    optimizer = MicroAdam([p], **SMALL_BLOCKS)
    set_gradient(p, rng.standard_normal(300))
    optimizer.step()
    state = optimizer.state[p]
    state["step"].fill_(1_000_000)
    state["error"].random_(0, 256)
    state["error_min"].fill_(-3.0)
    state["error_max"].fill_(5.0)
    state["window_values"].normal_()
    for _ in range(4):
        set_gradient(p, rng.standard_normal(300))
        step_and_judge(optimizer)


def test_pieces_of_a_large_parameter_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference takes a large parameter in pieces; here they are small, so there are many."""
    monkeypatch.setattr(ops, "step_", reference.step_)
    monkeypatch.setitem(reference._MAX_ELEMENTS_AT_ONCE, "cpu", 256)
    rng = np.random.default_rng(3)
    p = new_parameter(128 * 7 + 50, torch.bfloat16, rng, "cpu")
    optimizer = MicroAdam([p], **SMALL_BLOCKS)
    for _ in range(4):
        set_gradient(p, rng.standard_normal(p.numel()))
        step_and_judge(optimizer)


# The judge is only worth something if it also says no.


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("window_indices", lambda t: t[0, 0].copy_(torch.arange(t.shape[2]))),
        ("window_values", lambda t: t[1, 0, 0].mul_(1.01)),
        ("error", lambda t: t[7].add_(1)),
        ("error_min", lambda t: t[2].mul_(1.01)),
        ("error_max", lambda t: t[2].mul_(1.01)),
        ("step", lambda t: t.add_(1)),
    ],
)
def test_judge_notices_a_wrong_state(name: str, change: object) -> None:
    rng = np.random.default_rng(4)
    p = new_parameter(300, torch.float32, rng, "cpu")
    optimizer = MicroAdam([p], **SMALL_BLOCKS)
    set_gradient(p, rng.standard_normal(300))
    optimizer.register_step_post_hook(lambda *_: change(optimizer.state[p][name]))
    with pytest.raises(AssertionError):
        step_and_judge(optimizer)


@pytest.mark.parametrize("relative_error", [1e-4, 3e-6])
def test_judge_notices_a_wrong_parameter(relative_error: float) -> None:
    rng = np.random.default_rng(5)
    p = new_parameter(300, torch.float32, rng, "cpu")
    optimizer = MicroAdam([p], **SMALL_BLOCKS)
    set_gradient(p, rng.standard_normal(300))
    optimizer.register_step_post_hook(lambda *_: p.data.mul_(1 + relative_error))
    with pytest.raises(AssertionError):
        step_and_judge(optimizer)


def test_oracle_against_a_step_worked_out_by_hand() -> None:
    """One block of 4, k = 1, buckets of 2, on the second step with betas of one half."""
    hyper = oracle.Hyperparameters(
        lr=0.5, beta1=0.5, beta2=0.5, eps=0.0, weight_decay=0.0,
        window_size=2, density=0.25, block_size=4, bucket_size=2,
    )  # fmt: skip
    state = oracle.State(
        step=1,
        indices=np.array([[[3], [0]]]),
        values=np.array([[[4.0], [0.0]]]),
        codes=np.array([0, 15, 0, 15]),
        minimum=np.array([-1.0, 0.0]),
        maximum=np.array([2.0, 0.0]),
    )
    parameter, new, num_skipped = oracle.take_step(
        np.array([1.0, 1.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.0, 2.0]), state, hyper
    )
    # The accumulator is [-1, 3, 1, 2]: 3 at index 1 goes to slot 1, [-1, 0, 1, 2] stays.
    assert num_skipped == 0
    assert new.step == 2
    assert new.indices.tolist() == [[[3], [1]]]
    assert new.values.tolist() == [[[4.0], [3.0]]]
    assert new.minimum.tolist() == [-1.0, 1.0]
    assert new.maximum.tolist() == [0.0, 2.0]
    assert new.codes.tolist() == [0, 15, 0, 15]
    # Both corrections are (1/2) / (3/4) = 2/3. Index 1: m = 2/3 * 3, v = 2/3 * 9.
    # Index 3, one step old: m = 2/3 * 4/2, v = 2/3 * 16/2.
    expected = [1, 1 - 0.5 * 2 / 6**0.5, 1, 1 - 0.5 * (4 / 3) / (16 / 3) ** 0.5]
    np.testing.assert_allclose(parameter, expected, rtol=1e-15)
