"""Who may import whom, read from the sources without running them.

`microadam` must stay usable on its own, so it imports torch and nothing else, and each large
library is imported in one place only. The first public MicroAdam imported wandb inside the
optimizer: nobody without an experiment tracker could use it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = {"microadam", "experiments", "benchmarks", "scripts", "run", "tests"}
OWN_FILES = sorted(
    path
    for folder in ("microadam", "experiments", "benchmarks", "scripts")
    for path in (ROOT / folder).rglob("*.py")
) + sorted(ROOT.glob("run.py"))

# Library -> where it may be imported: files, or folders with everything below them.
DOORS = {
    "hydra": ("run.py",),
    "ffcv": ("experiments/data/",),
    "lm_eval": ("experiments/evaluation.py",),
    "wandb": ("experiments/runs/mirror.py",),
}

# What a run is made of knows nothing of who uses it.
MATERIAL = ("experiments/data/", "experiments/models/", "experiments/optimizers/")
USERS = tuple(f"experiments.{name}" for name in ("runner", "runs", "tasks", "training"))


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Full names of all imports, even in functions; ``package`` resolves relative ones."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folders = package.split(".")
            anchor = folders[: len(folders) - node.level + 1] if node.level else []
            module = ".".join([*anchor, *filter(None, [node.module])])
            # `from experiments import report` names a module too.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(path: str, source: str) -> list[str]:
    """What ``source``, at ``path`` relative to the root, imports in breach of the rules."""
    package = ".".join(Path(path).parent.parts)
    found = []
    for module in imported_modules(source, package):
        top = module.partition(".")[0]
        if path.startswith("microadam/"):
            allowed = top in {"microadam", "torch"} | sys.stdlib_module_names
        elif path.startswith("experiments/report/"):
            own = ("experiments.report.", "experiments.errors")
            allowed = module.startswith(own) or top not in {"torch", *PROJECT}
        elif path.startswith("experiments/"):
            is_upward = path.startswith(MATERIAL) and module.startswith(USERS)
            allowed = top not in PROJECT - {"microadam", "experiments"} and not is_upward
        else:
            allowed = top != "tests"
        if not allowed or not path.startswith(DOORS.get(top, "")):
            found.append(module)
    return found


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_the_direction(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    assert violations(relative, path.read_text(encoding="utf-8")) == []


def test_every_room_is_read() -> None:
    rooms = {path.relative_to(ROOT).parts[0] for path in OWN_FILES}
    assert {"microadam", "experiments", "run.py"} <= rooms


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("microadam/a.py", "import numpy"),
        ("microadam/a.py", "def f():\n    import wandb"),
        ("microadam/a.py", "from ..experiments import runs"),
        ("experiments/a.py", "from run import main"),
        ("experiments/training.py", "from hydra.utils import instantiate"),
        ("experiments/tasks/a.py", "import lm_eval.tasks"),
        ("experiments/training.py", "import wandb"),
        ("experiments/report/a.py", "from ..runs.reading import read_record"),
        ("experiments/report/a.py", "import torch"),
        ("experiments/models/a.py", "from experiments import tasks"),
        ("experiments/data/a.py", "from experiments.runs.folder import RunFolder"),
        ("run.py", "from tests.microadam import oracle"),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str) -> None:
    assert violations(path, source) != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "microadam/a.py",
            "import math, torch\nfrom microadam import reference\nfrom . import layout",
        ),
        (
            "experiments/a.py",
            "import torch\nfrom microadam import MicroAdam\nfrom .runs import folder",
        ),
        ("experiments/data/images.py", "from ffcv.loader import Loader"),
        ("experiments/report/a.py", "import csv, matplotlib\nfrom .tables import Table"),
        ("run.py", "import hydra\nfrom experiments import config"),
    ],
)
def test_a_right_import_is_let_pass(path: str, source: str) -> None:
    assert violations(path, source) == []
