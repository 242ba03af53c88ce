"""Tasks for lm-evaluation-harness that generate their data from a seed and download nothing."""

from pathlib import Path

# For lm-eval's `--include_path` and `TaskManager(include_path=…)`.
TASKS_FOLDER = Path(__file__).parent / "definitions"
