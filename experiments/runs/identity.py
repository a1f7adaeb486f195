"""What makes two runs the same: the hash of their configs, which names a run's folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

from experiments.config import RunConfig

# What may differ without making it another run: where it is kept, how it is monitored.
_NOT_PART_OF_THE_RUN = ("dry_run", "force", "logger", "learning_rates")
_PLACES = ("results_dir", "root")  # at any depth
# Keys, at any depth, that came when there were records already, whose hashes must stay.
_HASHED_IF_SET = ("revision",)


def without_places(config: RunConfig) -> dict[str, Any]:
    """The config as plain values, without the keys that say where data and results are."""
    return _filtered(dataclasses.asdict(config), lambda name, _: name not in _PLACES)


def _filtered(values: dict[str, Any], keeps: Callable[[str, Any], bool]) -> dict[str, Any]:
    """The entries that ``keeps(name, value)`` is true for, at any depth."""
    return {
        name: _filtered(value, keeps) if isinstance(value, dict) else value
        for name, value in values.items()
        if keeps(name, value)
    }


def run_hash(config: RunConfig) -> str:
    """Ten hex digits that name a run: equal for equal configs, so equal configs share a folder."""
    values = _filtered(
        without_places(config), lambda name, value: name not in _HASHED_IF_SET or value is not None
    )
    for name in _NOT_PART_OF_THE_RUN:
        del values[name]
    del values["evaluation"]["every_steps"]
    # Data below root differs from the hub's or generated data; root's location does not matter.
    values["dataset"]["is_local"] = config.dataset.local_folder() is not None
    for name, task in config.evaluation.harness.items():
        described = values["evaluation"]["harness"][name]["dataset"]
        described["is_local"] = task.dataset.local_folder() is not None
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
