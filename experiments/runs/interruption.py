"""Ctrl-C, and the SIGTERM and SIGUSR1 that a cluster sends before it takes the machine away.

During training they take effect after the current step, once a checkpoint is written; a second
Ctrl-C does not wait. At other times, as in an evaluation between steps, nothing would be lost, so
they end the process at once. After the cluster's signals it exits with `EXIT_CODE`, which a batch
script reads as "queue me again".
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tqdm import tqdm

from experiments import distributed
from experiments.errors import resume_hint

EXIT_CODE = 75  # EX_TEMPFAIL in sysexits.h
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Whether one of the signals has arrived."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._waits = False
        self._pid = os.getpid()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a worker that inherited this handler; the run ends its workers itself
        is_first = self.signal_name is None
        self.signal_name = signal.Signals(number).name
        if not self._waits:
            self.exit("nothing is lost")
        if number == signal.SIGINT:
            if not is_first:
                raise KeyboardInterrupt
            # Not print, which may itself have been interrupted.
            os.write(2, b"\nwriting a checkpoint after this step; Ctrl-C again stops at once\n")

    def has_come(self) -> bool:
        """Whether a signal has reached any of the processes; call it on all of them."""
        (num_signals,) = distributed.summed(self.signal_name is not None)
        return num_signals > 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While the block runs, a signal only sets `signal_name`."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within `deferred`: while this block runs, a signal ends the process, as outside."""
        self._waits = False
        if self.signal_name is not None:  # it came just before
            self.exit("nothing is lost")
        try:
            yield
        finally:
            self._waits = True

    def exit(self, what_was_kept: str) -> None:
        """Ends the process.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: with `EXIT_CODE`, after another signal.
        """
        if self.signal_name == signal.SIGINT.name:
            raise KeyboardInterrupt
        if distributed.rank() == 0:
            name = self.signal_name or "a signal to another process"
            tqdm.write(f"stopped by {name}: {what_was_kept}; {resume_hint()}", sys.stderr)
        raise SystemExit(EXIT_CODE)


@contextmanager
def handled() -> Iterator[Interruption]:
    """Handles the signals while the block runs."""
    interruption = Interruption()
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in previous.items():
        if handler != signal.SIG_IGN:  # a shell script sets this for Ctrl-C in its background jobs
            signal.signal(number, interruption._on_signal)
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def is_restart() -> bool:
    """Whether SLURM or torchrun has started this process again, after a preemption or a failure."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(os.environ.get(name, "0") != "0" for name in counts)
