"""A task's model on all processes of a run: DDP or FSDP2, or neither if there is one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from experiments import distributed
from experiments.config import RunConfig
from experiments.hardware import Hardware
from experiments.tasks import Task
from microadam.distributed import is_sharded


class LossSum(Module):
    """A task's model and loss as one module, so that DDP and FSDP2 see every use of a weight."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._loss_sum = task.loss_sum

    def forward(self, batch: Any) -> Tensor:
        return self._loss_sum(self.model, batch)


class Parallel:
    """A task whose model is trained by all processes, each on its share of every batch.

    Create it before the optimizer: FSDP2 replaces the parameters of ``task.model`` with DTensors.
    """

    def __init__(self, task: Task, config: RunConfig, hardware: Hardware) -> None:
        self._task = task
        self._is_fsdp2 = config.hardware.parallel == "fsdp2"
        module = LossSum(task)
        self.loss_sum: Module = module  # (batch) -> the loss summed over its targets
        if self._is_fsdp2:
            on_meta = {name: _on_meta(p) for name, p in task.model.named_parameters()}
            self._without_weights = _with_parameters(task.model, on_meta)
            _shard(module, hardware)
        elif distributed.is_distributed():
            # Otherwise it holds all gradients a second time, in the buckets that it sends; several
            # micro-batches still do until the last of them.
            self.loss_sum = DistributedDataParallel(module, gradient_as_bucket_view=True)

    def micro_step(self, is_last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of each micro-batch of a step."""
        if isinstance(self.loss_sum, DistributedDataParallel) and not is_last:
            return self.loss_sum.no_sync()  # the last one reduces the sum of all
        return nullcontext()

    def whole_bytes(self, num_bytes: int) -> int:
        """Total bytes of what each rank has a shard of; under DDP each rank has all of it."""
        return int(distributed.summed(num_bytes)[0]) if self._is_fsdp2 else num_bytes

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Makes ``task.model`` a plain model with all weights on rank 0 while the block runs."""
        if not self._is_fsdp2:
            yield
            return
        sharded = self._task.model
        weights = {}
        for name, p in sharded.named_parameters():
            weight = p.full_tensor() if is_sharded(p) else p  # every rank sends its shard
            if distributed.rank() == 0:
                weights[name] = Parameter(weight.detach(), p.requires_grad)
        if distributed.rank() == 0:
            self._task.model = _with_parameters(self._without_weights, weights)
        try:
            yield
        finally:
            self._task.model = sharded


def _shard(module: LossSum, hardware: Hardware) -> None:
    """FSDP2: gathers each layer's weights only for its own forward and backward pass."""
    mesh = init_device_mesh(hardware.device.type, (distributed.world_size(),))

    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if hardware.precision == "bf16_amp" else None,
        reduce_dtype=torch.float32,
    )
    layer_names = getattr(module.model, "_no_split_modules", None) or ()
    for layer in list(module.modules()):
        if type(layer).__name__ in layer_names:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(module, mesh=mesh, mp_policy=precision)


def _on_meta(p: Parameter) -> Parameter:
    return Parameter(p.detach().to("meta"), p.requires_grad)


def _with_parameters(model: Module, parameters: Mapping[str, Parameter]) -> Module:
    """A copy of the model, but with these parameters in place of its own; tied ones stay tied."""
    return copy.deepcopy(model, {id(p): parameters[name] for name, p in model.named_parameters()})
