"""Progress of long work: a bar on a terminal, otherwise lines in the log.

The lines go to the logger `gda` at level INFO. Commands write them to standard error if it is not a terminal. In
Python, `logging.basicConfig(level=logging.INFO)` shows them.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.progress import Progress, ProgressColumn, TaskID

logger = logging.getLogger("gda")
LOG_SECONDS = 10.0


class LoggedProgress(Progress):
    """rich's progress bars. If they are disabled, the log gets at most one line every ten seconds."""

    def __init__(self, *columns: str | ProgressColumn, **settings: Any):
        super().__init__(*columns, **settings)
        self._logged = time.monotonic()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Like `Progress.advance`, and log."""
        super().advance(task_id, advance)
        self._log(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Like `Progress.update`, and log."""
        super().update(task_id, **changes)
        self._log(task_id)

    def _log(self, task_id: TaskID) -> None:
        if not self.disable or time.monotonic() - self._logged < LOG_SECONDS:
            return
        self._logged = time.monotonic()
        task = self._tasks[task_id]
        if task.total and task.completed:
            left = time_left((task.elapsed or 0) / task.completed * (task.total - task.completed))
            logger.info("%s: %.0f %%, %s", task.description, task.percentage, left)
        else:
            logger.info("%s: %s", task.description, f"{task.completed:,.0f}")


def time_left(seconds: float) -> str:
    """The remaining time in words."""
    if seconds < 100:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 6000 else f"{seconds / 3600:.1f} h left"


@contextlib.contextmanager
def log_on_stderr() -> Iterator[None]:
    """Write the log to standard error within this context, unless it is a terminal, which shows bars."""
    if sys.stderr.isatty():
        yield
        return
    handler, level = logging.StreamHandler(sys.stderr), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
