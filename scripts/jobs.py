"""Parallel processes, each a run or a sweep of run.py."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

_POLL_S = 0.2
_INTERRUPTED = 130  # run.py's exit code after Ctrl-C
_PREEMPTED = 75  # its exit code after SIGTERM or SIGUSR1


@dataclass(frozen=True)
class _Job:
    process: subprocess.Popen[bytes]
    log: Path | None
    gpu: str | None = None  # the one that it sees; None: all


def gpus() -> list[str]:
    """The machine's GPUs as CUDA_VISIBLE_DEVICES names them, or those that it names already."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True, check=False)
    num_gpus = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(number) for number in range(num_gpus)]


class Jobs:
    """At most ``limit`` processes at a time; None: any number.

    With several GPUs, each process with a log sees one: that with the fewest other processes.
    Leaving the block waits for all of them. A SIGTERM received in the block is passed on to them.
    """

    def __init__(self, limit: int | None, folder: Path) -> None:
        self._limit = limit
        self._folder = folder
        self._running: list[_Job] = []
        self._is_stopped = False
        self._gpus = gpus()

    def __enter__(self) -> Jobs:
        self._handler = signal.signal(signal.SIGTERM, self._pass_on)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for job in self._running:  # Ctrl-C reaches them too, so they end by themselves
            job.process.wait()
        signal.signal(signal.SIGTERM, self._handler)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self._is_stopped = True
        for job in self._running:
            job.process.send_signal(number)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_free(self) -> int | None:
        """How many more may start now; None: any number."""
        return None if self._limit is None else self._limit - len(self._running)

    def start(self, command: list[str], log: Path | None = None) -> None:
        """Starts a process; ``log`` receives its output and errors; None: the terminal does.

        Raises:
            KeyboardInterrupt: a SIGTERM has come.
        """
        if self._is_stopped:
            raise KeyboardInterrupt
        if log is None:
            self._running.append(_Job(subprocess.Popen(command, cwd=self._folder), None))
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        num_threads = max(1, len(os.sched_getaffinity(0)) // (self._limit or 1))
        environment = {"OMP_NUM_THREADS": str(num_threads), **os.environ}
        gpu = self._idlest_gpu()
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=self._folder, env=environment, stdout=file, stderr=file
            )
        self._running.append(_Job(process, log, gpu))

    def _idlest_gpu(self) -> str | None:
        """None if there are not several to choose from."""
        if len(self._gpus) < 2:
            return None
        num_jobs = Counter(job.gpu for job in self._running)
        return min(self._gpus, key=lambda gpu: num_jobs[gpu])

    def wait_for_one(self) -> None:
        """Waits until one has ended. Failures need no special handling: they leave no record.

        Raises:
            KeyboardInterrupt: one was interrupted, or a SIGTERM has come.
        """
        while not (ended := [job for job in self._running if job.process.poll() is not None]):
            time.sleep(_POLL_S)
        self._running = [job for job in self._running if job not in ended]
        # One that was still starting up is killed by the signal itself, as if it had failed.
        if self._is_stopped or {_INTERRUPTED, _PREEMPTED} & {
            job.process.returncode for job in ended
        }:
            raise KeyboardInterrupt
        for job in ended:
            if job.process.returncode != 0 and job.log is not None:
                print(f"failed, see {job.log}", flush=True)
