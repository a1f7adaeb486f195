"""The only training loop: accumulate, clip, step, time, log, checkpoint, resume."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import get_scheduler

from experiments import distributed
from experiments.config import RunConfig
from experiments.data.order import DataOrder, num_steps
from experiments.diagnosis import of_gradients
from experiments.gradient_release import ReleasedStep
from experiments.hardware import Hardware
from experiments.parallel import Parallel
from experiments.progress_bars import progress_bar
from experiments.runs import checkpoints
from experiments.runs.checkpoints import Checkpoint
from experiments.runs.folder import RunFolder
from experiments.runs.interruption import Interruption
from experiments.runs.reading import headline, number
from experiments.tasks import Task
from microadam.distributed import is_sharded

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Setup:
    """What a run consists of, unchanged from its first step to its last."""

    config: RunConfig
    hardware: Hardware
    task: Task
    parallel: Parallel  # wraps the task's model
    optimizer: torch.optim.Optimizer
    identity: dict[str, str]  # what a checkpoint must share with the run, see `checkpoints.newest`
    began: float  # time.perf_counter() at the start, as if one process had run it all

    @property
    def wall_s(self) -> float:
        """Seconds the run has taken so far, excluding work repeated after interruptions."""
        return time.perf_counter() - self.began

    def evaluate(self) -> dict[str, Any]:
        """`Task.logged_evaluation` of the model as it is now; call it on all ranks."""
        with self.parallel.whole_model():
            return distributed.from_rank_0(self.task.logged_evaluation)


@dataclass
class Totals:
    """Sums over all steps, carried through checkpoints."""

    training_s: float = 0.0
    optimizer_s: float = 0.0
    evaluation_s: float = 0.0  # between the steps
    checkpoint_s: float = 0.0
    wall_s: float = 0.0  # of the whole run
    num_units: int = 0
    peak_bytes: int = 0  # the most memory held
    peak_memory_of: str = "training"  # or process: some systems cannot tell the two apart


def train(
    setup: Setup,
    run: RunFolder,
    checkpoint: Checkpoint | None,
    log: Callable[[dict[str, Any]], None],
    interruption: Interruption,
) -> tuple[int, Totals]:
    """Trains to the last step, starting from ``checkpoint`` if there is one.

    A non-finite loss ends the training; it is then the last in the run's metrics.

    Returns:
        How many steps the run took, and their totals.

    Raises:
        KeyboardInterrupt, SystemExit: a signal came; the last full step has a checkpoint.
    """
    config, task, optimizer = setup.config, setup.task, setup.optimizer
    training = config.training
    rank, world_size = distributed.rank(), distributed.world_size()
    last_step = num_steps(training, task.num_examples)
    order = DataOrder(training, task.num_examples, config.seed, rank, world_size)
    schedule = get_scheduler(
        _SCHEDULES[training.schedule], optimizer, training.warmup_steps, last_step
    )
    totals = Totals()
    num_done = 0
    if checkpoint is not None:
        num_done = checkpoint.progress.step
        totals = Totals(**checkpoint.progress.totals)
        checkpoint.restore(task.model, optimizer)
        schedule.load_state_dict(checkpoint.progress.schedule)

    def save_checkpoint(step: int) -> None:
        started = time.perf_counter()
        totals.wall_s = setup.wall_s
        if rank == 0:
            run.sync_metrics()  # no checkpoint may be ahead of the metrics
        progress = checkpoints.Progress(
            **setup.identity,
            step=step,
            totals=dataclasses.asdict(totals),
            schedule=schedule.state_dict(),
        )
        is_fsdp2 = config.hardware.parallel == "fsdp2"
        checkpoints.save(run.checkpoints, progress, task.model, optimizer, is_sharded=is_fsdp2)
        totals.checkpoint_s += time.perf_counter() - started

    release = None
    if training.gradient_release:
        release = ReleasedStep(task.model, optimizer, training, setup.hardware)  # type: ignore[arg-type]
    task.model.train()
    if not setup.hardware.forget_peak():
        totals.peak_memory_of = "process"
    bar = progress_bar("train", last_step, "step", initial=num_done, disable=rank > 0)
    with release or nullcontext(), bar, interruption.deferred():
        batches_of_steps = task.steps(order, num_done, last_step)
        for step in range(num_done, last_step):
            if _is_evaluated(config, step):  # a checkpoint was written
                with interruption.at_once():
                    log({"step": step, "num_steps": last_step, **_evaluate(setup, step, totals)})
            # A step's randomness depends on these alone, so checkpoints need no generator state.
            torch.manual_seed(((config.seed * 1_000_003 + step) * 1_009 + rank) % 2**63)
            metrics = _step(setup, release, batches_of_steps, totals)
            schedule.step()
            num_done = step + 1
            metrics |= {"step": num_done, "num_steps": last_step}
            log(metrics)
            if not math.isfinite(metrics["train/loss"]):
                if rank == 0:
                    tqdm.write(
                        f"diverged: the loss became {metrics['train/loss']} at step {num_done} "
                        f"with optimizer.lr={config.optimizer.lr:g}; try a smaller learning rate",
                        sys.stderr,
                    )
                break
            bar.set_postfix_str(
                f"loss {metrics['train/loss']:.3f}, lr {metrics['train/lr']:.1e}, "
                f"{metrics[f'speed/{task.unit}_per_s']:.0f} {task.unit}/s",
                refresh=False,
            )
            bar.update()
            is_interrupted = interruption.has_come()
            if (
                num_done % training.checkpoint_every_steps == 0
                or num_done == last_step
                or is_interrupted
                or _is_evaluated(config, num_done)
            ):
                save_checkpoint(num_done)
            if is_interrupted:
                interruption.exit(f"a checkpoint was written at step {num_done}")
    if interruption.has_come():  # while the last checkpoint was written
        interruption.exit("the last checkpoint was written")
    return num_done, totals


def _step(
    setup: Setup,
    release: ReleasedStep | None,
    batches_of_steps: Iterator[list[Any]],
    totals: Totals,
) -> dict[str, Any]:
    """One optimizer step; returns its metrics and adds to the totals."""
    hardware, parallel = setup.hardware, setup.parallel
    hardware.synchronize()
    started = time.perf_counter()
    batches = next(batches_of_steps)
    num_targets, num_units = distributed.summed(
        sum(batch.num_targets for batch in batches), sum(batch.num_units for batch in batches)
    )

    # Every target of the global batch weighs the same, however ranks and micro-batches split it.
    # DDP and FSDP2 take the mean over ranks.
    world_size = distributed.world_size()
    loss = torch.zeros((), device=hardware.device)
    for batch in batches:
        with parallel.micro_step(is_last=batch is batches[-1]):
            with hardware.autocast():
                micro_loss = parallel.loss_sum(batch) * world_size / num_targets
            micro_loss.backward()
        loss += micro_loss.detach()
    (loss_value,) = distributed.summed(loss.item() / world_size)
    if release is None:
        grad_norm, optimizer_s = _clip_and_step(setup)
    else:
        grad_norm, optimizer_s = release.finish()

    step_s = time.perf_counter() - started
    totals.training_s += step_s
    totals.optimizer_s += optimizer_s
    totals.num_units += int(num_units)
    totals.peak_bytes = max(totals.peak_bytes, hardware.peak_bytes())
    return {
        "train/loss": loss_value,
        "train/grad_norm": grad_norm.item(),
        "train/lr": float(setup.optimizer.param_groups[0]["lr"]),
        "time/step_s": step_s,
        "time/optimizer_s": optimizer_s,
        f"speed/{setup.task.unit}_per_s": num_units / step_s,
        "memory/peak_bytes": totals.peak_bytes,
    }


def _is_evaluated(config: RunConfig, num_done: int) -> bool:
    """Whether the model is evaluated after so many steps, if another one follows."""
    every = config.evaluation.every_steps
    return every is not None and num_done > 0 and num_done % every == 0


def _evaluate(setup: Setup, step: int, totals: Totals) -> dict[str, Any]:
    """What is logged for the model between two steps; also prints the most telling of it."""
    metrics = setup.evaluate()
    totals.evaluation_s += metrics["time/evaluation_s"]
    setup.hardware.forget_peak()  # which is to be that of training
    loss = number(metrics, "eval/loss") or "not finite"
    scores = [f"held-out loss {loss}", headline(metrics)]
    if distributed.rank() == 0:
        tqdm.write(f"step {step}: {', '.join(filter(None, scores))}")
    return metrics


def _clip_and_step(setup: Setup) -> tuple[torch.Tensor, float]:
    """The global norm of the gradients before clipping, and the seconds in the optimizer."""
    model, training = setup.task.model, setup.config.training
    params = list(model.parameters())
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if is_sharded(grad_norm):
        grad_norm = grad_norm.full_tensor()
    if not grad_norm.isfinite():
        diagnosis = of_gradients(model)
        if distributed.rank() == 0:
            tqdm.write(f"the gradient norm is {grad_norm.item()}:\n{diagnosis}", sys.stderr)
    if training.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(params, training.max_grad_norm, grad_norm)
    if training.max_param_grad_norm is not None:
        for p in params:
            torch.nn.utils.clip_grad_norm_(p, training.max_param_grad_norm)
    setup.hardware.synchronize()
    started = time.perf_counter()
    setup.optimizer.step()
    setup.hardware.synchronize()
    optimizer_s = time.perf_counter() - started
    setup.optimizer.zero_grad()
    return grad_norm, optimizer_s
