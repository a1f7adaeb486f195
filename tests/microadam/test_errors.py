"""Bad input: one sentence names the fault, its value and the remedy, and nothing changes."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from microadam import MicroAdam
from tests.microadam.helpers import (
    assert_same,
    clone_all,
    new_optimizer,
    new_parameter,
    parameters_of,
    set_gradient,
    set_random_gradients,
)
from tests.microadam.judge import step_and_judge


def test_sparse_gradient_is_refused_and_nothing_moves(rng: np.random.Generator) -> None:
    """The first parameter's gradient is fine: half a step would be worse than none."""
    embedding = nn.Embedding(10, 4, sparse=True)
    good = new_parameter(300, torch.float32, rng)
    optimizer = MicroAdam([{"params": [good]}, {"params": embedding.parameters()}])
    set_gradient(good, rng.standard_normal(300))
    embedding(torch.tensor([1, 2])).sum().backward()
    before = good.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 1 is sparse .* pass sparse=False"):
        optimizer.step()
    assert torch.equal(good, before)


def test_complex_gradient_is_refused(rng: np.random.Generator) -> None:
    optimizer = new_optimizer(rng)
    parameters_of(optimizer)[0].grad = torch.zeros(300, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"parameter 0 has dtype torch.complex64.*real"):
        optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "remedy"), [(torch.complex64, "view_as_real"), (torch.float64, r"model.float\(\)")]
)
def test_parameter_of_an_unsupported_dtype_is_refused(dtype: torch.dtype, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"parameter 1 .* {dtype}; .*{remedy}"):
        MicroAdam([torch.zeros(2), torch.zeros(2, dtype=dtype)])


def test_a_model_that_becomes_float64_is_refused_at_its_next_step() -> None:
    model = nn.Linear(20, 1)
    optimizer = MicroAdam(model.parameters())
    model.double()(torch.ones(20, dtype=torch.float64)).backward()
    with pytest.raises(ValueError, match=r"parameter 0 has dtype torch.float64; .* model.float"):
        optimizer.step()


OUT_OF_RANGE = [
    ({"lr": -1.0}, r"lr=-1.0: must be a finite number of 0 or more"),
    ({"lr": math.nan}, r"lr=nan: must be a finite number of 0 or more"),
    ({"lr": math.inf}, r"lr=inf: must be a finite number of 0 or more"),
    ({"lr": None}, r"lr=None: must be a finite number of 0 or more"),
    ({"lr": "0.1"}, r"lr='0.1': must be a finite number of 0 or more"),
    ({"lr": torch.tensor([0.1, 0.2])}, r"lr=tensor\(.*\): .* exactly one element"),
    ({"lr": torch.tensor(1)}, r"lr=tensor\(1\): .* float32 or float64"),
    ({"lr": torch.tensor(-0.1)}, r"lr=tensor\(-0.1000\): must be a finite number of 0 or more"),
    ({"betas": (1.0, 0.9)}, r"betas=\(1.0, 0.9\): must be two numbers of at least 0 and less"),
    ({"betas": (0.9, -0.1)}, r"betas=\(0.9, -0.1\): must be two numbers"),
    ({"betas": (0.9, math.nan)}, r"betas=\(0.9, nan\): must be two numbers"),
    ({"betas": (0.9,)}, r"betas=\(0.9,\): must be two numbers"),
    ({"betas": 0.9}, r"betas=0.9: must be two numbers"),
    ({"eps": 0.0}, r"eps=0.0: must be finite and at least 1.18e-38"),
    ({"eps": 1e-50}, r"eps=1e-50: must be finite and at least 1.18e-38"),
    ({"eps": math.inf}, r"eps=inf: must be"),
    ({"weight_decay": -0.1}, r"weight_decay=-0.1: must be a finite number of 0 or more"),
    ({"weight_decay": math.nan}, r"weight_decay=nan: must be"),
    ({"alpha": -0.1}, r"alpha=-0.1: must be a number of at least 0 and less than 1"),
    ({"alpha": 1.0}, r"alpha=1.0: must be a number of at least 0 and less than 1"),
    ({"alpha": math.nan}, r"alpha=nan: must be a number"),
    ({"window_size": 0}, r"window_size=0: must be an integer of 1 or more"),
    ({"window_size": 2.5}, r"window_size=2.5: must be an integer of 1 or more"),
    ({"window_size": True}, r"window_size=True: must be an integer of 1 or more"),
    ({"density": 0.0}, r"density=0.0: must be a number greater than 0 and at most 1"),
    ({"density": 1.5}, r"density=1.5: must be a number greater than 0 and at most 1"),
    ({"density": math.nan}, r"density=nan: must be a number greater than 0"),
    ({"bucket_size": 0}, r"bucket_size=0: must be an even integer of 2 or more"),
    ({"bucket_size": 63}, r"bucket_size=63: must be an even integer of 2 or more"),
    ({"bucket_size": 64.0}, r"bucket_size=64.0: must be an even integer of 2 or more"),
    ({"block_size": 100}, r"block_size=100: must be a multiple of bucket_size=64"),
    ({"block_size": 0}, r"block_size=0: must be a multiple of bucket_size=64"),
    ({"block_size": 65_536}, r"block_size=65536: .* at most 32768"),
    ({"stochastic_rounding": "yes"}, r"stochastic_rounding='yes': must be True or False"),
    ({"seed": -1}, r"seed=-1: must be an integer of at least 0 and less than 2\*\*64"),
    ({"seed": 2**64}, r"seed=18446744073709551616: must be an integer of at least 0"),
    ({"seed": 0.5}, r"seed=0.5: must be an integer"),
]


@pytest.mark.parametrize(("wrong", "message"), OUT_OF_RANGE, ids=lambda value: str(value)[:40])
def test_hyperparameter_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MicroAdam([torch.zeros(2)], **wrong)


@pytest.mark.parametrize(
    "wrong",
    [wrong for wrong, _ in OUT_OF_RANGE]
    + [
        {"params": [torch.zeros(2), torch.zeros(2, dtype=torch.float64)]},
        {"params": [torch.zeros(2), "weight"]},
        {"params": {torch.zeros(2)}},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(
    wrong: dict[str, Any], rng: np.random.Generator
) -> None:
    optimizer = new_optimizer(rng)
    set_random_gradients(optimizer, rng)
    optimizer.step()
    before, groups_before = clone_all(optimizer), copy.deepcopy(optimizer.param_groups)
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group({"params": [torch.zeros(2)]} | wrong)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0].keys() == groups_before[0].keys()
    assert_same(clone_all(optimizer), before)
    step_and_judge(optimizer)


@pytest.mark.parametrize("name", ["amsgrad", "differentiable", "maximize"])
def test_a_variant_that_there_is_not_is_refused(name: str) -> None:
    """Torch's optimizers take them in a group, where they would be silently ignored."""
    with pytest.raises(ValueError, match=f"{name}=True: MicroAdam has no such variant"):
        MicroAdam([{"params": [torch.zeros(2)], name: True}])
    MicroAdam([{"params": [torch.zeros(2)], name: False}])


def test_a_group_that_is_no_dictionary_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(TypeError, match="param_group must be a dict"):
        new_optimizer(rng).add_param_group([torch.zeros(2)])


def test_parameter_in_two_groups_is_refused(rng: np.random.Generator) -> None:
    optimizer = new_optimizer(rng)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": parameters_of(optimizer)})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "change", [{"window_size": 4}, {"density": 0.5}, {"block_size": 64}, {"bucket_size": 32}]
)
def test_geometry_cannot_change_once_there_is_a_state(
    change: dict[str, Any], rng: np.random.Generator
) -> None:
    optimizer = new_optimizer(rng, 300)
    set_random_gradients(optimizer, rng)
    optimizer.step()
    before = clone_all(optimizer)
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=r"cannot change once .* create a new optimizer"):
        optimizer.step()
    assert_same(clone_all(optimizer), before)


def test_a_memory_format_that_changes_after_the_first_step_is_refused() -> None:
    """The state is in storage order, so it would belong to other elements."""
    p = nn.Parameter(torch.randn(4, 3, 2, 2))
    optimizer = MicroAdam([p])
    p.grad = torch.randn(4, 3, 2, 2)
    optimizer.step()
    p.data = p.data.to(memory_format=torch.channels_last)
    before = p.detach().clone()
    with pytest.raises(ValueError, match="parameter 0 has another memory format"):
        optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize("is_saved_contiguous", [True, False])
@pytest.mark.parametrize("has_stepped", [False, True])
def test_a_checkpoint_of_another_memory_format_is_refused(
    is_saved_contiguous: bool, has_stepped: bool
) -> None:
    contiguous = torch.randn(4, 3, 2, 2)
    saved, other = contiguous, contiguous.to(memory_format=torch.channels_last)
    if not is_saved_contiguous:
        saved, other = other, saved
    optimizers = []
    for value in (saved, saved, other):
        p = nn.Parameter(value.clone())
        p.grad = torch.ones_like(p)
        optimizers.append(MicroAdam([p]))
    first, same, different = optimizers
    first.step()
    for optimizer in (same, different):
        if has_stepped:
            optimizer.step()
        optimizer.load_state_dict(first.state_dict())
    same.step()
    with pytest.raises(ValueError, match="parameter 0 has another memory format"):
        different.step()


def test_a_parameter_twice_in_a_group_is_refused() -> None:
    p = nn.Parameter(torch.ones(5))
    optimizer = MicroAdam([nn.Parameter(torch.ones(5))])
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match="a parameter appears twice in the group"),
    ):
        optimizer.add_param_group({"params": [p, p]})
    assert len(optimizer.param_groups) == 1


def test_state_on_another_device_is_named_with_the_remedy(rng: np.random.Generator) -> None:
    """This happens when a model is moved after its first step."""
    optimizer = new_optimizer(rng)
    set_random_gradients(optimizer, rng)
    optimizer.step()
    (p,) = parameters_of(optimizer)
    optimizer.state[p]["error"] = optimizer.state[p]["error"].to("meta")
    optimizer._caches.clear()
    with pytest.raises(ValueError, match=r"error .* on meta, .* on cpu: .*load_state_dict"):
        optimizer.step()


@pytest.mark.parametrize("name", ["window_values", "error_min", "error_max"])
def test_saved_state_that_is_not_finite_is_refused(name: str, rng: np.random.Generator) -> None:
    optimizer = new_optimizer(rng)
    set_random_gradients(optimizer, rng)
    optimizer.step()
    before, saved = clone_all(optimizer), copy.deepcopy(optimizer.state_dict())
    saved["state"][0][name].flatten()[-1] = math.nan
    with pytest.raises(ValueError, match=rf"{name} of parameter 0 .* holds a NaN .* damaged"):
        optimizer.load_state_dict(saved)
    assert_same(clone_all(optimizer), before)
