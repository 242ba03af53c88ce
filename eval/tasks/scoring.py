"""Scores that several tasks share."""

import math
from typing import Any


def continuation(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Of the target's tokens: `acc`, whether each is the likeliest; `loglikelihood`, in nats.

    `acc` is what greedy generation would give, found in one forward pass; NaN where the log-likelihood is.
    """
    [(loglikelihood, is_greedy)] = results
    acc = math.nan if math.isnan(loglikelihood) else float(is_greedy)
    return {"acc": acc, "loglikelihood": loglikelihood}
