"""Images per second loaded by FFCV and torchvision: the same images, recipe and cores.

    python -m benchmarks.loading
    python -m benchmarks.loading --folder path/to/imagenet

The recipe is that of training on ImageNet: decode, random resized crop, flip, batch. The images are
those of a folder train/<class>/, or generated JPEGs about as large as ImageNet's. The loaders take
turns, after one round that does not count; a round is timed from its first batch to its last, so
neither FFCV's compilation nor the start of torchvision's workers counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks import report
from experiments.config import DatasetConfig, ImageConfig
from experiments.data import images
from experiments.data.images import ImageLoader, Images
from experiments.data.torchvision_images import TorchvisionLoader

NUM_GENERATED = 512
RESOLUTION = 192  # of the crops, in pixels per side
BATCH_SIZE = 64
NUM_BATCHES = 24  # per round
NUM_ROUNDS = 7
BASELINE = "torchvision, JPEG"
# How FFCV stores the images: its smallest files, ffcv-imagenet's for a ResNet-50, and its fastest.
JPEG_SHARES = {"FFCV, JPEG": 1.0, "FFCV, half JPEG": 0.5, "FFCV, pixels": 0.0}


def folder_images(folder: Path) -> Images:
    """The images of ``folder``/train/<class>/."""
    config = DatasetConfig(
        name=folder.name,
        splits=["train"],
        columns={"image": "image", "label": "int"},
        num_classes=1000,
    )
    content = images.from_folder(config, folder, "train")
    if isinstance(content, Path):
        raise SystemExit(f"--folder {folder}: {content} is not a folder of images")
    return content


def _photograph(seed: int) -> Image.Image:
    """Coloured 1/f noise the size of an ImageNet photograph, which compresses about as well."""
    rng = np.random.default_rng(seed)
    height, width = int(rng.integers(300, 501)), int(rng.integers(400, 601))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1
    spectrum = rng.normal(size=(3, *frequency.shape)) / frequency**1.2
    channels = np.fft.irfft2(spectrum, (height, width))
    mixed = np.tensordot([[1, 0.2, 0], [1, 0, 0.2], [1, -0.2, 0]], channels, axes=1)
    scaled = 128 + 50 * (mixed - mixed.mean()) / mixed.std()
    return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def write_photographs(folder: Path) -> None:
    """Writes generated JPEGs of one class."""
    (folder / "train" / "generated").mkdir(parents=True)
    for number in tqdm(range(NUM_GENERATED), desc="generating", unit="image"):
        path = folder / "train" / "generated" / f"{number:06}.JPEG"
        _photograph(number).save(path, quality=90)


def make_loaders(source: Images, folder: Path) -> dict[str, ImageLoader]:
    """A loader for each way to store the images."""
    cpu = torch.device("cpu")
    recipe = ImageConfig(first_resolution=1, last_resolution=1, eval_resolution=1)
    loaders: dict[str, ImageLoader] = {BASELINE: TorchvisionLoader(source, recipe, 0, cpu)}
    if not images.has_ffcv():
        raise SystemExit("without FFCV there is nothing to compare")
    from experiments.data import beton
    from experiments.data.ffcv_images import FFCVLoader

    for name, share in JPEG_SHARES.items():
        path = folder / f"{share}.beton"
        beton.write(source, path, beton.Storage(jpeg_share=share), torch.get_num_threads())
        loaders[name] = FFCVLoader(path, recipe, 0, cpu)
    return loaders


def images_per_s(loader: ImageLoader, batches: Sequence[Sequence[int]]) -> float:
    loaded = loader.train(0, batches, RESOLUTION)
    next(loaded)
    started = time.perf_counter()
    num_images = sum(len(labels) for _, labels in loaded)
    return num_images / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="holds train/<class>/ (default: generated)")
    parser.add_argument("--output", type=Path, default=Path("results/benchmark_loading"))
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "photographs"
        if args.folder is None:
            write_photographs(folder)
        source = folder_images(folder)
        loaders = make_loaders(source, Path(temporary))
        order = [i % len(source) for i in range(NUM_BATCHES * BATCH_SIZE)]
        batches = [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]
        rounds: dict[str, list[float]] = {name: [] for name in loaders}
        for number in tqdm(range(NUM_ROUNDS + 1), desc="measuring", unit="round"):
            for name, loader in loaders.items():
                speed = images_per_s(loader, batches)
                if number:
                    rounds[name].append(speed)

    rows: list[dict[str, Any]] = []
    for name, speeds in rounds.items():
        ratios = sorted(s / b for s, b in zip(speeds, rounds[BASELINE], strict=True))
        rows.append(
            {
                "loader": name,
                "images_per_s": statistics.median(speeds),
                "ratio": statistics.median(ratios),
                "ratio_quartile_1": ratios[len(ratios) // 4],
                "ratio_quartile_3": ratios[(3 * len(ratios)) // 4],
                "rounds_images_per_s": speeds,
            }
        )
    lines = [
        [
            row["loader"],
            f"{row['images_per_s']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_quartile_1']:.2f} to {row['ratio_quartile_3']:.2f}",
        ]
        for row in rows
    ]
    headers = ["loader", "images a second", f"ratio to {BASELINE}", "quartiles"]
    kind = "generated JPEGs" if args.folder is None else f"images of {args.folder.name}"
    notes = [
        f"{len(source):,} {kind}, crops of {RESOLUTION} pixels, batches of {BATCH_SIZE}, "
        f"{torch.get_num_threads()} threads or worker processes, files in the page cache.",
        f"Medians of {NUM_ROUNDS} rounds of {NUM_BATCHES} batches, the loaders in turn.",
    ]
    versions = {name: metadata.version(name) for name in ("ffcv", "torchvision", "pillow")}
    results = {"environment": report.environment("cpu") | versions, "rows": rows}
    print(report.write(args.output, "Image loading", notes, report.table(headers, lines), results))


if __name__ == "__main__":
    main()
