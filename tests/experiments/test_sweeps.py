"""Sweeps: what fails is told and stops nothing, what is missing is run; the list of all runs."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from experiments import status
from experiments.config import RunConfig
from experiments.errors import ExperimentError
from experiments.records import RunFolder
from experiments.runner import execute
from tests.experiments.helpers import ROOT, Compose

SHORT = ("scale=smoke", "hardware=cpu", "training.max_steps=2", "evaluation.harness={}")


def _sweep(results: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run.py"), "--multirun", *SHORT, *overrides]
    command.append(f"results_dir={results}")
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("launcher", ["basic", pytest.param("joblib", marks=pytest.mark.slow)])
def test_a_failed_job_is_told_and_the_others_run_and_are_not_repeated(
    tmp_path: Path, launcher: str
) -> None:
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    launched = (f"hydra/launcher={launcher}", "evaluation.before_training=false", "+sweep=seeds")
    first = _sweep(tmp_path, *launched, "seed=42,43", "task.max_length=10,512")
    assert first.returncode == 1
    table = first.stdout[first.stdout.index("Sweep of 4 jobs") :].splitlines()
    assert [line.split()[:4] for line in table[3:7]] == [
        ["0", "seed=42", "task.max_length=10", "failed"],
        ["1", "seed=42", "task.max_length=512", "finished"],
        ["2", "seed=43", "task.max_length=10", "failed"],
        ["3", "seed=43", "task.max_length=512", "finished"],
    ]
    assert "job 0 failed: task.max_length=10: every training example is longer" in table[7]
    if launcher == "basic":  # told before the next job starts, not only at the end
        assert first.stderr.index("error: job 0 failed") < first.stderr.index("train:")

    finished = {run.config["seed"]: run for run in status.find(tmp_path) if run.metrics}
    assert finished.keys() == {42, 43}
    for record in tmp_path.glob("records/*.json"):  # says how to repeat the job, not the sweep
        values = json.loads(record.read_text(encoding="utf-8"))
        job = ("+sweep=seeds", f"seed={values['seed']}", "task.max_length=512")
        assert {*job} < {*values["command"].split()}
    second = _sweep(tmp_path, *launched)  # all three seeds, of which one is missing
    assert second.returncode == 0
    assert second.stdout.count("already finished") == 2
    again = {run.config["seed"]: run for run in status.find(tmp_path) if run.metrics}
    assert again.keys() == {42, 43, 44}
    for seed, run in finished.items():
        assert again[seed].metrics["time/wall_s"] == run.metrics["time/wall_s"]
    assert {**again[44].config, "seed": 42} == again[42].config


def test_a_sweep_whose_results_cannot_be_written_says_where_in_a_line(tmp_path: Path) -> None:
    file = tmp_path / "results"
    file.write_text("mine")
    for folder in (file, Path("/proc/none")):  # there nobody can make a folder
        done = _sweep(folder, "seed=1,2")
        assert done.returncode == 2
        (message,) = done.stderr.splitlines()
        assert message.startswith(f"error: {folder}/sweeps/")
        assert "could not be written" in message
    assert file.read_text() == "mine"


def _interrupted(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("experiments.training.checkpoints.save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            execute(config)


def test_a_run_starts_while_its_status_is_read(composed: Compose) -> None:
    """To look, `experiments.status` holds the lock for an instant: a run once was refused by it."""
    run = RunFolder(composed(*SHORT))
    run.path.parent.mkdir(parents=True)
    with run.path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        timer = threading.Timer(0.2, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        with run.locked():
            assert status.read(run.path).state == "running"
        timer.join()


def test_the_status_lists_every_run_with_its_state(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished, failed, interrupted = (
        composed(*SHORT, "seed=1"),
        composed(*SHORT, "task.max_length=10"),
        composed(*SHORT, "seed=2"),
    )
    execute(finished)
    with pytest.raises(ExperimentError):
        execute(failed)
    _interrupted(interrupted, monkeypatch)
    results = Path(finished.results_dir)
    states = {run.path: run.state for run in status.find(results)}
    assert states == {
        RunFolder(finished).path: "finished",
        RunFolder(failed).path: "failed",
        RunFolder(interrupted).path: "interrupted",
    }
    with RunFolder(interrupted).locked():
        assert status.read(RunFolder(interrupted).path).state == "running"
    execute(composed(*SHORT, "seed=1", "force=true"))  # keeps the old folder, which is no run
    assert len(status.find(results)) == 3

    capsys.readouterr()
    status.main([str(results)])
    printed = capsys.readouterr().out
    record = json.loads((RunFolder(finished).path / "record.json").read_text())
    assert f"{record['metrics']['eval/loss']:.3f}" in printed
    for words in ("gsm8k  tiny_llama  microadam", "interrupted", "max_length=10: every training"):
        assert words in printed
    (results / "nothing").mkdir()
    status.main([str(results / "nothing")])
    assert "no runs below" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("record.json", '{"status": "fini'),
        ("record.json", "[]"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n'),
        ("metrics.jsonl", "3\n"),
        ("config.yaml", "a: [1"),
        ("config.yaml", ""),
    ],
)
def test_a_broken_run_is_listed_as_that_and_the_others_with_it(
    composed: Compose, capsys: pytest.CaptureFixture[str], file: str, content: str
) -> None:
    """One cut-off record ended the list of all runs with a traceback."""
    config = composed(*SHORT, "evaluation.before_training=false")
    execute(config)
    run = RunFolder(config)
    broken = run.path.with_name("0123456789")
    broken.mkdir()
    (broken / file).write_text(content)
    capsys.readouterr()
    status.main([config.results_dir])
    printed = capsys.readouterr().out
    steps = {line.split()[3]: line.split()[6:8] for line in printed.splitlines()[2:3]}
    assert steps == {run.hash: ["finished", "2/2"]}
    assert f"{broken / file} is broken (" in printed
    assert "force=true" in printed


def test_a_run_with_a_broken_record_says_so_and_can_run_again(composed: Compose) -> None:
    config = composed(*SHORT, "evaluation.before_training=false")
    record = RunFolder(config).path / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text("{")
    with pytest.raises(ExperimentError, match=r"record\.json is broken .*force=true"):
        execute(config)
    execute(composed(*SHORT, "evaluation.before_training=false", "force=true"))
    assert status.read(record.parent).state == "finished"


def test_the_status_counts_the_steps_of_a_run_in_epochs(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many they are is known once its data is read."""
    config = composed("scale=smoke", "hardware=cpu", "training.epochs=0.5", "evaluation.limit=1")
    _interrupted(config, monkeypatch)
    run = status.read(RunFolder(config).path)
    assert (run.state, run.num_steps, run.total_steps) == ("interrupted", 4, 4)


def test_the_status_of_a_run_that_trains_has_no_score_of_an_earlier_model(tmp_path: Path) -> None:
    """The untrained model's stood beside the current loss."""
    before = {"step": 0, "eval/loss": 2.0, "eval/accuracy": 0.3}
    trained = {"step": 2, "num_steps": 2, "train/loss": 1.0}
    after = {"step": 2, "eval/loss": 1.5, "eval/accuracy": 0.6}
    lines = [before, {**trained, "step": 1}, trained, after]
    expected = [("30.0%", 0, 2.0), ("", 1, None), ("", 2, None), ("60.0%", 2, 1.5)]
    for num_lines, (score, step, loss) in enumerate(expected, start=1):
        text = "".join(json.dumps(line) + "\n" for line in lines[:num_lines])
        (tmp_path / "metrics.jsonl").write_text(text)
        run = status.read(tmp_path)
        assert status.headline(run.metrics).removeprefix("accuracy ") == score
        assert (run.num_steps, run.metrics.get("eval/loss")) == (step, loss)
        assert run.metrics.get("train/loss") == (1.0 if step else None)


def test_ages_are_readable() -> None:
    ages = [status.age(seconds) for seconds in (5, 150, 7300, 200_000)]
    assert ages == ["5 s", "2 min", "2 h", "2 d"]
