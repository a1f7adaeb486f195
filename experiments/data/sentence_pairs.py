"""Generated sentence pairs with MNLI's schema: a premise, a hypothesis and one of three labels.

A stand-in for when neither a local copy of MNLI nor the Hugging Face hub is available. Every
premise says who did what with what, and where; the hypothesis leaves something out (entailment),
adds something (neutral), or changes or denies something (contradiction). That is far simpler than
MNLI: an accuracy on these pairs shows that training works, and is **not comparable with one on
MNLI**.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from random import Random
from typing import Any


@dataclass(frozen=True)
class _Genre:
    """The words of one genre; MNLI's mismatched pairs are from genres that training never sees."""

    verbs: tuple[tuple[str, str], ...]  # simple past, infinitive
    things: tuple[str, ...]
    places: tuple[str, ...]


_MARKET = _Genre(
    verbs=(("bought", "buy"), ("sold", "sell"), ("carried", "carry"), ("found", "find")),
    things=("apples", "baskets", "lamps", "carpets", "spoons", "melons", "candles", "shoes"),
    places=("at the market", "in the shop", "near the harbour", "behind the station"),
)
_SCHOOL = _Genre(
    verbs=(("drew", "draw"), ("counted", "count"), ("lost", "lose"), ("showed", "show")),
    things=("maps", "books", "pencils", "stamps", "stones", "letters", "puzzles", "shells"),
    places=("at school", "in the library", "near the playground", "behind the museum"),
)
_GENRES = {"train": _MARKET, "validation_matched": _MARKET, "validation_mismatched": _SCHOOL}
_NAMES = ("Anna", "Boris", "Chen", "Dalia", "Emeka", "Fatima", "Goran", "Hana", "Ivan", "Julia")
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
_COLOURS = ("red", "green", "blue", "white", "black", "brown", "yellow", "grey")
_TIMES = ("on Monday", "in the morning", "last winter", "before lunch")
_REASONS = ("for a friend", "because of the rain", "to win a bet", "without any help")


def generate(split: str, num_pairs: int) -> list[dict[str, Any]]:
    """``num_pairs`` pairs with the keys ``premise``, ``hypothesis``, ``label`` and ``idx``.

    The labels 0 (entailment), 1 (neutral) and 2 (contradiction) take turns. No premise appears in
    two splits. Equal arguments give equal pairs on every machine.

    Raises:
        ValueError: the split is not one of MNLI's.
    """
    if split not in _GENRES:
        raise ValueError(f"split={split!r} is unknown; use one of {', '.join(_GENRES)}")
    rng = Random(f"{split} 1234")
    rows: list[dict[str, Any]] = []
    while len(rows) < num_pairs:
        label = len(rows) % 3
        premise, hypothesis = _draw(rng, _GENRES[split], label)
        # A quarter of all premises are for validation.
        if (hashlib.sha256(premise.encode()).digest()[0] < 64) == (split != "train"):
            pair = {"premise": premise, "hypothesis": hypothesis, "label": label}
            rows.append({**pair, "idx": len(rows)})
    return rows


def _draw(rng: Random, genre: _Genre, label: int) -> tuple[str, str]:
    name, number, colour = rng.choice(_NAMES), rng.choice(_NUMBERS), rng.choice(_COLOURS)
    (past, infinitive), thing = rng.choice(genre.verbs), rng.choice(genre.things)
    place, time, reason = rng.choice(genre.places), rng.choice(_TIMES), rng.choice(_REASONS)
    premise = f"{name} {past} {number} {colour} {thing} {place} {time}."
    if label == 0:
        hypotheses = [
            f"{name} {past} {thing} {place}.",
            f"{name} {past} {colour} {thing} {time}.",
            f"There were {number} {thing} {place}.",
        ]
    elif label == 1:
        hypotheses = [
            f"{name} {past} {number} {thing} {reason}.",
            f"{name} often {past} {thing} {place}.",
            f"{name} had a reason to {infinitive} {colour} {thing}.",
        ]
    else:
        other_number = rng.choice([n for n in _NUMBERS if n != number])
        other_place = rng.choice([p for p in genre.places if p != place])
        hypotheses = [
            f"{name} did not {infinitive} any {thing} {place}.",
            f"{name} {past} {other_number} {thing} {time}.",
            f"Nobody was {place}, and {name} {past} {thing} {other_place}.",
        ]
    return premise, rng.choice(hypotheses)
