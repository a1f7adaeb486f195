"""Models and tokenizers: pretrained from a folder, a package or the hub, or random weights.

ResNets, which have no tokenizer, are built in `resnets`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from experiments import hub
from experiments.config import ModelConfig
from experiments.errors import ExperimentError, reason, require
from experiments.models import pretrained

# What a task needs a model to do, and the model types that can. A type that also fills in masked
# tokens reads text in both directions, and so would see the token that it is to predict.
_ABILITIES: dict[Any, tuple[str, set[str]]] = {
    AutoModelForCausalLM: (
        "continues texts, such as smollm2_135m or tiny_llama",
        set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    ),
    AutoModelForSequenceClassification: (
        "classifies texts, such as minilm_l6 or tiny_bert",
        set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ),
}


@dataclass(frozen=True)
class LoadedModel:
    model: PreTrainedModel  # on the CPU
    tokenizer: PreTrainedTokenizerBase
    source: str  # random, or where the weights came from
    revision: str | None  # the hub's commit, if known


def quieten_transformers() -> None:
    """Silences reports and bars of loading weights; downloads, which can be long, keep bars."""
    shows_downloads = not are_progress_bars_disabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if shows_downloads:
        enable_progress_bars()


def load_causal_lm(config: ModelConfig, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The model with its tokenizer.

    Random weights are drawn from torch's generator, which the caller seeds; they come with a
    byte tokenizer, so nothing needs to be downloaded.

    Args:
        dtype: of the parameters. Buffers stay float32, as `from_pretrained` keeps them: in
            bfloat16 the frequencies of rotary embeddings would turn distant tokens too far.

    Raises:
        ExperimentError: the weights are not available; the message says how to get them.
    """
    return _load(config, AutoModelForCausalLM, dtype)


def load_classifier(
    config: ModelConfig, labels: Sequence[str], dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Like `load_causal_lm`, with a new head that gives each text a score for every label.

    The head is drawn from torch's generator too, unless the weights are those of a classifier.
    """
    return _load(config, AutoModelForSequenceClassification, dtype, **_label_settings(labels))


def meta_causal_lm(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Only the architecture, its parameters without memory, for planning."""
    return _on_meta(config, AutoModelForCausalLM, dtype)


def meta_classifier(
    config: ModelConfig, labels: Sequence[str], dtype: torch.dtype
) -> PreTrainedModel:
    """Like `meta_causal_lm`, with a head for these labels."""
    settings = {"pad_token_id": 0, **_label_settings(labels)}  # a causal model needs one, whichever
    return _on_meta(config, AutoModelForSequenceClassification, dtype, **settings)


def _label_settings(labels: Sequence[str]) -> dict[str, Any]:
    """The label settings of a transformers config, which imply the number of labels."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def _load(
    config: ModelConfig, model_class: Any, dtype: torch.dtype, **settings: Any
) -> LoadedModel:
    """``settings`` go into the transformers config, whatever the source of the weights."""
    if config.weights == "random":
        _require_ability(config, config.architecture.get("model_type"), model_class)
        tokenizer = byte_tokenizer(config.architecture["vocab_size"])
        # Set before the model is made: its embeddings leave out the padding row.
        settings["pad_token_id"] = tokenizer.pad_token_id
        # Drawn in float32, so that they are the same in every precision up to rounding.
        model = model_class.from_config(_architecture(config, settings), dtype=torch.float32)
        for p in model.parameters():
            p.data = p.data.to(dtype)
        return LoadedModel(model, tokenizer, "random", None)
    location, source = pretrained.locate(config)
    with _loading(config, location):
        own = _saved_config(config, location, model_class, settings)
        pinned = _pinned(config)
        model = model_class.from_pretrained(location, config=own, dtype=dtype, **pinned)
        tokenizer = AutoTokenizer.from_pretrained(location, **pinned)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Tells a causal classifier where a text ends.
    model.config.pad_token_id = tokenizer.pad_token_id
    commit = hub.model_revision(location, config.revision) if config.is_from_hub else None
    return LoadedModel(model, tokenizer, source, commit)


def _pinned(config: ModelConfig) -> dict[str, str]:
    """The argument of `from_pretrained` that asks for the config's revision, if it has one."""
    return {} if config.revision is None else {"revision": config.revision}


@contextmanager
def _loading(config: ModelConfig, location: str) -> Iterator[None]:
    """Turns transformers' errors about missing or broken files into a readable message."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: an unknown model type or tokenizer
        access = "go online with access to it"
        if isinstance(error.__cause__, GatedRepoError):
            access = (
                f"accept its terms at https://huggingface.co/{location}, then run hf auth login "
                "or set HF_TOKEN"
            )
        raise ExperimentError(
            f"model {config.title} could not be loaded from {location} "
            f"({reason(error)}): {access}, give a folder with model.path=FOLDER, or use "
            "model.weights=random"
        ) from error


def _saved_config(
    config: ModelConfig, location: str, model_class: Any, settings: dict[str, Any]
) -> transformers.PretrainedConfig:
    """The transformers config saved with the weights."""
    own = transformers.AutoConfig.from_pretrained(location, **_pinned(config), **settings)
    _require_ability(config, own.model_type, model_class)
    return _with_dropout(own, config.dropout)


def _require_ability(config: ModelConfig, model_type: str | None, model_class: Any) -> None:
    ability, model_types = _ABILITIES[model_class]
    kind = "it is not a language model" if model_type is None else f"its type is {model_type}"
    require(
        model_type in model_types,
        "model" if config.path is None else "model.path",
        config.path or config.name,
        f"{kind}; this task needs a model that {ability}",
    )


def _on_meta(
    config: ModelConfig, model_class: Any, dtype: torch.dtype, **settings: Any
) -> PreTrainedModel:
    if config.path is None:
        _require_ability(config, config.architecture.get("model_type"), model_class)
        own = _architecture(config, settings)
    else:
        location, _ = pretrained.locate(config)
        with _loading(config, location):
            own = _saved_config(config, location, model_class, settings)
    AttentionInterface.register("shapes_only", _flash_attention_shapes)
    with torch.device("meta"):
        return model_class.from_config(own, dtype=dtype, attn_implementation="shapes_only")


def _flash_attention_shapes(
    module: torch.nn.Module,
    query: torch.Tensor,  # (batch, heads, length, head_dim)
    key: torch.Tensor,  # (batch, key_value_heads, length, head_dim)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Fused attention on the meta device, where torch would fall back to storing the scores."""
    num_groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(num_groups, dim=1) for t in (key, value))
    attended = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]
    return attended.transpose(1, 2), None


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are the 256 bytes and <s>, </s>, <pad>.

    A single text becomes its bytes; a pair becomes ``<s> first </s> second </s>``.

    Raises:
        ExperimentError: the model's vocabulary is smaller than these 259 tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<pad>"]
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    if vocab_size < len(vocabulary):
        raise ExperimentError(
            f"model.architecture.vocab_size={vocab_size}: random weights come with a byte "
            f"tokenizer that needs at least {len(vocabulary)}"
        )
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A",
        pair="<s>:0 $A:0 </s>:0 $B:1 </s>:1",
        special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _architecture(config: ModelConfig, settings: dict[str, Any]) -> transformers.PretrainedConfig:
    own = transformers.AutoConfig.for_model(**{**config.architecture, **settings})
    return _with_dropout(own, config.dropout)


def _with_dropout(
    config: transformers.PretrainedConfig, dropout: float | None
) -> transformers.PretrainedConfig:
    if dropout is not None:
        names = [name for name, value in vars(config).items() if _is_dropout(name, value)]
        remedy = f"a model of type {config.model_type} has none; leave it out"
        require(bool(names), "model.dropout", dropout, remedy)
        for name in names:
            setattr(config, name, dropout)
    return config


def _is_dropout(name: str, value: object) -> bool:
    """Whether this entry of a transformers config is a dropout probability, as GPT-2's attn_pdrop.

    Without a value it defers to another entry; ESM's ``token_dropout`` is true or false.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and ("dropout" in name or name.endswith("_pdrop"))
