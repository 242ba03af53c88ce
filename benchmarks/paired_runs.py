"""Results of runs that are compared in pairs of the same seed, kept in a folder so that a script can continue."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from equal_flops import interval

from gda.common.files import read_json, write_json

RUNS, SETTINGS = "runs.jsonl", "settings.json"


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write what all runs of a folder have in common, or end the script if it holds runs with other settings."""
    file = folder / SETTINGS
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
    elif (before := read_json(file)) != settings:
        sys.exit(f"{file} has {before}, not {settings}; choose another --out")


def runs_of(folder: Path) -> list[dict[str, Any]]:
    """The finished runs."""
    file = folder / RUNS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add_run(folder: Path, run: dict[str, Any]) -> None:
    """Add a finished run."""
    with (folder / RUNS).open("a") as file:
        file.write(json.dumps(run) + "\n")


def cell(values: Iterable[float], others: Iterable[float] | None) -> str:
    """The mean of runs or, with other runs of the same seeds, the mean difference to them and its 95 % interval."""
    if others is None:
        return f"{fmean(values):.3f}"
    found = interval([value - other for value, other in zip(values, others, strict=True)])
    half = "" if found["half_width"] is None else f" ± {found['half_width']:.3f}"
    return f"{found['mean']:+.3f}{half}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
