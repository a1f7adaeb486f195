"""Reports where a gradient is not finite, before the optimizer spreads it."""

from __future__ import annotations

import math

import torch

from experiments import distributed
from microadam.distributed import is_sharded, local

_NUM_NAMED = 5


def of_gradients(model: torch.nn.Module) -> str:
    """Which parameters or their gradients are not finite, and the largest gradient norms.

    The norm of a non-finite gradient is that of its finite elements. Call it on all ranks.
    """
    params, facts = {}, []
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        params[name] = p
        grad, values = local(p.grad), local(p.detach())
        is_finite = grad.isfinite()
        squares = grad.where(is_finite, 0.0).double().square().sum()
        facts += [(~is_finite).sum(), (~values.isfinite()).sum(), squares]
    numbers = torch.stack([fact.double() for fact in facts]).tolist()
    if any(is_sharded(p) for p in params.values()):
        numbers = distributed.summed(*numbers)
    bad_grads, bad_values, sums = (
        dict(zip(params, numbers[start::3], strict=True)) for start in range(3)
    )
    norms = sorted(((math.sqrt(value), name) for name, value in sums.items()), reverse=True)
    return "\n".join(
        f"  {what}: {', '.join(entries)}"
        for what, entries in (
            ("not finite in the gradients of", _counts(bad_grads, params)),
            ("not finite in the weights of", _counts(bad_values, params)),
            (
                "largest gradient norms",
                [f"{name} {norm:.3g}" for norm, name in norms[:_NUM_NAMED]],
            ),
        )
    )


def _counts(bad: dict[str, float], params: dict[str, torch.nn.Parameter]) -> list[str]:
    """The first few names with a nonzero count, as ``name (12 of 4096)``."""
    named = [f"{name} ({int(n)} of {params[name].numel()})" for name, n in bad.items() if n]
    rest = len(named) - _NUM_NAMED
    return (named[:_NUM_NAMED] + ([f"{rest} more"] if rest > 0 else [])) or ["none"]
