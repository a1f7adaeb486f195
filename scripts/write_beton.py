"""Writes an image data set as FFCV's .beton files, one per split: they load much faster than JPEGs.

    python -m scripts.write_beton imagenet FOLDER --source path/to/imagenet
    python run.py task=imagenet scale=paper dataset.path=FOLDER

The images come from --source, which holds <split>.parquet or <split>/<class>/*.JPEG, or else from
the Hugging Face hub. The defaults are ffcv-imagenet's for a ResNet-50; for a ResNet-18 it uses
--max-resolution 400 --jpeg-share 0.1. Run an interrupted command again to resume it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from experiments import hub
from experiments.config import DatasetConfig
from experiments.errors import ExperimentError, reason, reported

if TYPE_CHECKING:
    from experiments.data.images import Images

_CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "dataset"


def image_data_sets() -> dict[str, dict[str, object]]:
    """The configs of the image data sets, by name."""
    configs = {path.stem: yaml.safe_load(path.read_text()) for path in _CONFIGS.glob("*.yaml")}
    return {name: c for name, c in sorted(configs.items()) if "image" in c["columns"].values()}


def write(args: argparse.Namespace) -> None:
    """Writes the files that do not exist yet.

    Raises:
        ExperimentError: FFCV or images are missing, or an image cannot be read.
    """
    from experiments.data import images

    if not images.has_ffcv():
        raise ExperimentError("writing a .beton file requires FFCV")
    from experiments.data import beton

    if args.source is not None and not args.source.is_dir():
        raise ExperimentError(f"--source {args.source}: there is no such folder")
    config = DatasetConfig(**image_data_sets()[args.dataset])  # type: ignore[arg-type]
    storage = beton.Storage(args.jpeg_share, args.jpeg_quality, args.max_resolution)
    for name in args.splits or config.splits:
        path = args.output / f"{name}.beton"
        if path.exists():
            print(f"{path} already exists")
            continue
        content = _images(config, args.source, name)
        if isinstance(content, Path):
            raise ExperimentError(f"--source {args.source}: {content} is already a .beton file")
        beton.write(content, path, storage, args.num_workers)
        print(f"{path}: {len(content):,} images, {path.stat().st_size / 2**30:.2f} GiB")
    print(f"to use them: dataset.path={args.output}")


def _images(config: DatasetConfig, source: Path | None, name: str) -> Images | Path:
    """The images of one split, from the given folder or else from the hub."""
    from experiments.data import images

    if source is not None:
        return images.from_folder(config, source, name)
    try:
        return images.from_hub(config, str(config.hub_id), name)
    except OSError as error:
        raise ExperimentError(
            f"{config.name} ({config.hub_id}) could not be fetched from the hub "
            f"({reason(error)}): go online or set HF_HOME to a cache that has it, or give a folder "
            "of images with --source FOLDER"
        ) from error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.write_beton",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", choices=image_data_sets(), help="one of configs/dataset")
    parser.add_argument("output", type=Path, help="folder that the files are written to")
    parser.add_argument("--source", type=Path, help="folder with the images")
    parser.add_argument("--splits", nargs="+", help="default: all splits of the data set")
    parser.add_argument(
        "--max-resolution", type=int, default=500, help="pixels; a longer side is shrunk to this"
    )
    parser.add_argument(
        "--jpeg-share",
        type=float,
        default=0.5,
        help="share of images stored as JPEG; the rest as pixels",
    )
    parser.add_argument("--jpeg-quality", type=int, default=90)
    parser.add_argument(
        "--num-workers", type=int, default=os.cpu_count(), help="default: all cores"
    )
    args = parser.parse_args()
    hub.go_offline_if_unreachable()
    with reported("run the same command again to resume"):
        write(args)


if __name__ == "__main__":
    main()
