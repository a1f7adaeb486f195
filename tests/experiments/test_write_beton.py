"""Writing .beton files: as FFCV reads them, whole or not at all, interrupted and gone on with."""

from __future__ import annotations

import ctypes
import errno
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.errors import ExperimentError
from scripts import write_beton

pytest.importorskip("ffcv", reason="FFCV is not installed")
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.reader import Reader

from experiments.data import beton
from experiments.data.beton import Storage

PIXELS = Storage(jpeg_share=0.0)


class Noise:
    """Images of several sizes; those from ``broken_from`` on cannot be decoded."""

    def __init__(self, num_images: int = 60, broken_from: int | None = None) -> None:
        self.identity = f"noise {num_images}"
        self._num_images = num_images
        self._broken_from = num_images if broken_from is None else broken_from
        self.read: list[int] = []

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.read.append(index)
        if index >= self._broken_from:
            raise OSError("image file is truncated")
        rng = np.random.default_rng(index)
        shape = (20 + index % 7, 30 + index % 5, 3)
        return Image.fromarray(rng.integers(0, 256, shape, np.uint8)), index % 10


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few small images fill several."""
    monkeypatch.setattr(beton, "_PAGE_BYTES", 1 << 14)


def _pixels(path: Path, reader: Reader, index: int) -> np.ndarray:
    entry = reader.metadata[index]["f0"]
    (size,) = reader.alloc_table["size"][reader.alloc_table["sample_id"] == index]
    data = np.fromfile(path, np.uint8, int(size), offset=int(entry["data_ptr"]))
    assert entry["mode"] == IMAGE_MODES["raw"]
    return data.reshape(entry["height"], entry["width"], 3)


def test_ffcv_reads_the_very_pixels_and_labels(tmp_path: Path) -> None:
    images = Noise()
    path = tmp_path / "noise.beton"
    beton.write(images, path, PIXELS, num_workers=2)
    reader = Reader(str(path))
    assert reader.num_samples == len(images)
    for index in range(len(images)):
        image, label = images[index]
        assert np.array_equal(_pixels(path, reader, index), np.array(image))
        assert reader.metadata[index]["f1"] == label
    pages = reader.alloc_table["ptr"] >> np.uint64(14)
    assert len(set(pages)) > 5
    assert np.array_equal(pages, (reader.alloc_table["ptr"] + reader.alloc_table["size"] - 1) >> 14)


@pytest.fixture
def fill_new_memory() -> Iterator[Callable[[int], None]]:
    """Has glibc fill memory with a byte before it is handed out."""
    m_perturb = -6
    libc = ctypes.CDLL(None)
    yield lambda byte: libc.mallopt(m_perturb, byte)
    libc.mallopt(m_perturb, 0)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc's mallopt")
def test_the_same_images_make_the_same_file(
    tmp_path: Path, fill_new_memory: Callable[[int], None]
) -> None:
    files = [tmp_path / "one.beton", tmp_path / "other.beton"]
    for path, byte in zip(files, [0x5A, 0xA5], strict=True):
        fill_new_memory(byte)
        beton.write(Noise(), path, PIXELS, num_workers=0)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("torn", ["", "journal", "partial"])
def test_an_interrupted_file_is_gone_on_with(tmp_path: Path, torn: str) -> None:
    """Even where the interruption cut what was written last."""
    beton.write(Noise(), tmp_path / "whole.beton", PIXELS, num_workers=0)
    path = tmp_path / "noise.beton"
    with pytest.raises(ExperimentError, match="image 40 cannot be read"):
        beton.write(Noise(broken_from=40), path, PIXELS, num_workers=0)
    assert not path.exists()
    if torn:
        (file,) = tmp_path.glob(f".noise.beton.{torn}")
        with file.open("ab") as stream:
            stream.write(b"torn")
    mended = Noise()
    beton.write(mended, path, PIXELS, num_workers=0)
    assert 0 < min(mended.read) < 40
    assert path.read_bytes() == (tmp_path / "whole.beton").read_bytes()
    assert not list(tmp_path.glob(".noise.beton.[jp]*"))


def test_a_full_disk_is_told_and_the_file_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "noise.beton"
    sync, num_syncs = beton._sync, itertools.count()

    def sync_until_full(file: IO[bytes]) -> None:
        if next(num_syncs) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(beton, "_sync", sync_until_full)
    with pytest.raises(ExperimentError, match=r"noise\.beton: could not be written \(No space"):
        beton.write(Noise(), path, PIXELS, num_workers=0)
    mended = Noise()
    beton.write(mended, path, PIXELS, num_workers=0)
    assert 0 < min(mended.read) < 40


@pytest.mark.parametrize("num_workers", [0, 2])
def test_writing_draws_nothing_from_torchs_generator(tmp_path: Path, num_workers: int) -> None:
    """A model that is drawn next has the same weights whether the file was there or not."""
    before = torch.get_rng_state()
    beton.write(Noise(), tmp_path / "noise.beton", PIXELS, num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_settings_or_images_start_anew(tmp_path: Path) -> None:
    path = tmp_path / "noise.beton"
    with pytest.raises(ExperimentError):
        beton.write(Noise(broken_from=40), path, Storage(jpeg_share=1.0), num_workers=0)
    images = Noise()
    beton.write(images, path, PIXELS, num_workers=0)
    assert min(images.read) == 0
    assert Reader(str(path)).num_samples == 60


def test_a_finished_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "noise.beton"
    path.write_bytes(b"what the user has")
    beton.write(Noise(), path, PIXELS, num_workers=0)
    assert path.read_bytes() == b"what the user has"


def test_an_error_in_a_worker_comes_back(tmp_path: Path) -> None:
    """FFCV's own writer waits for ever for the images of a worker that has died."""
    with pytest.raises(ExperimentError, match=r"image 50 cannot be read \(image file is truncated"):
        beton.write(Noise(broken_from=50), tmp_path / "noise.beton", PIXELS, num_workers=2)


def test_an_image_that_fits_no_page_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beton, "_PAGE_BYTES", 1 << 11)
    with pytest.raises(ExperimentError, match=r"image 2 takes 2,112 bytes.*maximum resolution"):
        beton.write(Noise(), tmp_path / "noise.beton", PIXELS, num_workers=0)


def test_share_of_jpegs_and_shrunk_sides(tmp_path: Path) -> None:
    path = tmp_path / "noise.beton"
    beton.write(Noise(), path, Storage(jpeg_share=0.5, max_resolution=16), num_workers=0)
    images = Reader(str(path)).metadata["f0"]
    assert images["width"].max() == 16
    assert 15 < (images["mode"] == IMAGE_MODES["jpg"]).sum() < 45


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images in each of two classes, in both splits."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "source" / split / name).mkdir(parents=True)
            for number in range(3):
                image, _ = Noise()[number]
                image.save(tmp_path / "source" / split / name / f"{number}.png")
    return tmp_path / "source"


def _call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["write_beton", *map(str, arguments), "--num-workers", "0"])
    write_beton.main()


def test_the_command_writes_every_split_once(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "output"
    for _ in range(2):
        _call(monkeypatch, "cifar10", output, "--source", folder)
    labels = Reader(str(output / "test.beton")).metadata["f1"].tolist()
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]
    printed = capsys.readouterr().out
    assert "train.beton: 6 images" in printed
    assert "train.beton already exists" in printed
    assert f"dataset.path={output}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "nowhere"], "error: --source nowhere: there is no such folder"),
        (["--splits", "train"], "or give a folder of images with --source FOLDER"),
        (["--jpeg-share", "7"], "jpeg_share=7.0: must be from 0 to 1"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        _call(monkeypatch, "cifar10", tmp_path, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
