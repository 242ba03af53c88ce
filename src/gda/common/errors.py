"""Errors with an exit code of their own. A leaf module: it imports nothing of the project."""

LONGEST = 500  # characters of a message, which may hold a value of any length


class CheckFailed(RuntimeError):
    """The command ran, and what it checked does not hold: exit code 1."""


def first_line(error: BaseException) -> str:
    """What an error says, without what follows its first two lines, and without the middle of what is very long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines else type(error).__name__
    return said if len(said) <= LONGEST else f"{said[: LONGEST // 2]} … {said[-LONGEST // 2 :]}"
