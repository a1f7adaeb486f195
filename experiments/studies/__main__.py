"""Runs studies and writes what they measured to results/studies/NAME.json.

python -m experiments.studies                        list the studies and their settings
python -m experiments.studies all                    every study, about 5 minutes on an idle core
python -m experiments.studies rosenbrock lr=0.05     one study, with a changed setting
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import atomic, hub
from experiments.errors import ExperimentError, reason, reported
from experiments.runs.provenance import provenance

STUDIES = ("rosenbrock", "convergence", "ablations", "compressor", "galore_error")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", nargs="?", choices=("all", *STUDIES), help="default: list them")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings to change for that one study"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("MICROADAM_DATA", "data")),
        help="folder with gsm8k/ and mnli/, each with a train.jsonl (default: $MICROADAM_DATA, "
        "else data)",
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    arguments = parser.parse_args()
    if arguments.study is None:
        print(_overview())
        return
    names = STUDIES if arguments.study == "all" else (arguments.study,)
    if len(names) > 1 and arguments.settings:
        parser.error("settings belong to one study: name it instead of all")
    hub.go_offline_if_unreachable()
    with reported("the studies that had finished are saved"):
        for name in names:
            path = run(name, arguments.settings, arguments.data, arguments.results)
            print(f"{name}: {path}")


def run(name: str, changes: list[str], data: Path, results: Path) -> Path:
    """Runs one study and returns the file written.

    Args:
        name: one of `STUDIES`.
        changes: ``key=value``, each a setting that differs from its default.
        data: folder of the data sets.
        results: folder whose ``studies/`` the file is written to.

    Raises:
        ExperimentError: a setting is unknown or data is missing.
    """
    study = _module(name)
    settings = _settings(name, study, changes)
    started = time.perf_counter()
    measured = study.run(settings, data)
    document = {
        "study": name,
        "command": " ".join(["python -m experiments.studies", name, *changes]),
        "settings": dataclasses.asdict(settings),
        "wall_s": round(time.perf_counter() - started, 1),
        "hardware": {"machine": platform.machine(), "num_threads": torch.get_num_threads()},
        "provenance": provenance(),
        "results": _rounded(measured),
    }
    path = results / "studies" / f"{name}.json"
    atomic.write_text(path, json.dumps(document, separators=(",", ":")) + "\n")
    return path


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"experiments.studies.{name}")


def _settings(name: str, study: ModuleType, changes: list[str]) -> Any:
    try:
        changed = OmegaConf.from_dotlist(changes)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(study.Settings), changed))
    except OmegaConfBaseException as error:
        known = ", ".join(field.name for field in dataclasses.fields(study.Settings))
        message = f"{' '.join(changes)}: {reason(error)}; the settings of {name} are {known}"
        raise ExperimentError(message) from error


def _overview() -> str:
    """Every study with its settings, read from the modules so that they cannot be out of date."""
    lines = []
    for name in STUDIES:
        study = _module(name)
        lines.append(f"{name}: {(study.__doc__ or '').splitlines()[0]}")
        lines += [f"    {key}={value}" for key, value in vars(study.Settings()).items()]
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    """Floats to 6 significant digits: no figure shows more, and the files stay small."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
