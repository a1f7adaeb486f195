"""MicroAdam as a `torch.optim` optimizer: everything around the arithmetic of a step."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from microadam import MicroAdam, reference
from tests.microadam.helpers import (
    DTYPES,
    SMALL_BLOCKS,
    assert_same,
    clone_all,
    new_optimizer,
    new_parameter,
    parameters_of,
    set_gradient,
    set_random_gradients,
)
from tests.microadam.judge import step_and_judge

# Training


def test_it_trains_a_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = MicroAdam(model.parameters(), lr=0.02, density=0.1)
    inputs = torch.randn(64, 8)
    targets = inputs.sum(dim=1, keepdim=True)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_dense_window_of_all_steps_is_adam(rng: np.random.Generator) -> None:
    """With every coordinate kept and no slot overwritten, the window holds Adam's moments."""
    start = rng.standard_normal(200)
    ours, theirs = (torch.tensor(start, dtype=torch.float32).requires_grad_() for _ in range(2))
    optimizers = [
        MicroAdam([ours], lr=0.01, density=1.0, window_size=8),
        torch.optim.Adam([theirs], lr=0.01),
    ]
    for _ in range(8):
        # bfloat16 numbers, because the window can store no others
        gradient = torch.from_numpy(rng.standard_normal(200)).bfloat16().float()
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# Parameters and groups


def test_groups_have_their_own_hyperparameters(rng: np.random.Generator) -> None:
    parameters = [new_parameter(numel, torch.float32, rng) for numel in (300, 200, 100)]
    groups = [
        {"params": [parameters[0]]},
        {"params": [parameters[1]], "lr": 0.1, "betas": (0.5, 0.6), "weight_decay": 0.2},
        {"params": [parameters[2]], "window_size": 2, "density": 0.2, "block_size": 64},
    ]
    optimizer = MicroAdam(groups, **SMALL_BLOCKS)
    for _ in range(4):
        set_random_gradients(optimizer, rng)
        step_and_judge(optimizer)
    assert optimizer.state[parameters[2]]["window_values"].shape == (2, 2, 13)


def test_group_added_later_counts_its_own_steps(rng: np.random.Generator) -> None:
    optimizer = new_optimizer(rng, 300)
    for _ in range(4):
        set_random_gradients(optimizer, rng)
        optimizer.step()
    optimizer.add_param_group({"params": [new_parameter(150, torch.bfloat16, rng)], "lr": 0.5})
    for _ in range(2):
        set_random_gradients(optimizer, rng)
        step_and_judge(optimizer)
    steps = [int(optimizer.state[p]["step"]) for p in parameters_of(optimizer)]
    assert steps == [6, 2]


def test_named_parameters() -> None:
    model = nn.Linear(8, 8)
    optimizer = MicroAdam(model.named_parameters())
    model(torch.ones(1, 8)).sum().backward()
    step_and_judge(optimizer)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_parameter_without_a_gradient_stays_and_counts_no_step(rng: np.random.Generator) -> None:
    optimizer = new_optimizer(rng, 300, 300)
    resting, moving = parameters_of(optimizer)
    for has_gradient in (True, False, True):
        set_random_gradients(optimizer, rng)
        if not has_gradient:
            resting.grad = None
        before = clone_all(optimizer)
        step_and_judge(optimizer)
        if not has_gradient:
            assert_same(clone_all(optimizer)[:1], before[:1])
    assert int(optimizer.state[resting]["step"]) == 2
    assert int(optimizer.state[moving]["step"]) == 3


def test_a_parameter_taken_out_of_its_group_is_let_go(rng: np.random.Generator) -> None:
    """The cache kept it alive, and state_bytes counted it, for as long as the optimizer lived."""
    optimizer = new_optimizer(rng, 300, 200, 100)
    set_random_gradients(optimizer, rng)
    optimizer.step()
    stays, gone, rests = optimizer.param_groups[0]["params"]
    all_bytes = optimizer.state_bytes()
    alone = MicroAdam([gone], **SMALL_BLOCKS)
    alone.step()

    optimizer.param_groups[0]["params"] = [stays, rests]
    assert optimizer.state_bytes() == all_bytes - alone.state_bytes() > 0
    del optimizer.state[gone], alone
    rests.grad = None
    reference_to_gone = weakref.ref(gone)
    del gone
    step_and_judge(optimizer)
    gc.collect()
    assert reference_to_gone() is None
    assert list(optimizer._caches) == [stays, rests]


def test_no_gradients_at_all(rng: np.random.Generator) -> None:
    optimizer = new_optimizer(rng)
    before = clone_all(optimizer)
    optimizer.step()
    assert_same(clone_all(optimizer), before)


def test_empty_scalar_and_one_element_parameters(rng: np.random.Generator) -> None:
    shapes = [(0,), (3, 0, 2), (), (1,), (1, 1, 1)]
    parameters = [torch.ones(shape).requires_grad_() for shape in shapes]
    optimizer = MicroAdam(parameters)
    for _ in range(12):
        set_random_gradients(optimizer, rng)
        step_and_judge(optimizer)
    assert all((p != 1).all() for p in parameters)


@pytest.mark.parametrize("grad_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_another_dtype(
    dtype: torch.dtype, grad_dtype: torch.dtype, rng: np.random.Generator
) -> None:
    optimizer = new_optimizer(rng, dtype=dtype)
    (p,) = parameters_of(optimizer)
    for _ in range(3):
        # float32 numbers: a float64 gradient is rounded to them first
        numbers = rng.standard_normal(300).astype(np.float32)
        set_gradient(p, numbers, grad_dtype)
        step_and_judge(optimizer)
        assert p.grad.dtype == grad_dtype


def in_memory_format(t: Tensor, name: str) -> Tensor:
    """The same numbers in another memory layout."""
    if name == "contiguous":
        return t.contiguous()
    if name == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if name == "transposed":
        return t.transpose(0, 3).contiguous().transpose(0, 3)
    with_gaps = torch.full((*t.shape[:2], 2 * t.shape[2], t.shape[3] + 1), 7.0)
    return with_gaps[:, :, ::2, :-1].copy_(t)


MEMORY_FORMATS = ("contiguous", "channels_last", "transposed", "with_gaps")


@pytest.mark.parametrize("grad_format", MEMORY_FORMATS)
@pytest.mark.parametrize("format_", MEMORY_FORMATS)
def test_any_memory_format(format_: str, grad_format: str, rng: np.random.Generator) -> None:
    """The gradient's may differ from its parameter's."""
    p = in_memory_format(torch.randn(5, 4, 3, 6), format_).requires_grad_()
    strides = p.stride()
    optimizer = MicroAdam([p], **SMALL_BLOCKS)
    for _ in range(4):
        gradient = torch.from_numpy(rng.standard_normal(p.shape)).float()
        p.grad = in_memory_format(gradient, grad_format)
        step_and_judge(optimizer)
    assert p.stride() == strides


def test_gaps_of_a_strided_parameter_are_not_written(rng: np.random.Generator) -> None:
    everything = torch.ones(100, 4)
    p = everything[:, 1:3].requires_grad_()
    optimizer = MicroAdam([p], lr=0.1, weight_decay=0.5)
    p.grad = torch.from_numpy(rng.standard_normal(p.shape)).float()
    step_and_judge(optimizer)
    assert (p != 1).all()
    assert (everything[:, [0, 3]] == 1).all()


def test_parameter_that_is_a_slice_of_a_larger_tensor(rng: np.random.Generator) -> None:
    everything = torch.ones(300)
    p = everything[100:200].requires_grad_()
    optimizer = MicroAdam([p], lr=0.1, weight_decay=0.5)
    set_gradient(p, rng.standard_normal(100))
    optimizer.step()
    assert (p != 1).all()
    assert (everything[:100] == 1).all()
    assert (everything[200:] == 1).all()


def test_result_does_not_depend_on_the_memory_format_of_the_gradient(
    rng: np.random.Generator,
) -> None:
    p = torch.randn(5, 4, 3, 6)
    gradient = torch.randn(5, 4, 3, 6)
    results = []
    for grad_format in MEMORY_FORMATS:
        copy_of_p = p.clone().requires_grad_()
        copy_of_p.grad = in_memory_format(gradient, grad_format)
        MicroAdam([copy_of_p], **SMALL_BLOCKS).step()
        results.append(copy_of_p.detach())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_not_touched(dtype: torch.dtype, rng: np.random.Generator) -> None:
    optimizer = new_optimizer(rng, dtype=dtype)
    (p,) = parameters_of(optimizer)
    set_random_gradients(optimizer, rng)
    gradient, before = p.grad, p.grad.clone()
    version = gradient._version
    optimizer.step()
    assert p.grad is gradient
    assert torch.equal(gradient, before)
    assert gradient._version == version


# Learning rate, decay, closure


def test_tensor_lr_is_the_float_lr(rng: np.random.Generator) -> None:
    """A scheduler writes into a tensor lr in place; the next step must see it."""
    float_lr = new_optimizer(rng, lr=0.5)
    tensor_lr = copy.deepcopy(float_lr)
    tensor_lr.param_groups[0]["lr"] = torch.tensor(0.5)
    for lr in (0.5, 0.25):
        float_lr.param_groups[0]["lr"] = lr
        tensor_lr.param_groups[0]["lr"].fill_(lr)
        set_random_gradients(float_lr, np.random.default_rng(1))
        set_random_gradients(tensor_lr, np.random.default_rng(1))
        float_lr.step()
        tensor_lr.step()
    assert_same(clone_all(tensor_lr), clone_all(float_lr))


SCHEDULERS: dict[str, Callable[[MicroAdam], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.8)],
        milestones=[2],
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.8)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=1e-3, max_lr=1e-2, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=7),
}


def test_every_scheduler_of_torch_is_tested() -> None:
    base_classes = {"LRScheduler"}
    assert SCHEDULERS.keys() == set(lr_scheduler.__all__) - base_classes


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float_lr", "tensor_lr"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name: str, lr: float | Tensor, rng: np.random.Generator) -> None:
    """Some also cycle betas; the judge takes lr and betas from the group at every step."""
    optimizer = new_optimizer(rng, lr=copy.deepcopy(lr))
    scheduler = SCHEDULERS[name](optimizer)
    rates = set()
    for _ in range(6):
        set_random_gradients(optimizer, rng)
        step_and_judge(optimizer)
        rates.add(float(optimizer.param_groups[0]["lr"]))
        if name == "ReduceLROnPlateau":
            scheduler.step(1.0)
        else:
            scheduler.step()
    assert len(rates) > 1, "the learning rate never changed"


def test_weight_decay_reaches_coordinates_outside_the_window(rng: np.random.Generator) -> None:
    """It is decoupled: p *= 1 - lr * weight_decay, in the window or not."""
    optimizer = new_optimizer(rng, lr=0.5, weight_decay=0.25)
    (p,) = parameters_of(optimizer)
    before = p.detach().clone()
    gradient = np.zeros(300)
    gradient[0] = 1.0
    set_gradient(p, gradient)
    step_and_judge(optimizer)
    assert torch.equal(p[20:128], before[20:128] * 0.875)


def test_closure_runs_with_gradients_and_its_loss_is_returned(rng: np.random.Generator) -> None:
    optimizer = new_optimizer(rng)
    (p,) = parameters_of(optimizer)
    before = p.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(before.square().sum().item())
    assert torch.equal(p.grad, 2 * before)
    assert not torch.equal(p, before)
    assert optimizer.step() is None


def test_step_hooks_run(rng: np.random.Generator) -> None:
    optimizer = new_optimizer(rng)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_of_the_process_changes_nothing(
    dtype: torch.dtype, rng: np.random.Generator
) -> None:
    """Models are often loaded under a default other than float32."""
    optimizer = new_optimizer(rng, 300, 65)
    torch.set_default_dtype(dtype)
    try:
        for _ in range(3):
            set_random_gradients(optimizer, rng)
            step_and_judge(optimizer)
    finally:
        torch.set_default_dtype(torch.float32)


def test_numbers_of_numpy_are_taken_as_python_computes_with_them(rng: np.random.Generator) -> None:
    given = {"density": np.float32(0.07), "window_size": np.int64(3), "eps": np.float32(1e-8)}
    optimizer = new_optimizer(rng, 100, **given)
    assert all(type(optimizer.param_groups[0][name]) in (int, float) for name in given)
    set_random_gradients(optimizer, rng)
    step_and_judge(optimizer)


# GradScaler


def scaled_backward(scaler: torch.amp.GradScaler, p: Tensor, factor: float) -> None:
    p.grad = None
    scaler.scale((p * p * factor).sum()).backward()


@pytest.mark.parametrize("unscales", [False, True])
def test_grad_scaler_gives_the_step_of_unscaled_gradients(unscales: bool) -> None:
    scaled = new_optimizer(np.random.default_rng(0), unscales=unscales)
    plain = new_optimizer(np.random.default_rng(0))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(4):
        (p,) = parameters_of(scaled)
        scaled_backward(scaler, p, 1.0)
        gradient = p.grad.clone()
        scaler.step(scaled)
        # Only the scaler divides it, in place.
        assert torch.equal(p.grad, gradient if unscales else gradient / 1024)
        scaler.update()
        (p,) = parameters_of(plain)
        p.grad = gradient / 1024
        plain.step()
    assert_same(clone_all(scaled), clone_all(plain))


@pytest.mark.parametrize("unscales", [False, True])
def test_grad_scaler_after_unscale(unscales: bool) -> None:
    """Clipping needs unscaled gradients; `step` must then not divide by the scale again."""
    unscaled = new_optimizer(np.random.default_rng(0), unscales=unscales)
    plain = new_optimizer(np.random.default_rng(0))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (p,) = parameters_of(unscaled)
    scaled_backward(scaler, p, 1.0)
    scaler.unscale_(unscaled)
    parameters_of(plain)[0].grad = p.grad.clone()
    scaler.step(unscaled)
    plain.step()
    assert_same(clone_all(unscaled), clone_all(plain))


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("num_steps", [0, 4])
def test_found_inf_changes_nothing(
    num_steps: int, unscale_first: bool, unscales: bool, rng: np.random.Generator
) -> None:
    """Not even a parameter whose own gradient is finite, its step count or the skip counter."""
    optimizer = new_optimizer(rng, 300, 300, unscales=unscales)
    good, bad = parameters_of(optimizer)
    for _ in range(num_steps):
        set_random_gradients(optimizer, rng)
        optimizer.step()
    before = clone_all(optimizer)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    set_gradient(good, rng.standard_normal(300))
    scaled_backward(scaler, bad, math.inf)
    if unscale_first:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()

    assert scaler.get_scale() == 512.0
    assert optimizer.num_skipped_blocks() == 0
    if num_steps:
        assert_same(clone_all(optimizer), before)
    else:
        assert torch.equal(good, before[0]["parameter"])
        assert torch.equal(bad, before[1]["parameter"])
        assert not any(t.any() for state in optimizer.state.values() for t in state.values())


# Non-finite gradients without a scaler


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 2.0**120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_block_with_a_non_finite_gradient_is_skipped(
    number: float, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    optimizer = new_optimizer(rng, 300, dtype=dtype, weight_decay=0.1, lr=0.5)
    (p,) = parameters_of(optimizer)
    for step in range(6):
        set_random_gradients(optimizer, rng)
        if step == 3:
            p.grad[130] = number
        before = p.detach().clone()
        step_and_judge(optimizer)
        moved = p != before
        is_skipped = step == 3
        assert moved[:128].any()
        assert moved[256:].any()
        assert moved[128:256].any() != is_skipped
    assert optimizer.num_skipped_blocks() == 1
    assert p.isfinite().all()


def test_the_largest_residual_does_not_shut_its_block_for_good(rng: np.random.Generator) -> None:
    """Rounded to bfloat16 it equalled the limit: every later step skipped the block."""
    optimizer = new_optimizer(rng, 64, dtype=torch.float32)
    (p,) = parameters_of(optimizer)
    p.grad = torch.full((64,), float(np.nextafter(np.float32(reference.MAX_MAGNITUDE), 0)))
    optimizer.step()
    p.grad = torch.zeros(64)
    for _ in range(3):
        optimizer.step()
    assert optimizer.num_skipped_blocks() == 0
    assert p.isfinite().all()


def test_skipped_blocks_are_counted_over_parameters_and_groups(rng: np.random.Generator) -> None:
    optimizer = new_optimizer(rng, 300, 300)
    optimizer.add_param_group({"params": [new_parameter(300, torch.bfloat16, rng)]})
    set_random_gradients(optimizer, rng)
    for p in parameters_of(optimizer):
        p.grad[[0, 299]] = math.nan
    optimizer.step()
    optimizer.step()
    assert optimizer.num_skipped_blocks() == 12


# Copies


def copy_by_pickle(optimizer: MicroAdam) -> MicroAdam:
    return pickle.loads(pickle.dumps(optimizer))


def copy_by_torch_save(optimizer: MicroAdam) -> MicroAdam:
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, copy_by_pickle, copy_by_torch_save])
@pytest.mark.parametrize("num_steps", [0, 2, 5])
def test_a_copy_goes_on_as_the_original(
    make_copy: Callable[[MicroAdam], MicroAdam], num_steps: int, rng: np.random.Generator
) -> None:
    original = new_optimizer(rng, 300, 1, dtype=torch.bfloat16, stochastic_rounding=True)
    for _ in range(num_steps):
        set_random_gradients(original, rng)
        original.step()
    duplicate = make_copy(original)
    assert_same(clone_all(duplicate), clone_all(original))
    before = clone_all(original)
    for p in parameters_of(duplicate):
        p.grad_dtype = None  # torch does not copy it
    for step in range(3):
        set_random_gradients(duplicate, np.random.default_rng(step))
        duplicate.step()
    assert_same(clone_all(original), before)
    for step in range(3):
        set_random_gradients(original, np.random.default_rng(step))
        original.step()
    assert_same(clone_all(duplicate), clone_all(original))
