"""One HTML file with everything: tables, curves, memory, figures, and the record behind each cell.

It needs no network: style, script, data and figures are all inlined.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from experiments.report import formats, memory, records, tables
from experiments.report.figure import GRID, INK, Figure
from experiments.report.figures_runs import colour, styles
from experiments.report.records import Record
from experiments.report.tables import Row, Table

_TEMPLATES = Path(__file__).parent / "page"
_MAX_INLINE_SVG_CHARS = 400_000  # larger drawings are embedded as PNG
_DRAWN_BY_THE_PAGE = ("loss_", "memory")  # figures that it has in an interactive form


@dataclass(frozen=True)
class Drawing:
    markup: Markup
    is_broad: bool  # takes the full width of the page


@dataclass(frozen=True)
class Headline:
    number: str
    label: str
    beside: str
    spread: str = ""


def write(results_dir: Path, figures: Sequence[Figure]) -> Path:
    """Writes ``results_dir/index.html`` and returns its path."""
    all_tables = tables.load(results_dir)
    by_file = {record.file: record for record in records.load(results_dir)}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"size": formats.size, "colour": colour}
    page = environment.get_template("page.html").render(
        style=_asset("page.css"),
        script=_asset("page.js"),
        data=_json(_data(all_tables, by_file)),
        headlines=_headlines(results_dir, all_tables),
        tables=all_tables,
        memory=memory.read(results_dir),
        parts=memory.PARTS,
        figures=[
            (figure, _drawing(figure))
            for figure in figures
            if not figure.name.startswith(_DRAWN_BY_THE_PAGE)
        ],
    )
    path = results_dir / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _asset(name: str) -> Markup:
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))


def _json(values: Any) -> Markup:
    """JSON for a script element, which any "</" would end."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("</", r"<\/"))


def _data(all_tables: Sequence[Table], by_file: dict[str, Record]) -> dict[str, Any]:
    """The data from which the script shows curves and records."""
    groups = []
    used: set[str] = set()
    for table in all_tables:
        for model in dict.fromkeys(row.model for row in table.rows):
            rows = [row for row in table.rows if row.model == model and row.trials]
            if rows:
                short = f"{table.title.partition(':')[0]} · {model}"
                name = short if table.scale == tables.DEFAULT_SCALE else f"{short} · {table.scale}"
                groups.append({"name": name, "rows": _curves(rows)})
        used |= {*table.all_records}
    return {"groups": groups, "records": {file: _short(by_file[file]) for file in sorted(used)}}


def _short(record: Record) -> dict[str, Any]:
    """The record, its curve with no more digits than can be seen: the page has to load them."""
    curve = record.values["curve"]
    losses = [float(f"{loss:.4g}") for loss in curve["train/loss"]]
    return {**record.values, "curve": {**curve, "train/loss": losses}}


def _curves(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The curves of one model's optimizers."""
    tried = [[file for trial in row.trials for file in trial.records] for row in rows]
    return [
        {
            "optimizer": row.optimizer,
            "colour": style["color"],
            "dashes": style["dashes"],
            "records": row.records,
            "others": [file for file in files if file not in row.records],
        }
        for row, style, files in zip(rows, styles(rows), tried, strict=True)
    ]


def _headlines(results_dir: Path, all_tables: Sequence[Table]) -> list[Headline]:
    """The few numbers that a visitor takes away: state, step time, and each table's score."""
    found = []
    memory_path = results_dir / "benchmark_memory.json"
    if memory_path.exists():
        rows = json.loads(memory_path.read_text(encoding="utf-8"))["rows"]
        of_float32 = [row for row in rows if row["dtype"] == "float32"]
        first = {row["optimizer"]: row for row in reversed(of_float32)}
        own, other = (
            f"{first[name]['state_bytes'] / first[name]['num_parameters']:.2f} B"
            for name in ("MicroAdam", "AdamW (fused)")
        )
        label = "of optimizer state per parameter"
        found.append(Headline(own, label, f"AdamW in float32: {other}"))
    step_path = results_dir / "benchmark_step_cpu.json"
    if step_path.exists():
        measured = json.loads(step_path.read_text(encoding="utf-8"))
        environment = measured["environment"]
        machine = f"{environment['device']}, {environment['num_threads']} threads"
        beside = f"float32, {machine}; bfloat16: {_ratios(measured, 'bfloat16')}"
        label = "of the step time of torch's fused AdamW"
        found.append(Headline(_ratios(measured, "float32"), label, beside))
    for table in all_tables:
        found += _headline_of(table)
    return found


def _ratios(measured: dict[str, Any], dtype: str) -> str:
    """MicroAdam's ratios, lowest to highest over the sets of shapes."""
    own = [
        row["ratio"]
        for row in measured["rows"]
        if (row["dtype"], row["optimizer"]) == (dtype, "MicroAdam")
    ]
    ends = [f"{ratio:.1f}" for ratio in (min(own), max(own))]
    return "–".join(dict.fromkeys(ends))  # noqa: RUF001


def _headline_of(table: Table) -> list[Headline]:
    """MicroAdam's score next to Adam's, if both ran."""
    score = table.score_column
    if score is None or table.scale != tables.DEFAULT_SCALE:
        return []
    unit = "%" if table.columns[score].unit == "percent" else ""
    texts = {}
    for row in table.rows:
        value = row.values[score]
        if value is not None and row.model == table.rows[0].model:
            texts[row.optimizer] = value.text
    own = next((name for name in texts if name.startswith("MicroAdam")), None)
    other = next((name for name in texts if name in ("Adam", "AdamW")), None)
    if own is None or other is None:
        return []
    quantity = table.columns[score].label.removesuffix(" (%)")
    task = table.title.partition(":")[0]
    number, _, spread = texts[own].partition(" ± ")
    beside = f"{other}: {texts[other]}{unit}"
    label = f"{task}, {table.rows[0].model}: {quantity}"
    return [Headline(number + unit, label, beside, spread)]


def _drawing(figure: Figure) -> Drawing:
    """The SVG in the page's own colours or, if that is too large, the PNG."""
    by_suffix = {path.suffix: path for path in figure.files}
    text = by_suffix[".svg"].read_text(encoding="utf-8")
    width, height = map(float, re.findall(r'viewBox="0 0 (\S+) (\S+)"', text)[0])
    is_broad = width > 2 * height
    if len(text) > _MAX_INLINE_SVG_CHARS:
        encoded = base64.b64encode(by_suffix[".png"].read_bytes()).decode()
        return Drawing(Markup(f'<img alt="" src="data:image/png;base64,{encoded}">'), is_broad)
    # Its style would apply to the whole page; its size and font are up to the page.
    text = re.sub(r"<(metadata|style).*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text)
    text = re.sub(r"font-family: [^;]*; ", "", text)
    for drawn, own in ((INK, "var(--ink)"), (GRID, "var(--line)"), ("#ffffff", "var(--card)")):
        text = text.replace(drawn, own)
    return Drawing(Markup(text), is_broad)
