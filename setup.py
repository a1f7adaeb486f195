"""Builds the native library beside the package; everything else is in pyproject.toml.

Without a C++ compiler or torch, the package is still installed and steps in plain torch. ``CXX``
names the compiler; ``MICROADAM_SANITIZE=1`` builds for ``make sanitize``.

If there is a GPU, and an nvcc of torch's CUDA version, the CUDA kernels are built too, for this
machine's GPUs: by the one in ``CUDA_HOME``, pip's (``pip install "cuda-toolkit[nvcc]"``) or the one
on the path, the first of that version. ``MICROADAM_CUDA_ARCHITECTURES="8.0 9.0"`` requests those
architectures instead, ``all`` every one listed below; if a requested one cannot be built, the build
fails.

The library is built against torch's stable ABI and does not depend on the Python version, so one
wheel is tagged for all of them.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
LIBRARY = "_native.so"
SOURCES = ("library.cpp", "cpu/step.cpp", "cpu/kernel_generic.cpp")
IS_X86 = platform.machine() in ("x86_64", "AMD64")

# Results must not depend on the compiler: no contraction to fused multiply-adds, no fast math.
# -fno-math-errno and -fno-trapping-math change no result; they allow loops to be vectorized.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
)
CUDA_SOURCES = ("cuda/kernel.cu", "cuda/step.cpp")
CUDA_ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0"
OLDEST_CAPABILITY = (8, 0)  # the first GPUs with instructions for bfloat16
CUDA_FLAGS = (  # packed.cuh needs subnormal numbers: never add -ftz=true
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra",
)
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11
# choose_kernel() in cpu/step.cpp checks the machine for the same features. The AVX-512 kernel uses
# 512-bit intrinsics where they pay; the loops the compiler vectorizes are too short for 512 bits.
AVX2_FLAGS = ("-mavx2", "-mf16c", "-mbmi", "-mpopcnt")
AVX512_FLAGS = (
    *AVX2_FLAGS,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512vbmi2",
    "-mprefer-vector-width=256",
)
SANITIZE_FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
SANITIZERS = "-fsanitize=address,undefined"


class CannotBuildError(Exception):
    """The native library cannot be built here; the message says why."""


def find_compiler() -> list[str]:
    wanted = os.environ.get("CXX")
    if wanted:
        return shlex.split(wanted)
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise CannotBuildError("no C++ compiler was found (apt install g++, or name one with CXX=)")


def find_torch() -> Path:
    try:
        import torch
    except ImportError as error:
        raise CannotBuildError(
            "torch is not importable during the build (install torch first, then build with "
            "--no-build-isolation)"
        ) from error
    return Path(torch.__file__).parent


def run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CannotBuildError(f"{command[0]} cannot be run: {error}") from error
    if result.returncode:
        first_lines = "\n".join(result.stderr.splitlines()[:50])
        raise CannotBuildError(f"{shlex.join(command)} failed:\n{first_lines}")
    if result.stderr:
        print(result.stderr, file=sys.stderr)


def find_nvcc() -> str:
    """The first nvcc of torch's CUDA version; if there is none, the first of any version."""
    if os.environ.get("MICROADAM_SANITIZE") == "1":
        raise CannotBuildError("MICROADAM_SANITIZE=1 is for the CPU")
    import torch

    if torch.version.cuda is None:
        raise CannotBuildError("this torch was built without CUDA")
    major = torch.version.cuda.split(".")[0]
    of_pip = Path(torch.__file__).parents[1] / f"nvidia/cu{major}/bin"
    folders = [str(of_pip), os.environ.get("PATH", os.defpath)]
    home = os.environ.get("CUDA_HOME")
    if home:
        folders.insert(0, f"{home}/bin")
        if shutil.which("nvcc", path=folders[0]) is None:
            raise CannotBuildError(f"no nvcc was found in {home}/bin, which CUDA_HOME names")
    found = [nvcc for folder in folders if (nvcc := shutil.which("nvcc", path=folder))]
    if not found:
        raise CannotBuildError(
            'no nvcc was found (pip install "cuda-toolkit[nvcc]" brings one of CUDA 13)'
        )
    # CUDA_HOME is often set for a whole machine, whichever torch is in this environment.
    return next((nvcc for nvcc in found if cuda_version_of(nvcc) == major), found[0])


def output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def cuda_version_of(nvcc: str) -> str:
    """The major version, such as ``"13"``."""
    version = re.search(r"release (\d+)", output_of([nvcc, "--version"]))
    return version[1] if version else "(unknown)"


def architectures_at_hand(nvcc: str) -> list[str]:
    """Those of this machine's GPUs, if their driver is sure to accept this nvcc's output."""
    import torch

    if not torch.cuda.is_available():
        raise CannotBuildError("there is no GPU, and MICROADAM_CUDA_ARCHITECTURES names none")
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    supported = [f"{c[0]}.{c[1]}" for c in sorted(capabilities) if c >= OLDEST_CAPABILITY]
    if not supported:
        major, minor = max(capabilities)
        raise CannotBuildError(
            f"the kernels need a GPU of compute capability 8.0 or newer, this has {major}.{minor}"
        )
    version = cuda_version_of(nvcc)
    if version != str(torch.version.cuda).split(".")[0]:
        raise CannotBuildError(
            f"{nvcc} is of CUDA {version}, torch of {torch.version.cuda}: install an nvcc that "
            'fits (for CUDA 13, pip install "cuda-toolkit[nvcc]"), or build all the same, with '
            "MICROADAM_CUDA_ARCHITECTURES=all"
        )
    return supported


def cuda_architecture_flags(nvcc: str) -> list[str]:
    """Flags for every architecture that is wanted and known, and PTX of the last for newer ones."""
    wanted = os.environ.get("MICROADAM_CUDA_ARCHITECTURES", "").split()
    names = CUDA_ARCHITECTURES.split() if wanted == ["all"] else wanted
    names = [name.replace(".", "") for name in names or architectures_at_hand(nvcc)]
    known = output_of([nvcc, "--list-gpu-arch"]).split()
    unknown = [name for name in names if f"compute_{name}" not in known]
    names = [name for name in names if name not in unknown]
    if not names or (unknown and wanted != ["all"]):
        raise CannotBuildError(f"{nvcc} does not know the architectures {' '.join(unknown)}")
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*flags, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


def build_cuda(objects: Path, torch_flags: list[str], compiler: list[str]) -> tuple[str, list[str]]:
    """Compiles csrc/cuda; returns nvcc, which must do the linking, and the object files.

    Raises:
        CannotBuildError: nvcc is missing or too old, torch has no CUDA, or a command fails.
    """
    nvcc = find_nvcc()
    if len(compiler) > 1:
        raise CannotBuildError(f"nvcc takes no compiler of several words: CXX={compiler}")
    flags = ["-ccbin", compiler[0], *CUDA_FLAGS, *torch_flags]
    outputs = [str(objects / f"cuda_{Path(source).stem}.o") for source in CUDA_SOURCES]
    for source, output in zip(CUDA_SOURCES, outputs, strict=True):
        is_kernel = source.endswith(".cu")
        own_flags = ["--threads=0", *cuda_architecture_flags(nvcc)] if is_kernel else []
        run([nvcc, *flags, *own_flags, "-c", str(ROOT / "csrc" / source), "-o", output])
    return nvcc, outputs


def build_native(objects: Path, target: Path) -> None:
    """Compiles csrc/ into the shared library ``target``.

    Raises:
        CannotBuildError: a compiler or torch is missing, or a command fails.
    """
    if sys.platform == "win32":
        raise CannotBuildError("it is built on Linux and macOS only")
    compiler, torch = find_compiler(), find_torch()
    sanitize = os.environ.get("MICROADAM_SANITIZE") == "1"
    torch_flags = [TORCH_TARGET, "-isystem", str(torch / "include")]
    torch_flags += ["-isystem", str(torch / "include/torch/csrc/api/include")]
    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    nvcc = ""
    cuda_outputs: list[str] = []
    try:
        nvcc, cuda_outputs = build_cuda(objects, torch_flags, compiler)
    except CannotBuildError as error:
        if os.environ.get("MICROADAM_CUDA_ARCHITECTURES"):  # requested, so it must be built
            raise
        print(f"MicroAdam is built without its CUDA kernels: {error}", file=sys.stderr)

    flags = [*FLAGS, *((*SANITIZE_FLAGS, SANITIZERS) if sanitize else ()), *torch_flags]
    flags += ["-DMICROADAM_WITH_CUDA"] if cuda_outputs else []
    units = [(source, flags) for source in SOURCES]
    if IS_X86:
        units.append(("cpu/kernel_avx2.cpp", [*flags, *AVX2_FLAGS]))
        units.append(("cpu/kernel_avx512.cpp", [*flags, *AVX512_FLAGS]))
    outputs = [str(objects / f"{Path(source).stem}.o") for source, _ in units]
    with ThreadPoolExecutor() as pool:
        commands = [
            [*compiler, *unit_flags, "-c", str(ROOT / "csrc" / source), "-o", output]
            for (source, unit_flags), output in zip(units, outputs, strict=True)
        ]
        list(pool.map(run, commands))
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
    if cuda_outputs:
        # The CUDA runtime is linked in statically, and must not clash with torch's own.
        link = [nvcc, "-ccbin", compiler[0], "-cudart=static", "-Xlinker=--exclude-libs=ALL"]
        libraries.append(f"-L{Path(nvcc).parents[1] / 'lib'}")  # pip's nvcc looks in lib64
    else:
        link = [*compiler, *([SANITIZERS] if sanitize else [])]
        link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    run([*link, "-shared", *outputs, *cuda_outputs, *libraries, "-o", str(target)])


class BuildNative(build_ext):
    """Builds the library where setuptools expects an extension module."""

    def run(self) -> None:
        folder = ROOT if self.inplace else Path(self.build_lib)
        target = folder / "microadam" / LIBRARY
        try:
            build_native(Path(self.build_temp), target)
        except CannotBuildError as error:
            target.unlink(missing_ok=True)  # an older one would not match these sources
            if os.environ.get("MICROADAM_CUDA_ARCHITECTURES"):
                message = f"MICROADAM_CUDA_ARCHITECTURES asks for CUDA kernels: {error}"
                raise CompileError(message) from error
            print(
                "WARNING: MicroAdam's native library was not built, so every step will run in "
                f"plain torch, which is many times slower: {error}",
                file=sys.stderr,
            )

    def get_outputs(self) -> list[str]:
        target = Path(self.build_lib) / "microadam" / LIBRARY
        return [str(target)] if target.exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # `pip install -e`: nothing to copy, the library is built in place


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM: native code, but for any Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=NativeDistribution,
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    # A name only: it makes setuptools run build_ext.
    ext_modules=[Extension("microadam._native", sources=[])],
)
