"""The loop that the project's own baselines and study optimizers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class ParameterwiseOptimizer(Optimizer):
    """Steps one parameter after another; a subclass says how."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps every parameter that has a gradient; returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_parameter(p, p.grad, self.state[p], group)
        return loss

    def _step_parameter(
        self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Updates ``p`` and its ``state``, empty before the first step; leaves ``grad`` alone."""
        raise NotImplementedError
