"""Evaluation during training, and of finished runs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import hardware
from experiments.config import RunConfig
from experiments.errors import ExperimentError
from experiments.runner import execute
from experiments.runs.folder import RunFolder
from experiments.tasks.causal_lm import CausalLM
from scripts.evaluate import evaluate, main
from tests.experiments.helpers import (
    BRIEF,
    ROOT,
    SHORT,
    Compose,
    outcome,
    without_clocks,
    write_problems,
)
from tests.experiments.stopping import interrupt_at


def _record(config: RunConfig) -> dict[str, Any]:
    record = RunFolder(config).finished_record()
    assert record is not None
    return record


def test_a_run_evaluated_as_it_trains_is_the_same_run(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(*SHORT)
    execute(config)
    alone = outcome(config)[1]
    execute(composed(*SHORT, "evaluation.every_steps=4", "force=true"))
    assert "step 4: held-out loss 5." in capsys.readouterr().out
    assert outcome(config)[1] == alone
    record = _record(config)
    logged = [m for m in RunFolder(config).metrics() if "eval/loss" in m]
    assert [m["step"] for m in logged] == [0, 4, 8]  # the last is no evaluation twice
    (between,) = record["evaluations"]
    assert between == {
        "step": 4,
        **{k.removeprefix("eval/"): v for k, v in logged[1].items() if k.startswith("eval/")},
    }
    assert alone["eval/loss"] < between["loss"] < alone["eval_before/loss"]
    times = [m["time/evaluation_s"] for m in logged]
    assert record["metrics"]["time/evaluation_s"] == pytest.approx(sum(times))


def assert_a_fresh_run_ends_like_it(config: RunConfig) -> None:
    """A run of 8 steps that was interrupted, and evaluated after every third."""
    resumed, evaluations = outcome(config), _record(config)["evaluations"]
    execute(dataclasses.replace(config, force=True))
    assert outcome(config) == resumed
    assert _record(config)["evaluations"] == evaluations
    assert [evaluation["step"] for evaluation in evaluations] == [3, 6]


def test_its_evaluations_outlive_an_interruption(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One came before the checkpoint that the run resumes from, one after it and is repeated."""
    config = composed(*SHORT, "evaluation.every_steps=3", "training.checkpoint_every_steps=5")
    with monkeypatch.context() as patched:
        interrupt_at(7, patched)
        with pytest.raises(KeyboardInterrupt):
            execute(config)
    execute(config)
    assert_a_fresh_run_ends_like_it(config)


def test_a_signal_ends_an_evaluation_between_steps_at_once(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went on for minutes, and the step before it had no checkpoint."""
    overrides = (*SHORT, "evaluation.before_training=false", "evaluation.every_steps=3")
    config = composed(*overrides)

    def stop(_: CausalLM) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the evaluation went on")

    with monkeypatch.context() as patched:
        patched.setattr(CausalLM, "evaluate", stop)
        with pytest.raises(SystemExit) as ended:
            execute(config)
    assert ended.value.code == 75
    assert [m["step"] for m in RunFolder(config).metrics()] == [1, 2, 3]
    execute(config)  # evaluates step 3 before it goes on
    assert_a_fresh_run_ends_like_it(config)


def test_broken_weights_are_not_evaluated_as_a_run_trains(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step breaks them, and the second has no finite loss."""
    overrides = ("task=mnli", "scale=smoke", "hardware=cpu", "optimizer=sgd", "optimizer.lr=1e30")
    overrides += ("training.max_grad_norm=null", "training.warmup_steps=0")
    config = composed(*overrides, "evaluation.every_steps=1", "evaluation.limit=10")
    execute(config)
    assert _record(config)["status"] == "diverged"
    assert [evaluation["step"] for evaluation in _record(config)["evaluations"]] == [1]
    assert "step 1: held-out loss not finite" in capsys.readouterr().out


def test_peak_memory_is_not_that_of_an_evaluation_between_steps(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten = []

    def forget_peak(_: hardware.Hardware) -> bool:
        forgotten.append(True)
        return True

    monkeypatch.setattr(hardware.Hardware, "forget_peak", forget_peak)
    execute(composed(*BRIEF, "training.max_steps=5", "evaluation.every_steps=2"))
    assert len(forgotten) == 3  # before the first step, after the evaluations at steps 2 and 4


@pytest.fixture
def finished(composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run on a small folder of problems that kept its model."""
    monkeypatch.chdir(ROOT)
    write_problems(tmp_path / "data", num_train=16, num_test=8)
    overrides = [*BRIEF, f"dataset.path={tmp_path / 'data'}", "training.save_model=true"]
    config = composed(*overrides)
    execute(config, overrides)
    return config


def test_a_finished_run_is_evaluated_with_the_scores_that_it_had(
    finished: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {k: v for k, v in _record(finished)["metrics"].items() if k.startswith("eval/")}
    result = json.loads(evaluate(RunFolder(finished).path, []).read_text())
    assert without_clocks(result["metrics"]) == own
    assert result["run"] == RunFolder(finished).hash
    assert "held-out loss" in capsys.readouterr().out


def test_by_another_protocol_and_on_more_examples(finished: RunConfig) -> None:
    folder = RunFolder(finished).path
    path = evaluate(folder, ["evaluation=gsm8k_paper", "evaluation.limit=5", "hardware=cpu"])
    assert path.parent == folder / "evaluations"
    result = json.loads(path.read_text())
    assert result["evaluation"]["protocol"] == "gsm8k_paper"
    assert result["metrics"]["eval/gsm8k/num_samples"] == 5
    assert "eval/gsm8k/exact_match,harness-b281b09" in result["metrics"]
    assert "evaluation=gsm8k_paper" in result["command"]
    # The record, which tables are made from, is what it was.
    assert _record(finished)["metrics"]["eval/gsm8k/num_samples"] == 2


@pytest.mark.parametrize("task", ["mnli", "imagenet"])
def test_models_of_other_tasks_are_evaluated(
    task: str, composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ResNet's folder holds its state dict alone."""
    monkeypatch.chdir(ROOT)
    overrides = [f"task={task}", "scale=smoke", "hardware=cpu", "training.max_steps=2"]
    overrides += ["evaluation.limit=20", "training.save_model=true"]
    config = composed(*overrides)
    execute(config, overrides)
    own = {k: v for k, v in _record(config)["metrics"].items() if k.startswith("eval/")}
    result = json.loads(evaluate(RunFolder(config).path, []).read_text())
    assert without_clocks(result["metrics"]) == own


def test_rules_of_training_do_not_matter(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With released gradients a small micro-batch needs activation checkpointing."""
    monkeypatch.chdir(ROOT)
    overrides = [*BRIEF, "training.save_model=true", "training.gradient_release=true"]
    overrides += ["training.max_grad_norm=null", "hardware=a100_80gb"]
    overrides += ["hardware.device=cpu", "hardware.precision=fp32"]
    config = composed(*(o for o in overrides if o != "hardware=cpu"))
    execute(config, [o for o in overrides if o != "hardware=cpu"])
    evaluate(RunFolder(config).path, ["hardware=cpu"])


@pytest.mark.parametrize("content", ["nothing", "text", "a list"])
def test_a_broken_model_of_an_image_task_is_one_sentence(
    content: str, composed: Compose, tmp_path: Path
) -> None:
    file = tmp_path / "model.pt"
    if content == "a list":
        torch.save([1], file)
    else:
        file.write_text("" if content == "nothing" else "weights")
    weights = ("model.weights=pretrained", f"model.path={tmp_path}")
    config = composed("task=imagenet", "scale=smoke", "hardware=cpu", *weights)
    with pytest.raises(ExperimentError, match=r"model\.path=.*(no model\.pt|do not fit)"):
        execute(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=1", r"optimizer\.lr=1: the model is trained; only evaluation"),
        ("evaluations=1", "evaluations=1: the model is trained"),
        ("model=tiny_llama", "model=tiny_llama: the model is trained"),
        ("evaluation.limit=0", r"evaluation\.limit=0: must be greater"),
    ],
)
def test_what_is_no_evaluation_is_refused(override: str, message: str, finished: RunConfig) -> None:
    with pytest.raises(ExperimentError, match=message):
        evaluate(RunFolder(finished).path, [override])
    assert not (RunFolder(finished).path / "evaluations").exists()


def test_other_data_than_the_runs_are_refused(finished: RunConfig, tmp_path: Path) -> None:
    """Examples that it was trained on could be among those that it is evaluated on."""
    write_problems(tmp_path / "other", num_train=8, num_test=16)
    with pytest.raises(ExperimentError, match="dataset=gsm8k: not the data of the run"):
        evaluate(RunFolder(finished).path, [f"dataset.path={tmp_path / 'other'}"])


def test_a_run_without_its_model_or_its_end_is_refused(
    composed: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(*BRIEF, "training.save_model=false")
    execute(config, [*BRIEF, "training.save_model=false"])
    for folder, message in (
        (RunFolder(config).path, "its model was not kept; python run.py scale=smoke"),
        (tmp_path, "not a finished run; python -m experiments.status"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(folder)])
        assert ended.value.code == 2
        assert f"{folder}: {message}" in capsys.readouterr().err
