"""Scores in a model card: the `model-index` in the metadata of README.md, which the Hub shows beside the model."""

import logging
import math
from itertools import groupby
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, RepoCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from gda.common.files import write_text
from gda.common.progress import log_level
from gda.conversion.sources.source import CARD_FILE
from gda.eval.compare import Row
from gda.eval.report import EvalReport, scores_bare_text


def update_card(folder: Path, report: EvalReport) -> Path:
    """Write the model's scores into `folder`/README.md.

    Results of the same task, dataset and settings are replaced; all other results, metadata and the text stay. A
    missing card is created. Scores that are not finite are left out: the Hub accepts none.

    Raises:
        ValueError: if the metadata of the card is not valid, or there are no scores to write.
    """
    if not report.rows:
        raise ValueError("--update-card: there are no scores to write; name --tasks")
    card = read_card(folder)
    index = card.data.get("model-index") or [{"name": folder.resolve().name, "results": []}]
    new = []
    # One task at a time, because huggingface_hub merges all results of one dataset.
    for _, rows in groupby(report.rows, lambda row: row.task):
        (made,) = eval_results_to_model_index(index[0]["name"], [_result(report, row) for row in rows])
        new += made["results"]
    replaced = [_identity(entry) for entry in new]
    for entry in new:
        entry["metrics"] = [metric for metric in entry["metrics"] if math.isfinite(metric["value"])]
    kept = [entry for entry in index[0]["results"] if _identity(entry) not in replaced]
    index[0]["results"] = [*kept, *(entry for entry in new if entry["metrics"])]
    card.data["model-index"] = index
    path = folder / CARD_FILE
    write_text(path, str(card))
    return path


def read_card(folder: Path) -> RepoCard:
    """Read `folder`/README.md; without one, a card with a title.

    It is a RepoCard, because a ModelCard merges all results of one dataset.

    Raises:
        ValueError: if its metadata is not valid.
    """
    path = folder / CARD_FILE
    try:
        with log_level("huggingface_hub.repocard", logging.ERROR):  # it warns of a card without metadata
            card = RepoCard.load(path) if path.is_file() else RepoCard(f"\n# {folder.resolve().name}\n")
            if index := card.data.get("model-index"):
                model_index_to_eval_results(index)
            return card
    except Exception as error:  # there is no common error class
        raise ValueError(f"{path}: its metadata is not valid: {' '.join(str(error).split())}") from None


def _result(report: EvalReport, row: Row) -> EvalResult:
    config = report.model.results["configs"].get(row.task, {})
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=config.get("dataset_path") or row.task,
        dataset_name=row.task,
        dataset_config=config.get("dataset_name"),
        dataset_split=config.get("test_split") or config.get("validation_split"),
        dataset_args=_arguments(report, row.task),
        metric_type=row.metric.partition(",")[0],
        metric_name=row.label,
        metric_value=row.score,
        source_name="lm-evaluation-harness",
        source_url="https://github.com/EleutherAI/lm-evaluation-harness",
    )


def _arguments(report: EvalReport, task: str) -> dict[str, Any]:
    """The settings that differ from the task's own: a score under other settings is another result."""
    results, options = report.model.results, report.options
    documents = results["n-samples"].get(task)  # None for a group
    limit = options.limit
    if documents is not None:
        limit = None if documents["effective"] == documents["original"] else documents["effective"]
    arguments = {
        "num_few_shot": results["n-shot"].get(task),
        "limit": limit,
        "dtype": None if options.dtype == "auto" else options.dtype,
        "apply_chat_template": options.apply_chat_template or None,
        "metadata": options.metadata or None,
        "gen_kwargs": options.gen_kwargs or None,
        "system_instruction": options.system_instruction or None,
        "seed": options.seed,
    }
    if scores_bare_text(results["configs"].get(task, {})):
        arguments |= {"num_few_shot": 0, "apply_chat_template": None, "system_instruction": None}
    return {name: value for name, value in arguments.items() if value is not None}


def _identity(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two entries of a model index results of the same task under the same settings."""
    dataset = entry["dataset"]
    return entry["task"]["type"], *(dataset.get(key) for key in ("type", "name", "config", "split", "args"))
