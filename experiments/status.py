"""Lists runs with their state, key metrics and age:  python -m experiments.status [RESULTS_DIR]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.report import formats
from experiments.runs import reading
from experiments.runs.reading import RunStatus


def _progress(run: RunStatus) -> str:
    """``120/250``, or ``120`` if the total is not known."""
    total = "" if run.total_steps is None else f"/{run.total_steps}"
    return f"{run.num_steps}{total}"


def age(age_s: float) -> str:
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if age_s >= seconds:
            return f"{age_s / seconds:.0f} {unit}"
    return f"{age_s:.0f} s"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.status", description=__doc__)
    parser.add_argument("results_dir", nargs="?", default="results", type=Path)
    results_dir = parser.parse_args(arguments).results_dir
    if not results_dir.is_dir():
        parser.error(f"results_dir={results_dir}: there is no such folder")
    runs = reading.find(results_dir)
    if not runs:
        print(f"no runs below {results_dir / 'runs'}")
        return
    header = ["task", "model", "optimizer", "run", "lr", "seed", "state", "step"]
    header += [*reading.RESULTS, "age"]
    rows = []
    for run in runs:
        lr = run.config.get("optimizer", {}).get("lr")
        rows.append(
            [
                *run.path.parts[-4:],
                "" if lr is None else f"{lr:g}",
                str(run.config.get("seed", "")),
                run.state,
                _progress(run),
                *reading.results(run.metrics),
                age(run.age_s),
            ]
        )
    print(formats.terminal(header, rows, len(header)))
    for run in runs:
        if run.error:
            print(f"\n{'/'.join(run.path.parts[-4:])} {run.state}:\n  {run.error}")


if __name__ == "__main__":
    main(sys.argv[1:])
