"""MNLI: does a premise entail, contradict or leave open a hypothesis? (arXiv:1704.05426)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from experiments import models
from experiments.config import RunConfig
from experiments.data import text
from experiments.errors import ExperimentError
from experiments.hardware import Hardware
from experiments.models import pretrained
from experiments.progress_bars import evaluation_bar, tokenizing
from experiments.tasks import Task, classification
from experiments.tasks.classification import Batch, Example

LABELS = ("entailment", "neutral", "contradiction")


def _num_cut(examples: Sequence[Example]) -> int:
    return sum(example.is_cut for example in examples)


class MNLI(Task):
    """Data, model, loss and metrics of one MNLI run."""

    model: PreTrainedModel
    columns = ("premise", "hypothesis", "label")
    cuts_overlong_examples = True  # as is usual for this task

    def __init__(self, config: RunConfig, hardware: Hardware) -> None:
        self._config = config
        self._hardware = hardware
        data = text.load(config.dataset)
        self.data_source, self.data_digest = data.source, data.digest
        self.data_revision = data.revision
        loaded = models.load_classifier(config.model, LABELS, hardware.param_dtype)
        self._tokenizer = loaded.tokenizer
        self.model = loaded.model.to(hardware.device)
        self.model_source = loaded.source
        self.model_revision = loaded.revision
        self._train = self._encode("train", data.rows["train"])
        self.num_examples = len(self._train)
        self.num_overlong_examples = _num_cut(self._train)
        self._held_out = {
            split.removeprefix("validation_"): self._encode(split, rows[: config.evaluation.limit])
            for split, rows in data.rows.items()
            if split != "train"
        }

    def _encode(self, split: str, rows: Sequence[text.Row]) -> list[Example]:
        for number, row in enumerate(rows, start=1):
            if row["label"] not in range(len(LABELS)):
                raise ExperimentError(
                    f"{split}.jsonl, row {number}: label={row['label']}: must be "
                    + ", ".join(f"{index} ({label})" for index, label in enumerate(LABELS))
                )
        return [
            classification.encode(
                self._tokenizer,
                row["premise"],
                row["hypothesis"],
                row["label"],
                self._config.task.max_length,
            )
            for row in tokenizing(rows)
        ]

    def micro_batches(self, indices: Sequence[int]) -> list[Batch]:
        """The training examples in batches for one forward pass each, similar lengths together."""
        examples = [self._train[i] for i in indices]
        return list(self._batches(examples, self._config.forward_batch_size))

    def _batches(self, examples: Sequence[Example], size: int) -> Iterator[Batch]:
        by_length = sorted(examples, key=lambda e: len(e.tokens))
        for start in range(0, len(by_length), size):
            batch = classification.collate(by_length[start : start + size], self.model)
            yield batch.to(self._hardware.device)

    @staticmethod
    def loss_sum(model: PreTrainedModel, batch: Batch) -> Tensor:
        return classification.loss_sum(classification.logits(model, batch), batch)

    def evaluate(self) -> dict[str, Any]:
        """Accuracy on each held-out split, and how many of its pairs were cut.

        ``loss`` is the mean per example on the first split.
        """
        self.model.eval()
        metrics: dict[str, Any] = {}
        for name, examples in self._held_out.items():
            loss, num_correct = self._evaluate_split(name, examples)
            metrics.setdefault("loss", loss)
            metrics |= classification.accuracy(f"accuracy_{name}", num_correct, len(examples))
            metrics[f"accuracy_{name}_num_cut"] = _num_cut(examples)
        self.model.train()
        return metrics

    @torch.no_grad()
    def _evaluate_split(self, name: str, examples: Sequence[Example]) -> tuple[float, int]:
        """Mean loss, and how many examples are classified correctly."""
        loss, num_correct = 0.0, 0
        with evaluation_bar(f"evaluate {name}", len(examples), "pair") as bar:
            for batch in self._batches(examples, self._config.evaluation.batch_size):
                with self._hardware.autocast():
                    logits = classification.logits(self.model, batch)
                loss += float(classification.loss_sum(logits, batch))
                num_correct += int((logits.argmax(dim=1) == batch.labels).sum())
                bar.update(len(batch.labels))
        return loss / len(examples), num_correct

    def save(self, folder: Path) -> None:
        pretrained.save(self.model, self._tokenizer, folder)

    @staticmethod
    def plan_model(config: RunConfig, dtype: torch.dtype) -> PreTrainedModel:
        return models.meta_classifier(config.model, LABELS, dtype)

    @staticmethod
    def plan_batch(config: RunConfig) -> Batch:
        size = config.forward_batch_size
        return classification.largest_batch(size, config.task.max_length, torch.device("meta"))
