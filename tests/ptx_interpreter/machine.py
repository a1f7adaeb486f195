"""Runs a kernel of a PTX module, one thread block after another.

Every thread has a program counter of its own. A *team* of threads takes turns with the others: a
warp, drawn at random, or all threads of the block together, which is faster. A team's turn is a run
of instructions by those of its threads whose counter is lowest; it ends where others could notice
the order: after an access to memory, at a branch, a barrier, a label. So every order of accesses by
different warps is possible, and which one is taken depends on the seed alone.

Registers and shared memory begin with random bits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.ptx_interpreter.arithmetic import DTYPES, INSTRUCTIONS, Array
from tests.ptx_interpreter.memory import PARAM_WINDOW, SHARED_WINDOW, Indices, Memory, Region
from tests.ptx_interpreter.parser import (
    Address,
    Function,
    Instruction,
    Module,
    Negated,
    Number,
    Operand,
    Pair,
    PtxError,
    Register,
    Special,
    Symbol,
    Vector,
    size_of,
)

WARP = 32
WAITING = 1 << 40  # the program counter of a thread that waits for others, or has exited
SHARED_BEGIN = 1024  # the first bytes of shared memory belong to the system
POOL_BYTES = 1 << 20
MAX_TURNS = 2_000_000  # of a thread block; more means that it does not end

# Some threads: a slice if all of them, which spares copies, else their numbers.
Threads = Indices | slice


@dataclass
class Operation:
    """A decoded instruction. ``run`` gets the threads whose guard holds."""

    line: int
    run: Callable[[Threads], None]
    guard: npt.NDArray[np.bool_] | None = None
    ends_turn: bool = False
    jumps: bool = False  # `run` sets the program counters
    meets: bool = False  # `run` is called once for the threads of a warp that have all arrived
    mask: npt.NDArray[np.uint32] | None = None  # which these are


@dataclass
class Launch:
    """``arguments`` are the bytes of the kernel's one parameter."""

    kernel: str
    num_blocks: int
    num_threads: int
    arguments: bytes


class Machine:
    """Runs the kernels of a module.

    Args:
        seed: of the order of warps, of the initial bits, and of the order of atomic operations.
        by_warps: whether warps take turns, or all threads of a block advance together.
    """

    def __init__(self, module: Module, seed: int = 0, by_warps: bool = True) -> None:
        self.module = module
        self.seed = seed
        self.by_warps = by_warps
        self.memory = Memory()
        self.kernels: dict[tuple[str, int], Kernel] = {}

    def launch(self, launch: Launch, regions: Sequence[Region]) -> None:
        """Runs a grid of thread blocks, which see ``regions`` as global memory.

        Raises:
            PtxError: what the program does is not allowed.
        """
        key = (launch.kernel, launch.num_threads)
        if key not in self.kernels:
            self.kernels[key] = Kernel(self, *key)
        self.memory.history.begin_launch()
        with np.errstate(all="ignore"):  # overflows and NaNs are the program's business
            for block in range(launch.num_blocks):
                self.kernels[key].run(block, launch, regions)


class Kernel:
    """An entry and the functions it calls, decoded for blocks of ``num_threads`` threads.

    Registers are arrays with an element for each thread, padded to whole warps.
    """

    def __init__(self, machine: Machine, name: str, num_threads: int) -> None:
        self.machine, self.memory = machine, machine.memory
        self.num_threads = num_threads
        self.num_padded = -(-num_threads // WARP) * WARP
        self.all = np.arange(self.num_padded)
        self.team_size = WARP if machine.by_warps else self.num_padded
        self.registers: dict[Register, Array] = {}
        self.pool: list[npt.NDArray[np.uint8]] = []  # that they lie in
        self.num_used = POOL_BYTES
        self.special = {
            "%tid.x": self.all.astype(np.uint32),
            "%ntid.x": np.full(self.num_padded, num_threads, np.uint32),
            "%ctaid.x": np.zeros(self.num_padded, np.uint32),
        }
        self.shared: dict[str, int] = {}
        self.num_shared_bytes = SHARED_BEGIN
        self.operations: list[Operation] = []
        self.starts: dict[str, int] = {}
        self.return_to: dict[str, Indices] = {}
        self.entry = machine.module.functions[name]
        self.decode_all()
        self.predicates = [array for array in self.registers.values() if array.dtype == bool]

    # ---------------------------------------------------------------------------------------------
    # Decoding

    def decode_all(self) -> None:
        functions = [self.entry]
        for function in functions:  # grows
            for i in function.instructions:
                if i.opcode == "call.uni":
                    callee = self.machine.module.functions[i.operands[0].name]
                    if callee not in functions:
                        functions.append(callee)
        self.pc = np.zeros(self.num_padded, np.int64)
        self.resume = np.zeros(self.num_padded, np.int64)  # of those that wait
        self.is_at_barrier = np.zeros(self.num_padded, bool)
        self.has_exited = np.zeros(self.num_padded, bool)
        start = 0
        for function in functions:
            self.starts[function.name] = start
            self.return_to[function.name] = np.zeros(self.num_padded, np.int64)
            start += len(function.instructions)
        self.is_label = np.zeros(start + 1, bool)
        for function in functions:
            begin = self.starts[function.name]
            for place in function.labels.values():
                self.is_label[begin + place] = True
            for i in function.instructions:
                try:
                    operation = self.decode(function, i)
                except (PtxError, KeyError, ValueError) as error:
                    raise PtxError(f"line {i.line}: {i.opcode}: {error}") from error
                if i.guard is not None:
                    if operation.meets:
                        raise PtxError(f"line {i.line}: {i.opcode} with a guard")
                    operation.guard = self.values(
                        Negated(i.guard) if i.guard_negated else i.guard, "pred"
                    )
                self.operations.append(operation)

    def decode(self, function: Function, i: Instruction) -> Operation:
        if i.opcode in INSTRUCTIONS and not any(isinstance(o, Vector) for o in i.operands):
            return self.decode_arithmetic(i)
        name, *modifiers = i.opcode.split(".")
        families = {
            "ld": self.decode_load,
            "st": self.decode_store,
            "atom": self.decode_atomic,
            "prefetch": self.decode_prefetch,
            "cvta": self.decode_address_conversion,
            "mov": self.decode_vector_move,
            "bra": self.decode_branch,
            "call": self.decode_call,
            "ret": self.decode_return,
            "bar": self.decode_barrier,
            "shfl": self.decode_shuffle,
            "vote": self.decode_vote,
            "redux": self.decode_reduction,
        }
        if name not in families:
            raise PtxError("unknown instruction")
        operation = families[name](function, i, modifiers)
        if operation is None:
            raise PtxError("unknown modifiers")
        return operation

    def register(self, register: Register) -> Array:
        """Its bits in all threads."""
        if register not in self.registers:
            is_predicate = register.type == "pred"
            dtype = np.dtype(bool if is_predicate else f"u{size_of(register.type)}")
            num_bytes = self.num_padded * dtype.itemsize
            if self.num_used + num_bytes > POOL_BYTES:
                self.pool.append(np.zeros(POOL_BYTES, np.uint8))
                self.num_used = 0
            own = self.pool[-1][self.num_used : self.num_used + num_bytes]
            self.registers[register] = own.view(dtype)
            self.num_used += num_bytes
        return self.registers[register]

    def values(self, operand: Operand, type_name: str) -> Array:
        """A view of an operand as a type, in all threads; it changes as the program runs."""
        dtype = DTYPES[type_name]
        if isinstance(operand, Number):
            return np.full(self.num_padded, number(operand.text, dtype))
        if isinstance(operand, Negated):
            return NegatedView(self.register(operand.register))
        if isinstance(operand, Register):
            bits = self.register(operand)
        elif isinstance(operand, Special):
            bits = self.special[operand.name]
        elif isinstance(operand, Symbol):
            return np.full(self.num_padded, self.address_of(operand.name), dtype)
        else:
            raise PtxError(f"{operand} is no {type_name}")
        if bits.dtype.itemsize != dtype.itemsize or (bits.dtype == bool) != (dtype == bool):
            raise PtxError(f"{operand} is not as wide as {type_name}")
        return bits.view(dtype)

    def target(self, operand: Operand, type_name: str) -> Array:
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} is no register")
        return self.values(operand, type_name)

    def address_of(self, symbol: str) -> int:
        """In its own state space: that of a kernel's parameters begins at 0."""
        if symbol in self.entry.parameters:
            return self.entry.parameters[symbol][0]
        if symbol not in self.shared:
            alignment, size = self.machine.module.shared[symbol]
            begin = -(-self.num_shared_bytes // alignment) * alignment
            self.shared[symbol] = begin
            self.num_shared_bytes = begin + size
        return self.shared[symbol]

    def addresses(self, operand: Operand, space: str) -> Callable[[Threads], npt.NDArray[np.uint64]]:
        """Absolute ones, for some threads."""
        if not isinstance(operand, Address):
            raise PtxError(f"{operand} is no address")
        window = {"shared": SHARED_WINDOW, "param": PARAM_WINDOW}.get(space, 0)
        offset = operand.offset + window
        base = operand.base
        if isinstance(base, Symbol):
            fixed = np.full(self.num_padded, self.address_of(base.name) + offset, np.uint64)
            return lambda threads: fixed[threads]
        bits = self.register(base)
        if bits.dtype not in (np.uint32, np.uint64) or (bits.dtype == np.uint32) != (
            space == "shared"
        ):
            raise PtxError(f"{base.name} cannot hold an address in {space} memory")
        step = np.uint64(offset % (1 << 64))
        return lambda threads: bits[threads].astype(np.uint64) + step

    # ---------------------------------------------------------------------------------------------
    # Registers

    def decode_arithmetic(self, i: Instruction) -> Operation:
        semantics = INSTRUCTIONS[i.opcode]
        target = self.target(i.operands[0], semantics.result)
        sources = [
            self.values(operand, name)
            for operand, name in zip(i.operands[1:], semantics.operands, strict=True)
        ]
        function = semantics.function

        def run(threads: Threads) -> None:
            target[threads] = function(*[source[threads] for source in sources])

        return Operation(i.line, run)

    def decode_vector_move(
        self, _: Function, i: Instruction, modifiers: list[str]
    ) -> Operation | None:
        """``mov.b32 d, {a, b}`` packs, the first element lowest (9.7.9.4)."""
        target, source = i.operands
        if modifiers not in (["b32"], ["b64"]) or not isinstance(source, Vector):
            return None
        half = "b16" if modifiers == ["b32"] else "b32"
        whole = self.target(target, modifiers[0])
        low, high = (self.values(element, half) for element in source.elements)
        bits = 8 * low.dtype.itemsize

        def run(threads: Threads) -> None:
            wide = high[threads].astype(whole.dtype) << bits
            whole[threads] = wide | low[threads]

        return Operation(i.line, run)

    def decode_address_conversion(
        self, _: Function, i: Instruction, modifiers: list[str]
    ) -> Operation | None:
        """Between a state space's addresses and generic ones, which begin at the space's window."""
        offsets = {
            ("to", "global", "u64"): 0,
            ("global", "u64"): 0,
            ("param", "u64"): PARAM_WINDOW,
            ("shared", "u64"): SHARED_WINDOW,
            ("to", "shared", "u64"): -SHARED_WINDOW,
        }
        offset = offsets.get(tuple(modifiers))
        if offset is None:
            return None
        target, source = (self.values(operand, "u64") for operand in i.operands)
        step = np.uint64(offset % (1 << 64))

        def run(threads: Threads) -> None:
            target[threads] = source[threads] + step

        return Operation(i.line, run)

    # ---------------------------------------------------------------------------------------------
    # Memory

    def decode_access(self, modifiers: list[str]) -> tuple[str, int, str]:
        """State space, number of elements and type of ``ld.global.v4.u32``."""
        rest = list(modifiers)
        space = rest.pop(0) if rest[0] in ("global", "shared", "param") else "generic"
        count = int(rest.pop(0)[1:]) if rest[0] in ("v2", "v4") else 1
        (type_name,) = rest
        return space, count, type_name

    def elements(self, operand: Operand, count: int) -> list[Operand]:
        elements = list(operand.elements) if isinstance(operand, Vector) else [operand]
        if len(elements) != count:
            raise PtxError(f"{count} registers were expected")
        return elements

    def decode_load(self, function: Function, i: Instruction, modifiers: list[str]) -> Operation:
        space, count, type_name = self.decode_access(modifiers)
        dtype = DTYPES[type_name]
        operand = i.operands[1]
        if space == "param" and isinstance(operand, Address) and operand.base in function.arguments:
            return self.decode_argument(i.line, i.operands[0], operand, type_name)
        # A register may be wider than what is loaded (9.4.1).
        targets = [self.register(r) for r in self.elements(i.operands[0], count)]
        views = [t.view(f"{dtype.kind}{t.dtype.itemsize}") for t in targets]
        if any(view.dtype.itemsize < dtype.itemsize for view in views):
            raise PtxError("a register is too narrow")
        addresses = self.addresses(operand, space)
        size = count * dtype.itemsize

        def run(threads: Threads) -> None:
            data = self.memory.load(space, addresses(threads), size, self.all[threads], i.line)
            for view, column in zip(views, data.view(dtype).T, strict=True):
                view[threads] = column

        return Operation(i.line, run, ends_turn=space != "param")

    def decode_store(self, function: Function, i: Instruction, modifiers: list[str]) -> Operation:
        space, count, type_name = self.decode_access(modifiers)
        dtype = DTYPES[type_name]
        operand = i.operands[0]
        if space == "param":
            return self.decode_argument(i.line, operand, i.operands[1], type_name)
        sources = []
        for element in self.elements(i.operands[1], count):
            if isinstance(element, Register) and size_of(element.type) > dtype.itemsize:
                sources.append(self.register(element))
            else:
                sources.append(self.values(element, type_name))
        addresses = self.addresses(operand, space)

        def run(threads: Threads) -> None:
            columns = [source[threads].astype(dtype) for source in sources]
            data = np.stack(columns, axis=1).view(np.uint8)
            self.memory.store(space, addresses(threads), data, self.all[threads], i.line)

        return Operation(i.line, run, ends_turn=True)

    def decode_argument(
        self, line: int, target: Operand, source: Operand, type_name: str
    ) -> Operation:
        """A move from or to a parameter of a .func, which each thread has for itself."""
        target, source = (
            operand.base if isinstance(operand, Address) and operand.offset == 0 else operand
            for operand in (target, source)
        )
        to, of = self.target(target, type_name), self.values(source, type_name)

        def run(threads: Threads) -> None:
            to[threads] = of[threads]

        return Operation(line, run)

    def decode_atomic(self, _: Function, i: Instruction, modifiers: list[str]) -> Operation | None:
        combine = {
            "add": lambda old, new: old + new,
            "or": lambda old, new: old | new,
            "exch": lambda old, new: new,
        }
        *space, name, type_name = modifiers
        if space not in ([], ["global"], ["shared"]) or name not in combine:
            return None
        where = space[0] if space else "generic"
        dtype = DTYPES[type_name]
        target = self.target(i.operands[0], type_name)
        addresses = self.addresses(i.operands[1], where)
        operands = self.values(i.operands[2], type_name)

        def run(threads: Threads) -> None:
            order = self.random.permutation(self.all[threads])
            target[order] = self.memory.update(
                where, addresses(order), dtype, operands[order], combine[name], order, i.line
            )

        return Operation(i.line, run, ends_turn=True)

    def decode_prefetch(
        self, _: Function, i: Instruction, modifiers: list[str]
    ) -> Operation | None:
        if modifiers != ["global", "L2"]:
            return None
        addresses = self.addresses(i.operands[0], "global")

        def run(threads: Threads) -> None:
            for _ in self.memory.locate("global", addresses(threads), 1):
                pass  # only that there is such a place

        return Operation(i.line, run)

    # ---------------------------------------------------------------------------------------------
    # Control (9.7.12)

    def decode_branch(
        self, function: Function, i: Instruction, modifiers: list[str]
    ) -> Operation | None:
        if modifiers not in ([], ["uni"]):
            return None
        target = self.starts[function.name] + function.labels[i.operands[0].name]

        def run(threads: Threads) -> None:
            self.pc[threads] = target

        return Operation(i.line, run, jumps=True)

    def decode_call(self, _: Function, i: Instruction, modifiers: list[str]) -> Operation:
        callee = self.machine.module.functions[i.operands[0].name]
        start, return_to = self.starts[callee.name], self.return_to[callee.name]
        moves = [
            self.decode_argument(i.line, target, source, target.type)
            for target, source in zip(callee.arguments, i.operands[1:], strict=True)
        ]

        def run(threads: Threads) -> None:
            for move in moves:
                move.run(threads)
            return_to[threads] = self.pc[threads]
            self.pc[threads] = start

        return Operation(i.line, run, jumps=True)

    def decode_return(self, function: Function, i: Instruction, modifiers: list[str]) -> Operation:
        return_to = self.return_to[function.name]

        def exit_(threads: Threads) -> None:
            self.pc[threads] = WAITING
            self.has_exited[threads] = True

        def return_(threads: Threads) -> None:
            self.pc[threads] = return_to[threads]

        return Operation(i.line, exit_ if function.is_entry else return_, jumps=True)

    # ---------------------------------------------------------------------------------------------
    # Barriers (9.7.13) and exchanges within a warp (9.7.9.6, 9.7.13). The ISA lets a warp's threads
    # meet at different instructions; here it must be the same one.

    def decode_barrier(self, _: Function, i: Instruction, modifiers: list[str]) -> Operation | None:
        if modifiers == ["sync"] and i.operands == (Number("0"),):
            return Operation(i.line, self.wait_for_block, jumps=True)
        if modifiers != ["warp", "sync"]:
            return None

        def run(threads: Indices) -> None:
            if len(threads) != WARP:
                raise PtxError("a barrier for a part of a warp")  # the history knows only whole ones
            self.memory.history.warp_barrier(int(threads[0]) // WARP)

        return Operation(i.line, run, meets=True, mask=self.values(i.operands[0], "u32"))

    def wait_for_block(self, threads: Threads) -> None:
        self.resume[threads] = self.pc[threads]
        self.pc[threads] = WAITING
        self.is_at_barrier[threads] = True
        own = slice(0, self.num_threads)
        if self.has_exited[own].any():
            raise PtxError("a barrier that some threads never reach: they have exited")
        if not self.is_at_barrier[own].all():
            return
        for first in range(0, self.num_threads, WARP):
            places = self.resume[first : min(first + WARP, self.num_threads)]
            if (places != places[0]).any():
                raise PtxError("the threads of a warp wait at different barriers")
        self.pc[own] = self.resume[own]
        self.is_at_barrier[own] = False
        self.memory.history.block_barrier()

    def decode_shuffle(self, _: Function, i: Instruction, modifiers: list[str]) -> Operation | None:
        if modifiers[0] != "sync" or modifiers[2:] != ["b32"]:
            return None
        mode = modifiers[1]
        first, *others = i.operands
        pair = first if isinstance(first, Pair) else Pair(first, Register("_", "pred"))
        target, is_inside = self.target(pair.first, "b32"), self.target(pair.second, "pred")
        value, b, c, mask = (self.values(operand, "u32") for operand in others)
        if mode not in ("up", "down", "bfly", "idx"):
            return None

        def run(threads: Indices) -> None:
            lane = threads % WARP
            offset, clamp = (b[threads] & 31).astype(np.int64), (c[threads] & 31).astype(np.int64)
            segment = (c[threads] >> 8 & 31).astype(np.int64)
            least = lane & segment
            most = least | (clamp & ~segment)
            source = {
                "up": lane - offset,
                "down": lane + offset,
                "bfly": lane ^ offset,
                "idx": least | (offset & ~segment),
            }[mode]
            inside = source >= most if mode == "up" else source <= most
            source = np.where(inside, source, lane)
            if not np.isin(source, lane).all():
                raise PtxError("a thread reads from one that does not take part")
            target[threads] = value[threads - lane + source]
            is_inside[threads] = inside

        return Operation(i.line, run, meets=True, mask=mask)

    def decode_vote(self, _: Function, i: Instruction, modifiers: list[str]) -> Operation | None:
        if modifiers != ["sync", "ballot", "b32"]:
            return None
        target, condition = self.target(i.operands[0], "b32"), self.values(i.operands[1], "pred")

        def run(threads: Indices) -> None:
            target[threads] = np.sum(condition[threads].astype(np.uint32) << threads % WARP)

        return Operation(i.line, run, meets=True, mask=self.values(i.operands[2], "u32"))

    def decode_reduction(
        self, _: Function, i: Instruction, modifiers: list[str]
    ) -> Operation | None:
        if modifiers != ["sync", "add", "u32"]:
            return None
        target, value, mask = (self.values(operand, "u32") for operand in i.operands)

        def run(threads: Indices) -> None:
            target[threads] = np.sum(value[threads], dtype=np.uint32)

        return Operation(i.line, run, meets=True, mask=mask)

    def meet(self, operation: Operation, threads: Indices, place: int) -> None:
        """Lets threads wait at a collective; runs it for each warp whose mask is complete."""
        self.resume[threads] = place + 1
        self.pc[threads] = WAITING
        for warp in np.unique(threads // WARP):
            own = threads[threads // WARP == warp]
            mask = int(operation.mask[own[0]])
            is_member = mask >> np.arange(WARP) & 1 == 1
            members = warp * WARP + np.flatnonzero(is_member)
            if (operation.mask[own] != mask).any() or not np.isin(own, members).all():
                raise PtxError("a thread is not in its mask, or masks differ")
            if (self.pc[members] == WAITING).all() and (self.resume[members] == place + 1).all():
                operation.run(members)
                self.pc[members] = place + 1
                self.resume[members] = 0

    # ---------------------------------------------------------------------------------------------
    # Running

    def run(self, block: int, launch: Launch, regions: Sequence[Region]) -> None:
        self.start_block(block, launch, regions)
        order = random.Random(f"{self.machine.seed} {block}")
        for _ in range(MAX_TURNS):
            lowest = self.pc.reshape(-1, self.team_size).min(axis=1)
            teams = np.flatnonzero(lowest < WAITING)
            if len(teams) == 0:
                break
            team = order.choice(teams.tolist())
            begin = team * self.team_size
            is_next = self.pc[begin : begin + self.team_size] == lowest[team]
            self.take_turn(begin + np.flatnonzero(is_next), int(lowest[team]))
        else:
            raise PtxError(f"block {block} does not end")
        waiting = np.flatnonzero(~self.has_exited)
        if len(waiting):
            line = self.operations[self.resume[waiting[0]] - 1].line
            raise PtxError(
                f"deadlock: {len(waiting)} threads wait, thread {waiting[0]} in line {line}; "
                f"{self.num_threads - len(waiting)} have exited"
            )

    def start_block(self, block: int, launch: Launch, regions: Sequence[Region]) -> None:
        if len(launch.arguments) != self.entry.num_parameter_bytes:
            raise PtxError(
                f"{self.entry.name} takes {self.entry.num_parameter_bytes} bytes of arguments, "
                f"not {len(launch.arguments)}"
            )
        self.random = np.random.default_rng((self.machine.seed, block))
        for pool in self.pool:
            pool[:] = np.frombuffer(self.random.bytes(POOL_BYTES), np.uint8)
        for register in self.predicates:
            register[:] = register.view(np.uint8) & 1
        num_bytes = self.num_shared_bytes - SHARED_BEGIN
        shared = np.frombuffer(self.random.bytes(num_bytes), np.uint8).copy()
        start = SHARED_WINDOW + SHARED_BEGIN
        arguments = np.frombuffer(launch.arguments, np.uint8)
        self.memory.set_regions(
            [
                *regions,
                Region(
                    "shared", "shared", start, shared, True, is_initialized=np.zeros(num_bytes, bool)
                ),
                Region("arguments", "param", PARAM_WINDOW, arguments, False),
            ]
        )
        self.memory.history.begin_block(self.num_padded // WARP)
        self.special["%ctaid.x"][:] = block
        self.pc[:] = self.starts[self.entry.name]
        self.pc[self.num_threads :] = WAITING
        self.resume[:] = 0
        self.is_at_barrier[:] = False
        self.has_exited[:] = False
        self.has_exited[self.num_threads :] = True

    def take_turn(self, threads: Indices, place: int) -> None:
        """Runs instructions from ``place`` on, for threads that are all there."""
        everyone = len(threads) == self.num_padded
        while True:
            operation = self.operations[place]
            active: Threads = slice(None) if everyone else threads
            if operation.guard is not None:
                active = threads[operation.guard[threads]]
            try:
                if operation.meets:
                    self.meet(operation, threads, place)
                    return
                if operation.jumps:
                    self.pc[threads] = place + 1
                if operation.guard is None or len(active):
                    operation.run(active)
                if operation.jumps:
                    return
            except PtxError as error:
                block = int(self.special["%ctaid.x"][0])
                raise PtxError(f"block {block}, line {operation.line}: {error}") from error
            place += 1
            if operation.ends_turn or self.is_label[place]:
                self.pc[threads] = place
                return


class NegatedView:
    """Of a predicate: indexes like an array."""

    def __init__(self, values: Array) -> None:
        self.values = values

    def __getitem__(self, threads: Threads) -> Array:
        return ~self.values[threads]


def number(text: str, dtype: np.dtype) -> Array:
    """A constant (4.5): an integer, or the bits of a float as in 0f3F800000."""
    prefix = {"0f": "f4", "0d": "f8"}.get(text[:2].lower())
    bits = np.dtype(f"u{dtype.itemsize}")
    if prefix is not None:
        if dtype != np.dtype(prefix):
            raise PtxError(f"{text} is no {dtype}")
        return np.array(int(text[2:], 16), bits).view(dtype)[()]
    if dtype.kind == "f":
        raise PtxError(f"{text} is no {dtype}")
    value = int(text.removesuffix("U"), 0) % (1 << 8 * dtype.itemsize)
    return np.array(value, bits).view(dtype)[()] if dtype != bool else np.bool_(value)
