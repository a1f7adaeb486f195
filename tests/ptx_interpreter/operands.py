"""Registers, constants and addresses as arrays with one element for each thread of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tests.ptx_interpreter.arithmetic import DTYPES, Array
from tests.ptx_interpreter.memory import PARAM_WINDOW, SHARED_WINDOW, Indices
from tests.ptx_interpreter.parser import (
    Address,
    Function,
    Module,
    Negated,
    Number,
    Operand,
    PtxError,
    Register,
    Special,
    Symbol,
    size_of,
)

POOL_BYTES = 1 << 20
SHARED_BEGIN = 1024  # the first bytes of shared memory belong to the system

# Some threads of a block: a slice if all of them, which spares copies, else their numbers.
Threads = Indices | slice


Kind = TypeVar("Kind")


def expect(kind: type[Kind], operand: object) -> Kind:
    if not isinstance(operand, kind):
        raise PtxError(f"{operand} is no {kind.__name__.lower()}")
    return operand


class NegatedView:
    """Of a predicate: indexes like an array."""

    def __init__(self, values: Array) -> None:
        self.values = values

    def __getitem__(self, threads: Threads) -> Array:
        return ~self.values[threads]


class Operands:
    """What the operands of instructions stand for, in the threads of a block.

    Args:
        num_padded: number of threads, a multiple of a warp's.
        num_threads: as many of these as there really are.
        entry: the kernel; its parameters and the shared variables of ``module`` have addresses.
    """

    def __init__(self, num_threads: int, num_padded: int, module: Module, entry: Function) -> None:
        self.num_padded = num_padded
        self.module, self.entry = module, entry
        self.registers: dict[Register, Array] = {}
        self.pools: list[npt.NDArray[np.uint8]] = []  # in which they lie
        self.num_used_bytes = POOL_BYTES  # of the last one
        self.special = {
            "%tid.x": np.arange(num_padded, dtype=np.uint32),
            "%ntid.x": np.full(num_padded, num_threads, np.uint32),
            "%ctaid.x": np.zeros(num_padded, np.uint32),
        }
        self.shared: dict[str, int] = {}  # addresses of the variables that are used
        self.shared_end = SHARED_BEGIN

    def randomize(self, random: np.random.Generator) -> None:
        """Registers hold anything before something is written to them."""
        for pool in self.pools:
            pool[:] = np.frombuffer(random.bytes(POOL_BYTES), np.uint8)
        for register, values in self.registers.items():
            if register.type == "pred":
                values[:] = values.view(np.uint8) & 1

    def register(self, register: Register) -> Array:
        """Its bits: unsigned integers, or booleans of a predicate."""
        if register not in self.registers:
            is_predicate = register.type == "pred"
            dtype = np.dtype(bool if is_predicate else f"u{size_of(register.type)}")
            num_bytes = self.num_padded * dtype.itemsize
            if self.num_used_bytes + num_bytes > POOL_BYTES:
                self.pools.append(np.zeros(POOL_BYTES, np.uint8))
                self.num_used_bytes = 0
            begin = self.num_used_bytes
            self.num_used_bytes += num_bytes
            self.registers[register] = self.pools[-1][begin : begin + num_bytes].view(dtype)
        return self.registers[register]

    def predicate(self, operand: Operand) -> Array | NegatedView:
        """A guard, or another predicate that may be negated."""
        if isinstance(operand, Negated):
            return NegatedView(self.register(operand.register))
        return self.values(operand, "pred")

    def values(self, operand: Operand, type_name: str) -> Array:
        """A view of an operand as a type; it changes as the program runs.

        Raises:
            PtxError: it cannot be one, or has another width.
        """
        dtype = DTYPES[type_name]
        if isinstance(operand, Number):
            return np.broadcast_to(number(operand.text, dtype), self.num_padded)
        if isinstance(operand, Symbol):
            return np.broadcast_to(np.array(self.address_of(operand), dtype), self.num_padded)
        if isinstance(operand, Register):
            bits = self.register(operand)
        elif isinstance(operand, Special) and operand.name in self.special:
            bits = self.special[operand.name]
        else:
            raise PtxError(f"{operand} is not known as a .{type_name}")
        if bits.dtype.itemsize != dtype.itemsize or (bits.dtype.kind == "b") != (dtype.kind == "b"):
            raise PtxError(f"{operand} is not as wide as a .{type_name}")
        return bits.view(dtype)

    def target(self, operand: Operand, type_name: str) -> Array:
        return self.values(expect(Register, operand), type_name)

    def address_of(self, symbol: Symbol) -> int:
        """In its own state space: that of a kernel's parameters begins at 0."""
        name = symbol.name
        if name in self.entry.parameters:
            return self.entry.parameters[name][0]
        if name not in self.module.shared:
            raise PtxError(f"{name} is not declared")
        if name not in self.shared:
            alignment, size = self.module.shared[name]
            self.shared[name] = -(-self.shared_end // alignment) * alignment
            self.shared_end = self.shared[name] + size
        return self.shared[name]

    def addresses(
        self, operand: Operand, space: str
    ) -> Callable[[Threads], npt.NDArray[np.uint64]]:
        """A function that gives them for some threads, as `Memory` counts them."""
        place = expect(Address, operand)
        window = {"shared": SHARED_WINDOW, "param": PARAM_WINDOW}.get(space, 0)
        step = np.uint64((place.offset + window) % (1 << 64))
        base: Array
        if isinstance(place.base, Symbol):
            base = np.full(self.num_padded, self.address_of(place.base), np.uint64)
        else:
            base = self.values(place.base, "u32" if space == "shared" else "u64")
        return lambda threads: base[threads].astype(np.uint64) + step


def number(text: str, dtype: np.dtype) -> Array:
    """A constant (4.5): an integer, or the bits of a float as in 0f3F800000."""
    float_bytes = {"0f": 4, "0d": 8}.get(text[:2].lower(), 0)
    if (dtype.itemsize if dtype.kind == "f" else 0) != float_bytes:
        raise PtxError(f"{text} is no {dtype}")
    value = int(text[2:], 16) if float_bytes else int(text.removesuffix("U"), 0)
    if dtype.kind == "b":
        return np.array(value != 0)
    bits = np.dtype(f"u{dtype.itemsize}")
    return np.array(value % (1 << 8 * dtype.itemsize), bits).view(dtype)
