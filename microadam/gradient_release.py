"""Gradient release: each parameter is stepped in the backward pass and its gradient freed at once.

The gradients of a whole model, as large as its weights, then never exist all at once: at most about
one layer's do. AdaLomo and LOMO (arXiv:2306.09782) call this a fused backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from microadam.distributed import is_sharded
from microadam.optimizer import MicroAdam

_released = WeakTensorKeyDictionary()  # the parameters that some handle releases, with its weakref


def enable_gradient_release(
    model: torch.nn.Module,
    optimizer: MicroAdam,
    *,
    clip_value: float | None = None,
    max_param_grad_norm: float | None = None,
) -> GradientRelease:
    """Makes every backward pass a step: a parameter moves as soon as its gradient is complete.

    The result is bit for bit that of ``loss.backward(); optimizer.step(); optimizer.zero_grad()``.
    Keep the call to ``optimizer.step()``: it steps whatever was not released (parameters added or
    unfrozen since), runs the step hooks and counts for the learning rate schedule, whose rate the
    next backward pass uses. Between the two, any operation on ``p.grad`` raises.

    One backward pass is one step, so the following are refused with an error, at the latest when
    they first touch a gradient (for ``GradScaler``, after its first backward pass, whose steps are
    already wrong): accumulation over micro-batches (use a larger one with activation
    checkpointing), clipping by the global norm, ``GradScaler``, closures, DDP. FSDP2 is fine: it
    hands over each shard's gradient once it has been reduced across the processes. If the backward
    pass fails, the parameters it had already reached have been stepped and the others have not.

    Args:
        model: those of its parameters that ``optimizer`` holds and that currently require a
            gradient are released. With several processes all of them must be shards, made by
            ``fully_shard``. Tied parameters and activation checkpointing are fine; with tied
            parameters the checkpoints must use ``use_reentrant=False``.
        optimizer: a `MicroAdam`.
        clip_value: first clips every element of a gradient to ``[-clip_value, clip_value]``.
        max_param_grad_norm: then scales each parameter's gradient to at most this norm; for a
            sharded parameter the norm is taken over all shards.

    Returns:
        A handle; its ``remove()`` restores the plain step.

    Raises:
        TypeError: the optimizer is not a `MicroAdam`.
        ValueError: a bound is not greater than 0, or the optimizer holds no parameter of the model.
        RuntimeError: gradient release is already enabled for one of the parameters, a gradient is
            left over, or gradients would still be incomplete: under DDP, in several processes
            without FSDP2, with CPU offloading.

    Example:
        >>> optimizer = MicroAdam(model.parameters(), lr=1e-4)
        >>> handle = enable_gradient_release(model, optimizer)
        >>> for x, y in batches:
        ...     loss_fn(model(x), y).backward()
        ...     optimizer.step()
        ...     scheduler.step()
    """
    if not isinstance(optimizer, MicroAdam):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; gradient release needs a MicroAdam"
        )
    for name, bound in (("clip_value", clip_value), ("max_param_grad_norm", max_param_grad_norm)):
        if bound is not None and not bound > 0:
            raise ValueError(f"{name}={bound}: must be greater than 0, or None")
    return GradientRelease(model, optimizer, clip_value, max_param_grad_norm)


def _require_complete_gradients(model: torch.nn.Module, params: Collection[Tensor]) -> None:
    """Refuses setups where a gradient is incomplete, or still being copied, when its hook runs."""
    is_initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    num_processes = torch.distributed.get_world_size() if is_initialized else 1
    is_ddp = isinstance(model, DistributedDataParallel)
    if is_ddp or (num_processes > 1 and not all(is_sharded(p) for p in params)):
        raise RuntimeError(
            f"gradient release {'under DDP' if is_ddp else f'in {num_processes} processes'} would "
            "step each process with its own gradient before they are averaged: shard all of the "
            "model with FSDP2 (fully_shard) before the optimizer is made, train in one process "
            "without DDP, or without gradient release"
        )
    if any(is_sharded(p) and p.device.type != p.device_mesh.device_type for p in params):
        raise RuntimeError(
            "gradient release of parameters that FSDP2 offloads to the CPU may step with gradients "
            "that are still being copied there: fully_shard without CPUOffloadPolicy, or train "
            "without gradient release"
        )


class GradientRelease:
    """The handle of `enable_gradient_release`."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: MicroAdam,
        clip_value: float | None,
        max_param_grad_norm: float | None,
    ) -> None:
        self._optimizer = optimizer
        self._clip_value = clip_value
        self._max_param_grad_norm = max_param_grad_norm
        in_model = set(model.parameters())
        # Indices rather than the groups themselves: load_state_dict creates new groups.
        places: dict[Tensor, tuple[int, int]] = {}
        ordinal = 0
        for group_index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if p in in_model and p.requires_grad:
                    places[p] = (group_index, ordinal)
                ordinal += 1
        if not places:
            raise ValueError("the optimizer holds no parameter of the model that needs a gradient")
        if any(p in _released and _released[p]() is not None for p in places):
            raise RuntimeError(
                "gradient release is enabled for a parameter of the model already, and its hook "
                "would step it too: call remove() of the handle from before"
            )
        _require_complete_gradients(model, places)
        if any(p.grad is not None for p in places):
            raise RuntimeError(
                "a parameter has a gradient from an earlier backward pass: call optimizer.step() "
                "or optimizer.zero_grad() first"
            )
        self._placeholders: dict[Tensor, Tensor] = {}
        # Weak, as the garbage collector does not see into these hooks: parameters would keep the
        # optimizer, and so themselves, for good. The optimizer's hook keeps the handle.
        handle = weakref.ref(self)
        self._hooks: list[Any] = [
            p.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(_release, handle, *place)
            )
            for p, place in places.items()
        ]
        self._hooks.append(optimizer.register_step_pre_hook(self._end_step))
        self._params = list(places)
        for p in places:
            _released[p] = handle

    def remove(self) -> None:
        """Ends gradient release: from the next backward pass, gradients stay until ``step()``."""
        for hook in self._hooks:
            hook.remove()
        self._forget_placeholders()
        for p in self._params:
            if p in _released:
                del _released[p]
        self._hooks, self._params = [], []  # a second call must not end a later handle's release

    def _release(self, group_index: int, ordinal: int, p: Tensor) -> None:
        if p.grad is None:  # a user's hook took it
            return
        if self._clip_value is not None:
            clip_grad_value_(p, self._clip_value)
        if self._max_param_grad_norm is not None:
            clip_grad_norm_(p, self._max_param_grad_norm)
        group = self._optimizer.param_groups[group_index]
        self._optimizer._step_parameter(p, p.grad, group, ordinal)
        p.grad = self._placeholders[p] = _placeholder(p, p.grad.dtype)

    def _end_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise RuntimeError(
                "optimizer.step(closure) under gradient release: the closure's backward pass is "
                "the step already; call it yourself, then optimizer.step() without it"
            )
        self._forget_placeholders()

    def _forget_placeholders(self) -> None:
        for p, placeholder in self._placeholders.items():
            if p.grad is placeholder:
                p.grad = None
        self._placeholders.clear()


def _release(
    handle: weakref.ref[GradientRelease], group_index: int, ordinal: int, p: Tensor
) -> None:
    release = handle()
    if release is not None:  # else there is no optimizer either
        release._release(group_index, ordinal, p)


def _placeholder(p: Tensor, dtype: torch.dtype) -> Tensor:
    if not is_sharded(p):
        return _ReleasedGradient(p, dtype)
    from torch.distributed.tensor import DTensor

    # Not from_local, which makes a view: FSDP2 accumulates on the shard inside.
    return DTensor(_ReleasedGradient(p.to_local(), dtype), p._spec, requires_grad=False)


class _ReleasedGradient(Tensor):
    """Stands in for a gradient that was used and freed, until ``optimizer.step()``.

    Without it a second backward pass would silently be a second step, and clipping by the global
    norm would find no gradients and silently do nothing. It takes no memory.
    """

    @staticmethod
    def __new__(cls, p: Tensor, dtype: torch.dtype) -> _ReleasedGradient:
        return Tensor._make_wrapper_subclass(
            cls, p.shape, strides=p.stride(), dtype=dtype, device=p.device
        )

    @classmethod
    def __torch_dispatch__(cls, func: object, *_: object) -> NoReturn:
        raise RuntimeError(
            f"{func} on a gradient that was released: its parameter took its step in the backward "
            "pass. A second backward pass before optimizer.step() (gradient accumulation; a tied "
            "parameter in two checkpoints of the kind use_reentrant=True), clipping by the global "
            "norm, GradScaler and DDP need all gradients at once. Instead use a larger micro-batch "
            "with activation checkpointing; clip_value or max_param_grad_norm; bfloat16 without a "
            "scaler; FSDP2"
        )
