"""MicroAdam with interchangeable parts, in plain torch and float32: for experiments only.

Every study that asks "what if" uses this optimizer. It is built from `microadam.reference` and, by
default, takes exactly the steps of `microadam.MicroAdam` (a test compares the two). The error
feedback is rounded to its bits but stored as float32, so the state that the variant would need is
computed, not measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from experiments.optimizers.parameterwise import ParameterwiseOptimizer
from microadam import reference
from microadam.layout import BlockLayout, Segment, geometry_of


class MicroAdamVariant(ParameterwiseOptimizer):
    """MicroAdam, Adam on Top-K gradients, or the algorithm that the paper analyses.

    Args:
        params: float32 parameters.
        lr, betas, eps, window_size, density, bucket_size, block_size: as in `microadam.MicroAdam`.
        window_size: None keeps exponential averages of all sparse gradients, as Adam does.
        bits: of the error feedback; None: exact; 0: no error feedback, what Top-K leaves is lost.
        is_stochastic: rounds the error feedback stochastically, which makes it unbiased.
        bias_correction: "step" divides the moments by the weight of all steps taken (Algorithm 1),
            "window" by that of the filled slots.
        amsgrad: divides by the largest second moment so far; only without a window.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        window_size: int | None = 10,
        density: float = 0.01,
        bucket_size: int = 64,
        block_size: int = 4096,
        bits: int | None = 4,
        is_stochastic: bool = False,
        bias_correction: str = "step",
        amsgrad: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "window_size": window_size,
                "density": density,
                "bucket_size": bucket_size,
                "block_size": block_size,
                "bits": bits,
                "is_stochastic": is_stochastic,
                "bias_correction": bias_correction,
                "amsgrad": amsgrad,
            },
        )

    def _step_parameter(
        self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        param = p.view(-1)
        if not state:
            state["step"] = 0
            state["error"] = torch.zeros_like(param)
            state["segments"] = [{} for _ in layout_of(param, group).segments]
        state["step"] += 1
        accumulator = grad.view(-1) + state["error"]
        for segment, moments in zip(
            layout_of(param, group).segments, state["segments"], strict=True
        ):
            elements = segment.elements(group["block_size"])
            blocks = accumulator[elements].view(segment.num_blocks, segment.length)
            indices = reference.select_top_k(blocks, segment.k)
            residual = blocks.scatter(1, indices, 0.0)
            state["error"][elements] = _stored(residual, group).reshape(-1)
            m_hat, v_hat = _moments(
                moments, indices, blocks.gather(1, indices), segment, state["step"], group
            )
            param[elements].view_as(blocks).sub_(
                m_hat / (v_hat.sqrt() + group["eps"]) * group["lr"]
            )

    def state_bytes(self) -> float:
        """Bytes of state that this variant would take, packed as MicroAdam packs its own."""
        return sum(
            _state_bytes(layout_of(p, group), group)
            for group in self.param_groups
            for p in group["params"]
        )


def layout_of(param: Tensor, group: dict[str, Any]) -> BlockLayout:
    window_size = group["window_size"] or 1
    return BlockLayout.of(param.numel(), *geometry_of(group | {"window_size": window_size}))


def round_trip(residual: Tensor, bits: int, is_stochastic: bool = False) -> Tensor:
    """Quantizes to ``2^bits`` levels per bucket and back, as `microadam.reference` does for 4 bits.

    Args:
        residual: float32 ``(num_buckets, Q)``.
        bits: per code.
        is_stochastic: rounds up with a probability equal to the fraction, so that the expected
            result is the residual itself, up to the bfloat16 rounding of the bucket's range.
    """
    max_code = 2**bits - 1
    minimum, maximum = (t.bfloat16().float().unsqueeze(1) for t in residual.aminmax(dim=1))
    unit = (maximum - minimum) / max_code
    shift = torch.rand_like(residual) if is_stochastic else 0.5
    level = ((residual - minimum) * reference.inverse_unit(unit) + shift).floor().clamp(0, max_code)
    return level * unit + minimum


def _stored(residual: Tensor, group: dict[str, Any]) -> Tensor:
    """The part of a residual ``(B, L)`` that the error feedback returns in the next step."""
    if group["bits"] is None:
        return residual
    if group["bits"] == 0:
        return torch.zeros_like(residual)
    buckets = pad_to_buckets(residual, group["bucket_size"])
    rounded = round_trip(buckets, group["bits"], group["is_stochastic"])
    return rounded.view(residual.shape[0], -1)[:, : residual.shape[1]]


def pad_to_buckets(residual: Tensor, bucket_size: int) -> Tensor:
    """The buckets ``(num_buckets, Q)`` of blocks ``(B, L)``, the last of each block padded.

    The padding repeats one of its values, so that its range does not change.
    """
    padding = -residual.shape[1] % bucket_size
    padded = torch.cat((residual, residual[:, -1:].expand(-1, padding)), dim=1)
    return padded.view(-1, bucket_size)


def _moments(
    state: dict[str, Tensor],
    indices: Tensor,  # (B, k), selected in this step
    values: Tensor,  # (B, k)
    segment: Segment,
    step: int,
    group: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The bias-corrected moments ``(B, L)``, including this step's sparse gradient."""
    beta1, beta2 = group["betas"]
    if group["window_size"] is None:
        return _exponential_moments(state, indices, values, segment, step, group)
    if not state:
        shape = (segment.num_blocks, group["window_size"], segment.k)
        state["indices"] = torch.zeros(shape, dtype=torch.int16)
        state["values"] = torch.zeros(shape, dtype=torch.bfloat16)
    slot = (step - 1) % group["window_size"]
    state["indices"][:, slot] = indices.short()
    state["values"][:, slot] = values.bfloat16()
    m_hat, v_hat = reference.window_moments(
        state["indices"], state["values"], step, beta1, beta2, segment.length
    )
    if group["bias_correction"] == "window":
        num_filled = min(step, group["window_size"])
        m_hat *= (1 - beta1**step) / (1 - beta1**num_filled)
        v_hat *= (1 - beta2**step) / (1 - beta2**num_filled)
    return m_hat, v_hat


def _exponential_moments(
    state: dict[str, Tensor],
    indices: Tensor,
    values: Tensor,
    segment: Segment,
    step: int,
    group: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    beta1, beta2 = group["betas"]
    if not state:
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            state[name] = torch.zeros(segment.num_blocks, segment.length)
    sparse = torch.zeros_like(state["exp_avg"]).scatter_(1, indices, values)
    state["exp_avg"].lerp_(sparse, 1 - beta1)
    state["exp_avg_sq"].lerp_(sparse.square(), 1 - beta2)
    second = state["exp_avg_sq"]
    if group["amsgrad"]:
        second = torch.maximum(state["max_exp_avg_sq"], second, out=state["max_exp_avg_sq"])
    return state["exp_avg"] / (1 - beta1**step), second / (1 - beta2**step)


def _state_bytes(layout: BlockLayout, group: dict[str, Any]) -> float:
    spec = {
        name: torch.Size(shape).numel() * dtype.itemsize
        for name, (shape, dtype) in layout.state_spec.items()
    }
    window = spec["window_indices"] + spec["window_values"]
    if group["window_size"] is None:
        window = (12 if group["amsgrad"] else 8) * layout.numel
    ranges = spec["error_min"] + spec["error_max"]
    bits = group["bits"]
    if bits is None:
        error: float = 4 * layout.numel
    else:
        error = bits * layout.num_buckets * layout.bucket_size / 8 + (ranges if bits else 0)
    return spec["step"] + window + error
