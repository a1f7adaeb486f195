"""The records of finished and diverged runs, and which of them match a given run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.errors import ExperimentError

# Keys, at any depth of a config, whose values change no number in a table that states its hardware
# and data sources: how the run is monitored, stored and computed.
_NOT_COMPARED = {
    "checkpoint_every_steps",
    "dry_run",
    "every_steps",
    "force",
    "hardware",
    "learning_rates",
    "logger",
    "results_dir",
    "root",
    "save_model",
}

# Keys of dictionaries whose own keys are data rather than names that this project defines: a
# difference between them is never due to a key that the project has since added or removed.
_FREE_FORM = {"architecture", "columns", "overrides"}
_FREE_FORM_OF_SECTIONS = {"harness"}

_AUTO_PRECISION = {"cuda": "bf16", "cpu": "fp32"}  # as `experiments.hardware.resolve_precision`


@dataclass(frozen=True, eq=False)
class Record:
    """A record as `experiments.runner` writes it."""

    file: str  # its name in results/records
    values: dict[str, Any]

    @property
    def has_diverged(self) -> bool:
        return self.values["status"] == "diverged"

    @property
    def metrics(self) -> dict[str, Any]:
        return self.values["metrics"]

    @property
    def seed(self) -> int:
        return self.values["seed"]

    @property
    def learning_rate(self) -> float:
        return self.values["config"]["optimizer"]["lr"]

    @property
    def sources(self) -> tuple[str, str]:
        """Where the data and the weights come from."""
        return self.values["data_source"], self.values["model_source"]

    @property
    def num_processes(self) -> int:
        """Absent from records older than multi-process runs."""
        return self.values["hardware"].get("num_processes", 1)

    @property
    def peak_memory_of(self) -> str:
        """What its peak memory covers: training, or the whole process.

        Absent from records older than the measurement in training alone.
        """
        return self.values.get("peak_memory_of", "process")

    @property
    def machine(self) -> str:
        """GPUs or CPU and precision, as a table names them."""
        hardware = self.values["hardware"]
        count = f"{self.num_processes} x " if self.num_processes > 1 else ""
        return f"{count}{hardware['gpu'] or hardware['cpu']}, {hardware['precision']}"

    @property
    def machine_with_threads(self) -> str:
        """Like `machine`, with the number of a CPU's threads, for a caption."""
        hardware = self.values["hardware"]
        if hardware["gpu"]:
            return self.machine
        plural = "" if hardware["num_threads"] == 1 else "s"
        return f"{self.machine} ({hardware['num_threads']} thread{plural})"

    def is_run_of(self, config: dict[str, Any]) -> bool:
        """Whether ``config``, as composed now, describes this run, wherever data and results are.

        A key that only the record has was removed since, and is not compared; one that only
        ``config`` has was added since, and must be off: None, False or empty. Hardware is compared
        by name, if the config asks for one, and by the resulting precision; for data and weights in
        a user's folder, it only matters that one was given.
        """
        hardware = config["hardware"]
        if hardware["name"] not in ("auto", self.values["config"]["hardware"]["name"]):
            return False
        if not self._has_precision(hardware["precision"]):
            return False
        own, wanted = (dict(_leaves(values)) for values in (self.values["config"], config))
        added = (wanted[name] for name in wanted.keys() - own.keys())
        return all(value is None or value is False or value == {} for value in added) and all(
            own[name] == wanted[name] for name in own.keys() & wanted.keys()
        )

    def _has_precision(self, wanted: str) -> bool:
        """Whether the run used it; ``auto`` is what the run's device would have chosen."""
        hardware = self.values["hardware"]
        if wanted == "auto":
            wanted = _AUTO_PRECISION[hardware["device"]]
        return hardware.get("precision", wanted) == wanted


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything compared in a config."""
    for name, value in values.items():
        if name in _NOT_COMPARED:
            continue
        if name in _FREE_FORM:
            yield prefix + name, value
        elif isinstance(value, dict):
            if name in _FREE_FORM_OF_SECTIONS:
                yield prefix + name, sorted(value)
            yield from _leaves(value, f"{prefix}{name}.")
        elif name == "path":
            yield prefix + name, value is not None
        else:
            yield prefix + name, value


def load(results_dir: Path) -> list[Record]:
    """All records in ``results_dir``, the newest first.

    Raises:
        ExperimentError: a file is not JSON.
    """
    paths = sorted(results_dir.glob("records/*.json"))
    records = [Record(path.name, _read(path)) for path in paths]
    return sorted(records, key=lambda record: record.values["finished_at"], reverse=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExperimentError(
            f"{path}: not valid JSON ({error}); delete it, and the same run will write it again"
        ) from error
    return values
