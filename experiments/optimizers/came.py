"""CAME: a factored second moment like Adafactor's, and a factored confidence in the update.

After Algorithm 2 of "CAME: Confidence-guided Adaptive Memory Efficient Optimization" (Luo et al.
2023, arXiv:2307.02047). The authors' package came-pytorch 0.1.3 is not used: loading a checkpoint
rounds its float32 state to bfloat16 if the parameters are bfloat16 (averages that move by 1e-4 of
their value per step then stop moving); it factors the last two dimensions of a convolution, 3 x 3
or 1 x 1, which takes 9 to 20 bytes per parameter instead of 4; and it checks hyperparameters with
``assert``. For matrices and vectors the two compute the same updates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from experiments.optimizers.parameterwise import ParameterwiseOptimizer


class CAME(ParameterwiseOptimizer):
    """CAME; a parameter of two or more dimensions is treated as a matrix (shape[0], the rest).

    The state is float32 whatever the parameter's dtype. A matrix of m x n has ``exp_avg`` (m, n),
    and the averages over rows (m,) and columns (n,) of the squared gradient (``sq_row``,
    ``sq_col``) and of the instability (``res_row``, ``res_col``). Any other parameter has
    ``exp_avg`` and ``exp_avg_sq`` of its own shape, and no confidence. There is no bias correction.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the update's average, the squared gradient's, and the instability's.
        eps: added to the squared gradient, and to the instability.
        clip_threshold: largest root mean square of an update before it is averaged (paper: d).
        weight_decay: decoupled weight decay, ``p *= 1 - lr * weight_decay``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def _step_parameter(
        self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        matrix = grad.float().flatten(1) if grad.dim() > 1 else grad.float()
        update = _update(matrix, state, group).view_as(grad)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; the base class alone would cast it to p's dtype."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, index in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(index, {}).items():
                    self.state[p][name] = value.to(p.device, copy=True)


def _update(grad: Tensor, state: dict[str, Tensor], group: dict) -> Tensor:
    """The update for ``grad``, a float32 vector or matrix; updates the state in place."""
    beta1, beta2, beta3 = group["betas"]
    eps_sq, eps_res = group["eps"]
    is_factored = grad.dim() == 2
    if not state:
        state["exp_avg"] = torch.zeros_like(grad)
        if is_factored:
            for name in ("sq_row", "res_row"):
                state[name] = grad.new_zeros(grad.shape[0])
            for name in ("sq_col", "res_col"):
                state[name] = grad.new_zeros(grad.shape[1])
        else:
            state["exp_avg_sq"] = torch.zeros_like(grad)

    square = grad.square().add_(eps_sq)
    if is_factored:
        update = grad * _factored_rsqrt(square, state["sq_row"], state["sq_col"], beta2)
    else:
        update = grad * state["exp_avg_sq"].lerp_(square, 1 - beta2).rsqrt()
    rms = update.norm() / update.numel() ** 0.5
    update /= (rms / group["clip_threshold"]).clamp_(min=1.0)

    exp_avg = state["exp_avg"].lerp_(update, 1 - beta1)
    if not is_factored:
        return exp_avg
    instability = (update - exp_avg).square_().add_(eps_res)
    return exp_avg * _factored_rsqrt(instability, state["res_row"], state["res_col"], beta3)


def _factored_rsqrt(matrix: Tensor, row: Tensor, col: Tensor, beta: float) -> Tensor:
    """Averages ``matrix`` into ``row`` and ``col``; returns 1/sqrt of the rank-1 estimate."""
    row.lerp_(matrix.mean(dim=1), 1 - beta)
    col.lerp_(matrix.mean(dim=0), 1 - beta)
    return torch.outer((row / row.mean()).rsqrt_(), col.rsqrt())
