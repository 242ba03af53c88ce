"""The outcome of a run of the `gda` command, and the check that it refused bad input."""

from collections.abc import Callable
from typing import NamedTuple


class Outcome(NamedTuple):
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    error: str


Command = Callable[..., Outcome]


def assert_refused(outcome: Outcome, *named: str) -> None:
    """Exit code 2, nothing on standard output, and one line on standard error that contains each of `named`."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert len(outcome.error.splitlines()) == 1, outcome.error
    assert outcome.error.startswith("gda: ")
    assert len(outcome.error) < 600, outcome.error
    for name in named:
        assert name in outcome.error
