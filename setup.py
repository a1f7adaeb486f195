"""Builds the native library beside the package; everything else stands in pyproject.toml.

Without a C++ compiler, or without torch at hand, the package is installed all the same and steps in
plain torch. ``CXX`` names the compiler; ``MICROADAM_SANITIZE=1`` builds for ``make sanitize``.

The library is built against torch's stable ABI. It depends on no Python version, and so the wheel
is tagged for every one.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
LIBRARY = "_native.so"
SOURCES = ("library.cpp", "cpu/step.cpp", "cpu/kernel_generic.cpp")
IS_X86 = platform.machine() in ("x86_64", "AMD64")

# Results must not depend on the compiler: no contraction to fused multiply-adds, no fast math.
# -fno-math-errno and -fno-trapping-math change no result; they let loops be vectorized.
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
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # the stable ABI of torch 2.11
)
AVX2_FLAGS = ("-mavx2", "-mf16c", "-mbmi", "-mpopcnt")  # cpu_kernel() in step.cpp asks for the same
SANITIZE_FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
SANITIZERS = "-fsanitize=address,undefined"


class CannotBuildError(Exception):
    """The native library cannot be built here; says why."""


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
        raise CannotBuildError(f"{shlex.join(command)} failed:\n{result.stderr.strip()}")
    if result.stderr:
        print(result.stderr, file=sys.stderr)


def build_native(objects: Path, target: Path) -> None:
    """Compiles csrc/ into the shared library ``target``.

    Raises:
        CannotBuildError: a compiler or torch is missing, or a command fails.
    """
    if sys.platform == "win32":
        raise CannotBuildError("it is built on Linux and macOS only")
    compiler, torch = find_compiler(), find_torch()
    sanitize = os.environ.get("MICROADAM_SANITIZE") == "1"
    flags = [*FLAGS, *((*SANITIZE_FLAGS, SANITIZERS) if sanitize else ())]
    flags += ["-isystem", str(torch / "include")]
    flags += ["-isystem", str(torch / "include/torch/csrc/api/include")]
    units = [(source, flags) for source in SOURCES]
    if IS_X86:
        units.append(("cpu/kernel_avx2.cpp", [*flags, *AVX2_FLAGS]))

    objects.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    outputs = [str(objects / f"{Path(source).stem}.o") for source, _ in units]
    with ThreadPoolExecutor() as pool:
        commands = [
            [*compiler, *unit_flags, "-c", str(ROOT / "csrc" / source), "-o", output]
            for (source, unit_flags), output in zip(units, outputs, strict=True)
        ]
        list(pool.map(run, commands))
    link_flags = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    link_flags += [SANITIZERS] if sanitize else []
    run([*compiler, "-shared", *outputs, f"-L{torch / 'lib'}", "-ltorch_cpu", *link_flags,
         "-o", str(target)])  # fmt: skip


class BuildNative(build_ext):
    """Builds the library where setuptools wants an extension module."""

    def run(self) -> None:
        folder = ROOT if self.inplace else Path(self.build_lib)
        target = folder / "microadam" / LIBRARY
        try:
            build_native(Path(self.build_temp), target)
        except CannotBuildError as error:
            target.unlink(missing_ok=True)  # an older one would not fit these sources
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
    """Tags the wheel py3-none-PLATFORM: native code, but of no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=NativeDistribution,
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    # Only a name: it makes setuptools run build_ext.
    ext_modules=[Extension("microadam._native", sources=[])],
)
