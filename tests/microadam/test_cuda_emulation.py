"""The whole source of the CUDA step, compiled for and run on the CPU (see tests/cuda_emulation).

The kernel was written without access to a GPU: its arithmetic, its selection, its barriers and the
tables it is launched with are tested here against plain torch. test_gpu.py does so on a GPU.
"""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch

from microadam import reference
from microadam.self_test import check_kernel
from tests.microadam.agreement import Hyperparameters, Run, step_and_compare
from tests.microadam.cuda_source import Emulation
from tests.microadam.helpers import DTYPES
from tests.microadam.test_native import KINDS, draw

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def emulation(cuda_emulation: Emulation) -> Any:
    return cuda_emulation.step_


@pytest.fixture
def emulated(emulation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ops.step_` runs the emulated kernel."""
    monkeypatch.setattr(torch.ops.microadam, "step_", emulation)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# Sizes around the ends of buckets, words and blocks; those of one row are stepped in one call.
SIZES = [
    [1, 2, 63, 64, 65, 0, 31, 32, 33],
    [4095, 4096, 4097],
    [8192, 0, 5, 4096 + 64],
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["1", "2"])  # thread order, which must not affect results
def test_sizes(
    sizes: list[int],
    dtype: torch.dtype,
    order: str,
    emulated: None,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EMULATION_SEED", order)
    run = Run(Hyperparameters(window_size=3), [draw(n, dtype, generator) for n in sizes])
    for _ in range(5):  # the window fills up, and its first slots are overwritten
        step_and_compare(run, [draw(n, dtype, generator) for n in sizes])
    assert run.num_skipped_blocks == 0


# The kinds of hard gradients are defined by KINDS in test_native.py.
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_hard_gradients(kind: str, emulated: None, generator: torch.Generator) -> None:
    sizes = [4096 + 300, 4096, 64]
    run = Run(Hyperparameters(), [draw(n, torch.float32, generator) for n in sizes])
    for step in range(4):  # an ordinary step first and last: the state must survive
        numbers = [draw(n, torch.float32, generator) for n in sizes]
        step_and_compare(run, [KINDS[kind](g) if 0 < step < 3 else g for g in numbers])


@pytest.mark.parametrize(
    "hyper",
    [
        Hyperparameters(weight_decay=0.1, lr=0.1),
        Hyperparameters(alpha=0.3, lr=0.1),
        Hyperparameters(alpha=0.3, weight_decay=0.1, lr=0.1, stochastic_rounding=True),
        Hyperparameters(stochastic_rounding=True, lr=0.1, seed=2**64 - 1),
        Hyperparameters(stochastic_rounding=True, weight_decay=0.1, lr=0.1),
        Hyperparameters(beta1=0.0, beta2=0.0),
        Hyperparameters(density=0.03, window_size=5),  # more entries per slot than one warp sums
        Hyperparameters(density=0.07, window_size=12),  # more entries than a RegisterBlock holds
        Hyperparameters(density=1.0, window_size=2),
        Hyperparameters(
            density=0.001, window_size=40, beta2=0.99
        ),  # ages beyond the table of powers
        Hyperparameters(block_size=8192 + 128, bucket_size=128),
        Hyperparameters(block_size=120, bucket_size=6),
        Hyperparameters(block_size=2, bucket_size=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hyperparameters(
    hyper: Hyperparameters, dtype: torch.dtype, emulated: None, generator: torch.Generator
) -> None:
    sizes = [4096, 4096 + 1000, 70] if hyper.block_size > 2 else [70, 1]
    run = Run(hyper, [draw(n, dtype, generator) for n in sizes])
    num_steps = 45 if hyper.window_size == 40 else 4
    for _ in range(num_steps):
        step_and_compare(run, [draw(n, dtype, generator) for n in sizes])


def test_largest_block(emulated: None, generator: torch.Generator) -> None:
    """The bitmaps and the sums of their scan are full, and all magnitudes are equal."""
    run = Run(Hyperparameters(block_size=32768, density=0.5), [torch.ones(32768)])
    step_and_compare(run, [torch.ones(32768)])
    step_and_compare(run, [draw(32768, torch.float32, generator)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_gradients_of_another_dtype(
    dtype: torch.dtype, grad_dtype: torch.dtype, emulated: None, generator: torch.Generator
) -> None:
    run = Run(Hyperparameters(), [draw(4096 + 70, dtype, generator)])
    step_and_compare(run, [draw(4096 + 70, grad_dtype, generator)])


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1e-30, 2.0, 1e38, math.inf, math.nan])
def test_thresholds_change_no_result(
    threshold: float, emulated: None, generator: torch.Generator
) -> None:
    run = Run(Hyperparameters(), [draw(5000, torch.float32, generator)])
    for _ in range(2):
        run.thresholds[0].fill_(threshold)
        step_and_compare(run, [draw(5000, torch.float32, generator)])


def test_threshold_finds_the_largest_at_once(emulated: None, generator: torch.Generator) -> None:
    run = Run(Hyperparameters(), [draw(8 * 4096, torch.bfloat16, generator)])
    for _ in range(8):
        guesses = run.thresholds[0].clone()
        step_and_compare(run, [draw(8 * 4096, torch.bfloat16, generator)])
    taken = run.states[0]["window_values"][:, 7].float().abs().amin(dim=1)
    assert (taken >= guesses * (1 - 2.0**-8)).all()
    assert (taken <= 1.5 * guesses).all()


def test_more_parameters_than_a_launch_takes(emulated: None, generator: torch.Generator) -> None:
    """128 fit in a kernel's arguments; 500 are counted at a time."""
    sizes = [1 + 37 * i % 100 for i in range(510)]
    run = Run(Hyperparameters(window_size=2), [draw(n, torch.float32, generator) for n in sizes])
    for _ in range(2):
        step_and_compare(run, [draw(n, torch.float32, generator) for n in sizes])
    assert all(state["step"] == 2 for state in run.states)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [1, 100, 4096])
@pytest.mark.parametrize("threshold", [0.0, 2.0, 1e38])
def test_a_block_that_is_not_finite_is_left_alone(
    value: float, count: int, threshold: float, emulated: None, generator: torch.Generator
) -> None:
    """Whether as many elements as can be listed reach the guess, or fewer, or more."""
    run = Run(Hyperparameters(), [draw(2 * 4096 + 300, torch.float32, generator)])
    step_and_compare(run, [draw(2 * 4096 + 300, torch.float32, generator)])
    run.thresholds[0].fill_(threshold)
    grad = draw(2 * 4096 + 300, torch.float32, generator)
    grad[:count] = value
    grad[-min(count, 300) :] = value
    step_and_compare(run, [grad])
    assert run.num_skipped_blocks == 2
    step_and_compare(run, [draw(2 * 4096 + 300, torch.float32, generator)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("param_begins_at", "grad_begins_at"), [(3, 1), (0, 1), (3, 0)])
def test_misaligned_views(
    dtype: torch.dtype,
    param_begins_at: int,
    grad_begins_at: int,
    emulated: None,
    generator: torch.Generator,
) -> None:
    """Such as DDP's views of a bucket. 16-byte loads must not be tried: a GPU would fault."""
    numel = 2 * 4096
    storage = draw(numel + param_begins_at, dtype, generator)
    run = Run(Hyperparameters(), [storage[param_begins_at:]])
    for _ in range(3):
        grad = draw(numel + grad_begins_at, dtype, generator)[grad_begins_at:]
        step_and_compare(run, [grad])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalars_on_the_device(
    dtype: torch.dtype, emulation: Any, generator: torch.Generator
) -> None:
    sizes = [4096, 100]
    hyper = Hyperparameters(weight_decay=0.01)
    ours = Run(hyper, [draw(n, torch.float32, generator) for n in sizes])
    theirs = ours.clone()
    grads = [1000 * draw(n, torch.float32, generator) for n in sizes]
    names = ("lr_tensor", "grad_scale", "found_inf")
    values = (torch.tensor(x, dtype=dtype) for x in (0.03, 777.0, 0.0))
    changes = dict(zip(names, values, strict=True)) | {"lr": 0.0}
    reference.step_(theirs.arguments(grads, **changes))
    emulation(*ours.arguments(grads, **changes))
    for p, expected in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(p, expected, rtol=2.0**-22, atol=0)
    assert torch.equal(ours.states[0]["error"], theirs.states[0]["error"])


def test_found_inf_changes_nothing(emulation: Any, generator: torch.Generator) -> None:
    run = Run(Hyperparameters(), [draw(5000, torch.float32, generator)])
    before = run.clone()
    grads = [draw(5000, torch.float32, generator)]
    emulation(*run.arguments(grads, found_inf=torch.tensor(1.0)))
    assert torch.equal(run.params[0], before.params[0])
    for name, value in before.states[0].items():
        assert torch.equal(run.states[0][name], value)


@pytest.mark.parametrize("name", ["window_indices", "error", "error_max", "step"])
def test_nothing_is_changed_where_an_argument_is_wrong(
    name: str, emulated: None, generator: torch.Generator
) -> None:
    run = Run(Hyperparameters(), [draw(500, torch.float32, generator) for _ in range(2)])
    run.states[1][name] = run.states[1][name].float()
    before = run.clone()
    with pytest.raises(RuntimeError, match="has the wrong dtype"):
        run.step([draw(500, torch.float32, generator) for _ in range(2)])
    assert torch.equal(run.params[0], before.params[0])
    assert run.states[0]["step"] == 0


# The self-test of a GPU's first step, here with the emulated kernel in place of the native one.

check_uncached = check_kernel.__wrapped__
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "geometry",
    [(10, 0.01, 64, 4096), (12, 0.07, 64, 4096), (2, 1.0, 128, 32768), (40, 0.001, 2, 2)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_self_test_passes(
    geometry: tuple[int, float, int, int],
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    emulated: None,
) -> None:
    check_uncached(CPU, dtype, grad_dtype, geometry)


class Broken:
    """An operator that corrupts a hundredth of one of its outputs after a step."""

    def __init__(self, step_: Any, name: str) -> None:
        self.step_, self.name = step_, name

    def default(self, *values: Any) -> None:
        self.step_.default(*values)
        spoiled = getattr(reference.StepArguments(*values), self.name)[0].flatten()
        spoiled[: len(spoiled) // 100 + 1] += 1


@pytest.mark.parametrize(
    "name",
    ["params", "window_indices", "window_values", "error", "error_min", "error_max"],
)
def test_self_test_finds_a_broken_kernel(
    name: str, emulation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.microadam, "step_", Broken(emulation, name))
    with pytest.raises(RuntimeError, match=r"differ on cpu: \d+ of .* set MICROADAM_BACKEND=torch"):
        check_uncached(CPU, torch.float32, torch.float32, (10, 0.01, 64, 4096))


def test_self_test_says_what_to_do_where_the_kernel_does_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failing:
        @staticmethod
        def default(*_: Any) -> None:
            raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch.ops.microadam, "step_", Failing)
    message = r"does not run on cpu \(no kernel image is available\): set MICROADAM_BACKEND=torch"
    with pytest.raises(RuntimeError, match=message):
        check_uncached(CPU, torch.float32, torch.float32, (10, 0.01, 64, 4096))
