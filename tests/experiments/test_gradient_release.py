"""Gradient release in whole runs, and what makes large batches fit it: parts, host, logits."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from experiments import models, planning, training
from experiments.config import RunConfig
from experiments.errors import ExperimentError
from experiments.models import activations
from experiments.planning import LiveBytes
from experiments.runner import execute
from experiments.runs.folder import RunFolder
from experiments.tasks import causal_lm, classification, mnli
from experiments.tasks.causal_lm import Batch
from microadam import MicroAdam, enable_gradient_release
from tests.experiments.helpers import Compose
from tests.experiments.stopping import interrupt_at

SHORT = (
    "scale=smoke",
    "hardware=cpu",
    "hardware.micro_batch_size=8",
    "training.max_grad_norm=null",
    "training.max_steps=4",
    "training.checkpoint_every_steps=2",
    "evaluation.before_training=false",
    "evaluation.limit=2",
    "evaluation.max_new_tokens=4",
)
RELEASED = "training.gradient_release=true"
CHECKPOINTED = "hardware.activation_checkpointing=true"
OFFLOADED = "hardware.activation_offloading=true"


def _logged(config: RunConfig, *names: str) -> list[list[float]]:
    lines = [m for m in RunFolder(config).metrics() if "train/loss" in m]
    return [[m[name] for name in names] for m in lines]


def _record(config: RunConfig) -> dict[str, Any]:
    record = RunFolder(config).finished_record()
    assert record is not None
    return record


def _assert_same_runs(ours: RunConfig, theirs: RunConfig) -> None:
    assert _logged(ours, "train/loss", "train/lr") == _logged(theirs, "train/loss", "train/lr")
    norms = [[norm for (norm,) in _logged(config, "train/grad_norm")] for config in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)  # of bfloat16 numbers
    assert _record(ours)["metrics"]["eval/loss"] == _record(theirs)["metrics"]["eval/loss"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("hardware.precision=fp32",),
        ("hardware.precision=bf16", "training.max_param_grad_norm=0.01", CHECKPOINTED),
    ],
    ids=["float32", "bfloat16-clipped-checkpointed"],
)
def test_a_run_with_gradient_release_is_the_plain_run(
    composed: Compose, overrides: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = composed(*SHORT, *overrides)
    released = composed(*SHORT, *overrides, RELEASED)
    execute(plain)
    capsys.readouterr()
    execute(released)
    assert "gradients released" in capsys.readouterr().out
    _assert_same_runs(released, plain)
    record = _record(released)
    assert record["config"]["training"]["gradient_release"] is True
    times = record["metrics"]
    assert 0 < times["time/optimizer_s"] < times["time/training_s"]


def test_a_run_with_everything_goes_on_where_it_was_interrupted(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (*SHORT, RELEASED, CHECKPOINTED, OFFLOADED, "hardware.micro_batch_size=2")
    undisturbed = composed(*overrides)
    config = composed(*overrides, f"results_dir={undisturbed.results_dir}-2")
    execute(undisturbed)
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            execute(config)
    execute(config)
    _assert_same_runs(config, undisturbed)
    committed = next(Path(config.results_dir, "records").glob("*.json"))
    assert json.loads(committed.read_text())["num_steps"] == 4


def test_a_run_leaves_no_memory_to_the_next_of_a_sweep(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hooks kept the model and the optimizer's state, so the second job had no room for its."""
    weights: list[weakref.ref[Tensor]] = []
    train = training.train

    def watched(setup: training.Setup, *args: Any) -> Any:
        weights.extend(weakref.ref(p) for p in setup.task.model.parameters())
        return train(setup, *args)

    monkeypatch.setattr(training, "train", watched)
    execute(composed(*SHORT, RELEASED, CHECKPOINTED))
    gc.collect()
    assert weights
    assert not any(weight() is not None for weight in weights)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("optimizer=adamw",), "optimizer=adamw: only microadam can step in the backward pass"),
        (("training.max_grad_norm=1",), "max_grad_norm=1.0: the global norm needs all gradients"),
        (("hardware.micro_batch_size=4",), "micro_batch_size=4: .* all .*global_batch_size=8"),
        (("training.max_param_grad_norm=0",), "max_param_grad_norm=0.0: must be greater than 0"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(
    composed: Compose, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ExperimentError, match=words):
        composed(*SHORT, RELEASED, *overrides)


# What fits


@pytest.mark.parametrize(
    ("model", "hardware", "card_gib"),
    [("llama2_7b", "rtx3090", 24), ("llama2_13b", "a100_40gb", 40)],
)
def test_the_papers_batch_fits_a_card_of_little_more_than_weights_and_state(
    composed: Compose, model: str, hardware: str, card_gib: int
) -> None:
    """1.5 GiB stay for the driver and for fragmentation."""
    config = composed(
        "scale=paper", f"model={model}", f"hardware={hardware}", "model.weights=random"
    )
    assert config.training.global_batch_size == config.forward_batch_size == 32
    plan = planning.make(config)
    assert plan.peak_bytes < (card_gib - 1.5) * 2**30
    assert plan.grad_bytes == 0
    # And not by counting too little: a layer's gradients and twice the head's, in bfloat16.
    shape = config.model.architecture
    width, hidden = shape["hidden_size"], shape["intermediate_size"]
    layer_bytes = 2 * (4 * width**2 + 3 * width * hidden)
    assert plan.activation_bytes > max(layer_bytes, 2 * 2 * shape["vocab_size"] * width)
    layer_input_bytes = 2 * 32 * config.task.max_length * width
    assert plan.host_bytes == shape["num_hidden_layers"] * layer_input_bytes


def test_the_plan_of_release_says_so(composed: Compose, capsys: pytest.CaptureFixture[str]) -> None:
    execute(composed(*SHORT, RELEASED, CHECKPOINTED, OFFLOADED, "dry_run=true"))
    printed = capsys.readouterr().out
    for words in (
        "gradient clipping  none",
        "activation checkpointing and offloading",
        "released one by one in the backward pass",
        "on the host",
    ):
        assert words in printed


def test_each_measure_takes_less_memory_than_the_one_before(composed: Compose) -> None:
    def activation_bytes(*overrides: str) -> int:
        plan = planning.make(composed(*SHORT, "task.max_length=96", *overrides))
        return plan.activation_bytes + plan.grad_bytes

    measures = [RELEASED, CHECKPOINTED, "hardware.micro_batch_size=2", OFFLOADED]
    bytes_of = [activation_bytes(*measures[:count]) for count in range(len(measures) + 1)]
    assert bytes_of == sorted(bytes_of, reverse=True)
    assert len(set(bytes_of)) == len(bytes_of)


def test_the_planned_bytes_are_those_of_the_same_step_on_real_tensors(composed: Compose) -> None:
    config = composed(
        *SHORT, RELEASED, CHECKPOINTED, "hardware.micro_batch_size=2", "task.max_length=96"
    )
    model = models.load_causal_lm(config.model).model.train()
    optimizer = MicroAdam(model.parameters())
    batch = causal_lm.largest_batch(8, config.task.max_length, torch.device("cpu"))
    activations.enable_checkpointing(model, config.hardware)
    enable_gradient_release(model, optimizer)
    causal_lm.loss_sum(model, batch).backward()  # creates the state
    optimizer.step()
    live = LiveBytes()
    for p in model.parameters():
        live.ignore(p)
    with live:
        causal_lm.loss_sum(model, batch).backward()
    assert planning.make(config).activation_bytes == pytest.approx(live.peak_bytes, rel=0.1)


# Parts of a batch, the host's memory, and logits in parts


def _loss_and_gradients(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    loss = causal_lm.loss_sum(model.train(), batch)
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.fixture
def tiny(composed: Compose) -> PreTrainedModel:
    torch.manual_seed(0)
    return models.load_causal_lm(composed("scale=smoke").model).model


@pytest.fixture
def batch() -> Batch:
    examples = [
        causal_lm.Example(torch.randint(3, 259, (length,)).tolist(), num_prompt)
        for length, num_prompt in ((5, 1), (23, 9), (40, 39), (12, 11), (30, 2))
    ]
    return causal_lm.collate(examples, 0)


@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
@pytest.mark.parametrize("num_at_once", [1, 2, 5])
def test_parts_of_a_batch_and_the_host_change_only_the_order_of_sums(
    tiny: PreTrainedModel, batch: Batch, composed: Compose, num_at_once: int, offload: bool
) -> None:
    expected = _loss_and_gradients(tiny, batch)
    config = composed(
        "scale=smoke",
        CHECKPOINTED,
        f"hardware.activation_offloading={offload}",
        f"hardware.micro_batch_size={num_at_once}",
        "training.global_batch_size=10",
    )
    activations.enable_checkpointing(tiny, config.hardware)
    sizes = set()
    layer = tiny.base_model.layers[0].mlp
    layer.register_forward_hook(lambda module, args, output: sizes.add(len(output)))
    actual = _loss_and_gradients(tiny, batch)
    assert max(sizes) == num_at_once
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_masks_are_cut_with_their_examples(composed: Compose) -> None:
    config = composed("task=mnli", "scale=smoke", "hardware.micro_batch_size=2", "model.dropout=0")
    torch.manual_seed(0)
    model = models.load_classifier(config.model, mnli.LABELS).model.train()
    examples = [
        classification.Example(torch.randint(5, 200, (length,)).tolist(), [0] * length, 1)
        for length in (9, 3, 7, 4, 6, 5, 8, 2)
    ]
    batch = classification.collate(examples, model)

    def loss_and_gradients() -> list[Tensor | None]:
        model.zero_grad()
        loss = classification.loss_sum(classification.logits(model, batch), batch)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    expected = loss_and_gradients()
    activations.enable_checkpointing(model, config.hardware)
    sizes = set()
    inside_a_layer = model.base_model.encoder.layer[0].intermediate
    inside_a_layer.register_forward_hook(lambda module, args, output: sizes.add(len(output)))
    torch.testing.assert_close(loss_and_gradients(), expected, rtol=1e-4, atol=1e-5)
    assert sizes == {2}


class _ScaledLlama(LlamaForCausalLM):
    """Some models change the logits behind the head, which parts of it would leave out."""

    def forward(self, **arguments: Any) -> Any:
        output = super().forward(**arguments)
        output.logits = output.logits / 7
        return output


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, _ScaledLlama])
def test_logits_in_parts_give_the_same_loss(
    tiny: PreTrainedModel,
    batch: Batch,
    composed: Compose,
    monkeypatch: pytest.MonkeyPatch,
    model_class: type[PreTrainedModel],
) -> None:
    model = model_class(tiny.config)
    expected = _loss_and_gradients(model, batch)
    sizes = set()
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: sizes.add(output.numel()))
    monkeypatch.setattr(causal_lm, "_MAX_LOGITS_AT_ONCE", 7 * 259)
    hardware = composed("scale=smoke", CHECKPOINTED, "hardware.micro_batch_size=8").hardware
    activations.enable_checkpointing(model, hardware)
    actual = _loss_and_gradients(model, batch)
    assert (7 * 259 in sizes) == (model_class is LlamaForCausalLM)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(causal_lm.loss_sum(model.eval(), batch), expected[0])
