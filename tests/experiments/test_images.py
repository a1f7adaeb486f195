"""Where images come from, and what both loaders make of them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from experiments import hub
from experiments.config import DatasetConfig, ImageConfig
from experiments.data import images
from experiments.data.generated_images import Patterns
from experiments.data.images import ImageLoader
from experiments.data.torchvision_images import TorchvisionLoader
from experiments.errors import ExperimentError
from tests.experiments.helpers import ROOT

CPU = torch.device("cpu")
RECIPE = ImageConfig(
    first_resolution=32, last_resolution=32, eval_resolution=32, eval_crop=1.0, min_crop_area=0.3
)
PATTERNS = Patterns("train", 64, 10)


def _config(**values: object) -> DatasetConfig:
    fixed = {"name": "cifar10", "hub_id": "uoft-cs/cifar10", "root": "nowhere", "size": 50_000}
    columns = {"img": "image", "label": "int"}
    return DatasetConfig(
        **{**fixed, "num_classes": 10, "columns": columns, **values}, splits=["train", "test"]
    )


# Sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images in a folder for each class; one is grey, one has transparency."""
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
    Image.new("L", (40, 30), 200).save(tmp_path / "train" / "cat" / "grey.png")
    Image.new("RGBA", (30, 40), (0, 0, 255, 128)).save(tmp_path / "train" / "dog" / "glass.png")
    return tmp_path


def test_a_folder_of_classes(folder: Path) -> None:
    (split,) = images.find(_config(path=str(folder)), ["train"])
    assert split.source == "local"
    assert not isinstance(split.content, Path)
    by_label = {split.content[i][1]: split.content[i][0] for i in range(len(split))}
    grey, glass = by_label[0], by_label[1]
    assert (grey.mode, glass.mode) == ("RGB", "RGB")
    assert (grey.size, grey.getpixel((0, 0))) == ((40, 30), (200, 200, 200))


def test_classes_are_counted_over_all_splits_and_mixed_for_subsets(folder: Path) -> None:
    for number in range(20):
        for name in ("cat", "dog", "eel"):
            path = folder / "train" / name / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("L", (4, 4), number).save(path)
    (folder / "test" / "dog").mkdir(parents=True)
    Image.new("L", (4, 4), 9).save(folder / "test" / "dog" / "9.png")
    splits = images.find(_config(path=str(folder)), ["train", "test"])
    train, test = (split.content for split in splits)
    assert not isinstance(test, Path)
    assert not isinstance(train, Path)
    assert test[0][1] == 1  # though it is the only class of its split
    labels = [train[i][1] for i in range(len(train))]
    assert set(labels[:20]) == {0, 1, 2}
    assert [labels.count(label) for label in range(3)] == [21, 21, 20]


def test_parquet_files_that_hold_encoded_images(folder: Path) -> None:
    datasets.disable_progress_bars()
    files = sorted(str(path) for path in folder.rglob("*.png"))
    rows = datasets.Dataset.from_dict({"img": files, "label": [3, 7]})
    rows.cast_column("img", datasets.Image()).to_parquet(
        str(folder / "test-00000-of-00001.parquet")
    )
    (split,) = images.find(_config(path=str(folder)), ["test"])
    assert not isinstance(split.content, Path)
    assert [split.content[i][1] for i in range(len(split))] == [3, 7]
    assert split.content[0][0].size == (40, 30)
    columns = {"picture": "image", "label": "int"}
    with pytest.raises(ExperimentError, match="has no column picture, only img, label"):
        images.find(_config(path=str(folder), columns=columns), ["test"])
    with pytest.raises(ExperimentError, match="column label must hold labels 0 to 4"):
        images.find(_config(path=str(folder), num_classes=5), ["test"])


def test_other_images_have_another_digest_and_a_copy_has_the_same(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A copy's files are younger, and it may lie on a machine that the run moves to."""

    def digest(of: Path) -> str:
        return images.find(_config(path=str(of)), ["train"])[0].digest

    copy = tmp_path_factory.mktemp("copy") / "images"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    assert digest(copy) == digest(folder)
    (copy / "train/cat/grey.png").rename(copy / "train/dog/grey.png")
    assert digest(copy) != digest(folder)
    shutil.rmtree(copy)
    shutil.copytree(folder, copy)
    with (copy / "train/cat/grey.png").open("ab") as file:
        file.write(b" ")
    assert digest(copy) != digest(folder)
    digests = [Patterns(*given).digest for given in (("train", 8, 2), ("test", 8, 2))]
    assert digests[0] != digests[1]


def test_a_beton_file_with_another_label_has_another_digest(tmp_path: Path) -> None:
    from experiments.data import beton

    class Relabelled(Patterns):
        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            image, label = super().__getitem__(index)
            return image, label + (index == 3)

    digests = []
    for name, content in (("a", Patterns), ("b", Patterns), ("c", Relabelled)):
        path = tmp_path / name / "train.beton"
        beton.write(content("train", 8, 2), path, beton.Storage(jpeg_share=0.0), num_workers=0)
        (split,) = images.find(_config(path=str(path.parent)), ["train"])
        assert split.content == path
        digests.append(split.digest)
    assert digests[0] == digests[1] != digests[2]


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(ExperimentError, match=r"no split test.*test\.parquet or a folder"):
        images.find(_config(path=str(folder)), ["test"])
    with pytest.raises(ExperimentError, match=r"cifar10 \(uoft-cs/cifar10\) could not be fetched"):
        images.find(_config(source="real"), ["train"])
    with pytest.raises(ExperimentError, match=r"dataset\.num_classes=null"):
        images.find(_config(source="generated", num_classes=None), ["train"])


def test_without_a_hub_patterns_are_generated_and_it_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (split,) = images.find(_config(), ["train"])
    assert split.source == "generated"
    assert "uoft-cs/cifar10" in capsys.readouterr().out


def test_all_splits_are_from_the_one_source_that_has_them_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training on the hub's images was reported with the accuracy on generated patterns."""
    rows = datasets.Dataset.from_dict({"img": [Image.new("L", (4, 4))], "label": [3]})

    def load(name: str, config: str | None, revision: str | None, split: str) -> datasets.Dataset:
        if split == "test":
            raise FileNotFoundError("no test")
        return rows

    monkeypatch.setattr(hub, "load_dataset", load)
    (train,) = images.find(_config(), ["train"])
    assert (train.source, train.revision) == ("hub", None)  # they lie in memory alone
    splits = images.find(_config(), ["train", "test"])
    assert [split.source for split in splits] == ["generated", "generated"]
    with pytest.raises(ExperimentError, match=r"source=hub: .*\(no test\)"):
        images.find(_config(source="hub"), ["train", "test"])


def test_the_hubs_commit_belongs_to_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another commit, they are converted for FFCV again."""
    identities = []
    for commit in (40 * "a", 40 * "b"):
        rows = datasets.Dataset.from_dict({"img": [Image.new("L", (4, 4))], "label": [3]})
        rows.save_to_disk(tmp_path / commit)
        loaded = datasets.load_from_disk(tmp_path / commit)
        monkeypatch.setattr(hub, "load_dataset", lambda *_, rows=loaded, **__: rows)
        (split,) = images.find(_config(), ["train"])
        assert split.revision == commit
        assert not isinstance(split.content, Path)
        identities.append(split.content.identity)
    assert identities[0] != identities[1]


def test_a_data_set_that_is_on_no_hub_is_not_looked_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was asked for the data set "None"."""

    def load(*_: object, **__: object) -> None:
        pytest.fail("it was looked up")

    monkeypatch.setattr(hub, "load_dataset", load)
    assert images.find(_config(hub_id=None), ["train"])[0].source == "generated"
    message = "cifar10 could not be loaded from the hub (it is not on the hub)"
    assert message in capsys.readouterr().out
    with pytest.raises(ExperimentError, match="data set cifar10 is not on any hub: give a folder"):
        images.find(_config(hub_id=None, source="real"), ["train"])


# Loaders


def _ffcv(folder: Path, recipe: ImageConfig, seed: int) -> ImageLoader:
    from experiments.data import beton
    from experiments.data.ffcv_images import FFCVLoader

    path = folder / "patterns.beton"
    beton.write(PATTERNS, path, beton.Storage(jpeg_share=0.0), num_workers=0)
    return FFCVLoader(path, recipe, seed, CPU)


def _torchvision(folder: Path, recipe: ImageConfig, seed: int) -> ImageLoader:
    return TorchvisionLoader(PATTERNS, recipe, seed, CPU)


Make = Callable[[ImageConfig, int], ImageLoader]


@pytest.fixture(scope="module", params=["ffcv", "torchvision"])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a loader; one that was made before is not compiled again."""
    if request.param == "ffcv":
        pytest.importorskip("ffcv", reason="FFCV is not installed")
    folder = tmp_path_factory.mktemp("beton")
    made: dict[str, ImageLoader] = {}

    def make_once(recipe: ImageConfig, seed: int) -> ImageLoader:
        new = {"ffcv": _ffcv, "torchvision": _torchvision}[request.param]
        key = f"{recipe} {seed}"
        if key not in made:
            made[key] = new(folder, recipe, seed)
        return made[key]

    return make_once


def _all(batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Copies, because FFCV fills the same memory again."""
    pixels, labels = zip(*((p.clone(), y.clone()) for p, y in batches), strict=True)
    return torch.cat(pixels), torch.cat(labels)


def _originals() -> Tensor:
    arrays = [np.array(PATTERNS[index][0]) for index in range(len(PATTERNS))]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def test_a_whole_centre_at_its_own_size_is_the_image_itself(make: Make) -> None:
    for pixels, _ in make(RECIPE, 0).evaluate(10, 4, 32):
        assert pixels.dtype == torch.uint8
        assert pixels.is_contiguous(memory_format=torch.channels_last)
    pixels, labels = _all(make(RECIPE, 0).evaluate(50, 16, 32))
    assert torch.equal(pixels, _originals()[:50])
    assert labels.tolist() == [index % 10 for index in range(50)]


def test_crops_depend_on_seed_epoch_and_index_alone(make: Make) -> None:
    """The batch, and what was read before, do not matter: a run that goes on sees the same."""
    loader = make(dataclasses.replace(RECIPE, eval_crop=0.9), 7)
    batches = [[5, 3, 9, 60], [0, 1, 2, 4], [63, 62, 61, 8]]
    pixels, labels = _all(loader.train(2, batches, 24))
    assert pixels.shape == (12, 3, 24, 24)
    assert labels.tolist() == [index % 10 for batch in batches for index in batch]
    from_the_middle, _ = _all(loader.train(2, batches[1:], 24))
    assert torch.equal(from_the_middle, pixels[4:])
    in_other_batches, _ = _all(loader.train(2, [[8, 5], [3, 61]], 24))
    assert torch.equal(in_other_batches, pixels[[11, 0, 1, 10]])
    next_epoch, _ = _all(loader.train(3, batches, 24))
    same = [torch.equal(a, b) for a, b in zip(pixels, next_epoch, strict=True)]
    assert sum(same) <= 1


def test_of_whole_images_half_are_flipped(make: Make) -> None:
    """No crop other than the whole square has all of its area."""
    loader = make(dataclasses.replace(RECIPE, min_crop_area=1.0), 0)
    pixels, _ = _all(loader.train(0, [list(range(64))], 32))
    originals = _originals()
    as_is = [torch.equal(a, b) for a, b in zip(pixels, originals, strict=True)]
    flipped = [torch.equal(a, b.flip(2)) for a, b in zip(pixels, originals, strict=True)]
    assert all(a != b for a, b in zip(as_is, flipped, strict=True))
    assert 16 < sum(flipped) < 48


# FFCV


def test_a_failure_in_ffcvs_thread_ends_the_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFCV itself waits for ever for the thread that is gone."""
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    loader = _ffcv(tmp_path, RECIPE, 0)
    _all(loader.evaluate(16, 4, 32))  # to its end, so that no other thread is left to fail
    (ordered,) = loader._loaders.values()
    ordered.code = ([(_fails, ("image",))], ("image",))
    failures: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: failures.append(str(args.exc_value)))
    with pytest.raises(RuntimeError, match="FFCV stopped after 0 of 16 images"):
        next(loader.evaluate(16, 4, 32))
    assert failures == ["a broken stage"]


def _fails(**_: object) -> None:
    raise ValueError("a broken stage")


def test_ffcv_leaves_numbas_types_as_they_are(tmp_path: Path) -> None:
    """Its loader made the type of byte arrays read-only, for all code: numba then failed with a
    KeyError when it cleaned up, and when a second pipeline called what the first had compiled."""
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    import numba

    bytes_type = numba.uint8[::1]
    next(_ffcv(tmp_path, RECIPE, 0).evaluate(4, 4, 32))
    assert bytes_type.mutable


def test_ffcv_leaves_torch_its_threads() -> None:
    """Its import sets them to one: a training on two cores took twice as long."""
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    code = (
        "import torch; torch.set_num_threads(2); from experiments.data import images; "
        "images.has_ffcv(); from experiments.data import beton; print(torch.get_num_threads())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["2"]


def test_under_torchrun_a_gpu_gets_its_images_from_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchrun leaves torch one thread in each process, and one thread decoded the images of a GPU
    that trains on thousands per second."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    gpu = torch.device("cuda", 0)
    assert images.num_workers(gpu) == 8
    assert images.num_workers(CPU) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert images.num_workers(gpu) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert images.num_workers(gpu) == 16


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    _ffcv(tmp_path, RECIPE, 0)
    path = tmp_path / "patterns.beton"
    whole = path.read_bytes()
    for damaged in (whole[:-1000], whole[:10], b"", b"no beton file" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ExperimentError, match=r"patterns\.beton.*damaged or cut short"):
            _ffcv(tmp_path, RECIPE, 0)


def test_without_ffcv_torchvision_takes_over_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    images.has_ffcv.cache_clear()
    config = _config(source="generated")
    try:
        (split,) = images.find(config, ["train"])
        loader = images.open_loader(config, split, RECIPE, 0, CPU)
        images.open_loader(config, split, RECIPE, 0, CPU)
        assert loader.name == "torchvision"
        assert capsys.readouterr().out.count("torchvision loads the images") == 1
        (tmp_path / "train.beton").write_bytes(b"")
        (local,) = images.find(_config(path=str(tmp_path)), ["train"])
        with pytest.raises(ExperimentError, match="only FFCV can read this file"):
            images.open_loader(config, local, RECIPE, 0, CPU)
    finally:
        images.has_ffcv.cache_clear()
