"""Evaluation through lm-evaluation-harness, in this process and on the run's own files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.tasks
import yaml
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.config import EvaluationConfig


def task_config(task_file: str) -> dict[str, Any]:
    """A task of the harness as it ships; ``task_file`` lies below ``lm_eval/tasks``."""
    return yaml.safe_load((Path(lm_eval.tasks.__file__).parent / task_file).read_text())


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task_file: str,
    files: dict[str, Path],
    num_rows: int,
    config: EvaluationConfig,
    seed: int,
) -> dict[str, Any]:
    """One task of the harness as it ships, but reading ``files`` instead of the hub.

    Args:
        task_file: as for `task_config`.
        files: a JSON-lines file for each split.
        num_rows: rows of the evaluated split, to check that all that were asked for are evaluated.
        seed: chooses the few-shot examples.

    Returns:
        The harness's metrics with their standard errors (``exact_match,strict-match``, ...), and
        ``num_samples``, ``num_fewshot``, ``harness`` (its version and the task's).

    Raises:
        RuntimeError: the harness evaluated another number of examples than was asked for.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    task = task_config(task_file)
    name = task["task"]
    task["dataset_path"] = "json"
    task["dataset_name"] = None
    task["dataset_kwargs"] = {"data_files": {split: str(path) for split, path in files.items()}}
    if task["output_type"] == "generate_until":
        task["generation_kwargs"]["max_gen_toks"] = config.max_new_tokens

    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size),
        tasks=[task],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        log_samples=False,
        fewshot_random_seed=seed,
    )
    num_samples = results["n-samples"][name]["effective"]
    num_wanted = min(config.limit or num_rows, num_rows)
    if num_samples != num_wanted:
        raise RuntimeError(f"the harness evaluated {num_samples} examples instead of {num_wanted}")
    # The standard error of a single sample is "N/A": it is left out.
    metrics = {
        key: float(value)
        for key, value in results["results"][name].items()
        if "," in key and value != "N/A"
    }
    return {
        **metrics,
        "num_samples": num_samples,
        "num_fewshot": results["n-shot"][name],
        "harness": f"lm-eval {lm_eval.__version__}, {name} v{results['versions'][name]}",
    }
