"""Saving and loading: the state keeps its dtypes, and a resumed run equals an uninterrupted one.

Other optimizers with integer state have shipped this bug: `Optimizer.load_state_dict` casts every
state tensor to the parameter's dtype, so indices became bfloat16 (257 -> 256) and the first step
after resuming took the loss from 2.4 to 1785.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from microadam import MicroAdam
from tests.microadam.helpers import (
    DTYPES,
    SMALL_BLOCKS,
    assert_same,
    clone_all,
    new_parameter,
    parameters_of,
    set_random_gradients,
)

NUM_STEPS = 9
SIZES = (700, 1, 0, 129)


def new_run(dtype: torch.dtype) -> MicroAdam:
    """An optimizer with two groups; indices above 256 occur, which bfloat16 cannot all hold."""
    rng = np.random.default_rng(0)
    parameters = [new_parameter(numel, dtype, rng) for numel in SIZES]
    hyperparameters = SMALL_BLOCKS | {"block_size": 512, "stochastic_rounding": True}
    groups = [
        {"params": parameters[:2]},
        {"params": parameters[2:], "lr": 0.01, "weight_decay": 0.1, "window_size": 4},
    ]
    return MicroAdam(groups, **hyperparameters)


def take_steps(optimizer: MicroAdam, first: int, last: int) -> None:
    for step in range(first, last):
        set_random_gradients(optimizer, np.random.default_rng(step))
        optimizer.step()


def save(optimizer: MicroAdam, path: Path) -> None:
    parameters = [p.detach() for p in parameters_of(optimizer)]
    torch.save({"parameters": parameters, "optimizer": optimizer.state_dict()}, path)


def load(path: Path, dtype: torch.dtype) -> MicroAdam:
    saved = torch.load(path, weights_only=True)
    optimizer = new_run(dtype)
    for p, value in zip(parameters_of(optimizer), saved["parameters"], strict=True):
        p.data.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    return optimizer


def resume_all(folder: Path) -> None:
    """Finishes every run in a folder; the fresh process of the test below."""
    for path in sorted(folder.glob("*.pt")):
        dtype_name, step = path.stem.split("-")
        optimizer = load(path, getattr(torch, dtype_name))
        take_steps(optimizer, int(step), NUM_STEPS)
        torch.save(clone_all(optimizer), folder / f"{path.stem}.resumed")


def test_a_fresh_process_resumes_bit_for_bit(tmp_path: Path) -> None:
    """In every dtype: before the first step, mid-window, at the end of a window, and after it."""
    uninterrupted = {}
    for dtype in DTYPES:
        optimizer = new_run(dtype)
        dtype_name = str(dtype).removeprefix("torch.")
        for step in range(NUM_STEPS):
            if step in (0, 2, 3, 7):
                save(optimizer, tmp_path / f"{dtype_name}-{step}.pt")
            take_steps(optimizer, step, step + 1)
        uninterrupted[dtype_name] = clone_all(optimizer)
    code = (
        "import pathlib, sys; from tests.microadam.test_checkpoint import resume_all;"
        "resume_all(pathlib.Path(sys.argv[1]))"
    )
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    resumed = sorted(tmp_path.glob("*.resumed"))
    assert len(resumed) == 4 * len(DTYPES)
    for path in resumed:
        assert_same(torch.load(path, weights_only=True), uninterrupted[path.stem.split("-")[0]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_state_tensor_keeps_its_dtype_and_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    optimizer = new_run(dtype)
    take_steps(optimizer, 0, 5)
    assert optimizer.state_dict()["state"][0]["window_indices"].max() > 256
    save(optimizer, tmp_path / "checkpoint.pt")
    assert_same(clone_all(load(tmp_path / "checkpoint.pt", dtype)), clone_all(optimizer))


def test_loaded_state_is_a_copy() -> None:
    """A step of the loaded optimizer must not change what was loaded."""
    source, target = new_run(torch.float32), new_run(torch.float32)
    take_steps(source, 0, 2)
    target.load_state_dict(source.state_dict())
    before = clone_all(source)
    take_steps(target, 2, 4)
    assert_same(clone_all(source), before)


def test_loaded_state_lies_contiguously() -> None:
    """The kernels index the state as flat arrays, but a saved view may have other strides."""
    source, target = new_run(torch.float32), new_run(torch.float32)
    take_steps(source, 0, 2)
    saved = copy.deepcopy(source.state_dict())
    indices = saved["state"][0]["window_indices"]
    saved["state"][0]["window_indices"] = indices.mT.contiguous().mT
    target.load_state_dict(saved)
    p = target.param_groups[0]["params"][0]
    assert target.state[p]["window_indices"].is_contiguous()
    assert torch.equal(target.state[p]["window_indices"], indices)


def test_hyperparameters_come_from_the_checkpoint() -> None:
    source, target = new_run(torch.float32), new_run(torch.float32)
    source.param_groups[1]["lr"] = 0.123
    target.load_state_dict(source.state_dict())
    assert [group["lr"] for group in target.param_groups] == [1e-3, 0.123]


def test_parameters_that_never_had_a_gradient_have_no_state_to_load() -> None:
    source, target = new_run(torch.float32), new_run(torch.float32)
    set_random_gradients(source, np.random.default_rng(0))
    source.param_groups[0]["params"][1].grad = None
    source.step()
    assert not source.state[source.param_groups[0]["params"][1]]  # the lookup creates an empty one
    target.load_state_dict(source.state_dict())
    assert 1 not in target.state_dict()["state"]
    take_steps(target, 1, 2)


def test_rates_of_numpy_do_not_stop_loading(tmp_path: Path) -> None:
    """A grid of np.logspace yields NumPy scalars, which weights_only refuses."""
    p = torch.zeros(3, requires_grad=True)
    rates = {"lr": np.float64(1e-3), "betas": (np.float64(0.9), np.float64(0.99))}
    torch.save(MicroAdam([p], **rates).state_dict(), tmp_path / "state.pt")
    (group,) = torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"]
    assert (group["lr"], group["betas"]) == (1e-3, (0.9, 0.99))


def test_a_rate_that_a_schedule_took_below_zero_by_a_rounding_loads() -> None:
    source, target = new_run(torch.float32), new_run(torch.float32)
    schedule = torch.optim.lr_scheduler.LinearLR(source, end_factor=0.0, total_iters=7)
    for step in range(7):
        take_steps(source, step, step + 1)
        schedule.step()
    rate = source.param_groups[0]["lr"]
    assert -1e-15 < rate < 0
    target.load_state_dict(source.state_dict())
    assert target.param_groups[0]["lr"] == rate
    source.param_groups[0]["lr"] = -0.01 * source.param_groups[0]["initial_lr"]
    with pytest.raises(ValueError, match=r"lr=-\S+: must be a finite number of 0 or more"):
        target.load_state_dict(source.state_dict())


def test_save_hooks_see_and_change_what_is_saved() -> None:
    optimizer = new_run(torch.float32)
    take_steps(optimizer, 0, 1)
    optimizer.register_state_dict_post_hook(
        lambda _, saved: {"state": {f"p{i}": state for i, state in saved["state"].items()}}
    )
    saved = optimizer.state_dict()
    assert saved.keys() == {"state"}
    assert saved["state"].keys() == {f"p{i}" for i in range(len(SIZES))}


def test_load_hooks_see_and_change_the_whole_state() -> None:
    source, target = new_run(torch.float32), new_run(torch.float32)
    take_steps(source, 0, 2)
    seen = {}

    def pre_hook(_: object, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen["before"] = len(state_dict["state"])
        changed = copy.deepcopy(state_dict)
        changed["state"][0]["step"] += 40
        return changed

    def post_hook(optimizer: MicroAdam) -> None:
        seen["after"] = len(optimizer.state)

    target.register_load_state_dict_pre_hook(pre_hook)
    target.register_load_state_dict_post_hook(post_hook)
    target.load_state_dict(source.state_dict())
    assert seen == {"before": len(SIZES), "after": len(SIZES)}
    assert target.state_dict()["state"][0]["step"] == 42


def test_loading_keeps_the_count_of_skipped_blocks() -> None:
    optimizer = new_run(torch.float32)
    set_random_gradients(optimizer, np.random.default_rng(0))
    optimizer.param_groups[0]["params"][1].grad.fill_(torch.nan)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.num_skipped_blocks() == 1


def test_state_bytes_is_what_the_tensors_take(tmp_path: Path) -> None:
    optimizer = new_run(torch.bfloat16)
    assert optimizer.state_bytes() == 0
    take_steps(optimizer, 0, 2)

    def bytes_of_tensors(optimizer: MicroAdam) -> int:
        tensors = [t for state in optimizer.state.values() for t in state.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    # Besides the state, a kernel may keep one float32 per block, which a checkpoint leaves out.
    num_blocks = sum(state["window_indices"].shape[0] for state in optimizer.state.values())
    assert optimizer.state_bytes() == bytes_of_tensors(optimizer) + 4 * num_blocks > 0
    save(optimizer, tmp_path / "checkpoint.pt")
    loaded = load(tmp_path / "checkpoint.pt", torch.bfloat16)
    assert loaded.state_bytes() == bytes_of_tensors(loaded) == bytes_of_tensors(optimizer)


# Wrong checkpoints. Each function damages a good one; the error says what is wrong with it.


def remove_a_group(saved: dict[str, Any]) -> None:
    saved["param_groups"].pop()


def remove_a_parameter(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"].pop()


def remove_a_tensor(saved: dict[str, Any]) -> None:
    del saved["state"][0]["error"]


def add_a_tensor(saved: dict[str, Any]) -> None:
    saved["state"][0]["exp_avg"] = torch.zeros(3)


def cast_the_indices(saved: dict[str, Any]) -> None:
    """What other tools do to a state dict that they load."""
    saved["state"][0]["window_indices"] = saved["state"][0]["window_indices"].bfloat16()


def replace_a_tensor_by_a_number(saved: dict[str, Any]) -> None:
    saved["state"][0]["step"] = 2


def truncate_the_error(saved: dict[str, Any]) -> None:
    saved["state"][0]["error"] = saved["state"][0]["error"][:-1]


def change_the_density(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["density"] = 0.5


def change_the_lr_to_nan(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["lr"] = float("nan")


def remove_a_hyperparameter(saved: dict[str, Any]) -> None:
    del saved["param_groups"][0]["bucket_size"]


def point_out_of_the_block(saved: dict[str, Any]) -> None:
    """In the shorter last block of 188 elements a kernel would write past the parameter's end."""
    saved["state"][0]["window_indices"][1, 0, 0] = 188


def point_before_the_block(saved: dict[str, Any]) -> None:
    saved["state"][0]["window_indices"][0, 1, 0] = -1


def take_back_steps(saved: dict[str, Any]) -> None:
    saved["state"][0]["step"].fill_(-3)


def remove_the_state(saved: dict[str, Any]) -> None:
    del saved["state"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_a_group, r"groups of \[2\] parameters, this optimizer of \[2, 2\]"),
        (remove_a_parameter, r"groups of \[1, 2\] parameters, this optimizer of \[2, 2\]"),
        (remove_a_tensor, "parameter 0 has the entries .* written by another optimizer"),
        (add_a_tensor, "parameter 0 has the entries .* written by another optimizer"),
        (
            cast_the_indices,
            "window_indices of parameter 0 .* is torch.bfloat16 .*expected torch.int16",
        ),
        (replace_a_tensor_by_a_number, "step of parameter 0 .* is int, expected torch.int64"),
        (truncate_the_error, r"error of parameter 0 .* \(351,\), expected .* \(352,\)"),
        (change_the_density, "window_indices of parameter 0 .* other hyperparameters"),
        (change_the_lr_to_nan, "lr=nan: must be a finite number of 0 or more"),
        (remove_a_hyperparameter, "has no bucket_size: it was written by another optimizer"),
        (point_out_of_the_block, "window_indices of parameter 0 .* to 188 in a block of 188"),
        (point_before_the_block, "window_indices of parameter 0 .* from -1"),
        (take_back_steps, "step of parameter 0 .* is -3"),
        (remove_the_state, "not state and param_groups: pass what"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_checkpoint_is_refused_and_nothing_changes(damage: Any, message: str) -> None:
    source, target = new_run(torch.float32), new_run(torch.float32)
    take_steps(source, 0, 5)
    take_steps(target, 0, 2)
    before, groups_before = clone_all(target), copy.deepcopy(target.state_dict()["param_groups"])
    saved = copy.deepcopy(source.state_dict())
    damage(saved)
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(saved)
    assert_same(clone_all(target), before)
    assert target.state_dict()["param_groups"] == groups_before
    take_steps(target, 2, 3)


@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_checkpoint_of_adamw_is_refused(num_steps: int) -> None:
    source, target = new_run(torch.float32), new_run(torch.float32)
    adamw = torch.optim.AdamW([{"params": group["params"]} for group in source.param_groups])
    for _ in range(num_steps):
        set_random_gradients(adamw, np.random.default_rng(0))
        adamw.step()
    with pytest.raises(ValueError, match="written by another optimizer"):
        target.load_state_dict(adamw.state_dict())
    assert not target.state
