"""Runs the kernels of a PTX module, one thread block after another.

Every thread has a program counter of its own. A *team* of threads takes turns with the others: a
warp, drawn at random, or all threads of the block together, which is faster. A team's turn is a run
of instructions by those of its threads whose counter is lowest. It ends where others could notice
the order: after an access to memory, at a branch, a barrier, a label. So every order of accesses by
different warps is possible, and which one is taken depends on the seed alone.

Registers and shared memory begin with random bits.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.ptx_interpreter.arithmetic import Array
from tests.ptx_interpreter.instructions import WARP, Operation, decode
from tests.ptx_interpreter.memory import PARAM_WINDOW, SHARED_WINDOW, Indices, Memory, Region
from tests.ptx_interpreter.operands import SHARED_BEGIN, Operands, Threads
from tests.ptx_interpreter.parser import Function, Module, PtxError, Symbol

NOWHERE = -1  # where a thread goes on that has exited
WAITING = 1 << 40  # the program counter of a thread that waits for others, or has exited
MAX_TURNS = 2_000_000  # of a block; more means that it does not end


@dataclass
class Launch:
    """``arguments`` are the bytes of the kernel's parameters."""

    kernel: str
    num_blocks: int
    num_threads: int
    arguments: bytes


class Machine:
    """Runs the kernels of a module.

    Args:
        seed: of the order of warps and of atomic operations, and of initial bits.
        by_warps: whether warps take turns, or all threads of a block advance together.
        memory: what the kernels' accesses go through.
    """

    def __init__(
        self,
        module: Module,
        seed: int = 0,
        by_warps: bool = True,
        memory: Memory | None = None,
    ) -> None:
        self.module = module
        self.seed = seed
        self.by_warps = by_warps
        self.memory = Memory() if memory is None else memory
        self.blocks: dict[tuple[str, int], Block] = {}

    def launch(self, launch: Launch, regions: Sequence[Region]) -> None:
        """Runs a grid of thread blocks, which see ``regions`` as global memory.

        Raises:
            PtxError: what the program does is not allowed.
        """
        key = (launch.kernel, launch.num_threads)
        if key not in self.blocks:
            self.blocks[key] = Block(self.module, self.memory, *key, self.by_warps)
        self.memory.history.begin_launch()
        with np.errstate(all="ignore"):  # overflows and NaNs are the program's business
            for index in range(launch.num_blocks):
                self.blocks[key].run(index, launch.arguments, regions, self.seed)


class Block:
    """The threads of a block, and the operations of a kernel with the functions that it calls.

    Attributes:
        numbers: of the threads, padded to whole warps; those beyond ``num_threads`` never run.
        pc: index in ``operations`` of what a thread runs next, or `WAITING`.
        resume: where one that waits goes on, or `NOWHERE`.
        starts, return_to: of each function; ``return_to`` for each thread.
        num_instructions: that teams have run so far.
    """

    def __init__(
        self, module: Module, memory: Memory, kernel: str, num_threads: int, by_warps: bool
    ) -> None:
        self.module, self.memory = module, memory
        self.entry = module.functions[kernel]
        self.num_threads = num_threads
        num_padded = -(-num_threads // WARP) * WARP
        self.numbers = np.arange(num_padded)
        self.team_size = WARP if by_warps else num_padded
        self.pc, self.resume = (np.zeros(num_padded, np.int64) for _ in range(2))
        self.is_at_barrier, self.has_exited = (np.zeros(num_padded, bool) for _ in range(2))
        self.num_instructions = 0
        self.operands = Operands(num_threads, num_padded, module, self.entry)
        self.random = np.random.default_rng()

        functions = self.called_functions()
        self.starts: dict[str, int] = {}
        num_operations = 0
        for function in functions:
            self.starts[function.name] = num_operations
            num_operations += len(function.instructions)
        self.return_to = {f.name: np.zeros(num_padded, np.int64) for f in functions}
        self.is_label = np.zeros(num_operations + 1, bool)
        for function in functions:
            for place in function.labels.values():
                self.is_label[self.starts[function.name] + place] = True
        self.operations = [decode(self, f, i) for f in functions for i in f.instructions]

    def called_functions(self) -> list[Function]:
        """The kernel and what it calls, directly or not."""
        functions = [self.entry]
        for function in functions:  # which grows
            for i in function.instructions:
                if i.opcode.startswith("call.") and isinstance(i.operands[0], Symbol):
                    callee = self.module.functions[i.operands[0].name]
                    if callee is self.entry or callee in functions[1:]:
                        continue
                    functions.append(callee)
        return functions

    def run(self, index: int, arguments: bytes, regions: Sequence[Region], seed: int) -> None:
        """The block ``index`` of the grid, from beginning to end."""
        self.begin(index, arguments, regions, seed)
        order = random.Random(f"{seed} {index}")
        for _ in range(MAX_TURNS):
            lowest = self.pc.reshape(-1, self.team_size).min(axis=1)
            teams = np.flatnonzero(lowest < WAITING)
            if not len(teams):
                break
            team = order.choice(teams.tolist())
            begin = team * self.team_size
            is_next = self.pc[begin : begin + self.team_size] == lowest[team]
            try:
                self.take_turn(begin + np.flatnonzero(is_next), int(lowest[team]))
            except PtxError as error:
                raise PtxError(f"block {index}, {error}") from error
        else:
            raise PtxError(f"block {index} does not end")
        waiting = np.flatnonzero(~self.has_exited)
        if len(waiting):
            line = self.operations[self.resume[waiting[0]] - 1].line
            raise PtxError(
                f"deadlock: {len(waiting)} threads of block {index} wait, the first in line "
                f"{line}; {self.num_threads - len(waiting)} have exited"
            )

    def begin(self, index: int, arguments: bytes, regions: Sequence[Region], seed: int) -> None:
        if len(arguments) != self.entry.num_parameter_bytes:
            raise PtxError(
                f"{self.entry.name} takes {self.entry.num_parameter_bytes} bytes of arguments, "
                f"not {len(arguments)}"
            )
        self.random = np.random.default_rng((seed, index))
        self.operands.randomize(self.random)
        self.operands.special["%ctaid.x"][:] = index
        noise = self.random.bytes(self.operands.shared_end - SHARED_BEGIN)
        shared = Region(
            "shared",
            "shared",
            SHARED_WINDOW + SHARED_BEGIN,
            np.frombuffer(bytearray(noise), np.uint8),
            is_writable=True,
            is_initialized=np.zeros(len(noise), bool),
        )
        constants = np.frombuffer(arguments, np.uint8)
        parameters = Region("arguments", "param", PARAM_WINDOW, constants, is_writable=False)
        self.memory.set_regions([*regions, shared, parameters])
        self.memory.history.begin_block(len(self.numbers) // WARP)
        self.is_at_barrier[:] = False
        self.has_exited[:] = self.numbers >= self.num_threads
        self.pc[:] = np.where(self.has_exited, WAITING, self.starts[self.entry.name])
        self.resume[:] = NOWHERE

    def take_turn(self, threads: Indices, place: int) -> None:
        """Runs operations from ``place`` on, for threads that are all there."""
        everyone = len(threads) == len(self.numbers)
        while True:
            operation = self.operations[place]
            self.num_instructions += 1
            place += 1
            active: Threads = slice(None) if everyone else threads
            if operation.guard is not None:
                active = threads[operation.guard[threads]]
            if operation.jumps:
                self.pc[threads] = place
            try:
                if operation.mask is not None:
                    self.meet(operation, operation.mask, threads, place)
                elif isinstance(active, slice) or len(active):
                    operation.run(active)
            except PtxError as error:
                raise PtxError(f"line {operation.line}: {error}") from error
            if operation.jumps or operation.mask is not None:
                return
            if operation.ends_turn or self.is_label[place]:
                self.pc[threads] = place
                return

    def exit(self, threads: Threads) -> None:
        self.wait(threads, NOWHERE)
        self.has_exited[threads] = True

    def wait(self, threads: Threads, place: int | Indices) -> None:
        self.resume[threads] = place
        self.pc[threads] = WAITING

    def wait_for_all(self, threads: Threads) -> None:
        """A barrier of the block (9.7.13.1): the last threads to arrive let all go on.

        Warps may wait at different ones, but not the threads of one warp (.aligned).
        """
        self.wait(threads, self.pc[threads])
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

    def meet(self, operation: Operation, masks: Array, threads: Indices, place: int) -> None:
        """Lets threads wait at a collective, and runs it for each warp whose mask is complete.

        All threads of a mask must meet at one instruction; the ISA allows ``bar.warp.sync`` more.
        """
        self.wait(threads, place)
        for warp in np.unique(threads // WARP):
            own = threads[threads // WARP == warp]
            mask = int(masks[own[0]])
            members = warp * WARP + np.flatnonzero(mask >> np.arange(WARP) & 1)
            if (masks[own] != mask).any() or not np.isin(own, members).all():
                raise PtxError("a thread is not in its mask, or masks differ")
            if (self.pc[members] == WAITING).all() and (self.resume[members] == place).all():
                operation.run(members)
                self.pc[members] = place
