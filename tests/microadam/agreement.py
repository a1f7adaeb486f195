"""Compares one step by the operator with one by plain torch, from the same state.

The state must be the same bit for bit: up to that point the native kernels perform the same float32
operations in the same order. Parameters may differ in the last place, because torch's square root
on a CPU is not always correctly rounded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from microadam import BlockLayout, ops, reference
from microadam.reference import StepArguments

# Relative to the update: sqrt, + eps, quotient, times lr, each within half a unit of 2^-23.
UPDATE_TOLERANCE = 2.0**-21


@dataclass(frozen=True)
class Hyperparameters:
    """What `ops.step_` takes besides tensors, and the size of the window."""

    window_size: int = 10
    density: float = 0.01
    bucket_size: int = 64
    block_size: int = 4096
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    alpha: float = 0.0
    stochastic_rounding: bool = False
    seed: int = 0

    def layout(self, numel: int) -> BlockLayout:
        return BlockLayout.of(
            numel, self.window_size, self.density, self.bucket_size, self.block_size
        )


@dataclass
class Run:
    """Parameters with their states, as the operator takes them."""

    hyper: Hyperparameters
    params: list[Tensor]
    states: list[dict[str, Tensor]] = field(default_factory=list)
    thresholds: list[Tensor] = field(default_factory=list)
    num_skipped_blocks: Tensor | None = None

    def __post_init__(self) -> None:
        layouts = [self.hyper.layout(p.numel()) for p in self.params]
        device = self.params[0].device
        self.states = self.states or [layout.new_state(device) for layout in layouts]
        self.thresholds = self.thresholds or [
            torch.zeros(layout.num_blocks, device=device) for layout in layouts
        ]
        if self.num_skipped_blocks is None:
            self.num_skipped_blocks = torch.zeros((), dtype=torch.int64, device=device)

    def clone(self) -> Run:
        return Run(
            self.hyper,
            [copy_of(p) for p in self.params],
            [{name: copy_of(value) for name, value in state.items()} for state in self.states],
            [t.clone() for t in self.thresholds],
            self.num_skipped_blocks.clone(),
        )

    def to(self, device: str) -> Run:
        return Run(
            self.hyper,
            [p.to(device) for p in self.params],
            [{name: value.to(device) for name, value in state.items()} for state in self.states],
            [t.to(device) for t in self.thresholds],
            self.num_skipped_blocks.to(device),
        )

    def arguments(self, grads: list[Tensor], **changes: Any) -> StepArguments:
        names = ("step", "window_indices", "window_values", "error", "error_min", "error_max")
        hyper = {name: value for name, value in asdict(self.hyper).items() if name != "window_size"}
        arguments = StepArguments(
            self.params,
            grads,
            *([state[name] for state in self.states] for name in names),
            self.thresholds,
            self.num_skipped_blocks,
            lr_tensor=None,
            grad_scale=None,
            found_inf=None,
            ordinals=list(range(len(self.params))),
            **hyper,
        )
        return arguments._replace(**changes)

    def step(self, grads: list[Tensor]) -> None:
        """By whatever `ops.step_` chooses."""
        ops.step_(self.arguments(grads))

    def step_in_plain_torch(self, grads: list[Tensor]) -> None:
        reference.step_(self.arguments(grads))


def copy_of(t: Tensor) -> Tensor:
    """A copy at the same place of its storage, and so as misaligned as ``t``."""
    storage = t.untyped_storage().clone()
    return torch.empty_like(t).set_(storage, t.storage_offset(), t.shape, t.stride())


def largest_feedback(hyper: Hyperparameters, state: dict[str, Tensor], numel: int) -> Tensor:
    """The most `alpha` can have subtracted from each element, by the range of its bucket."""
    largest = torch.maximum(state["error_min"].abs(), state["error_max"].abs()).double()
    applied = hyper.lr * hyper.alpha / (1 - hyper.alpha) * largest
    return applied.repeat_interleave(hyper.bucket_size)[:numel]


def step_and_compare(run: Run, grads: list[Tensor]) -> None:
    """Steps ``run`` both ways and asserts that they agree; ``run`` keeps plain torch's result."""
    native = run.clone()
    before = [p.clone() for p in run.params]
    native.step(grads)
    run.step_in_plain_torch(grads)
    assert native.num_skipped_blocks == run.num_skipped_blocks
    for i, state in enumerate(run.states):
        for name, value in state.items():
            torch.testing.assert_close(
                native.states[i][name], value, rtol=0, atol=0, msg=f"{name}[{i}] differs"
            )
    for ours, theirs, old, state in zip(native.params, run.params, before, run.states, strict=True):
        difference = (ours.double() - theirs.double()).abs()
        decayed = old.double() * (1 - run.hyper.lr * run.hyper.weight_decay)
        # The contributions of the window and the error feedback may nearly cancel.
        update = (theirs.double() - decayed).abs() + largest_feedback(run.hyper, state, old.numel())
        place = torch.maximum(theirs.double().abs(), decayed.abs())
        tolerance = torch.finfo(ours.dtype).eps * place + UPDATE_TOLERANCE * update
        # Below the smallest normal number the last place stops shrinking.
        tolerance += torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
        agrees = (difference <= tolerance) | (ours == theirs) | (ours.isnan() & theirs.isnan())
        assert agrees.all(), f"parameters differ by {difference.max()}"
        if ours.element_size() == 2:  # wrong random bits would round many differently
            num_other = int((difference > 0).sum())
            assert num_other <= 2 + 1e-3 * ours.numel(), f"{num_other} parameters differ"
    run.thresholds = native.thresholds
