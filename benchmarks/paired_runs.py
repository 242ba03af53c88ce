"""Results of runs that are compared in pairs of the same seed, kept in a folder so that a script can continue."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from equal_flops import interval

from gda.common.files import read_json, write_json

RUNS, SETTINGS = "runs.jsonl", "settings.json"
# One thread for each run; and freed memory is kept, since to get it anew from the system takes up to a third of a step.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31)}


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


def do_missing(folder: Path, wanted: list[dict[str, Any]], run_one: Callable[..., dict[str, Any]], jobs: int) -> None:
    """Do those of the wanted runs that the folder lacks, `jobs` at a time, in their order, and add their results.

    Each is a call of `run_one` with keywords that tell it from the others. A failed run is reported; the others go on.
    """
    finished = runs_of(folder)
    missing = [each for each in wanted if not any(each.items() <= run.items() for run in finished)]
    os.environ |= ENVIRONMENT
    failed = 0
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        runs = {pool.submit(run_one, **each): each for each in missing}
        for number, done in enumerate(as_completed(runs), 1 + len(wanted) - len(missing)):
            name = ", ".join(f"{key} {value}" for key, value in runs[done].items())
            print(f"{number} of {len(wanted)}: {name}: {done.exception() or 'done'}", flush=True)
            if done.exception():
                failed += 1
                continue
            with (folder / RUNS).open("a") as file:
                file.write(json.dumps(runs[done] | done.result()) + "\n")
    if failed:
        sys.exit(f"{failed} runs failed; the same command tries them again")


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
