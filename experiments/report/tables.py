"""A table: its values with their spread, written as Markdown, CSV, LaTeX and JSON.

The JSON holds all that the page and the figures need, down to the records behind each row.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.report import formats
from experiments.report.planning import State, final_loss
from experiments.report.records import Record

DEFAULT_SCALE = "mini"  # its tables have no scale in their file names

_FORMATS: dict[str, Callable[[float, float | None], str]] = {
    "number": formats.number,
    "percent": formats.percent,
    "bytes": formats.size,
    "seconds": formats.duration,
}


@dataclass(frozen=True)
class Column:
    label: str
    metrics: list[str]  # of a record; if several, the mean of those present
    unit: str  # a key of _FORMATS


@dataclass(frozen=True)
class Value:
    mean: float
    std: float | None  # of the sample; None if there is one value
    text: str


@dataclass(frozen=True)
class Trial:
    """A learning rate, tried with the first seed or, if it is the best, with all; or one that the
    table does not try but that has records."""

    learning_rate: float
    loss: float | None  # with the first seed; None if it diverged
    records: list[str]


@dataclass(frozen=True)
class Row:
    model: str
    optimizer: str
    values: list[Value | None]  # one per column; None: nothing to show
    learning_rate: float | None
    is_best_at_edge: bool
    num_seeds: int  # that the values come from
    num_diverged: int
    records: list[str]  # files in results/records, one per seed
    trials: list[Trial]
    data_source: str
    machine: str


@dataclass(frozen=True)
class Table:
    name: str
    scale: str
    title: str
    columns: list[Column]
    rows: list[Row]
    caption: list[str]

    @property
    def all_records(self) -> list[str]:
        """Files of every run behind the table, those at other learning rates included."""
        trials = [trial for row in self.rows for trial in row.trials]
        return sorted(file for trial in trials for file in trial.records)

    @property
    def file_stem(self) -> str:
        return self.name if self.scale == DEFAULT_SCALE else f"{self.name}_{self.scale}"

    @property
    def score_column(self) -> int | None:
        """The first percentage; below paper scale the held-out loss if there is one, since a few
        samples suffice to measure it well."""
        labels = [column.label for column in self.columns]
        if self.scale != "paper" and "held-out loss" in labels:
            return labels.index("held-out loss")
        units = [column.unit for column in self.columns]
        return units.index("percent") if "percent" in units else None

    def head(self) -> list[str]:
        return ["model", "optimizer", *self._labels(), "learning rate", "seeds"]

    def lines(self) -> list[list[str]]:
        return [self.cells(row) for row in self.rows]

    def cells(self, row: Row) -> list[str]:
        """A row as text, in the order of `head`; all but the first two are empty if nothing ran."""
        nothing = "diverged" if row.num_diverged else ""
        texts = [nothing if value is None else value.text for value in row.values]
        rate = "" if row.learning_rate is None else formats.rate(row.learning_rate)
        seeds = str(row.num_seeds or "")
        if row.num_diverged:
            seeds = f"{row.num_seeds} + {row.num_diverged} diverged"
        own = [row.data_source, row.machine]
        extra = [text for text, is_mixed in zip(own, self._mixed(), strict=True) if is_mixed]
        edge = "*" if row.is_best_at_edge else ""
        return [row.model, row.optimizer, *texts, *extra, rate + edge, seeds]

    def _labels(self) -> list[str]:
        extra = zip(("data", "hardware"), self._mixed(), strict=True)
        return [column.label for column in self.columns] + [name for name, mixed in extra if mixed]

    def _mixed(self) -> tuple[bool, bool]:
        """Whether rows differ in data source and in machine; if so, each row shows its own."""
        done = [row for row in self.rows if row.records]
        return len({row.data_source for row in done}) > 1, len({row.machine for row in done}) > 1


def make(
    name: str, scale: str, title: str, columns: list[Column], states: list[State], notes: list[str]
) -> Table:
    """The table of all cells; its caption begins with ``notes``."""
    used = [record for state in states for record in state.all_records]
    rows = [_row(state, columns) for state in states]
    caption = [f"{scale.capitalize()} scale.", *notes]
    num_missing = sum(len(state.missing) + state.num_later for state in states)
    if num_missing:
        caption.append(f"Incomplete; runs missing: {num_missing}.")
    if used:
        caption += _selection(states, rows) + _provenance(used, columns)
    return Table(name, scale, title, columns, rows, caption)


def _row(state: State, columns: list[Column]) -> Row:
    first = state.cell.seeds[0]
    finished = [record for record in state.records if not record.has_diverged]
    shown = state.records or state.all_records[:1]  # if all diverged, one of them
    return Row(
        model=state.cell.model,
        optimizer=state.cell.optimizer,
        values=[_value(column, finished) for column in columns],
        learning_rate=state.best,
        is_best_at_edge=state.is_best_at_edge,
        num_seeds=len(finished),
        num_diverged=len(shown) - len(finished),
        records=[record.file for record in shown],
        trials=[
            Trial(rate, final_loss(by_seed[first]), [r.file for r in by_seed.values()])
            for rate, by_seed in sorted({**state.tried, **state.beside}.items())
        ],
        data_source=_listed(record.values["data_source"] for record in shown),
        machine=_listed(record.machine for record in shown),
    )


def _value(column: Column, records: list[Record]) -> Value | None:
    of_records = [
        [r.metrics[name] for name in column.metrics if name in r.metrics] for r in records
    ]
    values = [statistics.fmean(present) for present in of_records if present]
    if not values:
        return None
    mean = statistics.fmean(values)
    std = statistics.stdev(values) if len(values) > 1 else None
    return Value(mean, std, _FORMATS[column.unit](mean, std))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))


def _selection(states: list[State], rows: list[Row]) -> list[str]:
    """How learning rates were chosen, and what the marks in the rows mean."""
    sentences = []
    if any(len(state.cell.learning_rates) > 1 for state in states):
        sentences.append(
            "Learning rate: the one with the lowest training loss over the last tenth of the "
            f"steps with seed {states[0].cell.seeds[0]} runs with all seeds; the score plays no "
            "part in the choice."
        )
    else:
        sentences.append("Learning rate: one per row, fixed in advance.")
    if any(row.is_best_at_edge for row in rows):
        sentences.append("* the best rate is the lowest or the highest that was tried.")
    if any("±" in value.text for row in rows for value in row.values if value is not None):
        sentences.append("± is the sample standard deviation over seeds.")
    elif all(row.num_seeds <= 1 for row in rows):
        sentences.append("One seed: the spread is unknown.")
    return sentences


def _provenance(records: list[Record], columns: list[Column]) -> list[str]:
    """What the numbers are based on. Reads no clock: the same records give the same caption."""

    def all_of(name: str) -> str:
        return _listed(str(record.values[name]) for record in records)

    memory = {
        ("cpu", "process"): "the largest resident memory of the process, with libraries, "
        "evaluation and freed memory that it kept",
        ("cpu", "training"): "the largest resident memory of the process in training, with "
        "libraries and freed memory that it kept",
        ("cuda", "process"): "the most allocated on the GPU, evaluation included",
        ("cuda", "training"): "the most allocated on the GPU in training",
    }
    peaks = {
        memory[record.values["hardware"]["device"], record.peak_memory_of] for record in records
    }
    versions = {
        f"{package} {record.values['versions'][package]}"
        for record in records
        for package in ("microadam", "torch", "transformers", "bitsandbytes")
        if package in record.values["versions"]
    }
    data = [
        f"{record.values['config']['dataset']['name']} ({record.values['data_source']})"
        for record in records
    ]
    days = sorted(record.values["finished_at"][:10] for record in records)
    commits = {
        record.values["git_commit"][:10] + (" with changes" if record.values["git_dirty"] else "")
        for record in records
        if record.values["git_commit"]
    }
    sentences = [
        f"Data: {_listed(data)}.",
        f"Weights: {all_of('model_source')}.",
        f"Hardware: {_listed(record.machine_with_threads for record in records)}.",
    ]
    if any("memory/peak_bytes" in column.metrics for column in columns):
        sentences.append(f"Peak memory: {'; '.join(sorted(peaks))}.")
    return [
        *sentences,
        f"Versions: {_listed(versions)}.",
        f"Runs of {days[0]}" + (f" to {days[-1]}" if days[-1] != days[0] else "") + ".",
        f"Commit: {_listed(commits) or 'unknown'}.",
    ]


def write(table: Table, results_dir: Path) -> list[Path]:
    """Writes the four files and returns them."""
    texts = {
        "md": to_markdown(table),
        "csv": to_csv(table),
        "tex": formats.latex(
            table.file_stem, table.title, table.head(), table.lines(), " ".join(table.caption)
        ),
        "json": json.dumps(dataclasses.asdict(table), indent=1, ensure_ascii=False) + "\n",
    }
    paths = []
    for suffix, text in texts.items():
        paths.append(results_dir / f"{table.file_stem}.{suffix}")
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def to_markdown(table: Table) -> str:
    """The table with links to the record of every seed."""
    lines = []
    for row in table.rows:
        links = [f"[{i + 1}](records/{file})" for i, file in enumerate(row.records)]
        lines.append([*table.cells(row), ", ".join(links)])
    head = [*table.head(), "records"]
    return formats.markdown(table.title, head, lines, " ".join(table.caption))


def to_csv(table: Table) -> str:
    """Plain numbers: bytes, seconds and shares; mean and standard deviation in separate columns."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    pairs = [f"{column.label} {part}" for column in table.columns for part in ("mean", "std")]
    ending = ["learning rate", "seeds", "diverged", "data", "hardware", "records"]
    writer.writerow(["model", "optimizer", *pairs, *ending])
    for row in table.rows:
        numbers: list[Any] = []
        for value in row.values:
            numbers += ["", ""] if value is None else [value.mean, value.std]
        ending = [row.data_source, row.machine, " ".join(row.records)]
        counts = [row.learning_rate, row.num_seeds, row.num_diverged]
        writer.writerow([row.model, row.optimizer, *numbers, *counts, *ending])
    return file.getvalue()


def load(results_dir: Path) -> list[Table]:
    """All tables in ``results_dir``, by name, the default scale first."""
    tables = [
        _from_json(json.loads(path.read_text(encoding="utf-8")))
        for path in results_dir.glob("table[0-9]*.json")
    ]
    return sorted(tables, key=lambda table: (table.name, table.scale != DEFAULT_SCALE, table.scale))


def _from_json(values: dict[str, Any]) -> Table:
    rows = [
        Row(
            **{
                **row,
                "values": [value and Value(**value) for value in row["values"]],
                "trials": [Trial(**trial) for trial in row["trials"]],
            }
        )
        for row in values["rows"]
    ]
    return Table(**{**values, "columns": [Column(**c) for c in values["columns"]], "rows": rows})
