"""Gradient release in the training loop; hooks measure what the plain step measures directly."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from experiments.config import TrainingConfig
from experiments.hardware import Hardware
from microadam import MicroAdam, enable_gradient_release


class ReleasedStep:
    """Once created, every backward pass steps ``model``; `finish` ends the step.

    Use it as a context manager: hooks of parameters keep the model and the optimizer's state in
    memory until the process ends, where Python's garbage collector does not see them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: MicroAdam,
        config: TrainingConfig,
        hardware: Hardware,
    ) -> None:
        self._optimizer = optimizer
        self._hardware = hardware
        self._norms: list[Tensor] = []
        self._spans: list[tuple[Any, Any]] = []
        self._started: Any = None
        # Hooks run in the order they were registered: the release comes between the two clocks.
        params = [p for p in model.parameters() if p.requires_grad]
        before = [p.register_post_accumulate_grad_hook(self._before) for p in params]
        bound = config.max_param_grad_norm
        release = enable_gradient_release(model, optimizer, max_param_grad_norm=bound)
        after = [p.register_post_accumulate_grad_hook(self._after) for p in params]
        self._handles: list[Any] = [*before, release, *after]

    def __enter__(self) -> ReleasedStep:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, p: Tensor) -> None:
        if p.grad is not None:
            self._norms.append(torch.nn.utils.get_total_norm([p.grad]))
        self._started = self._now()

    def _after(self, _: Tensor) -> None:
        self._spans.append((self._started, self._now()))

    def _now(self) -> Any:
        """Seconds; on a GPU, which runs asynchronously, an event that will hold the time."""
        if self._hardware.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish(self) -> tuple[Tensor, float]:
        """Ends the step: the gradients' global norm before clipping, and the optimizer's time."""
        self._optimizer.step()
        self._hardware.synchronize()
        grad_norm = torch.linalg.vector_norm(torch.stack(self._norms))
        if self._hardware.device.type == "cuda":
            optimizer_s = sum(start.elapsed_time(end) for start, end in self._spans) / 1000
        else:
            optimizer_s = sum(end - start for start, end in self._spans)
        self._norms.clear()
        self._spans.clear()
        return grad_norm, optimizer_s
