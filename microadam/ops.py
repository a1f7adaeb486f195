"""The fused MicroAdam step as a torch operator: its schema, its checks, and which code runs it.

``torch.ops.microadam.step_`` steps all parameters of the same device and dtypes in one call. Its
default implementation is plain torch (`microadam.reference`) and runs on every device. The native
library beside this file, if it was built, adds faster ones, which torch's dispatcher prefers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from operator import is_, itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from microadam import reference
from microadam.layout import BlockLayout
from microadam.reference import StepArguments

BACKEND_VARIABLE = "MICROADAM_BACKEND"
NATIVE_LIBRARY = Path(__file__).with_name("_native.so")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The fields of reference.StepArguments; letters and ! mark what is written. Graphs are traced with
# the lists, never with held_state, which hides what is written.
_SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] steps, Tensor(c!)[] window_indices, "
    "Tensor(d!)[] window_values, Tensor(e!)[] error, Tensor(f!)[] error_min, "
    "Tensor(g!)[] error_max, Tensor(h!)[] thresholds, Tensor(i!) num_skipped_blocks, "
    "Tensor? lr_tensor, Tensor? grad_scale, Tensor? found_inf, float lr, float beta1, "
    "float beta2, float eps, float weight_decay, float alpha, float density, int block_size, "
    "int bucket_size, bool stochastic_rounding, int seed, int[] ordinals, "
    "Tensor? held_state=None) -> ()"
)

_STATE_KEYS = ("step", "window_indices", "window_values", "error", "error_min", "error_max")
_STATE_LISTS = ("steps", *_STATE_KEYS[1:], "thresholds")  # of the schema
_state_tensors = itemgetter(*_STATE_KEYS)

# Held tensors keep their memory until the next step, even if the user has replaced the state, with
# a copy on the CPU for example. A larger state is not held: the time saved would be negligible
# compared with its step.
MAX_HELD_BYTES = 1 << 28


@cache
def _wanted_backend() -> str:
    """``MICROADAM_BACKEND``, read once: torch, native, or empty for native if it is built.

    Raises:
        ValueError: it is anything else.
    """
    wanted = os.environ.get(BACKEND_VARIABLE, "")
    if wanted not in ("", "native", "torch"):
        raise ValueError(f"{BACKEND_VARIABLE}={wanted!r}: set it to native or torch, or not at all")
    return wanted


@cache
def load_native_library() -> str:
    """Loads the native library; returns "", or the reason why plain torch runs every step.

    Raises:
        ValueError: ``MICROADAM_BACKEND`` is neither ``torch`` nor ``native``.
    """
    if _wanted_backend() == "torch":
        return f"{BACKEND_VARIABLE}=torch asks for plain torch"
    reason = "it was not built"
    if NATIVE_LIBRARY.exists():
        try:
            torch.ops.load_library(NATIVE_LIBRARY)  # type: ignore[no-untyped-call]
            return ""
        except OSError as error:
            reason = f"it does not load with this torch ({error})"
    if not _wanted_backend():  # otherwise the step raises
        warnings.warn(
            f"MicroAdam's native library is not used: {reason}. Steps run in plain torch, which is "
            "many times slower. To build it, install a C++17 compiler, then MicroAdam from its "
            "source with pip install --no-build-isolation.",
            stacklevel=3,
        )
    return reason


def native_kernel(device_type: str) -> str:
    """The native kernel for this type of device, such as ``"AVX-512"``; empty if there is none."""
    return "" if load_native_library() else torch.ops.microadam.native_kernel(device_type)


@cache
def why_plain_torch(device_type: str) -> str:
    """Why there is no native kernel for this type of device; warns once if there could be one."""
    reason = load_native_library()  # warns, too
    if not reason and device_type == "cuda":
        reason = (
            "it was built without CUDA kernels. To build them, install an nvcc of torch's CUDA "
            'version (for CUDA 13, pip install "cuda-toolkit[nvcc]"), then MicroAdam from its '
            "source with pip install --no-build-isolation: where this GPU is, or with "
            "MICROADAM_CUDA_ARCHITECTURES=all"
        )
        if not _wanted_backend():  # otherwise the step raises
            warnings.warn(
                "MicroAdam steps in plain torch on this GPU, which is many times slower than its "
                f"native library: {reason}.",
                stacklevel=3,
            )
    return reason or f"it has no kernel for {device_type}"


class HeldState(NamedTuple):
    """The state a step was given, kept as C++ lists for the next step with the same tensors.

    Converting seven lists of tensors to C++ takes longer than stepping small parameters does.
    """

    tensors: list[Tensor]  # in the order of `_tensors_of`
    handle: Tensor  # for StepArguments.held_state


def hold_state(
    states: Sequence[Mapping[str, Any]], thresholds: Sequence[Tensor], held: HeldState | None
) -> HeldState | None:
    """The state in the form the native library takes fastest; None if that gains nothing.

    Args:
        states, thresholds: of all parameters that are stepped in one call.
        held: from an earlier step. It is reused as long as the tensors are the same objects.
            Nothing else need be compared: it holds references to them, and at every step the native
            library sees and checks them as they then are, including any new storage.
    """
    if len(states) == 1 or torch.compiler.is_compiling():
        return None
    if (
        held is not None
        and len(held.tensors) == len(_STATE_LISTS) * len(states)
        and all(map(is_, held.tensors, _tensors_of(states, thresholds)))
    ):
        return held
    tensors = list(_tensors_of(states, thresholds))
    if (
        sum(t.nbytes for t in tensors) > MAX_HELD_BYTES
        or any(type(t) is not Tensor for t in tensors)  # fake tensors, for example
        or not native_kernel(tensors[0].device.type)
    ):
        return None
    lists = state_arguments(states, thresholds, None)
    return HeldState(tensors, torch.ops.microadam.hold_state.default(**lists))


def _tensors_of(
    states: Sequence[Mapping[str, Any]], thresholds: Sequence[Tensor]
) -> Iterator[Tensor]:
    return chain(chain.from_iterable(map(_state_tensors, states)), thresholds)


def state_arguments(
    states: Sequence[Mapping[str, Any]], thresholds: Sequence[Tensor], held: HeldState | None
) -> dict[str, Any]:
    """The state's fields of ``StepArguments``: its lists, or what `hold_state` made of them."""
    if held is not None:
        return {**dict.fromkeys(_STATE_LISTS, ()), "held_state": held.handle}
    lists = (*zip(*map(_state_tensors, states), strict=True), thresholds)
    return dict(zip(_STATE_LISTS, lists, strict=True))


def step_(args: StepArguments) -> None:
    """One MicroAdam step of many parameters, in place, by the fastest code available for them.

    Args:
        args: all parameters share a device and a dtype, and so do all gradients.

    Raises:
        RuntimeError: ``MICROADAM_BACKEND=native``, but there is no native kernel for the device.
        ValueError: ``MICROADAM_BACKEND`` is neither ``torch`` nor ``native``.
    """
    if not args.params:
        return
    if args.grads[0].dtype not in DTYPES:
        args = args._replace(grads=[grad.float() for grad in args.grads])
    if args.seed >= 2**63:
        args = args._replace(seed=args.seed - 2**64)  # the same bits as a signed integer
    if not torch.compiler.is_compiling():
        # A backward pass that has saved a parameter must raise, as after any in-place change.
        torch.autograd.graph.increment_version(args.params)
    torch.ops.microadam.step_.default(*args)  # .default: spares torch the overload lookup


def _plain_torch_step(*values: Any) -> None:
    # The dispatcher comes here until a native kernel for the device is registered.
    args = StepArguments(*values)
    device_type = args.num_skipped_blocks.device.type
    was_loaded = load_native_library.cache_info().currsize > 0
    if native_kernel(device_type) and not was_loaded:  # registered just now
        torch.ops.microadam.step_.default(*args)
        return
    reason = why_plain_torch(device_type)
    if _wanted_backend() == "native":
        raise RuntimeError(f"{BACKEND_VARIABLE}=native, but it cannot run: {reason}")
    reference.step_(args)


def _check_arguments(*values: Any) -> None:
    """All checks of the operator; torch runs this when it traces a graph."""
    args = StepArguments(*values)
    if not 0 <= args.alpha < 1:
        raise ValueError(f"alpha={args.alpha}: must be at least 0 and less than 1")
    device = args.num_skipped_blocks.device
    _require("num_skipped_blocks", args.num_skipped_blocks, (), (torch.int64,), device)
    for name in ("lr_tensor", "grad_scale", "found_inf"):
        scalar = getattr(args, name)
        if scalar is not None:
            _require(name, scalar, None, (torch.float32, torch.float64), device)
    # Zipping with the state's keys leaves out thresholds, the last of the lists.
    state = {key: getattr(args, name) for key, name in zip(_STATE_KEYS, _STATE_LISTS, strict=False)}
    others = {"grads": args.grads, "thresholds": args.thresholds, "ordinals": args.ordinals}
    for name, entries in (state | others).items():
        if len(entries) != len(args.params):
            raise ValueError(f"{name} has {len(entries)} entries for {len(args.params)} parameters")
    for i, param in enumerate(args.params):
        indices = args.window_indices[i]
        if indices.dim() != 3 or indices.shape[1] != args.window_indices[0].shape[1]:
            raise ValueError(
                f"window_indices[{i}] has shape {tuple(indices.shape)}: it must be "
                "(num_blocks, window_size, k) with one window_size for all parameters"
            )
        # int(): graphs are traced for parameters of fixed sizes.
        layout = BlockLayout.of(
            int(param.numel()),
            int(indices.shape[1]),
            args.density,
            args.bucket_size,
            args.block_size,
        )
        _require(f"params[{i}]", param, param.shape, DTYPES, device)
        _require(f"params[{i}]", param, param.shape, (args.params[0].dtype,), device)
        _require(f"grads[{i}]", args.grads[i], param.shape, DTYPES, device)
        _require(f"grads[{i}]", args.grads[i], param.shape, (args.grads[0].dtype,), device)
        for name, (shape, dtype) in layout.state_spec.items():
            _require(f"{name}[{i}]", state[name][i], shape, (dtype,), device)
        _require(
            f"thresholds[{i}]", args.thresholds[i], (layout.num_blocks,), (torch.float32,), device
        )


def _require(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...] | None,  # None: one element, of any shape
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    has_shape = tensor.numel() == 1 if shape is None else tensor.shape == shape
    is_right = has_shape and tensor.dtype in dtypes and tensor.device == device
    if not (is_right and tensor.is_contiguous()):
        raise ValueError(
            f"{name} is a tensor of {tensor.dtype} with shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()} on {tensor.device}: it must be contiguous, "
            f"{' or '.join(map(str, dtypes))}, of shape {shape or '()'} and on {device}"
        )


# Not a torch.library.custom_op: that bumps the version counters of all state tensors one by one in
# Python, which took longer than the step of a small parameter.
torch.library.define("microadam::step_", _SCHEMA, tags=torch.Tag.pt2_compliant_tag)
torch.library.impl("microadam::step_", "CompositeExplicitAutograd", _plain_torch_step)
torch.library.register_fake("microadam::step_", _check_arguments)
# The step is not differentiable. Without this, torch's default autograd kernel would inspect every
# tensor.
torch.library.impl("microadam::step_", "Autograd", torch.library.fallthrough_kernel)
