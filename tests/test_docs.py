"""The documentation: it builds strictly, its reference is complete, and what it shows works.

Pages go stale silently: moving a file breaks a link, changing a name breaks an example.
"""

from __future__ import annotations

import doctest
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import microadam
from experiments import planning
from microadam import MicroAdam, enable_gradient_release
from run import compose
from scripts import memory_plan

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def build(source: Path, target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What `make docs` runs."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", str(ROOT / "docs")]
    return subprocess.run(
        [*command, *options, str(source), str(target)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_site_builds_and_its_reference_has_every_public_name(tmp_path: Path) -> None:
    built = build(ROOT, tmp_path)
    assert built.returncode == 0, built.stderr
    start = (tmp_path / "index.html").read_text()
    (first_page,) = re.findall(r'href="(.+)"', start)
    assert (tmp_path / first_page).exists()
    reference = (tmp_path / "docs/reference.html").read_text()
    missing = {name for name in microadam.__all__ if f'id="microadam.{name}"' not in reference}
    assert missing == set()


def test_a_dead_link_anchor_or_reference_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "index.md").write_text(
        "# A page\n\n[dead](gone.md), [dead](#no-such-heading), [dead](picture.png)\n\n"
        "```{eval-rst}\n`NoSuchName`\n```\n"
    )
    built = build(
        tmp_path, tmp_path / "site", "-D", "root_doc=index", "-D", "include_patterns=index.md"
    )
    assert built.returncode != 0
    for target in ("gone.md", "no-such-heading", "picture.png", "NoSuchName"):
        assert target in built.stderr


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```pycon" in page.read_text()], ids=lambda page: page.stem
)
def test_examples_give_what_they_show(page: Path) -> None:
    """A page's ```pycon blocks, one after another."""
    blocks = re.findall(r"^```pycon\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    example = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page.name, str(page), 0)
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("documented", [MicroAdam, enable_gradient_release])
def test_examples_in_docstrings_run(documented: object) -> None:
    model = torch.nn.Linear(3, 2)
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    before = model.weight.clone()
    names = {
        "MicroAdam": MicroAdam,
        "enable_gradient_release": enable_gradient_release,
        "batches": [(x, y)],
        "loss_fn": torch.nn.functional.mse_loss,
        "model": model,
        "scheduler": SimpleNamespace(step=lambda: None),
        "x": x,
        "y": y,
    }
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, "example", globs=names)
    assert doctest.DocTestRunner().run(example).failed == 0
    assert not torch.equal(model.weight, before)


# What pages mention


TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
FENCED = re.compile(r"^```.*\n(?P<code>[^`]*)^```", re.MULTILINE)
CODE = "\n".join([*FENCED.findall(TEXT), *re.findall(r"`([^`\n]+)`", FENCED.sub("", TEXT))])
RUNS = re.findall(r"^(?:python|torchrun .+) run\.py(?!.*\.\.\.)([^#\n\\]*)", CODE, re.MULTILINE)


def cells_of_readme(row: str) -> list[str]:
    """The cells after the first, which begins with ``row``, link or not."""
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        if line.startswith("|") and first.lstrip("[").startswith(row):
            return others
    raise AssertionError(f"README has no row {row!r}")


@pytest.mark.parametrize(
    ("row", "model"),
    [
        ("one tensor of 2^24", "one-tensor"),
        ("BERT-base", "bert-base"),
        ("the same, with gradients of a text batch", "bert-base-mnli"),
        ("SmolLM2-135M", "smollm2-135m"),
        ("ResNet-50", "resnet-50"),
    ],
)
def test_readme_has_the_step_times_that_were_measured(row: str, model: str) -> None:
    measured = json.loads((ROOT / "results/benchmark_step_cpu.json").read_text())["rows"]
    ratios = {
        r["dtype"]: r["ratio"]
        for r in measured
        if r["model"] == model and r["optimizer"] == "MicroAdam"
    }
    assert cells_of_readme(row) == [f"{ratios[dtype]:.2f}" for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize(
    ("row", "table", "model", "column"),
    [
        ("MNLI", "table1", "MiniLM-L6", "accuracy (%)"),
        ("the same, MiniLM-L3", "table1", "MiniLM-L3", "accuracy (%)"),
        ("GSM8K", "table2", "SmolLM2-135M", "held-out loss"),
        ("Instructions", "table3", "SmolLM2-135M", "held-out loss"),
        ("CIFAR-10", "table4", "ResNet-18", "accuracy (%)"),
    ],
)
def test_readme_has_the_results_of_the_tables(
    row: str, table: str, model: str, column: str
) -> None:
    written = json.loads((ROOT / f"results/{table}.json").read_text())
    index = [c["label"] for c in written["columns"]].index(column)
    texts = {
        r["optimizer"]: r["values"][index]["text"] for r in written["rows"] if r["model"] == model
    }
    expected = [
        next(text for optimizer, text in texts.items() if re.fullmatch(pattern, optimizer))
        for pattern in ("AdamW?", "AdamW?-8bit", "MicroAdam(, m = 10)?")
    ]
    assert [cell.rstrip("%") for cell in cells_of_readme(row)] == expected


def test_targets_of_make_exist() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    named = set(re.findall(r"^make ([a-z0-9-]+)", CODE, re.MULTILINE))
    assert len(named) > 10
    assert named - set(phony[1].split()) == set()


def test_modules_that_are_run_exist() -> None:
    named = set(re.findall(r"python -m ([a-z_.]+)", CODE))
    assert len(named) > 3
    assert {name for name in named if importlib.util.find_spec(name) is None} == set()


@pytest.mark.parametrize("arguments", sorted(set(map(str.strip, RUNS))))
def test_commands_of_runs_compose(arguments: str) -> None:
    """Every group, choice and key exists; of a sweep, only the first job is composed."""
    compose(*(word.partition(",")[0] for word in arguments.split() if not word.startswith("--")))


def test_files_exist() -> None:
    named = set(re.findall(r"`([\w./-]+\.(?:cpp|cuh?|h|py|sh|yaml))`", TEXT))
    paths = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("[a-z]*/**/*.*")}
    paths |= {path.name for path in ROOT.glob("*")}
    assert len(named) > 20
    assert {n for n in named if not any(f"/{path}".endswith(f"/{n}") for path in paths)} == set()


def test_functions_of_the_algorithm_exist() -> None:
    rows = re.findall(
        r"^\|[^|]+\|([^|]+)\|", (ROOT / "docs/algorithm.md").read_text(), re.MULTILINE
    )
    names = re.findall(r"`([\w.]+)`", " ".join(rows))
    assert len(names) > 10
    for name in names:
        assert callable(
            pkgutil.resolve_name(
                f"microadam.{name}" if "." in name else f"microadam.reference.{name}"
            )
        )


def test_table_of_what_fits_is_what_the_planner_says() -> None:
    """Every line for the card that results/memory_plan.json is for, and one for another card."""
    table = yaml.safe_load((ROOT / "configs/table/memory.yaml").read_text())
    planned = json.loads((ROOT / "results/memory_plan.json").read_text())["rows"]
    page = (ROOT / "docs/scale.md").read_text()
    lines = memory_plan.scale_table(table, {table["hardware"]: planned}).splitlines()
    assert len(lines) == 2 + len(table["models"])
    assert [line for line in lines if line not in page] == []
    plan = planning.make(compose("scale=paper", "hardware=rtx3090", "task=mnli", "model=bert_base"))
    assert f"| BERT-base | 24 | **{plan.peak_bytes / 2**30:.1f}** |" in page
