"""Convergence rate of MicroAdam against AMSGrad where the paper proves it (Theorems 1 and 2).

Two problems whose stochastic gradients are those of mini-batches:

- non-convex: logistic regression with the regularizer ``sum x^2 / (1 + x^2)``; the step size is
  ``c / sqrt(T)`` and the mean of ``||grad f||^2`` over T steps should fall as ``1 / sqrt(T)``;
- PL: least squares with a rank-deficient matrix, hence not strongly convex; the step size is
  ``c log(T) / T`` and ``f(x_T) - f*`` should fall as ``log(T) / T``.

Each run has its own T, as in the theorems. Their constants differ from method to method, so c is
the best of a grid on a separately drawn problem. The slope is fitted in log-log over the longer
runs: the theorems bound the limit, and a power below 1 at these T only says that it has not been
reached. Three methods: AMSGrad; the algorithm that the paper analyses, which keeps exponential
averages with AMSGrad's maximum and rounds the error feedback stochastically; and MicroAdam as
shipped, which no theorem covers: a window, no maximum, rounding to nearest.

All seeds run at once: a seed is one block of one parameter, and nothing crosses a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from experiments.errors import require
from experiments.studies.variant import MicroAdamVariant
from microadam import MicroAdam

_NUM_EVALUATIONS = 100  # of the full gradient per run


@dataclass(frozen=True)
class Settings:
    num_seeds: int = 4
    num_variables: int = 256
    num_examples: int = 512
    rank: int = 64  # of the matrix of the PL problem
    batch_size: int = 16
    regularization: float = 0.1
    density: float = 0.05
    num_steps: list[int] = field(default_factory=lambda: [50, 200, 800, 3200])
    fit_from: int = 200  # steps of the shortest run that the slope is fitted to
    factors: list[float] = field(  # to choose c from
        default_factory=lambda: [0.03, 0.1, 0.3, 1.0, 3.0]
    )
    num_tuning_steps: int = 200

    def __post_init__(self) -> None:
        remedy = "must be a multiple of 64, MicroAdam's bucket size: each seed is its own block"
        require(self.num_variables % 64 == 0, "num_variables", self.num_variables, remedy)


@dataclass(frozen=True)
class Problem:
    """Examples ``a`` (seeds, examples, variables) with targets ``b`` (seeds, examples)."""

    a: Tensor
    b: Tensor
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]  # of x (S, d), a (S, n, d), b (S, n)
    measure: Callable[[Tensor], Tensor]  # of x (S, d): what the theorem bounds, (S,)
    averages: bool  # measured over all steps, or only at the last point
    rate: Callable[[int], float]  # the proved rate at T; the step size is c times that


def run(settings: Settings, data: Path) -> dict[str, Any]:
    num_tuning_steps = len(settings.factors) * settings.num_tuning_steps
    num_total = 2 * len(METHODS) * (num_tuning_steps + sum(settings.num_steps))
    curves = []
    with tqdm(desc="convergence", total=num_total, unit="step", dynamic_ncols=True) as bar:
        for name, make in PROBLEMS.items():
            problem, another = make(settings, 0), make(settings, 1)
            for method in METHODS:
                tuning = [
                    minimize(another, method, settings.num_tuning_steps, c, settings, bar).mean()
                    for c in settings.factors
                ]
                c = settings.factors[int(torch.stack(tuning).nan_to_num(torch.inf).argmin())]
                values = [
                    minimize(problem, method, num_steps, c, settings, bar).tolist()
                    for num_steps in settings.num_steps
                ]
                curves.append(
                    {
                        "problem": name,
                        "method": method,
                        "factor": c,
                        "is_factor_at_edge": c in (settings.factors[0], settings.factors[-1]),
                        "rates": [problem.rate(num_steps) for num_steps in settings.num_steps],
                        "values": values,  # one list per T, one value per seed
                        "exponents": exponents(problem, values, settings),
                    }
                )
    return {"curves": curves}


def exponents(problem: Problem, values: list[list[float]], settings: Settings) -> list[float]:
    """Per seed, the power of the proved rate at which the values fall; 1 is as proved."""
    longer = [
        (problem.rate(num_steps), of_seeds)
        for num_steps, of_seeds in zip(settings.num_steps, values, strict=True)
        if num_steps >= settings.fit_from
    ]
    rates = torch.tensor([rate for rate, _ in longer], dtype=torch.float64).log()
    logs = torch.tensor([of_seeds for _, of_seeds in longer], dtype=torch.float64).log()
    rates, logs = rates - rates.mean(), logs - logs.mean(dim=0)
    return (rates @ logs / rates.square().sum()).tolist()


def nonconvex(settings: Settings, seed: int) -> Problem:
    """Logistic regression on labels of a linear model, 10% of them flipped."""
    shape = (settings.num_seeds, settings.num_examples, settings.num_variables)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1, settings.num_variables)  # features of unequal size
    a = torch.randn(shape, generator=generator) * scale
    truth = torch.randn(settings.num_seeds, settings.num_variables, 1, generator=generator)
    b = (a @ truth).squeeze(2).sign()
    b = torch.where(torch.rand(b.shape, generator=generator) < 0.1, -b, b)

    def gradient(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        weight = -b * torch.sigmoid(-b * _apply(a, x)) / b.shape[1]
        penalty = 2 * x / (1 + x**2) ** 2
        return _apply(a.transpose(1, 2), weight) + settings.regularization * penalty

    return Problem(
        a,
        b,
        gradient,
        measure=lambda x: gradient(x, a, b).square().sum(dim=1),
        averages=True,
        rate=lambda num_steps: 1 / math.sqrt(num_steps),
    )


def pl(settings: Settings, seed: int) -> Problem:
    """Least squares with noisy targets and a matrix of deficient rank."""
    generator = torch.Generator().manual_seed(seed)
    seeds, rank = settings.num_seeds, settings.rank
    left = torch.randn(seeds, settings.num_examples, rank, generator=generator)
    right = torch.randn(seeds, settings.num_variables, rank, generator=generator)
    a = left @ torch.linalg.qr(right).Q.mT  # well conditioned on the space that it sees
    truth = torch.randn(seeds, settings.num_variables, generator=generator)
    noise = torch.randn(seeds, settings.num_examples, generator=generator)
    b = _apply(a, truth) + noise

    # Rounding to float32 gives the matrix full rank, so lstsq is told what counts as 0.
    best = torch.linalg.lstsq(a, b.unsqueeze(2), rcond=1e-4, driver="gelsd").solution.squeeze(2)

    def excess(x: Tensor) -> Tensor:
        """``f(x) - f*``: the residual at the best x is orthogonal to the range of the matrix."""
        return _apply(a, x - best).square().mean(dim=1) / 2

    return Problem(
        a,
        b,
        gradient=lambda x, a, b: _apply(a.transpose(1, 2), _apply(a, x) - b) / b.shape[1],
        measure=excess,
        averages=False,
        rate=lambda num_steps: math.log(num_steps) / num_steps,
    )


PROBLEMS: dict[str, Callable[[Settings, int], Problem]] = {"nonconvex": nonconvex, "pl": pl}


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    """``(S, n, d)`` times ``(S, d)``."""
    return torch.bmm(matrices, vectors.unsqueeze(2)).squeeze(2)


def _microadam_arguments(x: Tensor, lr: float, density: float) -> dict[str, Any]:
    return {"params": [x], "lr": lr, "density": density, "block_size": x.shape[1]}


METHODS: dict[str, Callable[[Tensor, float, float], Optimizer]] = {
    "amsgrad": lambda x, lr, density: torch.optim.Adam([x], lr=lr, amsgrad=True),
    "analysed": lambda x, lr, density: MicroAdamVariant(
        **_microadam_arguments(x, lr, density), window_size=None, amsgrad=True, is_stochastic=True
    ),
    "microadam": lambda x, lr, density: MicroAdam(**_microadam_arguments(x, lr, density)),
}


def minimize(
    problem: Problem, method: str, num_steps: int, c: float, settings: Settings, bar: tqdm
) -> Tensor:
    """What the theorem bounds, per seed, for a run of ``num_steps`` from 0: ``(S,)``."""
    num_seeds, num_examples, num_variables = problem.a.shape
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.Parameter(torch.zeros(num_seeds, num_variables))
    optimizer = METHODS[method](x, c * problem.rate(num_steps), settings.density)
    rows = torch.arange(num_seeds).unsqueeze(1)
    interval = max(1, num_steps // _NUM_EVALUATIONS)
    measured = []
    for step in range(num_steps):
        if problem.averages and step % interval == 0:
            measured.append(problem.measure(x.detach()))
        batch = torch.randint(num_examples, (num_seeds, settings.batch_size), generator=generator)
        x.grad = problem.gradient(x.detach(), problem.a[rows, batch], problem.b[rows, batch])
        optimizer.step()
        bar.update()
    if not problem.averages:
        measured.append(problem.measure(x.detach()))
    return torch.stack(measured).mean(dim=0)
