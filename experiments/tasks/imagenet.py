"""Image classification from scratch, following the recipes of ffcv-imagenet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import atomic
from experiments.config import DatasetConfig, ImageConfig, RunConfig
from experiments.data import images
from experiments.data.digest import digest
from experiments.data.order import DataOrder, num_steps
from experiments.errors import ExperimentError, require
from experiments.hardware import Hardware, param_dtype, resolve_precision
from experiments.models import resnets
from experiments.progress_bars import evaluation_bar
from experiments.tasks import Task
from experiments.tasks.classification import accuracy

_MEAN = (123.675, 116.28, 103.53)  # of ImageNet's red, green and blue, from 0 to 255
_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Batch:
    images: Tensor  # (size, 3, resolution, resolution), normalized, channels last
    labels: Tensor  # int64 (size,)
    label_smoothing: float

    @property
    def num_targets(self) -> int:
        return len(self.labels)

    num_units = num_targets  # images


class ImageNet(Task):
    """Data, model, loss and metrics of one run of image classification."""

    columns = ("image", "int")  # by type, whatever their names
    unit = "images"
    num_overlong_examples = 0

    def __init__(self, config: RunConfig, hardware: Hardware) -> None:
        self._config = config
        self._hardware = hardware
        self._recipe = _recipe(config)
        train, test = images.find(config.dataset, config.dataset.splits[:2])
        device = hardware.device
        self._train, self._test = (
            images.open_loader(config.dataset, split, self._recipe, config.seed, device)
            for split in (train, test)
        )
        self.data_source = train.source
        self.data_digest = digest(split.digest.encode() for split in (train, test))
        self.data_revision = train.revision
        self.data_loader = self._train.name
        self.num_examples = min(config.dataset.num_train or len(train), len(train))
        model = resnets.resnet(config.model, images.num_classes(config.dataset))
        self.model_source = "random"
        if config.model.path is not None:
            resnets.load_weights(model, Path(config.model.path))
            self.model_source = f"folder {config.model.title}"
        self.model = model.to(device, hardware.param_dtype)

    def steps(self, order: DataOrder, first: int, last: int) -> Iterator[list[Batch]]:
        """The batches of every step, read ahead; the resolution rises once per run."""
        training = self._config.training
        changes_at = self._recipe.last_resolution_from * num_steps(training, self.num_examples)

        def epoch_and_resolution(step: int) -> tuple[int, int]:
            is_last = step >= changes_at
            recipe = self._recipe
            return order.epoch(step), recipe.last_resolution if is_last else recipe.first_resolution

        for (epoch, resolution), steps in groupby(range(first, last), epoch_and_resolution):
            indices = [order[step] for step in steps]
            for pixels, labels in self._train.train(epoch, indices, resolution):
                yield self._micro_batches(pixels, labels)

    def _micro_batches(self, pixels: Tensor, labels: Tensor) -> list[Batch]:
        size = self._config.forward_batch_size
        return [
            Batch(self._normalized(part), part_labels, self._recipe.label_smoothing)
            for part, part_labels in zip(pixels.split(size), labels.split(size), strict=True)
        ]

    def _normalized(self, pixels: Tensor) -> Tensor:
        dtype = self._hardware.param_dtype
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (_MEAN, _STD))
        return ((pixels - mean) / std).to(dtype)

    @staticmethod
    def loss_sum(model: torch.nn.Module, batch: Batch) -> Tensor:
        logits = model(batch.images).float()
        return F.cross_entropy(
            logits, batch.labels, reduction="sum", label_smoothing=batch.label_smoothing
        )

    def evaluate(self) -> dict[str, Any]:
        """Loss (without label smoothing), top-1 and top-5 accuracy on held-out images."""
        config = self._config.evaluation
        num_images = min(config.limit or self._test.num_images, self._test.num_images)
        loss, num_top_1, num_top_5 = 0.0, 0, 0
        self.model.eval()
        bar = evaluation_bar("evaluate", num_images, "image")
        with bar, torch.no_grad(), self._hardware.autocast():
            for pixels, labels in self._test.evaluate(
                num_images, config.batch_size, self._recipe.eval_resolution
            ):
                logits = self.model(self._normalized(pixels)).float()
                loss += F.cross_entropy(logits, labels, reduction="sum").item()
                hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
                num_top_1 += int(hits[:, 0].sum())
                num_top_5 += int(hits.sum())
                bar.update(len(labels))
        self.model.train()
        return {
            "loss": loss / num_images,
            **accuracy("top_1", num_top_1, num_images),
            **accuracy("top_5", num_top_5, num_images),
        }

    def save(self, folder: Path) -> None:
        """The model's state dict."""
        weights = resnets.WEIGHTS
        with atomic.new_folder(folder) as partial, (partial / weights).open("wb") as file:
            torch.save(self.model.state_dict(), file)

    @staticmethod
    def num_local_examples(config: DatasetConfig) -> int:
        (train,) = images.find(config, config.splits[:1])
        num_images = len(train)
        return min(config.num_train or num_images, num_images)

    @staticmethod
    def plan_model(config: RunConfig, dtype: torch.dtype) -> torch.nn.Module:
        with torch.device("meta"):
            num_classes = images.num_classes(config.dataset)
            return resnets.resnet(config.model, num_classes).to(dtype)

    @staticmethod
    def plan_batch(config: RunConfig) -> Batch:
        recipe = _recipe(config)
        size = config.forward_batch_size
        side = max(recipe.first_resolution, recipe.last_resolution)
        dtype = param_dtype(resolve_precision(config.hardware))
        shape = torch.empty(size, 3, side, side, dtype=dtype, device="meta")
        labels = torch.zeros(size, dtype=torch.int64, device="meta")
        return Batch(shape.to(memory_format=torch.channels_last), labels, recipe.label_smoothing)


def _recipe(config: RunConfig) -> ImageConfig:
    if config.images is None:
        raise ExperimentError("images=null: task=imagenet needs its keys; see configs/preset")
    require(
        config.dataset.num_held_out is None,
        "dataset.num_held_out",
        config.dataset.num_held_out,
        "task=imagenet tests on a split of its own; leave it out",
    )
    return config.images
