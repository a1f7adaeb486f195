"""Where a data set comes from: its local folder, the hub or its cache, or a generator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from experiments.config import DatasetConfig
from experiments.errors import ExperimentError, reason

T = TypeVar("T")


def first(
    config: DatasetConfig,
    local: Callable[[Path], T],
    hub: Callable[[str], T],
    generated: Callable[[], T] | None,
) -> tuple[str, T]:
    """The first source that has the data set with all its splits, and what was read from it.

    Args:
        local: reads a folder.
        hub: reads the data set of this name on the hub, or raises `OSError`.
        generated: generates a stand-in, also used with source=auto if the hub does not have the
            data set; None: there is no stand-in.

    Raises:
        ExperimentError: no permitted source has it.
    """
    folder = config.local_folder()
    if folder is not None:
        return "local", local(folder)
    if config.source == "generated":
        if generated is None:
            raise ExperimentError(
                f"dataset.source=generated: there is no generator for {config.name}; give a folder "
                "with dataset.path=FOLDER"
            )
        return "generated", generated()
    try:
        if config.hub_id is None:
            raise FileNotFoundError("it is not on the hub")
        return "hub", hub(config.hub_id)
    except OSError as error:
        why = reason(error)
        if config.source == "auto" and generated is not None:
            print(
                f"data: {config.hub_id or config.name} could not be loaded from the hub ({why}); "
                "using generated data instead"
            )
            return "generated", generated()
        looked = f"{config.why_not_local()}, and " if config.source != "hub" else ""
        tried = "is not on any hub: "
        if config.hub_id is not None:
            tried = (
                f"({config.hub_id}) could not be fetched from the hub ({why}): go online or set "
                "HF_HOME to a cache that has it, "
            )
        raise ExperimentError(
            f"dataset.source={config.source}: {looked}data set {config.name} {tried}give a folder "
            "with dataset.path=FOLDER, or use generated data with dataset.source=generated"
        ) from error
