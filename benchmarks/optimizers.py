"""MicroAdam and those of its rivals that are installed here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from microadam import MicroAdam

Parameters = Sequence[torch.nn.Parameter]
Factory = Callable[[Parameters], Optimizer]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASELINE = "AdamW (fused)"
ORIGINAL = "original MicroAdam"
NOT_BUILT_FOR_SPEED = ("GaLore", "CAME")  # the first would spend minutes in decompositions


def _from(module: str, name: str, **arguments: object) -> Factory:
    return lambda params: getattr(importlib.import_module(module), name)(params, **arguments)


def _galore(params: Parameters) -> Optimizer:
    """Rank 256 for matrices that are at least that large, except embeddings."""
    groups: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
    for p in params:
        is_matrix = p.dim() == 2 and min(p.shape) >= 256 and max(p.shape) < 30_000
        groups[is_matrix].append(p)
    galore = importlib.import_module("experiments.optimizers.galore")
    return galore.GaLoreAdamW(
        [{"params": groups[False]}, {"params": groups[True], "rank": 256}], lr=1e-3
    )


_FACTORIES: dict[str, tuple[str, Factory]] = {  # name: (module it needs, how it is made)
    BASELINE: ("torch", lambda params: torch.optim.AdamW(params, fused=True)),
    "MicroAdam": ("microadam", lambda params: MicroAdam(params)),
    "AdamW (foreach)": ("torch", lambda params: torch.optim.AdamW(params, foreach=True)),
    "bitsandbytes AdamW8bit": ("bitsandbytes", _from("bitsandbytes.optim", "AdamW8bit")),
    "torchao AdamW8bit": ("torchao", _from("torchao.optim", "AdamW8bit")),
    "FlashAdamW": ("flashoptim", _from("flashoptim", "FlashAdamW")),
    "GaLore": ("experiments", _galore),
    "CAME": ("experiments", _from("experiments.optimizers.came", "CAME", lr=1e-3)),
    # Last, since it overwrites gradients.
    ORIGINAL: (
        "ista_daslab_optimizers",
        _from("ista_daslab_optimizers", "MicroAdam", m=10, lr=1e-3, quant_block_size=100_000),
    ),
}


def available() -> dict[str, Factory]:
    """The optimizers whose package is importable, the baseline first."""
    return {
        name: factory
        for name, (module, factory) in _FACTORIES.items()
        if importlib.util.find_spec(module)
    }


def rivals_in_speed() -> list[str]:
    return [name for name in available() if name not in NOT_BUILT_FOR_SPEED]


def supports(name: str, dtype: torch.dtype, device: str) -> bool:
    return name != ORIGINAL or (dtype == torch.bfloat16 and device == "cuda")


def missing() -> list[str]:
    return [name for name in _FACTORIES if name not in available()]


def make_parameters(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str, seed: int
) -> Parameters:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return [torch.nn.Parameter(normal(shape)) for shape in shapes]


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all state tensors, including those inside tensor subclasses and other objects.

    Shared storage, such as bitsandbytes' maps from codes to values, counts once.
    """
    if isinstance(optimizer, MicroAdam):
        return optimizer.state_bytes()
    values = (value for state in optimizer.state.values() for value in state.values())
    storages = [tensor.untyped_storage() for value in values for tensor in _tensors_in(value)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        for name in names:
            yield from _tensors_in(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
    elif hasattr(value, "__dict__"):  # FlashAdamW's
        for part in vars(value).values():
            yield from _tensors_in(part)
