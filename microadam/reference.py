"""Algorithm 1 of the paper in plain torch, one function per line of it; runs on any device.

This is the definition that the native kernels are compared with, and the fallback where they are
not built. All arithmetic is float32. Blocks of equal length are the rows of a matrix: ``B`` is the
number of blocks, ``L`` the elements per block, ``k`` the elements kept of each, ``m`` the window
size, ``Q`` the bucket size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from microadam.layout import BlockLayout, Segment
from microadam.rounding import round_to_dtype

# An accumulator at or beyond this magnitude counts as infinite: summed over a window, or as the
# range of a bucket, it could overflow float32 and then never leave the error feedback again. The
# bound is halfway between two bfloat16 numbers, so that smaller values also round to below it.
MAX_MAGNITUDE = 2.0**120 - 2.0**111

MAX_CODE = 15  # codes are 4 bits
MIN_UNIT = torch.finfo(torch.float32).tiny  # of the codes; below it all codes are 0

# Temporaries are float32 matrices of the current blocks. Stepping a large parameter in pieces keeps
# them in cache on a CPU, and bounds the memory that a step needs besides the state: 29 to 37 bytes
# per element of a piece, 50 with stochastic rounding, which is 0.8 GiB on a GPU.
_MAX_ELEMENTS_AT_ONCE = {"cpu": 1 << 18}
_MAX_ELEMENTS_AT_ONCE_ELSEWHERE = 1 << 24


def quantization_unit(minimum: Tensor, maximum: Tensor) -> Tensor:
    """The distance between adjacent codes, float32 in the shape of the arguments."""
    # A tensor: to divide by a number, torch on a GPU multiplies by the rounded reciprocal instead.
    max_code = torch.full((), MAX_CODE, dtype=torch.float32, device=minimum.device)
    return (maximum.float() - minimum.float()) / max_code


def inverse_unit(unit: Tensor) -> Tensor:
    """``1 / unit``; 0 where the unit is 0 or subnormal and the reciprocal might overflow."""
    return torch.where(unit >= MIN_UNIT, unit.reciprocal(), 0.0)


def dequantize(codes: Tensor, minimum: Tensor, maximum: Tensor) -> Tensor:
    """``Q^-1`` of the error feedback: float32 ``(num_buckets, Q)``.

    Args:
        codes: uint8 ``(num_buckets, Q / 2)``, two 4-bit codes per byte.
        minimum, maximum: bfloat16 ``(num_buckets,)``.
    """
    low = minimum.float().unsqueeze(1)
    unit = quantization_unit(minimum, maximum).unsqueeze(1)
    return torch.cat((codes & 15, codes >> 4), dim=1).float() * unit + low


def quantize(residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``Q`` of the error feedback: codes, minimum and maximum, shaped as in `dequantize`.

    Rounds to the nearest of 16 levels between the bucket's smallest and largest value. Multiplies
    by the reciprocal of the unit, as the kernels do: a division would be slower and would only
    change which way ties fall.

    Args:
        residual: float32 ``(num_buckets, Q)``.
    """
    minimum, maximum = (t.bfloat16() for t in residual.aminmax(dim=1))
    low = minimum.float().unsqueeze(1)
    unit = quantization_unit(minimum, maximum).unsqueeze(1)
    level = ((residual - low) * inverse_unit(unit) + 0.5).floor()
    codes = level.clamp(0, MAX_CODE).to(torch.uint8)
    first_half, second_half = codes.chunk(2, dim=1)
    return first_half | (second_half << 4), minimum, maximum


def select_top_k(accumulator: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest magnitudes of every block, ascending: int64 ``(B, k)``.

    Among equals the lower index wins, which ``torch.topk`` does not promise.

    Args:
        accumulator: float32 ``(B, L)``, finite.
    """
    magnitude = accumulator.abs()
    threshold = magnitude.topk(k, dim=1, sorted=True).values[:, -1:]
    above = magnitude > threshold
    equal = magnitude == threshold
    num_wanted = k - above.sum(dim=1, keepdim=True)
    selected = above | (equal & (equal.cumsum(dim=1) <= num_wanted))
    return selected.nonzero()[:, 1].view(-1, k)


def window_moments(
    indices: Tensor, values: Tensor, step: int, beta1: float, beta2: float, length: int
) -> tuple[Tensor, Tensor]:
    """``AdamStats``: the bias-corrected moments of the window, dense float32 ``(B, L)`` each.

    ``m_hat = (1 - beta1) / (1 - beta1^step) * sum_r beta1^r v_r`` over the filled slots, where
    slot age ``r`` is 0 for the newest; ``v_hat`` likewise with ``beta2`` and ``v_r^2``.

    Args:
        indices: int16 ``(B, m, k)``.
        values: bfloat16 ``(B, m, k)``.
        step: steps taken, including this one; at least 1.
        length: ``L``.
    """
    num_blocks, window_size, _ = values.shape
    first = torch.zeros(num_blocks, length, dtype=torch.float32, device=values.device)
    second = torch.zeros_like(first)
    for slot in range(min(step, window_size)):
        age = (step - 1 - slot) % window_size
        index = indices[:, slot].long()
        value = values[:, slot].float()
        first.scatter_add_(1, index, value * beta1**age)
        # The weight is multiplied in before squaring: 0 times an overflowed square would be NaN.
        second.scatter_add_(1, index, value * beta2**age * value)
    first *= (1 - beta1) / (1 - beta1**step)
    second *= (1 - beta2) / (1 - beta2**step)
    return first, second


def shrink(limit: Tensor, alpha: float) -> Tensor:
    """A limit of a bucket's range in bfloat16, with the share ``alpha`` of its error taken out.

    A code is a position in the range, so scaling the range by ``1 - alpha`` scales every error.
    """
    return (limit.float() * (1 - alpha)).bfloat16()


def update(
    param: Tensor,
    feedback: Tensor,
    m_hat: Tensor,
    v_hat: Tensor,
    *,
    lr: float,
    weight_decay: float,
    alpha: float,
    eps: float,
) -> Tensor:
    """The new parameter in float32. Outside the window ``m_hat`` is 0.

    ``param * (1 - lr * weight_decay) - lr * (m_hat / (sqrt(v_hat) + eps) + alpha * e)``, where
    ``e`` is the quantized residual, of which `shrink` has left ``feedback = (1 - alpha) * e``. The
    term with ``alpha`` is not in the paper but in the authors' code, where it makes the update
    dense for pre-training.
    """
    decayed = param * (1 - lr * weight_decay) if weight_decay != 0 else param
    change = lr * (m_hat / (v_hat.sqrt() + eps))
    if alpha != 0:
        change = change + (lr * alpha / (1 - alpha)) * feedback
    return decayed - change


def _step_blocks(
    param: Tensor,  # (B, L), any supported dtype, written
    grad: Tensor,  # (B, L), any floating dtype
    first_element: int,  # index of param[0, 0] in the whole parameter
    step: int,
    window_indices: Tensor,  # (B, m, k) int16, written
    window_values: Tensor,  # (B, m, k) bfloat16, written
    error: Tensor,  # (buckets, Q / 2) uint8, written
    error_min: Tensor,  # (buckets,) bfloat16, written
    error_max: Tensor,  # (buckets,) bfloat16, written
    *,
    inv_scale: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    alpha: float,
    rounding_key: tuple[int, int] | None,
) -> Tensor:
    """One step of blocks of equal length; returns the number of blocks skipped, an int64 scalar."""
    num_blocks, length = param.shape
    k = window_values.shape[2]
    bucket_size = 2 * error.shape[1]
    padding = -length % bucket_size

    feedback = dequantize(error, error_min, error_max).view(num_blocks, length + padding)
    accumulator = grad.float() * inv_scale + feedback[:, :length]
    # NaN compares false, so it counts as not finite too.
    finite = (accumulator.abs() < MAX_MAGNITUDE).all(dim=1)
    accumulator = torch.where(finite.unsqueeze(1), accumulator, 0.0)

    top = select_top_k(accumulator, k)
    slot = (step - 1) % window_values.shape[1]
    kept = finite.view(-1, 1)
    window_indices[:, slot] = torch.where(kept, top.short(), window_indices[:, slot])
    window_values[:, slot] = torch.where(
        kept, accumulator.gather(1, top).bfloat16(), window_values[:, slot]
    )

    residual = accumulator.scatter(1, top, 0.0)
    if padding:  # repeats a value of the last bucket, so that its range does not change
        residual = torch.cat((residual, residual[:, -1:].expand(-1, padding)), dim=1)
    codes, minimum, maximum = quantize(residual.view(-1, bucket_size))
    bucket_kept = finite.repeat_interleave(codes.shape[0] // num_blocks)
    error.copy_(torch.where(bucket_kept.unsqueeze(1), codes, error))
    error_min.copy_(torch.where(bucket_kept, shrink(minimum, alpha), error_min))
    error_max.copy_(torch.where(bucket_kept, shrink(maximum, alpha), error_max))

    m_hat, v_hat = window_moments(window_indices, window_values, step, beta1, beta2, length)
    if alpha != 0:
        feedback = dequantize(error, error_min, error_max).view_as(feedback)
    new_param = update(
        param.float(),
        feedback[:, :length],
        m_hat,
        v_hat,
        lr=lr,
        weight_decay=weight_decay,
        alpha=alpha,
        eps=eps,
    )
    rounded = round_to_dtype(new_param, param.dtype, rounding_key, step, first_element)
    param.copy_(torch.where(kept, rounded, param))
    return num_blocks - finite.sum()


def _step_param(
    param: Tensor,
    grad: Tensor,
    step: int,
    window_indices: Tensor,
    window_values: Tensor,
    error: Tensor,
    error_min: Tensor,
    error_max: Tensor,
    layout: BlockLayout,
    num_skipped_blocks: Tensor,
    **hyperparameters: object,
) -> None:
    at_once = _MAX_ELEMENTS_AT_ONCE.get(param.device.type, _MAX_ELEMENTS_AT_ONCE_ELSEWHERE)
    buckets = error.view(-1, layout.bucket_size // 2)
    for segment in layout.segments:
        for piece in _pieces(segment, max(1, at_once // segment.length)):
            blocks, elements = piece.blocks, piece.elements(layout.block_size)
            in_buckets = slice(
                elements.start // layout.bucket_size, -(-elements.stop // layout.bucket_size)
            )
            num_skipped_blocks += _step_blocks(
                param[elements].view(piece.num_blocks, piece.length),
                grad[elements].view(piece.num_blocks, piece.length),
                elements.start,
                step,
                window_indices[blocks, :, : piece.k],
                window_values[blocks, :, : piece.k],
                buckets[in_buckets],
                error_min[in_buckets],
                error_max[in_buckets],
                **hyperparameters,  # type: ignore[arg-type]
            )


def _pieces(segment: Segment, max_blocks: int) -> list[Segment]:
    return [
        Segment(
            segment.first_block + start,
            min(max_blocks, segment.num_blocks - start),
            segment.length,
            segment.k,
        )
        for start in range(0, segment.num_blocks, max_blocks)
    ]


class StepArguments(NamedTuple):
    """What one step of many parameters takes, in the order of the operator's schema.

    Args:
        params: contiguous, of any shape; float32, bfloat16 or float16. Written.
        grads: the gradients, in the same order and shapes; any floating dtype. Only read.
        steps: int64 scalars, the steps taken before this one. Incremented.
        window_indices, window_values, error, error_min, error_max: the state, shaped as specified
            by `microadam.BlockLayout.state_spec`. Written.
        thresholds: float32 ``(num_blocks,)`` for each parameter, 0 at first; written. A cache in
            which a native kernel notes how far down to look for the largest accumulators of each
            block. It changes no result.
        num_skipped_blocks: int64 scalar; grows by the number of blocks left as they were because
            their accumulator held a NaN, an Inf or a magnitude of ``MAX_MAGNITUDE`` or more.
        lr_tensor: scalar learning rate; if given, replaces ``lr``.
        grad_scale: scalar that the gradients were multiplied by (``GradScaler``); None for 1.
        found_inf: scalar; unless it is 0, nothing at all is changed.
        ordinals: a number for each parameter or shard, of which only the low 32 bits count. With
            ``seed``, the step and the element's index, it determines the random bits of stochastic
            rounding.
        others: as `microadam.MicroAdam` takes them.
        held_state: the state and the thresholds as `microadam.ops.HeldState` keeps them for the
            native library; the lists are then empty.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    steps: Sequence[Tensor]
    window_indices: Sequence[Tensor]
    window_values: Sequence[Tensor]
    error: Sequence[Tensor]
    error_min: Sequence[Tensor]
    error_max: Sequence[Tensor]
    thresholds: Sequence[Tensor]
    num_skipped_blocks: Tensor
    lr_tensor: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    alpha: float
    density: float
    block_size: int
    bucket_size: int
    stochastic_rounding: bool
    seed: int
    ordinals: Sequence[int]
    held_state: Tensor | None = None


def step_(args: StepArguments) -> None:
    """One MicroAdam step of many parameters, in place."""
    if args.found_inf is not None and args.found_inf.item() != 0:
        return
    for i, param in enumerate(args.params):
        args.steps[i].add_(1)
        window_size = args.window_indices[i].shape[1]
        _step_param(
            param.view(-1),
            args.grads[i].view(-1),
            int(args.steps[i]),
            args.window_indices[i],
            args.window_values[i],
            args.error[i],
            args.error_min[i],
            args.error_max[i],
            BlockLayout.of(
                param.numel(), window_size, args.density, args.bucket_size, args.block_size
            ),
            args.num_skipped_blocks,
            inv_scale=1.0 if args.grad_scale is None else 1.0 / float(args.grad_scale),
            lr=args.lr if args.lr_tensor is None else float(args.lr_tensor),
            beta1=args.beta1,
            beta2=args.beta2,
            eps=args.eps,
            weight_decay=args.weight_decay,
            alpha=args.alpha,
            rounding_key=(args.seed, args.ordinals[i]) if args.stochastic_rounding else None,
        )
