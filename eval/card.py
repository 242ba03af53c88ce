"""Results in a model card: the `model-index` of README.md, as the Hub reads it, and nothing else of the file."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from gda._files import write_text

from .compare import Row
from .run import EvalReport

TASK_TYPE = "text-generation"
SOURCE = "lm-evaluation-harness"
FRONT_MATTER = re.compile(r"\A(---[ \t]*\r?\n)(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)
MODEL_INDEX = re.compile(r"^model-index:.*?(?=^[^\s#-]|\Z)", re.DOTALL | re.MULTILINE)


def update_card(folder: Path, report: EvalReport) -> Path:
    """Write the model's scores into `folder`/README.md.

    Results of the same task, dataset and number of examples in front are replaced, others stay. Outside the
    `model-index` the file keeps its bytes; without a card one is made that holds nothing else.

    Raises:
        ValueError: if the front matter of the card is not valid YAML, or it has no scores to write.
    """
    if not report.rows:
        raise ValueError("--update-card: there are no scores to write; name --tasks")
    path = folder / "README.md"
    card = path.read_bytes().decode() if path.is_file() else f"# {folder.resolve().name}\n"
    found = FRONT_MATTER.match(card)
    opening, front, closing = found.groups() if found else ("---\n", "", "---\n")
    body = card[found.end() :] if found else f"\n{card}"
    try:
        data = yaml.safe_load(front) or {}
        index = _merged(data.get("model-index") or [], folder.resolve().name, _results(report))
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its metadata is not valid: {' '.join(str(error).split())}") from None
    text = yaml_dump({"model-index": index}, sort_keys=False)
    without = MODEL_INDEX.sub("", front)
    if without and not without.endswith("\n"):
        without += "\n"
    write_text(path, opening + without + text + closing + body)
    return path


def _results(report: EvalReport) -> list[EvalResult]:
    return [_result(report, row) for row in report.rows]


def _result(report: EvalReport, row: Row) -> EvalResult:
    results = report.model.results
    config = results["configs"].get(row.task, {})
    shots = results["n-shot"].get(row.task)
    documents = results["n-samples"].get(row.task, {})
    limited = documents.get("effective") != documents.get("original")
    arguments = {"num_few_shot": shots} | ({"limit": documents["effective"]} if limited else {})
    return EvalResult(
        task_type=TASK_TYPE,
        task_name="Text Generation",
        dataset_type=config.get("dataset_path") or row.task,
        dataset_name=row.task,
        dataset_config=config.get("dataset_name"),
        dataset_split=config.get("test_split") or config.get("validation_split"),
        dataset_args={name: value for name, value in arguments.items() if value is not None},
        metric_type=row.metric.partition(",")[0],
        metric_name=row.label,
        metric_value=row.score,
        source_name=SOURCE,
        source_url="https://github.com/EleutherAI/lm-evaluation-harness",
    )


def _merged(index: list[dict[str, Any]], name: str, results: list[EvalResult]) -> list[dict[str, Any]]:
    """The model index with `results` in the place of older ones of the same tasks."""
    (made,) = eval_results_to_model_index(name, results)
    entries = made["results"]
    if not index:
        return [made]
    replaced = [_identity(entry) for entry in entries]
    kept = [entry for entry in index[0]["results"] if _identity(entry) not in replaced]
    return [{**index[0], "results": [*kept, *entries]}, *index[1:]]


def _identity(entry: dict[str, Any]) -> tuple[Any, ...]:
    dataset = entry["dataset"]
    return entry["task"]["type"], *(dataset.get(key) for key in ("type", "name", "config", "split", "args"))
