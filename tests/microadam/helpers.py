"""Parameters, gradients and comparisons that several test files need."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from microadam import MicroAdam

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))

# A parameter of a few hundred elements has several blocks, and three steps fill the window.
SMALL_BLOCKS = {"block_size": 128, "bucket_size": 64, "density": 0.05, "window_size": 3}


def new_parameter(
    numel: int, dtype: torch.dtype, rng: np.random.Generator, device: str = "cpu"
) -> Tensor:
    p = torch.from_numpy(rng.standard_normal(numel)).to(device, dtype).requires_grad_()
    p.grad_dtype = None  # the gradient may have a different dtype
    return p


def set_gradient(p: Tensor, numbers: np.ndarray, dtype: torch.dtype | None = None) -> None:
    p.grad = torch.from_numpy(numbers).to(p.device, dtype or p.dtype).view(p.shape)


def new_optimizer(
    rng: np.random.Generator, *sizes: int, dtype: torch.dtype = torch.float32, **changes: Any
) -> MicroAdam:
    """Small blocks, and one parameter of each size, or one of 300 elements."""
    parameters = [new_parameter(numel, dtype, rng) for numel in sizes or (300,)]
    return MicroAdam(parameters, **SMALL_BLOCKS | changes)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_random_gradients(optimizer: Optimizer, rng: np.random.Generator) -> None:
    for p in parameters_of(optimizer):
        set_gradient(p, rng.standard_normal(p.numel()))


def clone_all(optimizer: Optimizer) -> list[dict[str, Tensor]]:
    """Copies of every parameter of an optimizer and of its state."""
    return [
        {"parameter": p.detach().clone()} | copy.deepcopy(optimizer.state.get(p, {}))
        for p in parameters_of(optimizer)
    ]


def assert_same(actual: list[Mapping[str, Tensor]], expected: list[Mapping[str, Tensor]]) -> None:
    """Bit for bit, NaNs included."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(
                ours[name], theirs[name], rtol=0, atol=0, equal_nan=True, msg=f"{name} differs"
            )
