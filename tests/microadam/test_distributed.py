"""Sharded parameters and state that moves between shardings.

The bug to prevent: torch.distributed.checkpoint stores a plain tensor once, whichever rank it comes
from. A sharded optimizer with plain state tensors saves rank 0's and silently loads it everywhere.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from microadam import MicroAdam
from microadam.distributed import Shard, assemble
from microadam.layout import layout_of
from tests.microadam.helpers import SMALL_BLOCKS, assert_same, new_parameter, set_gradient
from tests.processes import run_on_ranks

Tensors = list[dict[str, Tensor]]  # per parameter: itself and its state
GROUP = {**SMALL_BLOCKS, "betas": (0.9, 0.999)}


# State that moves between shardings, in one process.


def shards_of(num_rows: int, row_size: int, num_shards: int) -> list[Shard]:
    """Rows distributed as by FSDP2: like torch.chunk, then empty shards."""
    size = -(-num_rows // num_shards)
    cuts = [min(num_rows, rank * size) for rank in range(num_shards + 1)]
    return [
        Shard((num_rows, row_size), ((a, b), (0, row_size))) for a, b in itertools.pairwise(cuts)
    ]


def states_of(shards: list[Shard], num_steps: int, seed: int = 0) -> dict[Shard, Any]:
    """Each shard's state after some steps of its own."""
    rng = np.random.default_rng(seed)
    states = {}
    for shard in shards:
        p = new_parameter(shard.numel, torch.float32, rng)
        optimizer = MicroAdam([p], **SMALL_BLOCKS)
        for _ in range(num_steps):
            set_gradient(p, rng.standard_normal(shard.numel))
            optimizer.step()
        states[shard] = optimizer.state[p]
    return states


def decoded(states: dict[Shard, Any], window_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Error feedback ``(numel,)`` and window slots ``(window_size, numel)``, rows in order."""
    errors, windows = [], []
    for shard, state in states.items():
        layout = layout_of(shard.numel, GROUP)
        codes = state["error"].numpy().reshape(layout.num_buckets, 32)
        codes = np.concatenate([codes & 15, codes >> 4], axis=1)
        low, high = (state[f"error_{end}"].double().numpy()[:, None] for end in ("min", "max"))
        errors.append((codes * ((high - low) / 15) + low).ravel()[: shard.numel])
        window = np.zeros((window_size, shard.numel))
        for block in range(layout.num_blocks):
            length = min(layout.block_size, shard.numel - block * layout.block_size)
            for slot in range(window_size):
                k = layout.k_of(length)
                index = state["window_indices"][block, slot, :k].long().numpy()
                value = state["window_values"][block, slot, :k].double().numpy()
                np.add.at(window[slot], block * layout.block_size + index, value)
        windows.append(window)
    return np.concatenate(errors), np.concatenate(windows, axis=1)


@given(
    num_rows=st.integers(1, 12),
    row_size=st.integers(1, 150),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    num_steps=st.integers(1, 5),
)
def test_a_new_cut_keeps_what_the_state_means(
    num_rows: int, row_size: int, before: int, after: int, num_steps: int
) -> None:
    """Judged in NumPy: a block's largest entries stay, the rest go into the error feedback."""
    window_size, beta1 = GROUP["window_size"], GROUP["betas"][0]
    saved = states_of(shards_of(num_rows, row_size, before), num_steps)
    new = {shard: assemble(saved, shard, GROUP) for shard in shards_of(num_rows, row_size, after)}
    error, window = decoded(saved, window_size)
    new_error, new_window = decoded(new, window_size)
    assert {int(state["step"]) for state in new.values()} == {num_steps}

    dropped = window - new_window
    assert np.all((new_window == window) | (new_window == 0))
    first = 0
    for shard in new:
        layout = layout_of(shard.numel, GROUP)
        for start in range(first, first + shard.numel, layout.block_size):
            stop = min(start + layout.block_size, first + shard.numel)
            for slot in range(window_size):
                kept, lost = new_window[slot, start:stop], dropped[slot, start:stop]
                assert np.count_nonzero(kept) <= layout.k_of(stop - start)
                if lost.any():
                    assert np.count_nonzero(kept) == layout.k_of(stop - start)
                    assert abs(lost).max() <= abs(kept[kept != 0]).min()
        first += shard.numel

    age = (num_steps - 1 - np.arange(window_size)) % window_size
    weights = beta1 ** np.arange(window_size)
    unspent = np.array([weights[a + 1 :].sum() for a in age]) / weights.sum()
    expected = error + (unspent[:, None] * dropped).sum(axis=0)
    # Half a level of a bucket, and the rounding of its bounds to bfloat16.
    largest = abs(expected).max()
    assert abs(new_error - expected).max() <= 2 * largest * (0.5 / 15 + 2**-8) + 1e-30


@pytest.mark.parametrize("row_size", [128, 64])
def test_shards_that_cut_at_blocks_move_bit_for_bit(row_size: int) -> None:
    saved = states_of(shards_of(8, row_size, 2), num_steps=4)
    (whole,) = shards_of(8, row_size, 1)
    one = {whole: assemble(saved, whole, GROUP)}
    four = {shard: assemble(one, shard, GROUP) for shard in shards_of(8, row_size, 4)}
    two = [assemble(four, shard, GROUP) for shard in saved]
    assert_same(two, list(saved.values()))


def test_only_blocks_that_are_cut_anew_are_converted() -> None:
    """Shards of 5 and 4 rows of 50: the first one's blocks have the same position in the whole."""
    saved = states_of(shards_of(9, 50, 2), num_steps=4)
    first, _ = saved
    (whole,) = shards_of(9, 50, 1)
    state = assemble(saved, whole, GROUP)
    for name in ("window_indices", "window_values"):
        assert torch.equal(state[name][:1], saved[first][name][:1])
    assert torch.equal(state["error"][: 128 // 2], saved[first]["error"][: 128 // 2])
    assert not torch.equal(state["error"][128 // 2 : 256 // 2], saved[first]["error"][128 // 2 :])


def saved_dict(states: dict[Shard, Any]) -> dict[str, Any]:
    """A state dict of one parameter that holds these shards."""
    optimizer = MicroAdam([torch.zeros(1)], **SMALL_BLOCKS)
    state = {shard.name: shard_state for shard, shard_state in states.items()}
    return {**optimizer.state_dict(), "state": {0: state}}


def test_all_shards_of_a_parameter_load_into_the_whole() -> None:
    saved = states_of(shards_of(9, 50, 2), num_steps=4)
    p = torch.zeros(9, 50)
    optimizer = MicroAdam([p], **SMALL_BLOCKS)
    optimizer.load_state_dict(saved_dict(saved))
    assert_same([optimizer.state[p]], [assemble(saved, Shard.of(p), GROUP)])


def lose_a_shard(saved: dict[Shard, Any]) -> dict[Shard, Any]:
    return dict(list(saved.items())[:1])


def mix_two_checkpoints(saved: dict[Shard, Any]) -> dict[Shard, Any]:
    newer = states_of(list(saved), num_steps=5)
    return {**saved, list(saved)[1]: newer[list(saved)[1]]}


def save_a_part_twice(saved: dict[Shard, Any]) -> dict[Shard, Any]:
    """[0:5] and [0:3] but not rows 7 and 8: as many elements as the whole."""
    parts = [Shard((9, 50), (rows, (0, 50))) for rows in ((0, 5), (0, 3), (5, 6))]
    return states_of(parts, num_steps=4)


def take_a_larger_model(saved: dict[Shard, Any]) -> dict[Shard, Any]:
    return states_of(shards_of(11, 50, 2), num_steps=4)


def cut_the_columns(saved: dict[Shard, Any]) -> dict[Shard, Any]:
    halves = [Shard((9, 50), ((0, 9), columns)) for columns in ((0, 25), (25, 50))]
    return states_of(halves, num_steps=4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_shard, r"saved shards \[0:5, 0:50\] do not cover \[0:9, 0:50\]"),
        (mix_two_checkpoints, r"have taken \[4, 5\] steps: they are of different checkpoints"),
        (save_a_part_twice, "do not cover .* once"),
        (take_a_larger_model, r"'\[6:11, 0:50\]', which names no shard of .* \(9, 50\)"),
        (cut_the_columns, "only shards of whole rows, as FSDP2 makes them, can be recut"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_shards_that_do_not_make_the_parameter_are_refused(damage: Any, message: str) -> None:
    saved = damage(states_of(shards_of(9, 50, 2), num_steps=4))
    optimizer = MicroAdam([torch.zeros(9, 50)], **SMALL_BLOCKS)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved_dict(saved))
    assert not optimizer.state


# FSDP2 in several processes. 64-wide rows are cut between blocks if a shard holds an even number of
# them; the bias of one row leaves every rank but the first an empty shard.

STEPS_BEFORE, STEPS_AFTER = 4, 3
HYPERPARAMETERS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, **SMALL_BLOCKS}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(11, 64)
        self.hidden = torch.nn.Linear(64, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.out = torch.nn.Linear(16, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.norm(self.hidden(self.embedding(tokens)).relu())).sum()


def new_run(is_sharded: bool) -> tuple[torch.nn.Module, MicroAdam]:
    from torch.distributed.fsdp import fully_shard

    net = Net()
    if is_sharded:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        fully_shard(net.hidden)
        fully_shard(net)
    return net, MicroAdam(net.parameters(), **HYPERPARAMETERS)


def take_steps(net: torch.nn.Module, optimizer: MicroAdam, first: int, last: int) -> None:
    """Every rank takes the same batch, so that the mean gradient is each rank's."""
    for step in range(first, last):
        tokens = torch.randint(11, (5,), generator=torch.Generator().manual_seed(step))
        net(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def local_tensors(optimizer: MicroAdam) -> Tensors:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        {"parameter": getattr(p, "_local_tensor", p).detach(), **optimizer.state[p]}
        for p in parameters
    ]


def save(net: torch.nn.Module, optimizer: MicroAdam, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, state = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)


def load(net: torch.nn.Module, optimizer: MicroAdam, folder: Path) -> None:
    """As the docstring of `template` shows."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from microadam.distributed import template

    reader = dcp.FileSystemReader(folder)
    model, state = get_state_dict(net, optimizer)
    state["state"] = template(dict(net.named_parameters()), reader.read_metadata())
    dcp.load({"model": model, "optimizer": state}, storage_reader=reader)
    set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=state)


def test_template_of_a_parameter_in_another_memory_format(tmp_path: Path) -> None:
    """Its storage order is a list, which the checkpoint holds as bytes without a size."""

    def stepped(seed: int, num_steps: int) -> tuple[torch.nn.Module, MicroAdam]:
        torch.manual_seed(seed)
        net = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        optimizer = MicroAdam(net.parameters(), **SMALL_BLOCKS)
        for _ in range(num_steps):
            net(torch.randn(2, 3, 8, 8)).square().mean().backward()
            optimizer.step()
        return net, optimizer

    net, optimizer = stepped(seed=0, num_steps=3)
    save(net, optimizer, tmp_path)
    other_net, other = stepped(seed=1, num_steps=1)
    load(other_net, other, tmp_path)
    assert_same(local_tensors(other), local_tensors(optimizer))
    assert other.state[other_net.weight]["storage_order"] == [0, 2, 3, 1]


def partial_sum_rank() -> tuple[Tensor, Tensor]:
    """A parameter that every rank holds whole, with part of its gradient; and a plain twin."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    part = torch.randn(300, generator=torch.Generator().manual_seed(dist.get_rank()))
    whole = part.clone()
    dist.all_reduce(whole)
    p, twin = torch.ones(300), torch.ones(300)
    p_in_mesh = DTensor.from_local(p, mesh, [Replicate()]).requires_grad_()
    p_in_mesh.grad = DTensor.from_local(part, mesh, [Partial()])
    twin.grad = whole
    MicroAdam([p_in_mesh], lr=0.1).step()
    MicroAdam([twin], lr=0.1).step()
    return p, twin


@pytest.mark.distributed
def test_partial_sums_of_a_gradient_are_added_up() -> None:
    """Under sequence parallelism the gradient of a norm's weight is a partial sum."""
    for stepped, expected in run_on_ranks(2, partial_sum_rank):
        assert not torch.equal(expected, torch.ones(300))
        assert torch.equal(stepped, expected)


class Rank(NamedTuple):
    """What a rank reports."""

    shards: list[str]
    at_save: Tensors | None = None
    at_end: Tensors | None = None
    twin_at_end: Tensors | None = None
    at_load: Tensors | None = None
    from_one_file: Tensors | None = None


def saving_rank(folder: Path) -> Rank:
    """Alongside the sharded run, a twin steps this rank's shards as plain parameters."""
    net, optimizer = new_run(is_sharded=True)
    twins = [tensors["parameter"].clone() for tensors in local_tensors(optimizer)]
    twin = MicroAdam(twins, **HYPERPARAMETERS)

    def step_twin(*_: object) -> None:
        for own, p in zip(twins, net.parameters(), strict=True):
            own.grad = p.grad._local_tensor.clone()
        twin.step()

    optimizer.register_step_pre_hook(step_twin)
    take_steps(net, optimizer, 0, STEPS_BEFORE)
    save(net, optimizer, folder)
    at_save = copy.deepcopy(local_tensors(optimizer))
    take_steps(net, optimizer, STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER)
    return Rank(
        [Shard.of(p).name for p in net.parameters()],
        at_save,
        local_tensors(optimizer),
        local_tensors(twin),
    )


def resuming_rank(folder: Path, one_file: Path | None) -> Rank:
    net, optimizer = new_run(is_sharded=True)
    from_one_file = None
    if one_file:
        optimizer.load_state_dict(torch.load(one_file, weights_only=True))
        from_one_file = [dict(optimizer.state[p]) for p in net.parameters()]
    load(net, optimizer, folder)
    at_load = copy.deepcopy(local_tensors(optimizer))
    take_steps(net, optimizer, STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER)
    return Rank(
        [Shard.of(p).name for p in net.parameters()],
        at_load=at_load,
        at_end=local_tensors(optimizer),
        from_one_file=from_one_file,
    )


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("checkpoints") / "two"
    return folder, run_on_ranks(2, saving_rank, folder)


@pytest.mark.distributed
def test_a_sharded_step_is_the_step_of_each_shard(saved_by_two: tuple[Path, list[Any]]) -> None:
    """Uneven and empty shards, an embedding, a norm: each is stepped like a plain parameter."""
    for rank, saved in enumerate(saved_by_two[1]):
        assert saved.shards[0] == ("[0:6, 0:64]", "[6:11, 0:64]")[rank]
        assert saved.shards[-1] == ("[0:1]", "[1:1]")[rank]
        assert_same(saved.at_end, saved.twin_at_end)


@pytest.mark.distributed
def test_the_same_number_of_processes_resumes_bit_for_bit(
    saved_by_two: tuple[Path, list[Any]],
) -> None:
    folder, saved = saved_by_two
    resumed = run_on_ranks(2, resuming_rank, folder, None)
    for before, after in zip(saved, resumed, strict=True):
        assert_same(after.at_load, before.at_save)
        assert_same(after.at_end, before.at_end)


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # expected in one process
def test_a_checkpoint_moves_from_two_processes_to_one_to_four(
    saved_by_two: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    folder, saved = saved_by_two
    net, optimizer = new_run(is_sharded=False)
    load(net, optimizer, folder)
    whole = copy.deepcopy(local_tensors(optimizer))
    save(net, optimizer, tmp_path / "one")
    torch.save(optimizer.state_dict(), tmp_path / "one.pt")
    for index, p in enumerate(net.parameters()):
        parts = {
            Shard.named(rank.shards[index], tuple(p.shape)): rank.at_save[index] for rank in saved
        }
        assert_same([whole[index]], [expected_state(parts, Shard.of(p))])

    four = run_on_ranks(4, resuming_rank, tmp_path / "one", tmp_path / "one.pt")
    for index, p in enumerate(net.parameters()):
        for rank in four:
            shard = Shard.named(rank.shards[index], tuple(p.shape))
            expected = expected_state({Shard.of(p): whole[index]}, shard)
            parameter = {"parameter": expected["parameter"]}
            assert_same([rank.at_load[index]], [expected])
            assert_same([{**rank.from_one_file[index], **parameter}], [expected])
    take_steps(net, optimizer, STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER)
    assert all(torch.isfinite(p).all() for p in net.parameters())


def expected_state(parts: dict[Shard, dict[str, Tensor]], shard: Shard) -> dict[str, Tensor]:
    """For a shard: the rows themselves, and what `assemble` makes of the state."""
    parameter = torch.cat([part["parameter"] for part in parts.values()])
    rows = slice(*shard.bounds[0])
    states = {
        s: {name: value for name, value in part.items() if name != "parameter"}
        for s, part in parts.items()
    }
    return {"parameter": parameter[rows], **assemble(states, shard, GROUP)}
