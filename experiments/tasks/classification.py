"""Shared by classification tasks: the accuracy and, for pairs of texts, encoding and batching."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    tokens: list[int]  # both texts with the model's separators
    segments: list[int]  # per token, 0 or 1: from the first or the second text
    label: int
    is_cut: bool = False  # to the maximum length


@dataclass(frozen=True)
class Batch:
    """Right-padded examples."""

    inputs: dict[str, Tensor]  # the model's arguments, int64 (examples, length)
    labels: Tensor  # int64 (examples,)
    num_targets: int  # examples
    num_units: int  # tokens

    def to(self, device: torch.device) -> Batch:
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.labels.to(device), self.num_targets, self.num_units)


def encode(
    tokenizer: PreTrainedTokenizerBase, first: str, second: str, label: int, max_length: int
) -> Example:
    """The pair as the model's tokenizer joins it, the longer text cut until both fit."""
    returned = {"return_token_type_ids": True, "return_attention_mask": False}
    encoded = tokenizer(first, second, verbose=False, **returned)
    is_cut = len(encoded["input_ids"]) > max_length
    if is_cut:
        encoded = tokenizer(
            first, second, truncation="longest_first", max_length=max_length, **returned
        )
    return Example(encoded["input_ids"], encoded["token_type_ids"], label, is_cut)


def collate(examples: Sequence[Example], model: PreTrainedModel) -> Batch:
    """Pads the examples to the longest; the attention mask hides the padding.

    Segments are left out if the model tells texts apart by the separator alone.
    """
    length = max(len(example.tokens) for example in examples)
    input_ids = torch.full((len(examples), length), model.config.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    segments = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        num_tokens = len(example.tokens)
        input_ids[row, :num_tokens] = torch.tensor(example.tokens)
        attention_mask[row, :num_tokens] = 1
        segments[row, :num_tokens] = torch.tensor(example.segments)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if _has_segments(model):
        inputs["token_type_ids"] = segments
    labels = torch.tensor([example.label for example in examples])
    return Batch(inputs, labels, len(examples), sum(len(example.tokens) for example in examples))


def _has_segments(model: PreTrainedModel) -> bool:
    return getattr(model.config, "type_vocab_size", 1) > 1


def largest_batch(num_examples: int, length: int, device: torch.device) -> Batch:
    """A batch of full length: the most memory a batch can take."""
    input_ids = torch.zeros(num_examples, length, dtype=torch.int64, device=device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return Batch(inputs, input_ids[:, 0], num_examples, num_examples * length)


def logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """A score for each label, float32 (examples, labels)."""
    return model(**batch.inputs).logits.float()


def loss_sum(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy summed over the examples, a float32 scalar."""
    return F.cross_entropy(logits, batch.labels, reduction="sum")


def accuracy(name: str, num_correct: int, num_samples: int) -> dict[str, float | int]:
    """The share correct, its standard error (a single sample has none) and the count."""
    share = num_correct / num_samples
    metrics: dict[str, float | int] = {name: share}
    if num_samples > 1:
        stderr = math.sqrt(share * (1 - share) / (num_samples - 1))
        metrics[f"{name}_stderr"] = stderr
    metrics[f"{name}_num_samples"] = num_samples
    return metrics
