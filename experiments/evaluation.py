"""Evaluation through lm-evaluation-harness, in this process and on the run's own data."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import lm_eval
import lm_eval.tasks
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.config import EvaluationConfig, HarnessTaskConfig
from experiments.data import text
from experiments.errors import ExperimentError, require

# The folder below lm_eval/tasks with the harness's own description of each task.
_FOLDERS = {
    "gsm8k": "gsm8k",
    "arc_challenge": "arc",
    "hellaswag": "hellaswag",
    "mmlu": "mmlu/default",
    "winogrande": "winogrande",
}
_FEWSHOT_SEED = 1234  # the harness's default; selects the few-shot examples
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def shipped_tasks(name: str) -> dict[str, Any]:
    """The index, by task and group, of what the harness ships in the folder of task ``name``.

    Raises:
        ExperimentError: this project does not know the task.
    """
    if name not in _FOLDERS:
        raise ExperimentError(f"evaluation.harness.{name}: known tasks are {', '.join(_FOLDERS)}")
    folder = Path(lm_eval.tasks.__file__).parent / _FOLDERS[name]
    return lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False).task_index


@dataclass(frozen=True)
class _Task:
    """A harness task, with the rows that it reads instead of the hub's."""

    name: str
    shipped: Path  # the harness's own YAML file
    splits: dict[str, str | None]  # the split for each of _SPLITS, None if not needed
    rows: dict[str, list[text.Row]]
    overrides: dict[str, Any]
    generates: bool  # writes its answers, rather than choosing among given ones

    @property
    def num_rows(self) -> int:
        """Number of rows in the evaluated split."""
        return len(self.rows[str(self.splits["test_split"] or self.splits["validation_split"])])

    def write(self, folder: Path) -> None:
        """Writes the rows, and a task file that extends the harness's own to read them."""
        data_files = {}
        for split, rows in self.rows.items():
            data_files[split] = str(folder / f"{self.name}-{split}.parquet")
            datasets.Dataset.from_list(rows).to_parquet(data_files[split])
        description = {
            "include": str(self.shipped),
            "task": self.name,
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": data_files, "cache_dir": str(folder / "cache")},
            **self.splits,
            **self.overrides,
        }
        (folder / f"{self.name}.yaml").write_text(yaml.safe_dump(description))


class Harness:
    """The harness tasks that a run is evaluated on, with their data read and checked."""

    def __init__(self, config: EvaluationConfig) -> None:
        """Reads all data, so that anything missing is reported before training.

        Raises:
            ExperimentError: an unknown task, or data that is missing or broken.
        """
        self._config = config
        self._sources: dict[str, str] = {}
        self._tasks: dict[str, list[_Task]] = {}  # one, or the members of a group
        for name, task_config in config.harness.items():
            self._sources[name], self._tasks[name] = _load(name, task_config)

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Rejects a model that `evaluate` could not evaluate, before training is wasted on it.

        Raises:
            ExperimentError: answers may exceed the model's context.
        """
        if any(task.generates for tasks in self._tasks.values() for task in tasks):
            room = self._language_model(model, tokenizer).max_length
            require(
                self._config.max_new_tokens < room,
                "evaluation.max_new_tokens",
                self._config.max_new_tokens,
                f"the model has room for {room} tokens, including the prompt's",
            )

    def _language_model(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 1
    ) -> HFLM:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any]:
        """The harness's metrics for every task; leaves the model in evaluation mode.

        A batch that does not fit the GPU is halved, which changes a score by rounding at most: an
        error would come after the training, of which another batch size makes another run.

        Returns:
            Scores and, given at least two samples, standard errors, by
            ``<task>/<metric>,<filter>`` such as ``arc_challenge/acc_norm,none``; and for every
            task ``num_samples``, ``num_fewshot``, ``num_tasks`` (of a group, else 1),
            ``data_source`` and ``harness`` (versions).

        Raises:
            RuntimeError: the harness evaluated tasks or a number of examples other than requested.
        """
        if not self._tasks:
            return {}
        datasets.disable_progress_bars()
        with TemporaryDirectory() as folder:
            for name, tasks in self._tasks.items():
                for task in tasks:
                    task.write(Path(folder))
                if tasks[0].name != name:
                    self._write_group(name, Path(folder))
            manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
            loaded = manager.load(list(self._tasks))
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(_FEWSHOT_SEED)
                if task.OUTPUT_TYPE == "generate_until":
                    limit = {"max_gen_toks": self._config.max_new_tokens}
                    task.set_config("generation_kwargs", limit, update=True)
            batch_size = self._config.batch_size
            while (results := self._results(model, tokenizer, loaded, batch_size)) is None:
                batch_size //= 2
                print(f"evaluation: out of GPU memory; trying batches of {batch_size}", flush=True)
        metrics: dict[str, Any] = {}
        for name in self._tasks:
            metrics |= {f"{name}/{k}": v for k, v in self._metrics(name, results).items()}
        return metrics

    def _results(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        loaded: Any,
        batch_size: int,
    ) -> Any:
        """What the harness returns; None if batches of that size do not fit the GPU."""
        lm = self._language_model(model, tokenizer, batch_size)
        try:
            with _without_cache(model):
                # Not simple_evaluate, which also seeds every generator and runs git in this folder.
                return lm_eval.evaluate(lm, loaded, limit=self._config.limit, log_samples=False)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            return None

    def _write_group(self, name: str, folder: Path) -> None:
        """Writes a group of the members that have rows, averaged in the harness's own way."""
        shipped = shipped_tasks(name)[name].cfg
        group = {
            "group": name,
            "task": [task.name for task in self._tasks[name]],
            "aggregate_metric_list": shipped["aggregate_metric_list"],
            "metadata": shipped["metadata"],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))

    def _metrics(self, name: str, results: Mapping[str, Any]) -> dict[str, Any]:
        num_samples = 0
        for task in self._tasks[name]:
            num_wanted = min(self._config.limit or task.num_rows, task.num_rows)
            counts = results["n-samples"].get(task.name, {"effective": 0})
            if counts["effective"] != num_wanted:
                raise RuntimeError(
                    f"the harness evaluated {counts['effective']} examples of {task.name} instead "
                    f"of {num_wanted}"
                )
            num_samples += num_wanted
        # The standard error of a single sample is "N/A"; leave it out.
        scores = {
            key: float(value)
            for key, value in results["results"][name].items()
            if "," in key and value != "N/A"
        }
        return {
            **scores,
            "num_samples": num_samples,
            "num_tasks": len(self._tasks[name]),
            "num_fewshot": self._config.harness[name].num_fewshot,
            "data_source": self._sources[name],
            "harness": f"lm-eval {lm_eval.__version__}, {name} v{results['versions'][name]}",
        }


@contextmanager
def _without_cache(model: PreTrainedModel) -> Iterator[None]:
    """While the block runs, only generation keeps the keys and values of a text: it asks for them.

    The harness reads nothing but logits where it scores given answers, and keys and values take
    more memory than all else: with Llama-2-7B 0.5 MiB per token, so tens of GiB for a batch of 32
    five-shot prompts of MMLU.
    """
    uses_cache = getattr(model.config, "use_cache", True)
    model.config.use_cache = False
    try:
        yield
    finally:
        model.config.use_cache = uses_cache


def _load(name: str, config: HarnessTaskConfig) -> tuple[str, list[_Task]]:
    """The source of a task's data, and the task itself or, for a group, its members with rows."""
    shipped = shipped_tasks(name)
    is_group = "group" in shipped[name].cfg
    members = (
        {e.name: e for e in shipped.values() if e.cfg and "task" in e.cfg and "group" not in e.cfg}
        if is_group
        else {name: shipped[name]}
    )
    description = next(iter(members.values())).cfg  # members read the same splits
    evaluated = description.get("test_split") or description["validation_split"]
    fewshot = _fewshot_split(name, description, config) if config.num_fewshot else evaluated
    wanted = {evaluated, fewshot}
    data = text.load(config.dataset, sorted(wanted))
    columns = list(config.dataset.columns)
    rows = {
        split: [{column: row[column] for column in columns} for row in rows]
        for split, rows in data.rows.items()
    }
    splits = {
        kind: split if (split := description.get(kind)) in wanted else None for kind in _SPLITS
    }
    tasks = []
    for member in members.values():
        subject = member.cfg["dataset_name"] if is_group else None
        own = {
            split: [row for row in rows if subject is None or row["subject"] == subject]
            for split, rows in rows.items()
        }
        if own[evaluated]:
            require(
                config.num_fewshot <= len(own[fewshot]),
                f"evaluation.harness.{name}.num_fewshot",
                config.num_fewshot,
                f"split {fewshot} has only {len(own[fewshot])} examples for {member.name}",
            )
            overrides = {"num_fewshot": config.num_fewshot, **config.overrides}
            generates = {**member.cfg, **overrides}["output_type"] == "generate_until"
            tasks.append(_Task(member.name, member.yaml_path, splits, own, overrides, generates))
    return data.source, tasks


def _fewshot_split(name: str, description: Mapping[str, Any], config: HarnessTaskConfig) -> str:
    """The split that the harness takes few-shot examples from.

    Raises:
        ExperimentError: the local folder has no such split.
    """
    split = description.get("fewshot_split") or description["training_split"]
    folder = config.dataset.local_folder()
    if folder is not None and not (folder / f"{split}.jsonl").is_file():
        raise ExperimentError(
            f"evaluation.harness.{name}.num_fewshot={config.num_fewshot}: its examples come from "
            f"{folder / split}.jsonl, which does not exist; add it, or set num_fewshot to 0"
        )
    return str(split)
