"""Entry point: composes the config and executes one run, or many with --multirun."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import atomic, config, hub
from experiments.errors import ExperimentError, resume_hint
from experiments.optimizers import OPTIMIZERS
from experiments.runs import sweeps

_CONFIGS = Path(__file__).parent / "configs"
_INTERNAL_GROUPS = ("preset", "table")  # chosen by task and scale; for scripts/table.py


def groups() -> dict[str, list[str]]:
    """The choices a user has, by group."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(_CONFIGS.iterdir())
        if folder.is_dir() and folder.name not in _INTERNAL_GROUPS
    }


def config_groups() -> str:
    """The groups, one per line, for --help."""
    return "\n".join(f"  {name}: {', '.join(choices)}" for name, choices in groups().items())


def command_line(given: Sequence[str]) -> list[str]:
    """The arguments with all overrides grouped together, as Hydra's argparse requires.

    Raises:
        ExperimentError: as in `completed`.
    """
    options: list[str] = []
    overrides: list[str] = []
    for before, argument in zip(["", *given], given, strict=False):
        is_value = before.startswith("-") and "=" not in argument  # such as job in --cfg job
        is_option = argument.startswith("-") or (is_value and not argument.startswith("~"))
        (options if is_option else overrides).append(argument)
    printing = {"--cfg", "-c", "--info", "-i"}.intersection(options)
    if printing and {"--multirun", "-m"}.intersection(options):
        raise ExperimentError(f"{min(printing)}: prints one config; leave --multirun out")
    return completed(overrides) + options


def completed(overrides: Sequence[str]) -> list[str]:
    """The overrides as the user meant them, where Hydra would read them differently.

    ``~/`` at the beginning of a value is the home folder. Epochs that are asked for take precedence
    over a preset's number of steps, which would otherwise replace them.

    Raises:
        ExperimentError: Hydra cannot read an override, or would answer it with a traceback.
    """
    overrides = [_with_home(override) for override in overrides]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        remedy = (
            "a value with characters other than letters, digits and /-_.:%+@?| needs quotes that "
            "the shell leaves in place: 'dataset.path=\"a=b\"'"
        )
        if "=" not in error.override:
            remedy = "must be key=value"
        raise ExperimentError(f"{error.override}: cannot be read; {remedy}") from error
    names = {override.key_or_group for override in parsed}
    tasks = [task for o in parsed if o.key_or_group == "task" for task in _values_of(o)]
    has_images = bool(tasks) and all(task == "imagenet" for task in tasks)
    choices = groups()
    for override in parsed:
        name = override.key_or_group
        if not name:
            raise ExperimentError(f"{override.input_line}: there is no key before the =")
        if name in choices and not override.is_delete():
            # Hydra would print a traceback.
            if any(v is None or isinstance(v, int | float) for v in _values_of(override)):
                known = ", ".join(choices[name])
                raise ExperimentError(f"{override.input_line}: choose one of {known}")
        elif name.startswith("images.") and not has_images:
            raise ExperimentError(
                f"{override.input_line}: only task=imagenet has images; leave it out"
            )
    if "training.epochs" in names and "training.max_steps" not in names:
        overrides.append("training.max_steps=null")
    return overrides


def by_key(overrides: Sequence[str]) -> dict[str, str]:
    """The overrides by what they set; the last one counts.

    Raises:
        ExperimentError: as in `completed`.
    """
    parser = OverridesParser.create()
    return {
        parser.parse_override(override).key_or_group: override for override in completed(overrides)
    }


def _values_of(override: Override) -> list[Any]:
    """Its value, or all values of a sweep."""
    value = override.value()
    return value.list if isinstance(value, ChoiceSweep) else [value]


def _with_home(override: str) -> str:
    name, equals, value = override.partition("=")
    return f"{name}{equals}{Path(value).expanduser()}" if value.startswith("~/") else override


def register_schemas() -> None:
    """Registers the dataclasses with Hydra as the schemas that config files are merged into."""
    OmegaConf.register_new_resolver("config_groups", config_groups, replace=True)
    store = ConfigStore.instance()
    store.store(name="run_schema", node=config.RunConfig)
    for name, schema in OPTIMIZERS.items():
        store.store(group="schema/optimizer", name=name, node=schema)


def compose(*overrides: str) -> config.RunConfig:
    """The config that the command line composes from these overrides.

    Raises:
        ExperimentError: a choice or a key does not exist, or a value is missing or out of range.
    """
    register_schemas()
    with hydra.initialize_config_dir(str(_CONFIGS.resolve()), version_base="1.3"):
        try:
            composed = hydra.compose("config", overrides=completed(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise ExperimentError(_one_line(error)) from error
    return _parsed(composed, overrides)


def _parsed(composed: DictConfig, overrides: Sequence[str]) -> config.RunConfig:
    """The validated config that these overrides compose.

    Raises:
        ExperimentError: as in `config.parse`; or an override would have no effect.
    """
    run_config = config.parse(composed)
    for override in overrides:
        is_of_architecture = override.lstrip("+~").startswith("model.architecture")
        has_its_own = run_config.model.weights == "pretrained" and run_config.images is None
        if is_of_architecture and has_its_own:
            raise ExperimentError(
                f"{override}: pretrained weights come with their architecture; leave this out, or "
                "set model.weights=random"
            )
    return run_config


class Refused(BaseException):
    """Carries an `ExperimentError` past Hydra, which would print a line of its own before it."""


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(composed: DictConfig) -> str:
    try:
        return _execute(composed)
    except ExperimentError as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # for `Sweep`
        raise Refused(error) from error


def _execute(composed: DictConfig) -> str:
    overrides = HydraConfig.get().overrides.task
    run_config = _parsed(composed, overrides)
    hub.go_offline_if_unreachable()
    from experiments.runner import execute  # torch and transformers load only when a run starts

    return str(execute(run_config, overrides))  # how `Sweep` finds the run


class Sweep(Callback):
    """Reports a failed job at once, lets the other jobs run, and ends with a table of all jobs.

    Left alone, Hydra raises the first failure after all jobs have run and forgets the others. With
    every launcher, the job methods run in the job's process and the multirun methods in the
    sweep's.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            print(
                "error: --multirun (or a sweep) in several processes: each would run all the "
                "jobs; start torchrun once for each job, or choose a launcher",
                file=sys.stderr,
            )
            sys.exit(2)
        folder = Path(config.hydra.sweep.dir)
        try:
            with atomic.explained(folder):  # else Hydra, which makes it next, prints a traceback
                folder.mkdir(parents=True, exist_ok=True)
        except ExperimentError as error:
            # Hydra turns an exception into a warning, and this module's classes are not __main__'s.
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            print(f"\njob {config.hydra.job.num}: {' '.join(config.hydra.overrides.task)}")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        job = config.hydra.job.num
        outcome = job_return._return_value  # the public property would raise an error
        if job_return.status == JobStatus.FAILED:
            message = _one_line(outcome)
            if not isinstance(outcome, ExperimentError):
                traceback.print_exception(outcome)
                message = f"{type(outcome).__name__}: {message}"
            print(f"error: job {job} failed: {message}", file=sys.stderr)
            result = {"error": message}
            job_return.status = JobStatus.COMPLETED  # otherwise the sweeper would raise it again
            # Hydra keeps it, and its traceback the job's model and state: on a GPU, a job that ran
            # out of memory would take the memory of all that follow.
            job_return.return_value = None
        else:
            result = {"run": outcome}
        overrides = list(config.hydra.overrides.task)
        sweeps.keep_job(Path(config.hydra.sweep.dir), job, {"overrides": overrides, **result})

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        text, num_failed = sweeps.summary(Path(config.hydra.sweep.dir))
        print(text)
        if num_failed:
            sys.exit(1)


# How Hydra and OmegaConf begin lines that are of no help at the command line.
_NOISE = (
    "full_key:",
    "object_type=",
    "reference_type=",
    "Config search path",
    "provider=",
    "Set the env",
    "See https://hydra.cc",
    "To append to your config",  # nothing would read a key that RunConfig lacks
)


def _one_line(error: BaseException) -> str:
    """The message; Hydra's and OmegaConf's errors include their causes, minus the noise."""
    if isinstance(error, ExperimentError | Refused):
        return str(error)
    messages: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        for line in map(str.strip, str(cause).splitlines()):
            if line and not line.startswith(_NOISE) and line not in messages:
                messages.append(line)
        cause = cause.__cause__
    if any("override 'evaluation'" in message for message in messages):
        return "evaluation: this task has its own evaluation; leave it out"  # + is refused
    if any("'hydra/launcher/" in message for message in messages):
        messages.append(
            "(launchers come with extras: pip install '.[joblib]', '.[slurm]', '.[ray]')"
        )
    return " ".join(messages)


if __name__ == "__main__":
    is_first = os.environ.get("RANK", "0") == "0"
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to here instead of half-printed
    register_schemas()
    try:
        sys.argv[1:] = command_line(sys.argv[1:])
        main()
    except (
        Refused,
        ExperimentError,
        HydraException,
        OmegaConfBaseException,
        PermissionError,  # a file that may not be read
    ) as error:
        if wants_traceback:
            raise
        if is_first:  # every rank hits the same error
            print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if is_first:  # every rank has been interrupted
            print(f"\ninterrupted; {resume_hint()} from the last checkpoint", file=sys.stderr)
        sys.exit(130)
