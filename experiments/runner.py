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
    distributed,
    hardware,
    models,
    optimizers,
    planning,
    summary,
    tasks,
    training,
)
from experiments.config import RunConfig
from experiments.errors import require
from experiments.hardware import Hardware
from experiments.models import activations
from experiments.parallel import Parallel
from experiments.report import formats
from experiments.runs import checkpoints, interruption
from experiments.runs.checkpoints import Checkpoint
from experiments.runs.folder import RunFolder
from experiments.runs.identity import without_places
from experiments.runs.interruption import Interruption
from experiments.runs.mirror import Mirror
from experiments.runs.provenance import provenance

_MAX_CURVE_POINTS = 200


def execute(config: RunConfig, overrides: Sequence[str] = ()) -> Path:
    """Starts or resumes the run of ``config``, or reports that it is finished.

    Args:
        overrides: the run.py overrides that compose ``config``, for the record.

    Returns:
        The folder of the run.

    Raises:
        ExperimentError: something the user can fix; earlier results are kept.
        SystemExit: a signal asked the run to stop; its exit code is `interruption.EXIT_CODE`.
    """
    models.quieten_transformers()
    run = RunFolder(config)
    if config.dry_run:
        if distributed.rank() == 0:
            print(summary.plan_summary(config, planning.make(config)))
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
        print(summary.record_summary(record, run.path))
    return run.path


def _earlier_record(config: RunConfig, run: RunFolder) -> dict[str, Any] | None:
    """The record of a finished run, unless it is to be run again."""
    resumes = interruption.is_restart() and run.finished_record() is None
    if config.force and run.path.exists() and not resumes:
        print(f"force=true: the old folder is kept as {run.set_aside()}")
    record = run.finished_record()
    if record is not None:
        of_run = record["hardware"]
        how = f"on {of_run['gpu'] or of_run['cpu']} in {of_run['precision']}"
        print(f"already {record['status']} {how}; force=true runs it again\n")
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
    # Taken now: the checkout may have moved on by the time the run ends.
    origin = {"command": _command(overrides), **provenance()}
    is_first = distributed.rank() == 0
    torch.manual_seed(config.seed)
    chosen_task = tasks.chosen(config)
    optimizers.check(config.optimizer)
    if is_first:
        run.start(config)
        print(f"loading {config.dataset.name} and {config.model.title}", flush=True)
    task = chosen_task(config, machine)
    found = distributed.from_all((task.data_source, task.num_examples, task.data_digest))
    remedy = (
        f"the processes found different data ({found}); set dataset.source to one particular "
        "source, and give every process the same files"
    )
    require(len(set(found)) == 1, "dataset.source", config.dataset.source, remedy)
    _require_room(task.model, config, machine)
    if config.hardware.activation_checkpointing:
        activations.enable_checkpointing(task.model, config.hardware)
    parallel = Parallel(task, config, machine)
    optimizer = optimizers.build(task.model, config.optimizer)
    identity = {
        "config_hash": run.hash,
        "data_source": task.data_source,
        "data_digest": task.data_digest,
        "precision": machine.precision,
    }
    checkpoint = distributed.from_rank_0(lambda: checkpoints.newest(run.checkpoints, identity))
    began = started - _kept_s(run, checkpoint)
    setup = training.Setup(config, machine, task, parallel, optimizer, identity, began)
    print(summary.start_summary(config, task, machine, run.path, checkpoint))

    if is_first:
        run.rewind_metrics(0 if checkpoint is None else checkpoint.progress.step)
    mirror = Mirror(run, config) if is_first and config.logger.name == "wandb" else None

    def log(metrics: dict[str, Any]) -> None:
        if is_first:
            run.append_metrics(metrics)
        if mirror is not None:
            mirror.log(metrics)

    with mirror or nullcontext():
        record = _train_and_evaluate(setup, run, checkpoint, log, signals, origin)
        if config.training.save_model and record["status"] == "finished":
            with parallel.whole_model():
                if is_first:
                    task.save(run.model)
        if is_first:
            run.finish(record)
            checkpoints.remove_all(run.checkpoints)
        if mirror is not None:
            mirror.summarize(record)
    return record


def _require_room(model: torch.nn.Module, config: RunConfig, machine: Hardware) -> None:
    """Rejects what the GPU has no room for even without activations.

    Otherwise its memory would run out in the first step, after the model's first evaluation.
    """
    available = machine.total_bytes()
    if available is None or config.hardware.parallel == "fsdp2":
        return
    weight_bytes = sum(p.nbytes for p in model.parameters())
    needed = weight_bytes + config.optimizer.state_bytes(model)
    if not config.training.gradient_release:
        needed += weight_bytes
    require(
        needed <= available,
        "optimizer",
        config.optimizer.name,
        f"weights, gradients and state of {config.model.title} take {formats.size(needed)}, more "
        f"than the GPU's {formats.size(available)}; choose another optimizer or model, or several "
        "GPUs with hardware.parallel=fsdp2",
    )


def _train_and_evaluate(
    setup: training.Setup,
    run: RunFolder,
    checkpoint: Checkpoint | None,
    log: Callable[[dict[str, Any]], None],
    signals: Interruption,
    origin: dict[str, Any],
) -> dict[str, Any]:
    """The run from its first evaluation to its record, of which ``origin`` is a part."""
    config, task = setup.config, setup.task
    before = _evaluation_before(setup, run, log)
    num_steps, totals = training.train(setup, run, checkpoint, log, signals)
    lines = distributed.from_rank_0(run.metrics)
    losses = [m["train/loss"] for m in lines if "train/loss" in m]
    has_diverged = not math.isfinite(losses[-1])
    after = {} if has_diverged else setup.evaluate()
    if not has_diverged and "eval/loss" not in after:  # the last update broke the weights
        has_diverged, after = True, {}
    if after:
        log({"step": num_steps, **after})
    finite_losses = [loss for loss in losses if math.isfinite(loss)]
    state_bytes = optimizers.measured_state_bytes(setup.optimizer)
    return {
        "status": "diverged" if has_diverged else "finished",
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "run": run.hash,
        **origin,
        "task": config.task.name,
        "model": config.model.title,
        "optimizer": config.optimizer.name,
        "scale": config.scale,
        "seed": config.seed,
        "data_source": task.data_source,
        "data_digest": task.data_digest,
        "data_revision": task.data_revision,
        "data_loader": task.data_loader,
        "model_source": task.model_source,
        "model_revision": task.model_revision,
        "num_params": sum(p.numel() for p in task.model.parameters()),
        "num_examples": task.num_examples,
        "num_overlong_examples": task.num_overlong_examples,
        "num_steps": num_steps,
        "num_units": totals.num_units,
        "unit": task.unit,
        "peak_memory_of": totals.peak_memory_of,
        "metrics": {
            **_loss_metrics(finite_losses),
            **{f"eval_before/{name}": value for name, value in _evaluated(before).items()},
            **{f"eval/{name}": value for name, value in _evaluated(after).items()},
            "memory/state_bytes": setup.parallel.whole_bytes(state_bytes),
            "memory/peak_bytes": totals.peak_bytes,
            "time/training_s": totals.training_s,
            "time/optimizer_s": totals.optimizer_s,
            "time/checkpoint_s": totals.checkpoint_s,
            "time/evaluation_s": sum(
                (m.get("time/evaluation_s", 0.0) for m in (before, after)), totals.evaluation_s
            ),
            "time/wall_s": setup.wall_s,
        },
        "curve": _curve(finite_losses),
        "evaluations": [
            {"step": m["step"], **_evaluated(m)}
            for m in lines
            if m["step"] > 0 and "time/evaluation_s" in m
        ],
        "hardware": setup.hardware.describe(),
        "config": without_places(config),
    }


def _kept_s(run: RunFolder, checkpoint: Checkpoint | None) -> float:
    """Seconds spent by earlier processes on work that this one need not repeat."""
    if checkpoint is not None:
        return checkpoint.progress.totals["wall_s"]
    return _logged_before(run).get("time/evaluation_s", 0.0)


def _logged_before(run: RunFolder) -> dict[str, Any]:
    """What an earlier process logged for the untrained model; empty if there was none."""
    first = distributed.from_rank_0(lambda: run.metrics()[:1])
    return first[0] if first and first[0]["step"] == 0 else {}


def _evaluation_before(
    setup: training.Setup, run: RunFolder, log: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """What is logged for the untrained model; a resumed run finds it in its own log."""
    if not setup.config.evaluation.before_training:
        return {}
    logged = _logged_before(run)
    if not logged:
        logged = {"step": 0, **setup.evaluate()}
        log(logged)
    return logged


def _evaluated(logged: dict[str, Any]) -> dict[str, Any]:
    """The task's metrics in a logged line, by the task's names."""
    return {
        name.removeprefix("eval/"): value
        for name, value in logged.items()
        if name.startswith("eval/")
    }


def _loss_metrics(losses: list[float]) -> dict[str, Any]:
    """First, last, and the mean over the last tenth of steps, which no single batch dominates."""
    if not losses:
        return {}
    num_last = max(1, len(losses) // 10)
    return {
        "train/first_loss": losses[0],
        "train/last_loss": losses[-1],
        "train/final_loss": statistics.fmean(losses[-num_last:]),
    }


def _curve(losses: list[float]) -> dict[str, list[float]]:
    """At most 200 points of the training loss: means over equal spans of steps, at their ends."""
    interval = max(1, math.ceil(len(losses) / _MAX_CURVE_POINTS))
    groups = [losses[start : start + interval] for start in range(0, len(losses), interval)]
    steps = itertools.accumulate(len(group) for group in groups)
    return {
        "step": list(steps),
        "train/loss": [float(f"{statistics.fmean(group):.5g}") for group in groups],
    }


def _command(overrides: Sequence[str]) -> str:
    """The command that repeats this run anywhere; for a sweep, just this job."""
    not_its_own = ("results_dir=", "dataset.root=", "force=", "logger=", "logger.")
    return shlex.join(
        ["python", "run.py", *(o for o in overrides if not o.startswith(not_its_own))]
    )
