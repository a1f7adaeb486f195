"""What a user gets from pip, what the constraints promise, and how the setup script behaves."""

from __future__ import annotations

import email
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import microadam
from microadam import ops

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel built from the sdist, with other code beside it and no torch to build against."""
    root = tmp_path_factory.mktemp("packaging")
    tree, poison = root / "tree", root / "poison"
    shutil.copytree(
        ROOT / "microadam", tree / "microadam", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("experiments/__init__.py", "tests/test_decoy.py", "benchmarks/step.py", "run.py"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).touch()
    poison.mkdir()
    (poison / "torch.py").write_text("raise ImportError('a build must not import torch')")

    def build(what: str, folder: Path) -> Path:
        code = f"from setuptools import build_meta; build_meta.build_{what}({str(root)!r})"
        env = {**os.environ, "PYTHONPATH": str(poison)}
        subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=env, check=True, capture_output=True
        )
        (built,) = root.glob("*.tar.gz" if what == "sdist" else "*.whl")
        return built

    with tarfile.open(build("sdist", tree)) as sdist:
        sdist.extraction_filter = getattr(tarfile, "data_filter", None)  # absent before 3.11.4
        sdist.extractall(root / "unpacked")
    (unpacked,) = (root / "unpacked").iterdir()
    return zipfile.ZipFile(build("wheel", unpacked))


def test_sdist_holds_what_the_native_step_is_built_from(wheel: zipfile.ZipFile) -> None:
    (unpacked,) = (Path(str(wheel.filename)).parent / "unpacked").iterdir()
    sources = {p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert {
        p.relative_to(unpacked) for p in (unpacked / "csrc").rglob("*") if p.is_file()
    } == sources
    assert (unpacked / "setup.py").exists()


def test_wheel_is_for_a_platform_and_every_python(wheel: zipfile.ZipFile) -> None:
    _, _, python, abi, platform = Path(str(wheel.filename)).stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert platform != "any"


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "microadam").rglob("*.py")}
    assert files == sources | {"microadam/py.typed"}


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nonexistent/c++"}, "/nonexistent/c++ cannot be run"),
        ({"CXX": "", "PATH": "/nonexistent"}, "no C++ compiler was found"),
    ],
)
def test_build_without_a_compiler_warns_once_and_succeeds(
    environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    """The package is then plain Python; test_ops.py makes it take a step."""
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("WARNING: MicroAdam's native library was not built") == 1
    assert reason in result.stderr
    assert list(tmp_path.rglob("optimizer.py"))
    assert not list(tmp_path.rglob("*.so"))


def test_a_build_without_the_cuda_kernels_that_were_asked_for_fails(tmp_path: Path) -> None:
    """pip hides the output of a build that succeeds."""
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "MICROADAM_CUDA_ARCHITECTURES": "all", "CUDA_HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "MICROADAM_CUDA_ARCHITECTURES asks for CUDA kernels: no nvcc" in result.stderr


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    info = f"microadam-{microadam.__version__}.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert required == ["torch>=2.11"]
    assert metadata["Version"] == microadam.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")


# The constraints


def pins() -> dict[str, str]:
    """Package -> version, from the lines that apply to this Python."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", line
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.name not in found, f"{requirement.name} is pinned twice"
            found[requirement.name] = specifier.version
    return found


def installed_requirements(roots: list[str]) -> set[str]:
    """Names of ``roots`` and of all dependencies of the installed ones among them."""
    names: set[str] = set()
    todo = [Requirement(root) for root in roots]
    seen = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        names.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for child in map(Requirement, required):
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
                todo.append(child)
    return names


def test_everything_that_setup_installs_is_pinned() -> None:
    """Including indirect dependencies: an unpinned one changes under a user's feet."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    roots = PYPROJECT["project"]["dependencies"]
    roots = roots + extras["experiments"] + extras["dev"] + extras["docs"]
    roots.append("cuda-toolkit[nvcc]")  # scripts/setup.sh
    assert installed_requirements(roots) - pins().keys() == set()


def test_pins_satisfy_pyproject() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    requirements = PYPROJECT["project"]["dependencies"] + [
        line for extra in extras for line in extra
    ]
    pinned = pins()
    for requirement in map(Requirement, requirements):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), (
            requirement
        )


# The setup script, with an interpreter that only records how it is called

FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *"pip install"*ffcv*) echo "$*" >> "$FAKE_CALLS"; exit "${FAKE_FFCV_EXIT:-0}" ;;
    *"pip install"*) echo "$*" >> "$FAKE_CALLS"; echo "pip was here"; exit "${FAKE_PIP_EXIT:-0}" ;;
    *version_info*) exit "${FAKE_UNSUPPORTED:-0}" ;;
    --version) echo "Python 3.9.1" ;;
esac
"""


class SetUp:
    """A copy of what setup reads, and a stand-in for the environment it would create."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "project"
        (self.project / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts/setup.sh", self.project / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.project)
        self.venv = folder / "environment"
        self.python = self.venv / "bin" / "python"
        self.python.parent.mkdir(parents=True)
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.calls = folder / "calls"

    def run(self, **env: str) -> subprocess.CompletedProcess[str]:
        own = {"VENV": str(self.venv), "PYTHON": "", "FAKE_CALLS": str(self.calls)}
        self.calls.write_text("")
        return subprocess.run(
            ["bash", str(self.project / "scripts/setup.sh")],
            env={**os.environ, **own, **env},
            capture_output=True,
            text=True,
        )

    def num_installs(self) -> int:
        return len(self.calls.read_text().splitlines())


@pytest.fixture
def set_up(tmp_path: Path) -> SetUp:
    return SetUp(tmp_path)


def test_setup_does_its_work_once(set_up: SetUp) -> None:
    first = set_up.run()
    assert first.returncode == 0, first.stderr
    assert set_up.num_installs() == 5
    second = set_up.run()
    assert second.returncode == 0
    assert "up to date" in second.stdout
    assert set_up.num_installs() == 0


@pytest.mark.parametrize(
    "changed", ["pyproject.toml", "constraints.txt", "setup.py", "csrc/step.cpp"]
)
def test_setup_runs_again_when_an_input_changed(set_up: SetUp, changed: str) -> None:
    assert set_up.run().returncode == 0
    path = set_up.project / changed
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write("# changed\n")
    assert set_up.run().returncode == 0
    assert set_up.num_installs() == 5


def test_failed_setup_shows_why_and_is_taken_up_again(set_up: SetUp) -> None:
    failed = set_up.run(FAKE_PIP_EXIT="1")
    assert failed.returncode != 0
    assert "pip was here" in failed.stderr
    assert "setup.log" in failed.stderr
    assert set_up.run().returncode == 0
    assert set_up.num_installs() == 5


def test_setup_without_ffcv_says_so_and_ends_well(set_up: SetUp) -> None:
    """A machine without OpenCV, or a compiler that fails, must not cost everything else."""
    done = set_up.run(FAKE_FFCV_EXIT="1")
    assert done.returncode == 0
    assert "FFCV, the fast image loader, could not be built" in done.stdout
    assert "up to date" in set_up.run().stdout


@pytest.mark.skipif("CI" not in os.environ, reason="only the set-up of .ci/run must have built it")
def test_setup_has_built_ffcv_and_the_native_step() -> None:
    """Otherwise the tests of the native step would be skipped, and nobody would notice."""
    importlib.import_module("ffcv")
    assert ops.native_kernel("cpu"), ops.load_native_library()


def test_setup_names_a_python_that_is_too_old(set_up: SetUp) -> None:
    refused = set_up.run(PYTHON=str(set_up.python), FAKE_UNSUPPORTED="1")
    assert refused.returncode != 0
    assert "is Python 3.9.1; this project needs Python 3.10 to 3.13" in refused.stderr


def test_setup_never_clears_a_folder_that_is_no_environment(set_up: SetUp) -> None:
    """`python -m venv --clear` empties whatever folder it is given."""
    thesis = set_up.venv / "thesis.txt"
    thesis.write_text("years of work")
    set_up.python.unlink()
    refused = set_up.run()
    assert refused.returncode != 0
    assert "other than a virtual environment" in refused.stderr
    assert thesis.read_text() == "years of work"


def test_make_alone_explains_every_target() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.fail("make is not installed; it is how this project is set up")
    shown = subprocess.run(
        [make, "-C", str(ROOT)], capture_output=True, text=True, check=True
    ).stdout
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    explained = re.findall(r"^  make (\S+) +\S", shown, re.MULTILINE)
    assert sorted(explained) == sorted(phony.split())
