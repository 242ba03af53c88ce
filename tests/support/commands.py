"""What a run of the command `gda` gives."""

from collections.abc import Callable
from typing import NamedTuple


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    error: str


Command = Callable[..., Outcome]
