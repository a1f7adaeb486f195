"""Error feedback in GaLore and MicroAdam: how does the error grow relative to the gradient?

GaLore keeps the part of the gradient in a subspace that it recomputes every `update_gap` steps.
Given error feedback, it would collect the rest until the next update, so the error would grow step
by step (paper, section 3 and appendix: RoBERTa-base on MNLI). Top-K has no such blind spot, since
an entry that is left out grows until it is among the largest. At 1% of the entries per step,
however, that takes a long time: the error may still be many times the gradient, and larger than
GaLore's. Here both fine-tune MiniLM-L6 on MNLI; the norms are over all matrices that GaLore
projects, all blocks together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.optimizers.galore import GaLoreAdamW, low_rank_parameters
from experiments.studies.finetuning import FineTuning, load
from microadam import MicroAdam, reference


@dataclass(frozen=True)
class Settings:
    model: str = "minilm_l6"
    num_steps: int = 80
    batch_size: int = 8
    max_length: int = 64
    rank: int = 32
    update_gap: int = 20
    galore_lr: float = 1e-4
    galore_scale: float = 1.0
    microadam_lr: float = 1e-4
    seed: int = 0


def run(settings: Settings, data: Path) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    for name, follow in (("galore", follow_galore), ("microadam", follow_microadam)):
        torch.manual_seed(settings.seed)
        finetuning = load(
            "mnli",
            settings.model,
            data,
            settings.num_steps,
            settings.batch_size,
            settings.max_length,
        )
        measured[name] = follow(finetuning, settings)
        measured["sources"] = finetuning.sources
    return measured


Series = dict[str, list[float]]  # error_norm, grad_norm and loss, one value per step


def follow_galore(finetuning: FineTuning, settings: Settings) -> Series:
    """Runs GaLore, adding to every gradient what its projection has left out so far."""
    matrices = low_rank_parameters(finetuning.model, settings.rank)
    is_matrix = set(matrices)
    optimizer = GaLoreAdamW(
        [
            {"params": matrices, "rank": settings.rank},
            {"params": [p for p in finetuning.model.parameters() if p not in is_matrix]},
        ],
        lr=settings.galore_lr,
        update_gap=settings.update_gap,
        scale=settings.galore_scale,
    )
    errors = [torch.zeros_like(p) for p in matrices]
    series: Series = {"error_norm": [], "grad_norm": [], "loss": []}
    for loss in finetuning.gradients("GaLore"):
        series["grad_norm"].append(_norm(_gradient(p) for p in matrices))
        for p, error in zip(matrices, errors, strict=True):
            _gradient(p).add_(error)
        optimizer.step()
        for p, error in zip(matrices, errors, strict=True):
            projection = optimizer.state[p]["projection"]
            error.copy_(_gradient(p) - projected(_gradient(p), projection))
        series["error_norm"].append(_norm(errors))
        series["loss"].append(loss)
    return series


def projected(matrix: Tensor, projection: Tensor) -> Tensor:
    """``P P^T A`` for ``A`` (m, n), or ``A P P^T`` if P has n rows."""
    if matrix.shape[0] == projection.shape[0]:
        return projection @ (projection.T @ matrix)
    return (matrix @ projection) @ projection.T


def follow_microadam(finetuning: FineTuning, settings: Settings) -> Series:
    matrices = low_rank_parameters(finetuning.model, settings.rank)
    optimizer = MicroAdam(finetuning.model.parameters(), lr=settings.microadam_lr)
    series: Series = {"error_norm": [], "grad_norm": [], "loss": []}
    for loss in finetuning.gradients("MicroAdam"):
        series["grad_norm"].append(_norm(_gradient(p) for p in matrices))
        optimizer.step()
        series["error_norm"].append(_norm(error_feedback(optimizer, p) for p in matrices))
        series["loss"].append(loss)
    return series


def error_feedback(optimizer: MicroAdam, p: Tensor) -> Tensor:
    """What the optimizer will add to the next gradient of ``p``: float32 ``(numel,)``."""
    state = optimizer.state[p]
    num_buckets = state["error_min"].numel()
    codes = state["error"].view(num_buckets, -1)
    buckets = reference.dequantize(codes, state["error_min"], state["error_max"])
    return buckets.view(-1)[: p.numel()]


def _gradient(p: Tensor) -> Tensor:
    if p.grad is None:
        raise ValueError("a parameter of the model takes no part in the loss")
    return p.grad


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(t.square().sum().item() for t in tensors))
