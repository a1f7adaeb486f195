"""The same recipe without FFCV: torchvision's transforms in a DataLoader's worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from experiments.config import ImageConfig
from experiments.data.images import Images, draw_of, num_workers


class _Crops(Dataset):
    """Crops of the images: random if there is a draw, otherwise central."""

    def __init__(
        self, images: Images, recipe: ImageConfig, resolution: int, draw: int | None
    ) -> None:
        self._images = images
        self._draw = draw
        self._eval_crop = recipe.eval_crop
        self._resize = v2.Resize((resolution, resolution))
        self._random_crop = v2.Compose(
            [
                v2.RandomResizedCrop(resolution, scale=(recipe.min_crop_area, 1.0)),
                v2.RandomHorizontalFlip(),
            ]
        )

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._images[index]
        if self._draw is None:
            side = int(self._eval_crop * min(image.size))
            crop = self._resize(functional.center_crop(image, [side, side]))
        else:
            torch.manual_seed(self._draw ^ index)  # the worker's own generator
            crop = self._random_crop(image)
        return functional.pil_to_tensor(crop), label


class TorchvisionLoader:
    """One split, read from the images themselves; see `experiments.data.images.ImageLoader`."""

    name = "torchvision"

    def __init__(
        self, images: Images, recipe: ImageConfig, seed: int, device: torch.device
    ) -> None:
        self._images = images
        self._recipe = recipe
        self._seed = seed
        self._device = device
        self.num_images = len(images)

    def train(
        self, epoch: int, batches: Sequence[Sequence[int]], resolution: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return self._read(batches, resolution, draw_of(self._seed, epoch))

    def evaluate(
        self, num_images: int, batch_size: int, resolution: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        starts = range(0, num_images, batch_size)
        batches = [range(start, min(start + batch_size, num_images)) for start in starts]
        return self._read(batches, resolution, draw=None)

    def _read(
        self, batches: Sequence[Sequence[int]], resolution: int, draw: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader: Any = DataLoader(
            _Crops(self._images, self._recipe, resolution, draw),
            batch_sampler=[list(batch) for batch in batches],
            num_workers=num_workers(self._device),
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # leaves torch's default generator alone
        )
        for images, labels in loader:
            images = images.to(self._device, non_blocking=True)
            labels = labels.to(self._device, non_blocking=True)
            yield images.contiguous(memory_format=torch.channels_last), labels
