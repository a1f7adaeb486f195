"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from experiments import distributed

T = TypeVar("T")

_LOG_FILE_INTERVAL_S = 15.0  # between lines when stderr is not a terminal


def progress_bar(desc: str, total: int, unit: str, **options: Any) -> tqdm[Any]:
    """A progress bar; in a log file it leaves a line every 15 seconds.

    Args:
        options: passed on to tqdm.
    """
    interval_s = 0.1 if sys.stderr.isatty() else _LOG_FILE_INTERVAL_S
    return tqdm(
        desc=desc, total=total, unit=unit, dynamic_ncols=True, mininterval=interval_s, **options
    )


def evaluation_bar(desc: str, total: int, unit: str) -> tqdm[Any]:
    """A bar that disappears from a terminal, and leaves nothing in a log file if it is brief."""
    delay_s = 0.0 if sys.stderr.isatty() else _LOG_FILE_INTERVAL_S
    return progress_bar(desc, total, unit, leave=False, delay=delay_s)


def tokenizing(rows: Sequence[T]) -> Iterator[T]:
    """Yields the rows; the first process shows its progress if they take more than a moment."""
    with progress_bar(
        "tokenize", len(rows), "row", leave=False, delay=2.0, disable=distributed.rank() > 0
    ) as bar:
        for row in rows:
            yield row
            bar.update()
