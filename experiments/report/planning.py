"""Which runs a table is made of, which of them are missing, and which learning rate is best.

Every rate of the grid is tried with the first seed; the other seeds run at the best rate alone. The
best rate has the lowest training loss, so the reported score takes no part in choosing it. While
the best of several rates is the lowest or the highest, the grid grows on that side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from experiments.report import formats
from experiments.report.records import Record

SELECTED_BY = "train/final_loss"
_WIDENING = 2.0  # ratio between a grid's edge and the rate added beyond it
_MAX_WIDENINGS = 3  # on one side


@dataclass(frozen=True)
class Cell:
    """One model with one optimizer: all runs that differ in learning rate and seed alone."""

    model: str  # as the table calls it
    optimizer: str
    overrides: tuple[str, ...]  # of run.py
    config: dict[str, Any]  # composed with these overrides
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    cell: Cell
    learning_rate: float
    seed: int

    @property
    def config(self) -> dict[str, Any]:
        optimizer = {**self.cell.config["optimizer"], "lr": self.learning_rate}
        return {**self.cell.config, "optimizer": optimizer, "seed": self.seed}

    def __str__(self) -> str:
        return (
            f"{self.cell.optimizer} on {self.cell.model}, "
            f"learning rate {formats.rate(self.learning_rate)}, seed {self.seed}"
        )


@dataclass(frozen=True)
class State:
    """How far a cell is."""

    cell: Cell
    tried: dict[float, Record]  # with the first seed, by rate, ascending
    best: float | None  # rate; None where none is tried or all diverged
    records: list[Record]  # at the best rate, in the order of the seeds
    missing: list[Run]  # that can run now
    num_later: int  # that can run once the best rate is known; at least so many

    @property
    def is_best_at_edge(self) -> bool:
        rates = list(self.tried)
        return len(rates) > 1 and self.best in (rates[0], rates[-1])


def state_of(cell: Cell, records: list[Record]) -> State:
    """What ``records``, the newest first, hold of ``cell``: of one source of data and weights."""
    records = [r for r in records if r.is_run_of(Run(cell, r.learning_rate, r.seed).config)]
    records = [r for r in records if r.sources == records[0].sources]
    rates = list(cell.learning_rates)
    while True:
        found = {rate: _find(Run(cell, rate, cell.seeds[0]), records) for rate in sorted(rates)}
        tried = {rate: record for rate, record in found.items() if record is not None}
        best = min(tried, key=lambda rate: _score(tried[rate])) if tried else None
        added = None
        if best is not None and len(tried) == len(rates):
            added = _beyond(best, list(tried), cell)
        if added is None:
            break
        rates.append(added)
    missing = [Run(cell, rate, cell.seeds[0]) for rate in rates if rate not in tried]
    # At whichever of these rates turns out the best: the other seeds may be there already.
    candidates = [run.learning_rate for run in missing] + ([] if best is None else [best])
    num_later = 0
    if missing:
        num_later = min(_num_missing_seeds(cell, rate, records) for rate in candidates)
    if best is None or tried[best].has_diverged:
        return State(cell, tried, None, [], missing, num_later)
    of_best = {seed: _find(Run(cell, best, seed), records) for seed in cell.seeds}
    if not missing:
        missing = [Run(cell, best, seed) for seed, record in of_best.items() if record is None]
    present = [record for record in of_best.values() if record is not None]
    return State(cell, tried, best, present, missing, num_later)


def _num_missing_seeds(cell: Cell, rate: float, records: list[Record]) -> int:
    """Of all seeds but the first."""
    return sum(_find(Run(cell, rate, seed), records) is None for seed in cell.seeds[1:])


def _find(run: Run, records: list[Record]) -> Record | None:
    return next((record for record in records if record.is_run_of(run.config)), None)


def _score(record: Record) -> float:
    return math.inf if record.has_diverged else record.metrics[SELECTED_BY]


def _beyond(best: float, rates: list[float], cell: Cell) -> float | None:
    """The rate to try beyond the edge that ``best`` is, or None."""
    if len(rates) == 1 or best not in (rates[0], rates[-1]):
        return None
    num_added = sum(rate < min(cell.learning_rates) for rate in rates)
    factor = 1 / _WIDENING
    if best == rates[-1]:
        num_added = sum(rate > max(cell.learning_rates) for rate in rates)
        factor = _WIDENING
    return float(f"{best * factor:.3g}") if num_added < _MAX_WIDENINGS else None


def estimated_s(run: Run, records: list[Record]) -> float | None:
    """Seconds that the run may take: the mean of the most similar runs, or None without any."""
    config = run.config
    for names in (("task", "scale", "model", "optimizer"), ("task", "scale", "model")):
        times = [
            record.metrics["time/wall_s"]
            for record in records
            if not record.has_diverged
            and all(_name(record.values["config"][n]) == _name(config[n]) for n in names)
            and all(
                record.values["config"]["training"][n] == config["training"][n]
                for n in ("epochs", "max_steps")
            )
        ]
        if times:
            return sum(times) / len(times)
    return None


def _name(choice: str | dict[str, Any]) -> str:
    """Of a choice in a config: of a model or an optimizer, say; a scale is its name."""
    return choice if isinstance(choice, str) else choice["name"]
