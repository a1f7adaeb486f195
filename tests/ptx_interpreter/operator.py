"""The operator ``microadam::step_`` as a GPU would run it: the real host code, nvcc's PTX.

csrc/cuda is compiled for the CPU as in tests/cuda_emulation, but what it launches is not emulated:
the kernel's name, the grid and the bytes of the argument go to the interpreter. So the two
compilers must agree about the layout of arguments, too.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from microadam.reference import StepArguments
from tests.ptx_interpreter.machine import Launch, Machine
from tests.ptx_interpreter.memory import Region
from tests.ptx_interpreter.parser import Module

_LAUNCHER = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_size_t
)
_SET_LAUNCHER = "emulation_set_launcher"
_INPUTS = ("grads", "lr_tensor", "grad_scale", "found_inf")


def demangle(names: Iterable[str]) -> list[str]:
    result = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


class InterpretedStep:
    """Can take the place of ``torch.ops.microadam.step_``.

    Args:
        machine: for the PTX of csrc/cuda/kernel.cu.
        library: csrc/cuda, built for the CPU, whose operator is ``step_``.
    """

    def __init__(self, machine: Machine, library: Path, step_: Any) -> None:
        self.machine = machine
        self.step_ = step_
        self.library = ctypes.CDLL(str(library))
        self.entries = entries_of(machine.module)
        self.symbols = self.read_symbols(library)

    def read_symbols(self, library: Path) -> dict[int, str]:
        """Demangled names of the library's functions, by address."""
        symbols = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True)
        rows = [row.split() for row in symbols.stdout.splitlines()]
        places = {name: int(place, 16) for place, _, name in (r for r in rows if len(r) == 3)}
        loaded = ctypes.cast(getattr(self.library, _SET_LAUNCHER), ctypes.c_void_p).value or 0
        base = loaded - places[_SET_LAUNCHER]
        addresses = [base + place for place in places.values()]
        return dict(zip(addresses, demangle(places), strict=True))

    def default(self, *values: Any) -> None:
        launches: list[tuple[int, int, int, bytes]] = []

        def record(
            kernel: int, num_blocks: int, num_threads: int, argument: int, num_bytes: int
        ) -> None:  # must not raise: its caller is C++
            content = ctypes.string_at(argument, num_bytes)
            launches.append((kernel, num_blocks, num_threads, content))

        launcher = _LAUNCHER(record)
        self.library.emulation_set_launcher(launcher)
        try:
            self.step_.default(*values)
        finally:
            self.library.emulation_set_launcher(None)
        regions = list(regions_of(StepArguments(*values)))
        for kernel, *grid_and_arguments in launches:  # a GPU runs them later, too
            entry = self.entries[self.symbols[kernel]]
            self.machine.launch(Launch(entry, *grid_and_arguments), regions)


def entries_of(module: Module) -> dict[str, str]:
    """Names of a module's kernels, by what C++ calls them."""
    entries = [function.name for function in module.functions.values() if function.is_entry]
    return dict(zip(demangle(entries), entries, strict=True))


def regions_of(arguments: StepArguments) -> Iterator[Region]:
    """The memory of all tensors."""
    for name, value in arguments._asdict().items():
        tensors = list(value) if isinstance(value, list | tuple) else [value]
        for i, tensor in enumerate(tensors):
            if isinstance(tensor, Tensor):
                address, num_bytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
                yield Region.at(f"{name}[{i}]", address, num_bytes, name not in _INPUTS)
