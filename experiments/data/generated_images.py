"""Images generated from their index, for when there are no real ones."""

from __future__ import annotations

import numpy as np
from PIL import Image

from experiments.data.digest import digest


class Patterns:
    """Noisy gratings of 32 x 32 pixels; each class has an angle and a colour."""

    def __init__(self, split: str, num_images: int, num_classes: int) -> None:
        self._split = split
        self._num_images = num_images
        self._num_classes = num_classes

    @property
    def identity(self) -> str:
        return f"patterns {self._split} {self._num_images} {self._num_classes}"

    @property
    def digest(self) -> str:
        return digest([self.identity.encode()])

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        rng = np.random.default_rng([index, *self._split.encode()])
        label = index % self._num_classes
        angle = np.pi * label / self._num_classes
        y, x = np.mgrid[:32, :32]
        wave = np.sin(0.8 * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 2 * np.pi))
        colour = 0.5 + 0.5 * np.cos(2 * angle + np.array([0, 2, 4]))
        pixels = 128 + 60 * wave[:, :, None] * colour + rng.normal(0, 30, (32, 32, 3))
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), label
