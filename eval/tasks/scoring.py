"""Scores that several tasks share."""

from typing import Any


def continuation(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Of the target's tokens: `acc`, whether each is the likeliest; `loglikelihood`, in nats.

    `acc` is what greedy generation would give, found in one forward pass.
    """
    [(loglikelihood, is_greedy)] = results
    return {"acc": float(is_greedy), "loglikelihood": loglikelihood}
