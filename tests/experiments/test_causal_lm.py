"""Prompts, targets and the loss on the answer alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import GatedRepoError
from lm_eval.models.huggingface import HFLM
from transformers import BertConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from experiments import evaluation, models
from experiments.errors import ExperimentError
from experiments.hardware import Hardware
from experiments.tasks import causal_lm, chosen
from experiments.tasks.causal_lm import Example
from experiments.tasks.gsm8k import GSM8K
from experiments.tasks.open_platypus import OpenPlatypus
from tests.experiments.helpers import Compose

ROW = {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}


@pytest.fixture
def tiny(composed: Compose) -> models.LoadedModel:
    torch.manual_seed(0)
    return models.load_causal_lm(composed("scale=smoke").model)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor) -> str:
    return tokenizer.decode(tokens[tokens >= 0])


def test_the_prompt_is_the_one_the_harness_gives_the_model(tiny: models.LoadedModel) -> None:
    task = evaluation.shipped_tasks("gsm8k")["gsm8k"].cfg
    harness_prompt = task["doc_to_text"].replace("{{question}}", ROW["question"])
    assert GSM8K.prompt(ROW) == harness_prompt
    example = causal_lm.encode(tiny.tokenizer, GSM8K.prompt(ROW), GSM8K.response(ROW))
    harness = HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer)
    assert example.tokens[: example.num_prompt_tokens] == harness.tok_encode(harness_prompt)


def test_the_alpaca_prompt_has_an_input_section_only_where_there_is_an_input() -> None:
    row = {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"}
    with_input, without = OpenPlatypus.prompt(row), OpenPlatypus.prompt({**row, "input": ""})
    assert with_input.startswith("Below is an instruction that describes a task, paired with an")
    assert with_input.endswith(
        "### Instruction:\nAdd the numbers.\n\n### Input:\n2 and 3\n\n### Response:\n"
    )
    assert without.startswith("Below is an instruction that describes a task. Write a response")
    assert without.endswith("### Instruction:\nAdd the numbers.\n\n### Response:\n")
    assert OpenPlatypus.response(row) == "5"


def test_the_targets_are_the_answer_and_the_end_of_text(tiny: models.LoadedModel) -> None:
    tokenizer = tiny.tokenizer
    short = causal_lm.encode(tokenizer, "Q: 1?\nA:", " 1")
    long = causal_lm.encode(tokenizer, GSM8K.prompt(ROW), GSM8K.response(ROW))
    batch = causal_lm.collate([long, short], tokenizer.pad_token_id)
    assert _decode(tokenizer, batch.targets[0]) == f" {ROW['answer']}</s>"
    assert _decode(tokenizer, batch.targets[1]) == " 1</s>"
    assert batch.num_targets == int((batch.targets >= 0).sum())
    assert batch.num_units == len(long.tokens) + len(short.tokens)


def test_the_loss_equals_one_computed_example_by_example(tiny: models.LoadedModel) -> None:
    """Padding and skipped positions must not show: each example alone gives the same sum."""
    torch.manual_seed(1)
    examples = [
        Example(torch.randint(3, 259, (length,)).tolist(), num_prompt)
        for length, num_prompt in ((5, 1), (23, 9), (40, 39), (12, 11))
    ]
    expected = torch.zeros(())
    for example in examples:
        tokens = torch.tensor([example.tokens])
        logits = tiny.model(input_ids=tokens).logits
        answer = slice(example.num_prompt_tokens, None)
        expected += F.cross_entropy(
            logits[0, answer.start - 1 : -1], tokens[0, answer], reduction="sum"
        )
    batch = causal_lm.collate(examples, tiny.tokenizer.pad_token_id)
    torch.testing.assert_close(causal_lm.loss_sum(tiny.model, batch), expected)


def test_the_byte_tokenizer_gives_every_text_back(tiny: models.LoadedModel) -> None:
    text = "Ünïcode, tabs\tand  two spaces\n\n#### 42 \U0001f600"
    tokens = tiny.tokenizer.encode(text)
    assert tiny.tokenizer.decode(tokens) == text
    assert max(tokens) < 259


def test_the_planned_largest_batch_is_as_large_as_a_real_one(tiny: models.LoadedModel) -> None:
    planned = causal_lm.largest_batch(4, 64, torch.device("cpu"))
    real = causal_lm.collate([Example([5] * 64, 1)] * 4, 0)  # a prompt of one token
    for name in ("input_ids", "positions", "targets"):
        assert getattr(planned, name).shape == getattr(real, name).shape
    assert (planned.num_targets, planned.num_units) == (real.num_targets, real.num_units)
    model: PreTrainedModel = tiny.model
    assert causal_lm.loss_sum(model, planned).isfinite()


@pytest.mark.parametrize("source", ["random", "pretrained"])
def test_in_bfloat16_the_weights_are_rounded_and_rotary_frequencies_are_not(
    composed: Compose, tmp_path: Path, source: str
) -> None:
    """Rounded, they turned tokens 500 apart by up to half a radian too far; a model that anyone
    loads in bfloat16 has them in float32, and so was not the one that was trained."""
    overrides = ["scale=smoke", "dataset.num_train=2"]
    torch.manual_seed(0)
    exact = models.load_causal_lm(composed(*overrides).model)
    if source == "pretrained":
        models.pretrained.save(exact.model, exact.tokenizer, tmp_path / "model")
        overrides += [f"model.path={tmp_path / 'model'}", "model.weights=pretrained"]
    config = composed(*overrides)
    torch.manual_seed(0)
    model = chosen(config)(config, Hardware(torch.device("cpu"), "bf16")).model
    weights = dict(exact.model.named_parameters())
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, weights[name].bfloat16())
    buffers = dict(exact.model.named_buffers())
    assert "model.rotary_emb.inv_freq" in buffers
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_a_folder_that_is_no_continuing_models_is_refused(
    composed: Compose, tmp_path: Path
) -> None:
    config = composed("model=smollm2_135m", f"model.path={tmp_path}").model
    with pytest.raises(ExperimentError, match=r"model\.path=.*: it has no config\.json"):
        models.load_causal_lm(config)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ExperimentError, match=r"its type is bert; .* continues texts"):
        models.load_causal_lm(config)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ExperimentError, match=r"could not be loaded .*no file named model"):
        models.load_causal_lm(config)


def test_weights_whose_terms_were_not_accepted_say_where_to_and_how_to_log_in(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    class GatedError(GatedRepoError):
        def __init__(self) -> None:  # without the hub's response
            OSError.__init__(self, "401 Client Error")

    def download(*_: object, **__: object) -> None:
        raise GatedError

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", download)
    config = composed("scale=paper").model
    words = r"accept its terms at https://huggingface.co/meta-llama/Llama-2-7b-hf, .* hf auth login"
    with pytest.raises(ExperimentError, match=words):
        models.load_causal_lm(config)
