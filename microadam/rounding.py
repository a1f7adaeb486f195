"""Rounding float32 to a parameter's dtype: to nearest even, or stochastically.

Stochastic rounding keeps updates smaller than half a unit in the last place from vanishing. Its
random bits come from the counter-based generator Philox4x32-10 (Salmon et al., "Parallel Random
Numbers: As Easy as 1, 2, 3", SC 2011), so that they depend only on the seed, the parameter, its
step and the element: not on the device, the number of threads or the order of work.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_ELEMENTS_PER_CALL = 8  # 4 words of 32 bits, 16 bits per element


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product; int64 wraps around, which keeps all 64 bits."""
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four random 32-bit words for each counter, as int64 tensors of the counters' shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return [c0, c1, c2, c3]


def random_bits(
    numel: int, seed: int, ordinal: int, step: int, first_element: int, device: torch.device
) -> Tensor:
    """16 random bits for each of ``numel`` elements from ``first_element``: int64 ``(numel,)``.

    Element ``i`` takes half a word of the call with counter ``(i // 8, ordinal, step)`` and the
    seed as key: bits ``16 * (i % 2)`` upwards of word ``(i % 8) // 2``.
    """
    first_call = first_element // _ELEMENTS_PER_CALL
    last_call = (first_element + numel - 1) // _ELEMENTS_PER_CALL
    call = torch.arange(first_call, last_call + 1, device=device)
    counter = [
        call & _MASK,
        torch.full_like(call, ordinal & _MASK),
        torch.full_like(call, step & _MASK),
        call >> 32,
    ]
    words = torch.stack(philox(counter, (seed & _MASK, (seed >> 32) & _MASK)), dim=1)
    bits = torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten()
    skipped = first_element - first_call * _ELEMENTS_PER_CALL
    return bits[skipped : skipped + numel]


def _stochastic_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """Adds 16 random bits below the last place that is kept, and truncates there."""
    rounded = (value.view(torch.int32) + bits.int() & -65536).view(torch.float32)
    # A GPU's NaN has all bits set but the sign: the addition has turned it into -0.
    return torch.where(value.isnan(), value, rounded).bfloat16()


def _stochastic_float16(value: Tensor, bits: Tensor) -> Tensor:
    """As for bfloat16, with the 13 bits that float16 drops; its unit stops shrinking at 2^-24."""
    exponent = torch.frexp(value).exponent - 1
    unit = torch.ldexp(torch.ones_like(value), exponent.clamp(min=-14) - 10)
    fraction = (bits & 0x1FFF).float() / 8192
    rounded = torch.copysign((value.abs() / unit + fraction).floor() * unit, value)
    return torch.where(value.abs() < 65504, rounded, value).half()


_STOCHASTIC = {torch.bfloat16: _stochastic_bfloat16, torch.float16: _stochastic_float16}


def round_to_dtype(
    value: Tensor,
    dtype: torch.dtype,
    key: tuple[int, int] | None,
    step: int,
    first_element: int,
) -> Tensor:
    """``value`` (float32) in ``dtype``.

    Rounds to nearest even without a ``key``, and stochastically with ``key = (seed, ordinal)``.
    float32 is returned unchanged.
    """
    if key is None or dtype not in _STOCHASTIC:
        return value.to(dtype)
    bits = random_bits(value.numel(), *key, step, first_element, value.device)
    return _STOCHASTIC[dtype](value, bits.view(value.shape))
