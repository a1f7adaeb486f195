"""Plans: the paper's setting without a GPU, a network or the memory of the model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from experiments import models, planning, runner, tasks
from experiments.errors import ExperimentError
from experiments.hardware import Hardware
from experiments.models import pretrained
from experiments.planning import LiveBytes
from experiments.runner import execute
from experiments.runs.folder import RunFolder
from tests.experiments.helpers import Compose

PAPER = ("task=gsm8k", "scale=paper", "hardware=a100_80gb", "model.weights=random")


def test_the_papers_run_is_planned_from_shapes_alone(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(composed(*PAPER, "dry_run=true"))
    printed = capsys.readouterr().out
    for words in (
        "6,738,415,616 parameters",
        "3 epochs = 699 steps, global batch 32",
        "512 tokens",
        "linear decay to 0 after 20 warm-up steps",
        "micro-batch 8, activation checkpointing",
        "12.55 GiB",  # bf16 parameters, and as many gradients
        "0.96 bytes per parameter (AdamW: 25.10 GiB)",
        "fits the card's 80 GiB",
    ):
        assert words in printed


def test_instruction_tuning_of_the_larger_llama_is_planned_without_hub_or_gpu(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = ("task=open_platypus", *PAPER[1:], "model=llama2_13b", "dry_run=true")
    execute(composed(*choice))
    printed = capsys.readouterr().out
    for words in ("13,015,864,320 parameters", "24,670 examples", "3 epochs = 2310 steps"):
        assert words in printed


@pytest.mark.parametrize("task", ["gsm8k", "open_platypus", "mnli", "imagenet"])
def test_the_checkpoints_of_a_run_at_paper_scale_take_minutes_not_hours(
    composed: Compose, task: str
) -> None:
    """Llama-2-7B wrote one of 19 to 38 GiB every 25 steps: 1.7 to 3.4 TiB in all."""
    config = composed(f"task={task}", *PAPER[1:], f"dataset.root={task}")
    plan = planning.make(config)
    num_checkpoints = -(-plan.num_steps // config.training.checkpoint_every_steps)
    assert num_checkpoints * (plan.param_bytes + plan.adamw_state_bytes) < 2**39
    assert num_checkpoints > 5


@pytest.mark.parametrize(
    ("choice", "gib", "needed"),
    [
        (("model=llama2_13b", "optimizer=adamw"), 79, "96.98 GiB"),
        (("model=llama2_7b", "optimizer=adamw"), 79, None),
        (("model=llama2_13b",), 79, None),
        (("model=llama2_7b", "hardware=rtx3090"), 23, None),
        (("model=llama2_7b", "hardware=rtx3090", "optimizer=adam8bit"), 23, "37.85 GiB"),
        (("model=llama2_13b", "optimizer=adamw", "hardware.parallel=fsdp2"), 79, None),
    ],
)
def test_what_no_gpu_of_that_size_has_room_for_is_refused_before_the_first_evaluation(
    composed: Compose,
    monkeypatch: pytest.MonkeyPatch,
    choice: tuple[str, ...],
    gib: int,
    needed: str | None,
) -> None:
    """It was evaluated first, and failed in its first step."""
    config = composed(*PAPER, *choice)
    monkeypatch.setattr(Hardware, "total_bytes", lambda _: gib * 2**30)
    machine = Hardware(torch.device("cpu"), "bf16")
    model = tasks.chosen(config).plan_model(config, machine.param_dtype)
    if needed is None:
        runner._require_room(model, config, machine)
    else:
        words = rf"optimizer={config.optimizer.name}: .* take {needed}, more than the GPU.s {gib}"
        with pytest.raises(ExperimentError, match=words):
            runner._require_room(model, config, machine)


def test_at_paper_scale_a_folder_that_lacks_a_split_is_passed_over_for_the_hub(
    composed: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One with the data of the mini scale; its plan ended for want of validation_mismatched."""
    for split in ("train", "validation_matched"):
        file = tmp_path / "mnli" / f"{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text('{"premise": "a", "hypothesis": "b", "label": 0}\n' * 32)
    choice = ("task=mnli", "scale=paper", "model.weights=random", f"dataset.root={tmp_path}")
    execute(composed(*choice, "dry_run=true"))
    assert "392,702 examples" in capsys.readouterr().out
    lacking = r"mnli has no validation_mismatched\.jsonl, and data set mnli .*dataset\.path=FOLDER"
    with pytest.raises(ExperimentError, match=lacking):
        execute(composed(*choice, "hardware=cpu"))
    execute(composed(*choice, "dataset.splits=[train,validation_matched]", "dry_run=true"))
    assert "(paper), 32 examples" in capsys.readouterr().out


@pytest.mark.parametrize(("task", "num"), [("mnli", "8,000"), ("imagenet", "2,048")])
def test_a_plan_for_generated_data_counts_that(
    composed: Compose, capsys: pytest.CaptureFixture[str], task: str, num: str
) -> None:
    overrides = ("dataset.source=generated", "dataset.num_train=null", "dry_run=true")
    execute(composed(f"task={task}", "scale=smoke", *overrides))
    assert f"(smoke), {num} examples" in capsys.readouterr().out


def test_the_model_of_a_folder_is_planned_and_named_as_it_trains(
    composed: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan was of the preset's architecture, under its name."""
    config = composed("scale=smoke").model
    config.architecture = {**config.architecture, "num_hidden_layers": 3}
    loaded = models.load_causal_lm(config)
    pretrained.save(loaded.model, loaded.tokenizer, tmp_path / "mine")
    short = ("hardware=cpu", "training.max_steps=1", "evaluation.harness={}", "evaluation.limit=2")
    given = ("scale=smoke", *short, f"model.path={tmp_path / 'mine'}", "model.weights=pretrained")
    execute(composed(*given, "dry_run=true"))
    printed = f"mine, {loaded.model.num_parameters():,} parameters, pretrained weights"
    assert printed in capsys.readouterr().out
    execute(composed(*given))
    record = RunFolder(composed(*given)).finished_record()
    assert record is not None
    assert (record["model"], record["num_params"]) == ("mine", loaded.model.num_parameters())
    assert "microadam on mine, gsm8k" in capsys.readouterr().out


def test_the_plan_refuses_a_folder_whose_model_this_task_cannot_train(
    composed: Compose, tmp_path: Path
) -> None:
    AutoConfig.for_model("bert").save_pretrained(tmp_path)
    given = ("scale=smoke", f"model.path={tmp_path}", "model.weights=pretrained")
    with pytest.raises(ExperimentError, match=f"model.path={tmp_path}: its type is bert"):
        planning.make(composed(*given))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ExperimentError, match=f"could not be loaded from {tmp_path}"):
        planning.make(composed(*given))


def test_warm_up_as_long_as_the_run_is_said_to_be(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    for num_steps, words in ((8, "never reached"), (7, "linear decay to 0 after 7 warm-up")):
        execute(composed("scale=smoke", f"training.warmup_steps={num_steps}", "dry_run=true"))
        assert words in capsys.readouterr().out


def test_a_plan_that_does_not_fit_says_by_how_much(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(composed("scale=smoke", "hardware.memory_gib=0.001", "dry_run=true"))
    assert "MiB more than the card's 0.001 GiB" in capsys.readouterr().out
    execute(composed("scale=smoke", "hardware.memory_gib=1", "dry_run=true"))
    assert "MiB of the card's 1 GiB, and the driver" in capsys.readouterr().out


def test_a_plan_for_shards_says_that_it_is_for_one_process(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    """In eight each would take less, and the plan said nothing of it."""
    for parallel, words in (("ddp", ""), ("fsdp2", " for one process, unsharded")):
        execute(composed("scale=smoke", f"hardware.parallel={parallel}", "dry_run=true"))
        assert f"Peak memory by part{words}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("training.global_batch_size=128",), "global_batch_size=128: there are only 64 examples"),
        (("optimizer.density=2",), r"optimizer\.density=2\.0: .* at most 1"),
        (("task=mnli", "+evaluation=gsm8k_0shot"), "evaluation=gsm8k_0shot: task=mnli has"),
        (("task=imagenet", "+evaluation=gsm8k_0shot"), "evaluation=gsm8k_0shot: task=imagenet has"),
        (("task=mnli", "dataset=gsm8k"), "dataset=gsm8k: task=mnli needs .* dataset=mnli"),
        (("task=imagenet", "dataset=mnli"), "dataset=mnli: task=imagenet needs .* image, int"),
        (("task=mnli", "model=resnet18"), "model=resnet18: .* classifies texts"),
        (("model=bert_base",), "model=bert_base: its type is bert; .* continues texts"),
        (("task=imagenet", "model=bert_base"), "model=bert_base: .* not a ResNet's"),
        (
            ("task=imagenet", "dataset.splits=[train]", "dataset.num_held_out=9"),
            "num_held_out=9: task=imagenet tests on a split of its own",
        ),
        (("task=imagenet", "model.dropout=0.1"), "model.dropout=0.1: a ResNet has none"),
        (("task=mnli", "model.dropout=1"), "model.dropout=1.0: must be from 0 to less than 1"),
        (
            ("optimizer=came", "hardware.parallel=fsdp2"),
            "fsdp2, optimizer=came: choose one of micro",
        ),
        (("task=imagenet", "hardware.parallel=fsdp2"), "hardware.parallel=fsdp2: .*channels-last"),
        (
            (
                "hardware.parallel=fsdp2",
                "training.gradient_release=true",
                "training.max_grad_norm=null",
                "training.global_batch_size=4",
            ),
            "gradient_release=True: .* hardware.parallel=ddp",
        ),
    ],
)
def test_the_plan_refuses_what_the_run_would_refuse(
    composed: Compose, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ExperimentError, match=message):
        planning.make(composed("scale=smoke", *overrides))


def test_another_tasks_evaluation_does_not_read_this_tasks_data(composed: Compose) -> None:
    config = composed("task=open_platypus", "evaluation=gsm8k_0shot")
    with pytest.raises(ExperimentError, match=r"gsm8k\.dataset=instruct_stem: must be gsm8k; .*"):
        planning.make(config)


def test_an_optimizer_that_is_not_installed_here_can_be_planned(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flashoptim", None)
    config = composed("scale=smoke", "optimizer=flash_adamw")
    assert planning.make(config).state_bytes > 0


def test_a_classifier_that_reads_the_last_token_can_be_planned(composed: Compose) -> None:
    config = composed("task=mnli", "scale=smoke", "model=tiny_llama")
    assert planning.make(config).activation_bytes > 0


def test_recomputing_activations_takes_less_and_more_examples_take_more(composed: Compose) -> None:
    def activation_bytes(*overrides: str) -> int:
        return planning.make(composed("scale=smoke", *overrides)).activation_bytes

    plain = activation_bytes()
    assert activation_bytes("hardware.activation_checkpointing=true") < plain
    assert activation_bytes("hardware.micro_batch_size=8") > 1.9 * plain
    assert activation_bytes("hardware.precision=bf16") < plain


def test_live_bytes_rise_and_fall_with_the_tensors() -> None:
    live = LiveBytes()
    before = torch.zeros(1024)
    live.ignore(before)
    with live:
        first = before + 1  # 4 KiB
        second = first * 2  # 8 KiB
        del first
        third = second.view(32, 32).t().contiguous()  # 8 KiB again: a view takes nothing
        del second, third
        before.add_(1)
    assert (live.peak_bytes, live.live_bytes) == (8192, 0)


def test_the_planned_activations_are_those_of_the_same_step_on_real_tensors(
    composed: Compose,
) -> None:
    """Shapes alone must give what real tensors give; only attention's own buffers may differ."""
    from experiments.tasks import causal_lm

    config = composed("scale=smoke")
    planned = planning.make(config).activation_bytes
    model = models.load_causal_lm(config.model).model.train()
    batch = causal_lm.largest_batch(4, config.task.max_length, torch.device("cpu"))
    live = LiveBytes()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        live.ignore(p)
        live.ignore(p.grad)
    with live:
        causal_lm.loss_sum(model, batch).backward()
    assert planned == pytest.approx(live.peak_bytes, rel=0.1)


def test_images_are_planned_in_the_precision_that_the_machine_takes(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images in float32 would make all activations of a model in bfloat16 so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    choice = ("task=imagenet", "scale=smoke")
    given = planning.make(composed(*choice, "hardware.precision=bf16"))
    assert planning.make(composed(*choice)).peak_bytes == given.peak_bytes


def test_splits_that_leave_nothing_to_train_or_test_on_are_refused(composed: Compose) -> None:
    for splits in ("[test]", "[train]", "[]"):
        for task in ("mnli", "imagenet", "gsm8k"):
            config = composed(f"task={task}", "scale=smoke", f"dataset.splits={splits}")
            with pytest.raises(ExperimentError, match=r"dataset\.splits=.*: must be train and"):
                planning.make(config)
