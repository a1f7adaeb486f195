"""Entry point: composes the config and executes one run, or many with --multirun."""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments import config, hub
from experiments.errors import ExperimentError
from experiments.optimizers import OPTIMIZERS


def register_schemas() -> None:
    """Makes the dataclasses known to Hydra as what every config file is merged into."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=config.RunConfig)
    for name, schema in OPTIMIZERS.items():
        store.store(group="schema/optimizer", name=name, node=schema)


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(composed: DictConfig) -> None:
    run_config = config.parse(composed)
    hub.go_offline_if_unreachable()
    from experiments.runner import execute  # torch and transformers load only when a run starts

    execute(run_config)


# How Hydra and OmegaConf begin the lines that help nobody at the command line.
_NOISE = (
    "full_key:",
    "object_type=",
    "reference_type=",
    "Config search path",
    "provider=",
    "Set the env",
)


def _one_line(error: BaseException) -> str:
    """The message; for Hydra's and OmegaConf's errors with their causes, but without the noise."""
    if isinstance(error, ExperimentError):
        return str(error)
    messages: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        for line in map(str.strip, str(cause).splitlines()):
            if line and not line.startswith(_NOISE) and line not in messages:
                messages.append(line)
        cause = cause.__cause__
    return " ".join(messages)


if __name__ == "__main__":
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to here instead of half-printed
    register_schemas()
    try:
        main()
    except (ExperimentError, HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
