"""The CUDA kernels compile without warnings or register spills, which would cost bandwidth."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).parents[2] / "csrc/cuda"

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")


@pytest.mark.parametrize("architecture", ["80", "86", "89", "90", "100", "120"])
def test_kernels_compile_without_warnings_and_spills(architecture: str, tmp_path: Path) -> None:
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True)
    if f"sm_{architecture}" not in known.stdout.split():
        pytest.skip(f"this nvcc knows no sm_{architecture}")
    command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{architecture}"]
    command += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v"]
    command += ["-c", str(SOURCES / "kernel.cu"), "-o", str(tmp_path / "kernel.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    num_spilled_bytes = re.findall(r"(\d+) bytes spill", result.stderr)
    assert num_spilled_bytes
    assert set(num_spilled_bytes) == {"0"}, result.stderr
    shared_bytes = [int(n) for n in re.findall(r"(\d+) bytes smem", result.stderr)]
    assert max(shared_bytes) <= 40 << 10  # so four thread blocks fit, even on an A100


def test_host_code_compiles_without_warnings(tmp_path: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    command = ["nvcc", "-std=c++17", "-Werror=all-warnings"]
    command += ["-Xcompiler=-Wall,-Wextra,-Werror,-fvisibility=hidden"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(include)]
    command += ["-c", str(SOURCES / "step.cpp"), "-o", str(tmp_path / "step.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
