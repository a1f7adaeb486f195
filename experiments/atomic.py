"""Files and folders that exist complete or not at all, whatever happens during writing."""

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
    """Renames a file or folder within its folder, and waits until that is on disk."""
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns system errors raised while ``path`` is written into a readable message.

    Raises:
        ExperimentError: the disk is full, a quota is used up, or the folder is not writable.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _not_written(path, error) from error
    except RuntimeError as error:
        # Writing to an open file, torch.save hits the OSError but only reports "unexpected pos".
        if isinstance(error.__context__, OSError):
            raise _not_written(path, error.__context__) from error
        raise


def _not_written(path: Path, error: Exception) -> ExperimentError:
    if _number(error) in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space, then run the same command again to resume"
    else:
        remedy = (
            "make the folder writable, then run the same command again to resume; or choose "
            "another folder: with $MICROADAM_CACHE for the cache, or with results_dir for the "
            "results of run.py, which then starts from scratch"
        )
    return ExperimentError(
        f"{path}: could not be written ({getattr(error, 'strerror', None) or error}); nothing "
        f"already there is lost: {remedy}"
    )


def _number(error: Exception) -> int | None:
    """The system's error number, which safetensors gives only in its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return None if found is None else int(found[1])


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill; it becomes ``path`` when the block ends without an exception.

    If another process creates ``path`` in the meantime, its folder stays.
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
