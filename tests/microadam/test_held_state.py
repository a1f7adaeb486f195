"""What the optimizer keeps from step to step: the native library's lists of the state's tensors.

They made the step of many small parameters twice as fast. Each test changes something between two
steps that a list kept too long would miss: the step would then read and write old tensors.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from microadam import MicroAdam, ops
from tests.microadam.helpers import (
    SMALL_BLOCKS,
    assert_same,
    clone_all,
    new_optimizer,
    new_parameter,
    parameters_of,
    set_random_gradients,
)
from tests.microadam.judge import step_and_judge

STATE_KEYS = ("step", "window_indices", "window_values", "error", "error_min", "error_max")

needs_native = pytest.mark.skipif(
    not ops.native_kernel("cpu"), reason=f"no native library: {ops.load_native_library()}"
)


@pytest.fixture
def optimizer(rng: np.random.Generator) -> MicroAdam:
    """Two groups of two parameters after two steps."""
    optimizer = new_optimizer(rng, 300, 130)
    late = [new_parameter(numel, torch.float32, rng) for numel in (70, 5)]
    optimizer.add_param_group({"params": late, "lr": 0.1})
    take_steps(optimizer, rng)
    return optimizer


def take_steps(optimizer: MicroAdam, rng: np.random.Generator, num_steps: int = 2) -> None:
    for _ in range(num_steps):
        set_random_gradients(optimizer, rng)
        step_and_judge(optimizer)


def state_of(optimizer: MicroAdam, index: int = 1) -> dict[str, Any]:
    return optimizer.state[parameters_of(optimizer)[index]]


@needs_native
def test_it_is_held(optimizer: MicroAdam, rng: np.random.Generator) -> None:
    """Otherwise every test below would pass vacuously."""
    before = optimizer._held_states
    assert len(before) == 2
    assert None not in before
    take_steps(optimizer, rng)
    assert all(map(lambda a, b: a is b, optimizer._held_states, before))


def replace_dictionary(optimizer: MicroAdam) -> None:
    p = parameters_of(optimizer)[1]
    optimizer.state[p] = copy.deepcopy(optimizer.state[p])


def forget_state(optimizer: MicroAdam) -> None:
    del optimizer.state[parameters_of(optimizer)[1]]


def load_own_state(optimizer: MicroAdam) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def change_order(optimizer: MicroAdam) -> None:
    optimizer.param_groups[0]["params"].reverse()


def change_order_of_groups(optimizer: MicroAdam) -> None:
    optimizer.param_groups.reverse()


def take_out_parameter(optimizer: MicroAdam) -> None:
    del optimizer.param_groups[0]["params"][0]


def take_out_group(optimizer: MicroAdam) -> None:
    del optimizer.param_groups[0]


def add_group(optimizer: MicroAdam) -> None:
    numbers = np.random.default_rng(1)
    new = [new_parameter(numel, torch.float32, numbers) for numel in (80, 90)]
    optimizer.add_param_group({"params": new})


def exchange_states(optimizer: MicroAdam) -> None:
    """Of equal shape, so that only object identity tells them apart."""
    p, q = optimizer.param_groups[0]["params"]
    twin = q.detach().clone().requires_grad_()
    optimizer.param_groups[0]["params"][0] = twin
    optimizer.state[twin] = optimizer.state.pop(q)
    optimizer.state[q] = {name: t.clone() for name, t in optimizer.state[twin].items()}
    del optimizer.state[p]


CHANGES = (
    replace_dictionary,
    forget_state,
    load_own_state,
    change_order,
    change_order_of_groups,
    take_out_parameter,
    take_out_group,
    add_group,
    exchange_states,
)


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_step_is_right_after(
    change: Callable[[MicroAdam], None], optimizer: MicroAdam, rng: np.random.Generator
) -> None:
    change(optimizer)
    take_steps(optimizer, rng)


@pytest.mark.parametrize("name", STATE_KEYS)
def test_a_replaced_tensor_is_the_one_that_is_stepped(
    name: str, optimizer: MicroAdam, rng: np.random.Generator
) -> None:
    state = state_of(optimizer)
    old, state[name] = state[name], state[name].clone()
    before = old.clone()
    take_steps(optimizer, rng)
    assert torch.equal(old, before)


@pytest.mark.parametrize("name", STATE_KEYS)
def test_a_tensor_with_another_storage_is_stepped_there(
    name: str, optimizer: MicroAdam, rng: np.random.Generator
) -> None:
    """As after ``t.data = t.data.to(...)``, a common way to move state: the object is the same."""
    tensor = state_of(optimizer)[name]
    old_storage = tensor.detach()
    tensor.data = tensor.clone()
    before = old_storage.clone()
    take_steps(optimizer, rng)
    assert torch.equal(old_storage, before)


def test_a_parameter_with_another_storage_is_stepped_there(
    optimizer: MicroAdam, rng: np.random.Generator
) -> None:
    p = parameters_of(optimizer)[1]
    old_storage = p.data
    p.data = p.data.clone()
    before = old_storage.clone()
    take_steps(optimizer, rng)
    assert torch.equal(old_storage, before)


def test_gradients_that_come_and_go(optimizer: MicroAdam, rng: np.random.Generator) -> None:
    for index in (0, 1, 3, 0):
        set_random_gradients(optimizer, rng)
        parameters_of(optimizer)[index].grad = None
        step_and_judge(optimizer)
        take_steps(optimizer, rng, num_steps=1)


def test_a_gradient_of_another_dtype_changes_the_batches(
    optimizer: MicroAdam, rng: np.random.Generator
) -> None:
    for _ in range(2):
        set_random_gradients(optimizer, rng)
        p = parameters_of(optimizer)[1]
        p.grad = p.grad.bfloat16()
        step_and_judge(optimizer)
        take_steps(optimizer, rng, num_steps=1)


def test_a_deep_copy_shares_nothing_with_the_original(
    optimizer: MicroAdam, rng: np.random.Generator
) -> None:
    duplicate = copy.deepcopy(optimizer)
    before = clone_all(optimizer)
    for p in parameters_of(duplicate):
        p.grad_dtype = None  # torch does not copy it
    take_steps(duplicate, rng)
    assert_same(clone_all(optimizer), before)
    before = clone_all(duplicate)
    take_steps(optimizer, rng)
    assert_same(clone_all(duplicate), before)


def shorten(state: dict[str, Tensor]) -> None:
    state["error"] = state["error"][:-1]


def shorten_in_place(state: dict[str, Tensor]) -> None:
    state["error"].resize_(state["error"].numel() - 1)


def free_in_place(state: dict[str, Tensor]) -> None:
    state["error"].set_()


def change_dtype_in_place(state: dict[str, Tensor]) -> None:
    state["error_min"].data = state["error_min"].half()


@needs_native
@pytest.mark.parametrize(
    "damage", [shorten, shorten_in_place, free_in_place, change_dtype_in_place]
)
def test_what_is_held_is_checked_at_every_step(
    damage: Callable[[dict[str, Tensor]], None], optimizer: MicroAdam, rng: np.random.Generator
) -> None:
    damage(state_of(optimizer))
    before = clone_all(optimizer)
    set_random_gradients(optimizer, rng)
    with pytest.raises(RuntimeError, match=r"must have|has the wrong dtype"):
        optimizer.step()
    assert_same(clone_all(optimizer), before)


def test_what_was_replaced_is_let_go(optimizer: MicroAdam, rng: np.random.Generator) -> None:
    """At the next step, and by load_state_dict at once: two states might not fit in memory."""
    old = weakref.ref(state_of(optimizer)["error"])
    replace_dictionary(optimizer)
    take_steps(optimizer, rng)
    gc.collect()
    assert old() is None

    old = weakref.ref(state_of(optimizer)["error"])
    load_own_state(optimizer)
    gc.collect()
    assert old() is None


def test_a_large_state_is_not_held(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users who move it to the CPU while a model generates text need its memory immediately."""
    monkeypatch.setattr(ops, "MAX_HELD_BYTES", 1000)
    optimizer = new_optimizer(rng, 1000, 1000)
    take_steps(optimizer, rng)
    assert optimizer._held_states == [None]
    old = weakref.ref(state_of(optimizer)["error"])
    replace_dictionary(optimizer)
    gc.collect()
    assert old() is None


def test_an_optimizer_is_freed_with_all_it_holds(rng: np.random.Generator) -> None:
    optimizer = new_optimizer(rng, 300, 130)
    take_steps(optimizer, rng)
    old = weakref.ref(state_of(optimizer)["error"])
    del optimizer
    gc.collect()
    assert old() is None


def test_steps_of_fake_tensors_hold_nothing() -> None:
    """Memory planning steps a model under FakeTensorMode, where native code has no tensors."""
    with torch._subclasses.FakeTensorMode():
        parameters = [torch.nn.Parameter(torch.randn(300)) for _ in range(2)]
        optimizer = MicroAdam(parameters, **SMALL_BLOCKS)
        for _ in range(2):
            for p in parameters:
                p.grad = torch.randn(300)
            optimizer.step()
    assert optimizer._held_states == [None]


@needs_native
@pytest.mark.parametrize(
    "fake",
    [
        lambda handle: handle.clone(),
        lambda handle: handle[:-1],
        lambda handle: torch.zeros_like(handle),
        lambda handle: handle.view(torch.int64),
    ],
)
def test_native_code_takes_no_other_tensor_for_what_it_holds(
    fake: Callable[[Tensor], Tensor], optimizer: MicroAdam
) -> None:
    held = optimizer._held_states[0]
    optimizer._held_states[0] = held._replace(handle=fake(held.handle))
    with pytest.raises(RuntimeError, match="what microadam::hold_state returned"):
        optimizer.step()
