"""Builds csrc/cuda without a GPU: for the CPU with g++, and as PTX with nvcc."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
KERNEL = ROOT / "csrc/cuda/kernel.cu"
EMULATION = ROOT / "tests/cuda_emulation"
OF_PIP = Path(torch.__file__).parents[1] / "nvidia/cu13/bin"  # pip install "cuda-toolkit[nvcc]"
NVCC = shutil.which("nvcc", path=os.pathsep.join([str(OF_PIP), os.environ["PATH"]])) or ""
SOURCES = (KERNEL, ROOT / "csrc/cuda/step.cpp", EMULATION / "library.cpp")


@dataclass(frozen=True)
class Emulation:
    """csrc/cuda, compiled for the CPU: ``step_`` has the schema of ``microadam::step_``."""

    library: Path
    step_: Any


def build_emulation(folder: Path) -> Path:
    """A library with the operator ``microadam_emulation::step_`` for tensors on the CPU."""
    torch_folder = Path(torch.__file__).parent
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{EMULATION}"]
    command += ["-isystem", f"{torch_folder}/include"]
    command += ["-isystem", f"{torch_folder}/include/torch/csrc/api/include"]
    command += ["-include", f"{EMULATION}/device.h"]
    objects = [str(folder / f"{source.stem}.o") for source in SOURCES]
    library = folder / "emulation.so"
    for source, target in zip(SOURCES, objects, strict=True):
        compile_one = [*command, "-x", "c++", "-c", str(source), "-o", target]
        subprocess.run(compile_one, check=True, text=True)
    link = ["g++", "-shared", *objects, f"-L{torch_folder}/lib", "-ltorch_cpu", "-o", str(library)]
    subprocess.run(link, check=True, text=True)
    return library


@contextmanager
def loaded_emulation(folder: Path) -> Iterator[Emulation]:
    """The emulation, built in a folder, while the block runs."""
    library = build_emulation(folder)
    schema = str(torch.ops.microadam.step_.default._schema).removeprefix("microadam::")
    definition = torch.library.Library("microadam_emulation", "DEF")
    definition.define(schema)
    torch.ops.load_library(str(library))
    yield Emulation(library, torch.ops.microadam_emulation.step_)
    del definition


def build_ptx(folder: Path) -> str:
    """What nvcc makes of the kernels, with the flags of setup.py."""
    output = folder / "kernel.ptx"
    command = [NVCC, "-std=c++17", "-O3", "-fmad=false", "-arch=compute_90", "-ptx"]
    subprocess.run([*command, str(KERNEL), "-o", str(output)], check=True, text=True)
    return output.read_text(encoding="utf-8")
