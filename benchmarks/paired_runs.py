"""Results of runs that are compared in pairs of the same seed, kept in a folder so that a script can continue."""

import json
import sys
from pathlib import Path
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


def difference(differences: list[float]) -> str:
    """The mean and its 95 % interval, as a cell of a table."""
    found = interval(differences)
    half = "" if found["half_width"] is None else f" ± {found['half_width']:.3f}"
    return f"{found['mean']:+.3f}{half}"
