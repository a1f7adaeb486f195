"""What code a result came from: the commit, and the versions of the packages that matter."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import microadam

_PACKAGES = ("torch", "transformers", "datasets", "lm-eval", "hydra-core", "numpy")
_OPTIONAL_PACKAGES = ("bitsandbytes", "torchao", "flashoptim", "torchvision", "ffcv")


def provenance() -> dict[str, Any]:
    """The commit, whether the tree differs from it, and the versions of relevant packages."""
    root = Path(__file__).parent
    commit = _git(root, "rev-parse", "HEAD")
    # Results change with every run, but no run reads them.
    paths = (":/", ":(top,exclude)results")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *paths)
    versions = {"python": platform.python_version(), "microadam": microadam.__version__}
    versions |= {package: importlib.metadata.version(package) for package in _PACKAGES}
    for package in _OPTIONAL_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
        "versions": versions,
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """Git's answer, or None outside a checkout or without git."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
