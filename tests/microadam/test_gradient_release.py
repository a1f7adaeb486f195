"""Stepping in the backward pass: the same bits as the plain step, or a clear refusal."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from microadam import MicroAdam, enable_gradient_release
from tests.microadam.helpers import DEVICES, SMALL_BLOCKS, assert_same, clone_all
from tests.processes import run_on_ranks

NUM_STEPS = 6  # more than a window
VOCABULARY, WIDTH = 60, 24


class TinyLanguageModel(nn.Module):
    """Embedding and head share their weight; every layer may be recomputed."""

    def __init__(self, use_reentrant: bool | None = None, is_tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)) for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.unused = nn.Parameter(torch.ones(5))
        if is_tied:
            self.head.weight = self.embedding.weight
        self.use_reentrant = use_reentrant  # None: no activation checkpointing

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in [*self.layers, self.head]:
            if self.use_reentrant is None:
                hidden = layer(hidden)
            else:
                hidden = checkpoint(layer, hidden, use_reentrant=self.use_reentrant)
        return hidden


class Run:
    """A model being trained; equal arguments give equal runs."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        use_reentrant: bool | None = None,
        is_tied: bool = True,
        is_sharded: bool = False,
        **arguments: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = TinyLanguageModel(use_reentrant, is_tied).to(device, dtype)
        if is_sharded:
            from torch.distributed.fsdp import fully_shard

            for module in (*self.model.layers, self.model):
                fully_shard(module)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": vectors, "lr": 3e-3}, {"params": matrices, "weight_decay": 0.1}]
        self.optimizer = MicroAdam(groups, lr=1e-2, **SMALL_BLOCKS | arguments)
        self.schedule = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCABULARY, (2, 9), generator=generator).to(self.model.unused.device)
        logits = self.model(tokens[:, :-1]).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def train(self, steps: range, clip: Callable[[Tensor], object] | None = None) -> Run:
        for step in steps:
            self.loss(step).backward()
            if clip is not None:
                for p in self.model.parameters():
                    if p.grad is not None:
                        clip(p)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        return self

    def released(self, **clipping: float) -> Run:
        self.handle = enable_gradient_release(self.model, self.optimizer, **clipping)
        return self

    def state_dicts(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in (self.model, self.optimizer, self.schedule)]

    def load(self, state_dicts: list[dict[str, Any]]) -> None:
        for part, state in zip(
            (self.model, self.optimizer, self.schedule), state_dicts, strict=True
        ):
            part.load_state_dict(state)


def assert_same_runs(ours: Run, theirs: Run) -> None:
    assert_same(clone_all(ours.optimizer), clone_all(theirs.optimizer))


ARGUMENTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "stochastic": {"dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 7},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use_reentrant", [None, False], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_the_same_bits_as_the_plain_step(
    arguments: dict[str, Any], use_reentrant: bool | None, device: str
) -> None:
    """Tied weights, a schedule for each group, and a parameter that never has a gradient."""
    arguments = {**arguments, "use_reentrant": use_reentrant, "device": device}
    plain = Run(**arguments).train(range(NUM_STEPS))
    assert_same_runs(Run(**arguments).released().train(range(NUM_STEPS)), plain)
    assert plain.optimizer.param_groups[0]["lr"] == pytest.approx(3e-3 / (1 + NUM_STEPS))


def test_the_older_kind_of_checkpoint_works_without_tied_weights() -> None:
    arguments = {"use_reentrant": True, "is_tied": False}
    plain = Run(**arguments).train(range(NUM_STEPS))
    assert_same_runs(Run(**arguments).released().train(range(NUM_STEPS)), plain)


def test_clipping_is_that_of_each_gradient_alone() -> None:
    def clip(p: Tensor) -> None:
        clip_grad_value_(p, 0.01)
        clip_grad_norm_(p, 0.02)

    plain = Run().train(range(NUM_STEPS), clip)
    assert_same_runs(
        Run().released(clip_value=0.01, max_param_grad_norm=0.02).train(range(NUM_STEPS)), plain
    )
    with pytest.raises(AssertionError):
        assert_same_runs(Run().released().train(range(NUM_STEPS)), plain)


def test_no_two_gradients_are_alive_together() -> None:
    run = Run(is_tied=False).released()
    parameters = [p for p in run.model.parameters() if p is not run.model.unused]
    alive: list[int] = []

    def count(_: Tensor) -> None:
        alive.append(sum(p.grad is not None and p.grad.data_ptr() != 0 for p in parameters))

    for p in parameters:
        p.register_post_accumulate_grad_hook(count)  # runs after the release
    run.loss(0).backward()
    assert alive == [0] * len(parameters)
    run.optimizer.step()
    assert all(p.grad is None for p in parameters)


def test_a_saved_run_goes_on_bit_for_bit_with_and_without_release() -> None:
    undisturbed = Run().train(range(NUM_STEPS))
    first = Run().released().train(range(4))
    for resumed in (Run().released(), Run()):
        resumed.train(range(50, 52))  # loading replaces whatever it did before
        resumed.load(first.state_dicts())
        assert_same_runs(resumed.train(range(4, NUM_STEPS)), undisturbed)


def test_a_nan_is_skipped_as_in_the_plain_step() -> None:
    runs = [Run(), Run().released()]
    for run in runs:
        run.train(range(2))
        hook = run.model.head.weight.register_hook(lambda grad: grad.index_fill(0, *ROW_OF_NANS))
        run.train(range(2, 4))
        hook.remove()
        run.train(range(4, 5))
    plain, released = runs
    assert_same_runs(released, plain)
    assert released.optimizer.num_skipped_blocks() == plain.optimizer.num_skipped_blocks() == 2


ROW_OF_NANS = (torch.tensor([0]), float("nan"))


def test_step_steps_what_was_not_released_and_runs_the_hooks() -> None:
    run = Run().released()
    late = nn.Parameter(torch.ones(70))
    run.optimizer.add_param_group({"params": [late]})
    run.schedule.base_lrs.append(1e-2)
    run.schedule.lr_lambdas.append(lambda step: 1.0)
    calls: list[str] = []
    run.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    (run.loss(0) + late.sum()).backward()
    assert (late == 1).all()
    assert late.grad is not None
    run.optimizer.step()
    assert calls == ["before", "after"]
    assert not (late == 1).all()
    assert all(int(state["step"]) == 1 for state in run.optimizer.state.values())


def test_the_schedule_counts_a_step_and_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    Run().released().train(range(2))
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_remove_brings_the_plain_step_back() -> None:
    run = Run().released()
    run.train(range(2))
    run.loss(2).backward()
    run.handle.remove()
    run.optimizer.step()  # nothing is left to step
    run.schedule.step()
    assert all(p.grad is None for p in run.model.parameters())
    run.train(range(3, NUM_STEPS))
    assert_same_runs(run, Run().train(range(NUM_STEPS)))
    run.released().train(range(NUM_STEPS, NUM_STEPS + 1))  # and it can be enabled again


# Several processes


def plain_and_released_rank(max_param_grad_norm: float | None) -> tuple[Any, Any]:
    """The shards and their state after steps with batches of this rank's own."""
    dist.init_process_group("gloo")
    steps = range(100 * dist.get_rank(), 100 * dist.get_rank() + NUM_STEPS)

    def clip(p: Tensor) -> None:
        if max_param_grad_norm is not None:
            clip_grad_norm_(p, max_param_grad_norm)

    runs = [
        Run(is_sharded=True, use_reentrant=False).train(steps, clip),
        Run(is_sharded=True, use_reentrant=False)
        .released(max_param_grad_norm=max_param_grad_norm)
        .train(steps),
    ]
    plain, released = (
        [
            {name: getattr(t, "_local_tensor", t) for name, t in tensors.items()}
            for tensors in clone_all(run.optimizer)
        ]
        for run in runs
    )
    runs[1].loss(0).backward()
    with pytest.raises(RuntimeError, match=r"a gradient that was released.*Instead use"):
        _clip_by_global_norm(runs[1])
    with pytest.raises(RuntimeError, match=r"a gradient that was released.*Instead use"):
        _accumulate(runs[1])
    return plain, released


@pytest.mark.distributed
@pytest.mark.parametrize("max_param_grad_norm", [None, 0.05])
def test_shards_are_stepped_with_the_sum_of_all_processes(
    max_param_grad_norm: float | None,
) -> None:
    """FSDP2 runs a shard's hook after the reduce-scatter."""
    ranks = run_on_ranks(2, plain_and_released_rank, max_param_grad_norm)
    for plain, released in ranks:
        assert_same(released, plain)
    shapes = [[tensors["parameter"].shape for tensors in plain] for plain, _ in ranks]
    assert shapes[0] != shapes[1]  # the bias of 5 is cut into 3 and 2


def refused_rank() -> None:
    run = Run().released()
    dist.init_process_group("gloo")
    wrapped_later = DistributedDataParallel(run.model)
    with pytest.raises(RuntimeError, match=r"a gradient that was released.*DDP need all"):
        wrapped_later(torch.zeros(1, 1).long()).sum().backward()
    run = Run()
    with pytest.raises(RuntimeError, match=r"in 2 processes would step.*fully_shard"):
        run.released()
    run.model = DistributedDataParallel(run.model)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"under DDP would step.*fully_shard"):
        run.released()


@pytest.mark.distributed
def test_gradients_that_ddp_would_average_afterwards_are_refused() -> None:
    run_on_ranks(2, refused_rank)


def offloaded_rank() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    # Stands in for a shard offloaded from GPUs to the CPU: its device is not that of its mesh.
    shard = DTensor.from_local(torch.ones(4, device="meta"), init_device_mesh("cpu", (1,)))
    model = nn.ParameterList([nn.Parameter(shard)])
    with pytest.raises(RuntimeError, match="without CPUOffloadPolicy"):
        enable_gradient_release(model, MicroAdam(model.parameters()))


@pytest.mark.distributed
def test_shards_that_are_offloaded_are_refused() -> None:
    run_on_ranks(1, offloaded_rank)


# What needs all gradients at once is refused


def _accumulate(run: Run) -> None:
    run.loss(1).backward()


def _clip_by_global_norm(run: Run) -> None:
    clip_grad_norm_(run.model.parameters(), 1.0)


def _unscale(run: Run) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    scaler.unscale_(run.optimizer)


def _step_with_a_scaler(run: Run) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    scaler.step(run.optimizer)


def _read(run: Run) -> None:
    run.model.head.weight.grad.norm()


@pytest.mark.parametrize(
    "use", [_accumulate, _clip_by_global_norm, _unscale, _step_with_a_scaler, _read]
)
def test_using_a_released_gradient_is_an_error_and_moves_nothing(
    use: Callable[[Run], None],
) -> None:
    """Each would silently go wrong: clipping would find no gradients and return a norm of 0."""
    run = Run().released()
    run.loss(0).backward()
    before = clone_all(run.optimizer)
    with pytest.raises(RuntimeError, match=r"a gradient that was released.*Instead use"):
        use(run)
    assert_same(clone_all(run.optimizer), before)
    run.optimizer.step()
    run.schedule.step()
    assert_same_runs(run.train(range(1, 3)), Run().train(range(3)))


def test_tied_weights_in_two_checkpoints_of_the_older_kind_are_an_error() -> None:
    """The embedding is outside the checkpoints, the head inside: one gradient in two parts."""
    with pytest.raises(RuntimeError, match=r"a gradient that was released.*use_reentrant=True"):
        Run(use_reentrant=True).released().train(range(1))


def test_a_closure_is_refused() -> None:
    run = Run().released()
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(closure\) under gradient release"):
        run.optimizer.step(lambda: 0.0)
    run.optimizer.step(closure=None)


def test_arguments_that_cannot_be_right_are_refused() -> None:
    run = Run()
    with pytest.raises(TypeError, match="optimizer is a SGD; gradient release needs a MicroAdam"):
        enable_gradient_release(run.model, torch.optim.SGD(run.model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds no parameter of the model"):
        enable_gradient_release(nn.Linear(3, 3), run.optimizer)
    for bounds in (
        {"clip_value": 0.0},
        {"max_param_grad_norm": -1.0},
        {"clip_value": float("nan")},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(bounds))}=.*must be greater than 0"):
            run.released(**bounds)
    run.loss(0).backward()
    with pytest.raises(RuntimeError, match="a gradient from an earlier backward pass"):
        run.released()
    run.optimizer.zero_grad()
    run.released()
    with pytest.raises(RuntimeError, match=r"already.*call remove\(\) of the handle from before"):
        run.released()


def test_another_optimizer_of_released_parameters_is_refused_until_the_first_lets_go() -> None:
    """This happens when a notebook cell is run again."""
    model = nn.Linear(4, 3)
    handle = enable_gradient_release(model, MicroAdam(model.parameters()))
    second = MicroAdam(model.parameters())
    with pytest.raises(RuntimeError, match="enabled for a parameter of the model already"):
        enable_gradient_release(model, second)
    handle.remove()
    enable_gradient_release(model, second)
    handle.remove()  # a second call must not end the second handle's release
    with pytest.raises(RuntimeError, match="enabled for a parameter of the model already"):
        enable_gradient_release(model, second)


def test_a_model_that_is_no_longer_used_is_freed_with_its_optimizers_state() -> None:
    """The hooks of its parameters kept both until the process ended: the next one did not fit."""
    run = Run().released().train(range(2))
    kept = [weakref.ref(p) for p in run.model.parameters()]
    kept += [weakref.ref(state["error"]) for state in run.optimizer.state.values()]
    del run
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)


def test_the_handle_need_not_be_kept_and_ends_with_the_optimizer() -> None:
    torch.manual_seed(0)
    model = nn.Linear(70, 3)
    before = model.weight.detach().clone()
    optimizer = MicroAdam(model.parameters())
    enable_gradient_release(model, optimizer)
    gc.collect()
    model(torch.ones(2, 70)).sum().backward()
    optimizer.step()
    moved = model.weight.detach().clone()
    assert not torch.equal(moved, before)
    del optimizer
    gc.collect()
    model(torch.ones(2, 70)).sum().backward()
    assert torch.equal(model.weight, moved)
    assert torch.equal(model.bias.grad, torch.full((3,), 2.0))
    model.zero_grad()
    enable_gradient_release(model, MicroAdam(model.parameters()))


def test_a_gradient_of_another_dtype_is_released() -> None:
    released, plain = (nn.Linear(70, 3, dtype=torch.bfloat16) for _ in range(2))
    plain.load_state_dict(released.state_dict())
    optimizers = []
    for model in (released, plain):
        for p in model.parameters():
            p.grad_dtype = torch.float32
        optimizers.append(MicroAdam(model.parameters()))
    enable_gradient_release(released, optimizers[0])
    for model, optimizer in zip((released, plain), optimizers, strict=True):
        model(torch.ones(2, 70, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    assert torch.equal(released.weight, plain.weight)


def test_a_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = MicroAdam(embedding.parameters())
    enable_gradient_release(embedding, optimizer)
    with pytest.raises(RuntimeError, match="is sparse"):
        embedding(torch.tensor([1])).sum().backward()


def test_a_parameter_that_the_backward_pass_still_needs_is_an_error_not_a_wrong_gradient() -> None:
    """Autograd does not wait for its use, detached, in an earlier layer, but must see it change."""
    weight = nn.Parameter(torch.eye(8))
    other = nn.Parameter(torch.ones(8))
    parameters = nn.ParameterList([weight, other])
    optimizer = MicroAdam(parameters.parameters())
    enable_gradient_release(parameters, optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (weight @ (weight.detach() @ other)).sum().backward()
