"""Where rows come from, and what is said of a folder that is not right."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from experiments.config import DatasetConfig
from experiments.data import text
from experiments.errors import ExperimentError

ROWS = [{"question": f"What is {n} + 1?", "answer": f"{n + 1}\n#### {n + 1}"} for n in range(5)]


def _config(**values: object) -> DatasetConfig:
    fixed = {"name": "gsm8k", "hub_id": "openai/gsm8k", "size": 7473}
    return DatasetConfig(
        **{"root": "no-such-folder", "splits": ["train", "test"], **fixed, **values},
        columns={"question": "str", "answer": "str"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        (tmp_path / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def test_a_folder_given_by_the_user_comes_first(folder: Path) -> None:
    data = text.load(_config(path=str(folder), source="generated"))
    assert data.source == "local"
    assert data.rows == {"train": ROWS, "test": ROWS}


def test_a_folder_below_root_comes_before_the_hub_and_only_where_it_may(folder: Path) -> None:
    named = folder / "gsm8k"
    named.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").rename(named / f"{split}.jsonl")
    for source in ("auto", "real", "local"):
        assert text.load(_config(root=str(folder), source=source)).source == "local"
    assert text.load(_config(root=str(folder), source="generated")).source == "generated"
    with pytest.raises(ExperimentError, match=r"source=local: .*dataset\.root=.*dataset\.path="):
        text.load(_config(root=str(named), source="local"))
    with pytest.raises(ExperimentError, match=r"source=hub: data set gsm8k"):
        text.load(_config(root=str(folder), source="hub"))


def test_num_train_takes_the_first_rows_of_the_training_split_only(folder: Path) -> None:
    data = text.load(_config(path=str(folder), num_train=2))
    assert (data.rows["train"], data.rows["test"]) == (ROWS[:2], ROWS)


def test_held_out_rows_are_the_last_of_the_training_split_whatever_is_asked_for(
    folder: Path,
) -> None:
    """An evaluation asks for the test split alone."""
    config = _config(path=str(folder), splits=["train"], num_held_out=2)
    for splits in (None, ["test"]):
        assert text.load(config, splits).rows == {"train": ROWS[:3], "test": ROWS[3:]}


def test_a_line_separator_inside_a_text_does_not_end_the_row(folder: Path) -> None:
    """str.splitlines also splits at U+2028, which JSON may hold unescaped."""
    row = {"question": "one\u2028two", "answer": "#### 2"}
    line = json.dumps(row, ensure_ascii=False)
    (folder / "train.jsonl").write_text(line + "\n\n", encoding="utf-8")
    assert text.load(_config(path=str(folder))).rows["train"] == [row]


def test_without_a_hub_the_problems_are_generated_and_it_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = text.load(_config(source="auto"))
    assert data.source == "generated"
    assert (len(data.rows["train"]), len(data.rows["test"])) == (7473, 1319)
    assert "openai/gsm8k" in capsys.readouterr().out
    assert set(data.rows["test"][0]) == {"question", "answer"}


@pytest.mark.parametrize("folder_name", [40 * "a", "0.0.0"])
def test_the_hubs_commit_is_kept_with_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder_name: str
) -> None:
    """The hub's data set can change while a run's config stays the same."""
    cached = tmp_path / folder_name
    datasets.Dataset.from_list(ROWS).save_to_disk(cached)
    splits = datasets.DatasetDict(train=datasets.load_from_disk(cached))
    monkeypatch.setenv("MICROADAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    for _ in range(2):  # the second time from the export
        data = text.load(_config(source="hub", splits=["train"]))
        assert data.rows == {"train": ROWS}
        assert data.revision == (folder_name if len(folder_name) == 40 else None)


def test_a_revision_is_asked_for_and_exported_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once exported, the newest rows would stand for those of any commit."""

    def load(name: str, config: str | None, revision: str | None) -> datasets.DatasetDict:
        row = {"question": f"at {revision}", "answer": "#### 1"}
        return datasets.DatasetDict(train=datasets.Dataset.from_list([row]))

    monkeypatch.setenv("MICROADAM_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", load)
    for revision in (None, "v1", 40 * "a"):
        data = text.load(_config(source="hub", splits=["train"], revision=revision))
        assert data.rows["train"][0]["question"] == f"at {revision}"
    with pytest.raises(ExperimentError, match=r"dataset\.revision=v1: .* dataset\.source=hub"):
        _config(source="auto", revision="v1")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (datasets.exceptions.DatasetGenerationError("no room"), "no room"),
        (TimeoutError(), "Timeout"),
    ],
)
def test_what_keeps_the_hubs_rows_from_us_is_told(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ExperimentError, match=f"gsm8k.*{reason}"):
        text.load(_config(source="hub"))


def test_the_same_rows_are_generated_again() -> None:
    first, second = (text.load(_config(source="generated")) for _ in range(2))
    assert first == second


def test_where_only_real_data_will_do_the_error_tells_where_it_looked_and_three_ways() -> None:
    with pytest.raises(ExperimentError) as error:
        text.load(_config(source="real"))
    looked = ("dataset.source=real", "no folder no-such-folder/gsm8k", "openai/gsm8k")
    remedies = ("dataset.path=FOLDER", "dataset.source=generated", "go online")
    for words in (*looked, *remedies):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"question": "a", "answer": "b"}\n{"question": \n',
            r"train\.jsonl, line 2: not valid JSON",
        ),
        ('{"question": "a"}\n', r"train\.jsonl, line 1: needs answer \(str\)"),
        ('{"question": "a", "answer": 3}\n', r"line 1: needs answer \(str\)"),
        ("[1, 2]\n", r"line 1: needs question \(str\)"),
        ("", r"train\.jsonl: the file has no rows"),
        ("\n\n", r"train\.jsonl: the file has no rows"),
    ],
)
def test_a_broken_file_is_named_with_its_line(folder: Path, content: str, message: str) -> None:
    (folder / "train.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(ExperimentError, match=message):
        text.load(_config(path=str(folder)))


def test_bytes_that_are_no_text_are_refused(folder: Path) -> None:
    (folder / "train.jsonl").write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(ExperimentError, match=r"train\.jsonl: not UTF-8"):
        text.load(_config(path=str(folder)))


def test_a_missing_folder_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"no such folder.*train and test"):
        text.load(_config(path=str(tmp_path / "nothing")))
    with pytest.raises(ExperimentError, match=r"train\.jsonl: there is no such file"):
        text.load(_config(path=str(tmp_path)))
