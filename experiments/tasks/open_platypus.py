"""Open-Platypus: instruction tuning (arXiv:2308.07317), evaluated on four multiple-choice tasks."""

from __future__ import annotations

from typing import Any

from experiments.data.text import Row
from experiments.tasks.causal_lm import CausalLM

# The paper's table averages these, and so does `OpenPlatypus.evaluate` if all are present.
_AVERAGED = (
    "arc_challenge/acc_norm,none",
    "hellaswag/acc_norm,none",
    "mmlu/acc,none",
    "winogrande/acc,none",
)


class OpenPlatypus(CausalLM):
    columns = ("instruction", "input", "output")

    @staticmethod
    def prompt(row: Row) -> str:
        """The prompt of Stanford Alpaca, with or without an input alongside the instruction."""
        if row["input"]:
            return (
                "Below is an instruction that describes a task, paired with an input that provides "
                "further context. Write a response that appropriately completes the request.\n\n"
                f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n"
                "### Response:\n"
            )
        return (
            "Below is an instruction that describes a task. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{row['instruction']}\n\n### Response:\n"
        )

    @staticmethod
    def response(row: Row) -> str:
        return str(row["output"])

    def evaluate(self) -> dict[str, Any]:
        metrics = super().evaluate()
        if all(name in metrics for name in _AVERAGED):
            metrics["average"] = sum(metrics[name] for name in _AVERAGED) / len(_AVERAGED)
        return metrics
