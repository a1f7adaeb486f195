"""The native CPU kernels take the steps that plain torch takes.

test_oracle_agreement.py judges whichever kernel runs here against the oracle; these tests compare
every kernel with plain torch, and look for mistakes that only native code can make.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from microadam import ops
from tests.microadam.agreement import Hyperparameters, Run, step_and_compare
from tests.microadam.helpers import DTYPES

pytestmark = pytest.mark.skipif(
    not ops.native_kernel("cpu"), reason=f"no native library: {ops.load_native_library()}"
)


# The value of torch's own variable that selects each kernel, if the machine can run it.
CAPABILITIES = {"AVX-512": "avx512", "AVX2": "avx2", "plain C++": "default"}


@pytest.fixture(params=CAPABILITIES)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kernel in turn."""
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", CAPABILITIES[request.param])
    chosen = ops.native_kernel("cpu")
    if chosen != request.param:
        assert list(CAPABILITIES).index(chosen) > list(CAPABILITIES).index(request.param)
        pytest.skip(f"this CPU runs {chosen} at most")
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def draw(numel: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(numel, generator=generator).to(dtype)


@st.composite
def hyperparameter_sets(draw: st.DrawFn) -> Hyperparameters:
    bucket_size = draw(st.sampled_from([2, 6, 16, 64, 128]))
    return Hyperparameters(
        window_size=draw(st.integers(1, 12)),
        density=draw(st.sampled_from([0.001, 0.01, 0.07, 0.3, 1.0])),
        bucket_size=bucket_size,
        block_size=bucket_size * draw(st.integers(1, 32768 // bucket_size)),
        lr=draw(st.sampled_from([0.0, 1e-5, 1e-3, 0.5])),
        beta1=draw(st.sampled_from([0.0, 0.9, 0.99])),
        beta2=draw(st.sampled_from([0.0, 0.999])),
        eps=draw(st.sampled_from([1e-8, 1e-3])),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        alpha=draw(st.sampled_from([0.0, 0.1, 0.99])),
        stochastic_rounding=draw(st.booleans()),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


# What makes a gradient hard, elementwise, by the name shown in a failing example.
KINDS = {
    "normal": lambda g: g,
    "denormal": lambda g: (g * 4).round() * 2.0**-149,
    "huge": lambda g: g * 1e34,
    "square overflows": lambda g: g * 1e19,
    "ties": lambda g: g.sign(),
    # So large that the error feedback does not tell them apart, and twice as many as are taken.
    "equal outliers": lambda g: torch.where(torch.arange(g.numel()) % 50 == 7, 1e9 * g.sign(), g),
    "few levels": lambda g: g.round(),
    "zero": lambda g: g * 0.0,
    "sparse": lambda g: g * (g > 2),
    "few elements": lambda g: g * (torch.arange(g.numel()) % 997 == 5),
    "some rows": lambda g: g * (torch.arange(g.numel()) // 384 % 11 == 3),
    "steep": lambda g: g * torch.exp(-torch.arange(g.numel()) / 20),
    "one NaN": lambda g: g.index_fill(0, torch.tensor([g.numel() // 2]), math.nan),
    "one infinity": lambda g: g.index_fill(0, torch.tensor([g.numel() - 1]), -math.inf),
    "too large": lambda g: g.index_fill(0, torch.tensor([0]), 2.0**120),
}


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the kernel, always the same
)
@given(
    hyper=hyperparameter_sets(),
    sizes=st.lists(
        st.sampled_from([0, 1, 2, 63, 64, 65, 4095, 4096, 4097]) | st.integers(0, 20_000),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from(DTYPES),
    grad_dtype=st.sampled_from([*DTYPES, torch.float64]),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
@example(Hyperparameters(), [100_003], torch.float32, torch.float32, ["normal"] * 12, 0)
@example(Hyperparameters(), [100_003], torch.bfloat16, torch.bfloat16, ["normal"] * 12, 0)
@example(Hyperparameters(block_size=32_768), [70_000], torch.float32, torch.float32, ["ties"], 0)
def test_steps_agree_with_plain_torch(
    kernel: str,
    hyper: Hyperparameters,
    sizes: list[int],
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    kinds: list[str],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    run = Run(hyper, [draw(numel, dtype, generator) for numel in sizes])
    for kind in kinds:
        numbers = [torch.randn(numel, generator=generator) for numel in sizes]
        grads = [KINDS[kind](g).to(grad_dtype) if g.numel() else g.to(grad_dtype) for g in numbers]
        step_and_compare(run, grads)


def test_results_do_not_depend_on_the_number_of_threads(
    kernel: str, generator: torch.Generator
) -> None:
    sizes = [300_000, 5, 70_000, 4096]
    params = [draw(numel, torch.bfloat16, generator) for numel in sizes]
    grads = [[draw(numel, torch.bfloat16, generator) for numel in sizes] for _ in range(4)]
    hyper = Hyperparameters(stochastic_rounding=True, lr=0.1)
    runs = []
    num_threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            runs.append(Run(hyper, [p.clone() for p in params]))
            for g in grads:
                runs[-1].step(g)
    finally:
        torch.set_num_threads(num_threads)
    for run in runs[1:]:
        assert all(map(torch.equal, run.params, runs[0].params))
        for state, first in zip(run.states, runs[0].states, strict=True):
            assert all(torch.equal(state[name], first[name]) for name in state)


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1e-30, 2.0, math.inf, math.nan, "random"])
def test_thresholds_change_no_result(
    kernel: str, threshold: float | str, generator: torch.Generator
) -> None:
    """They only say where to look first; a wrong one may cost time but nothing else."""
    run = Run(Hyperparameters(), [draw(50_000, torch.float32, generator)])
    for _ in range(3):
        for t in run.thresholds:
            if threshold == "random":
                t.uniform_(0, 4, generator=generator)
            else:
                t.fill_(threshold)
        step_and_compare(run, [draw(50_000, torch.float32, generator)])


def test_threshold_finds_the_largest_at_once(kernel: str, generator: torch.Generator) -> None:
    """The warm start is what makes selection cheap: a few more than k of a block reach it."""
    numel = 64 * 4096
    run = Run(Hyperparameters(), [draw(numel, torch.float32, generator)])
    for _ in range(12):
        run.step([draw(numel, torch.float32, generator)])
    guesses = run.thresholds[0].clone()
    run.step([draw(numel, torch.float32, generator)])
    # What this step took is in the slot of step 13; compare it with the guess made before.
    taken = run.states[0]["window_values"][:, 12 % 10].float().abs().amin(dim=1)
    assert (taken >= guesses * (1 - 2.0**-8)).float().mean() > 0.9
    assert (taken <= 1.5 * guesses).float().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_views(kernel: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """A parameter may be any part of a larger tensor; vector loads must not assume alignment."""
    numel = 9000
    storage = draw(numel + 3, dtype, generator)
    run = Run(Hyperparameters(), [storage[3:]])
    step_and_compare(run, [draw(numel + 1, dtype, generator)[1:]])


def test_nothing_outside_a_parameter_is_written(kernel: str, generator: torch.Generator) -> None:
    storage = torch.full((4096 + 100 + 64,), 7.0)
    inside = slice(32, 32 + 4096 + 100)
    run = Run(Hyperparameters(weight_decay=0.1, lr=0.1), [storage[inside]])
    run.step([draw(4096 + 100, torch.float32, generator)])
    assert (storage[inside] != 7.0).all()
    assert (storage[:32] == 7.0).all()
    assert (storage[inside.stop :] == 7.0).all()


def test_stochastic_rounding_is_unbiased(kernel: str, generator: torch.Generator) -> None:
    """An update of a quarter of a unit moves a quarter of the parameters by a unit."""
    numel = 1 << 16
    p = torch.ones(numel, dtype=torch.bfloat16)
    hyper = Hyperparameters(density=1.0, lr=2.0**-10, stochastic_rounding=True)
    run = Run(hyper, [p])
    run.step([torch.ones(numel)])
    below = torch.tensor(1.0 - 2.0**-8, dtype=torch.bfloat16)
    assert p.unique().tolist() == [below.item(), 1.0]
    assert (p == below).float().mean().item() == pytest.approx(0.25, abs=0.01)


@pytest.fixture
def one_call(generator: torch.Generator) -> Iterator[Run]:
    return Run(Hyperparameters(), [draw(5000, torch.float32, generator)])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("window_indices", lambda t: t.int(), "window_indices has the wrong dtype"),
        ("window_values", lambda t: t[:, :, :-1].contiguous(), "window_values must have 820 elem"),
        (
            "window_values",
            lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
            "window_values must be contiguous",
        ),
        ("error", lambda t: t[:-1], "error must have 2528 elements, not 2527"),
        ("error_min", lambda t: t.float(), "error_min has the wrong dtype"),
        ("error_max", lambda t: torch.cat([t, t]), "error_max must have 79 elements, not 158"),
        ("step", lambda t: t.int(), "steps has the wrong dtype"),
    ],
)
def test_native_code_refuses_memory_that_does_not_fit(
    name: str, damage: object, message: str, one_call: Run, generator: torch.Generator
) -> None:
    """Even when called directly, the operator must not read or write beyond a tensor."""
    one_call.states[0][name] = damage(one_call.states[0][name])
    with pytest.raises(RuntimeError, match=message):
        one_call.step([draw(5000, torch.float32, generator)])


def test_native_code_refuses_a_window_without_slots(
    one_call: Run, generator: torch.Generator
) -> None:
    for name in ("window_indices", "window_values"):
        one_call.states[0][name] = one_call.states[0][name][:, :0]
    with pytest.raises(RuntimeError, match="at least one slot"):
        one_call.step([draw(5000, torch.float32, generator)])


def test_nothing_is_changed_where_an_argument_is_wrong(generator: torch.Generator) -> None:
    """If the second parameter's state is damaged, the first must not have taken its step."""
    run = Run(Hyperparameters(), [draw(500, torch.float32, generator) for _ in range(2)])
    run.states[1]["error"] = run.states[1]["error"][:-1]
    before = run.clone()
    with pytest.raises(RuntimeError):
        run.step([draw(500, torch.float32, generator) for _ in range(2)])
    assert torch.equal(run.params[0], before.params[0])
    assert run.states[0]["step"] == 0
