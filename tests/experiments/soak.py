"""Kills runs at random moments until they are through, and compares what they measured.

``make soak`` writes results/soak.json and results/soak.md. Every process is ``run.py``, forked from
a server that has imported its libraries, so that the kills hit the run and not the imports. Half of
the kills wait until the run trains: starting takes most of such a short one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments import atomic
from experiments.runs.interruption import EXIT_CODE
from experiments.runs.provenance import provenance
from tests.experiments.helpers import SHORT, run_py, without_clocks, write_problems
from tests.processes import preload, start

NUM_STEPS = 20
RUN = (
    *SHORT,
    f"training.max_steps={NUM_STEPS}",
    "training.global_batch_size=4",
    "training.checkpoint_every_steps=2",
    "evaluation.limit=1",
)
PLACES = (
    "start-up and first evaluation",
    "training",
    "writing a checkpoint",
    "last evaluation and record",
)


@dataclass(frozen=True)
class Kill:
    signal: str
    place: str  # one of PLACES
    logged_step: int  # the last one in metrics.jsonl
    kept_step: int  # of the newest checkpoint; 0: the run starts anew
    exit_code: int


@dataclass(frozen=True)
class Report:
    kills: list[Kill]
    num_runs: int  # each killed until it was through, then compared
    duration_s: float


def soak(num_kills: int, seed: int, folder: Path) -> Iterator[Report]:
    """Yields what happened so far whenever a run is through, at last after ``num_kills``.

    Raises:
        AssertionError: a run failed in another way than by the kill, or measured something else.
    """
    started = time.perf_counter()
    rng = random.Random(seed)
    write_problems(folder / "gsm8k", num_train=16, num_test=1)
    expected, *_ = _finish(folder, "undisturbed")
    again, start_up_s, rest_s = _finish(folder, "undisturbed-2")  # without the server's start
    assert again == expected, "two undisturbed runs differ"
    kills: list[Kill] = []
    num_runs = 0
    while len(kills) < num_kills:
        name = f"run-{num_runs}"
        while len(kills) < num_kills and not _record(folder, name).exists():
            number = rng.choice((signal.SIGKILL, signal.SIGTERM))
            trains = rng.random() < 0.5
            after_s = rng.uniform(0, rest_s if trains else start_up_s)
            kill = _start_and_kill(folder, name, number, trains, after_s)
            if kill:
                kills.append(kill)
                print(f"{len(kills)}/{num_kills}: {kill}", flush=True)
        found, *_ = _finish(folder, name)
        assert found == expected, f"{name} measured something else than the undisturbed run"
        num_runs += 1
        yield Report(list(kills), num_runs, time.perf_counter() - started)


def _start(folder: Path, name: str) -> Any:
    folder.joinpath(f"{name}.err").write_text("")  # not the last one's
    arguments = [*RUN, f"dataset.path={folder / 'gsm8k'}", f"results_dir={folder / name}"]
    return start(_process, arguments, folder / name)


def _process(arguments: list[str], output: Path) -> None:
    raise SystemExit(run_py(arguments, output))


def _wait_for_training(process: Any, folder: Path, name: str) -> None:
    while process.is_alive() and not _trains(folder, name):
        time.sleep(0.01)


def _trains(folder: Path, name: str) -> bool:
    return "train:" in folder.joinpath(f"{name}.err").read_text()  # the progress bar


def _start_and_kill(
    folder: Path, name: str, number: signal.Signals, trains: bool, after_s: float
) -> Kill | None:
    """Kills so long after the start, or after training began; None where the run was through."""
    process = _start(folder, name)
    if trains:
        _wait_for_training(process, folder, name)
    process.join(after_s)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join()
    expected = {0, -number} | ({EXIT_CODE} if number == signal.SIGTERM else set())
    assert process.exitcode in expected, folder.joinpath(f"{name}.err").read_text()
    steps = [metrics["step"] for metrics in _metrics(folder, name)]
    checkpoints = sorted(folder.joinpath(name).rglob("step-*.pt"))
    if process.exitcode == 0:
        return None
    if not _trains(folder, name):
        place = PLACES[0]
    elif list(folder.joinpath(name).rglob(".step-*.partial")):
        place = PLACES[2]
    else:
        place = PLACES[3 if steps[-1] == NUM_STEPS else 1]
    return Kill(
        number.name,
        place,
        logged_step=steps[-1] if steps else 0,
        kept_step=int(checkpoints[-1].stem.removeprefix("step-")) if checkpoints else 0,
        exit_code=process.exitcode,
    )


def _finish(folder: Path, name: str) -> tuple[list[dict[str, Any]], float, float]:
    """Runs to the end; the metrics apart from the clocks, and the seconds before training and from
    there on."""
    started = time.perf_counter()
    process = _start(folder, name)
    _wait_for_training(process, folder, name)
    trains = time.perf_counter()
    process.join()
    assert process.exitcode == 0, folder.joinpath(f"{name}.err").read_text()
    record = json.loads(_record(folder, name).read_text())
    metrics = [without_clocks(m) for m in (*_metrics(folder, name), record["metrics"])]
    return metrics, trains - started, time.perf_counter() - trains


def _record(folder: Path, name: str) -> Path:
    return next(folder.joinpath(name).glob("runs/*/*/*/*/record.json"), Path("not there"))


def _metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    """The complete lines."""
    path = next(folder.joinpath(name).glob("runs/*/*/*/*/metrics.jsonl"), None)
    lines = path.read_text().splitlines(keepends=True) if path else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def to_markdown(report: Report, command: str) -> str:
    """Kills by place and signal, and what came after."""
    counts = Counter((kill.place, kill.signal) for kill in report.kills)
    lost = [kill.logged_step - kill.kept_step for kill in report.kills]
    lines = [
        "# Soak test: runs killed at random moments",
        "",
        f"{len(report.kills)} kills of {report.num_runs} runs of {NUM_STEPS} steps with a "
        "checkpoint every 2; each run was started again until it was through. "
        f"**All {report.num_runs} ended with the metrics of the undisturbed run, bit for bit.**",
        "",
        "| where it hit | SIGKILL | SIGTERM |",
        "|---|---:|---:|",
        *(
            f"| {place} | {counts[place, 'SIGKILL']} | {counts[place, 'SIGTERM']} |"
            for place in PLACES
        ),
        "",
        f"A kill cost at most {max(lost, default=0)} steps. "
        f"{sum(k.exit_code == EXIT_CODE for k in report.kills)} processes left with exit code "
        f"{EXIT_CODE} on SIGTERM.",
        "",
        f"{report.duration_s / 60:.0f} minutes; `{command}`",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = f"python -m tests.experiments.soak --kills {arguments.kills} --seed {arguments.seed}"
    code = provenance()
    with tempfile.TemporaryDirectory() as folder:
        for report in soak(arguments.kills, arguments.seed, Path(folder)):
            record = {"command": command, **asdict(report), **code}
            atomic.write_text(arguments.results / "soak.json", json.dumps(record, indent=2) + "\n")
            atomic.write_text(arguments.results / "soak.md", to_markdown(report, command))


preload("experiments.runner", "experiments.evaluation", "experiments.tasks.gsm8k", "run", "lm_eval")

if __name__ == "__main__":
    main()
