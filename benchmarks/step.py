"""How long an optimizer step takes, as a ratio to torch's fused AdamW on the same parameters.

    python -m benchmarks.step

Machines are noisy, so the two optimizers step in turn, and only quiet rounds count: those in which
fused AdamW was within 25% of its own best tenth, and our threads waited for a core at most 2% of
the time. (On a CPU the first criterion is not enough: fused AdamW waits for memory, and a single
core suffices for that.) The ratio is the median over quiet rounds, given with its quartiles. If no
round was quiet, all count, and the table says so.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks import report
from benchmarks.models import (
    LARGE_MODELS,
    MODELS,
    ROWS_WITH_GRADIENT,
    SMALL_MODELS,
    SPARSE_MODELS,
    Shapes,
    num_parameters,
)
from benchmarks.optimizers import (
    BASELINE,
    DTYPES,
    Factory,
    available,
    make_parameters,
    missing,
    rivals_in_speed,
    supports,
)
from microadam import BlockLayout

NUM_WARM_UP = 12  # fills MicroAdam's window
NUM_GRADIENTS = 4  # used by the steps in turn
MAX_ROUNDS_S = 10.0  # a slower optimizer gets fewer rounds
MAX_WAITING = 0.02  # of a quiet round
SECTOR_BYTES = 32  # granularity of access to a GPU's memory
ALL_MODELS = MODELS | LARGE_MODELS | SMALL_MODELS
ALL_MODELS |= {new: MODELS[of] for new, of in SPARSE_MODELS.items()}


def timed(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def waited_s() -> float:
    """Seconds that our threads, taken together, were ready to run but had no core."""
    tasks = Path("/proc/self/task").glob("*/schedstat")  # ns on a core, ns waiting for one
    return sum(int(task.read_text().split()[1]) for task in tasks) / 1e9


class Contestant:
    """An optimizer with its own parameters; the gradients are shared."""

    def __init__(self, factory: Factory, shapes: Shapes, dtype: torch.dtype, device: str) -> None:
        self.device = device
        self.params = make_parameters(shapes, dtype, device, seed=0)
        self.optimizer: Optimizer = factory(self.params)

    def step(self, grads: list[torch.Tensor]) -> float:
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad
        return timed(self.optimizer.step, self.device)


def make_gradients(model: str, dtype: torch.dtype, device: str, seed: int) -> list[torch.Tensor]:
    """Normally distributed; in sparse embeddings, the higher a row's number, the rarer it is."""
    shapes = ALL_MODELS[model]
    grads = [p.detach() for p in make_parameters(shapes, dtype, device, seed)]
    generator = torch.Generator().manual_seed(seed)
    for grad, shape in zip(grads, shapes, strict=True):
        if model in SPARSE_MODELS and shape in ROWS_WITH_GRADIENT:
            frequencies = 1 / torch.arange(1.0, shape[0] + 1)
            rows = torch.multinomial(frequencies, ROWS_WITH_GRADIENT[shape], generator=generator)
            is_zero = torch.ones(shape[0], dtype=torch.bool)
            is_zero[rows] = False
            grad[is_zero.to(device)] = 0
    return grads


def compare(
    baseline: Contestant, other: Contestant, grads: list[list[torch.Tensor]], num_rounds: int
) -> dict[str, float]:
    """Times both in turn; see the module docstring."""
    for i in range(NUM_WARM_UP):
        baseline.step(grads[i % len(grads)])
        last_s = other.step(grads[i % len(grads)])
        if last_s > MAX_ROUNDS_S / NUM_WARM_UP and i >= 1:
            break
    num_rounds = max(5, min(num_rounds, int(MAX_ROUNDS_S / last_s)))
    rounds, undisturbed = [], []
    for i in range(num_rounds):
        grad = grads[i % len(grads)]
        waited_before_s = waited_s()
        rounds.append((baseline.step(grad), other.step(grad)))
        if waited_s() - waited_before_s <= MAX_WAITING * sum(rounds[-1]):
            undisturbed.append(rounds[-1])
    best = sorted(b for b, _ in rounds)[len(rounds) // 10]
    quiet = [(b, o) for b, o in undisturbed if b <= 1.25 * best]
    used = quiet or rounds
    ratios = sorted(o / b for b, o in used)
    return {
        "ratio": statistics.median(ratios),
        "ratio_quartile_1": ratios[len(ratios) // 4],
        "ratio_quartile_3": ratios[(3 * len(ratios)) // 4],
        "baseline_s": statistics.median(b for b, _ in used),
        "step_s": statistics.median(o for _, o in used),
        "num_quiet_rounds": len(quiet),
        "num_rounds": len(rounds),
    }


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a copy of 512 MiB reads and writes, the best of 20."""
    source = torch.ones(1 << 27, device=device)
    target = torch.empty_like(source)
    best_s = min(timed(lambda: target.copy_(source), device) for _ in range(20))
    return 2 * source.nbytes / best_s


def bytes_moved(name: str, contestant: Contestant) -> int | None:
    """Lower bound on the bytes its last step read and wrote; None if they have not been counted."""
    params = contestant.params
    num_bytes = sum(p.nbytes for p in params)
    if name.startswith("AdamW"):
        return num_bytes * (1 + 2 * 3)  # gradient read; parameters and two moments read and written
    if name != "MicroAdam":
        return None
    total = num_bytes
    for p in params:
        layout = BlockLayout(p.numel())
        num_entries = layout.num_blocks * layout.k
        total += 2 * (layout.num_buckets * layout.bucket_size // 2 + 4 * layout.num_buckets)
        total += 4 * num_entries * (layout.window_size + 1)  # read all slots, write one
        # The CPU core fetches all of the parameter.
        total += 2 * (_updated_bytes(contestant, p, layout) if p.is_cuda else p.nbytes)
    return total


def _updated_bytes(contestant: Contestant, p: torch.nn.Parameter, layout: BlockLayout) -> int:
    """Bytes of the parameter in sectors of a GPU's memory that contain a window's coordinate."""
    per_sector = SECTOR_BYTES // p.element_size()
    is_updated = torch.zeros(-(-p.numel() // per_sector), dtype=torch.bool, device=p.device)
    window = contestant.optimizer.state[p]["window_indices"]
    for segment in layout.segments:
        blocks = torch.arange(layout.num_blocks, device=p.device)[segment.blocks]
        for slot in range(layout.window_size):
            indices = window[segment.blocks, slot, : segment.k].long()
            is_updated[(indices + blocks[:, None] * layout.block_size) // per_sector] = True
    return int(is_updated.sum()) * SECTOR_BYTES


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=ALL_MODELS, default=[*MODELS, *SPARSE_MODELS]
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--optimizers", nargs="+", choices=available(), default=rivals_in_speed())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=Path("results/benchmark_step_cpu"))
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for model in args.models:
        for dtype_name in args.dtypes:
            shapes, dtype = ALL_MODELS[model], DTYPES[dtype_name]
            grads = [
                make_gradients(model, dtype, args.device, seed)
                # A GPU has no room for two sets of a large model's gradients.
                for seed in range(1, 1 + (1 if model == "llama2-7b" else NUM_GRADIENTS))
            ]
            baseline = Contestant(available()[BASELINE], shapes, dtype, args.device)
            for name in args.optimizers:
                if name == BASELINE or not supports(name, dtype, args.device):
                    continue
                other = Contestant(available()[name], shapes, dtype, args.device)
                row: dict[str, Any] = {"model": model, "shapes": SPARSE_MODELS.get(model, model)}
                row |= {"dtype": dtype_name, "optimizer": name}
                # Once per row: on a shared machine it may double from one minute to the next.
                row["copy_bandwidth_bytes_per_s"] = bandwidth = copy_bandwidth(args.device)
                row |= compare(baseline, other, grads, args.rounds)
                num_bytes = bytes_moved(name, other)
                if num_bytes is not None:
                    row["bytes_moved"] = num_bytes
                    row["share_of_copy_bandwidth"] = num_bytes / row["step_s"] / bandwidth
                rows.append(row)
                print(f"{model} {dtype_name} {name}: {row['ratio']:.3f}", flush=True)
                write(rows, args)  # after each row, so that an interruption loses nothing
    print(write(rows, args))


def write(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    headers = ["model", "dtype", "optimizer", "ratio", "quartiles", "step", "ns a parameter"]
    headers += ["bytes a parameter", "copy, GB/s", "of copy", "quiet rounds"]
    lines = []
    for row in rows:
        numel = num_parameters(ALL_MODELS[row["model"]])
        counted = "bytes_moved" in row
        lines.append(
            [
                row["model"],
                row["dtype"],
                row["optimizer"],
                f"{row['ratio']:.2f}",
                f"{row['ratio_quartile_1']:.2f} to {row['ratio_quartile_3']:.2f}",
                f"{1e3 * row['step_s']:.1f} ms",
                f"{1e9 * row['step_s'] / numel:.2f}",
                f"{row['bytes_moved'] / numel:.2f}" if counted else "",
                f"{row['copy_bandwidth_bytes_per_s'] / 1e9:.0f}",
                f"{row['share_of_copy_bandwidth']:.0%}" if counted else "",
                f"{row['num_quiet_rounds']} of {row['num_rounds']}",
            ]
        )
    notes = [
        f"Time of a step over that of {BASELINE}, interleaved: the median of quiet rounds, and of "
        "all where the last column says 0.",
        "Copy: bytes that torch's copy of 512 MiB reads and writes, measured before each row.",
        f"Not installed: {', '.join(missing()) or 'none'}.",
    ]
    results = {
        "environment": report.environment(args.device),
        "not_installed": missing(),
        "rows": rows,
    }
    return report.write(args.output, "Optimizer step", notes, report.table(headers, lines), results)


if __name__ == "__main__":
    main()
