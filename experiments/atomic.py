"""Files and folders that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from experiments.errors import ExperimentError


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to; it becomes ``path`` when the block ends without an exception."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            rename(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """Gives a file or folder another name in its folder, and waits until the disk has it."""
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what the system says while ``path`` is written into a sentence.

    Raises:
        ExperimentError: the disk is full, a quota is used up, or the folder may not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _not_written(path, error) from error
    except RuntimeError as error:
        # Given an open file, torch.save meets the OSError, but says only "unexpected pos".
        if isinstance(error.__context__, OSError):
            raise _not_written(path, error.__context__) from error
        raise


def _not_written(path: Path, error: Exception) -> ExperimentError:
    if _number(error) in (errno.ENOSPC, errno.EDQUOT):
        remedy = "make room, and the same command goes on"
    else:
        remedy = (
            "see to it that files can be written there, and the same command goes on; or choose "
            "another folder: with $MICROADAM_CACHE for the cache, with results_dir for the results "
            "of run.py, which then starts anew"
        )
    return ExperimentError(
        f"{path}: could not be written ({getattr(error, 'strerror', None) or error}); nothing that "
        f"was there is lost: {remedy}"
    )


def _number(error: Exception) -> int | None:
    """The system's number of the error, which safetensors gives only in its text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return None if found is None else int(found[1])


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill; it becomes ``path`` when the block ends without an exception.

    Where another process made ``path`` in the meantime, that one stays.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        name = {"prefix": f".{path.name}.", "suffix": ".partial"}
        partial = Path(tempfile.mkdtemp(**name, dir=path.parent))
        try:
            yield partial
            partial.chmod(0o755)  # mkdtemp makes it private
            try:
                rename(partial, path)
            except OSError:
                if not path.exists():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
