"""Scores shared by several tasks."""

import math
from typing import Any


def continuation(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """`acc`: whether each token of the target is the likeliest; `loglikelihood`: that of the target, in nats.

    `acc` is the accuracy of greedy generation, from a single forward pass. It is NaN if the log-likelihood is.
    """
    [(loglikelihood, is_greedy)] = results
    acc = math.nan if math.isnan(loglikelihood) else float(is_greedy)
    return {"acc": acc, "loglikelihood": loglikelihood}
