"""Two sets of results side by side."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import stdev
from typing import Any

SIGNIFICANT = 2.0  # standard errors


@dataclass(frozen=True)
class Row:
    """One metric of one task.

    Attributes:
        task: Name of the task or group.
        metric: Name and filter as lm-eval writes them: "acc,none".
        score, stderr: The model's score and its standard error; None for an error that lm-eval does not give.
        baseline, baseline_stderr: The same of the baseline; None without one.
        difference: score − baseline.
        difference_stderr: Standard error of the difference; None if it is unknown. If the score is a mean over
            documents that both models scored, that of the mean difference per document; otherwise √(stderr² +
            baseline_stderr²).
        within: Whether the difference is at most two standard errors; None without a baseline, or if the scores differ
            and the error is unknown.
    """

    task: str
    metric: str
    score: float
    stderr: float | None = None
    baseline: float | None = None
    baseline_stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    within: bool | None = None

    @property
    def label(self) -> str:
        """The metric without the filter "none"."""
        return self.metric.removesuffix(",none").replace(",", " ")


def compare(results: dict[str, Any], baseline: dict[str, Any] | None = None) -> list[Row]:
    """A row for each metric in lm-eval's `results`, in its order, with the baseline's score of the same metric."""
    rows = []
    for task, metrics in results["results"].items():
        for metric in _metrics(metrics):
            score, stderr = float(metrics[metric]), _stderr(metrics, metric)
            others = {} if baseline is None else baseline["results"].get(task, {})
            if baseline is None or not isinstance(other := others.get(metric), int | float):
                rows.append(Row(task, metric, score, stderr))
                continue
            other_stderr = _stderr(others, metric)
            error = _paired_stderr(results, baseline, task, metric)
            if error is None and stderr is not None and other_stderr is not None:
                error = math.hypot(stderr, other_stderr)
            other = float(other)  # YAML cannot hold numpy's numbers
            difference = score - other
            within = None if error is None and difference else abs(difference) <= SIGNIFICANT * (error or 0.0)
            rows.append(Row(task, metric, score, stderr, other, other_stderr, difference, error, within))
    return rows


def _metrics(metrics: dict[str, Any]) -> Iterable[str]:
    """Names of the scores, which lm-eval mixes with standard errors, aliases and counts."""
    for name, value in metrics.items():
        if "," in name and "_stderr," not in name and isinstance(value, int | float) and not isinstance(value, bool):
            yield name


def _stderr(metrics: dict[str, Any], metric: str) -> float | None:
    name, _, filter_ = metric.rpartition(",")
    value = metrics.get(f"{name}_stderr,{filter_}")
    return float(value) if isinstance(value, int | float) else None  # lm-eval writes "N/A" for an unknown error


def _paired_stderr(results: dict[str, Any], baseline: dict[str, Any], task: str, metric: str) -> float | None:
    """Standard error of the mean difference per document; None if a score is not the mean over the same documents."""
    ours, theirs = (_by_document(each, task, metric) for each in (results, baseline))
    if len(ours) < 2 or ours.keys() != theirs.keys():
        return None
    for values, each in ((ours, results), (theirs, baseline)):
        if not math.isclose(math.fsum(values.values()) / len(values), each["results"][task][metric], abs_tol=1e-9):
            return None
    return stdev(ours[document] - theirs[document] for document in ours) / math.sqrt(len(ours))


def _by_document(results: dict[str, Any], name: str, metric: str) -> dict[tuple[str, int], float]:
    """The values of a metric by task and document, of a task or of all tasks of a group."""
    metric, _, filter_ = metric.rpartition(",")
    values = {
        (task, sample["doc_id"]): sample.get(metric)
        for task in _tasks_of(results, name)
        for sample in results.get("samples", {}).get(task, [])
        if sample["filter"] == filter_
    }
    if all(isinstance(value, int | float) for value in values.values()):
        return {document: float(value) for document, value in values.items() if value is not None}
    return {}


def _tasks_of(results: dict[str, Any], name: str) -> list[str]:
    """The tasks of a group and of the groups in it; a task itself."""
    members = results.get("group_subtasks", {}).get(name)
    return [task for member in members for task in _tasks_of(results, member)] if members else [name]
