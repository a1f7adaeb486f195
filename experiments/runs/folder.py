"""The folder of a run: its config, its metrics, its lock, and the record that says it is finished.

results/runs/<task>/<model>/<optimizer>/<hash>/
    config.yaml     the config, every value resolved
    metrics.jsonl   one line per logged step; authoritative, wandb only mirrors it
    checkpoint/     to resume from
    error.txt       why the last attempt failed
    model/          the fine-tuned model
    record.json     written last: a run without one neither finished nor diverged
results/records/<task>-<model>-<optimizer>-<hash>.json    a copy, small enough to commit
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import yaml

from experiments import atomic
from experiments.config import RunConfig
from experiments.errors import ExperimentError
from experiments.runs import reading
from experiments.runs.identity import run_hash

_LOCK_PATIENCE_S = 1.0  # `experiments.status` holds a lock for an instant to see if it is free


class RunFolder:
    """One run's folder; everything in it is written through this class or `checkpoints`."""

    def __init__(self, config: RunConfig) -> None:
        self.hash = run_hash(config)
        names = (config.task.name, config.model.name, config.optimizer.name, self.hash)
        results = Path(config.results_dir)
        self.name = "-".join(names)
        self.path = results.joinpath("runs", *names)
        self.checkpoints = self.path / "checkpoint"
        self.model = self.path / "model"
        self._metrics = self.path / "metrics.jsonl"
        self._record = self.path / "record.json"
        self._error = self.path / "error.txt"
        self._committed_record = results / "records" / f"{self.name}.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other process out of this run while the block runs.

        Raises:
            ExperimentError: another process, which is named, has the run; or the folder is not
                writable.
        """
        lock = self.path.with_suffix(".lock")
        with atomic.explained(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            lock.touch()
        with lock.open("a+", encoding="utf-8") as file:
            give_up_at = time.monotonic() + _LOCK_PATIENCE_S
            while not _take_lock(file):
                if time.monotonic() > give_up_at:
                    file.seek(0)
                    raise ExperimentError(
                        f"{self.path} is being run by {file.read().strip() or 'another process'}; "
                        "wait for it, or change a value such as seed to make it another run"
                    )
                time.sleep(0.05)
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {platform.node()} since {since}\n")
            file.flush()
            yield

    @contextmanager
    def error_kept(self) -> Iterator[None]:
        """Saves the exception that ends the block, if any, for `experiments.status`."""
        self._error.unlink(missing_ok=True)
        try:
            yield
        except Exception as error:
            with suppress(ExperimentError):  # a full disk must not hide the error
                atomic.write_text(self._error, f"{type(error).__name__}: {error}\n")
            raise

    def finished_record(self) -> dict[str, Any] | None:
        """The record, or None if the run is not finished."""
        return reading.read_record(self._record)

    def was_interrupted_since(self, moment: datetime) -> bool:
        """Whether it was started after ``moment`` and has not finished."""
        started = self.path / "config.yaml"
        is_since = started.exists() and started.stat().st_mtime >= moment.timestamp()
        return is_since and not self._record.exists()

    def set_aside(self) -> Path:
        """Renames the folder, so that the run starts over and nothing is lost."""
        kept = self.path.with_name(f"{self.path.name}.{time.strftime('%Y-%m-%d_%H-%M-%S')}")
        self.path.rename(kept)
        return kept

    @property
    def attempt(self) -> str:
        """An id distinct from earlier runs of this config, which `set_aside` has kept."""
        num_kept = len(list(self.path.parent.glob(f"{self.hash}.*_*")))
        return f"{self.hash}-{num_kept}" if num_kept else self.hash

    def start(self, config: RunConfig) -> None:
        """Writes the config; harmless if the run is being resumed."""
        for left_over in self.path.glob(f".{self.model.name}.*.partial"):  # by a killed process
            shutil.rmtree(left_over, ignore_errors=True)
        text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
        atomic.write_text(self.path / "config.yaml", text)

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        with atomic.explained(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def sync_metrics(self) -> None:
        """Returns once everything appended is on disk."""
        with atomic.explained(self._metrics), self._metrics.open("rb") as file:
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl; a kill may have cut the last one short."""
        return reading.read_lines(self._metrics)

    def rewind_metrics(self, step: int) -> None:
        """Drops what a run resumed after ``step`` repeats: later steps, and evaluations from it on.

        The evaluation of the untrained model is not repeated.
        """
        kept = [
            m
            for m in self.metrics()
            if m["step"] < max(step, 1) or (m["step"] == step and "train/loss" in m)
        ]
        atomic.write_text(self._metrics, "".join(json.dumps(m) + "\n" for m in kept))

    def finish(self, record: dict[str, Any]) -> None:
        """Writes the record; from here on the run counts as finished."""
        atomic.write_text(self._committed_record, _to_json(record))
        atomic.write_text(self._record, _to_json(record))

    def restore_copy(self, record: dict[str, Any]) -> None:
        """Restores the copy of a finished run's record that tables are made from."""
        if not self._committed_record.exists():
            atomic.write_text(self._committed_record, _to_json(record))


def _take_lock(file: IO[str]) -> bool:
    """Whether the lock was free; if so, it is ours until the file is closed."""
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _to_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, allow_nan=False) + "\n"
