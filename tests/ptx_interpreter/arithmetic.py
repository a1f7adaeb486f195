"""What the instructions compute that touch nothing but registers, exactly, by NVIDIA's PTX ISA.

``INSTRUCTIONS`` has one entry for each opcode with its modifiers; one that is not there is unknown.
A function takes and returns arrays with one element for each thread, of the types that the entry
names. Sections are those of the PTX ISA, version 9.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.ptx_interpreter.parser import PtxError

Array = npt.NDArray[Any]

DTYPES = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "pred": np.dtype(bool),
    "bf16": np.dtype("u2"),  # as bits
    "bf16x2": np.dtype("u4"),
}


@dataclass(frozen=True)
class Semantics:
    function: Callable[..., Array]
    result: str
    operands: tuple[str, ...]


INSTRUCTIONS: dict[str, Semantics] = {}


def expand(pattern: str) -> list[str]:
    """``a.{b,c}`` stands for ``a.b`` and ``a.c``."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    # Outside of braces there are no commas.
    return ["".join(choice) for choice in itertools.product(*parts)]


def instruction(
    patterns: str, types: str
) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Enters a function for all opcodes of ``patterns``, separated by blanks.

    ``types`` are those of the result and of the operands; ``T`` is the opcode's last modifier.
    """

    def enter(function: Callable[..., Array]) -> Callable[..., Array]:
        for opcode in itertools.chain.from_iterable(map(expand, patterns.split())):
            own = opcode.rsplit(".", 1)[-1]
            result, *operands = (own if name == "T" else name for name in types.split())
            INSTRUCTIONS[opcode] = Semantics(function, result, tuple(operands))
        return function

    return enter


# -------------------------------------------------------------------------------------------------
# Integers (9.7.1) and bits (9.7.8). NumPy's wrap around, as PTX's do.

INTEGERS = "{s16,u16,s32,u32,s64,u64}"
instruction(f"add.{INTEGERS}", "T T T")(np.add)
instruction(f"sub.{INTEGERS}", "T T T")(np.subtract)
instruction(f"mul.lo.{INTEGERS}", "T T T")(np.multiply)
instruction(f"min.{INTEGERS}", "T T T")(np.minimum)
instruction(f"max.{INTEGERS}", "T T T")(np.maximum)
instruction("neg.{s16,s32,s64}", "T T")(np.negative)
instruction("and.{pred,b16,b32,b64}", "T T T")(np.bitwise_and)
instruction("or.{pred,b16,b32,b64}", "T T T")(np.bitwise_or)
instruction("xor.{pred,b16,b32,b64}", "T T T")(np.bitwise_xor)
instruction("not.{pred,b16,b32,b64}", "T T")(np.invert)
instruction("mov.{pred,b16,u16,s16,b32,u32,s32,f32,b64,u64,s64,f64}", "T T")(np.copy)


@instruction("mad.lo.{s32,u32}", "T T T T")
def multiply_and_add(a: Array, b: Array, c: Array) -> Array:
    return a * b + c


@instruction("mul.wide.s32", "s64 T T")
@instruction("mul.wide.u32", "u64 T T")
def multiply_wide(a: Array, b: Array) -> Array:
    wide = np.dtype(f"{a.dtype.kind}8")
    return a.astype(wide) * b.astype(wide)


@instruction("div.{s32,u32}", "T T T")
def divide_integers(a: Array, b: Array) -> Array:
    """Rounds toward zero; what a division by zero gives is not specified."""
    if not b.all():
        raise PtxError("division by zero")
    quotient = abs(a.astype(np.int64)) // abs(b.astype(np.int64))
    return np.where((a < 0) == (b < 0), quotient, -quotient).astype(a.dtype)


@instruction("rem.{s32,u32}", "T T T")
def remainder(a: Array, b: Array) -> Array:
    return a - divide_integers(a, b) * b


def _shifted(shift: Callable[..., Array], a: Array, amount: Array, beyond: Array) -> Array:
    """Amounts of the width and more are clamped to it (9.7.8.9, shl)."""
    width = 8 * a.dtype.itemsize
    return np.where(amount < width, shift(a, (amount % width).astype(a.dtype)), beyond)


@instruction("shl.{b16,b32,b64}", "T T u32")
def shift_left(a: Array, amount: Array) -> Array:
    return _shifted(np.left_shift, a, amount, np.zeros_like(a))


@instruction("shr.{b16,b32,b64,u16,u32,u64,s16,s32,s64}", "T T u32")
def shift_right(a: Array, amount: Array) -> Array:
    sign = a >> (8 * a.dtype.itemsize - 1) if a.dtype.kind == "i" else np.zeros_like(a)
    return _shifted(np.right_shift, a, amount, sign)


@instruction("shf.l.wrap.b32", "T T T u32")
def funnel_shift_left(low: Array, high: Array, amount: Array) -> Array:
    both = high.astype(np.uint64) << np.uint64(32) | low
    return (both << (amount % 32).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


@instruction("popc.b32", "u32 T")
def population_count(a: Array) -> Array:
    return np.bitwise_count(a).astype(np.uint32)


@instruction("brev.b32", "T T")
def reverse_bits(a: Array) -> Array:
    for distance, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F)):
        a = (a >> distance & mask) | (a & mask) << distance
    return a.byteswap()


@instruction("bfind.shiftamt.u32", "u32 T")
def shift_to_leading_bit(a: Array) -> Array:
    """How far to shift left until the highest bit that is set leads; all ones for 0."""
    _, exponent = np.frexp(a.astype(np.float64))
    return np.where(a == 0, np.uint32(0xFFFFFFFF), 32 - exponent.astype(np.uint32))


@instruction("bfi.{b32,b64}", "T T T u32 u32")
def insert_bits(a: Array, b: Array, begin: Array, length: Array) -> Array:
    """Into ``b``, ``length`` bits of ``a`` from bit ``begin`` on; both count modulo 256."""
    begin, length = begin % 256, length % 256
    ones = ~np.zeros_like(a)
    mask = shift_left(~shift_left(ones, length), begin)
    return (shift_left(a, begin) & mask) | (b & ~mask)


@instruction("prmt.b32", "T T T T")
def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """Each nibble selects a byte of {b, a}; its highest bit asks for that byte's sign instead."""
    both = b.astype(np.uint64) << np.uint64(32) | a
    result = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> 4 * i & 0xF
        byte = (both >> (8 * (nibble & 7)).astype(np.uint64)).astype(np.uint32) & 0xFF
        sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
        result |= np.where(nibble & 8, sign, byte) << 8 * i
    return result


@instruction("lop3.b32", "T T T T u32")
def look_up_bits(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Bit (4 a + 2 b + c) of the table, for each bit."""
    result = np.zeros_like(a)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        result |= np.where(table >> i & 1, term, np.uint32(0))
    return result


# -------------------------------------------------------------------------------------------------
# Floating point (9.7.3)

NAN32 = np.array(0x7FFFFFFF, np.uint32).view(np.float32)
# Where the ISA says "unspecified NaN": one that a program would notice if it relied on its bits.
UNSPECIFIED_NAN32 = np.array(0xFFC12345, np.uint32).view(np.float32)
BF16_NAN = np.uint16(0x7FFF)


def with_canonical_nan(values: Array) -> Array:
    """A float32 operation gives no other NaN than 0x7fffffff (Programming Guide, 20.3)."""
    is_nan = values != values
    if is_nan.any():
        values = np.where(is_nan, NAN32, values)
    return values


def float_instruction(opcode: str, function: Callable[..., Array], num_operands: int) -> None:
    """In float32 and float64, rounded to nearest even, as NumPy's operations are."""
    types = " ".join(["T"] * (num_operands + 1))
    instruction(f"{opcode}.f64", types)(function)
    instruction(f"{opcode}.f32", types)(lambda *operands: with_canonical_nan(function(*operands)))


float_instruction("add.rn", np.add, 2)
float_instruction("sub.rn", np.subtract, 2)
float_instruction("mul.rn", np.multiply, 2)
float_instruction("div.rn", np.divide, 2)
float_instruction("rcp.rn", np.reciprocal, 1)
float_instruction("sqrt.rn", np.sqrt, 1)


def round_to_odd(total: Array, error: Array) -> Array:
    """The float64 sum ``total + error``, rounded to odd: it can be rounded again to float32.

    ``total`` is the sum rounded to nearest, ``error`` what that left over.
    """
    bits = total.view(np.int64)
    toward_error = np.where((error > 0) == (total > 0), 1, -1)
    inexact = np.isfinite(total) & (error != 0) & (bits % 2 == 0)
    return np.where(inexact, bits + toward_error, bits).view(np.float64)


@instruction("fma.rn.f32", "T T T T")
def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)  # exact
    total = product + addend
    rest = total - product  # Knuth's two-sum: the error of an addition, exactly
    error = (product - (total - rest)) + (addend - rest)
    return with_canonical_nan(round_to_odd(total, error).astype(np.float32))


@instruction("mul.rz.f32", "T T T")
def multiply_toward_zero(a: Array, b: Array) -> Array:
    product = a.astype(np.float64) * b  # exact
    rounded = product.astype(np.float32)
    too_large = abs(rounded) > abs(product)
    return with_canonical_nan(np.where(too_large, np.nextafter(rounded, np.float32(0)), rounded))


@instruction("abs.f32", "T T")
def absolute(a: Array) -> Array:
    return np.where(np.isnan(a), UNSPECIFIED_NAN32, abs(a))


@instruction("neg.f32", "T T")
def negate(a: Array) -> Array:
    return np.where(np.isnan(a), UNSPECIFIED_NAN32, -a)


@instruction("copysign.f32", "T T T")
def copy_sign(a: Array, b: Array) -> Array:
    """The sign of ``a`` with the magnitude of ``b``."""
    return np.copysign(b, a)


def _extreme(a: Array, b: Array, wants_larger: bool) -> Array:
    """Of two numbers one; a NaN loses to a number, and +0 is greater than -0 (9.7.3.12)."""
    a_is_larger = (a > b) | ((a == b) & np.signbit(b))
    takes_a = np.isnan(b) | (~np.isnan(a) & (a_is_larger == wants_larger))
    return with_canonical_nan(np.where(takes_a, a, b))


@instruction("max.f32", "T T T")
def larger(a: Array, b: Array) -> Array:
    return _extreme(a, b, True)


@instruction("min.f32", "T T T")
def smaller(a: Array, b: Array) -> Array:
    return _extreme(a, b, False)


# -------------------------------------------------------------------------------------------------
# bfloat16 (9.7.4)


def float_of_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@instruction("cvt.rn.bf16.f32", "bf16 f32")
def bf16_of_float(values: Array) -> Array:
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), BF16_NAN, rounded.astype(np.uint16))


def packed(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


@instruction("cvt.rn.bf16x2.f32", "bf16x2 f32 f32")
def pack_two_bf16(high: Array, low: Array) -> Array:
    return packed(bf16_of_float(low), bf16_of_float(high))


def _in_halves(function: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    low, high = (
        bf16_of_float(function(float_of_bf16(a & 0xFFFF), float_of_bf16(b & 0xFFFF)))
        for a, b in ((a, b), (a >> 16, b >> 16))
    )
    return packed(low, high)


@instruction("max.bf16x2", "T T T")
def larger_halves(a: Array, b: Array) -> Array:
    return _in_halves(larger, a, b)


@instruction("min.bf16x2", "T T T")
def smaller_halves(a: Array, b: Array) -> Array:
    return _in_halves(smaller, a, b)


# -------------------------------------------------------------------------------------------------
# Comparisons (9.7.6) and selections

# A comparison with a NaN is false, that of a name that ends in u true.
COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
ORDERED_TYPES = "{s16,u16,s32,u32,s64,u64}"
for name, compare in COMPARISONS.items():
    instruction(f"setp.{name}.{ORDERED_TYPES}", "pred T T")(compare)
    if name in ("eq", "ne"):
        instruction(f"setp.{name}.{{b16,b32,b64}}", "pred T T")(compare)

    def compare_ordered(a: Array, b: Array, compare: Callable[..., Array] = compare) -> Array:
        return compare(a, b) & (a == a) & (b == b)

    def compare_or_unordered(a: Array, b: Array, compare: Callable[..., Array] = compare) -> Array:
        return compare(a, b) | (a != a) | (b != b)

    instruction(f"setp.{name}.{{f32,f64}}", "pred T T")(compare_ordered)
    instruction(f"setp.{name}u.{{f32,f64}}", "pred T T")(compare_or_unordered)


@instruction("selp.{b16,u16,s16,b32,u32,s32,f32,b64,u64,s64,f64}", "T T T pred")
def select(a: Array, b: Array, condition: Array) -> Array:
    return np.where(condition, a, b)


# -------------------------------------------------------------------------------------------------
# Conversions (9.7.9.21)

for target, source in itertools.permutations(("u16", "s16", "u32", "s32", "u64", "s64"), 2):

    def convert_integer(a: Array, dtype: np.dtype = DTYPES[target]) -> Array:
        return a.astype(dtype)  # extends or cuts off

    instruction(f"cvt.{target}.{source}", f"{target} {source}")(convert_integer)


@instruction("cvt.rn.f32.u32", "f32 u32")
@instruction("cvt.rn.f32.s32", "f32 s32")
def float_of_integer(a: Array) -> Array:
    return a.astype(np.float64).astype(np.float32)


@instruction("cvt.rn.f32.f64", "f32 f64")
def narrow(a: Array) -> Array:
    return with_canonical_nan(a.astype(np.float32))


@instruction("cvt.f64.f32", "f64 f32")
def widen(a: Array) -> Array:
    return a.astype(np.float64)


@instruction("cvt.rmi.f32.f32", "f32 f32")
def round_down(a: Array) -> Array:
    return with_canonical_nan(np.floor(a))


def _toward_zero(a: Array, dtype: np.dtype) -> Array:
    """Out of range it clamps, and a NaN gives 0."""
    limits = np.iinfo(dtype)
    clamped = np.clip(np.trunc(a.astype(np.float64)), limits.min, limits.max)
    return np.where(np.isnan(a), 0, clamped).astype(dtype)


@instruction("cvt.rzi.u32.f32", "u32 f32")
def unsigned_of_float(a: Array) -> Array:
    return _toward_zero(a, np.dtype(np.uint32))


@instruction("cvt.rzi.s32.f32", "s32 f32")
def signed_of_float(a: Array) -> Array:
    return _toward_zero(a, np.dtype(np.int32))


@instruction("cvt.pack.sat.u4.s32.b32", "u32 s32 s32 b32")
def pack_two_codes(a: Array, b: Array, c: Array) -> Array:
    """``c`` moved up by a byte; below it ``a`` and then ``b``, clamped to 4 bits (9.7.9.22)."""
    high, low = (np.clip(values, 0, 15).astype(np.uint32) for values in (a, b))
    return c << 8 | high << 4 | low
