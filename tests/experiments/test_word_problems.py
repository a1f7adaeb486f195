"""The generated stand-in for GSM8K: right sums, clean splits, the same text everywhere."""

import contextlib
import hashlib
import json
import re
from collections import Counter
from fractions import Fraction
from itertools import islice
from random import Random

import pytest

from experiments.data import word_problems
from experiments.data.word_problem_kinds import KINDS, Problem, RedrawError, step
from experiments.data.word_problems import MAX_NUM_EXAMPLES, generate, stream

ANNOTATED = re.compile(r"([\d +*/x-]+?) = (\$?)<<([^<>=]+)=(\d+)>>(\d+)")
# Operands that a question gives in words ("half of", "twice") or takes for known (60 minutes).
UNWRITTEN = {2, 3, 4, 5, 6, 8, 12, 60, 100}


@pytest.fixture(scope="module")
def train() -> list[dict[str, str]]:
    return generate("train", 8_000)


@pytest.fixture(scope="module")
def test() -> list[dict[str, str]]:
    return generate("test", 1_400)


@pytest.fixture(scope="module")
def examples(train, test) -> list[dict[str, str]]:
    return train + test


def exact(expression: str) -> Fraction:
    """The value by Python's own precedence, in exact fractions."""
    return eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression), {"Fraction": Fraction})


def numbers(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"\d+", text)}


def calculation(example: dict[str, str]) -> tuple[str, ...]:
    return tuple(re.findall(r"<<(.*?)>>", example["answer"]))


def test_every_line_has_one_exact_annotation(examples):
    for example in examples:
        *lines, _ = example["answer"].split("\n")
        assert 2 <= len(lines) <= 5
        for line in lines:
            ((shown, dollar, expression, value, repeated),) = ANNOTATED.findall(line)
            assert shown.replace(" ", "").replace("x", "*") == expression
            assert exact(expression) == int(value) == int(repeated)
            assert line.count("<<") == 1
            assert "$" not in line.replace(f"{dollar}<<", "<<")


def test_answer_ends_with_the_last_annotations_result(examples):
    for example in examples:
        assert set(example) == {"question", "answer"}
        final = re.search(r"\n#### (\d+)\Z", example["answer"])
        assert final is not None
        assert final[1] == calculation(example)[-1].split("=")[1]


def test_questions_give_all_numbers_and_no_other(examples):
    """A phrasing that forgets a number cannot be solved; one that mixes two up can be neither."""
    for example in examples:
        given = numbers(example["question"])
        known, used = given | UNWRITTEN, set()
        # How many each child gets is rounded down, which no annotation can say; its line says it.
        known |= {int(each) for each in re.findall(r"can get (\d+)", example["answer"])}
        for annotation in calculation(example):
            expression, result = annotation.split("=")
            assert numbers(expression) <= known, example
            used |= numbers(expression)
            known.add(int(result))
        assert given <= used, example


def test_no_answer_can_be_copied_from_its_question(examples):
    assert not [e for e in examples if int(e["answer"].split()[-1]) in numbers(e["question"])]


def test_all_examples_are_distinct_and_no_calculation_is_in_both_splits(train, test):
    assert len({example["question"] for example in train}) == len(train) == 8_000
    assert len({example["question"] for example in test}) == len(test) == 1_400
    assert not {calculation(e) for e in train} & {calculation(e) for e in test}


def test_splits_of_different_seeds_are_disjoint_too(train):
    other = [example for _, example in islice(stream("test", 99), 1_400)]
    assert other != generate("test", 1_400)
    assert not {calculation(e) for e in train} & {calculation(e) for e in other}


@pytest.mark.parametrize(
    ("split", "digest"),
    [("train", "d03a7fed0e077ad8"), ("test", "20f5bd93c7b4bebb")],
)
def test_first_hundred_examples_are_the_same_everywhere(split, digest):
    """Changes when a kind or a phrasing does: records before and after are then not comparable."""
    text = json.dumps(generate(split, 100))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_shorter_calls_are_prefixes_of_longer_ones(train):
    assert generate("train", 37) == train[:37]


def test_kinds_are_many_and_balanced():
    counts = Counter(kind for kind, _ in islice(stream("train", 5), 10 * len(KINDS)))
    assert len(counts) >= 16
    assert set(counts.values()) == {10}


class RecordingRandom(Random):
    """Remembers what the last choice was among: of a kind, that is its phrasings."""

    def choice(self, seq):
        self.offered = seq
        return super().choice(seq)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_kind_has_several_phrasings(kind):
    """A comma forgotten between two phrasings would make one of them, without any error."""
    problem = None
    rng = RecordingRandom(0)
    while problem is None:
        with contextlib.suppress(RedrawError):
            problem = kind(rng)
    assert problem.question in rng.offered
    assert len(set(rng.offered)) >= 3
    for question in rng.offered:
        assert question.endswith("?")
        assert question.count("?") == 1


@pytest.mark.parametrize(
    "flaw",
    [
        r"  | [.,?]|[.,]{2}|\s\Z",  # spaces and points
        r"\b1 [a-z]+s\b|\b0 [a-z]+s\b",  # 1 apples
        r"\b[Aa] (?:[aeio]|11\b|18\b|8)|\b[Aa]n [^aeioh]",  # a apple, an pear
        r"[{}()]|None|\?.",  # a placeholder or an object instead of its text
        r"\b(\w+) \1\b",  # the the
        r"(?:[.?] |\A|\n)[a-z]",  # a sentence without a capital
        r"\d,\d|\d\.\d",  # thousands separators and fractions
    ],
)
def test_text_is_clean(examples, flaw):
    for example in examples:
        solution = re.sub(r"<<.*?>>", "", example["answer"]).split("\n####")[0]
        for text in (example["question"], solution):
            text = re.sub(r"\b([ap])\.m\.", r"\1m", text)
            assert not re.search(flaw, text), text


def test_step_refuses_what_would_need_precedence():
    with pytest.raises(ValueError, match="two steps"):
        step("It is ?.", "2+3*4")


@pytest.mark.parametrize("expression", ["7/2", "3-5", "6/6"])
def test_step_redraws_fractions_negative_numbers_and_singulars(expression):
    with pytest.raises(RedrawError):
        step("It is ?.", expression)


def test_kind_that_runs_dry_is_an_error_and_no_endless_loop(monkeypatch):
    def single_sum(rng: Random) -> Problem:
        return Problem("What is 20 plus 30?", (step("It is ?.", "20+30"),))

    monkeypatch.setattr(word_problems, "KINDS", (single_sum,))
    with pytest.raises(RuntimeError, match="single_sum gave no new train problem"):
        generate("train", 2)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='validation' is unknown; use 'train' or 'test'"):
        generate("validation", 10)


@pytest.mark.parametrize("split", ["train", "test"])
def test_largest_number_of_examples_is_delivered_and_no_more(split):
    limit = MAX_NUM_EXAMPLES[split]
    assert len({calculation(e) for e in generate(split, limit)}) == limit
    for num_examples in (limit + 1, 0, -1):
        with pytest.raises(ValueError, match=f"num_examples={num_examples} cannot be generated"):
            generate(split, num_examples)
