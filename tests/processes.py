"""Runs functions in several processes that communicate over gloo, as torchrun would start them.

The processes are forked from a server that has already imported torch, which takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
_TIMEOUT_S = 600.0
_context = multiprocessing.get_context("forkserver")
# The third is imported by the first call of fully_shard.
_preloaded = ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch._dynamo"]


def preload(*modules: str) -> None:
    """Adds modules for the server to import; call it while a test file is being imported."""
    _preloaded.extend(modules)


def start_server() -> None:
    _context.set_forkserver_preload(_preloaded)
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), path])
    try:
        forkserver.ensure_running()
    finally:
        os.environ["PYTHONPATH"] = path


def start(target: Callable[..., None], *arguments: Any) -> Any:
    """A process forked from the server."""
    start_server()
    process = _context.Process(target=target, args=arguments)
    process.start()
    return process


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls ``function(*arguments)`` on every rank and returns what each returned.

    Raises:
        AssertionError: with the traceback of the first rank that raised.
    """
    # As under torchrun, the store outlives every rank.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pipes = [_context.Pipe(duplex=False) for _ in range(world_size)]
    processes = []
    for rank, (_, sender) in enumerate(pipes):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_NUM_THREADS": "1",
        }
        processes.append(start(_rank, environment, sender, function, arguments))
        sender.close()
    try:
        return _collect([receiver for receiver, _ in pipes])
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(receivers: Sequence[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [r for i, r in enumerate(receivers) if i not in results]
        ready = wait(waiting, _TIMEOUT_S)
        assert ready, f"ranks {sorted(set(range(len(receivers))) - results.keys())} do not answer"
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                failure, results[rank] = pickle.loads(receiver.recv_bytes())
            except EOFError:
                failure = f"rank {rank} died"
            assert failure is None, failure
    return [results[rank] for rank in range(len(receivers))]


def _rank(
    environment: dict[str, str],
    sender: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        outcome = (None, function(*arguments))
    except BaseException:  # noqa: BLE001 - reported in the test's process
        outcome = (f"rank {environment['RANK']}:\n{traceback.format_exc()}", None)
    # Not send(), which would pass tensors in memory that is freed when this process ends.
    sender.send_bytes(pickle.dumps(outcome))
