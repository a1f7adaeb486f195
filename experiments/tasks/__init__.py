"""Tasks: one file each, all behind the interface `Task`."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from experiments.config import DatasetConfig, RunConfig
from experiments.data import text
from experiments.data.order import DataOrder
from experiments.errors import ExperimentError, require
from experiments.hardware import Hardware


class Batch(Protocol):
    """The input of one forward pass; what else it holds is up to the task."""

    num_targets: int  # predictions that the loss sums over
    num_units: int  # work done, to compute the speed: tokens or images, see `Task.unit`


class Task(ABC):
    """A data set with the model, loss and metrics that go with it."""

    model: torch.nn.Module  # on the device, parameters in their dtype
    model_source: str
    model_revision: str | None = None  # the hub's commit, if known
    data_source: str  # local | hub | generated
    data_digest: str  # changes with the data, whatever its source
    data_revision: str | None = None  # the hub's commit, if known
    num_examples: int  # to train on
    num_overlong_examples: int  # training examples over the maximum length: left out, or cut
    cuts_overlong_examples = False
    unit = "tokens"  # of the work done
    columns: tuple[str, ...] = ()  # that the data set must have, by name or type
    uses_harness = False  # runs the tasks of the config group evaluation in lm-evaluation-harness
    data_loader = "memory"  # memory: all examples are held there | ffcv | torchvision

    @abstractmethod
    def __init__(self, config: RunConfig, hardware: Hardware) -> None:
        """Loads data and model; random weights, if requested, are drawn from torch's generator."""

    def micro_batches(self, indices: Sequence[int]) -> list[Any]:
        """The training examples with these indices as `Batch`es on the device."""
        raise NotImplementedError(f"{type(self).__name__} must define micro_batches or steps")

    def steps(self, order: DataOrder, first: int, last: int) -> Iterator[list[Any]]:
        """The `Batch`es of every optimizer step from ``first`` to before ``last``.

        A task whose loader reads ahead replaces this and needs no ``micro_batches``.
        """
        for step in range(first, last):
            yield self.micro_batches(order[step])

    @staticmethod
    @abstractmethod
    def loss_sum(model: torch.nn.Module, batch: Any) -> Tensor:
        """The loss summed over the batch's targets, a float32 scalar."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Metrics by name; ``loss`` is the mean per target on held-out examples."""

    def logged_evaluation(self) -> dict[str, Any]:
        """What `evaluate` returns, as ``eval/<name>``, and ``time/evaluation_s``.

        Metrics that are not finite are left out: JSON cannot represent them.
        """
        started = time.perf_counter()
        metrics = {
            f"eval/{name}": value
            for name, value in self.evaluate().items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        return {**metrics, "time/evaluation_s": time.perf_counter() - started}

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the trained model to a new folder, completely or not at all."""

    @staticmethod
    def num_local_examples(config: DatasetConfig) -> int:
        """Number of training examples in the local folder, or of generated data, for the plan."""
        return len(text.load(config).rows["train"])

    @staticmethod
    @abstractmethod
    def plan_model(config: RunConfig, dtype: torch.dtype) -> torch.nn.Module:
        """The model on the meta device: shapes without memory."""

    @staticmethod
    @abstractmethod
    def plan_batch(config: RunConfig) -> Any:
        """The largest batch of one forward pass, on the meta device."""


def by_name(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ExperimentError: there is no such task.
    """
    from experiments.tasks.gsm8k import GSM8K
    from experiments.tasks.imagenet import ImageNet
    from experiments.tasks.mnli import MNLI
    from experiments.tasks.open_platypus import OpenPlatypus

    tasks: dict[str, type[Task]] = {
        "gsm8k": GSM8K,
        "imagenet": ImageNet,
        "mnli": MNLI,
        "open_platypus": OpenPlatypus,
    }
    if name not in tasks:
        raise ExperimentError(f"task.name={name}: known tasks are {', '.join(tasks)}")
    return tasks[name]


def chosen(config: RunConfig) -> type[Task]:
    """The class of the config's task.

    Raises:
        ExperimentError: there is no such task, or it cannot use the data set or the evaluation.
    """
    name, dataset, evaluation = config.task.name, config.dataset, config.evaluation
    task = by_name(name)
    require(
        {*task.columns} <= {*dataset.columns, *dataset.columns.values()},
        "dataset",
        dataset.name,
        f"task={name} needs the columns {', '.join(task.columns)}; choose dataset={name}",
    )
    num_needed = 1 if dataset.num_held_out is not None else 2
    require(
        dataset.splits[:1] == ["train"] and len(dataset.splits) >= num_needed,
        "dataset.splits",
        dataset.splits,
        "must be train and, unless dataset.num_held_out says how many of its rows to hold out, "
        "one to test on",
    )
    require(
        task.uses_harness or not (evaluation.protocol or evaluation.harness),
        "evaluation",
        evaluation.protocol,
        f"task={name} has an evaluation of its own; leave this out",
    )
    for harness_name, harness_task in evaluation.harness.items():
        require(
            harness_task.dataset.name == harness_name,
            f"evaluation.harness.{harness_name}.dataset",
            harness_task.dataset.name,
            f"must be {harness_name}; evaluation={evaluation.protocol} takes it from the task: "
            f"choose task={harness_name}, or another evaluation",
        )
    return task
