"""Tables from records: values with their spread, what is empty, diverged or mixed; the script."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.errors import ExperimentError
from experiments.report import formats, planning, records, tables
from experiments.report.planning import Cell, Run
from experiments.report.records import Record
from experiments.report.tables import Column, Table
from experiments.runs.folder import RunFolder
from run import compose
from scripts import table as script
from scripts.jobs import Jobs
from tests.report.synthetic import record, write

ROOT = Path(__file__).parents[2]
COLUMNS = [
    Column("train loss", ["train/final_loss"], "number"),
    Column("accuracy (%)", ["eval/accuracy_matched"], "percent"),
    Column("average (%)", ["eval/accuracy_matched", "eval/not_there"], "percent"),
    Column("state", ["memory/state_bytes"], "bytes"),
    Column("missing", ["eval/not_there"], "seconds"),
]


def cell(optimizer: str = "microadam", seeds: tuple[int, ...] = (42, 7, 1)) -> Cell:
    config = record(optimizer=optimizer)["config"]
    return Cell("tiny BERT", optimizer, (), config, (1e-3,), seeds)


def made(found: list[dict[str, Any]], *cells: Cell) -> Table:
    as_records = [Record(f"{i}.json", values) for i, values in enumerate(found)]
    states = [planning.state_of(each, as_records) for each in cells or [cell()]]
    return tables.make("table1", "mini", "MNLI: loss", COLUMNS, states, ["A note."])


def of_seeds(accuracies: dict[int, float], **changes: Any) -> list[dict[str, Any]]:
    return [
        record(seed=seed, metrics={"eval/accuracy_matched": accuracy}, **changes)
        for seed, accuracy in accuracies.items()
    ]


def test_values_are_means_over_seeds_with_the_standard_deviation_of_a_sample() -> None:
    table = made(of_seeds({42: 0.5, 7: 0.6, 1: 0.7}))
    (row,) = table.rows
    assert row.num_seeds == 3
    accuracy = row.values[1]
    assert accuracy is not None
    assert accuracy.mean == pytest.approx(0.6)
    assert accuracy.std == pytest.approx(0.1)
    assert table.cells(row)[3:] == ["60.0 ± 10.0", "60.0 ± 10.0", "0.9 MiB", "", "1e-3", "3"]
    assert "± is the sample standard deviation" in " ".join(table.caption)


def test_one_seed_has_no_spread() -> None:
    (row,) = made(of_seeds({42: 0.5}), cell(seeds=(42,))).rows
    assert row.values[1] == tables.Value(0.5, None, "50.0")


def test_a_caption_explains_only_marks_that_are_in_the_table() -> None:
    """Table 1's explained a * that no row had."""
    grid = dataclasses.replace(cell(seeds=(42, 7)), learning_rates=(1e-4, 1e-3))
    losses = {1e-4: 0.9, 1e-3: 0.8}
    found = [record(lr=lr, metrics={"train/final_loss": loss}) for lr, loss in losses.items()]
    one_seed = made(found, grid)
    assert "*" in one_seed.cells(one_seed.rows[0])[-2]
    assert "* the best rate is the lowest or the highest that was tried." in one_seed.caption
    assert "One seed: the spread is unknown." in one_seed.caption
    lower = record(lr=1e-3, seed=7), record(lr=2e-3, metrics={"train/final_loss": 0.85})
    two_seeds = made([*found, *lower], dataclasses.replace(grid, learning_rates=(1e-4, 1e-3, 2e-3)))
    caption = " ".join(two_seeds.caption)
    assert "*" not in two_seeds.cells(two_seeds.rows[0])[-2] + caption
    assert "± is the sample standard deviation" in caption


def test_what_did_not_run_is_empty_and_the_caption_counts_it() -> None:
    table = made(of_seeds({42: 0.5}), cell(), cell("adamw"))
    assert table.cells(table.rows[1]) == ["tiny BERT", "adamw", *[""] * 7]
    assert "Incomplete; runs missing: 5." in table.caption


def test_a_diverged_seed_is_marked_and_not_averaged() -> None:
    found = of_seeds({42: 0.5, 7: 0.6}) + of_seeds({1: 0.9}, status="diverged")
    table = made(found)
    assert table.rows[0].values[1].mean == pytest.approx(0.55)
    assert table.cells(table.rows[0])[-1] == "2 + 1 diverged"


def test_where_every_rate_diverged_the_cells_say_so() -> None:
    table = made(of_seeds({42: 0.5}, status="diverged"))
    assert table.cells(table.rows[0])[2:7] == ["diverged"] * 5
    assert table.rows[0].records == ["0.json"]


def test_rows_with_other_data_or_hardware_get_a_column_that_says_so() -> None:
    alike = made(
        [*of_seeds({42: 0.5}), *of_seeds({42: 0.5}, optimizer="adamw")], cell(), cell("adamw")
    )
    assert "data" not in alike.head()
    hub = of_seeds({42: 0.5}, optimizer="adamw", data_source="hub")
    mixed = made([*of_seeds({42: 0.5}), *hub], cell(), cell("adamw"))
    index = mixed.head().index("data")
    assert [mixed.cells(row)[index] for row in mixed.rows] == ["generated", "hub"]
    assert "Data: mnli (generated), mnli (hub)." in mixed.caption


def test_the_caption_says_what_the_numbers_rest_on() -> None:
    caption = " ".join(made(of_seeds({42: 0.5}, git_dirty=True)).caption)
    for part in (
        "Mini scale. A note.",
        "Data: mnli (generated).",
        "Weights: random.",
        "Test CPU, fp32 (2 threads)",
        "torch 2.14.1",
        "Runs of 2026-01-02.",
        "Commit: 0123456789 with changes.",
    ):
        assert part in caption


@pytest.mark.parametrize(
    ("device", "peak_of", "text"),
    [
        ("cpu", None, "the largest resident memory of the process, with libraries, evaluation"),
        (
            "cpu",
            "training",
            "the largest resident memory of the process in training, with libraries",
        ),
        ("cuda", None, "the most allocated on the GPU, evaluation included."),
        ("cuda", "training", "the most allocated on the GPU in training."),
    ],
)
def test_the_caption_says_what_the_peak_memory_is_of(
    device: str, peak_of: str | None, text: str
) -> None:
    """Records from before it was that of training alone do not say so."""
    values = record(**({} if peak_of is None else {"peak_memory_of": peak_of}))
    values["hardware"] |= {"device": device, "gpu": "Test GPU" if device == "cuda" else None}
    column = Column("peak memory", ["memory/peak_bytes"], "bytes")
    state = planning.state_of(cell(seeds=(42,)), [Record("a.json", values)])
    caption = " ".join(tables.make("table1", "mini", "MNLI", [column], [state], []).caption)
    assert f"Peak memory: {text}" in caption


def test_files_agree_with_each_other_and_the_same_records_give_the_same_bytes(
    tmp_path: Path,
) -> None:
    table = made(of_seeds({42: 0.5, 7: 0.6, 1: 0.7}))
    paths = tables.write(table, tmp_path)
    assert [path.name for path in paths] == [
        f"table1.{suffix}" for suffix in ("md", "csv", "tex", "json")
    ]
    before = [path.read_bytes() for path in paths]
    assert tables.load(tmp_path) == [table]
    assert [path.read_bytes() for path in tables.write(table, tmp_path)] == before
    (row,) = csv.DictReader(paths[1].open())
    assert float(row["accuracy (%) mean"]) == pytest.approx(0.6)
    markdown, tex = paths[0].read_text(), paths[2].read_text()
    assert "| 60.0 ± 10.0 |" in markdown
    assert "[3](records/2.json)" in markdown
    assert r"60.0 $\pm$ 10.0" in tex
    assert r"accuracy (\%)" in tex


def test_another_scale_than_mini_stands_in_the_file_names() -> None:
    table = made(of_seeds({42: 0.5}))
    assert dataclasses.replace(table, scale="paper").file_stem == "table1_paper"


@pytest.mark.parametrize(
    ("number", "text"), [(2e-4, "2e-4"), (1e-5, "1e-5"), (0.1, "1e-1"), (1.4e-4, "1.4e-4")]
)
def test_learning_rates_are_short(number: float, text: str) -> None:
    assert formats.rate(number) == text


@pytest.mark.parametrize(("num_names", "number"), [(1, "   x"), (2, "x")])
def test_a_table_for_a_terminal_has_columns(num_names: int, number: str) -> None:
    text = formats.terminal(["a", "long"], [["wide cell", "x"], ["", "y"]], num_names)
    assert text.splitlines()[:3] == ["a          long", "---------  ----", f"wide cell  {number}"]


def test_a_run_on_data_in_a_folder_of_the_users_is_not_the_tables() -> None:
    config = record()["config"]
    own = {**config, "dataset": {**config["dataset"], "path": "mine"}}
    found = [Record("own.json", record(config=own))]
    assert planning.state_of(cell(), found).tried == {}


@pytest.mark.parametrize(
    ("newer", "older", "taken"),
    [("local", "hub", "local"), ("hub", "local", "hub"), ("hub", "generated", "hub")],
)
def test_records_of_two_sources_are_not_averaged(newer: str, older: str, taken: str) -> None:
    values = [
        *of_seeds({42: 0.5, 7: 0.6}, data_source=newer),
        *of_seeds({42: 0.9, 1: 0.9}, data_source=older),
    ]
    state = planning.state_of(cell(), [Record(f"{i}.json", v) for i, v in enumerate(values)])
    assert {r.values["data_source"] for r in state.records} == {taken}
    assert [run.seed for run in state.missing] == [1]


def test_generated_data_does_not_take_the_place_of_real_data() -> None:
    values = [
        *of_seeds({42: 0.5, 1: 0.5}, data_source="generated"),
        *of_seeds({42: 0.9, 7: 0.9}, data_source="local"),
    ]
    state = planning.state_of(cell(), [Record(f"{i}.json", v) for i, v in enumerate(values)])
    assert {r.values["data_source"] for r in state.records} == {"local"}
    assert [run.seed for run in state.missing] == [1]


# The script, with run.py replaced by what it would leave


class Instant(Jobs):
    """Instead of processes: each command leaves a record of its composed config."""

    started: list[list[str]]  # the overrides of each
    results_dir: Path

    def start(self, command: list[str], log: Path | None = None) -> None:
        self._running.append(command)

    def wait_for_one(self) -> None:
        commands, self._running = self._running, []
        self.finish(commands)

    @classmethod
    def finish(cls, commands: list[list[str]]) -> None:
        for command in commands:
            overrides = [part for part in command[2:] if "=" in part and "results_dir" not in part]
            cls.started.append(overrides)
            config = dataclasses.asdict(compose(*overrides))
            year = 2999 if "force=true" in overrides else 2026
            write(
                cls.results_dir,
                record(
                    task=config["task"]["name"],
                    model=config["model"]["name"],
                    optimizer=config["optimizer"]["name"],
                    scale=config["scale"],
                    seed=config["seed"],
                    lr=config["optimizer"]["lr"],
                    finished_at=f"{year}-01-02T03:04:05+00:00",
                    config=config,
                ),
            )


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The overrides of the runs that were started."""
    monkeypatch.setattr(Instant, "started", [], raising=False)
    monkeypatch.setattr(Instant, "results_dir", tmp_path, raising=False)
    monkeypatch.setattr(script, "Jobs", Instant)
    return Instant.started


def make_table(results_dir: Path, *arguments: str) -> None:
    own = ["table1", "--scale", "smoke", "--results-dir", str(results_dir), *arguments]
    script.make_table(script.arguments(own))


def test_missing_runs_are_done_once_and_a_deleted_record_is_the_only_one_done_again(
    tmp_path: Path, ran: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    make_table(tmp_path)
    optimizers = [overrides[4] for overrides in ran]
    names = ["microadam", "adamw", "adam8bit", "came", "galore"]
    assert optimizers == [f"optimizer={name}" for name in names]
    first = (tmp_path / "table1_smoke.md").read_text()
    ran.clear()
    make_table(tmp_path)
    assert ran == []
    assert "all exist" in capsys.readouterr().out
    assert (tmp_path / "table1_smoke.md").read_text() == first
    next((tmp_path / "records").glob("*-came-*.json")).unlink()
    make_table(tmp_path, "--dry")
    assert ran == []
    assert "1 missing: about 2.0 min" in capsys.readouterr().out
    make_table(tmp_path)
    assert [overrides[4] for overrides in ran] == ["optimizer=came"]
    assert (tmp_path / "table1_smoke.md").read_text() == first
    ran.clear()
    make_table(tmp_path, "--fresh")
    assert len(ran) == 5
    assert all("force=true" in overrides for overrides in ran)


def test_a_plan_marks_the_rows_that_do_not_fit_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["table2", "--scale", "paper", "--hardware", "rtx3090", "--results-dir", str(tmp_path)]
    script.make_table(script.arguments([*own, "--dry"]))
    rows = [line for line in capsys.readouterr().out.splitlines() if "runs; missing" in line]
    fitting = {row.split("  ")[1] for row in rows if "GiB more than the card's 24 GiB" not in row}
    assert len(rows) == 8
    assert fitting == {"Llama-2 7B, MicroAdam, m = 10", "Llama-2 7B, MicroAdam, m = 20"}


@pytest.mark.parametrize(("scale", "says"), [("mini", True), ("smoke", False)])
def test_a_plan_says_where_the_data_is_not_that_of_the_local_folder(
    scale: str,
    says: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MICROADAM_DATA", str(tmp_path))
    make_table(tmp_path, "--scale", scale, "--dry")
    assert (f"there is no folder {tmp_path / 'mnli'}, so mnli" in capsys.readouterr().out) == says


def test_an_interrupted_fresh_table_says_how_it_goes_on_and_then_does_the_rest(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ran: list[list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_table(tmp_path)
    ran.clear()
    finish = Instant.finish

    def interrupted_by_the_third(commands: list[list[str]]) -> None:
        if len(ran) == 2:
            raise KeyboardInterrupt
        finish(commands)

    monkeypatch.setattr(Instant, "finish", staticmethod(interrupted_by_the_third))
    own = ["table1", "--scale", "smoke", "--results-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["table", *own, "--fresh"])
    with pytest.raises(SystemExit, match="130"):
        script.main()
    (since,) = re.findall(r"with FRESH=(\S+) to resume", capsys.readouterr().err)
    monkeypatch.setattr(Instant, "finish", staticmethod(finish))
    make_table(tmp_path, "--fresh", since)
    optimizers = [part for overrides in ran for part in overrides if part.startswith("optimizer=")]
    names = ["microadam", "adamw", "adam8bit", "came", "galore"]
    assert optimizers == [f"optimizer={name}" for name in names]


def test_rates_are_compared_with_the_first_seed() -> None:
    losses = {(1e-3, 42): 0.5, (1e-3, 7): 0.9, (1e-4, 42): 0.6}
    found = [
        Record(f"{lr}-{seed}.json", record(lr=lr, seed=seed, metrics={"train/final_loss": loss}))
        for (lr, seed), loss in losses.items()
    ]
    of_two = Cell("m", "o", (), record()["config"], (1e-4, 1e-3), (42, 7))
    (row,) = tables.make("t", "mini", "t", COLUMNS, [planning.state_of(of_two, found)], []).rows
    assert [(trial.learning_rate, trial.loss) for trial in row.trials] == [(1e-4, 0.6), (1e-3, 0.5)]
    assert row.values[0] is not None
    assert row.values[0].mean == pytest.approx(0.7)


@pytest.mark.usefixtures("ran")
def test_a_fresh_table_goes_on_with_a_run_that_was_interrupted(tmp_path: Path) -> None:
    since = "2026-05-31T14:00+00:00"
    own = ["table1", "--scale", "smoke", "--results-dir", str(tmp_path), "--fresh", since]
    options = script.arguments(own)
    interrupted, other = script.read("table1").cells("smoke", "auto")[:2]
    runs = [Run(cell, 1e-3, 42) for cell in (interrupted, other)]
    folder = RunFolder(compose(*script._overrides(runs[:1]), f"results_dir={tmp_path}"))
    folder.path.mkdir(parents=True)
    folder.start(compose(*interrupted.overrides))
    assert ["force=true" in script._command([run], options) for run in runs] == [False, True]
    os.utime(folder.path / "config.yaml", (0, 0))  # begun before, and given up
    assert "force=true" in script._command(runs[:1], options)


def test_a_failed_run_leaves_its_cells_empty_and_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ran: list[list[str]]
) -> None:
    finish = Instant.finish

    def fail_for_came(commands: list[list[str]]) -> None:
        finish([command for command in commands if "optimizer=came" not in command])

    monkeypatch.setattr(Instant, "finish", staticmethod(fail_for_came))
    with pytest.raises(ExperimentError, match=r"without a record.*CAME on tiny BERT"):
        make_table(tmp_path)
    assert "| tiny BERT | CAME |  |" in (tmp_path / "table1_smoke.md").read_text()


@pytest.mark.usefixtures("ran")
def test_where_nothing_ran_no_table_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Instant, "finish", staticmethod(lambda _: None))
    with pytest.raises(ExperimentError, match="no run has a record, so no table was written"):
        make_table(tmp_path)
    assert not list(tmp_path.glob("table*"))


def test_a_launcher_that_is_not_installed_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = script.arguments(["table1", "--scale=smoke", "--launcher=dask"])
    options.results_dir = tmp_path
    monkeypatch.setattr(script.Jobs, "start", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(ExperimentError, match=r"hydra/launcher/dask.*launchers come with extras"):
        script.make_table(options)


def test_a_launcher_gets_the_runs_of_a_row_as_one_sweep(tmp_path: Path) -> None:
    grid = Cell("m", "o", ("task=mnli",), record()["config"], (1e-4, 1e-3), (42,))
    runs = planning.state_of(grid, []).missing
    options = script.arguments(["table1", "--launcher", "joblib"])
    (group,) = script._grouped(runs, options)
    command = script._command(group, options)
    assert command[1:4] == ["run.py", "--multirun", "hydra/launcher=joblib"]
    assert command[4:] == ["task=mnli", "optimizer.lr=0.0001,0.001", "seed=42"]


def test_a_job_on_a_cluster_is_queued_again_at_its_time_limit() -> None:
    """Submitit's limit is an hour, unless SBATCH_TIMELIMIT is set, and its jobs fail there."""
    grid = Cell("m", "o", ("task=mnli",), record()["config"], (1e-4,), (42,))
    options = script.arguments(["table1", "--launcher", "submitit_slurm"])
    command = script._command(planning.state_of(grid, []).missing, options)
    assert command[3:5] == ["hydra/launcher=submitit_slurm", "hydra.launcher.max_num_timeout=1000"]


@pytest.mark.parametrize(
    ("seconds", "at_start", "elapsed_s", "text"),
    [
        (7200.0, 7200.0, 0.0, "left, one after another: about 2.0 h"),
        (3600.0, 7200.0, 1800.0, "about 30.0 min left at this pace"),  # two at a time
        (8000.0, 7200.0, 600.0, "left, one after another: about 2.2 h"),  # a grid grew
        (None, 7200.0, 600.0, "left, one after another: unknown time"),
        (7200.0, None, 600.0, "left, one after another: about 2.0 h"),
    ],
)
def test_the_time_left_is_by_the_pace_so_far(
    seconds: float | None, at_start: float | None, elapsed_s: float, text: str
) -> None:
    assert script.time_left(seconds, at_start, elapsed_s) == text


@pytest.mark.parametrize(
    ("arguments", "num_at_once"),
    [
        ([], [1] * 5),
        (["--jobs", "2"], [2, 2, 1]),
        (["--launcher", "joblib"], [1] * 5),
        (["--launcher", "submitit_slurm"], [5]),
    ],
)
def test_so_many_start_together(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ran: list[list[str]],
    arguments: list[str],
    num_at_once: list[int],
) -> None:
    finish, started = Instant.finish, []

    def counted(commands: list[list[str]]) -> None:
        started.append(len(commands))
        finish([[part for part in command if "launcher" not in part] for command in commands])

    monkeypatch.setattr(Instant, "finish", staticmethod(counted))
    monkeypatch.setattr(script, "check_launcher", lambda _: None)
    make_table(tmp_path, *arguments)
    assert started == num_at_once
    assert len(ran) == 5


@pytest.mark.parametrize("hardware", ["auto", "rtx3090"])
@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table4"])
def test_every_run_of_every_table_can_be_composed(name: str, hardware: str) -> None:
    definition = script.read(name)
    for scale, of_scale in definition.scales.items():
        if (scale == "paper") != (hardware == "rtx3090"):
            continue
        cells = definition.cells(scale, hardware)
        assert len(cells) == len(of_scale.models) * len(definition.optimizers)
        assert set(of_scale.learning_rates) <= set(definition.optimizers)
        for rates in of_scale.learning_rates.values():
            assert isinstance(rates, list) or set(rates) == set(of_scale.models)
        configs = [json.dumps(cell.config, sort_keys=True) for cell in cells]
        assert len(set(configs)) == len(cells)


def test_the_report_loads_neither_torch_nor_hydra() -> None:
    code = "import sys, experiments.report.__main__; print({'torch', 'hydra'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout == "set()\n"


def test_results_that_are_missing_or_broken_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "cut.json").write_text('{"status": "fini')
    expected = {tmp_path / "none": "there is no such folder", tmp_path: "cut.json: not valid"}
    for folder, words in expected.items():
        command = [sys.executable, "-m", "experiments.report", "--results-dir", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_committed_tables_are_those_of_the_committed_records(tmp_path: Path) -> None:
    """Nothing in results/ is entered by hand."""
    found = records.load(ROOT / "results")
    committed = tables.load(ROOT / "results")
    assert [table.name for table in committed] == ["table1", "table2", "table3", "table4"]
    for table in committed:
        definition = script.read(table.name)
        states = script.states_of(definition.cells(table.scale, "auto"), found, None)
        assert definition.table(table.scale, states) == table
        for path in tables.write(table, tmp_path):
            assert path.read_bytes() == (ROOT / "results" / path.name).read_bytes()


# At mini scale there is no data for them.
NOT_EVALUATED = {"table3": {"HellaSwag (%)", "MMLU (%)"}}


def test_only_what_was_not_evaluated_is_empty_in_the_committed_tables() -> None:
    """A column whose metric no task measures would stay empty without a word."""
    for table in tables.load(ROOT / "results"):
        empty = {
            column.label
            for i, column in enumerate(table.columns)
            if all(row.values[i] is None for row in table.rows)
        }
        assert empty == NOT_EVALUATED.get(table.name, set())


def test_committed_records_do_not_say_where_data_and_results_lay() -> None:
    for found in records.load(ROOT / "results"):
        config = found.values["config"]
        assert not {"results_dir", "root"} & {*config, *config["dataset"]}, found.file
        assert "results_dir=" not in found.values["command"], found.file
