"""Writes FFCV's .beton files such that an interrupted call can be resumed.

FFCV's own writer cannot resume, and hangs if an image cannot be decoded. The layout is FFCV's:
header, field descriptors, one metadata row per image; then, from the next page boundary, the
images, none of which crosses a page; and a table of the images' positions. Until the file is
complete, the images are in ``.<name>.partial`` and their metadata in ``.<name>.journal``.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from ffcv.fields import IntField, RGBImageField
from ffcv.types import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    TYPE_ID_HANDLER,
    FieldDescType,
    HeaderType,
    get_metadata_type,
)
from PIL import Image

from experiments import atomic
from experiments.data.images import Images
from experiments.errors import ExperimentError, require, require_positive
from experiments.progress_bars import progress_bar

_PAGE_BYTES = 1 << 23
_CHUNK = 32  # images a worker encodes at a time


@dataclass(frozen=True)
class Storage:
    """How images are stored: as pixels, which are fast to read, or as JPEG, which is smaller."""

    jpeg_share: float = 0.5  # of the images, chosen by index
    jpeg_quality: int = 90
    max_resolution: int | None = None  # a longer side is shrunk to this

    def __post_init__(self) -> None:
        require(0 <= self.jpeg_share <= 1, "jpeg_share", self.jpeg_share, "must be from 0 to 1")
        is_valid = 1 <= self.jpeg_quality <= 100
        require(is_valid, "jpeg_quality", self.jpeg_quality, "must be from 1 to 100")
        require_positive("storage", self, "max_resolution")


# Metadata row: FFCV's fields in this order.
_FIELDS = {"image": RGBImageField, "label": IntField}
_ROW = get_metadata_type([field() for field in _FIELDS.values()])
_JOURNAL_ROW = np.dtype([("row", _ROW), ("num_bytes", "<u8")])


class _Encoder(torch.utils.data.Dataset):
    """Encodes images in the workers; an image that cannot be encoded becomes an error message."""

    def __init__(self, images: Images, storage: Storage) -> None:
        self._images = images
        self._storage = storage

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray] | str:
        storage = self._storage
        is_jpeg = random.Random(index).random() < storage.jpeg_share
        field = RGBImageField(
            "jpg" if is_jpeg else "raw",
            max_resolution=storage.max_resolution,
            jpeg_quality=storage.jpeg_quality,
        )
        data = np.empty(0, np.uint8)

        def allocate(num_bytes: int) -> tuple[int, np.ndarray]:
            nonlocal data
            data = np.empty(num_bytes, np.uint8)
            return 0, data  # the position in the file is not known yet

        row = np.zeros(1, _ROW)
        try:
            image, label = self._images[index]
            field.encode(row["f0"], image, allocate)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"image {index} cannot be read ({error})"
        row["f1"] = label
        if len(data) > _PAGE_BYTES:
            return (
                f"image {index} takes {len(data):,} bytes, more than a page of {_PAGE_BYTES:,}: "
                "set a maximum resolution, or store it as JPEG"
            )
        return row, data


def write(images: Images, path: Path, storage: Storage, num_workers: int) -> None:
    """Writes ``path`` unless it exists, resuming where an interrupted call stopped.

    If another process is writing it, waits for that process.

    Raises:
        ExperimentError: an image cannot be decoded or is too large, or the disk is full; what has
            been written is kept.
    """
    with atomic.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                _write(images, path, storage, num_workers)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(images: Images, path: Path, storage: Storage, num_workers: int) -> None:
    partial = path.with_name(f".{path.name}.partial")
    journal = path.with_name(f".{path.name}.journal")
    settings = json.dumps({"images": images.identity, **asdict(storage)}) + "\n"
    rows = _resumed(partial, journal, settings, _data_start(len(images)))
    encoded = torch.utils.data.DataLoader(
        _Encoder(images, storage),
        batch_size=_CHUNK,
        sampler=range(len(rows), len(images)),
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # the default one draws the weights; leave it alone
    )
    bar = progress_bar(f"writing {path.name}", len(images), "image", initial=len(rows))
    with partial.open("ab") as data_file, journal.open("ab") as journal_file, bar:
        page = _Page(data_file, journal_file)
        for chunk in encoded:
            for item in chunk:
                if isinstance(item, str):
                    raise ExperimentError(f"{path}: {item}; fix it and run this again to resume")
                page.add(*item)
            bar.update(len(chunk))
        page.flush()
    _finish(partial, np.fromfile(journal, _JOURNAL_ROW, offset=len(settings.encode())))
    partial.replace(path)
    journal.unlink()


class _Page:
    """The page being filled; its images reach the disk before their rows in the journal do."""

    def __init__(self, data_file: IO[bytes], journal_file: IO[bytes]) -> None:
        self._data_file = data_file
        self._journal_file = journal_file
        self._data = bytearray()
        self._rows: list[bytes] = []

    def add(self, row: np.ndarray, data: np.ndarray) -> None:
        if len(self._data) + len(data) > _PAGE_BYTES:
            self.flush()
        entry = np.zeros(1, _JOURNAL_ROW)
        entry["row"] = row
        entry["row"]["f0"]["data_ptr"] = self._data_file.tell() + len(self._data)
        entry["num_bytes"] = len(data)
        self._rows.append(entry.tobytes())
        self._data += data.tobytes()

    def flush(self) -> None:
        if not self._rows:
            return
        self._data_file.write(self._data.ljust(_PAGE_BYTES, b"\0"))
        _sync(self._data_file)
        self._journal_file.write(b"".join(self._rows))
        _sync(self._journal_file)
        self._data.clear()
        self._rows.clear()


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _resumed(partial: Path, journal: Path, settings: str, start: int) -> np.ndarray:
    """The rows of all images safely written; truncates both files after the last of them.

    There are none if the settings differ or if either file is missing.
    """
    head = settings.encode()
    content = journal.read_bytes() if journal.exists() and partial.exists() else b""
    rows = np.zeros(0, _JOURNAL_ROW)
    if content.startswith(head):
        num_rows = (len(content) - len(head)) // _JOURNAL_ROW.itemsize
        rows = np.frombuffer(content, _JOURNAL_ROW, num_rows, len(head))
    num_pages = 0
    if len(rows):
        num_pages = (int(rows[-1]["row"]["f0"]["data_ptr"]) - start) // _PAGE_BYTES + 1
    journal.write_bytes(head + rows.tobytes())
    partial.touch()
    os.truncate(partial, start + num_pages * _PAGE_BYTES)
    return rows


def _data_start(num_images: int) -> int:
    metadata_end = HeaderType.itemsize + len(_FIELDS) * FieldDescType.itemsize
    metadata_end += num_images * _ROW.itemsize
    return -(-metadata_end // _PAGE_BYTES) * _PAGE_BYTES


def _finish(partial: Path, rows: np.ndarray) -> None:
    """Adds what comes before and after the images."""
    type_ids = {field: number for number, field in TYPE_ID_HANDLER.items()}
    descriptors = np.zeros(len(_FIELDS), FieldDescType)
    for descriptor, (name, field) in zip(descriptors, _FIELDS.items(), strict=True):
        descriptor["type_id"] = type_ids[field]
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    # NumPy's copies leave the padding of a row uninitialized, so equal images would give different
    # files.
    metadata = np.zeros(len(rows), _ROW)
    metadata[:] = rows["row"]
    table = np.zeros(len(rows), ALLOC_TABLE_TYPE)
    table["sample_id"] = np.arange(len(rows))
    table["ptr"] = metadata["f0"]["data_ptr"]
    table["size"] = rows["num_bytes"]
    header: Any = np.zeros((), HeaderType)
    header["version"] = CURRENT_VERSION
    header["num_fields"] = len(_FIELDS)
    header["page_size"] = _PAGE_BYTES
    header["num_samples"] = len(rows)
    header["alloc_table_ptr"] = partial.stat().st_size
    with partial.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(table.tobytes())
        file.seek(0)
        file.write(header.tobytes() + descriptors.tobytes() + metadata.tobytes())
        _sync(file)
