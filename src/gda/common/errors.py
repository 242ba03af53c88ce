"""Errors, and how they are printed."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # or a quota, or the size that a file may have
MAX_LENGTH = 500  # characters of a message, which may quote a value of any length


class CheckFailed(RuntimeError):
    """The command ran, but a check failed: exit code 1."""


class Interrupted(KeyboardInterrupt):
    """An interruption after which work can be continued. The message says how."""


def first_line(error: BaseException) -> str:
    """The first two lines of an error's message, joined; the middle of a very long one is cut out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " ".join(lines[:2]) if lines else type(error).__name__
    return message if len(message) <= MAX_LENGTH else f"{message[: MAX_LENGTH // 2]} … {message[-MAX_LENGTH // 2 :]}"


@contextmanager
def errors_as(message: str, caught: type[Exception] = Exception) -> Iterator[None]:
    """Raise ValueError with `message` and the beginning of the message of an error that is raised inside.

    By default, of any: what libraries raise for a malformed file has no class in common.
    """
    try:
        yield
    except caught as error:
        raise ValueError(f"{message}: {first_line(error)}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left. On the CPU, torch raises a RuntimeError like any other."""
    message = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or "out of memory" in message or "can't allocate memory" in message


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Name the file or folder in an OSError that names none, as that of a failed read or write."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
