"""Tasks that continue a prompt: encoding, batching, the loss on the response, and the harness."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments import models
from experiments.config import RunConfig
from experiments.data import text
from experiments.errors import require
from experiments.evaluation import Harness
from experiments.hardware import Hardware
from experiments.models import activations, pretrained
from experiments.progress_bars import evaluation_bar, tokenizing
from experiments.tasks import Task

_IGNORED = -100
_MAX_LOGITS_AT_ONCE = 1 << 25  # when they are recomputed: 128 MiB in float32


@dataclass(frozen=True)
class Example:
    tokens: list[int]  # prompt, response, end of text
    num_prompt_tokens: int


@dataclass(frozen=True)
class Batch:
    """Right-padded examples. Causal attention never looks at the padding, so no mask is needed."""

    input_ids: Tensor  # int64 (examples, length)
    positions: Tensor  # int64 (kept,): where a next token is predicted
    targets: Tensor  # int64 (examples, kept): that token, or -100 outside the response
    num_targets: int
    num_units: int  # tokens

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.input_ids.to(device),
            self.positions.to(device),
            self.targets.to(device),
            self.num_targets,
            self.num_units,
        )


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> Example:
    """Tokens of prompt and response, split where lm-evaluation-harness splits them.

    The response's tokens are those of the whole text beyond the length of the prompt alone, so the
    model is trained to continue exactly the tokens that the harness will give it.
    """
    prompt_tokens = tokenizer.encode(prompt)
    tokens = tokenizer.encode(prompt + response)
    if tokens[-1] != tokenizer.eos_token_id:
        tokens.append(tokenizer.eos_token_id)
    return Example(tokens, len(prompt_tokens))


def collate(examples: Sequence[Example], pad_token: int) -> Batch:
    """Pads the examples to the longest and keeps the positions from the first response onward."""
    length = max(len(example.tokens) for example in examples)
    first = min(example.num_prompt_tokens for example in examples) - 1
    input_ids = torch.full((len(examples), length), pad_token)
    targets = torch.full((len(examples), length), _IGNORED)
    for row, example in enumerate(examples):
        num_tokens = len(example.tokens)
        input_ids[row, :num_tokens] = torch.tensor(example.tokens)
        start = example.num_prompt_tokens
        targets[row, start - 1 : num_tokens - 1] = input_ids[row, start:num_tokens]
    return Batch(
        input_ids,
        torch.arange(first, length - 1),
        targets[:, first : length - 1].contiguous(),
        num_targets=int((targets != _IGNORED).sum()),
        num_units=sum(len(example.tokens) for example in examples),
    )


def largest_batch(num_examples: int, length: int, device: torch.device) -> Batch:
    """A batch of full length whose loss is on every token: the most memory a batch can take."""
    input_ids = torch.zeros(num_examples, length, dtype=torch.int64, device=device)
    positions = torch.arange(length - 1, device=device)
    num_targets = num_examples * (length - 1)
    return Batch(input_ids, positions, input_ids[:, 1:], num_targets, num_examples * length)


def loss_sum(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy summed over the responses' tokens, a float32 scalar.

    Logits are computed only at the predicted positions. If the layers recompute their activations,
    so does the head, some positions at a time: the logits of a large batch would take more memory
    than a layer.
    """
    targets = batch.targets.flatten()
    hidden = None
    if activations.is_checkpointed(model):
        head = model.get_output_embeddings()
        num_at_once = max(1, _MAX_LOGITS_AT_ONCE // head.weight.shape[0])
        if len(targets) > num_at_once:
            hidden = _input_of_head(model, head, batch)
    if hidden is None:
        return _cross_entropy_sum(_logits(model, batch).flatten(0, 1), targets)
    parts = zip(hidden.flatten(0, 1).split(num_at_once), targets.split(num_at_once), strict=True)
    losses = [checkpoint(_loss_sum_of_part, head, *part, use_reentrant=False) for part in parts]
    return torch.stack(losses).sum()


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """At the predicted positions: (examples, positions, vocabulary)."""
    return model(input_ids=batch.input_ids, logits_to_keep=batch.positions, use_cache=False).logits


def _input_of_head(model: PreTrainedModel, head: torch.nn.Module, batch: Batch) -> Tensor | None:
    """The head's input, (examples, positions, width); None if only the model can compute logits.

    That is the case if the head's weight is sharded or the model changes the logits further.
    """
    if isinstance(head.weight, DTensor):
        return None
    inputs: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        inputs.append(hidden)
        return hidden

    head.forward = keep
    try:
        output = _logits(model, batch)
    finally:
        del head.forward
    return output if output is inputs[0] else None


def _loss_sum_of_part(head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return _cross_entropy_sum(head(hidden), targets)


def _cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=_IGNORED, reduction="sum")


class CausalLM(Task):
    """A data set of prompts and responses; each task defines both for a row."""

    model: PreTrainedModel
    uses_harness = True

    @staticmethod
    @abstractmethod
    def prompt(row: text.Row) -> str:
        """What the model is given."""

    @staticmethod
    @abstractmethod
    def response(row: text.Row) -> str:
        """The continuation that it learns."""

    def __init__(self, config: RunConfig, hardware: Hardware) -> None:
        self._config = config
        self._hardware = hardware
        data = text.load(config.dataset)
        self.data_source, self.data_digest = data.source, data.digest
        self.data_revision = data.revision
        remedy = "there is no test split: hold some rows out"
        require("test" in data.rows, "dataset.num_held_out", config.dataset.num_held_out, remedy)
        self._harness = Harness(config.evaluation)
        loaded = models.load_causal_lm(config.model, hardware.param_dtype)
        self._tokenizer = loaded.tokenizer
        self.model = loaded.model.to(hardware.device)
        self.model_source = loaded.source
        self.model_revision = loaded.revision
        self._harness.check(self.model, self._tokenizer)
        self._train = self._encode(data.rows["train"])
        self._test = self._encode(data.rows["test"])
        for kind, examples in (("training", self._train), ("held-out", self._test)):
            remedy = f"every {kind} example is longer; raise it"
            require(bool(examples), "task.max_length", config.task.max_length, remedy)
        self.num_examples = len(self._train)
        self.num_overlong_examples = len(data.rows["train"]) - len(self._train)

    def _encode(self, rows: Sequence[text.Row]) -> list[Example]:
        examples = [
            encode(self._tokenizer, self.prompt(row), self.response(row))
            for row in tokenizing(rows)
        ]
        return [e for e in examples if len(e.tokens) <= self._config.task.max_length]

    def micro_batches(self, indices: Sequence[int]) -> list[Batch]:
        """The training examples in batches for one forward pass each, similar lengths together."""
        examples = sorted((self._train[i] for i in indices), key=lambda e: len(e.tokens))
        return self._batches(examples, self._config.forward_batch_size)

    def _batches(self, examples: Sequence[Example], size: int) -> list[Batch]:
        pad_token = self._tokenizer.pad_token_id
        return [
            collate(examples[start : start + size], pad_token).to(self._hardware.device)
            for start in range(0, len(examples), size)
        ]

    @staticmethod
    def loss_sum(model: PreTrainedModel, batch: Batch) -> Tensor:
        return loss_sum(model, batch)

    def evaluate(self) -> dict[str, Any]:
        """Loss per token on held-out responses, and lm-evaluation-harness's metrics."""
        self.model.eval()
        with torch.no_grad(), self._hardware.autocast():
            loss = self._held_out_loss()
            metrics = self._harness.evaluate(self.model, self._tokenizer)
        self.model.train()
        return {"loss": loss, **metrics}

    def _held_out_loss(self) -> float:
        config = self._config.evaluation
        examples = self._test[: config.limit]
        loss, num_targets = 0.0, 0
        with evaluation_bar("held-out loss", len(examples), "example") as bar:
            for batch in self._batches(examples, config.batch_size):
                loss += float(self.loss_sum(self.model, batch))
                num_targets += batch.num_targets
                bar.update(len(batch.input_ids))
        return loss / num_targets

    def save(self, folder: Path) -> None:
        pretrained.save(self.model, self._tokenizer, folder)

    @staticmethod
    def plan_model(config: RunConfig, dtype: torch.dtype) -> PreTrainedModel:
        return models.meta_causal_lm(config.model, dtype)

    @staticmethod
    def plan_batch(config: RunConfig) -> Batch:
        size = config.forward_batch_size
        return largest_batch(size, config.task.max_length, torch.device("meta"))
