"""ResNets as torchvision builds them, with random weights and a configurable stem."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from experiments.config import ModelConfig
from experiments.errors import ExperimentError, require, require_choice

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
        ExperimentError: the weights are not random, or the architecture is not a ResNet's.
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
        config.weights == "random",
        "model.weights",
        config.weights,
        f"{config.name} is trained from scratch; use model.weights=random",
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
