"""How many steps a run takes, and which examples each step uses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from experiments.config import TrainingConfig
from experiments.errors import require


def num_steps(config: TrainingConfig, num_examples: int) -> int:
    """Optimizer steps of the whole run; each epoch drops its last incomplete batch.

    Raises:
        ExperimentError: the examples do not fill a batch.
    """
    in_epochs = math.floor(config.epochs * steps_per_epoch(config, num_examples))
    return config.max_steps or max(1, in_epochs)


def steps_per_epoch(config: TrainingConfig, num_examples: int) -> int:
    require(
        config.global_batch_size <= num_examples,
        "training.global_batch_size",
        config.global_batch_size,
        f"there are only {num_examples} examples to train on; set it to at most that",
    )
    return num_examples // config.global_batch_size


class DataOrder:
    """Which examples a step uses. A function of seed and step alone: the step is the position.

    With several processes, each gets an equal share of the step's examples.

    Raises:
        ExperimentError: the examples do not fill a batch, or a batch cannot be divided equally.
    """

    def __init__(
        self,
        config: TrainingConfig,
        num_examples: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        require(
            config.global_batch_size % world_size == 0,
            "training.global_batch_size",
            config.global_batch_size,
            f"must be a multiple of the {world_size} processes",
        )
        self._share = slice(rank, None, world_size)
        self._num_examples = num_examples
        self._batch_size = config.global_batch_size
        self._steps_per_epoch = steps_per_epoch(config, num_examples)
        self._seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def epoch(self, step: int) -> int:
        return step // self._steps_per_epoch

    def __getitem__(self, step: int) -> Sequence[int]:
        epoch, position = divmod(step, self._steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._permutation = torch.randperm(self._num_examples, generator=generator).tolist()
            self._epoch = epoch
        start = position * self._batch_size
        return self._permutation[start : start + self._batch_size][self._share]
