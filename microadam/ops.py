"""The fused MicroAdam step as a torch operator: its schema, its checks, and which code runs it.

``torch.ops.microadam.step_`` steps all parameters that share device and dtypes in one call. Its
default implementation, for every device, is plain torch (`microadam.reference`). The native library
beside this file, where it was built, adds one for the CPU, which the dispatcher then prefers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from microadam import reference
from microadam.layout import MAX_BLOCK_SIZE, BlockLayout

BACKEND_VARIABLE = "MICROADAM_BACKEND"
NATIVE_LIBRARY = Path(__file__).with_name("_native.so")

_PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MUTATED = (
    "params",
    "steps",
    "window_indices",
    "window_values",
    "error",
    "error_min",
    "error_max",
    "thresholds",
    "num_skipped_blocks",
)


@torch.library.custom_op("microadam::step_", mutates_args=_MUTATED)
def _step_op(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor],
    window_indices: Sequence[Tensor],
    window_values: Sequence[Tensor],
    error: Sequence[Tensor],
    error_min: Sequence[Tensor],
    error_max: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    num_skipped_blocks: Tensor,
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    density: float,
    block_size: int,
    bucket_size: int,
    stochastic_rounding: bool,
    seed: int,
    ordinals: Sequence[int],
) -> None:
    reference.step_(
        params,
        grads,
        steps,
        window_indices,
        window_values,
        error,
        error_min,
        error_max,
        num_skipped_blocks,
        lr_tensor,
        grad_scale,
        found_inf,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        density=density,
        block_size=block_size,
        bucket_size=bucket_size,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
        ordinals=ordinals,
    )


torch.ops.load_library(NATIVE_LIBRARY)
