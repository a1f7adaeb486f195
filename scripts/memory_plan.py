"""Plans the memory of every model with every optimizer at paper scale, from shapes alone.

    python -m scripts.memory_plan

Reads configs/table/memory.yaml; writes results/memory_plan.json, for one card, and the table in
docs/scale.md, for several. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from experiments import planning, tasks
from experiments.atomic import write_text
from experiments.config import RunConfig
from experiments.errors import reported
from experiments.hardware import param_dtype
from run import compose

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- written by make memory-table -->"  # starts the table in docs/scale.md
END = "<!-- end -->"


def _with_state_of(config: RunConfig, plan: planning.Plan) -> planning.Plan:
    """``plan`` with the optimizer of ``config``."""
    model = tasks.by_name(config.task.name).plan_model(config, param_dtype(plan.precision))
    return dataclasses.replace(plan, state_bytes=config.optimizer.state_bytes(model))


def rows_of(table: dict[str, Any], card: str) -> list[dict[str, Any]]:
    """A plan for each model with each optimizer on ``card``, with the config it was made from."""
    rows = []
    for model, of_model in tqdm(table["models"].items(), desc=card, unit="model"):
        plans: dict[bool, planning.Plan] = {}
        for optimizer, of_optimizer in table["optimizers"].items():
            overrides = ["scale=paper", f"hardware={card}", *of_model, *of_optimizer]
            config = compose(*overrides)
            # The optimizer affects only its own state, unless gradients are released.
            is_released = bool(config.training.gradient_release)
            if is_released in plans:
                plan = _with_state_of(config, plans[is_released])
            else:
                plan = plans[is_released] = planning.make(config)
            rows.append(
                {
                    "model": model,
                    "optimizer": optimizer,
                    "command": f"python run.py {' '.join(overrides)} dry_run=true",
                    **dataclasses.asdict(plan),
                    "peak_bytes": plan.peak_bytes,
                    "config": {
                        name: dataclasses.asdict(getattr(config, name))
                        for name in ("task", "model", "optimizer", "hardware", "training")
                    },
                }
            )
    return rows


def scale_table(table: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> str:
    """Planned peaks in Markdown, a line for each model and card; bold if they fit.

    Args:
        rows: what `rows_of` returned, by card.
    """
    head = ["model", "card", *table["optimizers"]]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for model in table["models"]:
        for of_card in rows.values():
            of_model = [row for row in of_card if row["model"] == model]
            card_gib = of_model[0]["config"]["hardware"]["memory_gib"]
            cells = []
            for row in of_model:
                bold = "**" if planning.fits(row["peak_bytes"], card_gib) else ""
                cells.append(f"{bold}{row['peak_bytes'] / 2**30:.1f}{bold}")
            lines.append([model, f"{card_gib:g}", *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m scripts.memory_plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    table = yaml.safe_load((ROOT / "configs/table/memory.yaml").read_text(encoding="utf-8"))
    rows = {card: rows_of(table, card) for card in table["cards"]}
    text = json.dumps({"title": table["title"], "rows": rows[table["hardware"]]}, indent=1) + "\n"
    write_text(ROOT / "results/memory_plan.json", text)

    page = ROOT / "docs/scale.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(page, f"{before}{BEGIN}\n\n{scale_table(table, rows)}\n{END}{after}")


if __name__ == "__main__":
    with reported():
        main()
