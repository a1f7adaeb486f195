"""Evaluates the model of a finished run again: by another protocol, or on more examples.

    python -m scripts.evaluate results/runs/.../<hash> evaluation=gsm8k_5shot
    python -m scripts.evaluate results/runs/.../<hash> evaluation.limit=null hardware=cpu

After the run's folder come run.py's overrides, of how it is evaluated and on which hardware; all
else stays as in the run. The scores are printed, and kept in the folder below evaluations/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import atomic, hub
from experiments.config import RunConfig
from experiments.errors import ExperimentError, reported, require
from experiments.report.records import Record
from experiments.runs.reading import read_record
from run import by_key, compose

# What may differ from the run, and what stands in for rules of training that do not matter here.
_MAY_DIFFER = ("evaluation.", "hardware.", "dataset.path.", "dataset.root.")
_WITHOUT_TRAINING = ("training.gradient_release=false", "hardware.micro_batch_size=1")


def composed(folder: Path, record: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    """The config of the run, with these overrides and its trained model in place of the first.

    Raises:
        ExperimentError: an override is not about evaluation; the model was not kept; the files in
            configs/ no longer describe the run.
    """
    of_run = shlex.split(record["command"])[2:]  # without python run.py
    if not Record(folder.name, record).is_run_of(dataclasses.asdict(compose(*of_run))):
        raise ExperimentError(
            f"{folder}: its command, {record['command']}, composes another run today, as configs "
            f"have changed; git checkout {record['git_commit']} -- configs brings them back"
        )
    changes = by_key(overrides)
    for key, override in changes.items():
        if not f"{key}.".startswith(_MAY_DIFFER):
            raise ExperimentError(
                f"{override}: the model is trained; only evaluation, hardware, dataset.path and "
                "dataset.root can differ"
            )
    config = compose(*{**by_key(of_run), **by_key(_WITHOUT_TRAINING), **changes}.values())
    data = config.dataset.path
    require(
        data is None or Path(data).is_dir(),
        "dataset.path",
        data,
        "the run had it, but there is no such folder here; give it again with dataset.path=FOLDER",
    )
    model = folder / "model"
    require(
        model.is_dir(),
        "run",
        folder,
        f"its model was not kept; {record['command']} training.save_model=true force=true trains "
        "it again",
    )
    config.model = dataclasses.replace(
        config.model,
        path=str(model),
        weights="pretrained",
        hub_id=None,
        package=None,
        revision=None,
    )
    config.hardware.parallel = "ddp"  # this one process has all of the model
    return config


def evaluate(folder: Path, overrides: Sequence[str]) -> Path:
    """Evaluates the run's model, prints the scores, and returns the file that holds them.

    Raises:
        ExperimentError: as `composed`; there is no finished run; its data has changed.
    """
    record = read_record(folder / "record.json")
    if record is None or record["status"] != "finished":
        raise ExperimentError(
            f"{folder}: not a finished run; python -m experiments.status lists all of them"
        )
    config = composed(folder, record, overrides)
    hub.go_offline_if_unreachable()
    from experiments import hardware, models, summary, tasks  # after it, as they load transformers
    from experiments.runs.provenance import provenance

    models.quieten_transformers()
    print(f"loading {config.dataset.name} and {folder / 'model'}", flush=True)
    machine = hardware.resolve(config.hardware)
    task = tasks.chosen(config)(config, machine)
    require(
        task.data_digest == record.get("data_digest", task.data_digest),
        "dataset",
        config.dataset.name,
        f"not the data of the run ({record['data_source']}): examples that it was trained on could "
        "be among those held out; give the same files with dataset.path or MICROADAM_DATA",
    )
    metrics = task.logged_evaluation()
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    result = {
        "evaluated_at": now,
        "run": record["run"],
        "command": shlex.join(["python", "-m", "scripts.evaluate", str(folder), *overrides]),
        **provenance(),
        "data_source": task.data_source,
        "data_digest": task.data_digest,
        "metrics": metrics,
        "hardware": machine.describe(),
        "evaluation": dataclasses.asdict(config.evaluation),
    }
    path = folder / "evaluations" / f"{now}.json"
    atomic.write_text(path, json.dumps(result, indent=2, allow_nan=False) + "\n")
    print(f"\n{summary.evaluation_summary(metrics)}\n\n{path}")
    return path


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("overrides", nargs="*", help="such as evaluation=gsm8k_5shot")
    given = parser.parse_args(arguments)
    with reported():
        evaluate(given.run, given.overrides)


if __name__ == "__main__":
    main(sys.argv[1:])
