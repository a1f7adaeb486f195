from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.microadam.cuda_source import Emulation, build_emulation


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def cuda_emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulation]:
    library = build_emulation(tmp_path_factory.mktemp("cuda_emulation"))
    schema = str(torch.ops.microadam.step_.default._schema).removeprefix("microadam::")
    definition = torch.library.Library("microadam_emulation", "DEF")
    definition.define(schema)
    torch.ops.load_library(str(library))
    yield Emulation(library, torch.ops.microadam_emulation.step_)
    del definition
