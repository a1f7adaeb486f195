"""The beginning of a real fine-tuning run, batch by batch, for studies of its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from experiments import models
from experiments.config import DatasetConfig, ModelConfig
from experiments.data import text
from experiments.errors import ExperimentError
from experiments.tasks import classification, mnli

_CONFIGS = Path(__file__).parents[2] / "configs"

Batch = dict[str, Tensor]  # the model's arguments


@dataclass(frozen=True)
class FineTuning:
    model: nn.Module  # in training mode
    batches: list[Batch]
    sources: dict[str, str]  # where data and weights came from

    def gradients(self, description: str) -> Iterator[float]:
        """Yields the mean loss of each batch while its gradient is in place."""
        with tqdm(self.batches, desc=description, unit="step", dynamic_ncols=True) as bar:
            for batch in bar:
                loss = self.model(**batch).loss
                loss.backward()
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                yield loss.item()
                self.model.zero_grad()


def load(
    dataset: str, model: str, data: Path, num_batches: int, batch_size: int, max_length: int
) -> FineTuning:
    """A model on rows in random order; everything random is drawn from torch's generator.

    Args:
        dataset: "mnli", or "gsm8k" for a language model.
        model: a file in configs/model/.
        data: folder with one folder per data set.
        max_length: tokens; longer rows are cut.

    Raises:
        ExperimentError: there is no such data set or model, or its weights are not installed.
    """
    models.quieten_transformers()
    rows = training_rows(dataset, data)
    order = torch.randperm(len(rows.rows["train"])).tolist()
    drawn = [
        [rows.rows["train"][order[i % len(order)]] for i in range(start, start + batch_size)]
        for start in range(0, num_batches * batch_size, batch_size)
    ]
    load_model, encode = _KINDS[dataset]
    loaded = load_model(_config("model", model, ModelConfig))
    batches = [encode(loaded, batch, max_length) for batch in drawn]
    return FineTuning(loaded.model.train(), batches, {"data": rows.source, "model": loaded.source})


def training_rows(dataset: str, data: Path) -> text.TextData:
    """The split "train" of a data set, from its folder in ``data``, the hub, or a generator."""
    return text.load(_config("dataset", dataset, DatasetConfig, root=str(data)), ["train"])


def _config(kind: str, name: str, schema: Any, **changes: Any) -> Any:
    path = _CONFIGS / kind / f"{name}.yaml"
    if not path.exists() or (kind == "dataset" and name not in _KINDS):
        known = _KINDS if kind == "dataset" else {p.stem for p in path.parent.glob("*.yaml")}
        choices = ", ".join(sorted(known))
        raise ExperimentError(f"{kind}={name}: there is no such {kind}; choose one of {choices}")
    merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path), changes)
    return OmegaConf.to_object(merged)


def _classifier_batch(
    loaded: models.LoadedModel, rows: list[dict[str, Any]], max_length: int
) -> Batch:
    examples = [
        classification.encode(
            loaded.tokenizer, row["premise"], row["hypothesis"], row["label"], max_length
        )
        for row in rows
    ]
    batch = classification.collate(examples, loaded.model)
    return {**batch.inputs, "labels": batch.labels}


def _language_model_batch(
    loaded: models.LoadedModel, rows: list[dict[str, Any]], max_length: int
) -> Batch:
    encoded = loaded.tokenizer(
        [f"{row['question']}\n{row['answer']}" for row in rows],
        truncation=True,
        max_length=max_length,
        padding=True,
        return_token_type_ids=False,
        return_tensors="pt",
    )
    is_padding = encoded["attention_mask"] == 0
    return {**encoded, "labels": encoded["input_ids"].masked_fill(is_padding, -100)}


_KINDS: dict[str, tuple[Any, Any]] = {
    "mnli": (lambda config: models.load_classifier(config, mnli.LABELS), _classifier_batch),
    "gsm8k": (models.load_causal_lm, _language_model_batch),
}
