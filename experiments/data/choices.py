"""Generated rows with the schemas of instruction and multiple-choice data sets.

A stand-in for when neither a local copy nor the Hugging Face hub is available: sums and comparisons
in the columns of Open-Platypus, ARC, HellaSwag, MMLU and WinoGrande. A score on them shows that the
evaluation works, and is **not comparable with a score on the data set of that name**.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

_LETTERS = "ABCD"
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": int.__add__,
    "-": int.__sub__,
    "*": int.__mul__,
}
_MMLU_SUBJECTS = ("elementary_mathematics", "high_school_mathematics", "college_mathematics")
_THINGS = ("trophy", "suitcase", "drawer", "box", "piano", "lamp", "ladder", "barrel")


@dataclass(frozen=True)
class _Sum:
    question: str
    options: list[str]  # four different numbers
    answer: int  # index of the correct one


def _sums(seed: str, num_sums: int) -> Iterator[_Sum]:
    """Questions, no two alike."""
    rng = Random(seed)
    seen: set[tuple[int, int, str]] = set()
    while len(seen) < num_sums:
        a, b, sign = rng.randint(2, 199), rng.randint(2, 199), rng.choice(list(_OPERATIONS))
        if (a, b, sign) in seen:
            continue
        seen.add((a, b, sign))
        result = _OPERATIONS[sign](a, b)
        near = [number for number in range(result - 10, result + 11) if number != result]
        options = [result, *rng.sample(near, 3)]
        rng.shuffle(options)
        yield _Sum(f"What is {a} {sign} {b}?", list(map(str, options)), options.index(result))


def instructions(split: str, num_rows: int) -> list[dict[str, Any]]:
    """Open-Platypus: ``instruction``, ``input`` (empty in every other row), ``output``."""
    rows = []
    for row, s in enumerate(_sums(f"instructions {split}", num_rows)):
        choices = [f"{letter}. {o}" for letter, o in zip(_LETTERS, s.options, strict=True)]
        task = "Answer the multiple-choice question with the letter and text of the right option."
        question = "\n".join([s.question, *choices])
        rows.append(
            {
                "instruction": task if row % 2 else f"{task}\n\n{question}",
                "input": question if row % 2 else "",
                "output": choices[s.answer],
            }
        )
    return rows


def arc(split: str, num_rows: int) -> list[dict[str, Any]]:
    """ARC: ``question``, ``choices`` (``text``, ``label``), ``answerKey``."""
    return [
        {
            "id": f"generated-{split}-{row:04d}",
            "question": s.question,
            "choices": {"text": s.options, "label": list(_LETTERS)},
            "answerKey": _LETTERS[s.answer],
        }
        for row, s in enumerate(_sums(f"arc {split}", num_rows))
    ]


def mmlu(split: str, num_rows: int) -> list[dict[str, Any]]:
    """MMLU, three of its subjects in turn: ``question``, ``subject``, ``choices``, ``answer``."""
    return [
        {
            "question": s.question,
            "subject": _MMLU_SUBJECTS[row % len(_MMLU_SUBJECTS)],
            "choices": s.options,
            "answer": s.answer,
        }
        for row, s in enumerate(_sums(f"mmlu {split}", num_rows))
    ]


def hellaswag(split: str, num_rows: int) -> list[dict[str, Any]]:
    """HellaSwag: ``activity_label``, ``ctx_a``, ``ctx_b``, ``endings``, ``label``."""
    return [
        {
            "activity_label": "Calculating",
            "ctx_a": f"A teacher asks: {s.question}",
            "ctx_b": "the child",
            "endings": [f"answers {option}." for option in s.options],
            "label": str(s.answer),
        }
        for s in _sums(f"hellaswag {split}", num_rows)
    ]


def winogrande(split: str, num_rows: int) -> list[dict[str, Any]]:
    """WinoGrande: ``sentence`` with a blank ``_``, ``option1``, ``option2``, ``answer``."""
    rng = Random(f"winogrande {split}")
    rows = []
    for _ in range(num_rows):
        content, container = rng.sample(_THINGS, 2)
        sizes = {"large": content, "small": container}
        reason = rng.choice(list(sizes))
        options = rng.sample([content, container], 2)
        rows.append(
            {
                "sentence": f"The {content} did not fit into the {container} because the _ was "
                f"too {reason}.",
                "option1": options[0],
                "option2": options[1],
                "answer": str(options.index(sizes[reason]) + 1),
            }
        )
    return rows
