"""What all tests share: hypothesis profile, folders, GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# No deadline: the first example pays for torch's warm-up. CI repeats the same examples every time.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
# The same examples each time, and a failing one is shown as found: for scripts/gpu_check.sh.
hypothesis.settings.register_profile(
    "quick",
    deadline=None,
    derandomize=True,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure() -> None:
    """Nothing is fetched. The hub's libraries read this once, when they are imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is left behind in the user's cache, nothing found there or among the user's data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICROADAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MICROADAM_DATA", str(tmp_path_factory.mktemp("data")))
        yield
