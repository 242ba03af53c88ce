"""Errors with an exit code of their own. A leaf module: it imports nothing of the project."""


class CheckFailed(RuntimeError):
    """The command ran, and what it checked does not hold: exit code 1."""


def first_line(error: BaseException) -> str:
    """What an error says, without what follows its first two lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
