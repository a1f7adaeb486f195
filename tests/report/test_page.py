"""Figures and the page: complete in one file, every number linked to a record that is in it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.figure
import pytest

from experiments.errors import ExperimentError
from experiments.report import __main__ as report
from experiments.report import figure, figures_runs, memory, page, planning, records, tables
from experiments.report.planning import Cell
from experiments.report.tables import Column
from tests.report.synthetic import record, write

ROOT = Path(__file__).parents[2]
PART_BYTES = {"param_bytes": 10, "grad_bytes": 10, "state_bytes": 5, "activation_bytes": 7}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of two optimizers, of which one diverged at a rate, a memory plan, benchmarks."""
    folder = tmp_path_factory.mktemp("results")
    cells = []
    for optimizer in ("microadam", "adamw"):
        label = {"microadam": "MicroAdam", "adamw": "Adam"}[optimizer]
        config = record(optimizer=optimizer)["config"]
        cells.append(Cell("tiny <BERT>", label, (), config, (1e-4, 1e-3, 1e-2), (42,)))
        for rate in (1e-4, 1e-3, 1e-2):
            status = "diverged" if (optimizer, rate) == ("adamw", 1e-2) else "finished"
            command = "python run.py </script><script>alert(1)</script>"
            write(folder, record(optimizer=optimizer, lr=rate, status=status, command=command))
    columns = [
        Column("train loss", ["train/final_loss"], "number"),
        Column("accuracy (%)", ["eval/accuracy_matched"], "percent"),
    ]
    found = records.load(folder)
    states = [planning.state_of(cell, found) for cell in cells]
    tables.write(tables.make("table1", "mini", "MNLI: loss", columns, states, []), folder)
    config = record()["config"] | {"model": {"architecture": {"layers": 2}}}
    rows = [
        {"model": "BERT", "optimizer": name, "command": "python run.py", "num_params": 2}
        | {"precision": "bf16", **PART_BYTES, "peak_bytes": 32, "config": config}
        for name in ("MicroAdam", "AdamW")
    ]
    (folder / "memory_plan.json").write_text(json.dumps({"title": "Memory", "rows": rows}))
    for name in ("benchmark_step_cpu.json", "benchmark_memory.json"):
        shutil.copy(ROOT / "results" / name, folder)
    return folder


class Page(HTMLParser):
    """What a browser would have to fetch, where links lead, and the embedded data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.cells: list[str] = []
        self._inside: list[str] = []
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self._inside.append("data" if named.get("id") == "data" else tag)
        if named.get("id"):
            self.ids.append(str(named["id"]))
        if tag == "a":
            self.links.append(str(named["href"]))
        elif tag in ("link", "img", "script", "iframe", "source"):
            self.fetched += [str(named[name]) for name in ("src", "href") if name in named]

    def handle_data(self, text: str) -> None:
        if self._inside[-1:] == ["data"]:
            self.data += text
            self._inside.append("")


@pytest.fixture(scope="module")
def written(results: Path) -> str:
    figures = figures_runs.draw(results, results / "figures")
    return page.write(results, figures).read_text()


def test_the_page_fetches_nothing_and_its_links_lead_somewhere(written: str) -> None:
    read = Page(written)
    assert all(address.startswith("data:") for address in read.fetched)
    assert "url(" not in written.replace("url(#", "")
    in_data = json.loads(read.data)["records"]
    to_runs = [link.removeprefix("#run=") for link in read.links if link.startswith("#run=")]
    assert len(to_runs) == 2 * 4  # rows, and cells with a value, the rate and the seeds
    assert set(to_runs) <= set(in_data)
    assert len(in_data) == 6  # the rates that were not chosen too
    anchors = [link[1:] for link in read.links if re.fullmatch("#[a-z]+", link)]
    assert anchors == ["tables", "curves", "memory", "figures"]
    assert set(anchors) <= set(read.ids)


def test_what_a_record_says_cannot_end_the_script_or_add_markup(written: str) -> None:
    assert "alert(1)</script>" not in written
    assert "tiny <BERT>" not in Page(written).rawdata.partition('id="data"')[0]
    assert "tiny &lt;BERT&gt;" in written


def test_figures_are_drawn_in_two_formats_and_are_the_same_each_time(results: Path) -> None:
    first = figures_runs.draw(results, results / "figures")
    assert [figure.name for figure in first] == [
        "loss_table1",
        "score_table1",
        "lr_table1",
        "memory",
        "step_time",
    ]
    paths = [path for figure in first for path in figure.files]
    assert {path.suffix for path in paths} == {".png", ".svg"}
    before = [path.read_bytes() for path in paths]
    figures_runs.draw(results, results / "figures")
    assert [path.read_bytes() for path in paths] == before


def test_numbers_that_are_written_in_a_drawing_keep_their_decimals(tmp_path: Path) -> None:
    """Those that are drawn lose most of theirs; a rate of 0.004 became 0.00 as well."""
    with matplotlib.rc_context(figure.STYLE):
        drawing = matplotlib.figure.Figure(figsize=(2, 2))
        drawing.text(0.1234567, 0.5, "lr = 0.0041")
        svg = figure.save(drawing, tmp_path, "name", "title", "sentence").files[1].read_text()
    assert "lr = 0.0041" in svg
    assert not any(re.search(r"\d\.\d{3}", tag) for tag in re.findall("<[^>]+>", svg))


def test_a_line_that_may_hide_an_earlier_one_is_dashed_and_has_a_colour_of_its_own(
    results: Path,
) -> None:
    names = ["Adam", "AdamW-8bit", "SGD", "MicroAdam, m = 10", "MicroAdam, m = 20"]
    (table,) = tables.load(results)
    rows = [dataclasses.replace(table.rows[0], optimizer=name) for name in names]
    styles = figures_runs.styles(rows)
    assert [bool(style["dashes"]) for style in styles] == [False, True, False, False, True]
    assert len({style["color"] for style in styles}) == len(names)


@pytest.mark.parametrize(
    ("before", "note", "has_line"),
    [
        (0.55, "before training: 55<", True),
        (0.1, "before training: 10 ↓<", False),
        (None, "", False),
    ],
)
def test_a_score_has_its_spread_and_where_all_runs_know_it_the_score_before_training(
    tmp_path: Path, before: float | None, note: str, has_line: bool
) -> None:
    for seed, accuracy in ((42, 0.6), (43, 0.62)):
        metrics = {"eval/accuracy_matched": accuracy, "eval_before/accuracy_matched": before}
        known = {name: value for name, value in metrics.items() if value is not None}
        write(tmp_path, record(seed=seed, metrics=known))
    write(tmp_path, record(seed=42, lr=1e-4))
    cell = Cell("BERT", "MicroAdam", (), record()["config"], (1e-4, 1e-3), (42, 43))
    state = planning.state_of(cell, records.load(tmp_path))
    columns = [Column("accuracy (%)", ["eval/accuracy_matched"], "percent")]
    tables.write(tables.make("table1", "mini", "MNLI: loss", columns, [state], []), tmp_path)
    drawn = {figure.name: figure for figure in figures_runs.draw(tmp_path, tmp_path / "figures")}
    score = drawn["score_table1"].files[1].read_text()
    assert "LineCollection" in score  # the bar
    assert ("before training" in score) == bool(note)
    assert note in score
    assert ("stroke-dasharray" in score) == has_line
    assert "lr_table1" in drawn


def test_a_table_whose_record_is_gone_is_refused_with_the_way_to_restore_it(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(results / "table1.json", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", "--results-dir", str(tmp_path)])
    restored_by = f"scripts.table table1 --scale mini --results-dir {tmp_path}$"
    message = rf"refers to records/.*restore it with: .*{restored_by}"
    with pytest.raises(ExperimentError, match=message):
        report.main()
    assert not (tmp_path / "index.html").exists()


def test_without_results_there_is_a_page_and_no_figure(tmp_path: Path) -> None:
    assert figures_runs.draw(tmp_path, tmp_path / "figures") == []
    read = Page(page.write(tmp_path, []).read_text())
    assert "tables" not in read.ids


def test_a_measured_peak_stands_beside_the_plan_only_where_shapes_and_precision_agree(
    results: Path, tmp_path: Path
) -> None:
    plan = json.loads((results / "memory_plan.json").read_text())
    shutil.copy(results / "memory_plan.json", tmp_path)
    on_gpu = record(lr=5e-4, peak_memory_of="training")
    on_gpu["config"]["model"]["architecture"] = {"layers": 2}
    on_gpu["hardware"] |= {"device": "cuda", "gpu": "Test GPU", "precision": "bf16"}
    on_gpu["config"]["hardware"] = plan["rows"][0]["config"]["hardware"]
    write(tmp_path, on_gpu)
    table = memory.read(tmp_path)
    assert table is not None
    assert [row.measured_bytes for row in table.rows] == [500_000_000] * 2
    assert "Test GPU, bf16" in table.caption
    with_evaluation = {**on_gpu, "peak_memory_of": "process"}
    in_fp32 = {**on_gpu, "hardware": {**on_gpu["hardware"], "precision": "fp32"}}
    for other in (with_evaluation, in_fp32):
        write(tmp_path, other)
        table = memory.read(tmp_path)
        assert table is not None
        assert not table.has_measured
    assert "No GPU has measured these yet." in table.caption
    assert [path.name for path in memory.write(table, tmp_path)] == [
        "memory.md",
        "memory.csv",
        "memory.tex",
    ]
    assert "| BERT | MicroAdam | 2.50 |" in (tmp_path / "memory.md").read_text()
