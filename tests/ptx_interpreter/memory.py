"""The memory that a kernel sees, and what compute-sanitizer would find in its accesses.

Every byte has one 64-bit address: tensors lie where they lie in this process, shared memory and the
kernel's parameters in windows that no process uses. An access outside of a tensor, or not aligned
to its width, is an error (memcheck), as are reading shared memory that nobody wrote (initcheck) and
two accesses that no barrier orders (racecheck).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tests.ptx_interpreter.parser import PtxError

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

SHARED_WINDOW = 1 << 60
PARAM_WINDOW = 2 << 60


@dataclass
class Region:
    """Consecutive bytes. What nobody may write has no history."""

    name: str
    space: str
    start: int
    bytes: Bytes
    is_writable: bool
    # Of each byte, see History.
    writes: Indices = field(init=False)
    reads: Indices = field(init=False)
    is_initialized: npt.NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if self.is_writable:
            self.writes = np.zeros(len(self.bytes), np.int64)
            self.reads = np.zeros(len(self.bytes), np.int64)

    @classmethod
    def at(cls, name: str, address: int, num_bytes: int, is_writable: bool) -> Region:
        """Global memory: bytes of this process, such as a tensor's."""
        buffer = (ctypes.c_uint8 * num_bytes).from_address(address)
        return cls(name, "global", address, np.ctypeslib.as_array(buffer), is_writable)


class History:
    """Who accessed a byte last, and when: packed into 64 bits, so that it can be stored at once.

    From the top: the time, which counts barriers; the line of the instruction; whether it was an
    atomic operation; how many threads it stands for (one, several of a warp, several of a block);
    the number of the thread, or of the first thread of its warp.
    """

    TIME, LINE = 36, 16
    ATOMIC, WARP, BLOCK, THREAD = 0x8000, 0x4000, 0x2000, 0x1FFF

    def __init__(self) -> None:
        self.time = 0
        self.begin_launch()

    def begin_launch(self) -> None:
        self.time += 1
        self.launch_start = self.time

    def begin_block(self, num_warps: int) -> None:
        self.time += 1
        self.block_start = self.barrier_time = self.time
        self.warp_times = np.full(num_warps, self.time)

    def block_barrier(self) -> None:
        self.time += 1
        self.barrier_time = self.time

    def warp_barrier(self, warp: int) -> None:
        self.time += 1
        self.warp_times[warp] = self.time

    def record(self, threads: Indices, line: int, flags: int = 0) -> Indices:
        return self.time << self.TIME | line << self.LINE | flags | threads

    def unordered(self, records: Indices, threads: Indices) -> npt.NDArray[np.bool_]:
        """Whether another thread's access and one by ``threads`` now may come in either order."""
        times = records >> self.TIME
        by_warp = (records & self.BLOCK == 0) & ((records & self.THREAD) // 32 == threads // 32)
        by_self = by_warp & (records & self.WARP == 0) & (records & self.THREAD == threads)
        ordered = by_self | (by_warp & (times < self.warp_times[threads // 32]))
        in_other_block = (times >= self.launch_start) & (times < self.block_start)
        return ((times >= self.barrier_time) & ~ordered) | in_other_block

    def is_old(self, records: Indices) -> bool:
        """Whether none of them can be unordered."""
        return not len(records) or bool(records.max() < self.launch_start << self.TIME)

    def merged(self, old: Indices, new: Indices, threads: Indices) -> Indices:
        """What stands for these accesses and for earlier ones that no barrier separates from them.

        They are all reads, or all atomic operations.
        """
        unordered = self.unordered(old, threads)
        same_warp = (old & self.BLOCK == 0) & ((old & self.THREAD) // 32 == threads // 32)
        merged = np.where(same_warp, new & ~31 | self.WARP, new | self.BLOCK)
        in_other_block = unordered & (old >> self.TIME < self.block_start)
        return np.where(in_other_block, old, np.where(unordered, merged, new))

    def store(self, records: Indices, places: Indices, new: Indices, threads: Indices) -> None:
        """Stores a record for each place; one stands for all threads that access the same byte."""
        records[places] = new
        kept = records[places]
        is_shared = kept != new
        if is_shared.any():
            in_one_warp = (kept & self.THREAD) // 32 == threads // 32
            of_warp = is_shared & in_one_warp & (kept & self.BLOCK == 0)
            records[places[of_warp]] = new[of_warp] & ~31 | self.WARP
            of_block = is_shared & ~of_warp
            records[places[of_block]] = new[of_block] | self.BLOCK


class Memory:
    """All regions, by address."""

    def __init__(self) -> None:
        self.history = History()
        self.set_regions([])

    def set_regions(self, regions: Sequence[Region]) -> None:
        self.regions = sorted((r for r in regions if len(r.bytes)), key=lambda r: r.start)
        self.starts = np.array([r.start for r in self.regions], np.uint64)
        self.ends = np.array([r.start + len(r.bytes) for r in self.regions], np.uint64)

    def locate(
        self, space: str, addresses: npt.NDArray[np.uint64], size: int
    ) -> Iterator[tuple[Region, npt.NDArray[np.bool_] | slice, Indices]]:
        """The regions that are accessed, by which threads, and the bytes' places: (threads, size).

        Raises:
            PtxError: an access is misaligned, or not inside of one region of the space.
        """
        if (addresses % size).any():
            wrong = int(addresses[addresses % size != 0][0])
            raise PtxError(f"{size}-byte access at {self.describe(wrong)} is misaligned")
        found = np.searchsorted(self.starts, addresses, side="right") - 1
        outside = (found < 0) | (addresses + np.uint64(size) > self.ends[found])
        if outside.any():
            wrong = int(addresses[outside][0])
            raise PtxError(f"{size}-byte access outside of memory, at {self.describe(wrong)}")
        for index in (found[0],) if (found == found[0]).all() else np.unique(found):
            region = self.regions[index]
            if space not in ("generic", region.space):
                raise PtxError(f"{region.name} is accessed as {space} memory")
            where = slice(None) if (found == index).all() else found == index
            offsets = (addresses[where] - self.starts[index]).astype(np.int64)
            yield region, where, offsets[:, None] + np.arange(size)

    def describe(self, address: int) -> str:
        before = [r for r in self.regions if r.start <= address]
        return f"{before[-1].name} + {address - before[-1].start}" if before else hex(address)

    def load(
        self,
        space: str,
        addresses: npt.NDArray[np.uint64],
        size: int,
        threads: Indices,
        line: int,
    ) -> Bytes:
        """``size`` bytes for each thread: shape (threads, size)."""
        result = np.empty((len(addresses), size), np.uint8)
        for region, where, places in self.locate(space, addresses, size):
            result[where] = region.bytes[places]
            if not region.is_writable:
                continue
            if region.is_initialized is not None and not region.is_initialized[places].all():
                place = int(places[~region.is_initialized[places]][0])
                raise PtxError(f"{region.name} + {place} is read, but nobody wrote it")
            self.note_reads(region, places.ravel(), np.repeat(threads[where], size), line)
        return result

    def store(
        self,
        space: str,
        addresses: npt.NDArray[np.uint64],
        data: Bytes,
        threads: Indices,
        line: int,
    ) -> None:
        """Stores a row of ``data`` for each thread."""
        size = data.shape[1]
        for region, where, places in self.locate(space, addresses, size):
            own_data = data[where]
            self.note_writes(region, places, np.repeat(threads[where], size), line, own_data)
            region.bytes[places] = own_data
            if not np.array_equal(region.bytes[places], own_data):
                raise PtxError(f"threads write different values to one place of {region.name}")

    def update(
        self,
        space: str,
        addresses: npt.NDArray[np.uint64],
        dtype: np.dtype,
        operands: npt.NDArray[np.generic],
        combine: Callable[[np.generic, np.generic], np.generic],
        threads: Indices,
        line: int,
    ) -> npt.NDArray[np.generic]:
        """An atomic operation of each thread, in their order; returns what was there before."""
        size = dtype.itemsize
        before = np.empty(len(addresses), dtype)
        for region, where, places in self.locate(space, addresses, size):
            if region.is_initialized is not None and not region.is_initialized[places].all():
                raise PtxError(f"{region.name} is updated where nobody wrote it")
            self.note_writes(region, places, np.repeat(threads[where], size), line, None)
            chosen = np.arange(len(addresses))[where]
            for i, begin in zip(chosen.tolist(), places[:, 0].tolist(), strict=True):
                place = region.bytes[begin : begin + size].view(dtype)
                before[i] = place[0]
                place[0] = combine(place[0], operands[i])
        return before

    def note_reads(self, region: Region, places: Indices, threads: Indices, line: int) -> None:
        history = self.history
        writes = region.writes[places]
        if not history.is_old(writes):
            self.check(region, places, writes, history.unordered(writes, threads), line, "read")
        new = history.record(threads, line)
        old = region.reads[places]
        if not history.is_old(old):
            new = history.merged(old, new, threads)
        history.store(region.reads, places, new, threads)

    def note_writes(
        self,
        region: Region,
        places: Indices,
        threads: Indices,
        line: int,
        data: Bytes | None,
    ) -> None:
        """``data`` is None for an atomic operation."""
        if not region.is_writable:
            raise PtxError(f"{region.name} is written, but is only an input")
        history = self.history
        flat = places.ravel()
        reads, writes = region.reads[flat], region.writes[flat]
        if not history.is_old(reads):
            self.check(region, flat, reads, history.unordered(reads, threads), line, "write")
        new = history.record(threads, line, history.ATOMIC if data is None else 0)
        if not history.is_old(writes):
            unordered = history.unordered(writes, threads)
            if data is None:
                races = unordered & (writes & history.ATOMIC == 0)
                new = history.merged(writes, new, threads)
            else:  # the same value, as of a flag, is not a race for compute-sanitizer either
                races = unordered & (region.bytes[flat] != data.ravel())
            self.check(region, flat, writes, races, line, "write")
        history.store(region.writes, flat, new, threads)
        if region.is_initialized is not None:
            region.is_initialized[flat] = True

    def check(
        self,
        region: Region,
        places: Indices,
        records: Indices,
        races: npt.NDArray[np.bool_],
        line: int,
        kind: str,
    ) -> None:
        if not races.any():
            return
        record, place = int(records[races][0]), int(places[races][0])
        other = record >> History.LINE & 0xFFFFF
        raise PtxError(
            f"race: no barrier between this {kind} of {region.name} + {place} (line {line}) and "
            f"that by thread {record & History.THREAD} in line {other}"
        )
