"""What the harness is given and what it measured, checked against what was asked of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch

from experiments import models
from experiments.data import choices
from experiments.errors import ExperimentError
from experiments.evaluation import Harness, shipped_tasks
from tests.experiments.helpers import Compose

SMOKE = ("task=open_platypus", "scale=smoke")
SPLITS = {
    "arc_challenge": ("train", "test", choices.arc),
    "hellaswag": ("train", "validation", choices.hellaswag),
    "mmlu": ("dev", "test", choices.mmlu),
    "winogrande": ("train", "validation", choices.winogrande),
}


@pytest.fixture(scope="module")
def tiny() -> models.LoadedModel:
    config = models.ModelConfig(
        name="tiny",
        weights="random",
        architecture={
            "model_type": "llama",
            "vocab_size": 259,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 4096,
        },
    )
    torch.manual_seed(0)
    return models.load_causal_lm(config)


def _evaluate(tiny: models.LoadedModel, harness: Harness) -> dict[str, Any]:
    return harness.evaluate(tiny.model, tiny.tokenizer)


def _write(folder: Path, **splits: list[dict[str, Any]]) -> None:
    folder.mkdir()
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def test_all_four_tasks_are_evaluated_on_a_local_folder_as_on_generated_rows(
    composed: Compose, tiny: models.LoadedModel, tmp_path: Path
) -> None:
    """The local folders hold the very rows that are generated, so every score is the same."""
    generated = _evaluate(tiny, Harness(composed(*SMOKE).evaluation))
    for name, (examples, evaluated, rows_of) in SPLITS.items():
        num_examples = 15 if name == "mmlu" else 100
        rows = {examples: rows_of(examples, num_examples), evaluated: rows_of(evaluated, 400)}
        _write(tmp_path / name, **rows)
    roots = [f"evaluation.harness.{name}.dataset.root={tmp_path}" for name in SPLITS]
    sources = [f"evaluation.harness.{name}.dataset.source=local" for name in SPLITS]
    local = _evaluate(tiny, Harness(composed(*SMOKE, *roots, *sources).evaluation))
    assert {local.pop(f"{name}/data_source") for name in SPLITS} == {"local"}
    assert {generated.pop(f"{name}/data_source") for name in SPLITS} == {"generated"}
    assert local == generated
    for name in SPLITS:
        num_tasks = 3 if name == "mmlu" else 1
        assert local[f"{name}/num_tasks"] == num_tasks
        assert local[f"{name}/num_samples"] == 2 * num_tasks
        assert local[f"{name}/num_fewshot"] == 1
        assert lm_eval.__version__ in local[f"{name}/harness"]
    for metric in ("arc_challenge/acc_norm", "hellaswag/acc_norm", "mmlu/acc", "winogrande/acc"):
        assert 0 <= local[f"{metric},none"] <= 1
        assert local[f"{metric}_stderr,none"] >= 0


def test_mmlu_has_57_subjects_and_each_question_weighs_the_same(
    composed: Compose, tiny: models.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that always answers A, right in one subject only, which has three questions."""
    subjects = [
        entry.cfg["dataset_name"]
        for entry in shipped_tasks("mmlu").values()
        if entry.cfg and "dataset_name" in entry.cfg
    ]
    assert len(subjects) == 57
    rows = choices.mmlu("test", 59)
    for row, subject in zip(rows, [*subjects, subjects[0], subjects[0]], strict=True):
        row |= {"subject": subject, "answer": 0 if subject == subjects[0] else 1}
    _write(tmp_path / "mmlu", test=rows)

    def always_a(_: object, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(0.0 if request.args[1] == " A" else -1.0, True) for request in requests]

    monkeypatch.setattr("experiments.evaluation.HFLM.loglikelihood", always_a)
    config = composed(
        "evaluation=open_platypus",
        f"evaluation.harness.mmlu.dataset.path={tmp_path / 'mmlu'}",
        "evaluation.harness.mmlu.num_fewshot=0",
    ).evaluation
    config.limit = None
    config.harness = {"mmlu": config.harness["mmlu"]}
    metrics = _evaluate(tiny, Harness(config))
    assert (metrics["mmlu/num_tasks"], metrics["mmlu/num_samples"]) == (57, 59)
    assert metrics["mmlu/acc,none"] == pytest.approx(3 / 59)


def test_few_shot_examples_that_are_not_there_are_named_before_anything_runs(
    composed: Compose, tmp_path: Path
) -> None:
    _write(tmp_path / "arc_challenge", test=choices.arc("test", 4))
    folder = f"evaluation.harness.arc_challenge.dataset.path={tmp_path / 'arc_challenge'}"
    with pytest.raises(ExperimentError, match=r"num_fewshot=1: .*train\.jsonl.*num_fewshot to 0"):
        Harness(composed(*SMOKE, folder).evaluation)
    without = composed(*SMOKE, folder, "evaluation.harness.arc_challenge.num_fewshot=0")
    Harness(without.evaluation)
    too_many = composed(*SMOKE, "evaluation.harness.winogrande.num_fewshot=101")
    with pytest.raises(ExperimentError, match=r"num_fewshot=101: split train has only 100"):
        Harness(too_many.evaluation)


def test_fewer_samples_than_asked_for_are_an_error(
    composed: Compose, tiny: models.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(composed(*SMOKE).evaluation)
    evaluate = lm_eval.evaluate

    def evaluate_one(*arguments: Any, **settings: Any) -> Any:
        return evaluate(*arguments, **{**settings, "limit": 1})

    monkeypatch.setattr(lm_eval, "evaluate", evaluate_one)
    with pytest.raises(RuntimeError, match="evaluated 1 examples of arc_challenge instead of 2"):
        _evaluate(tiny, harness)


@pytest.mark.parametrize(
    ("choice", "generates"),
    [(SMOKE, False), (("scale=smoke", "evaluation.limit=1", "evaluation.max_new_tokens=2"), True)],
)
def test_only_generation_keeps_keys_and_values(
    composed: Compose,
    tiny: models.LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    choice: tuple[str, ...],
    generates: bool,
) -> None:
    """For 32 five-shot prompts of MMLU they took more memory than the weights of Llama-2-7B."""
    has_cache = []

    def forward(*arguments: Any, **named: Any) -> Any:
        output = type(tiny.model).forward(tiny.model, *arguments, **named)
        has_cache.append(output.past_key_values is not None)
        return output

    monkeypatch.setattr(tiny.model, "forward", forward)
    harness = Harness(composed(*choice).evaluation)
    _evaluate(tiny, harness)
    assert set(has_cache) == {generates}
    assert tiny.model.config.use_cache


def test_batches_that_do_not_fit_the_gpu_are_halved(
    composed: Compose,
    tiny: models.LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run would fail after its training, and begin from scratch with another batch size."""
    harness = Harness(composed(*SMOKE, "evaluation.batch_size=8").evaluation)
    expected = _evaluate(tiny, harness)
    forward = lm_eval.models.huggingface.HFLM._model_call

    def limited(self: Any, inputs: torch.Tensor, **named: Any) -> torch.Tensor:
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, inputs, **named)

    monkeypatch.setattr("experiments.evaluation.HFLM._model_call", limited)
    capsys.readouterr()
    assert _evaluate(tiny, harness) == pytest.approx(expected)
    printed = capsys.readouterr().out
    assert "trying batches of 4\n" in printed
    assert "trying batches of 2\n" in printed


def test_answers_that_the_model_has_no_room_for_are_refused(
    composed: Compose, tiny: models.LoadedModel
) -> None:
    config = composed("scale=smoke", "evaluation=gsm8k_0shot", "evaluation.max_new_tokens=4096")
    with pytest.raises(ExperimentError, match=r"max_new_tokens=4096: .* room for 4096 tokens"):
        Harness(config.evaluation).check(tiny.model, tiny.tokenizer)


def test_tasks_that_choose_among_answers_need_no_room_for_new_ones(
    composed: Compose, tiny: models.LoadedModel
) -> None:
    config = composed(*SMOKE, "evaluation.max_new_tokens=4096")
    Harness(config.evaluation).check(tiny.model, tiny.tokenizer)


def test_an_unknown_task_is_refused(composed: Compose) -> None:
    config = composed(*SMOKE).evaluation
    config.harness["truthfulqa"] = config.harness.pop("mmlu")
    with pytest.raises(ExperimentError, match=r"truthfulqa: known tasks are gsm8k, arc_challenge"):
        Harness(config)


@pytest.mark.parametrize(
    ("protocol", "answer", "scores"),
    [
        ("gsm8k_0shot", "It is 5.\n#### 5", {"strict-match": 1, "flexible-extract": 1}),
        ("gsm8k_0shot", "The answer is 5", {"strict-match": 0, "flexible-extract": 1}),
        ("gsm8k_0shot", "#### 5.", {"strict-match": 1, "flexible-extract": 1}),
        ("gsm8k_paper", "It is 5.\n#### 5", {"harness-b281b09": 1}),
        ("gsm8k_paper", "The answer is 5", {"harness-b281b09": 0}),
        ("gsm8k_paper", "#### 5.", {"harness-b281b09": 0}),
    ],
)
def test_the_two_protocols_read_an_answer_differently(
    composed: Compose,
    tiny: models.LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
    answer: str,
    scores: dict[str, float],
) -> None:
    rows = [{"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}]
    _write(tmp_path / "gsm8k", train=rows, test=rows)
    stops = []

    def generate_until(_: object, requests: list[Any]) -> list[str]:
        stops.extend(request.args[1]["until"] for request in requests)
        return [answer for _ in requests]

    monkeypatch.setattr("experiments.evaluation.HFLM.generate_until", generate_until)
    folder = f"dataset.path={tmp_path / 'gsm8k'}"
    config = composed("scale=smoke", f"evaluation={protocol}", folder)
    assert config.evaluation.protocol == protocol
    metrics = _evaluate(tiny, Harness(config.evaluation))
    measured = {
        name.partition(",")[2]: value for name, value in metrics.items() if "exact_match," in name
    }
    assert measured == scores
    assert (":" in stops[0]) == (protocol == "gsm8k_paper")
