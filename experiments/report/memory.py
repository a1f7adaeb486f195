"""The memory table: planned for the paper's models, and measured for those a GPU has run."""

from __future__ import annotations

import csv
import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.report import formats
from experiments.report.records import Record, load

PARTS = ("param", "grad", "state", "activation")  # of the planned peak, each with `_bytes`

HEAD = ["model", "optimizer", "bytes a parameter", "state", "planned peak", "measured peak"]

_DTYPES = {
    "bf16": "bfloat16",
    "bf16_amp": "float32 with autocast to bfloat16",
    "fp32": "float32",
}


@dataclass(frozen=True)
class Row:
    plan: dict[str, Any]  # one row of memory_plan.json
    measured: Record | None  # of training on one GPU, with the same shapes and precision

    @property
    def measured_bytes(self) -> int | None:
        return None if self.measured is None else self.measured.metrics["memory/peak_bytes"]

    @property
    def most_bytes(self) -> int:
        return max(self.plan["peak_bytes"], self.measured_bytes or 0)

    def cells(self) -> list[str]:
        return [
            self.plan["model"],
            self.plan["optimizer"],
            f"{self.plan['state_bytes'] / self.plan['num_params']:.2f}",
            formats.size(self.plan["state_bytes"]),
            formats.size(self.plan["peak_bytes"]),
            formats.size(self.measured_bytes) if self.measured_bytes else "",
        ]


@dataclass(frozen=True)
class MemoryTable:
    title: str
    rows: list[Row]

    @property
    def has_measured(self) -> bool:
        return any(row.measured for row in self.rows)

    def by_model(self) -> list[tuple[str, list[Row]]]:
        groups = itertools.groupby(self.rows, lambda row: row.plan["model"])
        return [(model, list(rows)) for model, rows in groups]

    @property
    def caption(self) -> str:
        machines = {row.measured.machine for row in self.rows if row.measured is not None}
        hardware = self.rows[0].plan["config"]["hardware"]
        dtypes = {model: _DTYPES[rows[0].plan["precision"]] for model, rows in self.by_model()}
        parameters = "; ".join(
            f"of {', '.join(m for m in dtypes if dtypes[m] == dtype)} in {dtype}"
            for dtype in dict.fromkeys(dtypes.values())
        )
        return (
            "Planned from the architectures, before any run: parameters, gradients, optimizer "
            "state and the activations of one micro-batch of full length, taken to be alive "
            f"together. Setting: {hardware['name']}; parameters {parameters}. "
            + (
                f"Measured, the most allocated in training: {'; '.join(sorted(machines))}."
                if machines
                else "No GPU has measured these yet."
            )
        )


def read(results_dir: Path) -> MemoryTable | None:
    """The table; None if there is no plan yet."""
    path = results_dir / "memory_plan.json"
    if not path.exists():
        return None
    planned = json.loads(path.read_text(encoding="utf-8"))
    of_one_gpu = [
        record
        for record in load(results_dir)
        if record.values["hardware"]["device"] == "cuda"
        and record.num_processes == 1
        and record.peak_memory_of == "training"
    ]
    rows = [Row(plan, _measured(plan, of_one_gpu)) for plan in planned["rows"]]
    return MemoryTable(planned["title"], rows)


def _measured(plan: dict[str, Any], records: list[Record]) -> Record | None:
    """The newest run with these shapes; data, weights, steps and rates make no difference."""
    for record in records:
        has_same_shapes = _shapes(record.values["config"]) == _shapes(plan["config"])
        if has_same_shapes and record.values["hardware"]["precision"] == plan["precision"]:
            return record
    return None


def _shapes(config: dict[str, Any]) -> list[Any]:
    """What decides the memory of a run."""
    switches = ("micro_batch_size", "activation_checkpointing", "activation_offloading")
    return [
        config["task"],
        config["model"]["architecture"],
        {name: value for name, value in config["optimizer"].items() if name != "lr"},
        [config["hardware"].get(name) for name in switches],
        config["training"].get("gradient_release"),
    ]


def write(table: MemoryTable, results_dir: Path) -> list[Path]:
    """Writes Markdown, CSV (plain bytes) and LaTeX, and returns their paths."""
    lines = [row.cells() for row in table.rows]
    texts = {
        "md": formats.markdown(table.title, HEAD, lines, table.caption),
        "csv": _csv(table),
        "tex": formats.latex("memory", table.title, HEAD, lines, table.caption),
    }
    paths = []
    for suffix, text in texts.items():
        paths.append(results_dir / f"memory.{suffix}")
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def _csv(table: MemoryTable) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = ["num_params", *(f"{part}_bytes" for part in PARTS), "peak_bytes"]
    writer.writerow(["model", "optimizer", "precision", *names, "measured_peak_bytes", "command"])
    for row in table.rows:
        of_plan = [row.plan[name] for name in ("model", "optimizer", "precision", *names)]
        writer.writerow([*of_plan, row.measured_bytes, row.plan["command"]])
    return file.getvalue()
