"""What a forward pass keeps for the backward pass: only each layer's input, if memory is short."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from experiments.config import HardwareConfig
from experiments.errors import ExperimentError


def in_host_memory() -> AbstractContextManager[Any]:
    """Keeps tensors saved for the backward pass in the host's pinned memory."""
    return save_on_cpu(pin_memory=True)


def enable_checkpointing(
    model: torch.nn.Module,
    config: HardwareConfig,
    offload: Callable[[], AbstractContextManager[Any]] = in_host_memory,
) -> None:
    """Keeps only each layer's input for the backward pass and recomputes the rest.

    A layer processes a larger batch in parts of at most ``config.micro_batch_size`` examples. It
    thus needs the memory of a micro-batch, yet gets all its gradients in one backward pass: the
    only form of accumulation compatible with gradient release.

    Args:
        model: a transformers model.
        offload: the hooks that keep a layer's input under ``config.activation_offloading``.

    Raises:
        ExperimentError: the model does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ExperimentError(
            f"hardware.activation_checkpointing=true: {type(model).__name__} does not support it; "
            "set it to false"
        )

    def recompute(layer: partial[Any], hidden: torch.Tensor, *args: Any) -> Any:
        """Replaces `checkpoint`; ``hidden`` is (examples, length, width)."""
        num_examples = hidden.shape[0]
        if num_examples <= config.micro_batch_size:
            return checkpoint(layer, hidden, *args, use_reentrant=False)
        outputs = []
        for start in range(0, num_examples, config.micro_batch_size):
            part, others, named = _examples(
                (hidden, args, layer.keywords),
                slice(start, start + config.micro_batch_size),
                num_examples,
            )
            layer_of_part = partial(layer.func, *layer.args, **named)
            outputs.append(checkpoint(layer_of_part, part, *others, use_reentrant=False))
        return torch.cat(outputs)

    def recompute_offloaded(layer: partial[Any], hidden: torch.Tensor, *args: Any) -> Any:
        with offload():
            return recompute(layer, hidden, *args)

    function = recompute_offloaded if config.activation_offloading else recompute
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)  # type: ignore[operator]


def is_checkpointed(model: torch.nn.Module) -> bool:
    """Whether it is an unwrapped transformers model whose layers keep only their input."""
    return hasattr(model, "supports_gradient_checkpointing") and any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )


def _examples(arguments: Any, rows: slice, num_examples: int) -> Any:
    """Those rows of every tensor with one row per example, such as a mask; others unchanged."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[rows] if tensor.dim() >= 2 and tensor.shape[0] == num_examples else tensor

    return tree_map_only(torch.Tensor, cut, arguments)
