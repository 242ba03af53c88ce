"""Tasks for lm-evaluation-harness that make their own data: nothing is downloaded, a seed decides everything."""

from pathlib import Path

# For `lm_eval --include_path` and `TaskManager(include_path=...)`.
TASKS_FOLDER = Path(__file__).parent / "definitions"
