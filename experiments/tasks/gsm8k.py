"""GSM8K: grade-school maths word problems, answered with a worked solution (arXiv:2110.14168)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from experiments import atomic, evaluation, models
from experiments.config import RunConfig
from experiments.data import text
from experiments.errors import ExperimentError
from experiments.hardware import Hardware
from experiments.tasks import Task, causal_lm
from experiments.tasks.causal_lm import Batch, Example


def prompt_of(row: text.Row) -> str:
    """The prompt of lm-evaluation-harness's task ``gsm8k``."""
    return f"Question: {row['question']}\nAnswer:"


class GSM8K(Task):
    """Data, model, loss and metrics of one GSM8K run."""

    model: PreTrainedModel

    def __init__(self, config: RunConfig, hardware: Hardware) -> None:
        self._config = config
        self._hardware = hardware
        self._data = text.load(config.dataset)
        self.data_source = self._data.source
        loaded = models.load_causal_lm(config.model)
        self._tokenizer = loaded.tokenizer
        self.model = loaded.model.to(hardware.device, hardware.param_dtype)
        self.model_source = loaded.source
        self._train = self._encode(self._data.rows["train"])
        self._test = self._encode(self._data.rows["test"])
        if not self._train:
            raise ExperimentError(
                f"task.max_length={config.task.max_length}: every training example is longer; "
                "raise it"
            )
        self.num_examples = len(self._train)
        self.num_overlong_examples = len(self._data.rows["train"]) - len(self._train)

    def _encode(self, rows: Sequence[text.Row]) -> list[Example]:
        examples = [
            causal_lm.encode(self._tokenizer, prompt_of(row), f" {row['answer']}") for row in rows
        ]
        return [e for e in examples if len(e.tokens) <= self._config.task.max_length]

    def micro_batches(self, indices: Sequence[int]) -> list[Batch]:
        """The training examples in batches for one forward pass each, similar lengths together."""
        examples = sorted((self._train[i] for i in indices), key=lambda e: len(e.tokens))
        return self._batches(examples, self._config.hardware.micro_batch_size)

    def _batches(self, examples: Sequence[Example], size: int) -> list[Batch]:
        pad_token = self._tokenizer.pad_token_id
        return [
            causal_lm.collate(examples[start : start + size], pad_token).to(self._hardware.device)
            for start in range(0, len(examples), size)
        ]

    @staticmethod
    def loss_sum(model: PreTrainedModel, batch: Batch) -> Tensor:
        return causal_lm.loss_sum(model, batch)

    def evaluate(self) -> dict[str, Any]:
        """Loss a token on held-out answers, and exact match by lm-evaluation-harness."""
        config = self._config.evaluation
        self.model.eval()
        with torch.no_grad(), self._hardware.autocast():
            held_out = self._batches(self._test[: config.limit], config.batch_size)
            loss = sum(float(self.loss_sum(self.model, batch)) for batch in held_out)
            num_targets = sum(batch.num_targets for batch in held_out)
            metrics = evaluation.run_harness(
                self.model,
                self._tokenizer,
                "gsm8k/gsm8k.yaml",
                self._data.files,
                len(self._data.rows["test"]),
                config,
                self._config.seed,
            )
        self.model.train()
        return {"loss": loss / num_targets, **metrics}

    def save(self, folder: Path) -> None:
        with atomic.new_folder(folder) as partial:
            self.model.save_pretrained(partial)
            self._tokenizer.save_pretrained(partial)

    @staticmethod
    def plan_model(config: RunConfig, dtype: torch.dtype) -> PreTrainedModel:
        return models.meta_causal_lm(config.model, dtype)

    @staticmethod
    def plan_batch(config: RunConfig) -> Batch:
        size = min(config.hardware.micro_batch_size, config.training.global_batch_size)
        return causal_lm.largest_batch(size, config.task.max_length, torch.device("meta"))
