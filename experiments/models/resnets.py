"""ResNets as torchvision builds them, with a configurable stem: random, or with a run's weights."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from experiments.config import ModelConfig
from experiments.errors import ExperimentError, reason, require, require_choice

WEIGHTS = "model.pt"  # in the folder of a finished run's model

_BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


@dataclass
class Stem:
    """The first convolution, and whether a max pool of stride 2 follows it."""

    kernel_size: int = 7
    stride: int = 2
    max_pool: bool = True


@dataclass
class Architecture:
    block: str
    layers: list[int]  # blocks in each of the four stages
    stem: dict[str, Any] = field(default_factory=dict)


def resnet(config: ModelConfig, num_classes: int) -> ResNet:
    """A ResNet in float32 and channels-last; its weights are drawn from torch's generator.

    Raises:
        ExperimentError: the weights come from a hub or a package, or the architecture is not a
            ResNet's.
    """
    try:
        architecture = Architecture(**config.architecture)
        stem = Stem(**architecture.stem)
    except TypeError as error:
        raise ExperimentError(
            f"model={config.name}: its architecture is not a ResNet's ({error}); choose one with "
            "model=resnet18, resnet50 or tiny_resnet"
        ) from error
    require(
        config.weights == "random" or config.path is not None,
        "model.weights",
        config.weights,
        f"{config.name} is trained from scratch; use model.weights=random, or the folder of a "
        "finished run's model with model.path=FOLDER",
    )
    require(config.dropout is None, "model.dropout", config.dropout, "a ResNet has none")
    require_choice("model.architecture.block", architecture.block, *_BLOCKS)
    require(
        len(architecture.layers) == 4 and min(architecture.layers) > 0,
        "model.architecture.layers",
        architecture.layers,
        "must be 4 numbers greater than 0",
    )
    model = ResNet(_BLOCKS[architecture.block], architecture.layers, num_classes)
    model.conv1 = torch.nn.Conv2d(
        3, 64, stem.kernel_size, stem.stride, padding=stem.kernel_size // 2, bias=False
    )
    torch.nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if not stem.max_pool:
        model.maxpool = torch.nn.Identity()
    return model.to(memory_format=torch.channels_last)


def load_weights(model: ResNet, folder: Path) -> None:
    """Loads what `experiments.tasks.imagenet` saved in a folder.

    Raises:
        ExperimentError: it is not there, or is another architecture's.
    """
    file = folder / WEIGHTS
    is_archive = file.is_file() and zipfile.is_zipfile(file)
    require(is_archive, "model.path", folder, f"there is no {WEIGHTS} in it, as a run saves one")
    try:
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except (RuntimeError, TypeError, pickle.UnpicklingError) as error:
        raise ExperimentError(
            f"model.path={folder}: its weights do not fit model and dataset ({reason(error)})"
        ) from error
