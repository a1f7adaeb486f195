"""Records as a run would leave them, with made-up numbers: for tests, and to look at the page."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any


def record(**changes: Any) -> dict[str, Any]:
    """One record; ``changes`` are top-level values, and ``lr``, ``metrics``, ``config`` parts."""
    lr = changes.pop("lr", 1e-3)
    metrics = changes.pop("metrics", {})
    config = changes.pop("config", {})
    task, model = changes.get("task", "mnli"), changes.get("model", "tiny_bert")
    optimizer, scale = changes.get("optimizer", "microadam"), changes.get("scale", "smoke")
    seed = changes.get("seed", 42)
    noise = random.Random(f"{task} {model} {optimizer} {lr} {seed}")
    steps = list(range(2, 252, 2))
    base = 1.1 + 0.2 * abs(math.log10(lr / 1e-3))
    losses = [base * math.exp(-s / 400) + 0.05 * noise.gauss(0, 1) for s in steps]
    return {
        "status": "finished",
        "finished_at": "2026-01-02T03:04:05+00:00",
        "run": f"{noise.getrandbits(40):010x}",
        "command": f"python run.py task={task} optimizer={optimizer} optimizer.lr={lr:g}",
        "task": task,
        "model": model,
        "optimizer": optimizer,
        "scale": scale,
        "seed": seed,
        "data_source": "generated",
        "model_source": "random",
        "num_params": 1_000_000,
        "num_examples": 8000,
        "num_overlong_examples": 0,
        "num_steps": 250,
        "num_units": 500_000,
        "unit": "tokens",
        "metrics": {
            "train/first_loss": losses[0],
            "train/last_loss": losses[-1],
            "train/final_loss": sum(losses[-12:]) / 12,
            "eval/loss": 1.0,
            "eval/accuracy_matched": 0.6 + 0.01 * noise.gauss(0, 1),
            "memory/state_bytes": 962_500,
            "memory/peak_bytes": 500_000_000,
            "time/training_s": 100.0,
            "time/optimizer_s": 10.0,
            "time/wall_s": 120.0,
            **metrics,
        },
        "curve": {"step": steps, "train/loss": losses},
        "hardware": {
            "device": "cpu",
            "gpu": None,
            "cpu": "Test CPU",
            "num_threads": 2,
            "precision": "fp32",
        },
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
        "versions": {
            "python": "3.11",
            "microadam": "0.1.0",
            "torch": "2.14.1",
            "transformers": "5",
        },
        "config": {
            "task": {"name": task, "max_length": 64},
            "scale": scale,
            "model": {"name": model, "weights": "random", "path": None},
            "dataset": {"name": task, "root": "data", "path": None},
            "optimizer": {"name": optimizer, "lr": lr},
            "hardware": {
                "name": "cpu",
                "precision": "fp32",
                "micro_batch_size": 8,
                "activation_checkpointing": False,
                "activation_offloading": False,
            },
            "training": {
                "epochs": 1.0,
                "max_steps": None,
                "save_model": True,
                "gradient_release": False,
            },
            "seed": seed,
            "results_dir": "results",
            **config,
        },
        **changes,
    }


def write(results_dir: Path, *records: dict[str, Any]) -> None:
    """Puts the records where a run would."""
    folder = results_dir / "records"
    folder.mkdir(parents=True, exist_ok=True)
    for values in records:
        names = (values["task"], values["model"], values["optimizer"], values["run"])
        (folder / f"{'-'.join(names)}.json").write_text(json.dumps(values))
