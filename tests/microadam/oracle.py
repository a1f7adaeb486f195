"""MicroAdam in NumPy float64: the judge of every implementation in the package.

Written from the numerical contract alone, element by element where that is the clearest way to say
it, and sharing no code with the package. Only what the contract stores is rounded: bfloat16 values
and bucket limits, int16 indices, 4-bit codes. An implementation that works in float32 may therefore
differ where two candidates are too close for float32 to distinguish; `judge.py` says by how much.

Arrays are one-dimensional over elements in storage order unless their shape is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

NUM_CODES = 16  # 4 bits
HIGHEST_CODE = NUM_CODES - 1
SMALLEST_UNIT = 2.0**-126  # of the codes: below it float32 has no reciprocal
# A block with an accumulator entry this large counts as non-finite.
MAGNITUDE_LIMIT = 2.0**120 - 2.0**111


@dataclass(frozen=True)
class Hyperparameters:
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    alpha: float = 0.0
    window_size: int = 10
    density: float = 0.01
    block_size: int = 4096
    bucket_size: int = 64


@dataclass(frozen=True)
class State:
    """The optimizer state of one parameter, in plain numbers.

    Attributes:
        step: steps taken.
        indices: (num_blocks, window_size, k), position of an entry in its block.
        values: (num_blocks, window_size, k), bfloat16 numbers held as float64.
        codes: (numel,), 4-bit codes of the quantized error.
        minimum, maximum: (num_buckets,), bfloat16 numbers held as float64.
    """

    step: int
    indices: Integers
    values: Floats
    codes: Integers
    minimum: Floats
    maximum: Floats


def initial_state(numel: int, hyper: Hyperparameters) -> State:
    blocks = block_ranges(numel, hyper.block_size)
    k = max((num_selected(stop - start, hyper) for start, stop in blocks), default=1)
    window_shape = (len(blocks), hyper.window_size, k)
    num_buckets = math.ceil(numel / hyper.bucket_size)
    return State(
        step=0,
        indices=np.zeros(window_shape, np.int64),
        values=np.zeros(window_shape),
        codes=np.zeros(numel, np.int64),
        minimum=np.zeros(num_buckets),
        maximum=np.zeros(num_buckets),
    )


# Layout


def block_ranges(numel: int, block_size: int) -> list[tuple[int, int]]:
    """First and one-past-last element of every top-k block (or bucket)."""
    return [(start, min(start + block_size, numel)) for start in range(0, numel, block_size)]


def num_selected(length: int, hyper: Hyperparameters) -> int:
    return max(1, math.ceil(hyper.density * length))


def unpack_codes(error: NDArray[np.uint8], numel: int, bucket_size: int) -> Integers:
    """4-bit codes (numel,) from bytes: the low half of byte j of a bucket is code j, the high half
    code j + bucket_size / 2."""
    half = bucket_size // 2
    bucket, position = np.divmod(np.arange(numel), bucket_size)
    byte = error[bucket * half + position % half].astype(np.int64)
    return np.where(position < half, byte & 15, byte >> 4)


# Rounding


@dataclass(frozen=True)
class FloatFormat:
    significant_bits: int
    min_exponent: int  # of the smallest normal number, written as m * 2^e with m in [0.5, 1)
    max: float

    def round(self, numbers: Floats, direction: np.ufunc = np.rint) -> Floats:
        """The neighbours in this format: nearest, ties to even, or by np.floor, np.ceil."""
        _, exponent = np.frexp(numbers)
        spacing = np.ldexp(1.0, np.maximum(exponent, self.min_exponent) - self.significant_bits)
        rounded = direction(numbers / spacing) * spacing
        return np.where(np.abs(rounded) > self.max, np.copysign(np.inf, numbers), rounded)


FLOAT32 = FloatFormat(24, -125, (2 - 2.0**-23) * 2.0**127)
BFLOAT16 = FloatFormat(8, -125, (2 - 2.0**-7) * 2.0**127)
FLOAT16 = FloatFormat(11, -13, 65504.0)


# Algorithm 1, one function per line of the contract


def dequantize(state: State, bucket_size: int) -> Floats:
    """Contract 5: code * u + min with u = (max - min) / 15. The error feedback (numel,)."""
    bucket = np.arange(state.codes.size) // bucket_size
    u = (state.maximum - state.minimum) / HIGHEST_CODE
    return state.codes * u[bucket] + state.minimum[bucket]


def accumulate(gradient: Floats, state: State, bucket_size: int) -> Floats:
    """Contract 1."""
    return gradient + dequantize(state, bucket_size)


def is_finite_block(accumulator: Floats) -> bool:
    """Contract 8."""
    return bool(np.all(np.abs(accumulator) < MAGNITUDE_LIMIT))  # False for NaN


def select(accumulator: Floats, k: int) -> Integers:
    """Contract 3, one block: ascending positions of the k largest magnitudes, ties to the first."""
    by_magnitude = sorted(range(accumulator.size), key=lambda i: (-abs(accumulator[i]), i))
    return np.array(sorted(by_magnitude[:k]), np.int64)


def remove_selected(accumulator: Floats, selected: Integers) -> Floats:
    """Contract 4, one block."""
    residual = accumulator.copy()
    residual[selected] = 0.0
    return residual


def bucket_limits(residual: Floats) -> tuple[float, float]:
    """Contract 5, one bucket: minimum and maximum in bfloat16."""
    lowest, highest = BFLOAT16.round(np.array([residual.min(), residual.max()]))
    return float(lowest), float(highest)


def unrounded_codes(residual: Floats, minimum: float, maximum: float) -> Floats:
    """Contract 5, one bucket: (a - min) / u + 0.5; its floor, clamped to 0..15, is the code."""
    u = (maximum - minimum) / HIGHEST_CODE
    if u < SMALLEST_UNIT:
        return np.zeros(residual.size)
    return (residual - minimum) / u + 0.5


def quantize(residual: Floats, minimum: float, maximum: float) -> Integers:
    """Contract 5, one bucket."""
    codes = np.floor(unrounded_codes(residual, minimum, maximum))
    return np.clip(codes, 0, HIGHEST_CODE).astype(np.int64)


def keep_share(limits: Floats, alpha: float) -> Floats:
    """The limits of a bucket whose errors are multiplied by 1 - alpha; its codes stay."""
    return BFLOAT16.round((1 - alpha) * limits)


def applied_feedback(kept: Floats, alpha: float) -> Floats:
    """alpha times the error e, of which (1 - alpha) * e is kept."""
    return kept * (alpha / (1 - alpha))


@dataclass(frozen=True)
class Moments:
    """Contract 6, one block: per coordinate (length,)."""

    z1: Floats
    z2: Floats
    z1_magnitude: Floats  # sum of beta1^r |v|, which rounding errors of z1 are relative to
    in_window: NDArray[np.bool_]


def window_moments(
    indices: Integers, values: Floats, step: int, length: int, hyper: Hyperparameters
) -> Moments:
    """Contract 6, one block.

    Args:
        indices, values: (window_size, k) of this block, including the slot of `step`.
        step: count of the step being taken, from 1.
        length: elements in the block; only its own k entries of a slot are in use.
    """
    z1, z2, magnitude = np.zeros(length), np.zeros(length), np.zeros(length)
    in_window = np.zeros(length, np.bool_)
    k = num_selected(length, hyper)
    for age in range(min(step, hyper.window_size)):
        slot = (step - 1 - age) % hyper.window_size
        for index, value in zip(indices[slot, :k], values[slot, :k], strict=True):
            z1[index] += hyper.beta1**age * value
            z2[index] += hyper.beta2**age * value**2
            magnitude[index] += hyper.beta1**age * abs(value)
            in_window[index] = True
    z2[z2 > FLOAT32.max] = np.inf  # as in float32: such a coordinate does not move
    return Moments(z1, z2, magnitude, in_window)


def bias_corrections(step: int, hyper: Hyperparameters) -> tuple[float, float]:
    """What turns z1, z2 into m_hat, v_hat."""
    return (
        (1 - hyper.beta1) / (1 - hyper.beta1**step),
        (1 - hyper.beta2) / (1 - hyper.beta2**step),
    )


def adam_direction(moments: Moments, step: int, hyper: Hyperparameters) -> Floats:
    """Contract 7: m_hat / (sqrt(v_hat) + eps), and 0 outside the window."""
    correction1, correction2 = bias_corrections(step, hyper)
    denominator = np.sqrt(correction2 * moments.z2) + hyper.eps
    direction = np.zeros_like(moments.z1)
    np.divide(correction1 * moments.z1, denominator, out=direction, where=moments.in_window)
    return direction


def take_step(
    parameter: Floats, gradient: Floats, state: State, hyper: Hyperparameters
) -> tuple[Floats, State, int]:
    """One step of one parameter.

    Returns:
        The parameter before rounding to its dtype (numel,), the new state, and how many blocks
        were not finite.
    """
    parameter = parameter.copy()
    new = replace(
        state,
        step=state.step + 1,
        indices=state.indices.copy(),
        values=state.values.copy(),
        codes=state.codes.copy(),
        minimum=state.minimum.copy(),
        maximum=state.maximum.copy(),
    )
    slot = (new.step - 1) % hyper.window_size
    all_accumulators = accumulate(gradient, state, hyper.bucket_size)
    num_nonfinite = 0
    for block, (start, stop) in enumerate(block_ranges(parameter.size, hyper.block_size)):
        accumulator = all_accumulators[start:stop]
        if not is_finite_block(accumulator):
            num_nonfinite += 1
            continue
        k = num_selected(stop - start, hyper)
        selected = select(accumulator, k)
        new.indices[block, slot, :k] = selected
        new.values[block, slot, :k] = BFLOAT16.round(accumulator[selected])
        residual = remove_selected(accumulator, selected)
        for first, last in block_ranges(stop - start, hyper.bucket_size):
            bucket = (start + first) // hyper.bucket_size
            limits = bucket_limits(residual[first:last])
            new.codes[start + first : start + last] = quantize(residual[first:last], *limits)
            kept_limits = keep_share(np.array(limits), hyper.alpha)
            new.minimum[bucket], new.maximum[bucket] = kept_limits
        moments = window_moments(
            new.indices[block], new.values[block], new.step, stop - start, hyper
        )
        parameter[start:stop] *= 1 - hyper.lr * hyper.weight_decay
        kept = dequantize(new, hyper.bucket_size)[start:stop]
        parameter[start:stop] -= hyper.lr * applied_feedback(kept, hyper.alpha)
        parameter[start:stop] -= hyper.lr * adam_direction(moments, new.step, hyper)
    return parameter, new, num_nonfinite
