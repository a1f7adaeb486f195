from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.microadam.cuda_source import Emulation, loaded_emulation


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def cuda_emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulation]:
    with loaded_emulation(tmp_path_factory.mktemp("cuda_emulation")) as emulation:
        yield emulation
