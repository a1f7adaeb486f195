"""Every optimizer of configs/optimizer moves everything, is resumable, and takes what it plans.

A published 8-bit GaLore moved no small matrix at all and its runs looked like slow learning; two
other packages resumed from rounded state. A comparison with such a baseline says nothing.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments import optimizers
from experiments.errors import ExperimentError
from experiments.optimizers import OPTIMIZERS, GaLoreConfig, OptimizerConfig
from experiments.optimizers.came import CAME
from experiments.optimizers.galore import GaLoreAdamW, low_rank_parameters
from experiments.runner import execute
from experiments.runs.folder import RunFolder
from tests.experiments.helpers import ROOT, Compose

NAMES = sorted(path.stem for path in (ROOT / "configs" / "optimizer").glob("*.yaml"))
EXTRA_PACKAGES = {"adamw4bit": "torchao", "flash_adamw": "flashoptim"}  # not in the set-up
CUDA_ONLY = {"flash_adamw"}
RUNNABLE = [
    name
    for name in NAMES
    if (name not in EXTRA_PACKAGES or importlib.util.find_spec(EXTRA_PACKAGES[name]))
    and (name not in CUDA_ONLY or torch.cuda.is_available())
]
DEVICE = {name: "cuda" if name in CUDA_ONLY else "cpu" for name in NAMES}
DTYPES = [torch.float32, torch.bfloat16]
EVERY_OPTIMIZER = pytest.mark.parametrize("name", RUNNABLE)
BOTH_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


class Zoo(nn.Module):
    """One parameter of each kind; bitsandbytes and torchao quantize from 4,096 elements on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 96)
        self.large = nn.Linear(96, 64)  # 6,144 elements
        self.small = nn.Linear(64, 20)
        self.norm = nn.LayerNorm(64)
        self.convolution = nn.Conv2d(16, 40, 3)  # 5,760 elements
        self.pointwise = nn.Conv2d(8, 4, 1)
        self.temperature = nn.Parameter(torch.ones(1))


def _zoo(name: str, dtype: torch.dtype = torch.float32) -> Zoo:
    torch.manual_seed(0)
    return Zoo().to(DEVICE[name], dtype)


def _config(composed: Compose, name: str, **changes: Any) -> OptimizerConfig:
    config = composed("scale=smoke", f"optimizer={name}").optimizer
    if isinstance(config, GaLoreConfig):
        changes = {"rank": 16, "update_gap": 4, **changes}
    return replace(config, **changes)


def _give_gradients(model: nn.Module, seed: int, scale: float = 1e-3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p)


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, *seeds: int) -> None:
    for seed in seeds:
        _give_gradients(model, seed)
        optimizer.step()


def test_the_table_has_every_config_file_and_every_config_file_is_in_the_table() -> None:
    assert sorted(OPTIMIZERS) == NAMES


@BOTH_DTYPES
@EVERY_OPTIMIZER
def test_every_parameter_moves(composed: Compose, name: str, dtype: torch.dtype) -> None:
    # Far enough to be seen in bfloat16 at 1: SGD's first step is as small as its gradient, CAME's
    # is a tenth of lr.
    lr = {"sgd": 100.0, "came": 0.1}.get(name, 1e-2)
    model = _zoo(name, dtype)
    before = copy.deepcopy(model)
    optimizer = optimizers.build(model, _config(composed, name, lr=lr))
    _steps(model, optimizer, 1)
    stuck = [
        key
        for (key, p), q in zip(model.named_parameters(), before.parameters(), strict=True)
        if torch.equal(p, q)
    ]
    assert stuck == []


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name != "sgd"])
def test_small_gradients_move_as_far_as_large_ones(composed: Compose, name: str) -> None:
    """Torch's Adafactor with its default eps all but stopped in bfloat16 at small gradients."""
    moved = []
    for scale in (1e-2, 1e-5):
        model = _zoo(name, torch.bfloat16)
        before = model.large.weight.detach().clone()
        optimizer = optimizers.build(model, _config(composed, name, lr=1e-2))
        _give_gradients(model, 1, scale)
        optimizer.step()
        moved.append((model.large.weight.detach() - before).float().norm().item())
    assert moved[1] == pytest.approx(moved[0], rel=0.2)


@EVERY_OPTIMIZER
def test_rows_without_a_gradient_stay_finite(composed: Compose, name: str) -> None:
    """Tokens that a batch lacks: NaN in torch's Adafactor, which squares eps, with the paper's."""
    model = _zoo(name)
    optimizer = optimizers.build(model, _config(composed, name))
    for seed in (1, 2):
        _give_gradients(model, seed)
        assert model.embedding.weight.grad is not None
        model.embedding.weight.grad[10:] = 0
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@EVERY_OPTIMIZER
def test_a_step_leaves_memory_formats_alone(composed: Compose, name: str) -> None:
    """bitsandbytes changed channels-last weights in its first step, so that runs of a ResNet that
    were interrupted ended otherwise."""
    model = _zoo(name).to(memory_format=torch.channels_last)
    optimizer = optimizers.build(model, _config(composed, name))
    before = [p.stride() for p in model.parameters()]
    _steps(model, optimizer, 1)
    assert [p.stride() for p in model.parameters()] == before


@BOTH_DTYPES
@EVERY_OPTIMIZER
def test_a_saved_and_loaded_run_goes_on_bit_for_bit(
    composed: Compose, name: str, dtype: torch.dtype
) -> None:
    """State that was cast to bfloat16 on loading once took the loss from 2.4 to 1785."""
    config = _config(composed, name, lr=1e-2)
    model = _zoo(name, dtype)
    optimizer = optimizers.build(model, config)
    _steps(model, optimizer, 1, 2, 3)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    _steps(model, optimizer, 4, 5, 6, 7, 8)

    resumed = _zoo(name, dtype)
    resumed_optimizer = optimizers.build(resumed, config)
    saved.seek(0)
    checkpoint = torch.load(saved, weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    resumed_optimizer.load_state_dict(checkpoint["optimizer"])
    _steps(resumed, resumed_optimizer, 4, 5, 6, 7, 8)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    measured = optimizers.measured_state_bytes
    assert measured(resumed_optimizer) == measured(optimizer)


@BOTH_DTYPES
@EVERY_OPTIMIZER
def test_planned_state_is_the_measured_state(
    composed: Compose, name: str, dtype: torch.dtype
) -> None:
    config = _config(composed, name)
    model = _zoo(name, dtype)
    model.pointwise.requires_grad_(False)
    optimizer = optimizers.build(model, config)
    _steps(model, optimizer, 1)
    planned = config.state_bytes(Zoo().to("meta", dtype).apply(_freeze_pointwise))
    assert optimizers.measured_state_bytes(optimizer) == planned


def _freeze_pointwise(module: nn.Module) -> None:
    if isinstance(module, Zoo):
        module.pointwise.requires_grad_(False)


@EVERY_OPTIMIZER
def test_least_squares_are_learned(composed: Compose, name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(96, 64).to(DEVICE[name])
    x = torch.randn(256, 96, device=DEVICE[name])
    y = x @ torch.randn(96, 64, device=DEVICE[name]) / 96**0.5
    # Adafactor's is relative to the parameter, GaLore's update a quarter of Adam's, SGD's the
    # gradient of a mean over 64 outputs.
    lr = {"adafactor": 5e-2, "galore": 5e-2, "microadam": 2e-2, "sgd": 5.0}.get(name, 5e-3)
    optimizer = optimizers.build(model, _config(composed, name, lr=lr))
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@EVERY_OPTIMIZER
def test_a_run_finishes(composed: Compose, name: str) -> None:
    """With the schedule, the clipping and the checkpoints of a run."""
    short = ("training.max_steps=2", "evaluation.limit=2", "evaluation.max_new_tokens=4")
    hardware = "auto" if name in CUDA_ONLY else "cpu"
    config = composed("scale=smoke", f"hardware={hardware}", f"optimizer={name}", *short)
    execute(config)
    record = RunFolder(config).finished_record()
    assert record is not None
    assert (record["status"], record["optimizer"]) == ("finished", name)
    assert record["metrics"]["memory/state_bytes"] > 0


@EVERY_OPTIMIZER
def test_weight_decay_is_for_matrices(composed: Compose, name: str) -> None:
    model = _zoo(name)
    groups = optimizers.build(model, _config(composed, name, weight_decay=0.1)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(p): 0.1 if p.dim() >= 2 else 0.0 for p in model.parameters()}


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("adam8bit", "bitsandbytes", "pip install 'bitsandbytes>=0.50'"),
        ("lion", "bitsandbytes", "pip install 'bitsandbytes>=0.50'"),
        ("adamw4bit", "torchao", "pip install 'torchao'"),
        ("flash_adamw", "flashoptim", "pip install 'flashoptim'"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, name: str, module: str, command: str
) -> None:
    class NotInstalled:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == module:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for loaded in [key for key in sys.modules if key.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled, *sys.meta_path])
    with pytest.raises(ExperimentError) as error:
        optimizers.build(_zoo("sgd"), _config(composed, name))
    assert f"optimizer={name}" in str(error.value)
    assert command in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.name=adamw", ["optimizer.name=adamw", "optimizer=NAME"]),
        ("optimizer.lr=-1", ["optimizer.lr=-1", ">= 0"]),
        ("optimizer.weight_decay=-1", ["optimizer.weight_decay=-1", ">= 0"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas=[0.9]", "2 numbers"]),
        ("optimizer.betas=[0.9,1]", ["optimizer.betas=[0.9, 1.0]", "below 1"]),
        ("optimizer.eps=-1", ["optimizer.eps=-1", ">= 0"]),
        ("optimizer.rank=0", ["optimizer.rank=0", "greater than 0"]),
        ("optimizer.update_gap=0", ["optimizer.update_gap=0", "greater than 0"]),
    ],
)
def test_a_hyperparameter_out_of_range_is_named(
    composed: Compose, override: str, words: list[str]
) -> None:
    with pytest.raises(ExperimentError) as error:
        composed("scale=smoke", "optimizer=galore", override)
    assert all(word in str(error.value) for word in words)


def test_galore_projects_linear_layers_that_are_large_enough() -> None:
    model = Zoo()
    assert low_rank_parameters(model, rank=16) == [model.large.weight, model.small.weight]
    assert low_rank_parameters(model, rank=32) == [model.large.weight]
    assert low_rank_parameters(model, rank=64) == []


@pytest.mark.parametrize(("rank", "words"), [(32, ""), (64, "optimizer.rank=64: no linear layer")])
def test_galore_that_projects_nothing_says_so(
    rank: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    GaLoreConfig(name="galore", lr=1e-3, rank=rank).build(Zoo())
    printed = capsys.readouterr().out
    assert printed.startswith(words)
    assert bool(printed) == bool(words)


def test_galore_leaves_a_language_models_head_alone() -> None:
    """The authors project attention and MLP; a tied head would project the embedding."""

    class LanguageModel(nn.Module):
        def __init__(self, is_tied: bool) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 40)
            self.layer = nn.Linear(40, 40)
            self.head = nn.Linear(40, 50)
            if is_tied:
                self.head.weight = self.embedding.weight

        def get_output_embeddings(self) -> nn.Linear:
            return self.head

    for is_tied in (False, True):
        model = LanguageModel(is_tied)
        assert low_rank_parameters(model, rank=8) == [model.layer.weight]


class NumpyGaLore:
    """Algorithm 2 of arXiv:2403.03507 in float64, for one matrix of m x n with m <= n."""

    def __init__(self, weight: np.ndarray, rank: int, gap: int, scale: float, lr: float) -> None:
        self.weight, self.rank, self.gap, self.scale, self.lr = weight, rank, gap, scale, lr
        self.projection = np.zeros((weight.shape[0], rank))
        self.m = np.zeros((rank, weight.shape[1]))
        self.v = np.zeros((rank, weight.shape[1]))
        self.num_steps = 0

    def step(self, grad: np.ndarray, signs_of: np.ndarray) -> None:
        """``signs_of``: a projection; singular vectors are unique but for their signs."""
        if self.num_steps % self.gap == 0:
            u = np.linalg.svd(grad)[0][:, : self.rank]
            self.projection = u * np.sign((u * signs_of).sum(axis=0))
        self.num_steps += 1
        low_rank = np.einsum("mr,mn->rn", self.projection, grad)
        self.m = 0.9 * self.m + 0.1 * low_rank
        self.v = 0.999 * self.v + 0.001 * low_rank**2
        m_hat = self.m / (1 - 0.9**self.num_steps)
        v_hat = self.v / (1 - 0.999**self.num_steps)
        update = self.projection @ (m_hat / (np.sqrt(v_hat) + 1e-6))
        self.weight = self.weight - self.lr * self.scale * update


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=["wide", "tall"])
def test_galore_is_algorithm_2(shape: tuple[int, int]) -> None:
    """Seven steps with three projections: moments are carried from one subspace to the next."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=shape)
    p = nn.Parameter(torch.from_numpy(start).float())
    group = {"params": [p], "rank": 4}
    optimizer = GaLoreAdamW([group], lr=1e-2, update_gap=3, scale=0.5)
    is_tall = shape[0] > shape[1]
    judge = NumpyGaLore(start.T if is_tall else start, rank=4, gap=3, scale=0.5, lr=1e-2)
    for _ in range(7):
        grad = rng.normal(size=shape)
        p.grad = torch.from_numpy(grad).float()
        optimizer.step()
        projection = optimizer.state[p]["projection"].double().numpy()
        judge.step(grad.T if is_tall else grad, projection)
        np.testing.assert_allclose(projection, judge.projection, atol=1e-5)
        weight = judge.weight.T if is_tall else judge.weight
        np.testing.assert_allclose(p.detach().numpy(), weight, atol=1e-5)


def test_galore_passes_on_a_gradient_that_is_not_finite() -> None:
    """So that the next loss tells; the decomposition would raise."""
    p = nn.Parameter(torch.ones(8, 8))
    optimizer = GaLoreAdamW([{"params": [p], "rank": 2}], lr=0.1)
    p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert p.isnan().all()


def test_galore_without_a_rank_is_adamw() -> None:
    ours, theirs = _zoo("galore"), _zoo("adamw")
    arguments: dict[str, Any] = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
    _steps(ours, GaLoreAdamW(ours.parameters(), **arguments), 1, 2, 3)
    _steps(theirs, torch.optim.AdamW(theirs.parameters(), **arguments), 1, 2, 3)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_came_is_algorithm_2() -> None:
    """Against float64 NumPy that writes the rank-1 estimates out as matrices."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 9))
    p = nn.Parameter(torch.from_numpy(weight).float())
    optimizer = CAME([p], lr=1e-2)
    m, r, c, res_r, res_c = (np.zeros(shape) for shape in ((6, 9), 6, 9, 6, 9))
    for _ in range(5):
        grad = rng.normal(size=(6, 9))
        r = 0.999 * r + 0.001 * (grad**2 + 1e-30).mean(axis=1)
        c = 0.999 * c + 0.001 * (grad**2 + 1e-30).mean(axis=0)
        update = grad / np.sqrt(np.outer(r, c) / r.mean())
        update /= max(1.0, np.sqrt((update**2).mean()))
        m = 0.9 * m + 0.1 * update
        instability = (update - m) ** 2 + 1e-16
        res_r = 0.9999 * res_r + 0.0001 * instability.mean(axis=1)
        res_c = 0.9999 * res_c + 0.0001 * instability.mean(axis=0)
        weight = weight - 1e-2 * m / np.sqrt(np.outer(res_r, res_c) / res_r.mean())
        p.grad = torch.from_numpy(grad).float()
        optimizer.step()
        np.testing.assert_allclose(p.detach().numpy(), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer_class", [GaLoreAdamW, CAME])
def test_a_closure_is_run_with_gradients(optimizer_class: type[torch.optim.Optimizer]) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = optimizer_class([p], lr=1e-2)  # type: ignore[call-arg]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == 3
    assert (p < 1).all()
