"""Stops runs at a chosen moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.config import RunConfig
from experiments.runner import execute
from experiments.runs.folder import RunFolder


def at_step(step: int, monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Does something as soon as a step is logged."""
    append_metrics = RunFolder.append_metrics

    def append_and_act(self: RunFolder, metrics: dict[str, Any]) -> None:
        append_metrics(self, metrics)
        if metrics["step"] == step:
            action()

    monkeypatch.setattr(RunFolder, "append_metrics", append_and_act)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends the run with a Ctrl-C that nothing handles, as soon as a step is logged."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    at_step(step, monkeypatch, interrupt)


def stopped_at_the_end(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints of a run that stopped at its last step, newest first."""

    def no_space(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", no_space)
        with pytest.raises(OSError, match="no space left"):
            execute(config)
    return sorted(RunFolder(config).checkpoints.glob("*.pt"), reverse=True)
