"""Checkpoints of a run: written atomically, the last two kept, rejected if damaged.

A single process or DDP writes one file: ``step-00000025.pt``, a zip archive (`torch.save`) with a
CRC-32 of each tensor. FSDP2 writes a folder ``step-00000025`` through torch.distributed.checkpoint,
where each rank writes its own shards, and a ``manifest.json`` with the SHA-256 of each file; any
number of processes can load it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.nn import Module
from torch.optim import Optimizer

from experiments import atomic, distributed
from experiments.errors import ExperimentError
from microadam import MicroAdam
from microadam.distributed import template

_NUM_KEPT = 2
_MANIFEST = "manifest.json"
_PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds besides the model and optimizer; can be written as JSON."""

    config_hash: str
    data_source: str
    data_digest: str
    precision: str
    step: int
    totals: dict[str, Any]
    schedule: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    progress: Progress

    def restore(self, model: Module, optimizer: Optimizer) -> None:
        """Loads both; optimizer state that was sharded differently is converted."""
        if self.path.is_dir():
            _load_shards(self.path, model, optimizer)
            return
        saved = _read(self.path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])


def save(
    folder: Path, progress: Progress, model: Module, optimizer: Optimizer, is_sharded: bool
) -> None:
    """Writes a checkpoint, then removes all but the newest two; call it on all ranks.

    Raises:
        ExperimentError: the disk is full; earlier checkpoints are kept.
    """
    path = folder / f"step-{progress.step:08d}"
    if is_sharded:
        with atomic.explained(path):
            _save_shards(path, progress, model, optimizer)
    elif distributed.rank() == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        with atomic.new_file(path.with_suffix(".pt")) as partial, partial.open("wb") as file:
            torch.save({**asdict(progress), **state}, file)
    if distributed.rank() == 0:
        for old in _newest_first(folder)[_NUM_KEPT:]:
            _remove(old)
    distributed.barrier()


def newest(folder: Path, identity: Mapping[str, str]) -> Checkpoint | None:
    """The newest checkpoint whose checksums match, or None if there is none yet.

    Args:
        identity: fields of `Progress`, by name, that must match for a checkpoint to be this run's.

    Raises:
        ExperimentError: all are damaged, or the newest belongs to another run or lacks a field.
    """
    for partial in folder.glob(".step-*.partial"):
        _remove(partial)  # left by a process that was killed
    paths = _newest_first(folder)
    for path in paths:
        progress = _checked(path)
        if progress is None:
            print(f"checkpoint: {path} is damaged or cut short; trying the previous one")
            continue
        for name, expected in identity.items():
            found = getattr(progress, name)
            if found != expected:
                raise ExperimentError(
                    f"{path}: its {name} is {found}, this run's is {expected}; use force=true to "
                    "start over (the folder is kept under another name), or another results_dir"
                )
        return Checkpoint(path, progress)
    if paths:
        raise ExperimentError(
            f"{folder}: no checkpoint in it can be read; use force=true to start over (the folder "
            "is kept under another name)"
        )
    return None


def remove_all(folder: Path) -> None:
    """Removes the checkpoints of a finished run."""
    for path in _newest_first(folder):
        _remove(path)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _read(path: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return saved


def _checked(path: Path) -> Progress | None:
    """None if anything differs from what was written."""
    if path.is_dir():
        return _checked_shards(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
    except (zipfile.BadZipFile, EOFError):
        return None
    return _progress(path, _read(path))


def _progress(path: Path, saved: Mapping[str, Any]) -> Progress:
    names = [field.name for field in fields(Progress)]
    missing = [name for name in names if name not in saved]
    if missing:
        raise ExperimentError(
            f"{path}: it does not say its {' and '.join(missing)}, as an earlier version wrote it; "
            "finish the run with that version, or use force=true to start over (the folder is kept "
            "under another name)"
        )
    return Progress(**{name: saved[name] for name in names})


def _save_shards(path: Path, progress: Progress, model: Module, optimizer: Optimizer) -> None:
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    partial = path.with_name(f".{path.name}.partial")
    if distributed.rank() == 0:
        partial.mkdir(parents=True)
    distributed.barrier()
    try:
        save_shards(
            state,
            storage_writer=FileSystemWriter(partial),
            process_group=distributed.patient_group(),
        )
    except CheckpointException as error:
        if distributed.rank() == 0:
            shutil.rmtree(partial)
        reason, _ = next(iter(error.failures.values()))
        raise ExperimentError(
            f"{path}: could not be written ({reason}); the previous checkpoint is still there"
        ) from error
    own = [file for file in partial.iterdir() if file.name.startswith(f"__{distributed.rank()}_")]
    if distributed.rank() == 0:
        atomic.write_text(partial / _PROGRESS, json.dumps(asdict(progress), indent=2) + "\n")
        own += [partial / ".metadata", partial / _PROGRESS]
    digests = distributed.from_all({file.name: _digest(file) for file in own})
    if distributed.rank() == 0:
        files = {name: digest for of_rank in digests for name, digest in of_rank.items()}
        atomic.write_text(partial / _MANIFEST, json.dumps(files, indent=2) + "\n")
        if path.exists():
            shutil.rmtree(path)  # a damaged one, which the run did not start from
        atomic.rename(partial, path)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _checked_shards(path: Path) -> Progress | None:
    try:
        files = json.loads((path / _MANIFEST).read_bytes())
        if any(_digest(path / name) != digest for name, digest in files.items()):
            return None
    except (FileNotFoundError, ValueError):  # a file is missing, or the manifest is not JSON
        return None
    return _progress(path, json.loads((path / _PROGRESS).read_bytes()))


def _load_shards(path: Path, model: Module, optimizer: Optimizer) -> None:
    reader = FileSystemReader(path)
    wanted: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    if isinstance(optimizer, MicroAdam):
        wanted["state"] = template(dict(model.named_parameters()), reader.read_metadata())
    weights = get_model_state_dict(model)
    load_shards(
        {"model": weights, "optimizer": wanted},
        storage_reader=reader,
        process_group=distributed.patient_group(),
    )
    set_model_state_dict(model, weights)
    set_optimizer_state_dict(model, optimizer, wanted)
