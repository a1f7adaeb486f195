"""Shared by all tests: hypothesis profiles, folders, skipping GPU tests if there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# No deadline: the first example pays for torch's warm-up. CI runs the same examples every time.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
# The same examples each time, and a failing one is shown unshrunk: for scripts/gpu_check.sh.
hypothesis.settings.register_profile(
    "quick",
    deadline=None,
    derandomize=True,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure() -> None:
    """Prevents downloads. The hub's libraries read this once, when they are imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither write to the user's cache nor read from it or from the user's data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICROADAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MICROADAM_DATA", str(tmp_path_factory.mktemp("data")))
        yield
