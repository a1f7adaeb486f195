"""Runs in several processes: the same training, whichever way the work is dealt out."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.config import RunConfig
from experiments.errors import ExperimentError
from experiments.runs.folder import RunFolder
from tests.experiments.helpers import ROOT, SHORT, Compose, outcome, run_py, write_problems
from tests.processes import preload, run_on_ranks

preload("experiments.runner", "experiments.evaluation", "experiments.tasks.gsm8k", "run")


@pytest.fixture
def quick(tmp_path: Path) -> tuple[str, ...]:
    """Overrides for a run of a second or two."""
    write_problems(tmp_path / "gsm8k", num_train=16, num_test=1)
    return (
        *SHORT,
        f"dataset.path={tmp_path / 'gsm8k'}",
        "evaluation.limit=1",
        "evaluation.before_training=false",
        "training.max_steps=6",
        "training.global_batch_size=4",
        "training.checkpoint_every_steps=2",
    )


def execute_on_rank(config: RunConfig, killed_at: int | None = None) -> int:
    """The exit code; rank 0 may be killed as soon as it has logged a step."""
    from experiments.runner import execute

    append_metrics = RunFolder.append_metrics

    def append_or_die(self: RunFolder, metrics: dict[str, Any]) -> None:
        append_metrics(self, metrics)
        if metrics["step"] == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    RunFolder.append_metrics = append_or_die  # type: ignore[method-assign]
    try:
        execute(config)
    except SystemExit as end:
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 130  # as run.py
    return 0


def losses(config: RunConfig) -> list[float]:
    return [m["train/loss"] for m in RunFolder(config).metrics() if "train/loss" in m]


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_killed_run_goes_on_with_as_many_processes_or_with_one_or_four(
    composed: Compose, quick: tuple[str, ...], tmp_path: Path, parallel: str
) -> None:
    """Bit for bit with as many; with others up to the order of sums, and to MicroAdam's blocks.

    An evaluation between steps is a part of it, and is repeated where the run resumes.
    """
    shared = (*quick, f"hardware.parallel={parallel}", "evaluation.every_steps=4")

    def run_in(folder: str) -> RunConfig:
        return composed(*shared, f"results_dir={tmp_path / folder}")

    alone, undisturbed, killed = run_in("alone"), run_in("undisturbed"), run_in("killed")
    run_on_ranks(1, execute_on_rank, alone)
    run_on_ranks(2, execute_on_rank, undisturbed)
    tolerance = 2e-3 if parallel == "fsdp2" else 1e-6
    assert losses(undisturbed) == pytest.approx(losses(alone), rel=tolerance)
    held_out = [outcome(config)[1]["eval/loss"] for config in (undisturbed, alone)]
    assert held_out[0] == pytest.approx(held_out[1], rel=tolerance)

    with pytest.raises(AssertionError, match="rank 0 died"):
        run_on_ranks(2, execute_on_rank, killed, 5)
    assert RunFolder(killed).finished_record() is None
    for world_size in (1, 4):
        shutil.copytree(tmp_path / "killed", tmp_path / f"killed-{world_size}")
    run_on_ranks(2, execute_on_rank, killed)
    assert outcome(killed) == outcome(undisturbed)
    assert [m["step"] for m in RunFolder(killed).metrics() if "eval/loss" in m] == [4, 6]
    for world_size in (1, 4):
        moved = run_in(f"killed-{world_size}")
        run_on_ranks(world_size, execute_on_rank, moved)
        assert losses(moved)[:4] == losses(undisturbed)[:4]
        assert losses(moved) == pytest.approx(losses(undisturbed), rel=1e-3)
        record = RunFolder(moved).finished_record()
        assert record is not None
        assert record["hardware"]["num_processes"] == world_size


def gradients_are_in_buckets(config: RunConfig) -> bool:
    """Whether all gradients lie in the memory that DDP sends, rather than beside it."""
    import torch

    from experiments import distributed, hardware
    from experiments.parallel import Parallel

    def loss_sum(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).sum()

    machine = hardware.resolve(config.hardware)
    task: Any = SimpleNamespace(model=torch.nn.Linear(64, 64), loss_sum=loss_sum)
    with distributed.started(config, machine):
        parallel = Parallel(task, config, machine)
        parallel.loss_sum(torch.ones(2, 64)).backward()
        gradients = [p.grad for p in task.model.parameters()]
        return len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == 1


@pytest.mark.distributed
def test_ddp_does_not_hold_all_gradients_twice(composed: Compose) -> None:
    """The plan does not count a copy, with which Llama-2-13B would not fit 80 GB."""
    config = composed("scale=smoke", "hardware=cpu")
    assert run_on_ranks(2, gradients_are_in_buckets, config) == [True, True]


@pytest.mark.distributed
def test_mixed_precision_on_shards_is_that_of_one_process(
    composed: Compose, quick: tuple[str, ...], tmp_path: Path
) -> None:
    """FSDP2 gathers weights in bfloat16, sums gradients and keeps both in float32."""

    def run_in(folder: str, *overrides: str) -> RunConfig:
        shared = (*quick, "hardware.precision=bf16_amp", f"results_dir={tmp_path / folder}")
        return composed(*shared, *overrides)

    alone, sharded = run_in("alone"), run_in("sharded", "hardware.parallel=fsdp2")
    run_on_ranks(1, execute_on_rank, alone)
    run_on_ranks(2, execute_on_rank, sharded)
    assert losses(sharded) == pytest.approx(losses(alone), rel=1e-2)


def interrupted_rank(config: RunConfig, number: int, ranks: str) -> int:
    """Some ranks get a signal in their third step."""
    from experiments import training

    step, num_calls = training._step, 0

    def step_and_signal(*arguments: Any) -> dict[str, Any]:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3 and os.environ["RANK"] in ranks:
            os.kill(os.getpid(), number)
        return step(*arguments)

    training._step = step_and_signal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background
    return execute_on_rank(config)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "ranks", "codes"),
    [(signal.SIGTERM, "1", [75, 75]), (signal.SIGINT, "01", [130, 130])],
)
def test_a_signal_stops_all_processes_behind_the_same_checkpoint(
    composed: Compose, quick: tuple[str, ...], number: int, ranks: str, codes: list[int]
) -> None:
    """A cluster's to one of them, as Ctrl-C, which all get."""
    config = composed(*quick, "training.checkpoint_every_steps=100")
    assert run_on_ranks(2, interrupted_rank, config, number, ranks) == codes
    assert len(losses(config)) == 3
    assert [p.name for p in RunFolder(config).checkpoints.iterdir()] == ["step-00000003.pt"]


def written_in_a_started_run(config: RunConfig, folder: Path) -> bool:
    """Whether standard output is the process's own again behind the block."""
    from experiments import hardware
    from experiments.distributed import started

    with (folder / os.environ["RANK"]).open("w") as file:
        sys.stdout = file
        with started(config, hardware.resolve(config.hardware)):
            sys.stdout.write("by a library")
            sys.stdout.flush()
        return sys.stdout is file


@pytest.mark.distributed
def test_only_the_first_process_prints_and_the_others_may_write(
    composed: Compose, tmp_path: Path
) -> None:
    """sys.stdout was None on the others, where a library's own write ended the run."""
    assert run_on_ranks(2, written_in_a_started_run, composed(*SHORT), tmp_path) == [True, True]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["by a library", ""]


def test_a_sweep_in_several_processes_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run.py"), "--multirun", *SHORT, "seed=1,2"]
    done = subprocess.run(
        [*command, f"results_dir={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"WORLD_SIZE": "2", "RANK": "0"},
    )
    assert done.returncode == 2
    assert "start torchrun once for each job" in done.stderr
    assert not list(tmp_path.iterdir())


def run_py_on_rank(arguments: list[str], folder: Path) -> int:
    return run_py(arguments, folder / os.environ["RANK"])


@pytest.mark.distributed
def test_an_error_of_one_process_ends_all_with_one_message(
    composed: Compose, quick: tuple[str, ...], tmp_path: Path
) -> None:
    config = composed(*quick)
    with RunFolder(config).locked():
        arguments = [*quick, f"results_dir={config.results_dir}"]
        codes = run_on_ranks(2, run_py_on_rank, arguments, tmp_path)
    assert codes == [2, 1]
    assert f"is being run by process {os.getpid()}" in (tmp_path / "0.err").read_text()
    for name in ("0.out", "1.out", "1.err"):
        assert not (tmp_path / name).read_text()


@pytest.mark.distributed
def test_torchrun_starts_a_run_that_prints_once(quick: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [str(ROOT / "run.py"), *quick, "training.max_steps=1", f"results_dir={tmp_path}"]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.count("2 processes (ddp)") == 1
    assert done.stdout.count("record.json") == 1


def test_a_batch_that_cannot_be_shared_out_equally_is_refused(
    composed: Compose,
) -> None:
    from experiments.data.order import DataOrder

    training = composed("scale=smoke").training
    with pytest.raises(ExperimentError, match=r"global_batch_size=8: .* of the 3 processes"):
        DataOrder(training, 64, 0, rank=0, world_size=3)
    shares = [DataOrder(training, 64, 0, rank, 4)[5] for rank in range(4)]
    assert sorted(itertools.chain(*shares)) == sorted(DataOrder(training, 64, 0)[5])
