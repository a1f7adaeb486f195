"""Which runs make up a table, which of them are missing, and which learning rate is best.

Every rate of the grid is tried with the first seed, and the best then runs with the other seeds
too. Rates are compared by training loss, so the reported score plays no part. While the best of
several rates is the lowest or the highest, the grid grows on that side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.report import formats
from experiments.report.records import Record

_SELECTED_BY = "train/final_loss"
_WIDENING = 2.0  # ratio between a grid's edge and the rate added beyond it
_MAX_WIDENINGS = 3  # on one side

# Keys of a config that determine the length of a run.
_LENGTH = {
    "training": ("epochs", "max_steps", "global_batch_size"),
    "dataset": ("num_train", "num_held_out"),
    "evaluation": ("limit",),
}


@dataclass(frozen=True)
class Cell:
    """One model with one optimizer: all runs that differ only in learning rate and seed."""

    model: str  # its name in the table
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
    """Progress of one cell."""

    cell: Cell
    tried: dict[float, dict[int, Record]]  # by rate, ascending, and seed; includes the first seed
    beside: dict[float, dict[int, Record]]  # likewise, for rates outside the cell's grid
    best: float | None  # rate, so far; None if none has been tried or all diverged
    missing: list[Run]  # that can run now
    num_later: int  # that can run once all rates have been tried; a lower bound

    @property
    def records(self) -> list[Record]:
        """At the best rate, in the order of the seeds."""
        return [] if self.best is None else list(self.tried[self.best].values())

    @property
    def all_records(self) -> list[Record]:
        return [record for by_seed in self.tried.values() for record in by_seed.values()]

    @property
    def is_best_at_edge(self) -> bool:
        rates = list(self.tried)
        return len(rates) > 1 and self.best in (rates[0], rates[-1])


def state_of(cell: Cell, records: list[Record]) -> State:
    """The progress of ``cell`` according to ``records``, the newest first.

    Uses only records with the newest source of data and weights; generated data counts only if
    there is no real data.
    """
    records = [r for r in records if r.is_run_of(Run(cell, r.learning_rate, r.seed).config)]
    records = [r for r in records if r.sources[0] != "generated"] or records
    records = [r for r in records if r.sources == records[0].sources]
    first, *others = cell.seeds
    rates = list(cell.learning_rates)
    while True:
        by_rate = {rate: _by_seed(cell, rate, records) for rate in sorted(rates)}
        tried = {rate: by_seed for rate, by_seed in by_rate.items() if first in by_seed}
        untried = [rate for rate in rates if rate not in tried]
        losses = {rate: final_loss(by_seed[first]) for rate, by_seed in tried.items()}
        finite = {rate: loss for rate, loss in losses.items() if loss is not None}
        best = min(finite, key=finite.__getitem__, default=None)
        added = None if untried or best is None else _beyond(best, list(tried), cell)
        if added is None:
            break
        rates.append(added)
    other_rates = sorted({record.learning_rate for record in records} - {*rates})
    beside = {rate: _by_seed(cell, rate, records) for rate in other_rates}
    beside = {rate: by_seed for rate, by_seed in beside.items() if first in by_seed}
    missing = [Run(cell, rate, first) for rate in untried]
    num_later = 0
    if untried:  # whichever rate turns out best, some of its other seeds may have run already
        candidates = [by_rate[rate] for rate in untried] + list(beside.values())
        candidates += [] if best is None else [tried[best]]
        num_later = min(sum(seed not in by_seed for seed in others) for by_seed in candidates)
    elif best is not None:
        missing = [Run(cell, best, seed) for seed in others if seed not in tried[best]]
    return State(cell, tried, beside, best, missing, num_later)


def _by_seed(cell: Cell, rate: float, records: list[Record]) -> dict[int, Record]:
    """The cell's existing records at this rate, in the order of its seeds."""
    configs = {seed: Run(cell, rate, seed).config for seed in cell.seeds}
    found = {
        seed: next((record for record in records if record.is_run_of(config)), None)
        for seed, config in configs.items()
    }
    return {seed: record for seed, record in found.items() if record is not None}


def final_loss(record: Record) -> float | None:
    """The training loss that rates are compared by; None if the run diverged."""
    return None if record.has_diverged else record.metrics[_SELECTED_BY]


def _beyond(best: float, rates: list[float], cell: Cell) -> float | None:
    """The rate to try beyond ``best`` if that is at an edge of the grid, else None."""
    if len(rates) == 1 or best not in (rates[0], rates[-1]):
        return None
    num_added = sum(rate < min(cell.learning_rates) for rate in rates)
    factor = 1 / _WIDENING
    if best == rates[-1]:
        num_added = sum(rate > max(cell.learning_rates) for rate in rates)
        factor = _WIDENING
    return float(f"{best * factor:.3g}") if num_added < _MAX_WIDENINGS else None


def estimated_s(run: Run, records: list[Record]) -> float | None:
    """Seconds that the run may take: the mean over the most similar runs of its length, or None."""
    config = run.config
    for names in (("task", "scale", "model", "optimizer"), ("task", "scale", "model")):
        times = [
            record.metrics["time/wall_s"]
            for record in records
            if not record.has_diverged
            and all(_name(record.values["config"][n]) == _name(config[n]) for n in names)
            and _length(record.values["config"]) == _length(config)
        ]
        if times:
            return sum(times) / len(times)
    return None


def _length(config: dict[str, Any]) -> list[Any]:
    return [config.get(part, {}).get(name) for part, names in _LENGTH.items() for name in names]


def _name(choice: str | dict[str, Any]) -> str:
    """The name of a choice in a config, say of a model or an optimizer; a scale is its own name."""
    return choice if isinstance(choice, str) else choice["name"]
