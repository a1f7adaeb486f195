"""What is left of a run when the disk is full, the cluster wants its machine, or a kill comes."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import tasks
from experiments.config import RunConfig
from experiments.errors import ExperimentError
from experiments.runner import execute
from experiments.runs import interruption
from experiments.runs.folder import RunFolder
from experiments.tasks.gsm8k import GSM8K
from tests.experiments import soak
from tests.experiments.helpers import SHORT, Compose, outcome, write_problems
from tests.experiments.stopping import at_step
from tests.processes import start


@pytest.fixture
def quick(tmp_path: Path) -> tuple[str, ...]:
    write_problems(tmp_path / "gsm8k", num_train=16, num_test=2)
    return (*SHORT, f"dataset.path={tmp_path / 'gsm8k'}", "training.global_batch_size=4")


@pytest.fixture
def undisturbed(composed: Compose, quick: tuple[str, ...], tmp_path: Path) -> Any:
    """What the run measures where nothing happens to it."""
    config = composed(*quick, f"results_dir={tmp_path / 'undisturbed'}")
    execute(config)
    return outcome(config)


def checkpoint_names(config: RunConfig) -> list[str]:
    return sorted(path.name for path in RunFolder(config).checkpoints.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_training_leaves_a_checkpoint_of_that_step(
    composed: Compose,
    quick: tuple[str, ...],
    undisturbed: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    config = composed(*quick)
    with monkeypatch.context() as patch:
        at_step(6, patch, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as end:
            execute(config)
    assert end.value.code == interruption.EXIT_CODE == 75
    assert (
        f"stopped by {number.name}: a checkpoint was written at step 6" in capsys.readouterr().err
    )
    assert checkpoint_names(config) == ["step-00000004.pt", "step-00000006.pt"]
    assert signal.getsignal(number) == signal.SIG_DFL
    execute(config)
    assert outcome(config) == undisturbed


def test_a_forced_run_that_the_cluster_starts_again_goes_on(
    composed: Compose,
    quick: tuple[str, ...],
    undisturbed: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = composed(*quick, "force=true")
    with monkeypatch.context() as patch:
        at_step(6, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            execute(config)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    execute(config)
    assert "from step 6" in capsys.readouterr().out
    assert outcome(config) == undisturbed


@pytest.fixture
def foreground() -> Iterator[None]:
    """Ctrl-C works; it is ignored where the tests run in the background of a shell script."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruption.handled() as signals:
        signal.raise_signal(signal.SIGINT)
    assert signals.signal_name is None
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("is_training", [True, False])
def test_a_worker_leaves_the_run_to_its_parent(
    capfd: pytest.CaptureFixture[str], is_training: bool
) -> None:
    """Ctrl-C reaches a DataLoader's workers, too: each announced a checkpoint, or the end."""
    with (
        interruption.handled() as signals,
        signals.deferred() if is_training else nullcontext(),
    ):
        context = multiprocessing.get_context("fork")
        worker = context.Process(target=signal.raise_signal, args=(signal.SIGINT,))
        worker.start()
        worker.join()
        assert signals.signal_name is None
    assert worker.exitcode == 0
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_leaves_a_checkpoint_and_a_second_one_does_not_wait_for_it(
    composed: Compose, quick: tuple[str, ...], undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*quick)

    def press_ctrl_c() -> None:
        signal.raise_signal(signal.SIGINT)

    def press_it_twice() -> None:
        press_ctrl_c()
        press_ctrl_c()

    for step, action, newest in [(6, press_ctrl_c, 6), (7, press_it_twice, 6)]:
        with monkeypatch.context() as patch:
            at_step(step, patch, action)
            with pytest.raises(KeyboardInterrupt):
                execute(config)
        assert checkpoint_names(config)[-1] == f"step-{newest:08}.pt"
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    execute(config)
    assert outcome(config) == undisturbed


def test_a_signal_while_evaluating_ends_the_run_at_once_and_loses_nothing(
    composed: Compose, quick: tuple[str, ...], undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*quick)
    evaluate = GSM8K.evaluate

    def evaluate_or_stop(self: GSM8K) -> dict[str, Any]:
        if checkpoint_names(config)[-1:] == ["step-00000008.pt"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self)

    RunFolder(config).checkpoints.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(GSM8K, "evaluate", evaluate_or_stop)
        with pytest.raises(SystemExit):
            execute(config)
    assert RunFolder(config).finished_record() is None
    execute(config)
    assert outcome(config) == undisturbed


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_full_disk_ends_the_run_with_a_sentence_and_keeps_what_was_there(
    composed: Compose,
    quick: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    parallel: str,
) -> None:
    """A limit on the size of files stands in for the disk: the system refuses to write on."""
    config = composed(*quick, f"hardware.parallel={parallel}")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))

    with monkeypatch.context() as patch:
        at_step(6, patch, fill_the_disk)
        try:
            with pytest.raises(
                ExperimentError, match=r"step-00000008.* could not be written .*large"
            ):
                execute(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    suffix = "" if parallel == "fsdp2" else ".pt"
    assert checkpoint_names(config) == [f"step-00000004{suffix}"]
    execute(config)
    assert RunFolder(config).finished_record() is not None


@pytest.mark.parametrize("task", ["gsm8k", "mnli", "imagenet"])
def test_a_full_disk_where_the_model_is_saved_costs_no_step(
    composed: Compose,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: str,
) -> None:
    """safetensors has an exception of its own for it, and torch.save another."""
    short = ("training.max_steps=2", "training.save_model=true", "evaluation.before_training=false")
    config = composed(f"task={task}", "scale=smoke", "hardware=cpu", "evaluation.limit=2", *short)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = tasks.by_name(task).save

    def save_on_a_full_disk(self: tasks.Task, folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        try:
            save(self, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    with monkeypatch.context() as patch:
        patch.setattr(tasks.by_name(task), "save", save_on_a_full_disk)
        with pytest.raises(ExperimentError, match=r"model: could not be written .*too large"):
            execute(config)
    assert checkpoint_names(config)[-1].startswith("step-00000002")
    assert not list(RunFolder(config).path.glob("*model*"))
    execute(config)
    assert "from step 2" in capsys.readouterr().out
    assert RunFolder(config).model.is_dir()


@pytest.mark.usefixtures("capsys")  # without it pytest keeps the output in files, limited too
def test_a_full_disk_where_metrics_are_logged_is_the_same_sentence(
    composed: Compose, quick: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*quick)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        at_step(6, patch, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10, unlimited[1])))
        try:
            with pytest.raises(ExperimentError, match=r"metrics.jsonl: could not be written"):
                execute(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("parallel", "optimizer"), [("ddp", "microadam"), ("fsdp2", "microadam"), ("fsdp2", "adamw")]
)
def test_a_checkpoint_with_a_flipped_bit_is_passed_over_for_the_one_before(
    composed: Compose,
    quick: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    parallel: str,
    optimizer: str,
) -> None:
    """torch.load reads it without a word."""
    choice = (*quick, f"hardware.parallel={parallel}", f"optimizer={optimizer}")
    config = composed(*choice)
    with monkeypatch.context() as patch:
        at_step(8, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            execute(config)
    newest = sorted(RunFolder(config).checkpoints.iterdir())[-1]
    flip_a_bit(next(newest.glob("*.distcp")) if newest.is_dir() else newest)
    execute(config)
    printed = capsys.readouterr().out
    assert f"{newest} is damaged or cut short" in printed
    assert "from step 4" in printed
    undisturbed = composed(*choice, f"results_dir={tmp_path / 'undisturbed'}")
    execute(undisturbed)
    assert outcome(config) == outcome(undisturbed)


def test_a_gradient_that_is_not_finite_is_traced_to_its_parameters(
    composed: Compose,
    quick: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One weight of one layer is poisoned behind the fourth step."""
    config = composed(*quick)
    loss_sum = GSM8K.loss_sum
    num_calls = 0

    def loss_of_a_poisoned_model(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 5 and model.training:
            model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.inf
        return loss_sum(model, batch)

    monkeypatch.setattr(GSM8K, "loss_sum", staticmethod(loss_of_a_poisoned_model))
    execute(config)
    printed = capsys.readouterr().err
    assert "diverged: the loss became nan at step" in printed
    assert "not finite in the weights of: model.layers.1.mlp.up_proj.weight (1 of 8192)" in printed
    assert "not finite in the gradients of: model.embed_tokens.weight (" in printed
    assert "largest gradient norms: " in printed


def hold(config: RunConfig, ready: Any) -> None:
    with RunFolder(config).locked():
        ready.send("held")
        signal.pause()


def test_the_second_process_on_a_run_is_told_who_has_it(
    composed: Compose, quick: tuple[str, ...]
) -> None:
    config = composed(*quick)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    holder = start(hold, config, sender)
    assert receiver.recv() == "held"
    with pytest.raises(ExperimentError, match=f"is being run by process {holder.pid} on .* since"):
        execute(config)
    holder.kill()
    holder.join()
    execute(config)
    assert RunFolder(config).finished_record() is not None


def test_runs_that_are_killed_at_random_end_like_one_that_is_not(tmp_path: Path) -> None:
    """The short form of ``make soak``."""
    *_, report = soak.soak(num_kills=3, seed=1, folder=tmp_path)
    assert len(report.kills) == 3
    assert report.num_runs >= 1
    text = soak.to_markdown(report, "command")
    assert "3 kills of" in text
    assert all(place in text for place in soak.PLACES)
