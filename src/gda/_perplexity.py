"""Perplexity of a text. A leaf module: it imports nothing of the project."""

import math

import torch
from transformers import PreTrainedModel


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: torch.Tensor, *, context: int = 512) -> float:
    """exp of the mean negative log-likelihood of `ids` (T,), read in windows of `context` tokens without overlap.

    The first token of each window is predicted from nothing and is not counted.

    Raises:
        ValueError: if there are fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError("perplexity needs at least two tokens")
    total, counted = 0.0, 0
    for window in ids.split(context):
        if len(window) < 2:
            continue
        logits = model(window.unsqueeze(0), use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        counted += len(window) - 1
    return math.exp(total / counted)
