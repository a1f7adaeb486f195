"""Summaries for people: a run's plan, its start and its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments import distributed
from experiments.config import RunConfig, TrainingConfig
from experiments.data.order import num_steps
from experiments.hardware import Hardware
from experiments.planning import UNPLANNED_GIB, Plan, fits
from experiments.report import formats
from experiments.runs import reading
from experiments.runs.checkpoints import Checkpoint
from experiments.tasks import Task

_GIB = 2**30


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _schedule(config: RunConfig, steps: int) -> str:
    lr, num_warmup = config.optimizer.lr, config.training.warmup_steps
    if num_warmup >= steps:
        return f"{lr:g}, never reached: training.warmup_steps={num_warmup} of {steps} steps"
    decay = {"linear": "linear decay to 0", "cosine": "cosine decay to 0", "constant": "constant"}
    return f"{lr:g}, {decay[config.training.schedule]} after {num_warmup} warm-up steps"


def _input_size(config: RunConfig) -> tuple[str, str]:
    images = config.images
    if images is None:
        return "sequence length", f"{config.task.max_length} tokens"
    first, last, share = (
        images.first_resolution,
        images.last_resolution,
        images.last_resolution_from,
    )
    return "image size", f"{first} px, {last} px after {share:.0%} of the steps"


def _clipping(config: TrainingConfig) -> str:
    bounds = []
    if config.max_grad_norm is not None:
        bounds.append(f"global norm {config.max_grad_norm:g}")
    if config.max_param_grad_norm is not None:
        bounds.append(f"each parameter's norm {config.max_param_grad_norm:g}")
    return ", ".join(bounds) or "none"


def plan_summary(config: RunConfig, plan: Plan) -> str:
    train, hardware = config.training, config.hardware
    length = f"{train.max_steps} steps" if train.max_steps else f"{train.epochs:g} epochs"
    checkpointing = ""
    if hardware.activation_checkpointing:
        offloading = " and offloading" if hardware.activation_offloading else ""
        checkpointing = f", activation checkpointing{offloading}"
    rows = [
        (
            "model",
            f"{config.model.title}, {plan.num_params:,} parameters, {config.model.weights} weights",
        ),
        ("task", f"{config.task.name} ({config.scale}), {plan.num_examples:,} examples"),
        ("training", f"{length} = {plan.num_steps} steps, global batch {train.global_batch_size}"),
        _input_size(config),
        ("learning rate", _schedule(config, plan.num_steps)),
        ("gradient clipping", _clipping(train)),
        ("optimizer", config.optimizer.name),
        (
            "hardware",
            f"{hardware.name}, {plan.precision}, micro-batch {hardware.micro_batch_size}"
            f"{checkpointing}",
        ),
    ]
    gradients = formats.size(plan.grad_bytes)
    if train.gradient_release:
        gradients = "released one by one in the backward pass, counted with the activations"
    memory = [
        ("parameters", formats.size(plan.param_bytes)),
        ("gradients", gradients),
        (
            "optimizer state",
            f"{formats.size(plan.state_bytes)}, {plan.state_bytes / plan.num_params:.2f} bytes per "
            f"parameter (AdamW: {formats.size(plan.adamw_state_bytes)})",
        ),
        ("activations", f"{formats.size(plan.activation_bytes)} (estimate, largest batch)"),
        ("peak", f"{formats.size(plan.peak_bytes)}{_verdict(plan, hardware.memory_gib)}"),
    ]
    if plan.host_bytes:
        memory.append(("on the host", f"{formats.size(plan.host_bytes)} of the layers' inputs"))
    unsharded = " for one process, unsharded" if hardware.parallel == "fsdp2" else ""
    return f"Plan\n{_table(rows)}\n\nPeak memory by part{unsharded}\n{_table(memory)}"


def _verdict(plan: Plan, memory_gib: float | None) -> str:
    if memory_gib is None or not fits(plan.peak_bytes, memory_gib):
        return shortage(plan, memory_gib)
    spare = memory_gib * _GIB - plan.peak_bytes
    return f": fits the card's {memory_gib:g} GiB with {formats.size(spare)} to spare"


def shortage(plan: Plan, memory_gib: float | None) -> str:
    """What to add after the peak if the plan does not fit the card; else empty."""
    if memory_gib is None or fits(plan.peak_bytes, memory_gib):
        return ""
    spare = memory_gib * _GIB - plan.peak_bytes
    if spare < 0:
        return f": {formats.size(-spare)} more than the card's {memory_gib:g} GiB"
    return (
        f": does not fit; it leaves {formats.size(spare)} of the card's {memory_gib:g} GiB, and "
        f"the driver and fragmentation take about {UNPLANNED_GIB:g} GiB"
    )


def start_summary(
    config: RunConfig,
    task: Task,
    hardware: Hardware,
    folder: Path,
    checkpoint: Checkpoint | None,
) -> str:
    num_params = sum(p.numel() for p in task.model.parameters())
    fate = "cut" if task.cuts_overlong_examples else "left out"
    overlong = (
        f"; {task.num_overlong_examples:,} longer than {config.task.max_length} tokens {fate}"
        if task.num_overlong_examples
        else ""
    )
    loader = "" if task.data_loader == "memory" else f" through {task.data_loader}"
    steps = num_steps(config.training, task.num_examples)
    released = ", gradients released" if config.training.gradient_release else ""
    num_processes = distributed.world_size()
    processes = (
        f", {num_processes} processes ({config.hardware.parallel})" if num_processes > 1 else ""
    )
    rows = [
        (
            "model",
            f"{config.model.title} ({task.model_source}), {num_params:,} parameters",
        ),
        (
            "data",
            f"{config.dataset.name} ({task.data_source}), {task.num_examples:,} examples{loader}"
            f"{overlong}",
        ),
        (
            "training",
            f"{steps} steps of {config.training.global_batch_size} examples on "
            f"{hardware.device.type}, {hardware.precision}{released}{processes}",
        ),
        (
            "optimizer",
            f"{config.optimizer.name}, learning rate {_schedule(config, steps)}, "
            f"state {formats.size(config.optimizer.state_bytes(task.model))}",
        ),
        ("folder", str(folder)),
    ]
    if checkpoint is not None:
        rows.append(("resuming", f"from step {checkpoint.progress.step}"))
    return _table(rows)


def record_summary(record: dict[str, Any], folder: Path) -> str:
    m = record["metrics"]
    adamw_bytes = 2 * record["num_params"] * (2 if record["hardware"]["precision"] == "bf16" else 4)
    if record["status"] == "diverged":
        rows = [("train loss", f"diverged: not finite at step {record['num_steps']}")]
    else:
        rows = [("train loss", f"{m['train/first_loss']:.3f} -> {m['train/last_loss']:.3f}")]
    rows += _evaluation_rows(m)
    rows += [
        (
            "optimizer state",
            f"{formats.size(m['memory/state_bytes'])}; "
            f"AdamW's would take {formats.size(adamw_bytes)}",
        ),
        (
            "time per step",
            f"{m['time/training_s'] / record['num_steps']:.2f} s, of which the optimizer takes "
            f"{m['time/optimizer_s'] / m['time/training_s']:.1%}",
        ),
        ("speed", f"{record['num_units'] / m['time/training_s']:.0f} {record['unit']}/s"),
        ("peak memory", formats.size(m["memory/peak_bytes"])),
        ("record", str(folder / "record.json")),
    ]
    if (folder / "model").exists():
        rows.append(("model", str(folder / "model")))
    what = f"{record['optimizer']} on {record['model']}, {record['task']}"
    return f"\n{what} ({record['scale']} scale, data: {record['data_source']})\n{_table(rows)}"


def evaluation_summary(metrics: dict[str, Any]) -> str:
    """The scores of an evaluation, as a record holds them."""
    return _table(_evaluation_rows(metrics))


def _evaluation_rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    labels = {"loss": "held-out loss", "average": "average of the tasks"}
    names = reading.evaluated(metrics)
    return [(labels.get(name, _label(name)), _before_after(metrics, name)) for name in names]


def _label(name: str) -> str:
    """``arc_challenge/acc_norm,none`` as a person reads it."""
    return name.removesuffix(",none").replace("_", " ").replace("/", " ").replace(",", ", ")


def _before_after(metrics: dict[str, Any], name: str) -> str:
    """``before -> after`` for an evaluated quantity; scores with standard errors and counts."""
    stages = [stage for stage in ("eval_before", "eval") if f"{stage}/{name}" in metrics]
    if name == "loss":
        return " -> ".join(f"{metrics[f'{stage}/{name}']:.3f}" for stage in stages)
    return " -> ".join(_score(metrics, stage, name) for stage in stages) + _counts(metrics, name)


def _counts(metrics: dict[str, Any], name: str) -> str:
    """The number of samples behind a score; empty for an average of scores."""
    if f"eval/{name}_num_samples" in metrics:
        num_cut = metrics.get(f"eval/{name}_num_cut", 0)
        cut = f", {num_cut:,} of them cut" if num_cut else ""
        return f" ({metrics[f'eval/{name}_num_samples']:,} samples{cut})"
    prefix = f"eval/{name.partition('/')[0]}"
    if f"{prefix}/num_samples" not in metrics:
        return ""
    num_tasks = metrics[f"{prefix}/num_tasks"]
    tasks = f" of {num_tasks} tasks" if num_tasks > 1 else ""
    shots = metrics[f"{prefix}/num_fewshot"]
    return f" ({metrics[f'{prefix}/num_samples']:,} samples{tasks}, {shots}-shot)"


def _score(metrics: dict[str, Any], stage: str, name: str) -> str:
    score = f"{metrics[f'{stage}/{name}']:.1%}"
    # lm-evaluation-harness names a score "metric,filter". One sample has no standard error.
    stderr_name = name.replace(",", "_stderr,") if "," in name else f"{name}_stderr"
    stderr = metrics.get(f"{stage}/{stderr_name}")
    return score if stderr is None else f"{score} ± {stderr:.1%}"
