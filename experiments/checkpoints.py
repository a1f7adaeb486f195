"""Checkpoints of a run: written whole or not at all, the last two kept, refused when damaged."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from experiments import atomic
from experiments.errors import ExperimentError

_NUM_KEPT = 2


def save(folder: Path, step: int, payload: dict[str, Any]) -> None:
    """Writes the checkpoint of ``step``, then removes all but the newest two."""
    with atomic.new_file(folder / f"step-{step:08d}.pt") as partial:
        torch.save(payload, partial)
    for old in _newest_first(folder)[_NUM_KEPT:]:
        old.unlink()


def load_newest(folder: Path, config_hash: str, data_source: str) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None where there is none yet.

    Raises:
        ExperimentError: all are damaged, or the newest belongs to another config or data source.
    """
    paths = _newest_first(folder)
    for path in paths:
        payload = _read(path)
        if payload is None:
            print(f"checkpoint: {path} is damaged or cut short, trying the one before it")
            continue
        for name, expected in (("config_hash", config_hash), ("data_source", data_source)):
            if payload[name] != expected:
                raise ExperimentError(
                    f"{path}: its {name} is {payload[name]}, this run's is {expected}; use "
                    "force=true to start anew (the folder is kept under another name)"
                )
        return payload
    if paths:
        raise ExperimentError(
            f"{folder}: no checkpoint in it can be read; use force=true to start anew (the folder "
            "is kept under another name)"
        )
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        payload: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        return None
    return payload


def remove_all(folder: Path) -> None:
    """Removes the checkpoints of a finished run."""
    for path in _newest_first(folder):
        path.unlink()
