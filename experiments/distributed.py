"""One run in several processes: who is who, how they communicate, and DDP or FSDP2.

torchrun starts the processes and identifies them through RANK, LOCAL_RANK and WORLD_SIZE; srun can
do so too. Without these there is one process, and everything here does nothing. Only rank 0 prints,
evaluates and writes the run's folder; all ranks take part in sharded checkpoints.
"""

from __future__ import annotations

import copy
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from experiments.config import RunConfig
from experiments.errors import ExperimentError, require
from experiments.hardware import Hardware
from experiments.tasks import Task
from microadam.distributed import is_sharded

# How long the other ranks wait for rank 0 to evaluate. A rank that dies ends the wait at once.
_PATIENCE = timedelta(days=7)

T = TypeVar("T")

_patient: dist.ProcessGroup | None = None  # for slow operations, and for numbers on the CPU


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def started(config: RunConfig, hardware: Hardware) -> Iterator[None]:
    """Connects the processes while the block runs; only rank 0 prints within it.

    Raises:
        ExperimentError: there are several, and the optimizer would step in the backward pass.
    """
    require(
        not config.training.gradient_release or world_size() == 1,
        "training.gradient_release",
        config.training.gradient_release,
        "it applies a gradient before the other processes' are added; set it to false, or use one "
        "process",
    )
    if world_size() == 1 and config.hardware.parallel != "fsdp2":
        yield
        return
    store: Store = HashStore()
    if world_size() > 1:
        store, _, _ = next(rendezvous("env://"))
    if hardware.device.type == "cuda":
        torch.cuda.set_device(hardware.device)
    backend = "cpu:gloo,cuda:nccl" if hardware.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size())
    global _patient
    _patient = dist.new_group(backend="gloo", timeout=_PATIENCE)  # type: ignore[assignment]
    try:
        # Not None: a library's sys.stdout.write would fail.
        with (
            Path(os.devnull).open("w") as nowhere,
            redirect_stdout(sys.stdout if rank() == 0 else nowhere),
        ):
            yield
    except BaseException as error:
        is_first = _is_first_failure(store)
        if isinstance(error, SystemExit | KeyboardInterrupt) or (is_first and rank() == 0):
            raise
        if is_first:
            print(f"error on rank {rank()}: {error}", file=sys.stderr)
            if not isinstance(error, ExperimentError):
                traceback.print_exception(error)
        raise SystemExit(1) from error
    finally:
        dist.destroy_process_group()


def _is_first_failure(store: Store) -> bool:
    """Whether this rank should report its failure: later ones fail only because this one did."""
    try:
        return store.add("failures", 1) == 1
    except dist.DistError:  # rank 0 held the store, and has failed
        return False


def is_distributed() -> bool:
    return dist.is_initialized()


def patient_group() -> dist.ProcessGroup | None:
    """All ranks, connected through their CPUs, for slow operations."""
    return _patient


def barrier() -> None:
    """Waits, for hours if need be, until every rank gets here."""
    if is_distributed():
        dist.barrier(group=_patient)


def from_rank_0(function: Callable[[], T]) -> T:
    """Calls it on rank 0 only; every rank returns the result."""
    if not is_distributed():
        return function()
    result = [function() if rank() == 0 else None]
    dist.broadcast_object_list(result, src=0, group=_patient)
    return result[0]  # type: ignore[return-value]


def from_all(value: T) -> list[T]:
    """Returns every rank's value on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_patient)
    return values


def summed(*numbers: float) -> list[float]:
    """Each number summed over all ranks, in float64."""
    totals = torch.tensor(numbers, dtype=torch.float64)
    if is_distributed():
        dist.all_reduce(totals, group=_patient)
    return totals.tolist()


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
        elif is_distributed():
            self.loss_sum = DistributedDataParallel(module)

    def micro_step(self, is_last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of each micro-batch of a step."""
        if isinstance(self.loss_sum, DistributedDataParallel) and not is_last:
            return self.loss_sum.no_sync()  # the last one reduces the sum of all
        return nullcontext()

    def whole_bytes(self, num_bytes: int) -> int:
        """Total bytes of what each rank has a shard of; under DDP each rank has all of it."""
        return int(summed(num_bytes)[0]) if self._is_fsdp2 else num_bytes

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
            if rank() == 0:
                weights[name] = Parameter(weight.detach(), p.requires_grad)
        if rank() == 0:
            self._task.model = _with_parameters(self._without_weights, weights)
        try:
            yield
        finally:
            self._task.model = sharded


def _shard(module: LossSum, hardware: Hardware) -> None:
    """FSDP2: gathers each layer's weights only for its own forward and backward pass."""
    mesh = init_device_mesh(hardware.device.type, (world_size(),))

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
