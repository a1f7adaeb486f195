"""Does compression lose as little as the theorems require: (1 + omega) q < 1?

The paper's theorems assume that the gradient compressor (block Top-K) is a contraction and that the
error compressor (4-bit quantization) has a bounded relative error and is unbiased:

    ||TopK(a) - a|| <= q ||a||,  q < 1        ||Q(r) - r|| <= omega ||r||,  E Q(r) = r

and that (1 + omega) q < 1. Here both are measured on what MicroAdam really compresses: `a` is
gradient plus error feedback, `r` what Top-K leaves of it. The worst case says little: at a density
of 1%, q can be as large as sqrt(1 - 0.01) = 0.995, and no 4-bit quantizer would do. MicroAdam
rounds to nearest, which is not unbiased; the stochastic rounding that the theorems assume is
measured alongside it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.studies.finetuning import load
from experiments.studies.galore_error import error_feedback
from experiments.studies.variant import pad_to_buckets, round_trip
from microadam import MicroAdam, reference
from microadam.layout import BlockLayout, layout_of

BITS = 4


@dataclass(frozen=True)
class Settings:
    # Each: data set, model, batch size, steps at which to measure.
    runs: list[Any] = field(
        default_factory=lambda: [
            ["mnli", "minilm_l6", 8, [1, 4, 16]],
            ["gsm8k", "smollm2_135m", 1, [1, 2]],
        ]
    )
    max_length: int = 64
    lr: float = 1e-4
    seed: int = 0


def run(settings: Settings, data: Path) -> dict[str, Any]:
    runs = []
    for dataset, model_name, batch_size, steps in settings.runs:
        torch.manual_seed(settings.seed)
        finetuning = load(dataset, model_name, data, max(steps), batch_size, settings.max_length)
        optimizer = MicroAdam(finetuning.model.parameters(), lr=settings.lr)
        measured = []
        for step, _ in enumerate(finetuning.gradients(model_name), start=1):
            if step in steps:
                measured.append({"step": step, "kinds": measure(finetuning.model, optimizer)})
            optimizer.step()
        runs.append({"model": model_name, "sources": finetuning.sources, "measurements": measured})
    return {"runs": runs}


@torch.no_grad()
def measure(model: nn.Module, optimizer: MicroAdam) -> dict[str, dict[str, float]]:
    """q and omega for each kind of parameter and for "all", before the optimizer's step."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        gradient = p.grad.view(-1)
        feedback = error_feedback(optimizer, p) if optimizer.state[p] else 0.0
        group = optimizer.param_groups[0]
        layout = layout_of(p.numel(), group)
        for part, value in squares(gradient, gradient + feedback, layout):
            sums[kind_of(name, p)][part] += value
            sums["all"][part] += value
    return {kind: ratios(parts) for kind, parts in sums.items()}


def kind_of(name: str, p: Tensor) -> str:
    if p.dim() < 2:
        return "biases and norms"
    if "embed" in name:
        return "embeddings"
    if "attention" in name or "attn" in name:
        return "attention"
    return "head" if "classifier" in name or "pooler" in name else "feed-forward"


def squares(
    gradient: Tensor, accumulator: Tensor, layout: BlockLayout
) -> Iterator[tuple[str, float]]:
    """Squared norms for one parameter: both arguments, what Top-K leaves, and rounding errors."""
    for segment in layout.segments:
        elements = segment.elements(layout.block_size)
        for name, flat in (("gradient", gradient), ("accumulator", accumulator)):
            blocks = flat[elements].view(segment.num_blocks, segment.length)
            residual = blocks.scatter(1, reference.select_top_k(blocks, segment.k), 0.0)
            yield name, blocks.square().sum().item()
            yield f"{name} residual", residual.square().sum().item()
        padded = pad_to_buckets(residual, layout.bucket_size)
        for is_stochastic in (False, True):
            rounded = round_trip(padded, BITS, is_stochastic).view(segment.num_blocks, -1)
            rounding = rounded[:, : segment.length] - residual
            name = "stochastic rounding" if is_stochastic else "rounding"
            yield name, rounding.square().sum().item()


def ratios(squares: dict[str, float]) -> dict[str, float]:
    """q of the gradient alone and of the accumulator, omega, and the condition's left-hand side."""

    def ratio(part: str, whole: str) -> float:
        return math.sqrt(squares[part] / squares[whole]) if squares[whole] else 0.0

    q = ratio("accumulator residual", "accumulator")
    omega = ratio("rounding", "accumulator residual")
    stochastic_omega = ratio("stochastic rounding", "accumulator residual")
    return {
        "q_gradient": ratio("gradient residual", "gradient"),
        "q": q,
        "omega": omega,
        "stochastic_omega": stochastic_omega,
        "condition": (1 + omega) * q,
        "stochastic_condition": (1 + stochastic_omega) * q,
    }
