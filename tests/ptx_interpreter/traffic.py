"""What a step moves and executes on a GPU, counted rather than timed:

    python -m tests.ptx_interpreter.traffic

The kernels run in the interpreter (see `operator`), a warp at a time as on a GPU. Memory moves in
sectors of 32 bytes. Counted are those that each warp's accesses *request* from the caches, and the
*distinct* ones, which memory must move at least once. Shared memory serves 32 banks of 4 bytes at a
time; an access takes as many *wavefronts* as its busiest bank has words, for 8 and 16 bytes a
thread by half and quarter warps. Instructions are PTX, of which ptxas makes somewhat fewer.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tests.microadam.agreement import Hyperparameters, Run
from tests.microadam.cuda_source import Emulation, build_ptx, loaded_emulation
from tests.microadam.test_native import draw
from tests.ptx_interpreter.instructions import WARP
from tests.ptx_interpreter.machine import Machine
from tests.ptx_interpreter.memory import Bytes, Indices, Memory
from tests.ptx_interpreter.operator import InterpretedStep
from tests.ptx_interpreter.parser import Module, parse

SECTOR = 32  # bytes
BANKS = 32  # of 4 bytes each
NUM_BLOCKS = 4
NUM_STEPS_BEFORE = 12  # the window is full, and the guesses are warm
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Sectors:
    num_requested: int = 0
    distinct: set[int] = field(default_factory=set)


class Traffic(Memory):
    """Memory that counts accesses.

    Attributes:
        sectors: by tensor, such as ``grads``, and by ``read`` or ``written``.
        num_wavefronts: of shared memory.
        num_ideal_wavefronts: if no two threads needed one bank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sectors: dict[tuple[str, str], Sectors] = defaultdict(Sectors)
        self.num_wavefronts = self.num_ideal_wavefronts = 0

    def load(
        self,
        space: str,
        addresses: npt.NDArray[np.uint64],
        size: int,
        threads: Indices,
        line: int,
    ) -> Bytes:
        self.count("read", space, addresses, size, threads)
        return super().load(space, addresses, size, threads, line)

    def store(
        self,
        space: str,
        addresses: npt.NDArray[np.uint64],
        data: Bytes,
        threads: Indices,
        line: int,
    ) -> None:
        self.count("written", space, addresses, data.shape[1], threads)
        super().store(space, addresses, data, threads, line)

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
        self.count("written", space, addresses, dtype.itemsize, threads)
        return super().update(space, addresses, dtype, operands, combine, threads, line)

    def count(
        self,
        kind: str,
        space: str,
        addresses: npt.NDArray[np.uint64],
        size: int,
        threads: Indices,
    ) -> None:
        """One access by threads of a warp."""
        for region, where, places in self.locate(space, addresses, size):
            if region.space == "global":
                sectors = np.unique((region.start + places) // SECTOR)
                of_tensor = self.sectors[region.name.partition("[")[0], kind]
                of_tensor.num_requested += len(sectors)
                of_tensor.distinct.update(sectors.tolist())
            elif region.space == "shared":
                group = threads[where] % WARP // (WARP * 4 // max(size, 4))
                for own in np.unique(group):
                    words = np.unique(places[group == own] // 4)
                    self.num_wavefronts += int(np.bincount(words % BANKS).max())
                    self.num_ideal_wavefronts += 1


@dataclass(frozen=True)
class Profile:
    """Of a step; bytes are per parameter, the other numbers per block of parameters."""

    requested_bytes: dict[tuple[str, str], float]  # by tensor and kind, as in `Traffic`
    distinct_bytes: dict[tuple[str, str], float]
    num_wavefronts: float
    num_ideal_wavefronts: float
    num_instructions: float  # of each warp

    @property
    def total_bytes(self) -> float:
        """What memory must move at least."""
        return sum(self.distinct_bytes.values())


def profile(
    module: Module, emulation: Emulation, dtype: torch.dtype, hyper: Hyperparameters
) -> Profile:
    """Profiles a step of ``NUM_BLOCKS`` blocks, weights and gradients in ``dtype``."""
    numel = NUM_BLOCKS * hyper.block_size
    generator = torch.Generator().manual_seed(0)
    run = Run(hyper, [draw(numel, dtype, generator)])
    traffic = Traffic()
    machine = Machine(module, memory=traffic)
    interpreted = InterpretedStep(machine, emulation.library, emulation.step_)
    for _ in range(NUM_STEPS_BEFORE):
        emulation.step_.default(*run.arguments([draw(numel, dtype, generator)]))
    interpreted.default(*run.arguments([draw(numel, dtype, generator)]))
    (block,) = (b for (kernel, _), b in machine.blocks.items() if "step_kernel" in kernel)
    sectors = traffic.sectors.items()
    return Profile(
        {name: SECTOR * s.num_requested / numel for name, s in sectors},
        {name: SECTOR * len(s.distinct) / numel for name, s in sectors},
        traffic.num_wavefronts / NUM_BLOCKS,
        traffic.num_ideal_wavefronts / NUM_BLOCKS,
        block.num_instructions / NUM_BLOCKS / (block.num_threads // WARP),
    )


def lines(profiles: dict[str, Profile]) -> list[str]:
    """A Markdown table with a column for each profile."""

    def row(label: str, values: list[Any]) -> str:
        return f"| {' | '.join([label, *values])} |"

    def of_bytes(p: Profile, name: tuple[str, str]) -> str:
        return f"{p.distinct_bytes[name]:.2f} ({p.requested_bytes[name]:.2f})"

    own = list(profiles.values())
    return [
        row("bytes per parameter: distinct (requested)", list(profiles)),
        row("---", ["---:"] * len(own)),
        *(
            row(f"`{name}` {kind}", [of_bytes(p, (name, kind)) for p in own])
            for name, kind in sorted(own[0].distinct_bytes)
            if any(p.distinct_bytes[name, kind] >= 0.005 for p in own)
        ),
        row("**total, distinct**", [f"**{p.total_bytes:.2f}**" for p in own]),
        row("instructions of a warp", [f"{p.num_instructions:,.0f}" for p in own]),
        row(
            "wavefronts of shared memory (without conflicts)",
            [f"{p.num_wavefronts:,.0f} ({p.num_ideal_wavefronts:,.0f})" for p in own],
        ),
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, loaded_emulation(Path(folder)) as emulation:
        module = parse(build_ptx(Path(folder)))
        profiles = {
            name: profile(module, emulation, dtype, Hyperparameters())
            for name, dtype in DTYPES.items()
        }
    print("\n".join(lines(profiles)))


if __name__ == "__main__":
    main()
