"""Progress of long work: a bar on a terminal, otherwise lines in the log; and which process reports it.

The lines go to the logger `gda` at level INFO. Commands write them to standard error if it shows no bars. In
Python, `logging.basicConfig(level=logging.INFO)` shows them.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TransferSpeedColumn,
)

logger = logging.getLogger("gda")
LOG_SECONDS = 10.0  # before the first line; the n-th interval is n times as long
LONGEST_INTERVAL = 30  # in units of LOG_SECONDS
# Work that takes a minute or more says so after two seconds.
ESTIMATE_SECONDS, LONG_SECONDS = 2.0, 60.0
LOGGED_COLUMNS = (DownloadColumn, MofNCompleteColumn, TransferSpeedColumn)


class LoggedProgress(Progress):
    """rich's progress bars. If they are disabled, the log gets lines at growing intervals, and none for short work."""

    def __init__(self, *columns: str | ProgressColumn, disable: bool = False, **settings: Any):
        # The thread in which `track` counts ends at once where nothing is drawn; without it, `track` counts itself.
        super().__init__(*columns, disable=disable, auto_refresh=not disable, **settings)
        self._logged, self._lines = self.get_time(), 0
        self._estimated: set[TaskID] = set()

    def add_task(self, description: str, *, completed: int = 0, **settings: Any) -> TaskID:  # type: ignore[override]
        """Like `Progress.add_task`. What is completed from the start doesn't count as done by this process."""
        return super().add_task(description, completed=completed, done_before=completed, **settings)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Like `Progress.advance`, and log."""
        super().advance(task_id, advance)
        self._log(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Like `Progress.update`, and log."""
        super().update(task_id, **changes)
        self._log(task_id)

    def _log(self, task_id: TaskID) -> None:
        if not self.disable:
            return
        task, spent = self._tasks[task_id], self.get_time() - self._logged
        left = _seconds_left(task)
        if spent < LOG_SECONDS * min(self._lines + 1, LONGEST_INTERVAL) and not self._is_first_estimate(task, left):
            return
        self._logged, self._lines = self.get_time(), self._lines + 1
        if left is None:
            logger.info("%s: %s", task.description, f"{task.completed:,.0f}")
            return
        self._estimated.add(task_id)
        shown = [str(column.render(task)) for column in self.columns if isinstance(column, LOGGED_COLUMNS)]
        logger.info("%s: %s", task.description, ", ".join([f"{task.percentage:.0f} %", *shown, time_left(left)]))

    def _is_first_estimate(self, task: Task, left: float | None) -> bool:
        is_long = left is not None and left >= LONG_SECONDS and (task.elapsed or 0) >= ESTIMATE_SECONDS
        return is_long and task.id not in self._estimated


def _seconds_left(task: Task) -> float | None:
    """Estimated remaining seconds; None while nothing is known about it."""
    done = task.completed - task.fields.get("done_before", 0)
    if not task.total or not done:
        return None
    return (task.elapsed or 0) / done * (task.total - task.completed)


def time_left(seconds: float) -> str:
    """The remaining time in words."""
    return f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def shows_progress(console: Console | None) -> bool:
    """Whether progress bars are shown: on a terminal that can draw them."""
    return console is not None and console.is_terminal and not console.is_dumb_terminal


def is_main_process() -> bool:
    """Whether this process is the one that reports: the first that `accelerate launch` or torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def log_level(name: str, level: int) -> Iterator[None]:
    """Give the logger `name` another level within this context."""
    named = logging.getLogger(name)
    before = named.level
    named.setLevel(level)
    try:
        yield
    finally:
        named.setLevel(before)


@contextlib.contextmanager
def log_on_stderr() -> Iterator[None]:
    """Write the log to standard error within this context, unless it is closed, or a terminal that shows bars."""
    # FORCE_COLOR makes a terminal of every console, but not of a log file.
    if sys.stderr is None or (sys.stderr.isatty() and shows_progress(Console(stderr=True))):
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        with log_level(logger.name, logging.INFO):
            yield
    finally:
        logger.removeHandler(handler)
