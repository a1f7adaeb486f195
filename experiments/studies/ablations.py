"""Ablations: what each part of MicroAdam is worth, in final training loss and in bytes of state.

A small language model, two layers that predict the next byte of GSM8K's text from the last few, is
trained for a few hundred steps with one part of MicroAdam changed at a time. Every variant gets its
own learning rate, the best of a grid on a seed that is not reported: the parts change how far a
step moves, and with a single rate the ablation would compare rates. Adam is measured the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from experiments.studies import finetuning
from experiments.studies.variant import MicroAdamVariant

_NUM_BYTES = 128  # values that a byte can take: ASCII
_NUM_ROWS = 1000  # of the data set, about 500 kB


@dataclass(frozen=True)
class Settings:
    # Part -> its values. Bits: 0 means no error feedback, null an exact one.
    parts: dict[str, list[Any]] = field(
        default_factory=lambda: {
            "bits": [0, 2, 3, 4, 8, None],
            "density": [0.002, 0.01, 0.05, 0.2],
            "window_size": [2, 5, 10, 20],
            "block_size": [256, 1024, 4096, 32768],
            "bucket_size": [16, 64, 256, 1024],
            "bias_correction": ["step", "window"],
        }
    )
    learning_rates: list[float] = field(default_factory=lambda: [6e-3, 2e-2, 6e-2, 0.2])
    num_seeds: int = 3
    num_steps: int = 120
    batch_size: int = 128
    context: int = 8
    embedding_size: int = 32
    hidden_size: int = 128


BASELINE: dict[str, Any] = {
    "bits": 4,
    "density": 0.01,
    "window_size": 10,
    "block_size": 4096,
    "bucket_size": 64,
    "bias_correction": "step",
}


def run(settings: Settings, data: Path) -> dict[str, Any]:
    source, text = _text(data)
    variants = list(variants_of(settings))
    num_runs = len(variants) * (len(settings.learning_rates) + settings.num_seeds)
    results = []
    with tqdm(desc="ablations", total=num_runs, unit="run", dynamic_ncols=True) as bar:

        def trained(variant: dict[str, Any] | None, lr: float, seed: int) -> tuple[float, float]:
            bar.update()
            return train(text, variant, lr, seed, settings)

        for part, value, variant in variants:
            tuning = [trained(variant, lr, 0)[0] for lr in settings.learning_rates]
            best = min(range(len(tuning)), key=tuning.__getitem__)
            lr = settings.learning_rates[best]
            reported = [trained(variant, lr, seed) for seed in range(1, settings.num_seeds + 1)]
            results.append(
                {
                    "part": part,
                    "value": value,
                    "lr": lr,
                    "is_lr_at_edge": best in (0, len(tuning) - 1),
                    "tuning_losses": tuning,
                    "losses": [loss for loss, _ in reported],
                    "state_bytes_per_parameter": reported[0][1],
                }
            )
    return {"variants": results, "baseline": BASELINE, "data": source}


def variants_of(settings: Settings) -> Iterator[tuple[str, Any, dict[str, Any] | None]]:
    """Part, value and the optimizer's arguments; Adam has none, the baseline changes no part."""
    yield "adam", None, None
    yield "baseline", None, BASELINE
    for part, values in settings.parts.items():
        for value in values:
            if value != BASELINE[part]:
                yield part, value, {**BASELINE, part: value}


class ByteModel(nn.Module):
    """Logits of the next byte ``(N, 128)`` from the last ``(N, context)`` ones."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_NUM_BYTES, settings.embedding_size)
        self.hidden = nn.Linear(settings.context * settings.embedding_size, settings.hidden_size)
        self.head = nn.Linear(settings.hidden_size, _NUM_BYTES)

    def forward(self, context: Tensor) -> Tensor:
        return self.head(F.gelu(self.hidden(self.embedding(context).flatten(1))))


def train(
    text: Tensor, variant: dict[str, Any] | None, lr: float, seed: int, settings: Settings
) -> tuple[float, float]:
    """Final loss on a fixed sample of the training text, and bytes of state per parameter."""
    torch.manual_seed(seed)
    model = ByteModel(settings)
    num_parameters = sum(p.numel() for p in model.parameters())
    optimizer: torch.optim.Optimizer
    if variant is None:
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        state_bytes = 8.0 * num_parameters
    else:
        optimizer = MicroAdamVariant(model.parameters(), lr=lr, **variant)
        state_bytes = optimizer.state_bytes()
    windows = text.unfold(0, settings.context + 1, 1)  # a view: no copy of the text
    for step in range(settings.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / settings.num_steps)
        batch = windows[torch.randint(len(windows), (settings.batch_size,))]
        loss = F.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        sample = windows[:: max(1, len(windows) // 8192)]
        final = F.cross_entropy(model(sample[:, :-1]), sample[:, -1]).item()
    # A run that diverged must lose every comparison.
    return final if math.isfinite(final) else math.inf, state_bytes / num_parameters


def _text(data: Path) -> tuple[str, Tensor]:
    """The source of the text, and its bytes, int64 ``(length,)``."""
    rows = finetuning.training_rows("gsm8k", data)
    text = "\n".join(
        f"{row['question']}\n{row['answer']}" for row in rows.rows["train"][:_NUM_ROWS]
    )
    codes = text.encode("ascii", errors="replace")
    return rows.source, torch.tensor(list(codes))
