"""The studies: the research optimizer against the real ones, and each study on a small scale."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import microadam
from experiments.errors import ExperimentError
from experiments.report import figures_studies
from experiments.studies import __main__ as studies
from experiments.studies import compressor, convergence, finetuning, galore_error
from experiments.studies.variant import MicroAdamVariant, pad_to_buckets, round_trip
from microadam import MicroAdam

ROOT = Path(__file__).resolve().parents[2]

# The research variant


def take_steps(optimizer: torch.optim.Optimizer, params: list[torch.Tensor], num: int) -> None:
    """The same gradients for every optimizer."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).pow(3)
        optimizer.step()


def parameters() -> list[torch.Tensor]:
    """Full blocks with a shorter last one, less than a bucket, and an uneven bucket."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator) for n in (1000, 256, 7, 100)]


@pytest.mark.parametrize("density", [0.01, 0.2])
def test_variant_takes_the_steps_of_microadam(density: float) -> None:
    ours, theirs = parameters(), parameters()
    arguments: dict[str, Any] = {
        "lr": 0.1,
        "density": density,
        "block_size": 256,
        "window_size": 4,
    }
    variant, original = MicroAdamVariant(ours, **arguments), MicroAdam(theirs, **arguments)
    take_steps(variant, ours, 12)
    take_steps(original, theirs, 12)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    tensors = [t for state in original.state.values() for t in state.values()]
    assert variant.state_bytes() == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_variant_that_keeps_everything_is_adam(amsgrad: bool) -> None:
    ours, theirs = parameters(), parameters()
    variant = MicroAdamVariant(ours, lr=0.1, window_size=None, density=1.0, amsgrad=amsgrad)
    take_steps(variant, ours, 20)
    take_steps(torch.optim.Adam(theirs, lr=0.1, amsgrad=amsgrad), theirs, 20)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_bias_correction_by_window_differs_once_a_slot_is_replaced() -> None:
    def moved(bias_correction: str, num_steps: int) -> torch.Tensor:
        params = [torch.zeros(300)]
        variant = MicroAdamVariant(
            params, lr=0.1, window_size=3, density=1.0, bias_correction=bias_correction
        )
        take_steps(variant, params, num_steps)
        return params[0]

    assert torch.equal(moved("step", 3), moved("window", 3))
    assert not torch.allclose(moved("step", 4), moved("window", 4))


def test_exact_error_feedback_loses_nothing() -> None:
    """What went into the window and what is left add up to the sum of all gradients."""
    params = [torch.zeros(300)]
    variant = MicroAdamVariant(params, lr=0.1, density=0.1, bits=None, window_size=100)
    total = torch.zeros(300)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        params[0].grad = torch.randn(300, generator=generator).bfloat16().float()
        total += params[0].grad
        variant.step()
    state = variant.state[params[0]]
    (window,) = state["segments"]
    sent = torch.zeros(300)
    sent.index_add_(0, window["indices"].long().flatten(), window["values"].float().flatten())
    torch.testing.assert_close(sent + state["error"], total, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_more_bits_round_finer(bits: int) -> None:
    residual = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    low, high = (t.bfloat16().float() for t in residual.aminmax(dim=1))
    unit = (high - low) / (2**bits - 1)
    rounding = (round_trip(residual, bits) - residual).abs()
    # At the ends of the range, bfloat16 is the coarser one.
    assert (rounding <= unit[:, None] / 2 + 0.02).all()
    assert len(round_trip(residual, bits)[0].unique()) <= 2**bits


def test_stochastic_rounding_is_unbiased() -> None:
    torch.manual_seed(0)
    residual = torch.linspace(-1, 1, 64)[None]  # its ends are bfloat16 numbers
    mean = torch.stack([round_trip(residual, 2, is_stochastic=True) for _ in range(4000)]).mean(0)
    assert (mean - residual).abs().max() < 0.03
    assert (round_trip(residual, 2) - residual).abs().max() > 0.3


def test_padding_leaves_the_range_of_a_bucket() -> None:
    padded = pad_to_buckets(torch.tensor([[1.0, 2.0, 3.0]]), 2)
    assert padded.tolist() == [[1, 2], [3, 3]]


# What the studies measure


def test_galore_error_is_what_the_projection_leaves_out() -> None:
    projection = torch.linalg.qr(torch.randn(6, 2)).Q
    for matrix in (torch.randn(6, 9), torch.randn(9, 6)):
        kept = galore_error.projected(matrix, projection)
        torch.testing.assert_close(galore_error.projected(kept, projection), kept)
        assert abs((kept * (matrix - kept)).sum()) < 1e-4
        assert kept.norm() < matrix.norm()


def test_error_feedback_is_read_as_the_optimizer_adds_it() -> None:
    """With a gradient of 0, the next accumulator is the error feedback alone."""
    p = torch.zeros(200, requires_grad=True)
    optimizer = MicroAdam([p], lr=0.1, window_size=1)
    p.grad = torch.randn(200, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    feedback = galore_error.error_feedback(optimizer, p)
    p.grad = torch.zeros(200)
    optimizer.step()
    largest = feedback.abs().topk(2).values
    stored = optimizer.state[p]["window_values"].float().abs().flatten().sort().values
    torch.testing.assert_close(stored, largest.bfloat16().float().sort().values)


def test_compressor_measures_the_two_ratios() -> None:
    """One entry of 100 is kept, and the rest, of 1 and -1, is on the quantizer's levels."""
    p = torch.nn.Parameter(torch.zeros(100))
    p.grad = torch.ones(100)
    p.grad[1::2] = -1
    p.grad[0] = 10
    module = torch.nn.Module()
    module.weight = p
    (measured,) = {
        kind: ratios
        for kind, ratios in compressor.measure(module, MicroAdam([p])).items()
        if kind == "all"
    }.values()
    assert measured["q"] == measured["q_gradient"] == pytest.approx((99 / 199) ** 0.5)
    # The selected entry is left as a 0 between the levels, half a unit of 2 / 15 away.
    assert measured["omega"] == pytest.approx(1 / 15 / 99**0.5, rel=1e-3)
    assert measured["condition"] == (1 + measured["omega"]) * measured["q"]


def test_exponents_are_1_where_values_fall_as_proved() -> None:
    settings = convergence.Settings(num_steps=[100, 1000, 10000], fit_from=100)
    problem = convergence.nonconvex(
        convergence.Settings(num_variables=64, num_examples=64, num_seeds=1), 0
    )
    values = [[3 * problem.rate(n), problem.rate(n) ** 2] for n in settings.num_steps]
    assert convergence.exponents(problem, values, settings) == pytest.approx([1, 2])


def test_pl_problem_has_its_minimum_where_the_gradient_is_0() -> None:
    settings = convergence.Settings(num_variables=64, num_examples=128, rank=4, num_seeds=2)
    problem = convergence.pl(settings, 0)
    x = torch.zeros(2, 64)
    for _ in range(2000):
        x -= 0.1 * problem.gradient(x, problem.a, problem.b)
    assert problem.measure(torch.zeros(2, 64)).min() > 0.1
    assert problem.measure(x).max() < 1e-6


# Each study from the command line to its figure

SMALL = {
    "rosenbrock": ["num_steps=150", "large_num_steps=5", "starts=[[-0.5,1.0]]"],
    "convergence": [
        "num_variables=64",
        "num_examples=64",
        "rank=8",
        "num_seeds=2",
        "num_steps=[10,20,40]",
        "fit_from=10",
        "factors=[0.1,1.0]",
        "num_tuning_steps=10",
    ],
    "ablations": [
        "parts={bits:[0,4],density:[0.01],window_size:[10],block_size:[4096],bucket_size:[64],"
        "bias_correction:[step]}",
        "learning_rates=[0.01]",
        "num_steps=5",
        "num_seeds=2",
    ],
    "compressor": ["runs=[[mnli,tiny_bert,2,[1,2]],[gsm8k,tiny_llama,1,[1,2]]]"],
    "galore_error": ["model=tiny_bert", "num_steps=8", "update_gap=2", "rank=4", "batch_size=2"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all studies on a small scale, without any data to read."""
    folder = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("MICROADAM_CACHE", str(folder / "cache"))
        for name, changes in SMALL.items():
            studies.run(name, changes, folder / "no-data", folder)
    return folder


@pytest.mark.parametrize("name", studies.STUDIES)
def test_study_says_how_it_was_made(results: Path, name: str) -> None:
    document = json.loads((results / "studies" / f"{name}.json").read_text())
    assert document["command"].startswith(f"python -m experiments.studies {name} ")
    assert document["provenance"]["versions"]["microadam"] == microadam.__version__
    assert document["settings"].keys() == vars(studies._module(name).Settings()).keys()


def test_every_study_is_drawn(results: Path) -> None:
    figures = figures_studies.draw(results, results / "figures")
    assert {figure.name for figure in figures} >= set(studies.STUDIES)
    for figure in figures:
        assert {path.suffix for path in figure.files} == {".png", ".svg"}
        assert all(path.stat().st_size > 0 for path in figure.files)


def test_error_feedback_keeps_to_adams_path(results: Path) -> None:
    document = json.loads((results / "studies" / "rosenbrock.json").read_text())
    strays = {run["method"]: run["distance_from_adam"] for run in document["results"]["plane"]}
    assert strays["adam"] == pytest.approx(0, abs=1e-3)
    assert strays["topk_ef"] < strays["topk"] / 3


def test_sentence_says_what_the_data_say(results: Path) -> None:
    document = json.loads((results / "studies" / "rosenbrock.json").read_text())
    values, settings = document["results"], document["settings"]
    *_, sentence = figures_studies._rosenbrock(values, settings)
    assert "brings it back" in sentence
    for run in values["plane"]:
        run["distance_from_adam"] = 9.0 if run["method"] == "topk_ef" else 1.0
    *_, sentence = figures_studies._rosenbrock(values, settings)
    assert "does not help: 9.00" in sentence


def test_nothing_is_drawn_without_results(tmp_path: Path) -> None:
    assert figures_studies.draw(tmp_path, tmp_path / "figures") == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results" / "studies").glob("*.json")), ids=lambda path: path.stem
)
def test_committed_study_has_the_settings_of_today(path: Path) -> None:
    document = json.loads(path.read_text())
    today = vars(studies._module(path.stem).Settings())
    assert document["settings"] == json.loads(json.dumps(today))
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [(["lrr=1"], "lrr"), (["num_steps=many"], "num_steps"), (["model=gpt9"], "tiny_bert")],
)
def test_wrong_setting_is_named(tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        studies.run("galore_error", changes, tmp_path, tmp_path)
    assert not (tmp_path / "studies").exists()


def test_what_there_is_to_choose_from_is_listed(tmp_path: Path) -> None:
    """Of data sets it was the representation of a dict of functions."""
    with pytest.raises(ExperimentError, match=r"^dataset=mmlu: .*choose one of gsm8k, mnli$"):
        finetuning.load("mmlu", "minilm_l6", tmp_path, num_batches=1, batch_size=2, max_length=32)


def test_a_study_loads_its_model_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """transformers reports a classifier's new head, and shows a bar."""
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.enable_progress_bar()
    finetuning.load("mnli", "minilm_l6", tmp_path, num_batches=1, batch_size=2, max_length=32)
    assert capfd.readouterr().err == ""


def test_overview_names_every_study(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["studies"])
    studies.main()
    output = capsys.readouterr().out
    assert all(f"{name}: " in output for name in studies.STUDIES)
    assert "    lr=0.02" in output
