"""A training log as an HTML page: losses, learning rates and the measurements of layers over the steps."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any, TypeVar

from gda.common.errors import first_line
from gda.common.files import write_text
from gda.common.html import page
from gda.common.text import text_pieces
from gda.training.runs.run_folder import LOG_FILE

T = TypeVar("T")

PAGE_FILE = "training.html"
TEMPLATES = Path(__file__).parent / "templates"
# Points of a curve and columns of a heat map: as many as a screen can show.
MOST_POINTS = 1000
MOST_COLUMNS = 400

# By title of a chart: whether its axis is logarithmic, and the curves in it.
CHARTS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "Loss": (False, ("loss", "eval_loss", "cross_entropy")),
    "Distillation": (False, ("kl", "hidden")),
    "Learning rate": (True, ("learning_rate", "lambda_learning_rate")),
    "Gradient norm": (True, ("grad_norm",)),
    "Perplexity": (True, ("perplexity",)),
    "Tokens per second": (False, ("tokens_per_second",)),
    "Fade": (False, ("fade",)),
}
CURVES = tuple(name for _, names in CHARTS.values() for name in names)
LAYER_CHARTS = {
    "lambda": "λ",
    "signal_norm": "Norm of the signal output",
    "noise_norm": "Norm of the noise output",
    "subtracted": "Subtracted share",
    "gradient_norm": "Gradient norm",
    "lambda_gradient_norm": "Gradient norm of λ",
}


@dataclass
class TrainingLog:
    """The content of a log: by name, points (step, value) and (step, value of each layer) in order; and notes."""

    last_step: int
    notes: list[str]
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    layers: dict[str, list[tuple[int, list[float | None]]]] = field(default_factory=dict)


def plot(log: str | Path, out: str | Path | None = None) -> Path:
    """Draw a training log as one HTML file that needs no network, and return its path.

    A curve of more than 1,000 points shows the means of 500 intervals of steps and, pale, the lowest and highest value
    of each. A heat map of more than 400 steps shows the means of 400 intervals. The page says so.

    Args:
        log: A `training_log.jsonl`, or the folder that contains one.
        out: The page to write or replace. Default: `training.html` in the folder, or `NAME.html` beside `NAME.jsonl`.

    Raises:
        FileNotFoundError, ValueError: for bad input, naming the file, and the line where there is one.
    """
    given = Path(log)
    path = given / LOG_FILE if given.is_dir() else given
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a training log, or the folder that contains {LOG_FILE}")
    if out is None:
        out = given / PAGE_FILE if given.is_dir() else path.with_suffix(".html")
    target = Path(out)
    if target.is_dir() or (target.exists() and target.samefile(path)):
        raise ValueError(f"{target} is a folder or the log itself; name a file such as {PAGE_FILE}")
    found = read_log(path)
    text = page(
        TEMPLATES / "plot.html.jinja",
        script=TEMPLATES / "plot.js",
        data=_data(found),
        name=given.resolve().name,
        last_step=found.last_step,
        curves=found.curves,
        notes=found.notes,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)
    return target


def read_log(path: Path) -> TrainingLog:
    """Read a log with one JSON object per line. An incomplete last line, which a killed run leaves, is ignored.

    If a step is logged more than once, by evaluation or by a resumed run, the last value of each name counts.

    Raises:
        ValueError: naming file and line.
    """
    by_step, notes = _steps(path)
    found = TrainingLog(max(by_step, default=0), notes)
    for step in sorted(by_step):
        row = by_step[step]
        for name in (name for name in CURVES if row.get(name) is not None):
            found.curves.setdefault(name, []).append((step, row[name]))
        for name in (name for name in LAYER_CHARTS if any(value is not None for value in row.get(name, ()))):
            found.layers.setdefault(name, []).append((step, row[name]))
    if not found.curves and not found.layers:
        raise ValueError(f"{path} has nothing to draw, such as a loss")
    for name, curve in found.curves.items():
        if broken := [step for step, value in curve if not math.isfinite(value)]:
            found.notes.append(f"{name} is not finite at {len(broken)} step(s), first at {broken[0]}")
    return found


def _steps(path: Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """What is drawn of each step, by name: a number, or a list with a number for each layer. And notes."""
    steps: dict[int, dict[str, Any]] = {}
    # Not splitlines, which also splits at characters that a JSON string may contain, such as U+2028.
    lines = "".join(text_pieces(path)).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            values: dict[str, Any] = {name: _number(row[name]) for name in CURVES if name in row}
            if "layers" in row:
                layers = sorted(row["layers"], key=lambda layer: layer["layer"])
                values |= {name: [_number(layer.get(name)) for layer in layers] for name in LAYER_CHARTS}
            steps.setdefault(index(row["step"]), {}).update(values)
        except Exception as error:  # a line may hold anything
            if number == len(lines) and isinstance(error, json.JSONDecodeError):
                return steps, ["the last line of the log is incomplete and ignored"]
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(f"{path}, line {number} is not a line of a training log: {reason}") from None
    return steps, []


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def thinned(curve: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most `most` points of a curve: the lowest and highest of each interval, so that no spike is lost."""
    if len(curve) <= most:
        return list(curve)
    kept: list[tuple[int, float]] = []
    for interval in _intervals(curve, max(1, most // 2)):
        ends = {min(interval, key=_order), max(interval, key=_order)}
        kept += sorted(ends)
    return kept


def _order(point: tuple[int, float]) -> float:
    return point[1] if math.isfinite(point[1]) else math.inf


def averaged(
    values: Sequence[tuple[int, list[float | None]]], most: int = MOST_COLUMNS
) -> list[tuple[int, list[float | None]]]:
    """At most `most` columns: the mean of each interval of steps, by layer, at its last step."""
    if len(values) <= most:
        return list(values)
    found = []
    for interval in _intervals(values, most):
        depth = max(len(layers) for _, layers in interval)
        by_layer = ([layers[at] for _, layers in interval if at < len(layers)] for at in range(depth))
        found.append((interval[-1][0], [_mean(layer) for layer in by_layer]))
    return found


def _intervals(values: Sequence[T], number: int) -> Iterator[Sequence[T]]:
    """Cut values into a number of parts whose lengths differ by at most one."""
    for part in range(number):
        yield values[part * len(values) // number : (part + 1) * len(values) // number]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _data(log: TrainingLog) -> dict[str, Any]:
    """The data of the page. Adds notes about thinning to `log`."""
    if (longest := max(map(len, log.curves.values()), default=0)) > MOST_POINTS:
        log.notes.append(
            f"{longest:,} steps were logged; curves show the means of {MOST_POINTS // 2} intervals and, pale, the "
            "lowest and highest value of each"
        )
    if (longest := max(map(len, log.layers.values()), default=0)) > MOST_COLUMNS:
        log.notes.append(
            f"layers were measured in {longest:,} steps; their charts show the means of {MOST_COLUMNS} intervals"
        )
    charts = []
    for title, (logarithmic, names) in CHARTS.items():
        if series := [_series(name, log.curves[name]) for name in names if name in log.curves]:
            charts.append({"title": title, "log": logarithmic, "series": series})
    maps = []
    for name, title in LAYER_CHARTS.items():
        if name in log.layers:
            columns = averaged(log.layers[name])
            maps.append(
                {"title": title, "lines": name == "lambda", "x": [x for x, _ in columns], "y": [y for _, y in columns]}
            )
    return {"charts": charts, "maps": maps}


def _series(name: str, curve: list[tuple[int, float]]) -> dict[str, Any]:
    if len(curve) <= MOST_POINTS:
        return {"name": name, **_points(curve)}
    means = averaged([(step, [value]) for step, value in curve], MOST_POINTS // 2)
    return {"name": name, **_points([(step, mean) for step, (mean,) in means]), "range": _points(thinned(curve))}


def _points(curve: Sequence[tuple[int, float | None]]) -> dict[str, Any]:
    return {"x": [step for step, _ in curve], "y": [value for _, value in curve]}
