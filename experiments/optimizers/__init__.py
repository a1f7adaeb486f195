"""Every optimizer: its hyperparameters, how it is built, and how much its state takes.

A new one needs a dataclass here, a line in `OPTIMIZERS`, and a file in configs/optimizer/ that also
says where its defaults come from. Those that the project implements itself are modules beside this
file. Torch and whatever needs it are imported inside the methods: experiments/config.py imports
this file, and `python run.py --cfg job` must be instant.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from experiments.errors import ExperimentError, require, require_positive

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter
    from torch.optim import Optimizer


class UnavailableError(ExperimentError):
    """The optimizer does not run on this machine, or its package is not installed."""


@dataclass
class OptimizerConfig:
    """What all optimizers share; subclasses add their own hyperparameters."""

    name: str = MISSING  # as in OPTIMIZERS
    lr: float = MISSING
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        is_known = OPTIMIZERS.get(self.name) is type(self)
        require(is_known, "optimizer.name", self.name, "choose it with optimizer=NAME instead")
        require(self.lr >= 0, "optimizer.lr", self.lr, "must be >= 0")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "must be >= 0")

    def build(self, model: Module) -> Optimizer:
        """The optimizer over the model's trainable parameters; call it through `build` below."""
        raise NotImplementedError

    def state_bytes(self, model: Module) -> int:
        """Bytes of state after the first step, computed from shapes and dtypes alone."""
        raise NotImplementedError

    def groups(self, model: Module) -> list[dict[str, Any]]:
        """Parameter groups: weight decay applies to matrices and up, not to biases and norms."""
        params = _trainable(model)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


@dataclass
class AdamWConfig(OptimizerConfig):
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_betas(self.betas, 2)
        require(self.eps >= 0, "optimizer.eps", self.eps, "must be >= 0")

    def adam_arguments(self) -> dict[str, Any]:
        return {"lr": self.lr, "betas": tuple(self.betas), "eps": self.eps}

    def build(self, model: Module) -> Optimizer:
        import torch

        return torch.optim.AdamW(self.groups(model), **self.adam_arguments(), fused=True)

    def state_bytes(self, model: Module) -> int:
        return sum(2 * p.nbytes + 4 for p in _trainable(model))  # two moments, a float32 step


@dataclass
class AdamConfig(AdamWConfig):
    def build(self, model: Module) -> Optimizer:
        import torch

        return torch.optim.Adam(self.groups(model), **self.adam_arguments(), fused=True)


@dataclass
class MicroAdamConfig(AdamWConfig):
    window_size: int = 10
    density: float = 0.01
    bucket_size: int = 64
    block_size: int = 4096
    stochastic_rounding: bool = False
    alpha: float = 0.0

    def build(self, model: Module) -> Optimizer:
        from microadam import MicroAdam

        return MicroAdam(
            self.groups(model),
            **self.adam_arguments(),
            window_size=self.window_size,
            density=self.density,
            bucket_size=self.bucket_size,
            block_size=self.block_size,
            stochastic_rounding=self.stochastic_rounding,
            alpha=self.alpha,
        )

    def state_bytes(self, model: Module) -> int:
        from microadam import BlockLayout

        shape = (self.window_size, self.density, self.bucket_size, self.block_size)
        return sum(BlockLayout.of(p.numel(), *shape).state_bytes for p in _trainable(model))


@dataclass
class Adam8bitConfig(AdamWConfig):
    def build(self, model: Module) -> Optimizer:
        bitsandbytes = _bitsandbytes(self.name)
        _make_contiguous(model)
        return bitsandbytes.AdamW8bit(self.groups(model), **self.adam_arguments())

    def state_bytes(self, model: Module) -> int:
        sizes = [p.numel() for p in _trainable(model)]
        in_8_bits = [size for size in sizes if size >= 4096]
        # Two moments: codes with a float32 scale for every 256, else float32. All share two maps
        # from code to value, of 256 float32 each.
        codes = sum(2 * size + 8 * math.ceil(size / 256) for size in in_8_bits)
        return codes + 8 * (sum(sizes) - sum(in_8_bits)) + (2048 if in_8_bits else 0)


@dataclass
class AdamW4bitConfig(AdamWConfig):
    def build(self, model: Module) -> Optimizer:
        torchao = _import(self.name, "torchao.optim", "torchao")
        return torchao.AdamW4bit(self.groups(model), **self.adam_arguments())

    def state_bytes(self, model: Module) -> int:
        def moment_bytes(p: Parameter) -> int:
            if p.numel() < 4096 or p.numel() % 128:
                return p.nbytes
            return p.numel() // 2 + 4 * (p.numel() // 128) + 64  # codes, scales, map

        return sum(2 * moment_bytes(p) + 4 for p in _trainable(model))


@dataclass
class FlashAdamWConfig(AdamWConfig):
    def build(self, model: Module) -> Optimizer:
        import torch

        flashoptim = _import(self.name, "flashoptim", "flashoptim")
        if not torch.cuda.is_available():
            raise UnavailableError(f"optimizer={self.name}: needs a CUDA device; choose another")
        # The package rejects correction bits if there is nothing to correct.
        has_16_bits = any(p.element_size() == 2 for p in _trainable(model))
        return flashoptim.FlashAdamW(
            self.groups(model),
            **self.adam_arguments(),
            master_weight_bits=24 if has_16_bits else None,
        )

    def state_bytes(self, model: Module) -> int:
        def moment_bytes(p: Parameter) -> int:
            return p.numel() + 2 * math.ceil(p.numel() / 32)  # codes, scales

        # A 16-bit parameter has 8 extra correction bits per element; the step is an int64.
        return sum(
            2 * moment_bytes(p) + (p.numel() if p.element_size() == 2 else 0) + 8
            for p in _trainable(model)
        )


@dataclass
class GaLoreConfig(AdamWConfig):
    rank: int = 256
    update_gap: int = 200
    scale: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("optimizer", self, "rank", "update_gap", "scale")

    def build(self, model: Module) -> Optimizer:
        from experiments.optimizers.galore import GaLoreAdamW

        groups = self.groups(model)
        if not any("rank" in group for group in groups):
            print(
                f"optimizer.rank={self.rank}: no linear layer has both sides above it, so GaLore "
                "projects nothing and reduces to AdamW; set a smaller rank"
            )
        return GaLoreAdamW(
            groups,
            **self.adam_arguments(),
            update_gap=self.update_gap,
            scale=self.scale,
        )

    def groups(self, model: Module) -> list[dict[str, Any]]:
        from experiments.optimizers.galore import low_rank_parameters

        low_rank = low_rank_parameters(model, self.rank)
        ids = {id(p) for p in low_rank}
        groups = super().groups(model)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in ids]
        groups.append({"params": low_rank, "weight_decay": self.weight_decay, "rank": self.rank})
        return [group for group in groups if group["params"]]

    def state_bytes(self, model: Module) -> int:
        def bytes_of(p: Parameter, rank: int | None) -> int:
            if rank is None:
                return 2 * p.nbytes
            return (min(p.shape) + 2 * max(p.shape)) * rank * p.element_size()

        return sum(
            bytes_of(p, group.get("rank")) for group in self.groups(model) for p in group["params"]
        )


@dataclass
class CAMEConfig(OptimizerConfig):
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999, 0.9999])
    eps: list[float] = field(default_factory=lambda: [1e-30, 1e-16])
    clip_threshold: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_betas(self.betas, 3)
        _require_eps_pair(self.eps)
        require_positive("optimizer", self, "clip_threshold")

    def build(self, model: Module) -> Optimizer:
        from experiments.optimizers.came import CAME

        return CAME(
            self.groups(model),
            lr=self.lr,
            betas=(self.betas[0], self.betas[1], self.betas[2]),
            eps=(self.eps[0], self.eps[1]),
            clip_threshold=self.clip_threshold,
        )

    def state_bytes(self, model: Module) -> int:
        def num_statistics(p: Parameter) -> int:
            return p.numel() if p.dim() < 2 else 2 * (p.shape[0] + p[0].numel())

        return sum(4 * (p.numel() + num_statistics(p)) for p in _trainable(model))


@dataclass
class AdafactorConfig(OptimizerConfig):
    beta2_decay: float = -0.8
    eps: list[float] = field(default_factory=lambda: [1e-15, 1e-3])
    clip_threshold: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta2_decay <= 0, "optimizer.beta2_decay", self.beta2_decay, "must be <= 0")
        _require_eps_pair(self.eps)
        clip_threshold = self.clip_threshold
        require(clip_threshold >= 1, "optimizer.clip_threshold", clip_threshold, "must be >= 1")

    def build(self, model: Module) -> Optimizer:
        import torch

        return torch.optim.Adafactor(
            self.groups(model),
            lr=self.lr,
            beta2_decay=self.beta2_decay,
            eps=(self.eps[0], self.eps[1]),
            d=self.clip_threshold,
        )

    def state_bytes(self, model: Module) -> int:
        def num_statistics(p: Parameter) -> int:
            return p.numel() if p.dim() < 2 else p.numel() // p.shape[-1] + p.numel() // p.shape[-2]

        return sum(num_statistics(p) * p.element_size() + 4 for p in _trainable(model))


@dataclass
class LionConfig(OptimizerConfig):
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_betas(self.betas, 2)

    def build(self, model: Module) -> Optimizer:
        bitsandbytes = _bitsandbytes(self.name)
        _make_contiguous(model)
        return bitsandbytes.Lion(self.groups(model), lr=self.lr, betas=tuple(self.betas))

    def state_bytes(self, model: Module) -> int:
        return sum(4 * p.numel() for p in _trainable(model))


@dataclass
class SGDConfig(OptimizerConfig):
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        is_valid = 0 <= self.momentum < 1
        require(is_valid, "optimizer.momentum", self.momentum, "must be >= 0 and below 1")

    def build(self, model: Module) -> Optimizer:
        import torch

        return torch.optim.SGD(
            self.groups(model),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            fused=True,
        )

    def state_bytes(self, model: Module) -> int:
        return sum(p.nbytes for p in _trainable(model)) if self.momentum else 0


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "microadam": MicroAdamConfig,
    "adamw": AdamWConfig,
    "adam": AdamConfig,
    "adam8bit": Adam8bitConfig,
    "adamw4bit": AdamW4bitConfig,
    "flash_adamw": FlashAdamWConfig,
    "galore": GaLoreConfig,
    "came": CAMEConfig,
    "adafactor": AdafactorConfig,
    "lion": LionConfig,
    "sgd": SGDConfig,
}


def build(model: Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer over the model's trainable parameters.

    Raises:
        ExperimentError: it rejects a hyperparameter.
        UnavailableError: its package is missing, or it does not run on this machine.
    """
    try:
        return config.build(model)
    except ValueError as error:
        raise ExperimentError(f"optimizer.{error}") from error


def check(config: OptimizerConfig) -> None:
    """Rejects what `build` would reject for most models, before one is loaded.

    Raises:
        ExperimentError, UnavailableError: as in `build`.
    """
    import torch

    build(torch.nn.Linear(1 << 16, 1 << 16, device="meta"), config)


def measured_state_bytes(optimizer: Optimizer) -> int:
    """Bytes taken by the tensors of the optimizer's state, with shared ones counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        for tensor in _tensors(value)
    }
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors in an entry of an optimizer's state."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(value):  # torchao's quantized tensors, DTensors
        names, _ = value.__tensor_flatten__()
        parts = (getattr(value, name) for name in names)
        yield from (part for part in parts if isinstance(part, torch.Tensor))
    elif isinstance(value, torch.Tensor):
        yield value
    elif hasattr(value, "__dict__"):  # flashoptim's
        yield from (part for part in vars(value).values() if isinstance(part, torch.Tensor))


def _trainable(model: Module) -> list[Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _require_betas(betas: list[float], num: int) -> None:
    is_valid = len(betas) == num and all(0 <= beta < 1 for beta in betas)
    require(is_valid, "optimizer.betas", betas, f"must be {num} numbers from 0 to below 1")


def _require_eps_pair(eps: list[float]) -> None:
    is_valid = len(eps) == 2 and min(eps) > 0
    require(is_valid, "optimizer.eps", eps, "must be 2 numbers greater than 0")


def _bitsandbytes(optimizer: str) -> Any:
    # Silences a warning that a 4-bit inference kernel, which no optimizer uses, is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return _import(optimizer, "bitsandbytes.optim", "bitsandbytes>=0.50")


def _make_contiguous(model: Module) -> None:
    """Makes weights contiguous, as bitsandbytes silently does in its first step.

    That includes channels-last weights. A resumed run would otherwise take a step in a different
    memory format from an uninterrupted one.
    """
    for p in _trainable(model):
        p.data = p.data.contiguous()


def _import(optimizer: str, module: str, requirement: str) -> Any:
    """Imports a module of an optimizer's package; failing that, names the install command."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise UnavailableError(
            f"optimizer={optimizer}: its package is not installed; pip install '{requirement}'"
        ) from error
