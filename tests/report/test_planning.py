"""Which runs are missing, and which learning rate is best."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.config import HardwareConfig, RunConfig
from experiments.hardware import resolve_precision
from experiments.optimizers import OPTIMIZERS
from experiments.report import planning, records
from experiments.report.planning import Cell, Run
from experiments.report.records import Record
from tests.report.synthetic import record

AUTO = {"name": "auto", "precision": "auto"}


def cell(rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2), seeds: tuple[int, ...] = (42, 7)) -> Cell:
    return Cell("tiny BERT", "MicroAdam", (), record()["config"], rates, seeds)


def done(lr: float, loss: float, seed: int = 42, **changes: Any) -> Record:
    metrics = {"train/final_loss": loss}
    return Record(f"{lr}-{seed}.json", record(lr=lr, seed=seed, metrics=metrics, **changes))


def wanted(state: planning.State) -> list[tuple[float, int]]:
    return [(run.learning_rate, run.seed) for run in state.missing]


def test_the_grid_is_tried_with_the_first_seed_and_the_others_run_at_the_best_rate() -> None:
    nothing = planning.state_of(cell(), [])
    assert wanted(nothing) == [(1e-4, 42), (1e-3, 42), (1e-2, 42)]
    assert nothing.num_later == 1
    tried = [done(1e-4, 0.9), done(1e-3, 0.5), done(1e-2, 0.8)]
    state = planning.state_of(cell(), tried)
    assert (state.best, state.is_best_at_edge, state.num_later) == (1e-3, False, 0)
    assert wanted(state) == [(1e-3, 7)]
    complete = planning.state_of(cell(), [*tried, done(1e-3, 0.6, seed=7)])
    assert wanted(complete) == []
    assert [r.seed for r in complete.records] == [42, 7]


def test_exactly_what_is_missing_is_planned() -> None:
    tried = [done(1e-4, 0.9), done(1e-2, 0.8)]
    state = planning.state_of(cell(), tried)
    assert wanted(state) == [(1e-3, 42)]
    assert state.num_later == 1
    with_second_seed = planning.state_of(cell(), [*tried, done(1e-3, 0.6, seed=7)])
    assert wanted(with_second_seed) == [(1e-3, 42)]
    assert with_second_seed.num_later == 0


def test_a_rate_beside_the_cells_own_is_shown_and_takes_no_part() -> None:
    tried = [done(1e-4, 0.9), done(1e-3, 0.5), done(1e-3, 0.6, seed=7), done(1e-2, 0.8)]
    state = planning.state_of(cell(), [*tried, done(3e-3, 0.1), done(3e-3, 0.1, seed=5)])
    assert (state.best, state.missing) == (1e-3, [])
    assert {rate: [*by_seed] for rate, by_seed in state.beside.items()} == {3e-3: [42]}
    assert len(state.all_records) == len(tried)


@given(st.randoms(use_true_random=False), st.integers(1, 3))
def test_any_one_record_that_is_deleted_is_exactly_what_is_planned(
    random: Random, num_seeds: int
) -> None:
    of_random = cell((1e-4, 1e-3, 1e-2), (42, 7, 1)[:num_seeds])
    found: list[Record] = []
    while (state := planning.state_of(of_random, found)).missing:
        for run in state.missing:
            changes = {"status": "diverged"} if random.random() < 0.1 else {}
            found.append(done(run.learning_rate, random.random(), run.seed, **changes))
    for deleted in found:
        kept = [record for record in found if record is not deleted]
        without = planning.state_of(of_random, kept)
        assert wanted(without) == [(deleted.learning_rate, deleted.seed)]
        assert without.num_later == 0 or state.best is None  # where all diverged nobody can know
    assert {*map(id, state.all_records)} == {*map(id, found)}
    assert not state.beside


def test_a_rate_stays_the_best_whatever_its_other_seeds_do() -> None:
    found = [done(1e-4, 0.9), done(1e-3, 0.5), done(1e-2, 0.95)]
    for last in (done(1e-3, 1.5, seed=7), done(1e-3, 0.1, seed=7, status="diverged")):
        state = planning.state_of(cell(), [*found, last])
        assert (state.best, state.missing) == (1e-3, [])
        assert state.records == [found[1], last]


def test_a_grid_whose_edge_is_best_grows_on_that_side_until_it_is_not() -> None:
    """A short run's best rate lay above every rate of the paper's grid."""
    tried = [done(1e-4, 0.9), done(1e-3, 0.8), done(1e-2, 0.7)]
    for rate, loss in ((2e-2, 0.6), (4e-2, 0.65)):
        state = planning.state_of(cell(), tried)
        assert wanted(state) == [(rate, 42)]
        assert state.is_best_at_edge
        tried.append(done(rate, loss))
    state = planning.state_of(cell(), tried)
    assert (state.best, state.is_best_at_edge) == (2e-2, False)


def test_a_grid_does_not_grow_for_ever() -> None:
    rates = [1e-2 / 2**i for i in range(4)]
    tried = [done(rate, rate) for rate in [*rates, 1e-1]]
    state = planning.state_of(cell((1e-2, 1e-1)), tried)
    assert state.best == rates[-1]
    assert state.is_best_at_edge
    assert wanted(state) == [(rates[-1], 7)]


def test_a_single_rate_is_no_grid() -> None:
    state = planning.state_of(cell((1e-3,)), [done(1e-3, 0.5)])
    assert (state.best, state.is_best_at_edge) == (1e-3, False)
    assert wanted(state) == [(1e-3, 7)]


def test_a_rate_that_diverged_is_never_the_best_and_never_repeated() -> None:
    tried = [done(1e-4, 0.9), done(1e-3, 0.8), done(1e-2, 0.1, status="diverged")]
    assert planning.state_of(cell(), tried).best == 1e-3
    all_diverged = [done(rate, 0.1, status="diverged") for rate in (1e-3,)]
    state = planning.state_of(cell((1e-3,)), all_diverged)
    assert state.best is None
    assert wanted(state) == []


def test_the_newest_record_of_a_run_counts() -> None:
    new, old = done(1e-3, 0.5), done(1e-3, 0.9)
    assert planning.state_of(cell((1e-3,), (42,)), [new, old]).records == [new]


@pytest.mark.parametrize(
    ("section", "changes", "is_same"),
    [
        ("dataset", {"root": "elsewhere"}, True),
        ("dataset", {"path": "a/folder"}, False),
        ("model", {"path": "a/folder"}, False),
        ("training", {"save_model": False}, True),
        ("hardware", {"name": "rtx3090", "micro_batch_size": 1}, True),
        ("training", {"max_steps": 5}, False),
        ("model", {"removed_since": 0.5}, True),
        ("model", {"weights": "pretrained"}, False),
        ("task", {"max_length": 128}, False),
    ],
)
def test_a_record_is_the_run_that_its_config_says_wherever_its_data_lay(
    section: str, changes: dict[str, Any], is_same: bool
) -> None:
    values = record()
    values["config"][section] |= changes
    config = {**record()["config"], "hardware": AUTO}
    assert Record("a.json", values).is_run_of(config) == is_same


@pytest.mark.parametrize(
    ("section", "own", "wanted"),
    [
        ("model", {"architecture": {"layers": 2, "gated": True}}, {"architecture": {"layers": 2}}),
        ("model", {"architecture": {"layers": 2}}, {"architecture": {"layers": 2, "gated": False}}),
        ("dataset", {"columns": {"a": "str", "b": "int"}}, {"columns": {"a": "str"}}),
        ("evaluation", {"harness": {"gsm8k": {"num_fewshot": 0}}}, {"harness": {}}),
        ("evaluation", {"harness": {}}, {"harness": {"gsm8k": {"limit": None}}}),
        (
            "evaluation",
            {"harness": {"gsm8k": {"overrides": {"until": [":"]}}}},
            {"harness": {"gsm8k": {"overrides": {}}}},
        ),
    ],
)
def test_where_keys_are_values_a_record_with_others_is_of_another_run(
    section: str, own: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """What only the record had passed for a setting that was removed since."""
    values, config = record(), record()["config"]
    values["config"].setdefault(section, {}).update(own)
    config.setdefault(section, {}).update(wanted)
    assert not Record("a.json", values).is_run_of(config)
    config[section] |= own
    assert Record("a.json", values).is_run_of(config)


def test_every_dictionary_of_a_config_is_compared_as_one() -> None:
    sections = (RunConfig, *OPTIMIZERS.values())
    fields = [field for section in sections for field in _fields(section)]
    assert {name for name, kind in fields if "dict[" in str(kind)} == {
        *records._FREE_FORM,
        *records._FREE_FORM_OF_SECTIONS,
        "learning_rates",  # not compared at all
    }


def _fields(section: Any) -> Iterator[tuple[str, Any]]:
    """Name and type of every setting of a config, at any depth."""
    for name, kind in typing.get_type_hints(section).items():
        yield name, kind
        for part in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(part):
                yield from _fields(part)


@pytest.mark.parametrize(
    ("device", "computed_in", "wanted", "is_same"),
    [
        ("cpu", "fp32", "auto", True),
        ("cpu", "bf16", "auto", False),
        ("cuda", "bf16", "auto", True),
        ("cuda", "fp32", "auto", False),
        ("cpu", "bf16", "bf16", True),
        ("cuda", "bf16", "bf16_amp", False),
        ("cpu", None, "bf16", True),  # a record that does not say
    ],
)
def test_a_run_in_another_precision_is_another_run(
    device: str, computed_in: str | None, wanted: str, is_same: bool
) -> None:
    values = record()
    values["hardware"]["device"] = device
    if computed_in is None:
        del values["hardware"]["precision"]
    else:
        values["hardware"]["precision"] = computed_in
    config = {**record()["config"], "hardware": {"name": "auto", "precision": wanted}}
    assert Record("a.json", values).is_run_of(config) == is_same


@pytest.mark.parametrize(("has_gpu", "device"), [(True, "cuda"), (False, "cpu")])
def test_a_table_takes_the_automatic_precision_that_a_run_takes(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    automatic = HardwareConfig(name="auto", micro_batch_size=1)
    assert resolve_precision(automatic) == records._AUTO_PRECISION[device]


@pytest.mark.parametrize(("value", "is_same"), [(None, True), (False, True), (0.0, False)])
def test_a_setting_added_since_a_record_was_off_then(value: object, is_same: bool) -> None:
    config = record()["config"]
    config["model"]["added_since"] = value
    assert Record("a.json", record()).is_run_of(config) == is_same


def test_asked_for_hardware_must_be_the_records() -> None:
    config = record()["config"]
    ran_on_cpu = Record("a.json", record())
    assert ran_on_cpu.is_run_of(config | {"hardware": {**AUTO, "name": "cpu"}})
    assert not ran_on_cpu.is_run_of(config | {"hardware": {**AUTO, "name": "a100_80gb"}})


def test_time_is_estimated_from_the_most_similar_runs() -> None:
    run = Run(cell(), 1e-3, 42)
    other = done(1e-3, 0.5, optimizer="adamw")
    other.metrics["time/wall_s"] = 60.0
    assert planning.estimated_s(run, []) is None
    assert planning.estimated_s(run, [other]) == 60.0
    assert planning.estimated_s(run, [other, done(1e-4, 0.5)]) == 120.0


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"max_steps": 2}},
        {"training": {"global_batch_size": 4}},
        {"dataset": {"num_train": 100}},
        {"evaluation": {"limit": 8}},
    ],
)
def test_a_run_of_another_length_tells_no_time(changes: dict[str, dict[str, int]]) -> None:
    """Records from before a preset changed its number of examples did."""
    other = done(1e-3, 0.5)
    for section, values in changes.items():
        other.values["config"].setdefault(section, {}).update(values)
    assert planning.estimated_s(Run(cell(), 1e-3, 42), [other]) is None
