"""Rosenbrock: Top-K alone leaves Adam's path; error feedback returns to it (paper, Figure 1).

In two dimensions Top-K keeps the larger of two gradient entries, a density of 50%. What it leaves
is one number, so MicroAdam's bucket of error feedback holds that number and zeros: its smallest and
largest value, which 4 bits store exactly, up to bfloat16. The function of 64 variables fills a
bucket with different values and shows the effect of 4 bits at several densities.

MicroAdam runs twice, with Adam's learning rate and with a fifth of it: its second moment sums a
window of 10 gradients, but the bias correction divides it by the weight of all steps, so the same
gradient moves a parameter up to (1 - 0.9^10) / sqrt(1 - 0.999^10) = 6.5 times as far as in Adam.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from experiments.studies.variant import MicroAdamVariant
from microadam import MicroAdam

_NUM_POINTS = 400  # kept of a path, more densely in its early steps


@dataclass(frozen=True)
class Settings:
    starts: list[list[float]] = field(
        default_factory=lambda: [[-0.5, 1.0], [-1.5, -0.5], [0.2, 1.7]]  # the paper's comes first
    )
    lr: float = 0.02
    num_steps: int = 2000
    microadam_lr_factor: float = 0.2
    num_variables: int = 64  # of the larger function
    densities: list[float] = field(default_factory=lambda: [0.5, 0.05])
    large_lr: float = 0.01
    large_num_steps: int = 1500


def rosenbrock(x: Tensor) -> Tensor:
    """``sum 100 (x[i+1] - x[i]^2)^2 + (1 - x[i])^2``, a scalar; its minimum is 0, at ones."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


Method = Callable[[Tensor], Optimizer]


def run(settings: Settings, data: Path) -> dict[str, Any]:
    in_plane = methods(settings.lr, 0.5, settings.microadam_lr_factor)
    num_runs = len(in_plane) * len(settings.starts) + 6 * len(settings.densities)
    plane: list[dict[str, Any]] = []
    large: list[dict[str, Any]] = []
    with tqdm(desc="rosenbrock", total=num_runs, unit="run", dynamic_ncols=True) as bar:
        paths = {}
        for name, make in in_plane.items():
            for i, start in enumerate(settings.starts):
                paths[name, i], losses = minimize(make, start, settings.num_steps)
                plane.append({"method": name, "start": start, "loss": losses[-1].item()})
                bar.update()
        adam = torch.cat([path for (name, _), path in paths.items() if name == "adam"])
        for run, path in zip(plane, paths.values(), strict=True):
            run["path"] = path[_kept_steps(settings.num_steps)].tolist()
            run["distance_from_adam"] = _distance(path, adam)
        # The customary start of the function of many variables.
        start = [-1.2, 1.0] * (settings.num_variables // 2)
        steps = _kept_steps(settings.large_num_steps)[::4]
        for density in settings.densities:
            group = methods(settings.large_lr, density, settings.microadam_lr_factor)
            group["topk_ef_4bit"] = _top_k_adam(settings.large_lr, density, bits=4)
            for name, make in group.items():
                _, losses = minimize(make, start, settings.large_num_steps)
                large.append({"method": name, "density": density, "losses": losses[steps].tolist()})
                bar.update()
    return {"plane": plane, "large": large, "large_steps": steps}


def methods(lr: float, density: float, microadam_lr_factor: float) -> dict[str, Method]:
    """The optimizers to compare, by their names in the results; Adam comes first."""
    return {
        "adam": lambda x: torch.optim.Adam([x], lr=lr),
        "topk": _top_k_adam(lr, density, bits=0),
        "topk_ef": _top_k_adam(lr, density, bits=None),
        "microadam": lambda x: MicroAdam([x], lr=lr, density=density),
        "microadam_small_lr": lambda x: MicroAdam(
            [x], lr=lr * microadam_lr_factor, density=density
        ),
    }


def _top_k_adam(lr: float, density: float, bits: int | None) -> Method:
    return lambda x: MicroAdamVariant([x], lr=lr, window_size=None, density=density, bits=bits)


def minimize(make: Method, start: list[float], num_steps: int) -> tuple[Tensor, Tensor]:
    """The points ``(num_steps + 1, variables)`` of one optimizer from ``start``, and the losses."""
    x = torch.nn.Parameter(torch.tensor(start))
    optimizer = make(x)
    path = torch.empty(num_steps + 1, len(start))
    losses = torch.empty(num_steps + 1)
    for step in range(num_steps + 1):
        loss = rosenbrock(x)
        path[step] = x.detach()
        losses[step] = loss.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return path, losses


def _kept_steps(num_steps: int) -> list[int]:
    return sorted({round(num_steps * (i / _NUM_POINTS) ** 2) for i in range(_NUM_POINTS + 1)})


def _distance(path: Tensor, other: Tensor) -> float:
    """How far ``path`` strays: the largest distance of a point from the nearest in ``other``.

    ``other`` holds Adam's paths from all starts, which merge in the valley.
    """
    return torch.cdist(path, other).amin(dim=1).max().item()
