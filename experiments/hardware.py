"""What a run computes on: device, precision, and how a record describes the machine."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.config import HardwareConfig
from experiments.errors import ExperimentError

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"  # see proc(5)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # see mallopt(3)
_KEPT_BYTES = 2**30


@dataclass(frozen=True)
class Hardware:
    device: torch.device
    precision: str  # bf16: bfloat16 parameters | bf16_amp: float32 ones, autocast | fp32

    @property
    def param_dtype(self) -> torch.dtype:
        return param_dtype(self.precision)

    def autocast(self) -> AbstractContextManager[object]:
        if self.precision == "bf16_amp":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def synchronize(self) -> None:
        """Waits for the device, so that a clock read next is accurate."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget_peak(self) -> bool:
        """Resets the peak and returns whether it could: macOS and some containers do not let a
        process reset its own."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            _CLEAR_REFS.write_text(_CLEAR_PEAK)
        except OSError:
            return False
        return True

    def peak_bytes(self) -> int:
        """Most memory held since `forget_peak`: allocated on the GPU, or resident in this process.

        Since the process began if `forget_peak` could not reset it.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = _STATUS.read_text() if _STATUS.exists() else ""
        if (peak := re.search(r"VmHWM:\s+(\d+) kB", status)) is not None:
            return int(peak[1]) * 1024
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def total_bytes(self) -> int | None:
        """The GPU's memory; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.get_device_properties(self.device).total_memory

    def describe(self) -> dict[str, object]:
        """The names and counts of the hardware, for the record."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        return {
            "device": self.device.type,
            "gpu": gpu,
            "cpu": _cpu_name(),
            "num_threads": torch.get_num_threads(),
            "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
            "precision": self.precision,
        }


def resolve_precision(config: HardwareConfig) -> str:
    if config.precision != "auto":
        return config.precision
    has_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return "bf16" if has_gpu else "fp32"


def param_dtype(precision: str) -> torch.dtype:
    """The dtype of the parameters and the model's inputs; ``precision`` must be resolved."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def resolve(config: HardwareConfig) -> Hardware:
    """Turns ``auto`` into what this machine has.

    Raises:
        ExperimentError: a GPU is requested and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ExperimentError(
            f"hardware={config.name}: torch sees no CUDA GPU here; use hardware=auto or "
            "hardware=cpu, or add dry_run=true to see only the plan"
        )
    if has_gpu and config.device != "cpu":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    else:
        device = torch.device("cpu")
        _keep_freed_memory()
    return Hardware(device, resolve_precision(config))


def _keep_freed_memory() -> None:
    """Has glibc reuse large blocks, such as an embedding's gradient, from one step to the next.

    Otherwise it returns each to the system and the next needs fresh pages: 8% of a training step
    of MiniLM-L6 and 16% of MiniLM-L3, on one core.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES):  # old versions allow only 32 MiB
            libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
