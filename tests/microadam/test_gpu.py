"""The CUDA step on a GPU: the same steps as plain torch and the CPU core, in every setting that
only a GPU offers. What needs no GPU is tested in test_cuda_emulation.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from microadam import MicroAdam, ops
from tests.microadam.agreement import Hyperparameters, Run, step_and_compare
from tests.microadam.helpers import (
    DTYPES,
    assert_same,
    clone_all,
    new_parameter,
    parameters_of,
    set_gradient,
)
from tests.microadam.test_native import KINDS, draw

pytestmark = pytest.mark.gpu

SIZES = [1, 63, 64, 65, 4095, 4096, 4097, 0, 300_000, 5 * 4096]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def draw_all(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [draw(n, dtype, generator).cuda() for n in SIZES]


def new_optimizer(rng: np.random.Generator, *sizes: int, **settings: Any) -> MicroAdam:
    params = [new_parameter(n, torch.float32, rng, "cuda") for n in sizes]
    return MicroAdam(params, **settings)


def set_gradients(optimizer: MicroAdam, seed: int, scale: float = 1.0) -> None:
    rng = np.random.default_rng(seed)
    for p in parameters_of(optimizer):
        set_gradient(p, scale * rng.standard_normal(p.numel()))


def twin_of(optimizer: MicroAdam, device: str = "cuda") -> MicroAdam:
    """Another optimizer with copies of the parameters and of the state."""
    group = {k: v for k, v in optimizer.param_groups[0].items() if k in optimizer.defaults}
    params = [p.detach().to(device, copy=True).requires_grad_() for p in parameters_of(optimizer)]
    twin = MicroAdam(params, **{k: v for k, v in group.items() if k != "differentiable"})
    twin.load_state_dict(optimizer.state_dict())
    return twin


def test_native_kernel_runs_here() -> None:
    """Otherwise every test below would compare plain torch with itself."""
    assert ops.native_kernel("cuda") == "CUDA", ops.load_native_library()


def test_first_step_tests_the_kernel(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that runs but does nothing is caught before it has trained anything."""
    optimizer = new_optimizer(rng, 5000, window_size=7)  # a geometry that no other test has used
    before = clone_all(optimizer)
    set_gradients(optimizer, 0)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "step_", lambda args: None)
        with pytest.raises(RuntimeError, match="differ on cuda:0"):
            optimizer.step()
    assert torch.equal(parameters_of(optimizer)[0], before[0]["parameter"])
    optimizer.step()
    assert not torch.equal(parameters_of(optimizer)[0], before[0]["parameter"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "hyper",
    [
        Hyperparameters(),
        Hyperparameters(weight_decay=0.1, lr=0.1, stochastic_rounding=True, seed=2**64 - 1),
        Hyperparameters(alpha=0.3, lr=0.1),
        Hyperparameters(density=0.07, window_size=12),
        Hyperparameters(density=1.0, window_size=2),
        Hyperparameters(block_size=8192 + 128, bucket_size=128),
        Hyperparameters(block_size=32768, density=0.5),
    ],
    ids=str,
)
def test_steps_agree_with_plain_torch(
    hyper: Hyperparameters, dtype: torch.dtype, generator: torch.Generator
) -> None:
    run = Run(hyper, draw_all(generator, dtype))
    for _ in range(13):
        step_and_compare(run, draw_all(generator, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_gradients(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Such as DDP's views of a bucket."""
    run = Run(Hyperparameters(), [draw(300_000, dtype, generator).cuda()])
    for _ in range(3):
        step_and_compare(run, [draw(300_001, dtype, generator).cuda()[1:]])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_hard_gradients(kind: str, generator: torch.Generator) -> None:
    run = Run(Hyperparameters(), draw_all(generator))
    for step in range(4):
        grads = [draw(n, torch.float32, generator) for n in SIZES]
        grads = [KINDS[kind](g) if g.numel() and 0 < step < 3 else g for g in grads]
        step_and_compare(run, [g.cuda() for g in grads])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_agree_with_the_cpu_core(dtype: torch.dtype, generator: torch.Generator) -> None:
    on_gpu = Run(Hyperparameters(), draw_all(generator, dtype))
    for _ in range(5):
        grads = draw_all(generator, dtype)
        on_cpu = on_gpu.to("cpu")
        on_gpu.step(grads)
        on_cpu.step([g.cpu() for g in grads])
        for ours, theirs in zip(on_gpu.states, on_cpu.states, strict=True):
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name].cpu(), value, rtol=0, atol=0, msg=name)


def test_results_do_not_change_from_run_to_run(generator: torch.Generator) -> None:
    hyper = Hyperparameters(stochastic_rounding=True, lr=0.1)
    first = Run(hyper, draw_all(generator, torch.bfloat16))
    second = first.clone()
    for _ in range(5):
        grads = draw_all(generator, torch.bfloat16)
        first.step(grads)
        second.step(grads)
    assert all(map(torch.equal, first.params, second.params))
    for ours, theirs in zip(first.states, second.states, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_large_tensor() -> None:
    """More than 2^31 elements: every index computed in 32 bits would wrap around."""
    numel = 2**31 + 4096 + 100
    if torch.cuda.mem_get_info()[0] < 3 * 2 * numel + (2 << 30):
        pytest.skip("needs 15 GB of GPU memory")
    p = torch.zeros(numel, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    p.grad = torch.zeros_like(p)
    p.grad[-100:] = 1.0
    optimizer = MicroAdam([p], lr=1.0)
    optimizer.step()
    assert p.detach()[-100].item() == pytest.approx(-1.0)
    assert not p.detach()[: 2**31].any()


def test_step_leaves_no_block_unwritten(rng: np.random.Generator) -> None:
    """With everything selected, every element of every tensor must move."""
    optimizer = new_optimizer(rng, *[n for n in SIZES if n], density=1.0, lr=0.1)
    before = clone_all(optimizer)
    set_gradients(optimizer, 1)
    optimizer.step()
    for p, old in zip(parameters_of(optimizer), before, strict=True):
        assert (p.detach() != old["parameter"]).all()


def test_stream_that_is_not_the_default(rng: np.random.Generator) -> None:
    """The step must wait for earlier work on its own stream."""
    optimizer = new_optimizer(rng, 1 << 20)
    expected = twin_of(optimizer)
    set_gradients(expected, 1)
    expected.step()
    (p,) = parameters_of(optimizer)
    stream = torch.cuda.Stream()
    late = parameters_of(expected)[0].grad
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        p.grad = late.clone()
        optimizer.step()
    stream.synchronize()
    assert_same(clone_all(optimizer), clone_all(expected))


def test_graph_capture_and_replay(rng: np.random.Generator) -> None:
    """This also shows that a step never waits for the device: capture would fail."""
    lr = torch.tensor(0.1, device="cuda")
    optimizer = new_optimizer(rng, 5, 10_000, *range(1, 80), lr=lr)
    set_gradients(optimizer, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()  # creates the state
    torch.cuda.current_stream().wait_stream(stream)
    expected = twin_of(optimizer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for seed in range(1, 13):
        lr.fill_(0.1 / seed)  # replay must see the new rate
        expected.param_groups[0]["lr"] = torch.tensor(0.1 / seed, device="cuda")
        for p, q in zip(parameters_of(optimizer), parameters_of(expected), strict=True):
            q.grad = torch.randn_like(q)
            p.grad.copy_(q.grad)
        graph.replay()
        expected.step()
    assert_same(clone_all(optimizer), clone_all(expected))


def test_capture_of_a_first_step_is_refused(rng: np.random.Generator) -> None:
    optimizer = new_optimizer(rng, 5)
    set_gradients(optimizer, 0)
    with (
        pytest.raises(RuntimeError, match="take a step before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    optimizer.step()
    assert optimizer.state[parameters_of(optimizer)[0]]["step"].item() == 1


@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3)], ids=["a number", "a tensor on the CPU"])
def test_step_does_not_wait_for_the_device(
    lr: float | torch.Tensor, rng: np.random.Generator
) -> None:
    optimizer = new_optimizer(rng, 5, 10_000, lr=lr)
    set_gradients(optimizer, 0)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.state[parameters_of(optimizer)[0]]["step"].item() == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device(rng: np.random.Generator) -> None:
    """If launched on the current device instead of the tensors', the kernel would fail."""
    p = new_parameter(10_000, torch.float32, rng, "cuda:1")
    q = p.detach().to("cuda:0").requires_grad_()
    p.grad = torch.ones_like(p)
    q.grad = torch.ones_like(q)
    MicroAdam([p]).step()
    MicroAdam([q]).step()
    assert torch.equal(p.detach().cpu(), q.detach().cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(memory_format: torch.memory_format) -> None:
    p = torch.randn(8, 16, 9, 9, device="cuda").to(memory_format=memory_format)
    grad = torch.randn_like(p)
    flat = p.permute(0, 2, 3, 1) if memory_format is torch.channels_last else p
    q = flat.reshape(-1).clone()
    q.grad = grad.permute(0, 2, 3, 1).reshape(-1) if flat is not p else grad.reshape(-1)
    p.grad = grad
    MicroAdam([p]).step()
    MicroAdam([q]).step()
    assert torch.equal(flat.reshape(-1), q)


def test_parameter_with_gaps() -> None:
    storage = torch.randn(100, 200, device="cuda")
    before = storage.clone()
    p = storage[:, :150]
    p.grad = torch.ones_like(p)
    MicroAdam([p], density=1.0).step()
    assert (storage[:, :150] != before[:, :150]).all()
    assert torch.equal(storage[:, 150:], before[:, 150:])


def test_grad_scaler(rng: np.random.Generator) -> None:
    """Scaled gradients give the same step, found infs none; nothing waits for the device."""
    optimizer = new_optimizer(rng, 5000, unscales=True)
    expected = twin_of(optimizer)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.ones((), device="cuda"))  # creates the scale
    set_gradients(optimizer, 1, scale=1024.0)
    scaler.step(optimizer)
    scaler.update()
    set_gradients(expected, 1)
    expected.step()
    assert_same(clone_all(optimizer), clone_all(expected))
    before = clone_all(optimizer)
    set_gradients(optimizer, 2)
    parameters_of(optimizer)[0].grad[7] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert_same(clone_all(optimizer), before)


def test_compiled_step(rng: np.random.Generator) -> None:
    optimizer = new_optimizer(rng, 300, 5000)
    expected = twin_of(optimizer)
    step = torch.compile(optimizer.step)
    for seed in range(3):
        set_gradients(optimizer, seed)
        set_gradients(expected, seed)
        step()
        expected.step()
    assert_same(clone_all(optimizer), clone_all(expected))


def test_resume_on_the_other_device_and_back(rng: np.random.Generator) -> None:
    """GPU -> CPU -> GPU: the state is that of three steps on the GPU, bit for bit."""
    optimizer = new_optimizer(rng, 5000, 70)
    stayed = twin_of(optimizer)
    for seed, device in enumerate(["cuda", "cpu", "cuda"]):
        optimizer = twin_of(optimizer, device)
        for p, q in zip(parameters_of(optimizer), parameters_of(stayed), strict=True):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed)).cuda()
            p.grad = q.grad.to(device)
        optimizer.step()
        stayed.step()
    for ours, theirs in zip(clone_all(optimizer), clone_all(stayed), strict=True):
        # A CPU may round a square root differently in the last place.
        torch.testing.assert_close(
            ours.pop("parameter"), theirs.pop("parameter"), rtol=2.0**-20, atol=1e-9
        )
        assert_same([ours], [theirs])


def test_skipped_blocks_are_counted_on_the_device(rng: np.random.Generator) -> None:
    optimizer = new_optimizer(rng, 10_000, 64)
    set_gradients(optimizer, 0)
    for p in parameters_of(optimizer):
        p.grad[-1] = torch.nan
    optimizer.step()
    assert optimizer.num_skipped_blocks() == 2
