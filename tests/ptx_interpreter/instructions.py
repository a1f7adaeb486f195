"""The instructions that do more than arithmetic: memory, control, and exchanges between threads.

``decode`` turns an instruction into an `Operation` of a thread block. Each family has a decoder,
which refuses modifiers and operands that it does not know. Sections are those of the PTX ISA,
version 9.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx_interpreter.arithmetic import DTYPES, INSTRUCTIONS, Array
from tests.ptx_interpreter.memory import PARAM_WINDOW, SHARED_WINDOW
from tests.ptx_interpreter.operands import NegatedView, Threads, expect
from tests.ptx_interpreter.parser import (
    Address,
    Function,
    Instruction,
    Negated,
    Number,
    Operand,
    Pair,
    PtxError,
    Register,
    Symbol,
    Vector,
    size_of,
)

if TYPE_CHECKING:
    from tests.ptx_interpreter.machine import Block

WARP = 32


@dataclass
class Operation:
    """An instruction, ready to run for those threads whose guard holds."""

    line: int
    run: Callable[[Threads], None]
    guard: Array | NegatedView | None = None
    ends_turn: bool = False  # other threads may notice when it runs
    jumps: bool = False  # changes program counters, which stand behind it when it runs
    mask: Array | None = None  # of a collective: the threads of a warp that run it together


Decoder = Callable[["Block", Function, Instruction, str], Operation]
DECODERS: dict[str, Decoder] = {}


def family(name: str) -> Callable[[Decoder], Decoder]:
    """Enters the decoder of all instructions that begin with a name; it gets their modifiers."""

    def enter(decoder: Decoder) -> Decoder:
        DECODERS[name] = decoder
        return decoder

    return enter


def decode(block: Block, function: Function, i: Instruction) -> Operation:
    """An instruction of a function, for the threads of a block.

    Raises:
        PtxError: it is not known, or its operands do not fit.
    """
    name, _, modifiers = i.opcode.partition(".")
    try:
        if i.opcode in INSTRUCTIONS and not isinstance(i.operands[1], Vector):
            operation = decode_arithmetic(block, i)
        elif name in DECODERS:
            operation = DECODERS[name](block, function, i, modifiers)
        else:
            raise PtxError("unknown instruction")
        if i.guard is not None:
            if operation.mask is not None:
                raise PtxError("a guard is not known here")
            guard = Negated(i.guard) if i.guard_negated else i.guard
            operation.guard = block.operands.predicate(guard)
    except PtxError as error:
        raise PtxError(f"line {i.line}: {i.opcode}: {error}") from error
    except ValueError as error:  # of unpacking
        raise PtxError(f"line {i.line}: {i.opcode}: wrong number of operands") from error
    return operation


def decode_arithmetic(block: Block, i: Instruction) -> Operation:
    semantics = INSTRUCTIONS[i.opcode]
    target = block.operands.target(i.operands[0], semantics.result)
    sources = [
        block.operands.values(operand, name)
        for operand, name in zip(i.operands[1:], semantics.operands, strict=True)
    ]

    def run(threads: Threads) -> None:
        target[threads] = semantics.function(*[source[threads] for source in sources])

    return Operation(i.line, run)


def known(condition: bool) -> None:
    if not condition:
        raise PtxError("unknown modifiers or operands")


# -------------------------------------------------------------------------------------------------
# Data movement (9.7.9)


@family("mov")
def pack(block: Block, _: Function, i: Instruction, modifiers: str) -> Operation:
    """``mov.b32 d, {a, b}``: the first element is the lowest."""
    target, source = i.operands
    known(modifiers in ("b32", "b64"))
    whole = block.operands.target(target, modifiers)
    half = {"b32": "b16", "b64": "b32"}[modifiers]
    low, high = (
        block.operands.values(element, half) for element in expect(Vector, source).elements
    )

    def run(threads: Threads) -> None:
        shifted = high[threads].astype(whole.dtype) << DTYPES[half].itemsize * 8
        whole[threads] = shifted | low[threads]

    return Operation(i.line, run)


@family("cvta")
def convert_address(block: Block, _: Function, i: Instruction, modifiers: str) -> Operation:
    """Between a state space's addresses and generic ones, which begin at the space's window."""
    offsets = {
        "to.global.u64": 0,
        "global.u64": 0,
        "param.u64": PARAM_WINDOW,
        "shared.u64": SHARED_WINDOW,
        "to.shared.u64": -SHARED_WINDOW,
    }
    known(modifiers in offsets)
    target, source = (block.operands.values(operand, "u64") for operand in i.operands)
    step = np.uint64(offsets[modifiers] % (1 << 64))

    def run(threads: Threads) -> None:
        target[threads] = source[threads] + step

    return Operation(i.line, run)


def access(modifiers: str) -> tuple[str, int, str]:
    """State space, number of elements and type of ``global.v4.u32``."""
    match = re.fullmatch(r"(?:(global|shared|param)\.)?(?:v([24])\.)?(\w+)", modifiers)
    if match is None or match[3] not in DTYPES:
        raise PtxError("unknown modifiers")
    return match[1] or "generic", int(match[2] or 1), match[3]


def elements(operand: Operand, count: int) -> tuple[Operand, ...]:
    found = operand.elements if isinstance(operand, Vector) else (operand,)
    known(len(found) == count)
    return found


@family("ld")
def load(block: Block, function: Function, i: Instruction, modifiers: str) -> Operation:
    """A register may be wider than what is loaded, which is then extended (9.4.1)."""
    space, count, type_name = access(modifiers)
    target, place = i.operands
    if isinstance(place, Address) and place.base in function.arguments:
        return move(block, i.line, target, argument(place), type_name)
    dtype = DTYPES[type_name]
    views = []
    for element in elements(target, count):
        bits = block.operands.register(expect(Register, element))
        known(bits.dtype.itemsize >= dtype.itemsize)
        views.append(bits.view(f"{dtype.kind}{bits.dtype.itemsize}"))
    addresses = block.operands.addresses(place, space)

    def run(threads: Threads) -> None:
        data = block.memory.load(
            space, addresses(threads), count * dtype.itemsize, block.numbers[threads], i.line
        )
        for view, column in zip(views, data.view(dtype).T, strict=True):
            view[threads] = column

    return Operation(i.line, run, ends_turn=space != "param")


@family("st")
def store(block: Block, _: Function, i: Instruction, modifiers: str) -> Operation:
    """A register may be wider than what is stored, which is cut off (9.4.1)."""
    space, count, type_name = access(modifiers)
    place, source = i.operands
    if space == "param":
        return move(block, i.line, argument(place), source, type_name)
    dtype = DTYPES[type_name]
    sources = [
        block.operands.register(element)
        if isinstance(element, Register) and size_of(element.type) > dtype.itemsize
        else block.operands.values(element, type_name)
        for element in elements(source, count)
    ]
    addresses = block.operands.addresses(place, space)

    def run(threads: Threads) -> None:
        columns = [source[threads].astype(dtype) for source in sources]
        data = np.stack(columns, axis=1).view(np.uint8)
        block.memory.store(space, addresses(threads), data, block.numbers[threads], i.line)

    return Operation(i.line, run, ends_turn=True)


@family("atom")
def update(block: Block, _: Function, i: Instruction, modifiers: str) -> Operation:
    """The threads that execute one together come in any order."""
    match = re.fullmatch(r"(?:(global|shared)\.)?(add|or|exch)\.([bu]32|u64)", modifiers)
    if match is None:
        raise PtxError("unknown modifiers")
    space, type_name = match[1] or "generic", match[3]
    combine = {
        "add": lambda old, new: old + new,
        "or": lambda old, new: old | new,
        "exch": lambda old, new: new,
    }[match[2]]
    before, place, operand = i.operands
    target = block.operands.target(before, type_name)
    addresses = block.operands.addresses(place, space)
    values = block.operands.values(operand, type_name)

    def run(threads: Threads) -> None:
        order = block.random.permutation(block.numbers[threads])
        target[order] = block.memory.update(
            space, addresses(order), DTYPES[type_name], values[order], combine, order, i.line
        )

    return Operation(i.line, run, ends_turn=True)


@family("prefetch")
def prefetch(block: Block, _: Function, i: Instruction, modifiers: str) -> Operation:
    """Only checks that there is such a place, which the ISA does not require."""
    known(modifiers == "global.L2")
    (place,) = i.operands
    addresses = block.operands.addresses(place, "global")

    def run(threads: Threads) -> None:
        list(block.memory.locate("global", addresses(threads), 1))

    return Operation(i.line, run)


# -------------------------------------------------------------------------------------------------
# Control (9.7.12). The parameters of a .func are variables that each thread has for itself.


def argument(place: Operand) -> Operand:
    known(expect(Address, place).offset == 0)
    return expect(Address, place).base


def move(block: Block, line: int, target: Operand, source: Operand, type_name: str) -> Operation:
    to = block.operands.target(target, type_name)
    of = block.operands.values(source, type_name)

    def run(threads: Threads) -> None:
        to[threads] = of[threads]

    return Operation(line, run)


@family("bra")
def branch(block: Block, function: Function, i: Instruction, modifiers: str) -> Operation:
    (operand,) = i.operands
    label = expect(Symbol, operand).name
    known(modifiers in ("", "uni") and label in function.labels)
    target = block.starts[function.name] + function.labels[label]

    def run(threads: Threads) -> None:
        block.pc[threads] = target

    return Operation(i.line, run, jumps=True)


@family("call")
def call(block: Block, _: Function, i: Instruction, modifiers: str) -> Operation:
    callee = block.module.functions[expect(Symbol, i.operands[0]).name]
    known(modifiers == "uni" and not callee.is_entry)
    moves = [
        move(block, i.line, target, source, target.type)
        for target, source in zip(callee.arguments, i.operands[1:], strict=True)
    ]
    start, return_to = block.starts[callee.name], block.return_to[callee.name]

    def run(threads: Threads) -> None:
        for operation in moves:
            operation.run(threads)
        return_to[threads] = block.pc[threads]
        block.pc[threads] = start

    return Operation(i.line, run, jumps=True)


@family("ret")
def return_(block: Block, function: Function, i: Instruction, modifiers: str) -> Operation:
    known(modifiers == "")
    return_to = block.return_to[function.name]

    def run(threads: Threads) -> None:
        if function.is_entry:
            block.exit(threads)
        else:
            block.pc[threads] = return_to[threads]

    return Operation(i.line, run, jumps=True)


# -------------------------------------------------------------------------------------------------
# Barriers (9.7.13) and exchanges within a warp. `run` of a collective gets the members of its mask.


@family("bar")
def barrier(block: Block, _: Function, i: Instruction, modifiers: str) -> Operation:
    if modifiers == "sync":
        known(i.operands == (Number("0"),))
        return Operation(i.line, block.wait_for_all, jumps=True)
    known(modifiers == "warp.sync")
    (members,) = i.operands
    mask = block.operands.values(members, "u32")

    def run(threads: Threads) -> None:
        numbers = block.numbers[threads]
        known(len(numbers) == WARP)  # the history of accesses knows barriers of whole warps only
        block.memory.history.warp_barrier(int(numbers[0]) // WARP)

    return Operation(i.line, run, mask=mask)


@family("shfl")
def shuffle(block: Block, _: Function, i: Instruction, modifiers: str) -> Operation:
    """9.7.9.6: the third operand has the clamp in bits 0-4 and the mask of segments in 8-12."""
    match = re.fullmatch(r"sync\.(up|down|bfly|idx)\.b32", modifiers)
    if match is None:
        raise PtxError("unknown modifiers")
    mode = match[1]
    result, *others = i.operands
    value, distance, bounds, mask = (block.operands.values(operand, "u32") for operand in others)
    target = block.operands.target(result.first if isinstance(result, Pair) else result, "b32")
    is_inside = block.operands.target(result.second, "pred") if isinstance(result, Pair) else None

    def run(threads: Threads) -> None:
        numbers = block.numbers[threads]
        lane = numbers % WARP
        b = (distance[threads] & 31).astype(np.int64)
        clamp = (bounds[threads] & 31).astype(np.int64)
        segment = (bounds[threads] >> 8 & 31).astype(np.int64)
        least = lane & segment
        most = least | (clamp & ~segment)
        source = {
            "up": lane - b,
            "down": lane + b,
            "bfly": lane ^ b,
            "idx": least | (b & ~segment),
        }[mode]
        inside = source >= most if mode == "up" else source <= most
        source = np.where(inside, source, lane)
        if not np.isin(source, lane).all():
            raise PtxError("a thread reads from one that does not take part")
        target[threads] = value[numbers - lane + source]
        if is_inside is not None:
            is_inside[threads] = inside

    return Operation(i.line, run, mask=mask)


@family("vote")
def vote(block: Block, _: Function, i: Instruction, modifiers: str) -> Operation:
    known(modifiers == "sync.ballot.b32")
    result, predicate, members = i.operands
    target = block.operands.target(result, "b32")
    condition = block.operands.predicate(predicate)

    def run(threads: Threads) -> None:
        lane = block.numbers[threads] % WARP
        target[threads] = np.sum(condition[threads].astype(np.int64) << lane)

    return Operation(i.line, run, mask=block.operands.values(members, "u32"))


@family("redux")
def reduce(block: Block, _: Function, i: Instruction, modifiers: str) -> Operation:
    combine = {
        "sync.add.u32": np.add.reduce,
        "sync.min.u32": np.minimum.reduce,
        "sync.max.u32": np.maximum.reduce,
    }.get(modifiers)
    if combine is None:
        raise PtxError("unknown modifiers")
    target, value, mask = (block.operands.values(operand, "u32") for operand in i.operands)

    def run(threads: Threads) -> None:
        target[threads] = combine(value[threads], dtype=np.uint32)

    return Operation(i.line, run, mask=mask)
