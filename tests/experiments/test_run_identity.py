"""Which run a config is: what shares its folder, what goes on from there, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import hardware
from experiments.errors import ExperimentError
from experiments.runner import _command, execute
from experiments.runs.folder import RunFolder
from experiments.runs.identity import run_hash
from tests.experiments.helpers import (
    BRIEF,
    ROOT,
    SHORT,
    Compose,
    outcome,
    without_clocks,
    write_problems,
)
from tests.experiments.stopping import interrupt_at, stopped_at_the_end


def test_equal_configs_share_a_folder_and_what_does_not_change_the_run_does_not_count(
    composed: Compose,
) -> None:
    here = run_hash(composed("scale=smoke"))
    monitoring = ("logger=wandb", "force=true", "dry_run=true", "evaluation.every_steps=3")
    assert run_hash(composed("scale=smoke", *monitoring)) == here
    assert run_hash(composed("scale=smoke", "optimizer.lr=0.5")) != here
    assert run_hash(composed("scale=smoke", "seed=1")) != here
    pinned = ("dataset.source=hub", "dataset.revision=v1")
    assert run_hash(composed("scale=smoke", *pinned)) != run_hash(
        composed("scale=smoke", pinned[0])
    )


def test_a_run_on_local_data_is_another_run_wherever_that_data_lies(
    composed: Compose, tmp_path: Path
) -> None:
    elsewhere = run_hash(composed())
    for root in ("one", "two"):
        (tmp_path / root / "gsm8k").mkdir(parents=True)
    hashes = {run_hash(composed(f"dataset.root={tmp_path / root}")) for root in ("one", "two")}
    assert len(hashes) == 1
    assert elsewhere not in hashes
    assert run_hash(composed(f"dataset.root={tmp_path}")) == elsewhere


def test_a_records_command_says_what_the_run_is_and_no_more() -> None:
    own = ["optimizer=adamw", "seed=7"]
    others = [
        "force=true",
        "results_dir=a",
        "dataset.root=b",
        "logger=wandb",
        "logger.mode=offline",
    ]
    assert _command([*others, *own]) == "python run.py optimizer=adamw seed=7"


def test_a_finished_run_is_left_alone_unless_forced_and_then_kept(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(*SHORT, "training.max_steps=2")
    execute(config)
    first = RunFolder(config).finished_record()
    execute(config)
    how = f"on {first['hardware']['cpu']} in fp32"
    assert f"already finished {how}; force=true" in capsys.readouterr().out
    assert RunFolder(config).finished_record() == first
    (copy,) = Path(config.results_dir, "records").glob("*.json")
    copy.unlink()
    written_at = (RunFolder(config).path / "record.json").stat().st_mtime_ns
    execute(config)
    assert json.loads(copy.read_text()) == first
    assert (RunFolder(config).path / "record.json").stat().st_mtime_ns == written_at
    execute(composed(*SHORT, "training.max_steps=2", "force=true"))
    assert outcome(config)[1] == without_clocks(first["metrics"])
    kept = [path for path in RunFolder(config).path.parent.iterdir() if path.is_dir()]
    assert len(kept) == 2


def test_a_run_that_another_process_has_is_refused(composed: Compose) -> None:
    config = composed(*SHORT)
    with (
        RunFolder(config).locked(),
        pytest.raises(ExperimentError, match=f"is being run by process {os.getpid()}"),
    ):
        execute(config)


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [("microadam", "fp32"), ("microadam", "bf16"), ("microadam", "bf16_amp"), ("adamw", "bf16")],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, optimizer: str, precision: str
) -> None:
    """Between two checkpoints, in the middle of MicroAdam's window."""
    choice = (*SHORT, f"optimizer={optimizer}", f"hardware.precision={precision}")
    undisturbed = composed(*choice, "results_dir=undisturbed")
    config = composed(*choice)
    monkeypatch.chdir(Path(config.results_dir).parent)
    execute(undisturbed)
    with monkeypatch.context() as patch:
        interrupt_at(6, patch)
        with pytest.raises(KeyboardInterrupt):
            execute(config)
    assert RunFolder(config).finished_record() is None
    execute(config)
    assert outcome(config) == outcome(undisturbed)


def test_a_killed_process_leaves_what_the_same_command_needs(
    composed: Compose, tmp_path: Path
) -> None:
    config = composed(*SHORT, "training.max_steps=30")
    undisturbed = composed(*SHORT, "training.max_steps=30", f"results_dir={tmp_path / 'other'}")
    command = [sys.executable, str(ROOT / "run.py"), *SHORT, "training.max_steps=30"]
    command.append(f"results_dir={config.results_dir}")
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    run = RunFolder(config)
    while len(run.metrics()) < 10 and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    execute(config)
    execute(undisturbed)
    assert outcome(config) == outcome(undisturbed)


def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(*SHORT)
    newest, _ = stopped_at_the_end(config, monkeypatch)
    newest.write_bytes(newest.read_bytes()[:-1000])
    execute(config)
    printed = capsys.readouterr().out
    assert "damaged or cut short" in printed
    assert "from step 4" in printed
    undisturbed = composed(*SHORT, f"results_dir={config.results_dir}-2")
    execute(undisturbed)
    assert outcome(config) == outcome(undisturbed)


def test_checkpoints_that_cannot_be_used_are_refused_and_kept(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*SHORT)
    paths = stopped_at_the_end(config, monkeypatch)
    payload = torch.load(paths[0], weights_only=True)
    torch.save({**payload, "config_hash": "0123456789"}, paths[0])
    with pytest.raises(ExperimentError, match=r"config_hash is 0123456789.*force=true"):
        execute(config)
    without = {name: payload[name] for name in payload if name not in ("data_digest", "precision")}
    torch.save(without, paths[0])
    with pytest.raises(ExperimentError, match=r"not say its data_digest and precision.*force=true"):
        execute(config)
    for path in paths:
        path.write_bytes(b"not a checkpoint")
    with pytest.raises(ExperimentError, match=r"no checkpoint in it can be read.*force=true"):
        execute(config)
    assert all(path.exists() for path in paths)
    execute(composed(*SHORT, "force=true"))  # the remedy that both messages name
    assert RunFolder(config).finished_record() is not None
    kept = RunFolder(config).path.parent.rglob("step-*.pt")
    assert sorted(path.name for path in kept) == sorted(path.name for path in paths)


def test_a_run_does_not_go_on_with_other_data(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One number of one row is another one; the config, and so the folder, is the same."""
    write_problems(tmp_path / "gsm8k", num_train=16, num_test=2)
    config = composed(*BRIEF, f"dataset.path={tmp_path / 'gsm8k'}")
    stopped_at_the_end(config, monkeypatch)
    rows = tmp_path / "gsm8k/train.jsonl"
    text = rows.read_text()
    *_, last = re.finditer(r"\d", text)
    rows.write_text(text[: last.start()] + str((int(last[0]) + 1) % 10) + text[last.end() :])
    with pytest.raises(ExperimentError, match=r"data_digest is \w+, .*force=true .*results_dir"):
        execute(config)
    rows.write_text(text)
    rows.touch()
    execute(config)
    record = RunFolder(config).finished_record()
    assert record is not None
    assert len(record["data_digest"]) == 16


def test_a_run_does_not_go_on_in_another_precision(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The automatic one is bf16 where there is a GPU, and was fp32 where the run began."""
    config = composed(*BRIEF, "hardware=auto")
    stopped_at_the_end(config, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(hardware, "resolve_precision", lambda _: "bf16")
        with pytest.raises(ExperimentError, match=r"precision is fp32, this run's is bf16; use fo"):
            execute(config)
    execute(config)
    assert RunFolder(config).finished_record() is not None
