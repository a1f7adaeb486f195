"""What became of each job of a sweep, kept in the sweep's folder; jobs of any launcher write there.

results/sweeps/<time>/<number>.json    overrides, and the run's folder or error
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments import atomic
from experiments.report import formats
from experiments.runs import reading


def keep_job(folder: Path, number: int, job: dict[str, Any]) -> None:
    """Writes the outcome of one job: ``overrides``, and ``run`` (its folder) or ``error``."""
    atomic.write_text(folder / f"{number:04d}.json", json.dumps(job) + "\n")


def summary(folder: Path) -> tuple[str, int]:
    """A table of all jobs, listing only the overrides that differ, and how many failed."""
    files = sorted(folder.glob("[0-9]*.json"))
    jobs = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    rows = []
    errors = []
    for path, job in zip(files, jobs, strict=True):
        number = str(int(path.stem))
        overrides = " ".join(
            o for o in job["overrides"] if any(o not in j["overrides"] for j in jobs)
        )
        if "error" in job:
            errors.append(f"job {number} failed: {job['error']}")
            rows.append([number, overrides, "failed", "", "", "", ""])
            continue
        run = reading.read(Path(job["run"]))
        rows.append([number, overrides, run.state, *reading.results(run.metrics), run.path.name])
    header = ["job", "overrides", "state", *reading.RESULTS, "run"]
    text = "\n".join(
        [f"\nSweep of {len(rows)} jobs", formats.terminal(header, rows, len(header)), *errors]
    )
    return text, len(errors)
