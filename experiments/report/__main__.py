"""Draws the figures and writes the page from the contents of the results folder.

    python -m experiments.report            the figures, the memory table, results/index.html
    python -m experiments.report figures    only the figures
    python -m experiments.report memory     only the memory table

Tables are written by scripts/table.py, which knows the runs behind them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.errors import ExperimentError, reported
from experiments.report import figures_runs, figures_studies, memory, page, tables

# Each draws the figures it has data for.
DRAWN_BY = (figures_runs.draw, figures_studies.draw)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", choices=["all", "figures", "memory"], default="all")
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    options = parser.parse_args()
    results_dir: Path = options.results_dir
    if not results_dir.is_dir():
        parser.error(f"--results-dir {results_dir}: there is no such folder")
    for table in tables.load(results_dir):
        for file in table.all_records:
            if not (results_dir / "records" / file).exists():
                raise ExperimentError(
                    f"{table.file_stem}.json refers to records/{file}, which is missing; "
                    f"restore it with: python -m scripts.table {table.name} --scale {table.scale} "
                    f"--results-dir {results_dir}"
                )
    written: list[Path] = []
    if options.what != "figures":
        planned = memory.read(results_dir)
        if planned is not None:
            written += memory.write(planned, results_dir)
        elif options.what == "memory":
            raise ExperimentError(
                f"{results_dir} has no memory_plan.json; make memory-table writes "
                "results/memory_plan.json"
            )
    if options.what != "memory":
        figures = [f for draw in DRAWN_BY for f in draw(results_dir, results_dir / "figures")]
        written += [path for figure in figures for path in figure.files]
        if options.what == "all":
            written.append(page.write(results_dir, figures))
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    with reported():
        main()
