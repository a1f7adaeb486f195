"""Checks a native kernel against plain torch, on the device where it is about to run.

The CUDA kernels have been tested on a CPU only, by emulation. Before their first step on a GPU they
take a few small steps there alongside plain torch, so that an incompatible card, driver or compiler
results in an error and not in a model that trains badly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from microadam import ops, reference
from microadam.layout import BlockLayout, Geometry
from microadam.reference import StepArguments

# Results may differ where a value rounds the other way, but never in as many places as this.
_MAX_SHARE_DIFFERENT = 0.002
_RELATIVE_TOLERANCE = 2.0**-6  # of floating-point values: two units of bfloat16


@cache
def check_kernel(
    device: torch.device, param_dtype: torch.dtype, grad_dtype: torch.dtype, geometry: Geometry
) -> None:
    """Compares three steps of the native kernel with those of plain torch; waits for the device.

    Raises:
        RuntimeError: the kernel does not run on this device, or its results differ.
    """
    remedy = (
        "set MICROADAM_BACKEND=torch to step in plain PyTorch, and please report this with what "
        "python -m microadam prints"
    )
    kinds = (device, param_dtype, grad_dtype, geometry)
    expected = _three_steps(reference.step_, *kinds)
    try:
        actual = _three_steps(ops.step_, *kinds)
    except RuntimeError as error:
        raise RuntimeError(
            f"MicroAdam's native kernel does not run on {device} ({error}): {remedy}"
        ) from error
    for name, values in expected.items():
        tolerance = _RELATIVE_TOLERANCE if values.is_floating_point() else 0.0
        same = torch.isclose(actual[name], values, rtol=tolerance, atol=0.0)
        if same.sum() < (1 - _MAX_SHARE_DIFFERENT) * same.numel():
            raise RuntimeError(
                f"MicroAdam's native kernel and plain PyTorch differ on {device}: "
                f"{same.numel() - int(same.sum())} of {same.numel()} elements of {name} with "
                f"{param_dtype} parameters and {grad_dtype} gradients; {remedy}"
            )


def _three_steps(
    step_: Callable[[StepArguments], None],
    device: torch.device,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    geometry: Geometry,
) -> dict[str, Tensor]:
    """Parameters that began at 0, and their state, after three steps: flat and joined, by name."""
    _, density, bucket_size, block_size = geometry
    sizes = (2 * block_size + block_size // 2 + 1, 7)  # full blocks and shorter ones
    layouts = [BlockLayout.of(numel, *geometry) for numel in sizes]
    states = [layout.new_state(device) for layout in layouts]
    params = [torch.zeros(numel, dtype=param_dtype, device=device) for numel in sizes]
    thresholds = [
        torch.zeros(layout.num_blocks, dtype=torch.float32, device=device) for layout in layouts
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        grads = [  # whatever torch's default dtype and device are
            torch.randn(numel, generator=generator, dtype=torch.float32, device="cpu")
            for numel in sizes
        ]
        step_(
            StepArguments(
                params=params,
                grads=[grad.to(device, grad_dtype) for grad in grads],
                **ops.state_arguments(states, thresholds, None),
                num_skipped_blocks=torch.zeros((), dtype=torch.int64, device=device),
                lr_tensor=None,
                grad_scale=None,
                found_inf=None,
                lr=1e-3,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                weight_decay=0.0,
                alpha=0.0,
                density=density,
                block_size=block_size,
                bucket_size=bucket_size,
                stochastic_rounding=False,
                seed=0,
                ordinals=range(len(sizes)),
            )
        )
    joined = {name: torch.cat([s[name].flatten() for s in states]) for name in states[0]}
    return {"parameters": torch.cat(params), **joined}
