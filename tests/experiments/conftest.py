"""Composing configs as the command line does."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.config import RunConfig
from run import compose
from tests.experiments.helpers import Compose


@pytest.fixture
def composed(tmp_path: Path) -> Compose:
    """Composes a config from command-line overrides; results go to a temporary folder."""

    def compose_run(*overrides: str) -> RunConfig:
        return compose(f"results_dir={tmp_path / 'results'}", *overrides)

    return compose_run
