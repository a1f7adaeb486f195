"""Figures of the runs behind the tables, of the planned memory, and of the benchmarks."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Drawing

from experiments.report import formats, memory, records, tables
from experiments.report.figure import COLOURS, INK, STYLE, Figure, save
from experiments.report.records import Record
from experiments.report.tables import Column, Row, Table

_SMOOTHING = 9  # points in the moving mean of a curve
_DASHES: tuple[tuple[float, ...], ...] = ((), (3, 3), (1, 1.5))  # in line widths
_MAX_STRETCH = 4  # of an axis, to show the score before training
_PART_NAMES = ("parameters", "gradients", "optimizer state", "activations")
_PART_COLOURS = ("#adb5bd", "#ced4da", "#d9480f", "#e9ecef")
_BASELINE = "AdamW (fused)"


def draw(results_dir: Path, figures_dir: Path) -> list[Figure]:
    """All figures that ``results_dir`` has the data for."""
    by_file = {record.file: record for record in records.load(results_dir)}
    drawn: list[Figure | None] = []
    with matplotlib.rc_context(STYLE):
        for table in tables.load(results_dir):
            drawn.append(_losses(table, by_file, figures_dir))
            drawn.append(_score_against_state(table, by_file, figures_dir))
            drawn.append(_learning_rates(table, figures_dir))
        drawn.append(_memory_bars(results_dir, figures_dir))
        drawn.append(_step_time(results_dir, figures_dir))
    return [figure for figure in drawn if figure is not None]


def colour(optimizer: str) -> str:
    """The colour of the longest name in COLOURS with which the label begins."""
    label = optimizer.replace("AdamW", "Adam").replace("Adam8bit", "Adam-8bit")
    for name in sorted(COLOURS, key=len, reverse=True):
        if label.startswith(name):
            return COLOURS[name]
    return INK


def styles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The style of each row's line. Variants of an optimizer, such as Adam-8bit, may coincide with
    its first line, so they are dashed, with smaller markers."""
    names = [re.split("[-,]", row.optimizer.replace("AdamW", "Adam"))[0] for row in rows]
    earlier = [names[:index].count(name) % len(_DASHES) for index, name in enumerate(names)]
    return [
        {"color": colour(row.optimizer), "dashes": _DASHES[count], "markersize": 8 - 3 * count}
        for row, count in zip(rows, earlier, strict=True)
    ]


def _by_model(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return [(model, list(own)) for model, own in itertools.groupby(rows, lambda row: row.model)]


def _panels(num: int, height: float = 3.6) -> tuple[Drawing, list[Any]]:
    drawing = Drawing(figsize=(max(6.0, 4.2 * num), height))
    return drawing, list(drawing.subplots(1, num, squeeze=False)[0])


def _losses(table: Table, by_file: dict[str, Record], figures_dir: Path) -> Figure | None:
    """Training loss of each model and optimizer at the best learning rate, for one seed."""
    models = _by_model([row for row in table.rows if row.num_seeds])
    if not models:
        return None
    drawing, axes = _panels(len(models))
    for ax, (model, rows) in zip(axes, models, strict=True):
        for row, style in zip(rows, styles(rows), strict=True):
            curve = _finished(row, by_file)[0].values["curve"]
            steps, losses = curve["step"], curve["train/loss"]
            ax.plot(steps, losses, color=style["color"], alpha=0.18, linewidth=0.8)
            ax.plot(steps, _smoothed(losses), label=row.optimizer, linewidth=1.8, **style)
        ax.set(title=model, xlabel="step", ylabel="training loss")
        ax.legend()
    lowest = []
    for model, rows in models:
        final = {row.optimizer: _metric(row, by_file, "train/final_loss") for row in rows}
        best = min(final, key=lambda optimizer: final[optimizer])
        lowest.append(f"{best} on {model} ({final[best]:.3f})")
    sentence = (
        f"Each optimizer at the learning rate of the table, one seed; bold: mean of {_SMOOTHING} "
        "neighbouring points. The last tenth of the steps, mean of all seeds, is lowest for "
        f"{', '.join(lowest)}."
    )
    title = f"Training loss: {_short(table)}"
    return save(drawing, figures_dir, f"loss_{table.file_stem}", title, sentence)


def _short(table: Table) -> str:
    return f"{table.title.partition(':')[0]}, {table.scale} scale"


def _metric(row: Row, by_file: dict[str, Record], name: str) -> float:
    """Mean over the seeds that finished."""
    return statistics.fmean(record.metrics[name] for record in _finished(row, by_file))


def _finished(row: Row, by_file: dict[str, Record]) -> list[Record]:
    return [by_file[file] for file in row.records if not by_file[file].has_diverged]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Centred moving mean, over fewer points at both ends."""
    half = _SMOOTHING // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _score_against_state(
    table: Table, by_file: dict[str, Record], figures_dir: Path
) -> Figure | None:
    """The table's score over bytes of state per parameter."""
    score = table.score_column
    models = _by_model([row for row in table.rows if row.num_seeds])
    if score is None or not models:
        return None
    column = table.columns[score]
    unit = 100 if column.unit == "percent" else 1
    drawing, axes = _panels(len(models))
    for ax, (model, rows) in zip(axes, models, strict=True):
        points = []
        for row in rows:
            value = row.values[score]
            if value is not None:
                num_params = by_file[row.records[0]].values["num_params"]
                x = _metric(row, by_file, "memory/state_bytes") / num_params
                points.append((x, unit * value.mean, unit * (value.std or 0), row.optimizer))
        for x, y, spread, optimizer in points:
            shade = colour(optimizer)
            ax.errorbar(x, y, spread or None, fmt="o", markersize=8, capsize=4, color=shade)
            # The name goes at the end of the bar that points away from the nearest neighbour.
            others = [point for point in points if point[0] != x]
            nearest = min(others, key=lambda other: abs(other[0] - x), default=(x, y))
            sign, side = (1, "bottom") if y >= nearest[1] else (-1, "top")
            ax.annotate(
                optimizer.replace(", ", ",\n"),
                (x, y + sign * spread),
                (0, sign * 7),
                textcoords="offset points",
                ha="center",
                va=side,
                fontsize=8.5,
            )
        ax.margins(0.15, 0.22)
        ax.set(title=model, xlabel="optimizer state, bytes a parameter", ylabel=column.label)
        before = _before(rows, column, by_file)
        if before is not None:
            _mark_before(ax, unit * before)
    better = "Up" if column.unit == "percent" else "Down"
    sentence = (
        f"{better} and to the left is better: the same result with less memory. A bar is the "
        "standard deviation over seeds, to either side; a point without a bar is of one seed."
    )
    title = f"Score against optimizer state: {_short(table)}"
    return save(drawing, figures_dir, f"score_{table.file_stem}", title, sentence)


def _before(rows: Sequence[Row], column: Column, by_file: dict[str, Record]) -> float | None:
    """The score before training, averaged over all runs; None if one of them lacks it."""
    names = [f"eval_before/{name.removeprefix('eval/')}" for name in column.metrics]
    metrics = [record.metrics for row in rows for record in _finished(row, by_file)]
    of_runs = [[own[name] for name in names if name in own] for own in metrics]
    is_complete = bool(of_runs) and all(of_runs)
    return statistics.fmean(map(statistics.fmean, of_runs)) if is_complete else None


def _mark_before(ax: Any, score: float) -> None:
    """Marks the score by a line or, if that would squash the points, by text at the edge."""
    low, high = ax.get_ylim()
    if max(high, score) - min(low, score) <= _MAX_STRETCH * (high - low):
        ax.axhline(score, color=INK, linewidth=0.8, linestyle="--")
        low, high = ax.get_ylim()
    arrow = " ↑" if score > high else " ↓" if score < low else ""
    ax.annotate(
        f"before training: {score:.3g}{arrow}",
        (0.99, min(max(score, low), high)),
        (0, -9 if score > high else 3),
        xycoords=ax.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )


def _learning_rates(table: Table, figures_dir: Path) -> Figure | None:
    """Final training loss over the learning rates that were tried."""
    models = _by_model([row for row in table.rows if len(row.trials) > 1])
    if not models:
        return None
    drawing, axes = _panels(len(models))
    for ax, (model, rows) in zip(axes, models, strict=True):
        for row, style in zip(rows, styles(rows), strict=True):
            finished = [trial for trial in row.trials if trial.loss is not None]
            rates = [trial.learning_rate for trial in finished]
            losses = [trial.loss for trial in finished]
            ax.plot(rates, losses, marker="o", label=row.optimizer, **style)
            for trial in row.trials:
                if trial.loss is None:
                    ax.axvline(trial.learning_rate, alpha=0.4, **style)
        ax.set(title=model, xscale="log", xlabel="learning rate", ylabel="final training loss")
        tried = sorted({trial.learning_rate for row in rows for trial in row.trials})
        ax.set_xticks(tried, map(formats.rate, tried), rotation=45)
        ax.minorticks_off()
        ax.legend()
    sentence = (
        "Training loss over the last tenth of the steps with the first seed, by learning rate; "
        "also rates that the table does not try. A vertical line is a rate that diverged."
    )
    title = f"Learning rates: {_short(table)}"
    return save(drawing, figures_dir, f"lr_{table.file_stem}", title, sentence)


def _memory_bars(results_dir: Path, figures_dir: Path) -> Figure | None:
    """Planned peak at paper scale, by part."""
    table = memory.read(results_dir)
    if table is None:
        return None
    models = table.by_model()
    num_rows = math.ceil(len(models) / 2)
    drawing = Drawing(figsize=(10, 2.6 * num_rows))
    axes = drawing.subplots(num_rows, 2, squeeze=False).flat
    for (model, rows), ax in zip(models, axes, strict=False):  # takes no axes after the last model
        labels = [row.plan["optimizer"] for row in rows]
        left = [0.0] * len(rows)
        for part, name, shade in zip(memory.PARTS, _PART_NAMES, _PART_COLOURS, strict=True):
            widths = [row.plan[f"{part}_bytes"] / 2**30 for row in rows]
            ax.barh(labels, widths, left=left, color=shade, label=name, height=0.7)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        measured = [
            (row.measured_bytes / 2**30, row.plan["optimizer"])
            for row in rows
            if row.measured_bytes is not None
        ]
        if measured:
            ax.scatter(*zip(*measured, strict=True), marker="|", s=120, color=INK, label="measured")
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0, labelsize=8)
        ax.set(title=model, xlabel="GiB")
    for ax in axes:  # the unused one if their number is odd
        ax.set_visible(False)
    handles, labels = drawing.axes[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    sentence = f"{table.caption} Only the optimizer state differs between the bars of a model."
    return save(drawing, figures_dir, "memory", table.title, sentence)


def _step_time(results_dir: Path, figures_dir: Path) -> Figure | None:
    """Measured step time over measured state, relative to fused AdamW."""
    step_path, memory_path = (
        results_dir / f"benchmark_{name}.json" for name in ("step_cpu", "memory")
    )
    if not (step_path.exists() and memory_path.exists()):
        return None
    step = json.loads(step_path.read_text(encoding="utf-8"))
    state = {
        (row["model"], row["dtype"], row["optimizer"]): row["state_bytes"] / row["num_parameters"]
        for row in json.loads(memory_path.read_text(encoding="utf-8"))["rows"]
    }
    dtypes = sorted({row["dtype"] for row in step["rows"]}, reverse=True)
    models = list(dict.fromkeys(row["model"] for row in step["rows"]))
    drawing, axes = _panels(len(dtypes), 4.0)
    for ax, dtype in zip(axes, dtypes, strict=True):
        for model, marker in zip(models, "osD^vP", strict=False):
            rows = [r for r in step["rows"] if (r["model"], r["dtype"]) == (model, dtype)]
            points = [(state[rows[0]["shapes"], dtype, _BASELINE], 1.0, _BASELINE)]
            points += [
                (state[r["shapes"], dtype, r["optimizer"]], r["ratio"], r["optimizer"])
                for r in rows
            ]
            for x, y, optimizer in points:
                shade = colour(optimizer.removeprefix("bitsandbytes "))
                ax.scatter(x, y, marker=marker, s=50, color=shade, zorder=3)
                if model == models[0]:
                    side = "right" if optimizer == _BASELINE else "left"
                    offset = (-7 if side == "right" else 7, 5 if y >= 1 else -12)
                    ax.annotate(
                        optimizer, (x, y), offset, textcoords="offset points", fontsize=9, ha=side
                    )
            ax.scatter([], [], marker=marker, color=INK, label=model)
        ax.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
        ax.margins(x=0.25, y=0.12)
        ax.set(
            title=dtype,
            yscale="log",
            xlabel="optimizer state, bytes a parameter",
            ylabel=f"step time over {_BASELINE}",
        )
        ax.yaxis.set_major_formatter("{x:g}")
        ax.legend()
    environment = step["environment"]
    own = [row["ratio"] for row in step["rows"] if row["optimizer"] == "MicroAdam"]
    sentence = (
        f"Measured on {environment['device']}, {environment['num_threads']} threads: a step of "
        f"MicroAdam takes {min(own):.2f} to {max(own):.2f} of the time of torch's fused AdamW."
    )
    title = "Step time against optimizer state on a CPU"
    return save(drawing, figures_dir, "step_time", title, sentence)
