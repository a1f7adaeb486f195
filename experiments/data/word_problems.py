"""Generated word problems with GSM8K's schema and format.

A stand-in for when neither a local copy of GSM8K nor the Hugging Face hub is available: the same
two fields, worked solutions with calculator annotations such as `<<48/2=24>>`, and a last line
`#### 24`. The problems are far more uniform than GSM8K's: a score on them shows that training
works, and is **not comparable with a score on GSM8K**.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from itertools import islice
from random import Random

from experiments.data.word_problem_kinds import KINDS, Problem, RedrawError, Step

# The smallest kind, fractions_of_a_group, has about twice as many calculations as these require.
MAX_NUM_EXAMPLES = {"train": 20_000, "test": 5_000}
# More than 50 times the longest search measured: a kind that needs more is exhausted.
MAX_NUM_DRAWS = 5_000

_SEED = 1234

# How the calculation before an annotation is written: 3*4, 3 * 4 or 3 x 4, as in GSM8K.
SIGN_STYLES: tuple[dict[int, str], ...] = (
    str.maketrans({}),
    str.maketrans({"+": " + ", "-": " - ", "*": " * ", "/": " / "}),
    str.maketrans({"+": " + ", "-": " - ", "*": " x ", "/": " / "}),
)


def generate(split: str, num_examples: int) -> list[dict[str, str]]:
    """Return `num_examples` distinct problems, each with the keys `question` and `answer`.

    The kinds are balanced, and the first n examples are the same for every `num_examples >= n`. No
    calculation is in both splits. Equal arguments give equal examples on every machine and Python
    version.

    Raises:
        ValueError: `split` is not "train" or "test", or it cannot deliver `num_examples`.
    """
    if split not in MAX_NUM_EXAMPLES:
        raise ValueError(f"split={split!r} is unknown; use 'train' or 'test'")
    if not 0 < num_examples <= MAX_NUM_EXAMPLES[split]:
        raise ValueError(
            f"num_examples={num_examples} cannot be generated; "
            f"ask for 1 to {MAX_NUM_EXAMPLES[split]} examples of the {split} split"
        )
    return [example for _, example in islice(stream(split, _SEED), num_examples)]


def stream(split: str, seed: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (name of the kind, example) endlessly; in each round, every kind has one turn."""
    rng = Random(f"{split} {seed}")
    seen: set[str] = set()
    while True:
        for kind in rng.sample(KINDS, len(KINDS)):
            problem = _draw(kind, rng, split, seen)
            signs = rng.choice(SIGN_STYLES)
            lines = [_render(step, signs) for step in problem.steps]
            answer = "\n".join([*lines, f"#### {problem.steps[-1]}"])
            yield kind.__name__, {"question": problem.question, "answer": answer}


def _draw(kind: Callable[[Random], Problem], rng: Random, split: str, seen: set[str]) -> Problem:
    """Return a problem of this split whose calculation is not yet in `seen`, and add it there."""
    for _ in range(MAX_NUM_DRAWS):
        try:
            problem = kind(rng)
        except RedrawError:
            continue
        if str(problem.steps[-1]) in re.findall(r"\d+", problem.question):
            continue  # the answer could be copied from the question
        calculation = " ".join([kind.__name__, *(step.expression for step in problem.steps)])
        if split == _split_of(calculation) and calculation not in seen:
            seen.add(calculation)
            return problem
    raise RuntimeError(
        f"{kind.__name__} gave no new {split} problem in {MAX_NUM_DRAWS} draws; "
        "widen the ranges of its numbers"
    )


def _split_of(calculation: str) -> str:
    """A quarter of all calculations are for testing, whatever the names, wording and seed."""
    return "test" if hashlib.sha256(calculation.encode()).digest()[0] < 64 else "train"


def _render(step: Step, signs: dict[int, str]) -> str:
    """Replace `?` by `3 * 4 = <<3*4=12>>12`, and `$?` by `3 * 4 = $<<3*4=12>>12`."""
    placeholder, unit = ("$?", "$") if "$?" in step.text else ("?", "")
    shown = step.expression.translate(signs)
    return step.text.replace(placeholder, f"{shown} = {unit}<<{step.expression}={step}>>{step}")
