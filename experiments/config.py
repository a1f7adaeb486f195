"""The type of every config key, and the conversion of a composed Hydra config to dataclasses.

Hydra and OmegaConf end here: everything after `parse` sees a `RunConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import ExperimentError, reason, require, require_choice, require_positive
from experiments.optimizers import MicroAdamConfig, OptimizerConfig


@dataclass
class TaskConfig:
    name: str = MISSING
    max_length: int = 512  # tokens

    def __post_init__(self) -> None:
        require_positive("task", self, "max_length")


@dataclass
class ModelConfig:
    name: str = MISSING
    weights: str = MISSING  # pretrained | random
    path: str | None = None  # folder of a saved transformers model; preferred to hub and package
    hub_id: str | None = None
    revision: str | None = None  # commit, branch or tag on the hub; None: the newest
    package: str | None = None  # installed Python package that carries the weights
    tokenizer_package: str | None = None  # and the tokenizer, if that one has none
    architecture: dict[str, Any] = field(default_factory=dict)  # a transformers config
    dropout: float | None = None  # probability, for every kind in the model; None: the model's own

    def __post_init__(self) -> None:
        require_choice("model.weights", self.weights, "pretrained", "random")
        has_source = self.path or self.hub_id or self.package
        require(
            self.weights == "random" or bool(has_source),
            "model.weights",
            self.weights,
            f"{self.name} has no pretrained weights; use model.weights=random or model.path=FOLDER",
        )
        require(
            self.weights == "pretrained" or self.path is None,
            "model.path",
            self.path,
            "model.weights=random reads nothing from it; leave it out, or set "
            "model.weights=pretrained",
        )
        require(
            self.hub_id is None or self.package is None,
            "model.hub_id",
            self.hub_id,
            f"the weights would be those of model.package={self.package}; to take the hub's, set "
            "model.package=null too",
        )
        require(
            self.revision is None or self.is_from_hub,
            "model.revision",
            self.revision,
            "it is of the hub's weights, and these come from elsewhere; leave it out",
        )
        if self.dropout is not None:
            is_share = 0 <= self.dropout < 1
            require(is_share, "model.dropout", self.dropout, "must be from 0 to less than 1")

    @property
    def is_from_hub(self) -> bool:
        """Whether its weights are, or those in the hub's cache."""
        return self.weights == "pretrained" and self.path is None and self.package is None

    @property
    def title(self) -> str:
        """The model's name, or its folder's if one is given."""
        return self.name if self.path is None else Path(self.path).resolve().name


@dataclass
class DatasetConfig:
    name: str = MISSING
    path: str | None = None  # folder of this data set's files; takes precedence over all else
    root: str = "${oc.env:MICROADAM_DATA,data}"  # holds such a folder for each data set, by name
    # auto: the first of local (below root), hub and generated that has it | real: likewise, but
    # never generated | local | hub | generated
    source: str = "auto"
    hub_id: str | None = MISSING  # None: not on any hub
    hub_config: str | None = None
    # Commit, branch or tag on the hub; None: the main branch. A branch is kept as of first use.
    revision: str | None = None
    splits: list[str] = MISSING
    columns: dict[str, str] = MISSING  # the type of each: str | int | list | dict | image
    size: int | None = None  # rows of the hub's training split; None: not for training
    num_held_out: int | None = None  # last rows of the training split, used as a "test" split
    num_train: int | None = None  # use only the first of the remaining rows
    num_classes: int | None = None  # of labelled images

    def __post_init__(self) -> None:
        require_choice("dataset.source", self.source, "auto", "real", "local", "hub", "generated")
        require_positive("dataset", self, "num_held_out", "num_train", "num_classes")
        require(
            self.revision is None or self.source == "hub",
            "dataset.revision",
            self.revision,
            "it is of the hub's data; set dataset.source=hub too",
        )
        remedy = "there already is a test split: leave this out, or use dataset.num_train"
        is_needed = self.num_held_out is None or "test" not in self.splits
        require(is_needed, "dataset.num_held_out", self.num_held_out, remedy)
        for column, kind in self.columns.items():
            require_choice(f"dataset.columns.{column}", kind, "str", "int", "list", "dict", "image")

    def local_folder(self) -> Path | None:
        """The folder that was given, or else the one below ``root`` if it exists and may be used.

        If only real data will do, a folder below ``root`` that lacks a split is skipped: the hub
        has them all.

        Raises:
            ExperimentError: the folder that was given or asked for does not exist.
        """
        if self.path is not None:
            if Path(self.path).is_dir():
                return Path(self.path)
            raise ExperimentError(
                f"dataset.path={self.path}: there is no such folder; it must hold the splits "
                + " and ".join(self.splits)
            )
        folder = Path(self.root, self.name)
        is_usable = folder.is_dir() and not (self.source == "real" and self._lacking(folder))
        if self.source in ("auto", "real", "local") and is_usable:
            return folder
        if self.source != "local":
            return None
        raise ExperimentError(
            f"dataset.source=local: there is no folder {folder} with the splits "
            f"{' and '.join(self.splits)}; put it there, name its parent with dataset.root=FOLDER "
            "or MICROADAM_DATA, or give it with dataset.path=FOLDER"
        )

    def _lacking(self, folder: Path) -> list[str]:
        """Text files missing from the folder; image files have no fixed names to check."""
        files = [] if "image" in self.columns.values() else [f"{s}.jsonl" for s in self.splits]
        return [file for file in files if not (folder / file).is_file()]

    def why_not_local(self) -> str:
        """Why `local_folder` is not the one below ``root``."""
        folder = Path(self.root, self.name)
        if not folder.is_dir():
            return f"there is no folder {folder}"
        return f"{folder} has no {' and no '.join(self._lacking(folder))}"


@dataclass
class ImageConfig:
    """How images are cropped and resized, and how much their labels are smoothed."""

    first_resolution: int = MISSING  # pixels per side in training
    last_resolution: int = MISSING
    last_resolution_from: float = 0.8  # the share of steps after which it applies
    eval_resolution: int = MISSING
    eval_crop: float = 0.875  # the centre square's side, relative to the image's shorter side
    min_crop_area: float = 0.08  # of a random crop, relative to the image's area
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        require_positive("images", self, "first_resolution", "last_resolution", "eval_resolution")
        for name in ("last_resolution_from", "eval_crop", "min_crop_area", "label_smoothing"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"images.{name}", value, "must be from 0 to 1")
        require_positive("images", self, "eval_crop", "min_crop_area")


@dataclass
class HardwareConfig:
    name: str = MISSING
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # auto | bf16 (parameters too) | bf16_amp (autocast of fp32) | fp32
    micro_batch_size: int = MISSING  # examples at a time, see RunConfig.forward_batch_size
    activation_checkpointing: bool = False  # recompute a layer's activations when needed
    activation_offloading: bool = False  # and keep the layer's input in host memory
    parallel: str = "ddp"  # several processes: ddp (each has everything) | fsdp2 (each has a shard)
    memory_gib: float | None = None  # the card's, for the plan

    def __post_init__(self) -> None:
        require_choice("hardware.device", self.device, "auto", "cpu", "cuda")
        require_choice("hardware.precision", self.precision, "auto", "bf16", "bf16_amp", "fp32")
        require_choice("hardware.parallel", self.parallel, "ddp", "fsdp2")
        require_positive("hardware", self, "micro_batch_size", "memory_gib")
        require(
            self.activation_checkpointing or not self.activation_offloading,
            "hardware.activation_offloading",
            self.activation_offloading,
            "it moves the layers' inputs that checkpointing keeps; set "
            "hardware.activation_checkpointing=true too, or set this to false",
        )


@dataclass
class TrainingConfig:
    epochs: float = 1.0
    max_steps: int | None = None  # replaces epochs, unless run.py is given only epochs
    global_batch_size: int = MISSING  # examples per step
    warmup_steps: int = 0
    schedule: str = "linear"  # after the warm-up: linear | cosine (both to 0) | constant
    max_grad_norm: float | None = 1.0  # global norm; None: no clipping
    max_param_grad_norm: float | None = None  # of each parameter's gradient by itself
    # Step in the backward pass and free each gradient at once. None: if the optimizer can.
    gradient_release: bool | None = False
    checkpoint_every_steps: int = 25
    save_model: bool = True  # keep the fine-tuned model in the run folder

    def __post_init__(self) -> None:
        require_choice("training.schedule", self.schedule, "linear", "cosine", "constant")
        require_positive(
            "training",
            self,
            "epochs",
            "max_steps",
            "global_batch_size",
            "max_grad_norm",
            "max_param_grad_norm",
            "checkpoint_every_steps",
        )
        require(self.warmup_steps >= 0, "training.warmup_steps", self.warmup_steps, "must be >= 0")


@dataclass
class HarnessTaskConfig:
    """A task of lm-evaluation-harness."""

    num_fewshot: int = MISSING
    dataset: DatasetConfig = MISSING
    overrides: dict[str, Any] = field(default_factory=dict)  # for the harness's own task file

    def __post_init__(self) -> None:
        require(self.num_fewshot >= 0, "num_fewshot", self.num_fewshot, "must be >= 0")


@dataclass
class EvaluationConfig:
    protocol: str | None = None  # the evaluation group's choice
    harness: dict[str, HarnessTaskConfig] = field(default_factory=dict)
    limit: int | None = None  # examples per task; None: all
    batch_size: int = 32
    max_new_tokens: int = 256
    before_training: bool = True
    every_steps: int | None = None  # during training too; None: only before and after

    def __post_init__(self) -> None:
        require_positive("evaluation", self, "limit", "batch_size", "max_new_tokens", "every_steps")


@dataclass
class LoggerConfig:
    name: str = "none"  # none | wandb
    project: str = "microadam"
    mode: str = "online"  # online | offline

    def __post_init__(self) -> None:
        require_choice("logger.name", self.name, "none", "wandb")
        require_choice("logger.mode", self.mode, "online", "offline")


# Optimizers whose state torch or MicroAdam handles correctly on shards. The others quantize or
# factorize whole parameters.
_SHARDABLE = ("microadam", "adamw", "adam", "sgd")


@dataclass
class RunConfig:
    task: TaskConfig = MISSING
    scale: str = MISSING
    model: ModelConfig = MISSING
    dataset: DatasetConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    hardware: HardwareConfig = MISSING
    training: TrainingConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    logger: LoggerConfig = MISSING
    images: ImageConfig | None = None  # for image tasks
    learning_rates: dict[str, float] = field(default_factory=dict)  # the preset's, by optimizer
    seed: int = 42
    results_dir: str = "results"
    dry_run: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        # The range that all generators accept, NumPy's included.
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be from 0 to 4294967295")
        batch, micro = self.training.global_batch_size, self.hardware.micro_batch_size
        require(
            batch % min(batch, micro) == 0,
            "training.global_batch_size",
            batch,
            f"must be a multiple of hardware.micro_batch_size={micro}",
        )
        if self.training.gradient_release is None:
            self.training.gradient_release = isinstance(self.optimizer, MicroAdamConfig)
        if self.training.gradient_release:
            self._require_releasable()
        if self.hardware.parallel == "fsdp2":
            self._require_shardable()

    def _require_releasable(self) -> None:
        """Gradient release has one backward pass per step and never holds all gradients at once."""
        require(
            isinstance(self.optimizer, MicroAdamConfig),
            "optimizer",
            self.optimizer.name,
            "only microadam can step in the backward pass; set training.gradient_release=false",
        )
        require(
            self.training.max_grad_norm is None,
            "training.max_grad_norm",
            self.training.max_grad_norm,
            "the global norm needs all gradients at once, which training.gradient_release=true "
            "frees one by one; set it to null, or use training.max_param_grad_norm instead",
        )
        require(
            self.hardware.activation_checkpointing
            or self.hardware.micro_batch_size >= self.training.global_batch_size,
            "hardware.micro_batch_size",
            self.hardware.micro_batch_size,
            "with training.gradient_release=true the backward pass is the step, so it holds all "
            f"training.global_batch_size={self.training.global_batch_size} examples; raise it to "
            "that, or set hardware.activation_checkpointing=true, which splits the batch into "
            "micro-batches layer by layer",
        )

    def _require_shardable(self) -> None:
        """FSDP2 gives each process a shard of every parameter, and of its gradient and state."""
        require(
            not self.training.gradient_release,
            "training.gradient_release",
            self.training.gradient_release,
            "it applies a gradient before the other processes' are added; set it to false, or use "
            "one process and hardware.parallel=ddp",
        )
        require(
            self.task.name != "imagenet",
            "hardware.parallel",
            "fsdp2",
            "ResNet weights are stored channels-last, which it cannot shard; use ddp",
        )
        require_choice("with hardware.parallel=fsdp2, optimizer", self.optimizer.name, *_SHARDABLE)

    @property
    def forward_batch_size(self) -> int:
        """Examples in one forward pass: a micro-batch, or the whole batch under gradient release.

        Under gradient release the layers split the batch, see `activations.enable_checkpointing`.
        """
        whole = self.training.global_batch_size
        is_released = self.training.gradient_release
        return whole if is_released else min(whole, self.hardware.micro_batch_size)


def parse(config: DictConfig) -> RunConfig:
    """The composed config as dataclasses, with every value validated.

    Raises:
        ExperimentError: a value is missing or out of range.
    """
    try:
        run = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ExperimentError(f"config: {reason(error)}") from error
    if not isinstance(run, RunConfig):
        raise TypeError(f"expected a RunConfig, got {type(run).__name__}")
    for key in _unknown_keys(run):
        raise ExperimentError(f"{key}: there is no such key; run.py --cfg job lists the valid ones")
    return run


def _unknown_keys(section: object, prefix: str = "") -> Iterator[str]:
    """Keys that were added with ``+``: OmegaConf accepts them, but nothing reads them."""
    known = {field.name for field in dataclasses.fields(section)}  # type: ignore[arg-type]
    for name, value in vars(section).items():
        if name not in known:
            yield f"{prefix}{name}"
        elif dataclasses.is_dataclass(value):
            yield from _unknown_keys(value, f"{prefix}{name}.")
