"""Image data sets: where the images of a split come from, and the loader that reads them.

Images come from the data set's local folder, the hub or its cache, or are generated, in that order.
FFCV reads them from a .beton file, which is written on first use; if FFCV is not installed,
torchvision reads the images themselves with the same recipe.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from experiments import hub
from experiments.config import DatasetConfig, ImageConfig
from experiments.data import sources
from experiments.data.digest import digest
from experiments.data.generated_images import Patterns
from experiments.errors import ExperimentError

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

_NUM_GENERATED = 2048
_MAX_CONVERTED = 200_000  # images written to the cache without being asked to


class Images(Protocol):
    """Images by index, decoded on access."""

    @property
    def identity(self) -> str:
        """Changes with the images, and may differ between machines."""

    @property
    def digest(self) -> str:
        """Changes when a label changes, or the name or size of a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image, int]:
        """An RGB image and its label."""


class ImageLoader(Protocol):
    """Reads a split in batches.

    A batch is uint8 images (size, 3, resolution, resolution), channels last, and int64 labels
    (size,), both on the device and valid until the next batch is requested.
    """

    name: str  # ffcv | torchvision
    num_images: int

    def train(
        self, epoch: int, batches: Sequence[Sequence[int]], resolution: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Random crops, half of them flipped, of the images with these indices.

        The crop of an image depends only on seed, epoch and index: a run resumed in the middle of
        an epoch sees exactly the crops it would have seen.
        """

    def evaluate(
        self, num_images: int, batch_size: int, resolution: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The centres of the first ``num_images`` images."""


def draw_of(seed: int, epoch: int) -> int:
    """32 bits that, with an image's index, decide its crop in this epoch of this run."""
    return random.Random(f"{seed} {epoch}").getrandbits(32)


@dataclass(frozen=True)
class Split:
    name: str
    source: str  # local | hub | generated
    content: Images | Path  # the images, or a .beton file made by the user
    revision: str | None  # the hub's commit, if known

    def __len__(self) -> int:
        return num_images_in(self.content) if isinstance(self.content, Path) else len(self.content)

    @property
    def digest(self) -> str:
        """Changes with the images; computed without reading them, and the same on every machine."""
        if isinstance(self.content, Path):
            return _digest_of_beton(self.content)
        return self.content.digest


def find(config: DatasetConfig, names: Sequence[str]) -> list[Split]:
    """The splits, all from the first source that has them all.

    Raises:
        ExperimentError: no source has them, or they do not match their config.
    """
    found: tuple[str, Sequence[Images | Path]] = sources.first(
        config,
        local=lambda folder: [from_folder(config, folder, name) for name in names],
        hub=lambda hub_id: [from_hub(config, hub_id, name) for name in names],
        generated=lambda: [_generated(config, name) for name in names],
    )
    source, contents = found
    return [
        Split(name, source, content, content.revision if isinstance(content, _Rows) else None)
        for name, content in zip(names, contents, strict=True)
    ]


def open_loader(
    config: DatasetConfig, split: Split, recipe: ImageConfig, seed: int, device: torch.device
) -> ImageLoader:
    """FFCV's loader of the split, or torchvision's if FFCV is not installed.

    Raises:
        ExperimentError: there is only a .beton file and no FFCV to read it, the file is damaged, or
            there are too many images to convert without being asked to.
    """
    content = split.content
    if not has_ffcv():
        from experiments.data.torchvision_images import TorchvisionLoader

        if isinstance(content, Path):
            raise ExperimentError(
                f"{content}: only FFCV can read this file, and it is not installed: see make "
                "setup, or give a folder of images with dataset.path=FOLDER"
            )
        return TorchvisionLoader(content, recipe, seed, device)
    from experiments.data.ffcv_images import FFCVLoader

    if not isinstance(content, Path):
        content = _converted(config, split.name, content)
    return FFCVLoader(content, recipe, seed, device)


@functools.cache
def has_ffcv() -> bool:
    """Whether FFCV can be imported; if not, prints why, once.

    The import leaves torch with one thread, which is undone here: the first import of FFCV must
    happen here.
    """
    num_threads = torch.get_num_threads()
    try:
        import ffcv  # noqa: F401
    except ImportError as error:
        print(
            f"data: FFCV is not available ({error}); torchvision loads the images with the same "
            "recipe, but more slowly; make setup says what FFCV needs"
        )
        return False
    torch.set_num_threads(num_threads)
    return True


def num_workers(device: torch.device) -> int:
    """How many threads or processes decode images for this process: as many as torch has threads.

    torchrun leaves each of several processes one, which suits GPUs but not their images: there it
    is an equal share of the cores.
    """
    num_threads = torch.get_num_threads()
    if device.type == "cpu" or "LOCAL_WORLD_SIZE" not in os.environ:
        return num_threads
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(num_threads, num_cores // int(os.environ["LOCAL_WORLD_SIZE"]))


def _converted(config: DatasetConfig, name: str, images: Images) -> Path:
    """The .beton file of the images in the cache; written on first use."""
    from experiments.data import beton

    if len(images) > _MAX_CONVERTED:
        raise ExperimentError(
            f"dataset {config.name}: {len(images):,} images are too many to convert for FFCV "
            f"unasked; python -m scripts.write_beton {config.name} --help explains how to write "
            "them once"
        )
    # As pixels: small images then need no decoding, and nothing is lost.
    storage = beton.Storage(jpeg_share=0.0)
    identity = digest([f"{images.identity} {storage}".encode()])[:10]
    path = hub.cache_dir() / "images" / f"{config.name}-{name}-{identity}.beton"
    beton.write(images, path, storage, torch.get_num_threads())
    return path


def num_images_in(beton: Path) -> int:
    """Read from the header, without FFCV; the header's last number is where the last table begins.

    Raises:
        ExperimentError: the file does not end where that table does.
    """
    with beton.open("rb") as file:
        header = file.read(24)
    num_bytes = beton.stat().st_size
    if len(header) == 24:
        _, num_images, table_start = struct.unpack("<8sQQ", header)
        if num_images and num_bytes == table_start + 24 * num_images:
            return num_images
    raise ExperimentError(f"{beton}: this .beton file is damaged or cut short; write it again")


def _digest_of_beton(path: Path) -> str:
    """Digest of everything in the file but the images: their labels, sizes and positions."""
    table_bytes = 24 * num_images_in(path)
    with path.open("rb") as file:
        file.seek(-table_bytes, os.SEEK_END)
        table = file.read()
        first_image = np.frombuffer(table, "<u8").reshape(-1, 3)[:, 1].min()
        file.seek(0)
        return digest([file.read(int(first_image)), table])


def _generated(config: DatasetConfig, name: str) -> Images:
    num_images = _NUM_GENERATED if name == config.splits[0] else _NUM_GENERATED // 4
    return Patterns(name, num_images, num_classes(config))


def num_classes(config: DatasetConfig) -> int:
    """The number of different labels.

    Raises:
        ExperimentError: the config does not say.
    """
    if config.num_classes is None:
        raise ExperimentError(f"dataset.num_classes=null: say how many classes {config.name} has")
    return config.num_classes


def from_hub(config: DatasetConfig, hub_id: str, name: str) -> Images:
    """The split's images from the hub or its cache.

    Raises:
        ExperimentError: its columns do not match the config.
        OSError: they are not available.
    """
    rows = hub.load_dataset(hub_id, config.hub_config, config.revision, split=name)
    revision = hub.data_revision(rows)
    split = f"hub {hub_id} {name} {len(rows)}"
    return _Rows(rows, config, hub_id, f"{split} {revision}", split, revision)


def from_folder(config: DatasetConfig, folder: Path, name: str) -> Images | Path:
    """The split's images in a folder, or the .beton file that the user made from them.

    The images are in ``<name>.parquet`` or ``<name>-*.parquet``, or in one folder per class below
    ``<name>``.

    Raises:
        ExperimentError: they are missing, cannot be read, or do not match the config.
    """
    import datasets

    beton = folder / f"{name}.beton"
    if beton.is_file():
        return beton
    datasets.disable_progress_bars()
    cache = str(hub.cache_dir() / "huggingface")
    tables = sorted([*folder.glob(f"{name}.parquet"), *folder.glob(f"{name}-*.parquet")])
    classes = _class_folders(folder, name)
    try:
        if tables:
            rows = datasets.Dataset.from_parquet([str(path) for path in tables], cache_dir=cache)
            stamps, sizes = _stamps(tables)
            return _Rows(rows, config, str(folder), f"{name} {stamps}", sizes)
        if classes:
            where = classes[0].parent
            rows = datasets.load_dataset(
                "imagefolder",
                data_dir=str(where),
                split="train",
                drop_labels=False,
                cache_dir=cache,
            )
            names = {path.name for split in config.splits for path in _class_folders(folder, split)}
            # The folders are in order of class: without a shuffle, a subset would hold only the
            # first classes.
            rows = _renumbered(rows, sorted(names)).shuffle(seed=0)
            columns = {"image": "image", "label": "int"}
            config = dataclasses.replace(config, columns=columns)
            stamps, sizes = _stamps(where.rglob("*"))
            identity = f"{name} {stamps} {sorted(names)} shuffled"
            return _Rows(rows, config, str(where), identity, sizes)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ExperimentError(f"{folder}: the images of {name} cannot be read ({error})") from error
    raise ExperimentError(
        f"{folder}: has no split {name}; it must hold {name}.beton, {name}.parquet or a folder "
        f"{name} with a folder of images for each class"
    )


def _class_folders(folder: Path, name: str) -> list[Path]:
    """The class folders of the split ``name``; none if the split has no folder."""
    short_name = {"validation": "val"}.get(name, name)
    split = next((f for f in (folder / name, folder / short_name) if f.is_dir()), None)
    return [] if split is None else sorted(path for path in split.iterdir() if path.is_dir())


def _renumbered(rows: datasets.Dataset, names: list[str]) -> datasets.Dataset:
    """Renumbers labels over the classes of all splits: a split that lacks a class would otherwise
    number its own differently."""
    numbers = np.array([names.index(name) for name in rows.features["label"].names])
    labels = rows.select_columns("label").with_format("numpy")[:]["label"]
    return rows.remove_columns("label").add_column("label", numbers[labels])


def _stamps(paths: Iterable[Path]) -> tuple[str, str]:
    """Digests of name, size and age of each file and folder, and of name and size of each file."""
    found = [(path.name, path.stat()) for path in sorted(paths)]
    with_ages = "\n".join(f"{name} {of.st_size} {of.st_mtime_ns}" for name, of in found)
    files = (f"{name} {of.st_size}\n" for name, of in found if stat.S_ISREG(of.st_mode))
    return digest([with_ages.encode()]), digest(file.encode() for file in files)


class _Rows:
    """A `datasets.Dataset` with an image and a label in every row."""

    def __init__(
        self,
        rows: datasets.Dataset,
        config: DatasetConfig,
        where: str,
        identity: str,
        files: str,
        revision: str | None = None,
    ) -> None:
        import datasets

        kinds = {kind: column for column, kind in config.columns.items()}
        self._image, self._label = kinds["image"], kinds["int"]
        for column in (self._image, self._label):
            if column not in rows.column_names:
                raise ExperimentError(
                    f"{where}: has no column {column}, only {', '.join(rows.column_names)}; name "
                    "the columns with dataset.columns={NAME: image, NAME: int}"
                )
        labels = rows.select_columns(self._label).with_format("numpy")[:][self._label]
        highest = num_classes(config) - 1
        is_integer = np.issubdtype(labels.dtype, np.integer)
        if not is_integer or labels.min() < 0 or labels.max() > highest:
            raise ExperimentError(f"{where}: column {self._label} must hold labels 0 to {highest}")
        self._rows = rows.cast_column(self._image, datasets.Image())
        self.identity = identity
        self.digest = digest([files.encode(), labels.astype(np.int64).tobytes()])
        self.revision = revision

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        row = self._rows[index]
        return row[self._image].convert("RGB"), row[self._label]
