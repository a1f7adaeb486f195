"""What nvcc makes of the CUDA step, run by an interpreter of PTX (see tests/ptx_interpreter).

test_cuda_emulation.py compiles the source for a CPU. Here it is the GPU's own code that steps: the
inline assembly, the compiler's, its vector accesses, masks and barriers, and the arguments as they
lie in memory. Accesses that are misaligned, out of bounds, uninitialized or unordered are errors.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from typing import Any

import pytest
import torch

from microadam import reference
from tests.microadam.agreement import Hyperparameters, Run, step_and_compare
from tests.microadam.cuda_source import NVCC, Emulation, build_ptx
from tests.microadam.helpers import DTYPES
from tests.microadam.test_native import KINDS, draw
from tests.ptx_interpreter.machine import Machine
from tests.ptx_interpreter.operator import InterpretedStep
from tests.ptx_interpreter.parser import Module, parse
from tests.ptx_interpreter.traffic import profile


def version_of_nvcc() -> int:
    if not NVCC:
        return 0
    result = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"release (\d+)", result.stdout)
    return int(found[1]) if found else 0


pytestmark = [
    pytest.mark.skipif(
        version_of_nvcc() < 13, reason="needs nvcc of CUDA 13, whose header the host code gets"
    ),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return parse(build_ptx(tmp_path_factory.mktemp("ptx")))


@pytest.fixture(scope="session")
def machine(module: Module) -> Machine:
    """All threads of a block advance together: the fastest way."""
    return Machine(module, by_warps=False)


@pytest.fixture
def interpreted(
    machine: Machine, cuda_emulation: Emulation, monkeypatch: pytest.MonkeyPatch
) -> InterpretedStep:
    """`ops.step_` runs the PTX."""
    step = InterpretedStep(machine, cuda_emulation.library, cuda_emulation.step_)
    monkeypatch.setattr(torch.ops.microadam, "step_", step)
    return step


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_all_kernels(
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    interpreted: InterpretedStep,
    generator: torch.Generator,
) -> None:
    """A full block and a short one, while the window fills up and its first slot is overwritten."""
    sizes = [4096 + 300]
    run = Run(Hyperparameters(window_size=2), [draw(n, dtype, generator) for n in sizes])
    for _ in range(3):
        step_and_compare(run, [draw(n, grad_dtype, generator) for n in sizes])
    assert run.num_skipped_blocks == 0


@pytest.mark.parametrize(
    "hyper",
    [
        Hyperparameters(weight_decay=0.1, alpha=0.3, lr=0.1, stochastic_rounding=True),
        Hyperparameters(stochastic_rounding=True, lr=0.1, seed=2**64 - 1),
        Hyperparameters(density=0.03, window_size=5),  # more entries per slot than one warp sums
        Hyperparameters(density=0.07, window_size=3),  # more candidates than can be listed
        Hyperparameters(density=0.15, window_size=2),  # more entries than a RegisterBlock holds
        Hyperparameters(block_size=120, bucket_size=6),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hyperparameters(
    hyper: Hyperparameters,
    dtype: torch.dtype,
    interpreted: InterpretedStep,
    generator: torch.Generator,
) -> None:
    sizes = [hyper.block_size + hyper.block_size // 10, 7]
    run = Run(hyper, [draw(n, dtype, generator) for n in sizes])
    for _ in range(2):
        step_and_compare(run, [draw(n, dtype, generator) for n in sizes])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_hard_gradients(
    kind: str, interpreted: InterpretedStep, generator: torch.Generator
) -> None:
    sizes = [4096, 300]
    run = Run(Hyperparameters(window_size=4), [draw(n, torch.float32, generator) for n in sizes])
    for step in range(3):  # an ordinary step first and last: the state must survive
        grads = [draw(n, torch.float32, generator) for n in sizes]
        step_and_compare(run, [KINDS[kind](g) if step == 1 else g for g in grads])


@pytest.mark.parametrize("threshold", [0.0, 2.0, math.nan])
def test_blocks_that_are_not_finite(
    threshold: float, interpreted: InterpretedStep, generator: torch.Generator
) -> None:
    """Both are left alone and counted, whatever the guess that selection starts from."""
    run = Run(Hyperparameters(), [draw(4096 + 300, torch.bfloat16, generator)])
    step_and_compare(run, [draw(4096 + 300, torch.bfloat16, generator)])
    run.thresholds[0].fill_(threshold)
    grad = draw(4096 + 300, torch.bfloat16, generator)
    grad[7] = math.nan
    grad[-5:] = -math.inf
    step_and_compare(run, [grad])
    assert run.num_skipped_blocks == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("misaligned", ["parameter and gradient", "gradient", "error"])
def test_misaligned_views(
    misaligned: str,
    dtype: torch.dtype,
    interpreted: InterpretedStep,
    generator: torch.Generator,
) -> None:
    """Such as DDP's views of a bucket. Weight decay makes the kernel read whole parameters."""

    def draw_view(begins_at: int) -> torch.Tensor:
        return draw(4096 + begins_at, dtype, generator)[begins_at:]

    run = Run(Hyperparameters(weight_decay=0.1, lr=0.1), [draw_view(3 * ("param" in misaligned))])
    if misaligned == "error":
        run.states[0]["error"] = torch.zeros(2048 + 1, dtype=torch.uint8)[1:]
    for _ in range(2):
        step_and_compare(run, [draw_view("gradient" in misaligned)])


def test_many_parameters_in_a_launch(
    interpreted: InterpretedStep, generator: torch.Generator
) -> None:
    sizes = [1 + 37 * i % 100 for i in range(20)]
    run = Run(Hyperparameters(window_size=2), [draw(n, torch.float32, generator) for n in sizes])
    step_and_compare(run, [draw(n, torch.float32, generator) for n in sizes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalars_on_the_device(
    dtype: torch.dtype, interpreted: InterpretedStep, generator: torch.Generator
) -> None:
    sizes = [4096, 100]
    hyper = Hyperparameters(weight_decay=0.01)
    ours = Run(hyper, [draw(n, torch.float32, generator) for n in sizes])
    theirs = ours.clone()
    grads = [1000 * draw(n, torch.float32, generator) for n in sizes]
    changes = {
        "lr_tensor": torch.tensor(0.03, dtype=dtype),
        "grad_scale": torch.tensor(777.0, dtype=dtype),
        "found_inf": torch.tensor(0.0, dtype=dtype),
        "lr": 0.0,
    }
    reference.step_(theirs.arguments(grads, **changes))
    interpreted.default(*ours.arguments(grads, **changes))
    for p, expected in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(p, expected, rtol=2.0**-22, atol=0)
    assert torch.equal(ours.states[0]["error"], theirs.states[0]["error"])

    before = ours.clone()
    interpreted.default(*ours.arguments(grads, **changes | {"found_inf": torch.tensor(1.0)}))
    assert_same_bits(ours, before)


def assert_same_bits(ours: Run, theirs: Run) -> None:
    def tensors(run: Run) -> list[torch.Tensor]:
        states = [value for state in run.states for value in state.values()]
        return [*run.params, *states, *run.thresholds, run.num_skipped_blocks]

    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_of_warps_gives_the_bits_of_the_emulated_source(
    seed: int,
    dtype: torch.dtype,
    module: Module,
    cuda_emulation: Emulation,
    generator: torch.Generator,
) -> None:
    """Thresholds too, of which plain torch has none."""
    machine = Machine(module, seed=seed)
    interpreted = InterpretedStep(machine, cuda_emulation.library, cuda_emulation.step_)
    hyper = Hyperparameters(
        window_size=2, stochastic_rounding=True, lr=0.1, weight_decay=0.1 * seed
    )
    ours = Run(hyper, [draw(4096 + 100, dtype, generator)])
    theirs = ours.clone()
    for grad in (draw(4096 + 100, dtype, generator), torch.ones(4096 + 100, dtype=dtype)):
        arguments: list[Any] = [run.arguments([grad]) for run in (ours, theirs)]
        interpreted.default(*arguments[0])
        cuda_emulation.step_.default(*arguments[1])
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    ("dtype", "most_bytes"), [(torch.bfloat16, 7.0), (torch.float32, 10.3)], ids=str
)
def test_a_step_moves_and_executes_no_more_than_it_must(
    dtype: torch.dtype, most_bytes: float, module: Module, cuda_emulation: Emulation
) -> None:
    """Gradient, error feedback, window, and of the weights the sectors that the window touches.

    AdamW moves 14 and 28 bytes per parameter.
    """
    found = profile(module, cuda_emulation, dtype, Hyperparameters())
    assert found.distinct_bytes["grads", "read"] == dtype.itemsize
    # A float32 sector is in the halves of two accesses; the second finds it in the L1 cache.
    num_requests = 1 if dtype == torch.bfloat16 else 2
    assert found.requested_bytes["grads", "read"] == num_requests * dtype.itemsize
    for kind in ("read", "written"):
        assert found.requested_bytes["error", kind] == found.distinct_bytes["error", kind] == 0.5
        assert found.distinct_bytes["error_min", kind] == 2 / 64
        assert found.distinct_bytes["params", kind] < dtype.itemsize
    assert found.total_bytes <= most_bytes
    assert found.num_instructions <= 1000
    assert found.num_wavefronts <= 1100
