"""What a run's folder says about the run, and the list of all runs."""

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
from experiments.runner import execute
from experiments.runs import reading
from experiments.runs.folder import RunFolder
from tests.experiments.helpers import ROOT, Compose

SHORT = ("scale=smoke", "hardware=cpu", "training.max_steps=2", "evaluation.harness={}")


def _interrupted(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
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
            assert reading.read(run.path).state == "running"
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
    states = {run.path: run.state for run in reading.find(results)}
    assert states == {
        RunFolder(finished).path: "finished",
        RunFolder(failed).path: "failed",
        RunFolder(interrupted).path: "interrupted",
    }
    with RunFolder(interrupted).locked():
        assert reading.read(RunFolder(interrupted).path).state == "running"
    execute(composed(*SHORT, "seed=1", "force=true"))  # keeps the old folder, which is no run
    assert len(reading.find(results)) == 3

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
    assert reading.read(record.parent).state == "finished"


def test_the_status_counts_the_steps_of_a_run_in_epochs(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many they are is known once its data is read."""
    config = composed("scale=smoke", "hardware=cpu", "training.epochs=0.5", "evaluation.limit=1")
    _interrupted(config, monkeypatch)
    run = reading.read(RunFolder(config).path)
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
        run = reading.read(tmp_path)
        assert reading.headline(run.metrics).removeprefix("accuracy ") == score
        assert (run.num_steps, run.metrics.get("eval/loss")) == (step, loss)
        assert run.metrics.get("train/loss") == (1.0 if step else None)


def test_the_status_of_a_folder_that_is_not_there_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        status.main([str(tmp_path / "none")])
    assert "none: there is no such folder" in capsys.readouterr().err


def test_ages_are_readable() -> None:
    ages = [status.age(seconds) for seconds in (5, 150, 7300, 200_000)]
    assert ages == ["5 s", "2 min", "2 h", "2 d"]


def test_the_list_of_runs_loads_no_torch() -> None:
    code = "import sys, experiments.status; print({'torch', 'hydra'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout == "set()\n"
