"""Every task, as a whole run at smoke scale. Every optimizer: test_optimizers.py."""

from __future__ import annotations

import pytest

from experiments.runner import execute
from experiments.runs.folder import RunFolder
from tests.experiments.helpers import ROOT, Compose

SHORT = ("scale=smoke", "hardware=cpu", "training.max_steps=2", "evaluation.limit=2")


def _names(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))


@pytest.mark.parametrize("task", _names("task"))
def test_every_task_runs(composed: Compose, task: str) -> None:
    config = composed(*SHORT, f"task={task}")
    execute(config)
    record = RunFolder(config).finished_record()
    assert record is not None
    assert (record["status"], record["num_steps"]) == ("finished", 2)
    assert record["metrics"]["eval/loss"] > 0
