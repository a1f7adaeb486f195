"""The operator `microadam::step_`: its schema, its checks, its backends, and torch.compile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import microadam
from microadam import MicroAdam, ops, reference
from microadam.reference import StepArguments
from tests.microadam.agreement import Hyperparameters, Run

ROOT = Path(microadam.__file__).resolve().parents[1]


def new_run(*sizes: int) -> Run:
    generator = torch.Generator().manual_seed(0)
    return Run(Hyperparameters(), [torch.randn(n, generator=generator) for n in sizes])


def arguments(run: Run, **changes: Any) -> StepArguments:
    return run.arguments([torch.ones_like(p) for p in run.params], **changes)


@pytest.mark.parametrize("lr_tensor", [None, torch.tensor(0.01)])
def test_operator_passes_opcheck(lr_tensor: Tensor | None) -> None:
    """The schema declares what is written; fake tensors and autograd are registered correctly."""
    args = arguments(new_run(5000, 3), lr_tensor=lr_tensor)
    torch.library.opcheck(torch.ops.microadam.step_.default, tuple(args))


def test_step_marks_parameters_as_changed() -> None:
    """Otherwise a backward pass through a value saved before the step would be silently wrong."""
    p = torch.ones(3, requires_grad=True)
    optimizer = MicroAdam([p])
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_operator_in_a_compiled_graph() -> None:
    eager, compiled = new_run(5000, 3), new_run(5000, 3)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(*args: Any) -> Tensor:
        torch.ops.microadam.step_(*args)
        return args[0][0] * 2

    doubled = step(*arguments(compiled))
    torch.ops.microadam.step_(*arguments(eager))
    assert torch.equal(compiled.params[0], eager.params[0])
    assert torch.equal(doubled, 2 * eager.params[0])


def test_optimizer_under_compile() -> None:
    eager, compiled = (torch.nn.Parameter(torch.ones(300)) for _ in range(2))
    optimizer = MicroAdam([compiled])
    counter = torch._dynamo.testing.CompileCounter()  # type: ignore[no-untyped-call]
    step = torch.compile(optimizer.step, backend=counter)
    for grad in torch.randn(3, 300, generator=torch.Generator().manual_seed(0)):
        eager.grad, compiled.grad = grad.clone(), grad.clone()
        step()
    expected = MicroAdam([eager])
    for grad in torch.randn(3, 300, generator=torch.Generator().manual_seed(0)):
        eager.grad = grad.clone()
        expected.step()
    assert torch.equal(compiled, eager)
    assert counter.op_count > 0


def test_a_schedule_does_not_compile_the_step_anew() -> None:
    p = torch.nn.Parameter(torch.ones(300))
    optimizer = MicroAdam([p])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    counter = torch._dynamo.testing.CompileCounter()  # type: ignore[no-untyped-call]
    step = torch.compile(optimizer.step, backend=counter)
    graphs = []
    for _ in range(6):
        p.grad = torch.ones(300)
        step()
        schedule.step()
        graphs.append(counter.frame_count)
    assert graphs[2:] == [graphs[2]] * 4, graphs


def test_self_test_before_a_compiled_step_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor would have failed at the plain torch in it. The CPU pretends to be a GPU."""
    is_compiled = []
    native_kernel = ops.native_kernel
    with monkeypatch.context() as patch:
        patch.setattr(ops, "native_kernel", lambda device_type: native_kernel("cpu") or "CUDA")
        patch.setattr(Tensor, "is_cuda", property(lambda _: True), raising=False)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(
            microadam.optimizer,
            "check_kernel",
            lambda *_: is_compiled.append(torch.compiler.is_compiling()),
        )
        p = torch.nn.Parameter(torch.ones(300))
        p.grad = torch.ones(300)
        torch.compile(MicroAdam([p]).step, backend="eager")()
    assert is_compiled == [False]


def on_fake_tensors(args: tuple[Any, ...]) -> None:
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        fake = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args)
        torch.ops.microadam.step_(*fake)


def damage_state(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Run], None]:
    def damage(run: Run) -> None:
        run.states[1][name] = change(run.states[1][name])

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_state("window_indices", Tensor.int), r"window_indices\[1\] is a tensor of .*int32"),
        (damage_state("window_indices", lambda t: t[0]), r"window_indices\[1\] has shape"),
        (damage_state("window_indices", lambda t: t[:, :0]), r"window_indices\[1\] has shape"),
        (damage_state("window_values", lambda t: t[:, :, :-1]), r"window_values\[1\]"),
        (damage_state("error", lambda t: t[:-1]), r"error\[1\] .* of shape"),
        (damage_state("error_min", Tensor.float), r"error_min\[1\]"),
        (damage_state("error_max", lambda t: torch.cat([t, t])[::2]), r"contiguous"),
        (damage_state("step", Tensor.float), r"step\[1\]"),
        (lambda run: run.params.__setitem__(1, run.params[1].double()), r"params\[1\]"),
        (lambda run: run.params.__setitem__(1, run.params[1].half()), r"params\[1\]"),
        (lambda run: run.params.__setitem__(1, run.params[1][:200]), r"window_indices\[1\]"),
        (lambda run: run.thresholds.pop(), "thresholds has 1 entries for 2 parameters"),
        (lambda run: setattr(run, "num_skipped_blocks", torch.zeros(1)), "num_skipped_blocks"),
    ],
)
def test_fake_refuses_tensors_that_do_not_fit(damage: Callable[[Run], None], message: str) -> None:
    run = new_run(5000, 300)
    damage(run)
    with pytest.raises(ValueError, match=message):
        on_fake_tensors(arguments(run))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bucket_size": 63}, "bucket_size=63: must be an even"),
        ({"block_size": 100}, "block_size=100: must be a multiple of bucket_size=64"),
        ({"block_size": 65_536}, "at most 32768"),
        ({"density": 0.0}, "density=0.0: must be a number greater than 0"),
        ({"alpha": 1.0}, "alpha=1.0: must be at least 0 and less than 1"),
        ({"lr_tensor": torch.tensor(1)}, "lr_tensor is a tensor of torch.int64"),
        ({"ordinals": [0]}, "ordinals has 1 entries"),
    ],
)
def test_fake_refuses_numbers_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_fake_tensors(arguments(new_run(5000, 300), **changes))


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=Path(sys.executable).parent,  # not the checkout, which would come first
        capture_output=True,
        text=True,
        check=False,
    )


TAKE_A_STEP = """
import torch
from microadam import MicroAdam, ops, reference
p = torch.ones(3, requires_grad=True)
p.grad = torch.ones(3)
MicroAdam([p]).step()
print(repr(ops.native_kernel("cpu")), bool(p[0] < 1))
"""


def test_backend_torch_leaves_the_native_library_alone() -> None:
    result = in_new_process(TAKE_A_STEP, MICROADAM_BACKEND="torch")
    assert result.stdout == "'' True\n", result.stderr
    assert "Warning" not in result.stderr


def test_backend_of_another_name_is_an_error() -> None:
    result = in_new_process(TAKE_A_STEP, MICROADAM_BACKEND="cuda")
    assert "ValueError: MICROADAM_BACKEND='cuda': set it to native or torch" in result.stderr


@pytest.mark.parametrize("library", [None, b"not a library"])
def test_package_without_its_library_steps_in_plain_torch(
    library: bytes | None, tmp_path: Path
) -> None:
    """One clear warning if the library would have been used, an error if it was required."""
    shutil.copytree(
        ROOT / "microadam", tmp_path / "microadam", ignore=shutil.ignore_patterns("*.so")
    )
    if library is not None:
        (tmp_path / "microadam" / ops.NATIVE_LIBRARY.name).write_bytes(library)
    result = in_new_process(TAKE_A_STEP, PYTHONPATH=str(tmp_path))
    assert result.stdout == "'' True\n", result.stderr
    assert result.stderr.count("MicroAdam's native library is not used") == 1
    result = in_new_process(TAKE_A_STEP, PYTHONPATH=str(tmp_path), MICROADAM_BACKEND="native")
    assert "RuntimeError: MICROADAM_BACKEND=native, but" in result.stderr
    assert "Warning" not in result.stderr  # it would claim that steps run in plain torch


@pytest.mark.parametrize("wanted", ["", "native"])
def test_a_gpu_without_kernels_is_told_how_to_get_them(
    wanted: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """On a device that is only claimed to be a GPU, with a library for the CPU alone."""
    steps: list[StepArguments] = []
    monkeypatch.setattr(reference, "step_", steps.append)
    monkeypatch.setattr(ops, "load_native_library", cache(lambda: ""))
    monkeypatch.setattr(ops, "native_kernel", lambda device_type: "")
    monkeypatch.setattr(ops, "_wanted_backend", lambda: wanted)
    monkeypatch.setattr(ops, "why_plain_torch", cache(ops.why_plain_torch.__wrapped__))
    gpu = SimpleNamespace(device=torch.device("cuda", 0))
    args = arguments(new_run(3), num_skipped_blocks=gpu)
    remedy = 'pip install "cuda-toolkit[nvcc]"'
    if wanted == "native":
        with pytest.raises(RuntimeError, match=re.escape(remedy)):
            ops._plain_torch_step(*args)
        assert (len(recwarn), len(steps)) == (0, 0)
    else:
        for _ in range(2):
            ops._plain_torch_step(*args)
        (warning,) = recwarn
        assert remedy in str(warning.message)
        assert len(steps) == 2


def test_import_loads_no_library() -> None:
    """Importing must work, and be cheap, wherever the package is installed."""
    code = "import microadam.ops as o; print(o.load_native_library.cache_info().currsize)"
    assert in_new_process(code).stdout == "0\n"


def test_doctor_reports_the_kernel() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "microadam"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "MICROADAM_BACKEND": "torch"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"microadam       {microadam.__version__}\n" in result.stdout
    reason = "MICROADAM_BACKEND=torch asks for plain torch"
    assert f"step on a CPU   plain torch: {reason}\n" in result.stdout
