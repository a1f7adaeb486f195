"""The CUDA kernels compile without warnings or register spills, and are built where a GPU is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.microadam.cuda_source import KERNEL, NVCC

ROOT = Path(__file__).parents[2]

# setup.py, on a machine that claims to have a Hopper.
SETUP_WITH_A_GPU = """
import runpy, sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda index: (9, 0)
sys.argv = ["setup.py", "-q", "build_ext", "--build-temp", sys.argv[1], "--build-lib", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""

LOAD = """
import sys, torch
import microadam
torch.ops.load_library(sys.argv[1])
print(torch.ops.microadam.native_kernel("cuda"))
"""

# The choices of setup.py, with GPUs of these capabilities; nothing is built.
CHOOSE = """
import ast, runpy, setuptools, sys, torch
capabilities = ast.literal_eval(sys.argv[1])
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: len(capabilities)
torch.cuda.get_device_capability = lambda index: capabilities[index]
setuptools.setup = lambda **_: None
chosen = runpy.run_path("setup.py")
nvcc = chosen["find_nvcc"]()
try:
    print(nvcc, *chosen["architectures_at_hand"](nvcc), sep="\\n")
except chosen["CannotBuildError"] as error:
    print(error)
"""

pytestmark = pytest.mark.skipif(not NVCC, reason="neither pip nor the path has an nvcc")


def choices(capabilities: list[tuple[int, int]], **environment: str) -> list[str]:
    """The nvcc and the architectures, or why there are none."""
    unasked = {name: os.environ[name] for name in os.environ if not name.startswith("MICROADAM")}
    return subprocess.run(
        [sys.executable, "-c", CHOOSE, str(capabilities)],
        env=unasked | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()


def test_an_nvcc_that_does_not_fit_torch_is_passed_over(tmp_path: Path) -> None:
    """CUDA_HOME often names a toolkit of another version, for all of a machine's users."""
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho release 1.0\n", encoding="utf-8")
    nvcc.chmod(0o755)
    assert choices([(9, 0)], CUDA_HOME=str(tmp_path)) == [NVCC, "9.0"]


def test_old_gpus_do_not_keep_newer_ones_from_their_kernels() -> None:
    assert choices([(8, 6), (7, 5), (8, 6)]) == [NVCC, "8.6"]
    (reason,) = choices([(7, 0), (7, 5)])
    assert reason == "the kernels need a GPU of compute capability 8.0 or newer, this has 7.5"


@pytest.mark.parametrize("architecture", ["80", "86", "89", "90", "100", "120"])
def test_kernels_compile_without_warnings_and_spills(architecture: str, tmp_path: Path) -> None:
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True)
    if f"sm_{architecture}" not in known.stdout.split():
        pytest.skip(f"this nvcc knows no sm_{architecture}")
    command = [NVCC, "-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{architecture}"]
    command += ["-Werror=all-warnings", "-Xptxas=-v"]
    command += ["-cubin", str(KERNEL), "-o", str(tmp_path / "kernel.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    num_spilled_bytes = re.findall(r"(\d+) bytes spill", result.stderr)
    assert num_spilled_bytes
    assert set(num_spilled_bytes) == {"0"}, result.stderr
    shared_bytes = [int(n) for n in re.findall(r"(\d+) bytes smem", result.stderr)]
    assert max(shared_bytes) <= 40 << 10  # so four thread blocks fit, even on an A100


def test_a_machine_with_a_gpu_gets_the_kernels_unasked(tmp_path: Path) -> None:
    """With the nvcc that pip brings, if it is there, else with the one on the path."""
    in_root = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
    unasked = {name: os.environ[name] for name in os.environ if not name.startswith("MICROADAM")}
    command = [sys.executable, "-c", SETUP_WITH_A_GPU, str(tmp_path)]
    built = subprocess.run(command, env=unasked, **in_root)
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr
    (library,) = tmp_path.rglob("_native.so")
    loaded = subprocess.run([sys.executable, "-c", LOAD, str(library)], env=unasked, **in_root)
    assert loaded.stdout == "CUDA\n", built.stderr + loaded.stderr
