"""The common part of the engines' scripts: read the task, run each model, write the results. Standard library only."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run(generate: Callable[[Path, list[str], int], dict[str, Any]]) -> None:
    """Call `generate(folder, prompts, num_tokens)` for each folder of the task. An error affects only its model."""
    task = json.loads(Path(sys.argv[1]).read_text())
    results: dict[str, Any] = {}
    for name, folder in task["folders"].items():
        try:
            results[name] = generate(Path(folder), task["prompts"], task["num_tokens"])
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    Path(sys.argv[2]).write_text(json.dumps(results))
