"""Infinite and undefined numbers."""

import math
from collections.abc import Mapping
from typing import Any


def exponential(value: float) -> float:
    """exp, or infinity on overflow: the perplexity per word can be that large."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON doesn't have, with None, at any depth of a value."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value
