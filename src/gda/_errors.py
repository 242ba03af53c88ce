"""Errors with an exit code of their own. A leaf module: it imports nothing of the project."""


class CheckFailed(RuntimeError):
    """The command ran, and what it checked does not hold: exit code 1."""
