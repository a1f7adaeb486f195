"""Judges one step of `MicroAdam` against the oracle, teacher-forced.

Free runs cannot be compared: a single rounding tie makes two correct implementations diverge for
good. So every step is judged on its own: the oracle starts from the optimizer's state, and wherever
the optimizer had to round, what it stored must be a correct rounding of what the oracle holds,
within float32's own error. What follows from a stored number (codes from a bucket's limits,
parameters from the window) is judged from the number that was stored.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from microadam import MicroAdam
from tests.microadam import oracle
from tests.microadam.oracle import Floats, Hyperparameters, State

# All tolerances of the comparison: how far float32 may be from float64, as a multiple of the
# magnitudes that were added. Half a unit in the last place of float32 is 2^-24. Sums without error
# feedback (a first step) are exact and get no tolerance, so that ties are judged there.
TOLERANCES = {
    # max - min, / 15, code * unit, + min, + gradient: 5 roundings, relative to each term
    "accumulator": 2.0**-21,
    # a - min, max - min, / 15, its reciprocal, the product, + 0.5: 6 roundings
    "code": 2.0**-21,
    # for each slot: beta^age, times the value, plus the sum: 3 roundings
    "moment_per_slot": 2.0**-22,
    # bias correction, square root, + eps, quotient, times lr: 5 roundings
    "update": 2.0**-21,
    # 1 - lr * weight_decay, the product, two differences: 5 roundings
    "parameter": 2.0**-22,
    # max - min, / 15, code * unit, + min, alpha / (1 - alpha), its product: 6 roundings
    "applied_feedback": 2.0**-21,
    # absolute: float32 ends at 2^-149, and a bucket's unit loses that much 15 times
    "underflow": 2.0**-145,
}

FORMATS = {
    torch.float32: oracle.FLOAT32,
    torch.bfloat16: oracle.BFLOAT16,
    torch.float16: oracle.FLOAT16,
}


def hyperparameters(group: dict) -> Hyperparameters:
    return Hyperparameters(
        lr=float(group["lr"]),
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        alpha=group["alpha"],
        window_size=group["window_size"],
        density=group["density"],
        block_size=group["block_size"],
        bucket_size=group["bucket_size"],
    )


def to_numpy(t: Tensor) -> Floats:
    return t.detach().cpu().double().numpy()


def in_storage_order(t: Tensor, like: Tensor) -> Floats:
    """The elements of `t` (numel,), in the memory order of `like`."""
    address = torch.arange(like.untyped_storage().nbytes() // like.element_size())
    order = address.as_strided(like.shape, like.stride()).numpy().ravel().argsort()
    return to_numpy(t).ravel()[order]


def read_state(state: dict[str, Tensor], numel: int, hyper: Hyperparameters) -> State:
    """A parameter's state as the oracle holds it; the initial one before the first step."""
    if not state:
        return oracle.initial_state(numel, hyper)
    return State(
        step=int(state["step"]),
        indices=state["window_indices"].cpu().long().numpy(),
        values=to_numpy(state["window_values"]),
        codes=oracle.unpack_codes(state["error"].cpu().numpy(), numel, hyper.bucket_size),
        minimum=to_numpy(state["error_min"]),
        maximum=to_numpy(state["error_max"]),
    )


@dataclass(frozen=True)
class Snapshot:
    """A parameter, its gradient and its state at one point in time."""

    parameter: Floats
    gradient: Floats
    state: State


def take_snapshot(optimizer: MicroAdam, p: Tensor, hyper: Hyperparameters) -> Snapshot:
    return Snapshot(
        in_storage_order(p, like=p),
        in_storage_order(p.grad, like=p),
        # A copy: on the CPU the arrays share memory with the optimizer's tensors.
        read_state(copy.deepcopy(optimizer.state.get(p, {})), p.numel(), hyper),
    )


def step_and_judge(optimizer: MicroAdam) -> None:
    """Takes a step and asserts that every parameter with a gradient took the right one."""
    with_gradient = [
        (p, group, hyperparameters(group))
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    ]
    before = [take_snapshot(optimizer, p, hyper) for p, _, hyper in with_gradient]
    num_skipped_before = optimizer.num_skipped_blocks()
    optimizer.step()
    num_skipped = 0
    for (p, group, hyper), snapshot in zip(with_gradient, before, strict=True):
        after = take_snapshot(optimizer, p, hyper)
        num_skipped += judge_parameter(
            snapshot, after, hyper, FORMATS[p.dtype], group["stochastic_rounding"]
        )
    assert optimizer.num_skipped_blocks() == num_skipped_before + num_skipped


def judge_parameter(
    before: Snapshot,
    after: Snapshot,
    hyper: Hyperparameters,
    parameter_format: oracle.FloatFormat,
    stochastic_rounding: bool,
) -> int:
    """Asserts that `after` is a step from `before`; returns how many blocks had to be skipped."""
    np.testing.assert_array_equal(after.gradient, before.gradient)
    assert after.state.step == before.state.step + 1

    accumulator = oracle.accumulate(before.gradient, before.state, hyper.bucket_size)
    error = accumulator_error(before, hyper.bucket_size)
    feedback = oracle.dequantize(after.state, hyper.bucket_size)
    feedback_terms = feedback_magnitude(after.state, hyper.bucket_size)
    num_skipped = 0
    for block, (start, stop) in enumerate(oracle.block_ranges(accumulator.size, hyper.block_size)):
        elements = slice(start, stop)
        if not oracle.is_finite_block(accumulator[elements]):
            num_skipped += 1
            judge_skipped_block(before, after, block, elements, hyper.bucket_size)
            continue
        selected = judge_window(
            before.state, after.state, block, accumulator[elements], error[elements], hyper
        )
        residual = oracle.remove_selected(accumulator[elements], selected)
        residual_error = oracle.remove_selected(error[elements], selected)
        for first, last in oracle.block_ranges(stop - start, hyper.bucket_size):
            bucket = (start + first) // hyper.bucket_size
            judge_bucket(
                residual[first:last],
                residual_error[first:last],
                after.state.minimum[bucket],
                after.state.maximum[bucket],
                after.state.codes[start + first : start + last],
                hyper.alpha,
            )
        judge_update(
            before.parameter[elements],
            after.parameter[elements],
            feedback[elements],
            feedback_terms[elements],
            after.state.indices[block],
            after.state.values[block],
            after.state.step,
            hyper,
            parameter_format,
            stochastic_rounding,
        )
    return num_skipped


def accumulator_error(before: Snapshot, bucket_size: int) -> Floats:
    """How far float32's accumulator may be from the oracle's (numel,); 0 where it is exact."""
    feedback = feedback_magnitude(before.state, bucket_size)
    terms = np.abs(before.gradient) + feedback
    error = TOLERANCES["accumulator"] * terms + TOLERANCES["underflow"]
    return np.where(feedback == 0, 0.0, error)


def feedback_magnitude(state: State, bucket_size: int) -> Floats:
    """The magnitude that rounding errors of the dequantized error are relative to (numel,)."""
    bucket = np.arange(state.codes.size) // bucket_size
    return (np.abs(state.minimum) + np.abs(state.maximum))[bucket]


def judge_skipped_block(
    before: Snapshot, after: Snapshot, block: int, elements: slice, bucket_size: int
) -> None:
    buckets = slice(elements.start // bucket_size, -(-elements.stop // bucket_size))
    for old, new in [
        (before.parameter[elements], after.parameter[elements]),
        (before.state.indices[block], after.state.indices[block]),
        (before.state.values[block], after.state.values[block]),
        (before.state.codes[elements], after.state.codes[elements]),
        (before.state.minimum[buckets], after.state.minimum[buckets]),
        (before.state.maximum[buckets], after.state.maximum[buckets]),
    ]:
        np.testing.assert_array_equal(new, old, "a non-finite block must stay as it was")


def judge_window(
    before: State,
    after: State,
    block: int,
    accumulator: Floats,
    error: Floats,
    hyper: Hyperparameters,
) -> np.ndarray:
    """Judges selection and stored values of one block; returns what the optimizer selected (k,)."""
    slot = (after.step - 1) % hyper.window_size
    k = oracle.num_selected(accumulator.size, hyper)
    selected = after.indices[block, slot, :k]
    assert np.all(np.diff(selected) > 0), "entries of a slot stand in ascending index order"
    assert np.all((selected >= 0) & (selected < accumulator.size))

    if not error.any():
        np.testing.assert_array_equal(selected, oracle.select(accumulator, k))
    magnitude = np.abs(accumulator)
    is_selected = np.isin(np.arange(accumulator.size), selected)
    weakest_selected = (magnitude + error)[is_selected].min()
    strongest_left = (magnitude - error)[~is_selected].max(initial=0.0)
    assert weakest_selected >= strongest_left, "a larger accumulator was left out"

    assert_rounded(
        after.values[block, slot, :k], accumulator[selected], error[selected], oracle.BFLOAT16
    )
    other_slots = np.arange(hyper.window_size) != slot
    np.testing.assert_array_equal(
        after.indices[block, other_slots], before.indices[block, other_slots]
    )
    np.testing.assert_array_equal(
        after.values[block, other_slots], before.values[block, other_slots]
    )
    return selected


def judge_bucket(
    residual: Floats,
    error: Floats,
    minimum: float,
    maximum: float,
    codes: np.ndarray,
    alpha: float,
) -> None:
    """Limits may differ at ties of bfloat16, codes where (a - min) / u + 0.5 is nearly whole."""
    limits = []  # those that the codes may have been computed with
    for stored, reduce in [(minimum, np.min), (maximum, np.max)]:
        lowest, highest = oracle.BFLOAT16.round(
            np.array([reduce(residual - error), reduce(residual + error)])
        )
        candidates = numbers_around(stored / (1 - alpha))
        is_possible = (lowest <= candidates) & (candidates <= highest)
        is_possible &= oracle.keep_share(candidates, alpha) == stored
        limits.append(candidates[is_possible])
    assert any(
        codes_fit(residual, error, low, high, codes) for low, high in itertools.product(*limits)
    )


def numbers_around(number: float) -> Floats:
    """The nearest bfloat16 number, and its neighbours."""
    nearest = oracle.BFLOAT16.round(np.array([number]))
    spacing = np.spacing(np.float32(abs(nearest))) * 2.0**16
    steps = spacing * np.array([-1, -0.5, 0, 0.5, 1])  # below a power of two it is half as large
    return np.unique(oracle.BFLOAT16.round(nearest + steps))


def codes_fit(
    residual: Floats, error: Floats, minimum: float, maximum: float, codes: np.ndarray
) -> bool:
    unit = (maximum - minimum) / oracle.HIGHEST_CODE
    if unit < oracle.SMALLEST_UNIT:
        return not codes.any()
    terms = np.abs(residual) + abs(minimum) + abs(maximum)
    slack = (TOLERANCES["code"] * terms + TOLERANCES["underflow"] + error) / unit
    level = oracle.unrounded_codes(residual, minimum, maximum)
    lowest, highest = (
        np.clip(np.floor(number), 0, oracle.HIGHEST_CODE)
        for number in (level - slack, level + slack)
    )
    return bool(np.all((lowest <= codes) & (codes <= highest)))


def judge_update(
    before: Floats,
    after: Floats,
    feedback: Floats,
    feedback_terms: Floats,
    indices: np.ndarray,
    values: Floats,
    step: int,
    hyper: Hyperparameters,
    parameter_format: oracle.FloatFormat,
    stochastic_rounding: bool,
) -> None:
    """Judges the parameters of one block, given window and error as the optimizer stored them."""
    moments = oracle.window_moments(indices, values, step, before.size, hyper)
    decayed = before * (1 - hyper.lr * hyper.weight_decay)
    applied = hyper.lr * oracle.applied_feedback(feedback, hyper.alpha)
    update = applied + hyper.lr * oracle.adam_direction(moments, step, hyper)

    all_added = replace(moments, z1=moments.z1_magnitude)
    update_magnitude = hyper.lr * oracle.adam_direction(all_added, step, hyper)
    update_error = update_magnitude * (
        2 * hyper.window_size * TOLERANCES["moment_per_slot"] + TOLERANCES["update"]
    )
    applied_terms = hyper.lr * oracle.applied_feedback(feedback_terms, hyper.alpha)
    update_error += TOLERANCES["applied_feedback"] * applied_terms
    is_changed = moments.in_window | (hyper.weight_decay != 0) | (hyper.alpha != 0)
    is_changed &= np.isfinite(before)  # a huge error may have made a float16 overflow
    error = np.where(
        is_changed,
        TOLERANCES["parameter"] * np.abs(before) + update_error + TOLERANCES["underflow"],
        0.0,
    )
    assert_rounded(after, decayed - update, error, parameter_format, stochastic_rounding)


def assert_rounded(
    stored: Floats,
    exact: Floats,
    error: Floats,
    number_format: oracle.FloatFormat,
    stochastic: bool = False,
) -> None:
    """`stored` is `exact`, known up to `error`, rounded to nearest, or to either neighbour."""
    down, up = (np.floor, np.ceil) if stochastic else (np.rint, np.rint)
    lowest = number_format.round(exact - error, down)
    highest = number_format.round(exact + error, up)
    wrong = np.flatnonzero(~((lowest <= stored) & (stored <= highest)))
    assert wrong.size == 0, (
        f"{wrong.size} of {stored.size} numbers differ, the first at {wrong[0]}: "
        f"{stored[wrong[0]]!r}, expected {exact[wrong[0]]!r} +- {error[wrong[0]]!r} rounded"
    )
