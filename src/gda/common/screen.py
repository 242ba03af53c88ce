"""Progress and warnings on the terminal."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress, ProgressColumn
from transformers.utils import logging as transformers_logging

from gda.common.progress import LoggedProgress, shows_progress


def progress_bars(console: Console | None, *columns: ProgressColumn) -> Progress:
    """Progress bars that are shown on a terminal, and disappear when they are done; elsewhere, lines in the log."""
    return LoggedProgress(*columns, console=console, disable=not shows_progress(console), transient=True)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide progress bars and warnings of transformers inside the block. The reports say what matters."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
