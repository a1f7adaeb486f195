"""Names that the tests of the experiments share."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.config import RunConfig
from experiments.data import word_problems
from experiments.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]

Compose = Callable[..., RunConfig]  # from command-line overrides

SHORT = ("scale=smoke", "hardware=cpu", "evaluation.limit=2", "evaluation.max_new_tokens=4")
BRIEF = (*SHORT, "training.max_steps=1", "evaluation.before_training=false")
CLOCKS = ("time/", "speed/", "memory/peak")  # what no two runs have in common


def without_clocks(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.startswith(CLOCKS)}


def outcome(config: RunConfig) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All that a finished run measured, apart from the clocks."""
    run = RunFolder(config)
    record = run.finished_record()
    assert record is not None
    return [without_clocks(m) for m in run.metrics()], without_clocks(record["metrics"])


def write_problems(folder: Path, num_train: int, num_test: int) -> None:
    """A folder for ``dataset.path`` with few problems; generating thousands takes seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, num_rows in (("train", num_train), ("test", num_test)):
        rows = word_problems.generate(split, num_rows)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def run_py(arguments: Sequence[str], output: Path) -> int:
    """Runs ``run.py`` in this process, which must be one of its own, and returns its exit code.

    What it prints goes to two files, ``output`` with the suffixes ``.out`` and ``.err``.
    """
    for stream, suffix in ((sys.stdout, ".out"), (sys.stderr, ".err")):
        with output.with_suffix(suffix).open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = ["run.py", *arguments]
    try:
        runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0
