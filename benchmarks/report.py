"""What every benchmark reports besides its numbers, and the two files it writes."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from microadam import __version__, ops

CAPABILITY = "ATEN_CPU_CAPABILITY"  # chooses the kernels, torch's and ours


def environment(device: str) -> dict[str, Any]:
    packages = ("bitsandbytes", "torchao", "flashoptim")
    # A broken installation has no name.
    installed = {(d.metadata["Name"] or "").lower() for d in metadata.distributions()}
    command = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    if CAPABILITY in os.environ:
        command.insert(0, f"{CAPABILITY}={os.environ[CAPABILITY]}")
    return {
        "command": shlex.join(command),
        "microadam": __version__,
        "kernel": ops.native_kernel(device) or "plain torch",
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in packages if name in installed},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "num_threads": torch.get_num_threads(),
        "num_cpus": os.cpu_count(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(headers: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that is also readable as plain text."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(f"{x:<{w}}" for x, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def write(output: Path, title: str, notes: list[str], tables: str, results: dict[str, Any]) -> str:
    """Writes the numbers to ``output`` .json and the tables to .md; returns the latter's text."""
    facts = ", ".join(f"{k} {v}" for k, v in results["environment"].items() if k != "command")
    command = results["environment"]["command"]
    text = f"# {title}\n\n`{command}`\n\n{facts}\n\n" + "\n".join(notes) + f"\n\n{tables}\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".md").write_text(text)
    output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    return text
