"""Checks what `MicroAdam` is given: hyperparameters, gradients and saved state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from microadam.layout import BlockLayout, geometry_of, is_int, is_number
from microadam.ops import DTYPES

# A smaller eps could be 0 in float32, and a coordinate without a gradient would become 0 / 0.
MIN_EPS = torch.finfo(torch.float32).tiny


def check_parameters(params: Sequence[Tensor]) -> None:
    """Checks the parameters of a group.

    Raises:
        ValueError: one appears twice or has an unsupported dtype.
    """
    if len(set(params)) < len(params):  # the base class only warns
        raise ValueError(
            "a parameter appears twice in the group, and would be stepped twice at once: pass "
            "tied weights once, as model.parameters() does"
        )
    for index, p in enumerate(params):
        check_dtype(p, f"parameter {index} of the group")


def check_dtype(p: Tensor, name: str) -> None:
    """Checks that a parameter is float32, bfloat16 or float16; ``name`` is for the message.

    Raises:
        ValueError: it is not.
    """
    if p.dtype not in DTYPES:
        remedy = (
            "pass its torch.view_as_real" if p.is_complex() else "convert it, as model.float() does"
        )
        raise ValueError(
            f"{name} has dtype {p.dtype}; MicroAdam takes float32, bfloat16 and float16: {remedy}"
        )


def check_gradient(grad: Tensor, ordinal: int) -> None:
    """Checks the gradient of the optimizer's parameter number ``ordinal``.

    Raises:
        RuntimeError: it is sparse, complex or of an integer dtype.
    """
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of parameter {ordinal} is sparse ({grad.layout}); MicroAdam needs dense "
            "gradients: for an embedding, pass sparse=False"
        )
    if not grad.is_floating_point():
        raise RuntimeError(
            f"the gradient of parameter {ordinal} has dtype {grad.dtype}; MicroAdam needs real "
            "floating-point gradients"
        )


def check_state(saved: dict[str, Any], layout: BlockLayout, index: int) -> None:
    """Checks that the saved state of parameter ``index`` is undamaged and fits ``layout``.

    Raises:
        ValueError: an entry is missing, has another shape or dtype, or a value out of range.
    """
    if saved.keys() - {"storage_order"} != layout.state_spec.keys():
        raise ValueError(
            f"the saved state of parameter {index} has the entries {sorted(saved)}, MicroAdam "
            f"needs {sorted(layout.state_spec)}: it was written by another optimizer"
        )
    for name, (shape, dtype) in layout.state_spec.items():
        value = saved[name]
        if not isinstance(value, Tensor) or value.shape != shape or value.dtype != dtype:
            found = (
                f"{value.dtype} of shape {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else type(value).__name__
            )
            raise ValueError(
                f"{name} of parameter {index} in the saved state is {found}, expected {dtype} of "
                f"shape {shape}: the state belongs to another model or other hyperparameters"
            )
    # With an index beyond its block, a native kernel would write outside the parameter.
    for segment in layout.segments:
        lowest, highest = saved["window_indices"][segment.blocks, :, : segment.k].aminmax()
        if lowest < 0 or highest >= segment.length:
            raise ValueError(
                f"window_indices of parameter {index} in the saved state reach from {int(lowest)} "
                f"to {int(highest)} in a block of {segment.length}: the file is damaged; load an "
                "older checkpoint"
            )
    # A non-finite value would reach the parameters, or its block would be skipped forever.
    for name in ("window_values", "error_min", "error_max"):
        if not saved[name].isfinite().all():
            raise ValueError(
                f"{name} of parameter {index} in the saved state holds a NaN or an infinity: the "
                "file is damaged; load an older checkpoint"
            )
    if saved["step"] < 0:
        raise ValueError(
            f"step of parameter {index} in the saved state is {int(saved['step'])}: the file is "
            "damaged; load an older checkpoint"
        )


def check_hyperparameters(group: dict[str, Any]) -> None:
    """Checks every hyperparameter of a parameter group.

    Raises:
        ValueError: one is out of range; names it, its value and what it must be.
    """

    def require(is_valid: bool, name: str, remedy: str) -> None:
        if not is_valid:
            raise ValueError(f"{name}={group[name]!r}: {remedy}")

    def require_number(name: str, low: float, remedy: str) -> None:
        # NaN compares false, so it is refused here too.
        value = group[name]
        require(is_number(value) and low <= float(value) < float("inf"), name, remedy)

    lr = group["lr"]
    if isinstance(lr, Tensor):
        require(
            lr.numel() == 1 and lr.dtype in (torch.float32, torch.float64),
            "lr",
            "a tensor learning rate must have exactly one element and be float32 or float64",
        )
        require(0 <= lr.item() < float("inf"), "lr", "must be a finite number of 0 or more")
    else:
        require_number("lr", 0, "must be a finite number of 0 or more")
    betas = group["betas"]
    require(
        isinstance(betas, Sequence)
        and len(betas) == 2
        and all(is_number(beta) and 0 <= float(beta) < 1 for beta in betas),
        "betas",
        "must be two numbers of at least 0 and less than 1",
    )
    require_number(
        "eps",
        MIN_EPS,
        f"must be finite and at least {MIN_EPS:.3g}, the smallest normal float32 number",
    )
    require_number("weight_decay", 0, "must be a finite number of 0 or more")
    alpha = group["alpha"]
    require(
        is_number(alpha) and 0 <= float(alpha) < 1,
        "alpha",
        "must be a number of at least 0 and less than 1",
    )
    BlockLayout(0, *geometry_of(group))  # checks the geometry
    require(
        isinstance(group["stochastic_rounding"], bool),
        "stochastic_rounding",
        "must be True or False",
    )
    require(
        is_int(group["seed"]) and 0 <= group["seed"] < 2**64,
        "seed",
        "must be an integer of at least 0 and less than 2**64",
    )
    for name in ("amsgrad", "differentiable", "maximize"):  # of torch's optimizers
        require(not group.get(name), name, "MicroAdam has no such variant: leave it out")
