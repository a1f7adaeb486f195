"""Text data sets: a local folder, the hub or its cache, or generated, in that order.

Whatever the source, a data set is one ``<split>.jsonl`` file per split, and its rows are checked.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import atomic, hub
from experiments.config import DatasetConfig
from experiments.data import choices, sentence_pairs, sources, word_problems
from experiments.data.digest import digest
from experiments.errors import ExperimentError, require

Row = dict[str, Any]
_TYPES: dict[str, type] = {"str": str, "int": int, "list": list, "dict": dict}

_REVISION = "revision.txt"  # in an export from the hub

# What stands in where neither a folder nor the hub has it: its generator, and the rows of a split.
_STAND_INS: dict[str, tuple[Callable[[str, int], list[Row]], dict[str, int]]] = {
    "gsm8k": (word_problems.generate, {"train": 7473, "test": 1319}),
    "mnli": (
        sentence_pairs.generate,
        {"train": 8000, "validation_matched": 2000, "validation_mismatched": 2000},
    ),
    "open_platypus": (choices.instructions, {"train": 24926}),
    "instruct_stem": (choices.instructions, {"train": 4809}),
    "arc_challenge": (choices.arc, {"train": 100, "test": 400}),
    "hellaswag": (choices.hellaswag, {"train": 100, "validation": 400}),
    "mmlu": (choices.mmlu, {"dev": 15, "test": 400}),
    "winogrande": (choices.winogrande, {"train": 100, "validation": 400}),
}


@dataclass(frozen=True)
class TextData:
    """The rows of every split, and where they came from."""

    source: str  # local | hub | generated
    rows: dict[str, list[Row]]
    revision: str | None  # the hub's commit, if known

    @property
    def digest(self) -> str:
        """Changes when a row changes."""
        rows = (row for of_split in self.rows.values() for row in of_split)
        return digest(json.dumps(row, sort_keys=True).encode() for row in rows)


def load(config: DatasetConfig, splits: Sequence[str] | None = None) -> TextData:
    """Reads the data set from the first source that has it.

    Args:
        splits: only these; by default all splits of the data set.

    Raises:
        ExperimentError: a folder is missing or empty, a line is broken, or the hub cannot be
            reached and nothing may stand in for it.
    """
    source, folder = _find(config)
    wanted = splits or config.splits
    if config.num_held_out is not None:  # the test rows are cut from the training rows
        wanted = ["train", *(split for split in wanted if split not in ("train", "test"))]
    files = {split: folder / f"{split}.jsonl" for split in wanted}
    rows = {split: read_jsonl(path, config.columns) for split, path in files.items()}
    if config.num_held_out is not None:
        num_left = len(rows["train"]) - config.num_held_out
        require(
            num_left > 0,
            "dataset.num_held_out",
            config.num_held_out,
            f"{files['train']} has {len(rows['train'])} rows, and some must be left to train on",
        )
        rows["train"], rows["test"] = rows["train"][:num_left], rows["train"][num_left:]
    if config.num_train is not None and "train" in rows:
        rows["train"] = rows["train"][: config.num_train]
    file = folder / _REVISION
    is_known = source == "hub" and file.is_file()  # older exports have none
    return TextData(source, rows, file.read_text(encoding="utf-8") if is_known else None)


def _find(config: DatasetConfig) -> tuple[str, Path]:
    return sources.first(
        config,
        local=lambda folder: folder,
        hub=lambda hub_id: _exported_from_hub(hub_id, config.hub_config, config.revision),
        generated=(lambda: _generated(config)) if config.name in _STAND_INS else None,
    )


def _exported_from_hub(hub_id: str, hub_config: str | None, revision: str | None) -> Path:
    name = "-".join([hub_id, *filter(None, [hub_config])])
    name = (name if revision is None else f"{name}@{revision}").replace("/", "--")
    folder = hub.cache_dir() / "datasets" / name
    if not folder.exists():
        loaded = hub.load_dataset(hub_id, hub_config, revision)
        with atomic.new_folder(folder) as partial:
            for split in loaded:
                text = _to_jsonl(loaded[split])
                (partial / f"{split}.jsonl").write_text(text, encoding="utf-8")
            commit = hub.data_revision(next(iter(loaded.values())))
            if commit is not None:
                (partial / _REVISION).write_text(commit, encoding="utf-8")
    return folder


def _generated(config: DatasetConfig) -> Path:
    texts = {split: _generated_jsonl(config.name, split) for split in config.splits}
    name = f"generated-{config.name}-{digest(map(str.encode, texts.values()))[:10]}"
    folder = hub.cache_dir() / "datasets" / name
    if not folder.exists():
        with atomic.new_folder(folder) as partial:
            for split, text in texts.items():
                (partial / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


@functools.cache  # read for training and for evaluation; takes seconds
def _generated_jsonl(name: str, split: str) -> str:
    generate, num_rows = _STAND_INS[name]
    return _to_jsonl(generate(split, num_rows[split]))


def _to_jsonl(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_jsonl(path: Path, columns: dict[str, str]) -> list[Row]:
    """The rows of a JSON-lines file, each checked to hold ``columns`` with their types.

    Raises:
        ExperimentError: names the file and, if one is broken, the line.
    """
    if not path.is_file():
        raise ExperimentError(
            f"{path}: there is no such file, and the run needs it; add it, or list only the splits "
            "you have in dataset.splits"
        )
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path}: not UTF-8 text ({error.reason})") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_parse_row(line, columns, f"{path}, line {number}"))
    if not rows:
        raise ExperimentError(f"{path}: the file has no rows")
    return rows


def _parse_row(line: str, columns: dict[str, str], where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ExperimentError(
            f"{where}: not valid JSON ({error.msg}, column {error.colno})"
        ) from error
    for column, kind in columns.items():
        if not isinstance(row, dict) or not isinstance(row.get(column), _TYPES[kind]):
            raise ExperimentError(f"{where}: needs {column} ({kind})")
    return row
