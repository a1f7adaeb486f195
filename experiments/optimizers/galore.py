"""GaLore: AdamW whose moments for large matrices live in a low-rank subspace of the gradient.

After Algorithm 2 of "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (Zhao
et al. 2024, arXiv:2403.03507). The authors' package galore-torch 1.0 is not used: it keeps its
projector as an object in the state, so a checkpoint needs pickle and does not load with
``weights_only=True``; it runs a closure without gradients; and its 8-bit variant silently leaves
small matrices unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.optimizers.parameterwise import ParameterwiseOptimizer


def low_rank_parameters(model: nn.Module, rank: int) -> list[Tensor]:
    """The matrices that GaLore projects: weights of linear layers with both sides above ``rank``.

    Embeddings and the head of a language model (its output embedding, tied or not) are excluded,
    as in the authors' experiments; so are smaller matrices, whose state a projection would enlarge.
    """
    output_embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    left_out = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = {  # a dict, so that a weight shared by two layers appears once
        m.weight: None
        for m in model.modules()
        if isinstance(m, nn.Linear) and m is not output_embeddings
    }
    return [w for w in weights if w.requires_grad and min(w.shape) > rank and w not in left_out]


class GaLoreAdamW(ParameterwiseOptimizer):
    """AdamW; a group with a ``rank`` holds matrices whose gradients are projected to that rank.

    A matrix of m x n, m <= n (else its transpose), has the state ``projection`` (m, rank) and
    ``exp_avg``, ``exp_avg_sq`` (rank, n); any other parameter has the two moments in its own shape.
    All have the parameter's dtype; a step is computed in float32. With beta1, beta2 as in Adam:

        P = the first `rank` left singular vectors of G, recomputed every `update_gap` steps
        R = P^T G
        M, V = moments of R, with bias correction
        W = W - lr * scale * P M / (sqrt(V) + eps)

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, ``p *= 1 - lr * weight_decay``.
        rank: rank of the projection; None: plain AdamW.
        update_gap: steps between two singular value decompositions (paper: T).
        scale: factor applied to the projected update (paper: alpha).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int | None = None,
        update_gap: int = 200,
        scale: float = 0.25,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_gap": update_gap,
            "scale": scale,
        }
        super().__init__(params, defaults)

    def _step_parameter(
        self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        update = (_adam if group["rank"] is None else _galore)(grad.float(), state, p.dtype, group)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-group["lr"])


def _galore(grad: Tensor, state: dict[str, Any], dtype: torch.dtype, group: dict) -> Tensor:
    """The update (m, n) of a matrix whose gradient is ``grad`` (m, n)."""
    is_tall = grad.shape[0] > grad.shape[1]
    wide = grad.T if is_tall else grad
    if state.get("step", 0) % group["update_gap"] == 0:
        # SVD raises on a non-finite gradient; let the moments carry the non-finite values instead.
        left, _, _ = torch.linalg.svd(wide.nan_to_num(0.0, 0.0, 0.0), full_matrices=False)
        state["projection"] = left[:, : group["rank"]].to(dtype, copy=True)
    projection = state["projection"].float()
    update = group["scale"] * (projection @ _adam(projection.T @ wide, state, dtype, group))
    return update.T if is_tall else update


def _adam(grad: Tensor, state: dict[str, Any], dtype: torch.dtype, group: dict) -> Tensor:
    """Adam's step for ``grad``, in float32; updates the moments, which are kept in ``dtype``."""
    if "step" not in state:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(grad, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(grad, dtype=dtype)
    state["step"] += 1
    beta1, beta2 = group["betas"]
    exp_avg = state["exp_avg"].float().lerp(grad, 1 - beta1)
    exp_avg_sq = state["exp_avg_sq"].float().lerp(grad.square(), 1 - beta2)
    state["exp_avg"].copy_(exp_avg)
    state["exp_avg_sq"].copy_(exp_avg_sq)
    denominator = (exp_avg_sq / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
    return (exp_avg / (1 - beta1 ** state["step"])).div_(denominator)
