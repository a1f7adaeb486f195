"""One run in several processes: who is who, and how they communicate.

torchrun starts the processes and identifies them through RANK, LOCAL_RANK and WORLD_SIZE; srun can
do so too. Without these there is one process, and everything here does nothing. Only rank 0 prints,
evaluates and writes the run's folder; all ranks take part in sharded checkpoints.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.rendezvous import rendezvous

from experiments.config import RunConfig
from experiments.errors import ExperimentError, require
from experiments.hardware import Hardware

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
