"""The fused MicroAdam step as a torch operator: its schema, its checks, and which code runs it.

``torch.ops.microadam.step_`` steps all parameters that share device and dtypes in one call. Its
default implementation is plain torch (`microadam.reference`) and serves every device. The native
library beside this file, where it was built, adds faster ones, which torch's dispatcher prefers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from microadam import reference
from microadam.layout import MAX_BLOCK_SIZE, BlockLayout

BACKEND_VARIABLE = "MICROADAM_BACKEND"
NATIVE_LIBRARY = Path(__file__).with_name("_native.so")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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


@cache
def why_not_native() -> str:
    """Loads the native library; empty, or the reason why plain torch runs every step.

    ``MICROADAM_BACKEND=torch`` leaves it alone. The variable is read once, at the first step.

    Raises:
        ValueError: the variable is neither ``torch`` nor ``native``.
    """
    wanted = os.environ.get(BACKEND_VARIABLE, "")
    if wanted not in ("", "native", "torch"):
        raise ValueError(f"{BACKEND_VARIABLE}={wanted!r}: set it to native or torch, or not at all")
    if wanted == "torch":
        return f"{BACKEND_VARIABLE}=torch asks for plain torch"
    reason = "it was not built"
    if NATIVE_LIBRARY.exists():
        try:
            torch.ops.load_library(NATIVE_LIBRARY)  # type: ignore[no-untyped-call]
            return ""
        except OSError as error:
            reason = f"it does not load with this torch ({error})"
    warnings.warn(
        f"MicroAdam's native library is not used: {reason}. Steps run in plain torch, which is "
        "many times slower. To build it, install a C++17 compiler, then MicroAdam from its source "
        "with pip install --no-build-isolation.",
        stacklevel=3,
    )
    return reason


def native_kernel(device_type: str) -> str:
    """The native kernel for this kind of device, such as ``"AVX2"``; empty where there is none."""
    return "" if why_not_native() else torch.ops.microadam.native_kernel(device_type)


def step_(
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
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    alpha: float,
    density: float,
    block_size: int,
    bucket_size: int,
    stochastic_rounding: bool,
    seed: int,
    ordinals: Sequence[int],
) -> None:
    """One MicroAdam step of many parameters, in place, by the fastest code there is for them.

    Args:
        thresholds: float32 ``(num_blocks,)`` for each parameter, 0 at first; written. A cache in
            which a native kernel keeps where to look for the largest accumulators of a block. It
            changes no result.
        others: as `microadam.reference.step_` says. All parameters share device and dtype, all
            gradients too.

    Raises:
        RuntimeError: ``MICROADAM_BACKEND=native``, and there is no native kernel for the device.
        ValueError: ``MICROADAM_BACKEND`` is neither ``torch`` nor ``native``.
    """
    if not params:
        return
    if grads[0].dtype not in DTYPES:
        grads = [grad.float() for grad in grads]
    if not torch.compiler.is_compiling():
        # That a backward pass which has saved a parameter complains, as after any change in place.
        torch.autograd.graph.increment_version(params)
    torch.ops.microadam.step_(
        params,
        grads,
        steps,
        window_indices,
        window_values,
        error,
        error_min,
        error_max,
        thresholds,
        num_skipped_blocks,
        lr_tensor,
        grad_scale,
        found_inf,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        alpha,
        density,
        block_size,
        bucket_size,
        stochastic_rounding,
        seed if seed < 2**63 else seed - 2**64,  # the same bits as a signed integer
        ordinals,
    )


def _plain_torch_step(
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
    alpha: float,
    density: float,
    block_size: int,
    bucket_size: int,
    stochastic_rounding: bool,
    seed: int,
    ordinals: Sequence[int],
) -> None:
    # The dispatcher comes here as long as it knows no native kernel for the device.
    device_type = num_skipped_blocks.device.type
    if native_kernel(device_type):  # it does now: the line above has loaded the library
        torch.ops.microadam.step_(
            params,
            grads,
            steps,
            window_indices,
            window_values,
            error,
            error_min,
            error_max,
            thresholds,
            num_skipped_blocks,
            lr_tensor,
            grad_scale,
            found_inf,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            alpha,
            density,
            block_size,
            bucket_size,
            stochastic_rounding,
            seed,
            ordinals,
        )
        return
    if os.environ.get(BACKEND_VARIABLE) == "native":
        reason = why_not_native() or f"it has no kernel for {device_type}"
        raise RuntimeError(f"{BACKEND_VARIABLE}=native, but the native library is unfit: {reason}")
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
        alpha=alpha,
        density=density,
        block_size=block_size,
        bucket_size=bucket_size,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
        ordinals=ordinals,
    )


def _check_arguments(
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
    alpha: float,
    density: float,
    block_size: int,
    bucket_size: int,
    stochastic_rounding: bool,
    seed: int,
    ordinals: Sequence[int],
) -> None:
    """Every check of the operator; torch runs it where it traces a graph."""
    if bucket_size < 2 or bucket_size % 2:
        raise ValueError(f"bucket_size={bucket_size}: must be an even integer of 2 or more")
    if not 0 < block_size <= MAX_BLOCK_SIZE or block_size % bucket_size:
        raise ValueError(
            f"block_size={block_size}: must be a multiple of bucket_size={bucket_size} and at most "
            f"{MAX_BLOCK_SIZE}"
        )
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: must be greater than 0 and at most 1")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha}: must be at least 0 and less than 1")
    scalars = {"lr_tensor": lr_tensor, "grad_scale": grad_scale, "found_inf": found_inf}
    for name, scalar in scalars.items():
        if scalar is not None:
            _require(name, scalar, None, (torch.float32, torch.float64), num_skipped_blocks.device)
    lists = {
        "grads": grads,
        "step": steps,
        "window_indices": window_indices,
        "window_values": window_values,
        "error": error,
        "error_min": error_min,
        "error_max": error_max,
        "thresholds": thresholds,
        "ordinals": ordinals,
    }
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(f"{name} has {len(values)} entries for {len(params)} parameters")
    for i, param in enumerate(params):
        numel, device = param.numel(), num_skipped_blocks.device
        if window_indices[i].dim() != 3 or window_indices[i].shape[1] != window_indices[0].shape[1]:
            raise ValueError(
                f"window_indices[{i}] has shape {tuple(window_indices[i].shape)}: it must be "
                "(num_blocks, window_size, k) with one window_size for all parameters"
            )
        # int(): a graph is traced for parameters of fixed sizes.
        window_size = int(window_indices[i].shape[1])
        layout = BlockLayout.of(int(numel), window_size, density, bucket_size, block_size)
        _require(f"params[{i}]", param, param.shape, DTYPES, device)
        _require(f"params[{i}]", param, param.shape, (params[0].dtype,), device)
        _require(f"grads[{i}]", grads[i], param.shape, DTYPES, device)
        _require(f"grads[{i}]", grads[i], param.shape, (grads[0].dtype,), device)
        for name, (shape, dtype) in layout.state_spec.items():
            _require(f"{name}[{i}]", lists[name][i], shape, (dtype,), device)  # type: ignore[arg-type]
        _require(f"thresholds[{i}]", thresholds[i], (layout.num_blocks,), (torch.float32,), device)
    _require(
        "num_skipped_blocks", num_skipped_blocks, (), (torch.int64,), num_skipped_blocks.device
    )


def _require(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...] | None,  # None: one element in any shape
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    has_shape = tensor.numel() == 1 if shape is None else tensor.shape == shape
    is_right = has_shape and tensor.dtype in dtypes and tensor.device == device
    if not (is_right and tensor.is_contiguous()):
        raise ValueError(
            f"{name} is a tensor of {tensor.dtype} with shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()} on {tensor.device}: it must be contiguous, "
            f"{' or '.join(map(str, dtypes))}, of shape {shape or '()'} and on {device}"
        )


# Not as a torch.library.custom_op, which counts a version of every state tensor, one by one in
# Python: that took longer than the step of a small parameter.
torch.library.define(
    "microadam::step_",
    torch.library.infer_schema(_plain_torch_step, mutates_args=_MUTATED),
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("microadam::step_", "CompositeExplicitAutograd", _plain_torch_step)
torch.library.register_fake("microadam::step_", _check_arguments)
