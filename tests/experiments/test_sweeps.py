"""Sweeps: what fails is told and stops nothing, what is missing is run."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf

from experiments.runs import reading
from run import Sweep
from tests.experiments.helpers import ROOT

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

    finished = {run.config["seed"]: run for run in reading.find(tmp_path) if run.metrics}
    assert finished.keys() == {42, 43}
    for record in tmp_path.glob("records/*.json"):  # says how to repeat the job, not the sweep
        values = json.loads(record.read_text(encoding="utf-8"))
        job = ("+sweep=seeds", f"seed={values['seed']}", "task.max_length=512")
        assert {*job} < {*values["command"].split()}
    second = _sweep(tmp_path, *launched)  # all three seeds, of which one is missing
    assert second.returncode == 0
    assert second.stdout.count("already finished") == 2
    again = {run.config["seed"]: run for run in reading.find(tmp_path) if run.metrics}
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


def test_a_failed_job_leaves_no_memory_to_the_jobs_after_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hydra kept the exception: one job that ran out of GPU memory made all others run out, too."""
    weights: list[weakref.ref[torch.nn.Module]] = []

    def job() -> None:
        model = torch.nn.Linear(8, 8)
        weights.append(weakref.ref(model))
        raise torch.OutOfMemoryError("CUDA out of memory")

    returned = JobReturn(status=JobStatus.FAILED)
    try:
        job()
    except torch.OutOfMemoryError as error:
        returned.return_value = error
    hydra = {"mode": RunMode.MULTIRUN, "job": {"num": 0}, "sweep": {"dir": str(tmp_path)}}
    config = OmegaConf.create({"hydra": {**hydra, "overrides": {"task": ["seed=1"]}}})
    Sweep().on_job_end(config, returned)
    gc.collect()
    assert weights[0]() is None
    assert "job 0 failed: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().err
