"""Executes one run: plan or train, evaluate before and after, write the record, say how it went."""

from __future__ import annotations

import itertools
import math
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from experiments import (
    activations,
    checkpoints,
    distributed,
    hardware,
    interruption,
    models,
    optimizers,
    planning,
    summary,
    tasks,
    training,
)
from experiments.config import RunConfig, without_places
from experiments.distributed import Parallel
from experiments.errors import require
from experiments.hardware import Hardware
from experiments.interruption import Interruption
from experiments.records import Mirror, RunFolder, provenance

_MAX_CURVE_POINTS = 200


def execute(config: RunConfig, overrides: Sequence[str] = ()) -> Path:
    """Runs ``config``, goes on with it, or says that it is finished.

    Args:
        overrides: of run.py that compose ``config``, for the record.

    Returns:
        The folder of the run.

    Raises:
        ExperimentError: something the user can mend; what was there before is kept.
        SystemExit: a signal asked the run to stop; its exit code is `interruption.EXIT_CODE`.
    """
    models.quieten_transformers()
    run = RunFolder(config)
    if config.dry_run:
        if distributed.rank() == 0:
            print(summary.of_plan(config, planning.make(config)))
        return run.path
    machine = hardware.resolve(config.hardware)
    with (
        interruption.handled() as signals,
        distributed.started(config, machine),
        run.locked() if distributed.rank() == 0 else nullcontext(),
    ):
        record = distributed.from_rank_0(lambda: _earlier_record(config, run))
        if record is None:
            with run.error_kept() if distributed.rank() == 0 else nullcontext():
                record = _run(config, overrides, run, machine, signals)
        print(summary.of_record(record, run.path))
    return run.path


def _earlier_record(config: RunConfig, run: RunFolder) -> dict[str, Any] | None:
    """The record of a finished run, unless it is to run again."""
    goes_on = interruption.is_restart() and run.finished_record() is None
    if config.force and run.path.exists() and not goes_on:
        print(f"force=true: what was there is kept as {run.set_aside()}")
    record = run.finished_record()
    if record is not None:
        print(f"already {record['status']}; force=true runs it again\n")
        run.restore_copy(record)
    return record


def _run(
    config: RunConfig,
    overrides: Sequence[str],
    run: RunFolder,
    machine: Hardware,
    signals: Interruption,
) -> dict[str, Any]:
    started = time.perf_counter()
    code = provenance()  # now: the checkout may have moved on when the run ends
    is_first = distributed.rank() == 0
    machine.forget_peak()
    torch.manual_seed(config.seed)
    chosen_task = tasks.chosen(config)
    optimizers.check(config.optimizer)
    if is_first:
        run.start(config)
        print(f"loading {config.dataset.name} and {config.model.title}", flush=True)
    task = chosen_task(config, machine)
    found = distributed.from_all((task.data_source, task.num_examples))
    remedy = (
        f"the processes found different data ({found}); set dataset.source to one of the sources"
    )
    require(len(set(found)) == 1, "dataset.source", config.dataset.source, remedy)
    if config.hardware.activation_checkpointing:
        activations.enable_checkpointing(task.model, config.hardware)
    parallel = Parallel(task, config, machine)
    optimizer = optimizers.build(task.model, config.optimizer)
    setup = training.Setup(config, machine, task, parallel, optimizer)
    checkpoint = distributed.from_rank_0(
        lambda: checkpoints.newest(run.checkpoints, run.hash, task.data_source)
    )
    print(summary.of_start(config, task, machine, run.path, checkpoint))

    if is_first:
        run.rewind_metrics(0 if checkpoint is None else checkpoint.progress.step)
    mirror = Mirror(run, config) if is_first and config.logger.name == "wandb" else None

    def log(metrics: dict[str, Any]) -> None:
        if is_first:
            run.append_metrics(metrics)
        if mirror is not None:
            mirror.log(metrics)

    try:
        before = _evaluation_before(setup, run, log)
        totals = training.train(setup, run, checkpoint, log, signals)
        losses = distributed.from_rank_0(
            lambda: [m["train/loss"] for m in run.metrics() if "train/loss" in m]
        )
        has_diverged = not math.isfinite(losses[-1])
        after, evaluation_s = ({}, 0.0) if has_diverged else _evaluate(setup)
        if after and not math.isfinite(after["loss"]):  # the last update broke the weights
            has_diverged, after = True, {}
        if after:
            log({"step": len(losses), **_prefixed("eval", after)})
    finally:
        if mirror is not None:
            mirror.close()

    finite_losses = [loss for loss in losses if math.isfinite(loss)]
    earlier_s = 0.0 if checkpoint is None else checkpoint.progress.totals["training_s"]
    num_params = sum(p.numel() for p in task.model.parameters())
    record = {
        "status": "diverged" if has_diverged else "finished",
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "run": run.hash,
        "command": _command(overrides),
        "task": config.task.name,
        "model": config.model.title,
        "optimizer": config.optimizer.name,
        "scale": config.scale,
        "seed": config.seed,
        "data_source": task.data_source,
        "data_revision": task.data_revision,
        "data_loader": task.data_loader,
        "model_source": task.model_source,
        "model_revision": task.model_revision,
        "num_params": num_params,
        "num_examples": task.num_examples,
        "num_overlong_examples": task.num_overlong_examples,
        "num_steps": len(losses),
        "num_units": totals.num_units,
        "unit": task.unit,
        "metrics": {
            **_loss_metrics(finite_losses),
            **_prefixed("eval_before", before),
            **_prefixed("eval", after),
            "memory/state_bytes": parallel.whole_bytes(optimizers.measured_state_bytes(optimizer)),
            "memory/peak_bytes": machine.peak_bytes(),
            "time/training_s": totals.training_s,
            "time/optimizer_s": totals.optimizer_s,
            "time/checkpoint_s": totals.checkpoint_s,
            "time/evaluation_s": evaluation_s,
            "time/wall_s": time.perf_counter() - started + earlier_s,
        },
        "curve": _curve(finite_losses),
        "hardware": machine.describe(),
        **code,
        "config": without_places(config),
    }
    if config.training.save_model and not has_diverged:
        with parallel.whole_model():
            if is_first:
                task.save(run.model)
    if is_first:
        run.finish(record)
        checkpoints.remove_all(run.checkpoints)
    return record


def _evaluation_before(
    setup: training.Setup, run: RunFolder, log: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The metrics of the untrained model; a run that goes on finds them in its own log."""
    if not setup.config.evaluation.before_training:
        return {}
    for logged in distributed.from_rank_0(lambda: run.metrics()[:1]):
        if logged["step"] == 0:
            return {k.removeprefix("eval/"): v for k, v in logged.items() if k != "step"}
    before, _ = _evaluate(setup)
    log({"step": 0, **_prefixed("eval", before)})
    return before


def _evaluate(setup: training.Setup) -> tuple[dict[str, Any], float]:
    """Metrics and seconds."""
    started = time.perf_counter()
    with setup.parallel.whole_model():
        metrics = distributed.from_rank_0(setup.task.evaluate)
    return metrics, time.perf_counter() - started


def _loss_metrics(losses: list[float]) -> dict[str, Any]:
    """First, last, and the mean of the last tenth of the steps, which no single batch decides."""
    if not losses:
        return {}
    num_last = max(1, len(losses) // 10)
    return {
        "train/first_loss": losses[0],
        "train/last_loss": losses[-1],
        "train/final_loss": statistics.fmean(losses[-num_last:]),
    }


def _curve(losses: list[float]) -> dict[str, list[float]]:
    """At most 200 points of the training loss: means of equally many steps, at the last of them."""
    interval = max(1, math.ceil(len(losses) / _MAX_CURVE_POINTS))
    groups = [losses[start : start + interval] for start in range(0, len(losses), interval)]
    steps = itertools.accumulate(len(group) for group in groups)
    return {
        "step": list(steps),
        "train/loss": [float(f"{statistics.fmean(group):.5g}") for group in groups],
    }


def _prefixed(prefix: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """Without those that are not finite, which JSON has not."""
    is_finite = {name: not isinstance(v, float) or math.isfinite(v) for name, v in metrics.items()}
    return {f"{prefix}/{name}": value for name, value in metrics.items() if is_finite[name]}


def _command(overrides: Sequence[str]) -> str:
    """What repeats this run anywhere: of a sweep, the one job."""
    not_its_own = ("results_dir=", "dataset.root=", "force=", "logger=", "logger.")
    return shlex.join(
        ["python", "run.py", *(o for o in overrides if not o.startswith(not_its_own))]
    )
