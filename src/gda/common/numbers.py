"""Numbers at their limits. A leaf module: it imports nothing of the project."""

import math
from collections.abc import Mapping
from typing import Any


def exponential(value: float) -> float:
    """exp, and infinity where a float ends: a word may be a whole line of symbols."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: they become None, wherever they stand in it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value
