"""FFCV's loader, with crops that are a function of seed, epoch and index."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Full
from typing import Any

import numba
import numpy as np
import torch
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import (
    IMAGE_MODES,
    ResizedCropRGBImageDecoder,
    get_center_crop,
    get_random_crop,
)
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader import Loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers import OSCacheManager
from ffcv.pipeline.compiler import Compiler
from ffcv.transforms import ToDevice, ToTensor, ToTorchImage
from torch import Tensor

from experiments.config import ImageConfig
from experiments.data.images import draw_of, num_images_in, num_workers

# FFCV passes its decoders the numbers of the images to read, and nothing else. In training, the
# upper 32 bits of a number carry the draw of the run and epoch, so that crops can depend on it.
_INDEX_BITS = np.uint64(32)
_INDEX_MASK = np.uint64(0xFFFFFFFF)
_MIX = np.uint64(2_654_435_761)  # Knuth's multiplicative hash: spreads neighbouring indices


_compiled = functools.cache(Compiler.compile)  # once, however many pipelines call it


class _Crop(ResizedCropRGBImageDecoder):
    """A resized crop, perhaps flipped, determined by the image's number.

    FFCV's own crop draws from generators that it never seeds. Numba, which compiles the code below,
    supports only NumPy's legacy generator, one per thread.
    """

    def __init__(self, crop: Callable, scale: Any, ratio: Any, flip_share: float) -> None:
        super().__init__(output_size=(0, 0))
        self._crop = crop
        self._scale = scale
        self._ratio = ratio
        self._flip_share = flip_share

    @property
    def get_crop_generator(self) -> Callable:
        return self._crop

    def generate_code(self) -> Callable:
        jpeg = IMAGE_MODES["jpg"]
        read = self.memory_read
        images = Compiler.get_iterator()
        decode_jpeg, resize = _compiled(imdecode), _compiled(resize_crop)
        get_crop = _compiled(self._crop)
        scale, ratio, flip_share = self._scale, self._ratio, self._flip_share

        def decode(numbers: Any, memory: Any, metadata: Any, storage_state: Any) -> Any:
            destination, decoded = memory
            for i in images(len(numbers)):
                index = numbers[i] & _INDEX_MASK
                draw = numbers[i] >> _INDEX_BITS
                np.random.seed((draw ^ (index * _MIX)) & _INDEX_MASK)  # noqa: NPY002
                field = metadata[index]
                data = read(field["data_ptr"], storage_state)
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                if field["mode"] == jpeg:
                    image = decoded[i].reshape(-1)[: 3 * height * width]
                    decode_jpeg(data, image, height, width, height, width, 0, 0, 1, 1, False, False)
                else:
                    image = data
                top, left, crop_height, crop_width = get_crop(height, width, scale, ratio)
                crop = destination[i]
                resize(
                    image.reshape(height, width, 3),
                    top,
                    top + crop_height,
                    left,
                    left + crop_width,
                    crop,
                )
                if np.random.random() < flip_share:  # noqa: NPY002
                    for x in range(crop.shape[1] // 2):
                        for y in range(crop.shape[0]):
                            for c in range(3):
                                other = crop[y, -1 - x, c]
                                crop[y, -1 - x, c] = crop[y, x, c]
                                crop[y, x, c] = other
            return destination[: len(numbers)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


class _Label(IntDecoder):
    """The label of an image whose number carries a draw."""

    def generate_code(self) -> Callable:
        def decode(numbers: Any, destination: Any, metadata: Any, storage_state: Any) -> Any:
            for i in range(len(numbers)):
                destination[i] = metadata[numbers[i] & _INDEX_MASK]
            return destination[: len(numbers)]

        return decode


class _Epoch(EpochIterator):
    """FFCV's reading thread, except that it ends the iteration when it fails: FFCV's own would
    leave training waiting forever."""

    def run(self) -> None:
        try:
            super().run()
        finally:
            while not self.terminate_event.is_set():
                with suppress(Full):
                    self.output_queue.put(None, timeout=0.5)
                    break


def _compile_reader(_: OSCacheManager) -> Callable:
    """A function that reads an image's bytes from the mapped file, given its address there.

    FFCV's own declares the file read-only by setting an attribute of numba's type for byte arrays,
    which all compiled code shares and uses as a dictionary key: whatever was compiled for a
    writable byte array can then no longer be found, and its clean-up fails with a KeyError.
    """

    def read(address: Any, storage_state: Any) -> Any:
        content, addresses, sizes = storage_state
        return content[address : address + sizes[np.searchsorted(addresses, address)]]

    return Compiler.compile(read)


class OrderedLoader(Loader):
    """FFCV's loader, reading in an order given for each iteration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        OSCacheManager.compile_reader = _compile_reader
        super().__init__(*args, **kwargs)

    def read(self, numbers: np.ndarray, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
        """The images with these numbers, batch by batch.

        Raises:
            RuntimeError: FFCV's thread failed; it has printed its own error.
        """
        self.batch_size = batch_size
        Compiler.set_num_threads(self.num_workers)
        if self.code is None:
            self.generate_code()
        epoch = _Epoch(self, numbers)
        num_read = 0
        try:
            for batch in epoch:
                num_read += len(batch[0])
                yield batch
        finally:
            epoch.close()
        if num_read < len(numbers):
            raise RuntimeError(f"FFCV stopped after {num_read} of {len(numbers)} images, see above")


class FFCVLoader:
    """One split, read from a .beton file; see `experiments.data.images.ImageLoader`.

    FFCV sets torch's number of threads to that of its workers; on a CPU it gets as many as torch
    has.
    """

    name = "ffcv"

    def __init__(self, path: Path, recipe: ImageConfig, seed: int, device: torch.device) -> None:
        self._path = path
        self._seed = seed
        self._device = device
        self.num_images = num_images_in(path)
        area, aspect = np.array([recipe.min_crop_area, 1.0]), np.array([3 / 4, 4 / 3])
        self._random = _Crop(get_random_crop, area, aspect, flip_share=0.5)
        self._centre = _Crop(get_center_crop, None, recipe.eval_crop, flip_share=0.0)
        self._loaders: dict[_Crop, OrderedLoader] = {}  # created and compiled on first use

    def train(
        self, epoch: int, batches: Sequence[Sequence[int]], resolution: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        draw = np.uint64(draw_of(self._seed, epoch)) << _INDEX_BITS
        numbers = np.array(batches, np.uint64).ravel() | draw
        return self._read(self._random, numbers, len(batches[0]), resolution)

    def evaluate(
        self, num_images: int, batch_size: int, resolution: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        numbers = np.arange(num_images, dtype=np.uint64)
        return self._read(self._centre, numbers, batch_size, resolution)

    def _read(
        self, decoder: _Crop, numbers: np.ndarray, batch_size: int, resolution: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        decoder.output_size = (resolution, resolution)
        if decoder not in self._loaders:
            to_device = [] if self._device.type == "cpu" else [ToDevice(self._device)]
            num_cores = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
            self._loaders[decoder] = OrderedLoader(
                str(self._path),
                batch_size,
                num_workers=min(num_workers(self._device), num_cores),
                drop_last=False,
                # Nothing that FFCV compiles may come after ToTensor: compilation would never end.
                pipelines={
                    "image": [decoder, ToTensor(), *to_device, ToTorchImage()],
                    "label": [_Label(), ToTensor(), *to_device],
                },
            )
        for images, labels in self._loaders[decoder].read(numbers, batch_size):
            yield images, labels[:, 0]
