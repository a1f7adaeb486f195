"""ResNets on images: whole runs at smoke scale, and the paper's plan."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments import hardware
from experiments.config import RunConfig
from experiments.data import images
from experiments.data.order import DataOrder
from experiments.errors import ExperimentError
from experiments.models import resnets
from experiments.runner import execute
from experiments.runs.folder import RunFolder
from experiments.tasks.imagenet import Batch, ImageNet
from tests.experiments.helpers import Compose
from tests.experiments.stopping import interrupt_at

SMOKE = ("task=imagenet", "scale=smoke", "hardware=cpu")


@pytest.fixture
def _torchvision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine without FFCV; nothing is compiled, so runs are quick."""
    monkeypatch.setitem(sys.modules, "ffcv", None)
    images.has_ffcv.cache_clear()
    yield
    images.has_ffcv.cache_clear()


def _record(config: RunConfig) -> dict:
    record = RunFolder(config).finished_record()
    assert record is not None
    return record


def test_a_run_through_ffcv_learns_and_its_record_says_what_it_was(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    config = composed(*SMOKE, "optimizer=sgd")
    execute(config)
    record = _record(config)
    metrics = record["metrics"]
    assert record["data_loader"] == "ffcv"
    assert (record["unit"], record["num_units"]) == ("images", 16 * 32)
    assert metrics["eval/loss"] < metrics["eval_before/loss"] - 0.3
    assert metrics["eval/top_1"] > metrics["eval_before/top_1"] + 0.1
    assert metrics["eval/top_5"] > metrics["eval/top_1"]
    assert metrics["eval/top_1_num_samples"] == 64
    printed = capsys.readouterr().out
    assert "cifar10 (generated), 256 examples through ffcv" in printed
    assert "images/s" in printed
    assert "top 1" in printed


@pytest.mark.usefixtures("_torchvision")
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the change of resolution and in the middle of an epoch; BatchNorm's state included."""
    choice = (*SMOKE, "images.last_resolution_from=0.25", "evaluation.before_training=false")
    undisturbed, config = composed(*choice), composed(*choice)
    config.results_dir += "-2"
    execute(undisturbed)
    assert _record(undisturbed)["data_loader"] == "torchvision"
    assert "torchvision loads the images" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        interrupt_at(11, patch)
        with pytest.raises(KeyboardInterrupt):
            execute(config)
    execute(config)
    assert "from step 8" in capsys.readouterr().out
    losses = [
        [m["train/loss"] for m in RunFolder(c).metrics() if "train/loss" in m]
        for c in (undisturbed, config)
    ]
    assert len(losses[0]) == 16
    assert losses[0] == losses[1]
    assert _record(undisturbed)["metrics"]["eval/loss"] == _record(config)["metrics"]["eval/loss"]


@pytest.mark.usefixtures("_torchvision")
def test_steps_have_their_resolution_and_micro_batches(composed: Compose) -> None:
    config = composed(*SMOKE, "hardware.micro_batch_size=8", "images.last_resolution_from=0.5")
    task = ImageNet(config, hardware.resolve(config.hardware))
    order = DataOrder(config.training, task.num_examples, config.seed)
    steps = list(task.steps(order, 6, 10))
    assert [len(step) for step in steps] == [4, 4, 4, 4]
    assert [tuple(step[0].images.shape[2:]) for step in steps] == [(16, 16)] * 2 + [(24, 24)] * 2
    batch = steps[0][0]
    assert (batch.num_targets, batch.num_units) == (8, 8)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert [int(y) for part in steps[0] for y in part.labels] == [i % 10 for i in order[6]]


def test_the_papers_run_is_planned_without_network(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = ("task=imagenet", "scale=paper", "hardware=a100_80gb", "dry_run=true")
    execute(composed(*choice, "model=resnet50", "hardware.micro_batch_size=64"))
    printed = capsys.readouterr().out
    for words in (
        "25,557,032 parameters",
        "1,281,167 examples",
        "88 epochs = 110088 steps, global batch 1024",
        "160 px, 192 px after 80% of the steps",
        "bf16_amp, micro-batch 64",
        "fits the card's 80 GiB",
    ):
        assert words in printed


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adam8bit", "microadam"])
def test_the_preset_decides_weight_decay_unless_told_otherwise(
    composed: Compose, optimizer: str
) -> None:
    choice = ("task=imagenet", "scale=paper", f"optimizer={optimizer}")
    assert composed(*choice).optimizer.weight_decay == 3e-4
    assert composed(*choice, "optimizer.weight_decay=0.1").optimizer.weight_decay == 0.1
    assert composed("task=gsm8k", f"optimizer={optimizer}").optimizer.weight_decay == 0.0


def test_norms_and_biases_are_spared_from_weight_decay(composed: Compose) -> None:
    config = composed(*SMOKE)
    model = resnets.resnet(config.model, 10)
    decayed, spared = config.optimizer.groups(model)
    assert {p.dim() for p in decayed["params"]} == {2, 4}
    assert {p.dim() for p in spared["params"]} == {1}
    assert spared["weight_decay"] == 0.0


def test_the_stem_is_a_choice(composed: Compose) -> None:
    size = torch.zeros(1, 3, 32, 32)
    config = composed(*SMOKE, "model=resnet18").model
    config.architecture["stem"] = {"kernel_size": 3, "stride": 1, "max_pool": False}
    small = resnets.resnet(config, 10)
    config.architecture["stem"] = {}
    usual = resnets.resnet(config, 10)
    assert small.conv1(size).shape[2:] == (32, 32)
    assert usual.maxpool(usual.conv1(size)).shape[2:] == (8, 8)
    assert usual.conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": {"model_type": "llama"}}, r"not a ResNet's .*choose one with model="),
        ({"architecture": {"block": "big", "layers": [1] * 4}}, r"block=big: choose one of basic"),
        ({"architecture": {"block": "basic", "layers": [1]}}, r"layers=\[1\]: must be 4 numbers"),
        (
            {"weights": "pretrained", "hub_id": "x"},
            "weights=pretrained: .* is trained from scratch",
        ),
    ],
)
def test_what_is_no_resnet_is_refused(composed: Compose, values: dict, message: str) -> None:
    config = dataclasses.replace(composed(*SMOKE).model, **values)
    with pytest.raises(ExperimentError, match=message):
        resnets.resnet(config, 10)


def test_images_of_a_folder_are_counted_for_the_plan(composed: Compose, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "0.png")
    choice = (*SMOKE, f"dataset.path={tmp_path}", "dataset.num_train=null")
    assert ImageNet.num_local_examples(composed(*choice).dataset) == 2
    with pytest.raises(ExperimentError, match="images=null"):
        ImageNet.plan_batch(dataclasses.replace(composed(*choice), images=None))


def test_label_smoothing_spreads_its_share_over_all_classes() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    labels, share = torch.tensor([1, 0]), 0.3
    batch = Batch(torch.zeros(2), labels, share)
    log_p = logits.double() - logits.double().exp().sum(dim=1, keepdim=True).log()
    expected = -(1 - share) * log_p[[0, 1], labels].sum() - share / 3 * log_p.sum()
    loss = ImageNet.loss_sum(lambda _: logits, batch)
    assert loss.item() == pytest.approx(expected.item())
