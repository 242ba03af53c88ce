"""Results in a model card: the `model-index` of README.md, as the Hub reads it, and nothing else of the file."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from gda.common.files import write_text
from gda.eval.compare import Row
from gda.eval.run import EvalReport

TASK_TYPE = "text-generation"
SOURCE = "lm-evaluation-harness"
CARD_FILE = "README.md"
FRONT_MATTER = re.compile(r"\A(---[ \t]*\r?\n)(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)
# The key's line, and those below it that are indented, list items, or comments and blank lines in front of such.
MODEL_INDEX = re.compile(
    r"^model-index:.*(?:\n|\Z)(?:(?:(?:#.*|[ \t\r]*)\n)*(?:[ \t]+[^\s]|-).*(?:\n|\Z))*", re.MULTILINE
)


@dataclass(frozen=True)
class Card:
    """A model card in parts.

    Attributes:
        opening, front, closing, body: Its text; `front` is YAML without the `model-index`.
        index: That of `model-index`.
    """

    opening: str
    front: str
    closing: str
    body: str
    index: list[dict[str, Any]]


def update_card(folder: Path, report: EvalReport) -> Path:
    """Write the model's scores into `folder`/README.md.

    Results of the same task, dataset and settings (`_arguments`) are replaced, others stay. Outside the
    `model-index` the file keeps its bytes; without a card one is made that holds nothing else.

    Raises:
        ValueError: if the front matter of the card is not valid YAML, or it has no scores to write.
    """
    if not report.rows:
        raise ValueError("--update-card: there are no scores to write; name --tasks")
    card = read_card(folder)
    index = _merged(card.index, folder.resolve().name, _results(report))
    text = yaml_dump({"model-index": index}, sort_keys=False)
    path = folder / CARD_FILE
    write_text(path, card.opening + card.front + text + card.closing + card.body)
    return path


def read_card(folder: Path) -> Card:
    """Read `folder`/README.md; without one, a card with a title.

    Raises:
        ValueError: if its front matter is not valid YAML.
    """
    path = folder / CARD_FILE
    try:
        text = path.read_bytes().decode() if path.is_file() else f"# {folder.resolve().name}\n"
        found = FRONT_MATTER.match(text)
        opening, front, closing = found.groups() if found else ("---\n", "", "---\n")
        index = (yaml.safe_load(front) or {}).get("model-index") or []
        for entry in index[0]["results"] if index else []:
            _identity(entry)
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: its metadata is not valid: {' '.join(str(error).split())}") from None
    without = MODEL_INDEX.sub("", front)
    if without and not without.endswith("\n"):
        without += "\n"
    return Card(opening, without, closing, text[found.end() :] if found else f"\n{text}", index)


def _results(report: EvalReport) -> list[EvalResult]:
    return [_result(report, row) for row in report.rows]


def _result(report: EvalReport, row: Row) -> EvalResult:
    results = report.model.results
    config = results["configs"].get(row.task, {})
    return EvalResult(
        task_type=TASK_TYPE,
        task_name="Text Generation",
        dataset_type=config.get("dataset_path") or row.task,
        dataset_name=row.task,
        dataset_config=config.get("dataset_name"),
        dataset_split=config.get("test_split") or config.get("validation_split"),
        dataset_args=_arguments(report, row.task),
        metric_type=row.metric.partition(",")[0],
        metric_name=row.label,
        metric_value=row.score,
        source_name=SOURCE,
        source_url="https://github.com/EleutherAI/lm-evaluation-harness",
    )


def _arguments(report: EvalReport, task: str) -> dict[str, Any]:
    """What makes a score another result: settings that are not a task's own."""
    results, setting = report.model.results, report.setting
    documents = results["n-samples"].get(task)  # none of a group
    limit = setting.limit
    if documents is not None:
        limit = None if documents["effective"] == documents["original"] else documents["effective"]
    arguments = {
        "num_few_shot": results["n-shot"].get(task),
        "limit": limit,
        "dtype": None if setting.dtype == "auto" else setting.dtype,
        "apply_chat_template": setting.apply_chat_template or None,
        "metadata": setting.metadata or None,
    }
    return {name: value for name, value in arguments.items() if value is not None}


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
