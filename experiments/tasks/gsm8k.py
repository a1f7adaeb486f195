"""GSM8K: grade-school maths word problems, answered with a worked solution (arXiv:2110.14168)."""

from __future__ import annotations

from experiments.data.text import Row
from experiments.tasks.causal_lm import CausalLM


class GSM8K(CausalLM):
    columns = ("question", "answer")

    @staticmethod
    def prompt(row: Row) -> str:
        """The prompt of lm-evaluation-harness's task ``gsm8k``."""
        return f"Question: {row['question']}\nAnswer:"

    @staticmethod
    def response(row: Row) -> str:
        return f" {row['answer']}"
