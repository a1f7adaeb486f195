"""Images made from a number, where there are no real ones: for tests and benchmarks."""

from __future__ import annotations

import numpy as np
from PIL import Image

from experiments.data.digest import digest


class Patterns:
    """Noisy gratings, 32 pixels a side: a class is an angle and a colour."""

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


def photograph(seed: int) -> Image.Image:
    """Coloured 1/f noise of the size of an ImageNet photograph; compresses about like one."""
    rng = np.random.default_rng(seed)
    height, width = int(rng.integers(300, 501)), int(rng.integers(400, 601))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1
    spectrum = rng.normal(size=(3, *frequency.shape)) / frequency**1.2
    channels = np.fft.irfft2(spectrum, (height, width))
    mixed = np.tensordot([[1, 0.2, 0], [1, 0, 0.2], [1, -0.2, 0]], channels, axes=1)
    scaled = 128 + 50 * (mixed - mixed.mean()) / mixed.std()
    return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8).transpose(1, 2, 0))
