"""Bytes of optimizer state per parameter, measured on the state tensors after one step.

python -m benchmarks.memory
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.models import MODELS, num_parameters
from benchmarks.optimizers import DTYPES, available, make_parameters, missing, state_bytes, supports


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizers", nargs="+", choices=available(), default=list(available()))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=Path("results/benchmark_memory"))
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for model, shapes in MODELS.items():
        for dtype_name, dtype in DTYPES.items():
            for name in args.optimizers:
                if not supports(name, dtype, args.device):
                    continue
                params = make_parameters(shapes, dtype, args.device, seed=0)
                optimizer = available()[name](params)
                for p in params:
                    p.grad = p.detach().clone()
                optimizer.step()
                rows.append(
                    {
                        "model": model,
                        "dtype": dtype_name,
                        "optimizer": name,
                        "state_bytes": state_bytes(optimizer),
                        "num_parameters": num_parameters(shapes),
                    }
                )

    # One line per optimizer, one column per model and dtype.
    cases = [(model, dtype_name) for model in MODELS for dtype_name in DTYPES]
    lines = []
    for name in args.optimizers:
        own = {(row["model"], row["dtype"]): row for row in rows if row["optimizer"] == name}
        shares = [
            f"{own[case]['state_bytes'] / own[case]['num_parameters']:.3f}" if case in own else ""
            for case in cases
        ]
        lines.append([name, *shares])
    headers = ["optimizer", *map(", ".join, cases)]
    notes = [
        "Bytes of state a parameter after one step; parameters and gradients not counted.",
        f"Not installed: {', '.join(missing()) or 'none'}.",
    ]
    results = {
        "environment": report.environment(args.device),
        "not_installed": missing(),
        "rows": rows,
    }
    print(
        report.write(args.output, "Optimizer state", notes, report.table(headers, lines), results)
    )


if __name__ == "__main__":
    main()
