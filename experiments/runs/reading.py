"""Reads the folders of runs, also unfinished and broken ones, without loading torch."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.errors import ExperimentError, reason

RESULTS = ("train loss", "eval loss", "score")


@dataclass(frozen=True)
class RunStatus:
    """What a run's folder says about it, found without loading anything into torch."""

    path: Path
    state: str  # finished | diverged | running | failed | interrupted | not started | broken
    num_steps: int  # done
    total_steps: int | None  # None: not known yet
    metrics: dict[str, Any]  # those of the record, or of the latest step
    config: dict[str, Any]
    error: str  # of a failed or broken run, else empty
    age_s: float  # since something was last written


def read(path: Path) -> RunStatus:
    """The status of the run in the folder ``path``, which need not exist."""
    record: dict[str, Any] = {}
    config: dict[str, Any] = {}
    lines: list[dict[str, Any]] = []
    error = ""
    try:
        record = read_record(path / "record.json") or {}
        lines = read_lines(path / "metrics.jsonl")
        config = _read_config(path / "config.yaml")
    except ExperimentError as broken:
        error = str(broken)
    metrics: dict[str, Any] = {}
    for line in lines:
        # Several lines may share the last step; an earlier step's evaluation is not of this model.
        metrics = (metrics if metrics.get("step") == line.get("step") else {}) | line
    written = [file.stat().st_mtime for file in path.glob("*") if file.is_file()]
    error_file = path / "error.txt"
    if error:
        state = "broken"
    elif record:
        state = record["status"]
    elif _is_locked(path.with_suffix(".lock")):
        state = "running"
    elif error_file.exists():
        state = "failed"
        error = error_file.read_text(encoding="utf-8").strip()
    else:
        state = "interrupted" if written else "not started"
    return RunStatus(
        path,
        state,
        record.get("num_steps", metrics.get("step", 0)),
        metrics.get("num_steps", config.get("training", {}).get("max_steps")),
        record.get("metrics", metrics),
        config,
        error,
        time.time() - max(written, default=time.time()),
    )


def find(results_dir: Path) -> list[RunStatus]:
    """All runs below ``results_dir``, latest last, without the folders that force=true kept."""
    folders = [path for path in results_dir.glob("runs/*/*/*/*") if path.is_dir()]
    runs = [read(path) for path in folders if "." not in path.name]
    return sorted(runs, key=lambda run: -run.age_s)


def evaluated(metrics: dict[str, Any]) -> dict[str, float]:
    """Held-out loss and scores by the task's names, without their standard errors and counts."""
    return {
        name.removeprefix("eval/"): value
        for name, value in metrics.items()
        if name.startswith("eval/") and isinstance(value, float) and "_stderr" not in name
    }


def headline(metrics: dict[str, Any]) -> str:
    """The most telling score: the average of several, else the first."""
    scores = evaluated(metrics)
    scores.pop("loss", None)
    if not scores:
        return ""
    name = "average" if "average" in scores else next(iter(scores))
    return f"{name.removesuffix(',none')} {scores[name]:.1%}"


def results(metrics: dict[str, Any]) -> list[str]:
    """What a list of runs shows of one, in the order of `RESULTS`; empty where there is nothing."""
    return [
        number(metrics, "train/final_loss", "train/loss"),
        number(metrics, "eval/loss"),
        headline(metrics),
    ]


def number(metrics: dict[str, Any], *names: str) -> str:
    """The first of these metrics that is present, with three decimals."""
    return next((f"{metrics[name]:.3f}" for name in names if name in metrics), "")


def read_record(path: Path) -> dict[str, Any] | None:
    """A run's record; None if there is none.

    Raises:
        ExperimentError: it is broken.
    """
    if not path.exists():
        return None
    with _explained(path):
        record = _mapping(json.loads(path.read_text(encoding="utf-8")))
        if not {"status", "metrics"} <= record.keys():
            raise ValueError("not a run record")
        return record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics; a kill may have cut the last one short.

    Raises:
        ExperimentError: one of them is broken.
    """
    if not path.exists():
        return []
    with _explained(path):
        text = path.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()
        return [_mapping(json.loads(line)) for line in lines]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    with _explained(path):
        return _mapping(yaml.safe_load(path.read_text(encoding="utf-8")))


def _mapping(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError("not a mapping")
    return values


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, yaml.YAMLError) as error:
        raise ExperimentError(
            f"{path} is broken ({reason(error)}); force=true runs it again and keeps the folder"
        ) from error


def _is_locked(lock: Path) -> bool:
    if not lock.exists():
        return False
    with lock.open("r", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
