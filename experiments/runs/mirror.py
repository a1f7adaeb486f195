"""Weights & Biases, which shows what a run logs; the run's folder stays the truth."""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.config import RunConfig
from experiments.errors import ExperimentError
from experiments.runs.folder import RunFolder


class Mirror:
    """Sends metrics to Weights & Biases while its block runs, then whether the block succeeded."""

    def __init__(self, run: RunFolder, config: RunConfig) -> None:
        import wandb

        try:
            self._wandb_run = wandb.init(
                project=config.logger.project,
                mode="offline" if config.logger.mode == "offline" else "online",
                id=run.attempt,
                name=run.name,
                resume="allow",
                dir=run.path,
                config=dataclasses.asdict(config),
            )
        except wandb.errors.Error as error:
            reason = str(error).rstrip(".")
            raise ExperimentError(f"logger=wandb: {reason}; or set logger.mode=offline") from error

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._wandb_run.finish(exit_code=0 if kind is None else 1)

    def log(self, metrics: dict[str, Any]) -> None:
        self._wandb_run.log(metrics, step=metrics["step"])

    def summarize(self, record: dict[str, Any]) -> None:
        """Sets what a table of runs shows for this one."""
        self._wandb_run.summary.update({"status": record["status"], **record["metrics"]})
