"""What a run would take, found out without running it: steps, and peak memory by part."""

from __future__ import annotations

import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from experiments import optimizers, tasks
from experiments.config import DatasetConfig, RunConfig
from experiments.data.order import num_steps
from experiments.errors import ExperimentError
from experiments.hardware import param_dtype, resolve_precision
from experiments.models import activations

UNPLANNED_GIB = 1.0  # what a GPU's driver and the allocator's fragmentation take, roughly


@dataclass(frozen=True)
class Plan:
    num_params: int
    num_examples: int
    num_steps: int
    precision: str
    param_bytes: int
    grad_bytes: int  # 0 where they are released in the backward pass
    state_bytes: int
    activation_bytes: int  # the most that a forward and backward pass holds besides these
    host_bytes: int  # of the activations kept in host memory
    adamw_state_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.param_bytes + self.grad_bytes + self.state_bytes + self.activation_bytes


def fits(peak_bytes: int, memory_gib: float) -> bool:
    """Whether a card of that size has room for a planned peak and for what the plan leaves out."""
    return peak_bytes / 2**30 + UNPLANNED_GIB <= memory_gib


class LiveBytes(TorchDispatchMode):
    """Tracks storages created while it is active, and the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._follow(value.untyped_storage())
        return result

    def ignore(self, tensor: torch.Tensor) -> None:
        """Excludes a storage that already existed."""
        self._known.add(tensor.untyped_storage()._cdata)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        num_bytes = storage.nbytes()
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes


class HostMemory:
    """Stands in for host memory when tensors are only shapes; counts the bytes sent there."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def keep(self) -> saved_tensors_hooks:
        """Replaces `activations.in_host_memory`."""
        return saved_tensors_hooks(self._send, self._fetch)

    def _send(self, tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
        self.num_bytes += tensor.nbytes
        return tensor.shape, tensor.dtype

    def _fetch(self, sent: tuple[torch.Size, torch.dtype]) -> torch.Tensor:
        shape, dtype = sent
        return torch.empty(shape, dtype=dtype, device="meta")


def make(config: RunConfig) -> Plan:
    """Plans the run from shapes alone: the model is built and differentiated without memory.

    The activations are those of the largest batch, at full length and with every token a target, as
    torch's eager operators allocate them. The sum assumes that they are alive together with all
    gradients, which is true once gradients are accumulated and an upper bound otherwise. Under
    gradient release the few gradients alive at a time count as activations. Not counted are what a
    GPU's driver and the allocator's fragmentation take (`UNPLANNED_GIB`), what generation takes
    during evaluation, and the temporaries of a step in plain torch (up to 0.8 GiB; the native step
    needs none).
    """
    task = tasks.chosen(config)
    precision = resolve_precision(config.hardware)
    model = task.plan_model(config, param_dtype(precision))
    host = HostMemory()
    if config.hardware.activation_checkpointing:
        activations.enable_checkpointing(model, config.hardware, host.keep)
    with suppress(optimizers.UnavailableError):  # the plan may be for another machine
        optimizers.build(model, config.optimizer)  # rejects the values that the run would reject
    params = [p for p in model.parameters() if p.requires_grad]
    param_bytes = sum(p.numel() * p.element_size() for p in model.parameters())

    is_released = bool(config.training.gradient_release)
    grad_bytes = 0 if is_released else sum(p.numel() * p.element_size() for p in params)
    num_examples = _num_examples(task, config.dataset)
    return Plan(
        num_params=sum(p.numel() for p in model.parameters()),
        num_examples=num_examples,
        num_steps=num_steps(config.training, num_examples),
        precision=precision,
        param_bytes=param_bytes,
        grad_bytes=grad_bytes,
        state_bytes=config.optimizer.state_bytes(model),
        activation_bytes=_activation_bytes(
            task, model, task.plan_batch(config), precision, is_released
        ),
        host_bytes=host.num_bytes,
        adamw_state_bytes=optimizers.AdamWConfig(name="adamw", lr=0.0).state_bytes(model),
    )


def _num_examples(task: type[tasks.Task], dataset: DatasetConfig) -> int:
    if dataset.local_folder() is not None or dataset.source == "generated":
        return task.num_local_examples(dataset)
    if dataset.size is None:
        raise ExperimentError(f"dataset={dataset.name}: it is for evaluation, not for training")
    num_left = dataset.size - (dataset.num_held_out or 0)
    return min(dataset.num_train or num_left, num_left)


def _activation_bytes(
    task: Any, model: torch.nn.Module, batch: Any, precision: str, is_released: bool
) -> int:
    grads = []
    for p in model.parameters():
        if is_released:
            p.register_post_accumulate_grad_hook(_free_gradient)
        else:  # an existing gradient is added to in place, so the peak excludes it
            p.grad = torch.zeros_like(p)
            grads.append(p.grad)
    model.train()
    live = LiveBytes()
    for tensor in [*model.parameters(), *model.buffers(), *grads]:
        live.ignore(tensor)
    amp = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16_amp")
    with live, amp:
        task.loss_sum(model, batch).backward()
    return live.peak_bytes


def _free_gradient(p: torch.Tensor) -> None:
    p.grad = None
