"""Makes a table of the paper: plans its runs, does the missing ones, and writes it from records.

    python -m scripts.table table1                                       at mini scale
    python -m scripts.table table1 --dry                                 only show what would run
    python -m scripts.table table1 --jobs 2                              two runs at a time
    python -m scripts.table table1 --scale paper --hardware a100_80gb --launcher submitit_slurm

It can be stopped at any time; run the same command again to resume (after --fresh, add the time
that it prints). A table is a file in configs/table/:

    optimizers, models    a row for each pair: its label, and run.py's overrides
    columns               metrics of a record (several: the mean of those present) and their unit
    seeds                 the learning rates are tried with the first
    learning_rates        all those to try, by optimizer (and model); default: the preset's
    overrides             by optimizer, what else differs at this scale
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import yaml
from tqdm import tqdm

from experiments.errors import ExperimentError, reported, require_choice
from experiments.report import formats, planning, records, tables
from experiments.report.planning import Cell, Run, State
from experiments.report.records import Record
from experiments.runs.folder import RunFolder
from run import compose
from scripts.jobs import Jobs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("results")
_QUEUES = {"submitit_slurm"}  # launchers that only submit jobs: they get all rows at once
_MAX_TIMEOUTS = 1000


@dataclass(frozen=True)
class Scale:
    models: dict[str, list[str]]
    seeds: list[int]
    learning_rates: dict[str, list[float] | dict[str, list[float]]] = field(default_factory=dict)
    overrides: dict[str, list[str]] = field(default_factory=dict)
    title: str | None = None  # if different from the table's
    notes: list[str] = field(default_factory=list)  # in addition to the table's


@dataclass(frozen=True)
class Definition:
    name: str
    title: str
    task: str
    optimizers: dict[str, list[str]]
    columns: list[tables.Column]
    scales: dict[str, Scale]
    notes: list[str] = field(default_factory=list)  # for the caption

    def cells(self, scale: str, hardware: str) -> list[Cell]:
        of_scale = self.scales[scale]
        cells = []
        for model, of_model in of_scale.models.items():
            for optimizer, of_optimizer in self.optimizers.items():
                chosen = [f"task={self.task}", f"scale={scale}", f"hardware={hardware}"]
                chosen += [*of_model, *of_optimizer, *of_scale.overrides.get(optimizer, [])]
                config = dataclasses.asdict(compose(*chosen))
                preset = [config["optimizer"]["lr"]]
                own = of_scale.learning_rates.get(optimizer, preset)
                given = own.get(model, preset) if isinstance(own, dict) else own
                rates = tuple(map(float, given))  # YAML reads 1e-4, without a point, as a string
                seeds = tuple(of_scale.seeds)
                cells.append(Cell(model, optimizer, tuple(chosen), config, rates, seeds))
        return cells

    def title_of(self, scale: str) -> str:
        return self.scales[scale].title or self.title

    def table(self, scale: str, states: list[State]) -> tables.Table:
        title, notes = self.title_of(scale), [*self.notes, *self.scales[scale].notes]
        return tables.make(self.name, scale, title, self.columns, states, notes)


def read(name: str) -> Definition:
    """The table ``name`` in configs/table/.

    Raises:
        ExperimentError: rates or overrides for an optimizer or a model that is not in the table.
    """
    path = ROOT / f"configs/table/{name}.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["columns"] = [tables.Column(**column) for column in values["columns"]]
    values["scales"] = {scale: Scale(**of_scale) for scale, of_scale in values["scales"].items()}
    for scale in values["scales"].values():
        for optimizer in (*scale.learning_rates, *scale.overrides):
            require_choice(f"{path}: optimizer", optimizer, *values["optimizers"])
        for rates in scale.learning_rates.values():
            for model in rates if isinstance(rates, dict) else ():
                require_choice(f"{path}: model", model, *scale.models)
    return Definition(name=name, **values)


def print_plan(states: list[State], found: list[Record]) -> None:
    """Prints how many runs of each cell exist or are missing, and what those will take."""
    names = [f"{state.cell.model}, {state.cell.optimizer}" for state in states]
    for name, state in zip(names, states, strict=True):
        num_found = len(state.all_records)
        num_missing = len(state.missing) + state.num_later
        line = f"  {name:<{max(map(len, names))}}  {num_found} of {num_found + num_missing} runs"
        if num_missing:
            time_text = _time_text(_seconds([state], found))
            line += f"; missing: {time_text}, planned peak memory {_planned_peak(state.cell)}"
        print(line, flush=True)
    num_missing = sum(len(state.missing) + state.num_later for state in states)
    time_text = f"{_time_text(_seconds(states, found))}, one after another"
    print(f"  {num_missing} missing: {time_text}" if num_missing else "  all exist")
    if num_missing:
        _print_where_data_comes_from(states[0].cell)


def _print_where_data_comes_from(cell: Cell) -> None:
    """Prints it unless it is the local folder: all runs of a table share one data set."""
    dataset = compose(*cell.overrides).dataset
    if dataset.source in ("auto", "real") and dataset.local_folder() is None:
        generated = " or, failing that, generated" if dataset.source == "auto" else ""
        print(
            f"  data: {dataset.why_not_local()}, so {dataset.name} will be loaded from the hub"
            f"{generated} (set MICROADAM_DATA to use another folder)"
        )


def _seconds(states: list[State], found: list[Record]) -> float | None:
    """The time of all missing runs, one after another; None if no record gives an estimate."""
    seconds = 0.0
    for state in states:
        if state.missing:
            of_one = planning.estimated_s(state.missing[0], found)
            if of_one is None:
                return None
            seconds += of_one * (len(state.missing) + state.num_later)
    return seconds


def _time_text(seconds: float | None) -> str:
    return "unknown time" if seconds is None else f"about {formats.duration(seconds)}"


def time_left(seconds: float | None, seconds_at_start: float | None, elapsed_s: float) -> str:
    """The remaining time for someone who started ``elapsed_s`` ago.

    Args:
        seconds: what the missing runs take according to records, one after another.
        seconds_at_start: the same estimate when the first run started.
    """
    if seconds is not None and seconds_at_start is not None and seconds < seconds_at_start:
        pace = elapsed_s / (seconds_at_start - seconds)
        return f"{_time_text(seconds * pace)} left at this pace"
    return f"left, one after another: {_time_text(seconds)}"


def _planned_peak(cell: Cell) -> str:
    """The planned peak, and by how much it exceeds the card."""
    from experiments.planning import make  # loads torch, which a complete table avoids
    from experiments.summary import shortage

    config = compose(*cell.overrides)
    plan = make(config)
    return formats.size(plan.peak_bytes) + shortage(plan, config.hardware.memory_gib)


def do_missing(cells: list[Cell], options: argparse.Namespace) -> tuple[list[State], list[str]]:
    """Does the missing runs; returns the states, and the runs that failed."""
    attempted: set[str] = set()
    started = time.monotonic()
    seconds_at_start: float | None = None
    limit = options.jobs if options.launcher is None else 1
    with Jobs(None if options.launcher in _QUEUES else limit, ROOT) as jobs:
        while True:
            found = records.load(options.results_dir)
            states = states_of(cells, found, options.fresh)
            missing = [run for state in states for run in state.missing]
            todo = [run for run in missing if str(run) not in attempted]
            num_runs = len(attempted) + len(todo) + sum(state.num_later for state in states)
            seconds = _seconds(states, found)
            if seconds_at_start is None and seconds is not None:
                seconds_at_start, started = seconds, time.monotonic()
            for runs in _grouped(todo, options)[: jobs.num_free]:
                num_done = len(attempted - {str(run) for run in missing})
                bar = tqdm.format_meter(
                    num_done, num_runs, 0, bar_format="{bar:30} {n_fmt} of {total_fmt} runs"
                )
                left = time_left(seconds, seconds_at_start, time.monotonic() - started)
                print(f"\n{bar}; {left}")
                print(*runs, sep="\n", flush=True)
                log = _log(runs[0], options) if limit > 1 else None
                jobs.start(_command(runs, options), log)
                attempted |= {str(run) for run in runs}
            if jobs.num_running == 0:
                return states, [str(run) for run in missing]
            jobs.wait_for_one()


def _grouped(runs: list[Run], options: argparse.Namespace) -> list[list[Run]]:
    """What each process does: one run or, with a launcher, the runs of a cell in parallel."""
    if options.launcher is None:
        return [[run] for run in runs]
    groups = itertools.groupby(runs, lambda r: (r.cell.overrides, _is_forced(r, options)))
    return [list(group) for _, group in groups]


def _is_forced(run: Run, options: argparse.Namespace) -> bool:
    """Whether it starts over: not if it started since `--fresh` and was interrupted."""
    if options.fresh is None:
        return False
    own = [f"results_dir={options.results_dir}", *_overrides([run])]
    return not RunFolder(compose(*own)).was_interrupted_since(options.fresh)


def _log(run: Run, options: argparse.Namespace) -> Path:
    name = re.sub(r"[^\w.-]+", "-", str(run))
    return options.results_dir.resolve() / "runs" / "logs" / f"{options.table}-{name}.log"


def states_of(cells: list[Cell], found: list[Record], since: datetime | None) -> list[State]:
    """The progress of the cells, ignoring records of runs that finished before ``since``."""
    counted = [
        record
        for record in found
        if since is None or datetime.fromisoformat(record.values["finished_at"]) >= since
    ]
    return [planning.state_of(cell, counted) for cell in cells]


def _command(runs: list[Run], options: argparse.Namespace) -> list[str]:
    """Runs ``runs`` of one cell: several rates with one seed, or several seeds with one rate."""
    command = [sys.executable, "run.py"]
    if options.launcher is not None:
        command += ["--multirun", f"hydra/launcher={options.launcher}"]
    if options.launcher in _QUEUES:
        # At its time limit a job is then queued again, and resumes; otherwise it would fail there,
        # and from 48 minutes after its start also when it is preempted.
        command.append(f"hydra.launcher.max_num_timeout={_MAX_TIMEOUTS}")
    if _is_forced(runs[0], options):
        command.append("force=true")
    if options.results_dir != RESULTS:
        command.append(f"results_dir={options.results_dir.resolve()}")
    return [*command, *_overrides(runs)]


def _overrides(runs: list[Run]) -> list[str]:
    """Overrides for `run.py`, with commas between the rates or the seeds of several runs."""
    rates = ",".join(f"{rate:g}" for rate in sorted({run.learning_rate for run in runs}))
    seeds = ",".join(str(seed) for seed in sorted({run.seed for run in runs}))
    return [*runs[0].cell.overrides, f"optimizer.lr={rates}", f"seed={seeds}"]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be 1 or more")
    return int(text)


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time such as 2026-05-31T14:00"
        ) from error
    return moment.astimezone(timezone.utc)  # without an offset: local time


def arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = sorted(path.stem for path in (ROOT / "configs/table").glob("table*.yaml"))
    parser.add_argument("table", choices=names)
    parser.add_argument("--scale", default=tables.DEFAULT_SCALE)
    parser.add_argument("--hardware", default="auto", help="a file in configs/hardware")
    parser.add_argument("--launcher", help="a Hydra launcher, such as joblib or submitit_slurm")
    parser.add_argument(
        "--jobs",
        type=_count,
        default=1,
        help="simultaneous runs on this machine, without a launcher; they share its cores",
    )
    parser.add_argument("--dry", action="store_true", help="only print the plan")
    parser.add_argument(
        "--fresh",
        nargs="?",
        type=_moment,
        const=datetime.now(timezone.utc).replace(microsecond=0),
        metavar="SINCE",
        help="run everything again, or only what has not run since, say, 2026-05-31T14:00",
    )
    parser.add_argument("--results-dir", type=Path, default=RESULTS)
    return parser.parse_args(given)


def check_launcher(name: str) -> None:
    """Fails once if the launcher is not installed, rather than in every cell."""
    compose(f"hydra/launcher={name}")


def make_table(options: argparse.Namespace) -> None:
    definition = read(options.table)
    require_choice("SCALE", options.scale, *definition.scales)
    cells = definition.cells(options.scale, options.hardware)
    found = records.load(options.results_dir)
    print(f"{definition.title_of(options.scale)} ({options.scale} scale)")
    print_plan(states_of(cells, found, options.fresh), found)
    if options.dry:
        return
    if options.launcher is not None:
        check_launcher(options.launcher)
    states, failed = do_missing(cells, options)
    if all(not state.tried for state in states):
        raise ExperimentError(f"{options.table}: no run has a record, so no table was written")
    table = definition.table(options.scale, states)
    paths = tables.write(table, options.results_dir)
    print(
        "\n" + formats.terminal(table.head(), table.lines()) + "\n\n" + "\n".join(map(str, paths))
    )
    if failed:
        raise ExperimentError("without a record, see above: " + "; ".join(failed))


def main() -> None:
    options = arguments(sys.argv[1:])
    how = "run the same command again to resume"
    if options.fresh is not None:
        how = f"run it again with FRESH={options.fresh.isoformat()} to resume"
    with reported(how):
        make_table(options)


if __name__ == "__main__":
    main()
