"""Builds every optimizer from its config, and tells beforehand what its state will take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module, Parameter

from experiments.config import AdamWConfig, MicroAdamConfig, OptimizerConfig
from experiments.errors import ExperimentError
from microadam import BlockLayout, MicroAdam

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class _Builder:
    build: Callable[[Groups, Any], torch.optim.Optimizer]
    state_bytes: Callable[[Parameter, Any], int]  # of one parameter


def _build_microadam(groups: Groups, config: MicroAdamConfig) -> MicroAdam:
    return MicroAdam(
        groups,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        window_size=config.window_size,
        density=config.density,
        bucket_size=config.bucket_size,
        block_size=config.block_size,
        stochastic_rounding=config.stochastic_rounding,
    )


def _microadam_state_bytes(p: Parameter, config: MicroAdamConfig) -> int:
    return BlockLayout.of(
        p.numel(), config.window_size, config.density, config.bucket_size, config.block_size
    ).state_bytes


def _build_adamw(groups: Groups, config: AdamWConfig) -> torch.optim.AdamW:
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def _adamw_state_bytes(p: Parameter, config: AdamWConfig) -> int:
    return 2 * p.numel() * p.element_size() + 4  # two moments and a float32 step


_BUILDERS = {
    "microadam": _Builder(_build_microadam, _microadam_state_bytes),
    "adamw": _Builder(_build_adamw, _adamw_state_bytes),
}


def build(model: Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over the model's trainable parameters.

    Weight decay is for matrices and larger; biases and norms get none.

    Raises:
        ExperimentError: the optimizer is unknown or refuses a hyperparameter.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    try:
        return _builder(config).build([group for group in groups if group["params"]], config)
    except ValueError as error:
        raise ExperimentError(f"optimizer.{error}") from error


def planned_state_bytes(params: Iterable[Parameter], config: OptimizerConfig) -> int:
    """Bytes of state after the first step, without allocating any."""
    builder = _builder(config)
    return sum(builder.state_bytes(p, config) for p in params)


def measured_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the tensors of the optimizer's state take."""
    return sum(
        value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def _builder(config: OptimizerConfig) -> _Builder:
    if config.name not in _BUILDERS:
        raise ExperimentError(
            f"optimizer.name={config.name}: known optimizers are {', '.join(_BUILDERS)}"
        )
    return _BUILDERS[config.name]
