"""Compares steps of every CPU kernel, with random shapes and hyperparameters, with plain torch.

    python -m tests.microadam.fuzz_native --minutes 10

Prints the seed of a case that fails; ``--seed`` repeats it alone.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import torch

from microadam import ops
from tests.microadam.agreement import Hyperparameters, Run, step_and_compare
from tests.microadam.test_native import KINDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fuzz_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bucket_size = 2 * int(rng.integers(1, 65)) if rng.random() < 0.5 else 64
    block_size = bucket_size * int(rng.integers(1, 32_768 // bucket_size + 1))
    hyper = Hyperparameters(
        window_size=int(rng.integers(1, 15)),
        density=float(rng.choice([1.0, 0.3, 10 ** rng.uniform(-4, 0)])),
        bucket_size=bucket_size,
        block_size=4096 if 4096 % bucket_size == 0 and rng.random() < 0.5 else block_size,
        lr=float(10 ** rng.uniform(-6, 0)),
        beta1=float(rng.choice([0.0, 0.9, rng.random()])),
        beta2=float(rng.choice([0.0, 0.999, rng.random()])),
        eps=float(10 ** rng.uniform(-12, -1)),
        weight_decay=float(rng.choice([0.0, rng.random()])),
        alpha=float(rng.choice([0.0, rng.random()])),
        stochastic_rounding=bool(rng.integers(2)),
        seed=int(rng.integers(2**64, dtype=np.uint64)),
    )
    os.environ["ATEN_CPU_CAPABILITY"] = str(rng.choice(["default", "avx2", "avx512"]))
    generator = torch.Generator().manual_seed(seed)
    dtype, grad_dtype = (DTYPES[i] for i in rng.integers(len(DTYPES), size=2))
    sizes = [int(10 ** rng.uniform(0, 5)) - 1 for _ in range(rng.integers(1, 5))]
    run = Run(hyper, [torch.randn(n, generator=generator).to(dtype) for n in sizes])
    for _ in range(rng.integers(1, 16)):
        kind = KINDS["normal" if rng.random() < 0.5 else rng.choice(sorted(KINDS))]
        grads = [torch.randn(n, generator=generator) for n in sizes]
        step_and_compare(run, [(kind(g) if g.numel() else g).to(grad_dtype) for g in grads])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="run this case only")
    args = parser.parse_args()
    kernel = ops.native_kernel("cpu")
    if not kernel:
        raise SystemExit(f"there is nothing to fuzz: {ops.load_native_library()}")
    if args.seed is not None:
        fuzz_one(args.seed)
        return
    start = time.monotonic()
    first = seed = int(time.time())
    while time.monotonic() - start < 60 * args.minutes:
        try:
            fuzz_one(seed)
        except (AssertionError, RuntimeError, ValueError):
            print(f"case {seed} failed; repeat it with --seed {seed}")
            raise
        seed += 1
    print(f"{seed - first} cases agree, seeds {first} to {seed - 1}, library {ops.NATIVE_LIBRARY}")


if __name__ == "__main__":
    main()
