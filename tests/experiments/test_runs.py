"""Whole runs at smoke scale: what they do, and what their records say."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import hardware, tasks, training
from experiments.data.order import DataOrder
from experiments.errors import ExperimentError
from experiments.models import activations
from experiments.runner import _curve, execute
from experiments.runs import checkpoints
from experiments.runs.folder import RunFolder
from experiments.tasks.causal_lm import CausalLM
from tests.experiments.helpers import BRIEF, ROOT, SHORT, Compose, outcome
from tests.experiments.stopping import interrupt_at, stopped_at_the_end


def test_a_run_learns_and_its_record_says_what_it_was(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(*SHORT)
    execute(config)
    run = RunFolder(config)
    record = run.finished_record()
    assert record is not None
    metrics = record["metrics"]
    assert metrics["eval/loss"] < metrics["eval_before/loss"] - 0.1
    assert metrics["eval/gsm8k/num_samples"] == 2
    assert record["data_source"] == "generated"
    assert record["model_source"] == "random"
    assert (record["data_revision"], record["model_revision"]) == (None, None)
    assert record["hardware"]["precision"] == "fp32"
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["config"]["optimizer"]["window_size"] == 10
    assert record["curve"]["step"] == [*range(1, 9)]
    assert metrics["time/wall_s"] > metrics["time/training_s"]
    assert [m["step"] for m in run.metrics()] == [*range(9), 8]
    committed = list(Path(config.results_dir, "records").glob("*.json"))
    assert [json.loads(path.read_text()) for path in committed] == [record]
    printed = capsys.readouterr().out
    for word in ("held-out loss", "exact match, strict-match", "optimizer state", "record.json"):
        assert word in printed


def test_what_the_optimizer_refuses_is_said_before_the_model_is_loaded(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExperimentError, match=r"optimizer\.density=2"):
        execute(composed(*SHORT, "optimizer.density=2"))
    assert "loading" not in capsys.readouterr().out


def test_answers_without_room_are_refused_before_the_training(composed: Compose) -> None:
    """The run trained to its end, and then failed."""
    too_long = "evaluation.max_new_tokens=4096"
    config = composed(*SHORT, "evaluation.before_training=false", too_long)
    with pytest.raises(ExperimentError, match=r"evaluation\.max_new_tokens=4096: .* room for"):
        execute(config)
    assert not RunFolder(config).metrics()


@pytest.mark.parametrize("stops_at", ["first step", "end"])
def test_the_times_of_a_run_that_went_on_are_of_all_its_processes(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, stops_at: str
) -> None:
    """Of earlier processes it was the training alone."""
    evaluation_s = 0.4

    def evaluate(_: CausalLM) -> dict[str, float]:
        time.sleep(evaluation_s)
        return {"loss": 1.0}

    monkeypatch.setattr(CausalLM, "evaluate", evaluate)
    config = composed(*SHORT, "training.max_steps=2")
    kept_s = evaluation_s
    if stops_at == "end":
        newest, *_ = stopped_at_the_end(config, monkeypatch)
        totals = torch.load(newest, weights_only=True)["totals"]
        kept_s = totals["wall_s"]
        assert kept_s > evaluation_s + totals["training_s"]
    else:
        with monkeypatch.context() as patch:
            interrupt_at(1, patch)
            with pytest.raises(KeyboardInterrupt):
                execute(config)
    execute(config)
    record = RunFolder(config).finished_record()
    assert record is not None
    metrics = record["metrics"]
    assert metrics["time/evaluation_s"] >= 2 * evaluation_s
    assert metrics["time/wall_s"] >= kept_s + evaluation_s
    assert metrics["time/wall_s"] > metrics["time/evaluation_s"] + metrics["time/training_s"]


@pytest.mark.parametrize(("can_forget", "peak_of"), [(True, "training"), (False, "process")])
def test_the_peak_memory_of_a_run_is_that_of_its_training(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, can_forget: bool, peak_of: str
) -> None:
    """What the evaluation took hid on a GPU what tables compare. The run is interrupted, and the
    process that goes on takes less than the first."""
    held, in_training, in_evaluation = [0], [20, 10], 30

    def forget(_: hardware.Hardware) -> bool:
        if can_forget:
            held[0] = in_training.pop(0)
        return can_forget

    def evaluate(_: CausalLM) -> dict[str, float]:
        held[0] = in_evaluation
        return {"loss": 1.0}

    monkeypatch.setattr(hardware.Hardware, "forget_peak", forget)
    monkeypatch.setattr(hardware.Hardware, "peak_bytes", lambda _: held[0])
    monkeypatch.setattr(CausalLM, "evaluate", evaluate)
    config = composed(*SHORT, "training.max_steps=2", "training.checkpoint_every_steps=1")
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            execute(config)
    execute(config)
    record = RunFolder(config).finished_record()
    assert record is not None
    assert record["metrics"]["memory/peak_bytes"] == (20 if can_forget else in_evaluation)
    assert record["peak_memory_of"] == peak_of


def test_a_process_that_may_not_forget_its_peak_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = hardware.Hardware(torch.device("cpu"), "fp32")
    monkeypatch.setattr(hardware, "_CLEAR_REFS", tmp_path / "file")
    assert machine.forget_peak()
    monkeypatch.setattr(hardware, "_CLEAR_REFS", tmp_path / "not/there")
    assert not machine.forget_peak()


def test_a_record_counts_the_steps_that_were_taken_not_the_lines_of_the_log(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*BRIEF, "training.max_steps=3")
    stopped_at_the_end(config, monkeypatch)
    log = RunFolder(config).path / "metrics.jsonl"
    first, _, third, *_ = log.read_text().splitlines(keepends=True)
    log.write_text(first + third)
    execute(config)
    record = RunFolder(config).finished_record()
    assert record is not None
    assert record["num_steps"] == 3


def test_the_metrics_are_on_the_disk_before_the_checkpoint(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that goes down left a checkpoint of steps that the log did not have."""
    synced: list[str] = []
    fsync = os.fsync

    def fsync_and_note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_and_note)
    execute(composed(*BRIEF))
    (checkpoint,) = (i for i, name in enumerate(synced) if name.startswith(".step-"))
    assert synced[:checkpoint].count("metrics.jsonl") == 1


def test_a_run_whose_loss_is_not_finite_leaves_a_record_of_that_and_is_not_repeated(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    """An exception here ended the whole sweep, and the next sweep began with the same run."""
    config = composed(*SHORT, "optimizer=adamw", "optimizer.lr=1e30", "training.save_model=true")
    execute(config)
    printed = capsys.readouterr()
    assert "diverged: the loss became nan" in printed.err
    assert "diverged: not finite at step" in printed.out
    (path,) = Path(config.results_dir, "records").glob("*.json")
    record = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert record["status"] == "diverged"
    assert record["num_steps"] > len(record["curve"]["step"])
    assert not RunFolder(config).model.exists()
    path.unlink()
    execute(config)
    assert "already diverged" in capsys.readouterr().out
    assert json.loads(path.read_text()) == record


def test_a_run_that_breaks_in_its_last_step_has_diverged(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No training loss comes after that step; the evaluation is not finite."""
    step, steps = training._step, itertools.count(1)

    def step_and_break(setup: training.Setup, *arguments: Any) -> dict[str, Any]:
        metrics = step(setup, *arguments)
        if next(steps) == 2:
            with torch.no_grad():
                next(setup.task.model.parameters()).fill_(math.nan)
        return metrics

    monkeypatch.setattr(training, "_step", step_and_break)
    config = composed(*SHORT, "training.max_steps=2", "training.save_model=true")
    execute(config)
    (path,) = Path(config.results_dir, "records").glob("*.json")
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert record["status"] == "diverged"
    assert record["curve"]["step"] == [1, 2]
    assert not any(name.startswith("eval/") for name in record["metrics"])
    assert not RunFolder(config).model.exists()


@pytest.mark.parametrize(("num_steps", "num_points"), [(8, 8), (250, 125), (1001, 167)])
def test_the_curve_in_a_record_is_short_and_loses_no_step(num_steps: int, num_points: int) -> None:
    losses = [1 / (step + 1) for step in range(num_steps)]
    curve = _curve(losses)
    assert len(curve["step"]) == len(curve["train/loss"]) == num_points
    assert curve["step"][-1] == num_steps
    widths = [b - a for a, b in itertools.pairwise([0, *curve["step"]])]
    total = sum(w * loss for w, loss in zip(widths, curve["train/loss"], strict=True))
    assert total == pytest.approx(sum(losses), rel=1e-3)


def test_overlong_examples_are_counted_not_cut(composed: Compose) -> None:
    config = composed(*SHORT, "task.max_length=400", "training.max_steps=1")
    execute(config)
    record = RunFolder(config).finished_record()
    assert record is not None
    assert record["num_overlong_examples"] > 0
    assert record["num_examples"] + record["num_overlong_examples"] == 64
    with pytest.raises(ExperimentError, match=r"task\.max_length=10: every training example"):
        execute(composed(*SHORT, "task.max_length=10"))


def test_data_without_a_split_to_evaluate_on_is_refused(composed: Compose) -> None:
    config = composed(*SHORT, "task=open_platypus", "dataset.num_held_out=null")
    with pytest.raises(ExperimentError, match=r"dataset\.splits=\['train'\]: must be train and"):
        execute(config)


def test_recomputed_activations_give_the_same_training(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled = []
    enable = activations.enable_checkpointing
    monkeypatch.setattr(
        activations, "enable_checkpointing", lambda *given: enabled.append(enable(*given))
    )
    plain = composed(*SHORT)
    recomputing = composed(*SHORT, "hardware.activation_checkpointing=true")
    for config in (plain, recomputing):
        execute(config)
    assert len(enabled) == 1
    assert outcome(plain) == outcome(recomputing)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_step_is_that_of_the_mean_loss_clipped_at_the_schedules_rate(
    composed: Compose, schedule: str
) -> None:
    """Against a loop written out here, with an optimizer whose step is as long as its gradient."""
    num_steps, num_warmup, rate, bound = 5, 2, 0.5, 0.05
    config = composed(
        *SHORT,
        "optimizer=sgd",
        "optimizer.momentum=0",
        "optimizer.weight_decay=0",
        f"optimizer.lr={rate}",
        f"training.schedule={schedule}",
        f"training.max_steps={num_steps}",
        f"training.warmup_steps={num_warmup}",
        f"training.max_grad_norm={bound}",
        "training.global_batch_size=8",
        "hardware.micro_batch_size=4",
    )
    execute(config)
    logged = [m for m in RunFolder(config).metrics() if "train/loss" in m]
    assert len(logged) == num_steps

    torch.manual_seed(config.seed)
    task = tasks.by_name("gsm8k")(config, hardware.resolve(config.hardware))
    order = DataOrder(config.training, task.num_examples, config.seed)
    params = list(task.model.parameters())
    for step, metrics in enumerate(logged):
        lr = rate * step / num_warmup
        if step >= num_warmup:
            done = (step - num_warmup) / (num_steps - num_warmup)
            shares = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
            lr = rate * shares.get(schedule, 1.0)
        batches = task.micro_batches(order[step])
        assert len(batches) == 2
        loss = sum(task.loss_sum(task.model, b) for b in batches) / sum(
            b.num_targets for b in batches
        )
        grads = torch.autograd.grad(loss, params)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        assert norm > bound
        assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert metrics["train/lr"] == pytest.approx(lr)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p -= lr * bound / norm * g


def test_micro_batches_change_only_the_order_of_sums(composed: Compose) -> None:
    whole = composed(*SHORT, "hardware.micro_batch_size=8", "optimizer=adamw")
    cut = composed(*SHORT, "hardware.micro_batch_size=2", "optimizer=adamw")
    for config in (whole, cut):
        execute(config)
    assert outcome(cut)[1]["eval/loss"] == pytest.approx(outcome(whole)[1]["eval/loss"], rel=1e-4)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="concerns glibc's allocator")
def test_on_a_cpu_large_blocks_are_reused_with_their_pages() -> None:
    """In a process of its own, whose memory holds nothing else that was freed."""
    script = """if True:
        import resource, torch
        from experiments import hardware
        from experiments.config import HardwareConfig
        hardware.resolve(HardwareConfig(name="cpu", device="cpu", micro_batch_size=1))
        for _ in range(3):  # until the allocator has its place
            torch.ones(2**24)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    num_pages = 2**24 * 4 / resource.getpagesize()
    assert int(result.stdout) < 0.01 * num_pages


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_gpu_run_is_refused(composed: Compose) -> None:
    with pytest.raises(ExperimentError, match=r"hardware=a100_80gb.*dry_run=true"):
        execute(composed("scale=smoke", "hardware=a100_80gb"))


def test_a_sweep_makes_a_finished_record_for_each_choice(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run.py"), "--multirun", *SHORT]
    command += ["optimizer=microadam,adamw", "optimizer.lr=1e-5,3e-5", "training.max_steps=2"]
    command.append(f"results_dir={tmp_path}")
    subprocess.run(command, check=True, capture_output=True)
    done = [json.loads(path.read_text()) for path in (tmp_path / "records").glob("*.json")]
    choices = {(r["optimizer"], r["config"]["optimizer"]["lr"], r["status"]) for r in done}
    assert choices == {
        (name, lr, "finished") for name in ("microadam", "adamw") for lr in (1e-5, 3e-5)
    }


@pytest.mark.parametrize(
    ("task", "bars"),
    [
        ("gsm8k", ["held-out loss:"]),
        ("mnli", ["evaluate matched:", "evaluate mismatched:"]),
        ("imagenet", ["evaluate:"]),
    ],
)
def test_who_watches_an_evaluation_sees_how_long_it_takes(
    composed: Compose,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: str,
    bars: list[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    config = composed(f"task={task}", "scale=smoke", "hardware=cpu", "evaluation.limit=2")
    tasks.by_name(task)(config, hardware.resolve(config.hardware)).evaluate()
    printed = capsys.readouterr().err
    assert all(f"{bar}   0%|" in printed for bar in bars)


def test_metrics_are_mirrored_to_wandb_only_where_asked(composed: Compose) -> None:
    config = composed(*SHORT, "training.max_steps=1", "logger=wandb", "logger.mode=offline")
    execute(config)
    assert list((RunFolder(config).path / "wandb").glob("offline-run-*"))


class WandbRun:
    """What `experiments.runs.mirror.Mirror` has of a run of Weights & Biases."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        assert self.exit_code is None

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.mark.parametrize("stopped_by", [None, ValueError, SystemExit])
def test_wandb_is_told_what_a_run_is_and_how_it_ended(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, stopped_by: type[BaseException] | None
) -> None:
    """Failed and preempted runs were listed as finished, under names that said nothing."""
    started: list[WandbRun] = []

    def init(**settings: Any) -> WandbRun:
        started.append(WandbRun(**settings))
        return started[-1]

    def stop(*_: object) -> None:
        raise stopped_by

    monkeypatch.setattr("wandb.init", init)
    if stopped_by is not None:
        monkeypatch.setattr(RunFolder, "finish", stop)
    config = composed(*BRIEF, "logger=wandb")
    with nullcontext() if stopped_by is None else pytest.raises(stopped_by):
        execute(config)
    (run,) = started
    assert run.settings["name"] == f"gsm8k-tiny_llama-microadam-{RunFolder(config).hash}"
    assert run.exit_code == (0 if stopped_by is None else 1)
    record = RunFolder(config).finished_record()
    expected = {} if record is None else {"status": "finished", **record["metrics"]}
    assert run.summary == expected


def test_wandb_without_a_key_is_refused_with_the_remedy(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = composed(*SHORT, "logger=wandb", "evaluation.before_training=false")
    with pytest.raises(ExperimentError, match=r"logger=wandb: .*logger\.mode=offline"):
        execute(config)


def test_results_that_cannot_be_written_are_refused(composed: Compose) -> None:
    config = composed(*SHORT)
    Path(config.results_dir).write_text("a file")
    with pytest.raises(ExperimentError, match=r"could not be written .*choose another folder"):
        execute(config)


def test_the_saved_model_is_the_trained_one(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    trained: dict[str, torch.Tensor] = {}
    evaluate = CausalLM.evaluate

    def evaluate_and_keep(task: CausalLM) -> dict[str, Any]:
        trained.update({name: p.detach().clone() for name, p in task.model.named_parameters()})
        return evaluate(task)

    monkeypatch.setattr(CausalLM, "evaluate", evaluate_and_keep)  # the last time after training
    config = composed(*SHORT, "training.max_steps=2", "training.save_model=true")
    folder = RunFolder(config).path
    left_over = folder / ".model.killed.partial"
    left_over.mkdir(parents=True)
    execute(config)
    saved = AutoModelForCausalLM.from_pretrained(RunFolder(config).model)
    for name, p in saved.named_parameters():
        assert torch.equal(p, trained[name]), name
    assert not left_over.exists()
    assert not list(RunFolder(config).checkpoints.glob("*.pt"))


def test_a_single_evaluated_sample_has_no_standard_error(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    """The harness calls it "N/A", which no run survived."""
    config = composed(*SHORT, "training.max_steps=1", "evaluation.limit=1")
    execute(config)
    _, metrics = outcome(config)
    assert "eval/gsm8k/exact_match,strict-match" in metrics
    assert not any("stderr" in name for name in metrics)
    assert "0.0% -> 0.0% (1 samples" in capsys.readouterr().out


def test_only_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    for step in (1, 2, 3):
        progress = checkpoints.Progress("hash", "generated", "digest", "fp32", step, {}, {})
        checkpoints.save(tmp_path, progress, model, torch.optim.SGD(model.parameters()), False)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step-00000002.pt",
        "step-00000003.pt",
    ]
