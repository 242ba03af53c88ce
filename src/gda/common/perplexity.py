"""Perplexity of a text. A leaf module: it imports no room."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gda.common.numbers import exponential


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
        total += cross_entropy(logits, window[1:], reduction="sum").item()
        counted += len(window) - 1
    return math.exp(total / counted)


@dataclass(frozen=True)
class TextPerplexity:
    """Perplexity of a whole text: every token is counted once.

    Attributes:
        token, word, byte: exp of the negative log-likelihood for each of them. Only the last two can be compared
            between models of different tokenizers. Words are parted by white space.
        tokens, words, bytes: How many there are.
        context: Tokens that the model reads at a time.
        stride: Tokens from one window to the next; what a window shares with the one before is read and not counted.
    """

    token: float
    word: float
    byte: float
    tokens: int
    words: int
    bytes: int
    context: int
    stride: int

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON-ready values."""
        return asdict(self)


def text_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    context: int = 512,
    stride: int | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> TextPerplexity:
    """Perplexity of `text` by token, word and byte.

    The first token is predicted from BOS, or EOS if the tokenizer has no BOS, so that none is left out. With
    `stride` = `context`, the default, windows share nothing, except that the last begins early enough to be whole: it
    is lm-eval's rolling log-likelihood.

    Args:
        model: A language model.
        tokenizer: Its tokenizer.
        text: What is read.
        context: Tokens that the model reads at a time.
        stride: Tokens from one window to the next, at most `context`.
        advance: Called with the tokens that are done and those in all.

    Raises:
        ValueError: for an empty text, or a context or stride that cannot be.
    """
    stride = context if stride is None else stride
    if not 0 < stride <= context:
        raise ValueError(f"stride {stride} is not from 1 to the context of {context} tokens")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not ids or not text.strip():
        raise ValueError("the text is empty")
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError("the tokenizer has neither a BOS nor an EOS token to begin with")
    sequence = torch.tensor(ids if ids[0] == first else [first, *ids], device=model.device)
    total = _negative_log_likelihood(model, sequence, context, stride, advance)
    tokens, words, length = len(sequence) - 1, len(text.split()), len(text.encode())
    if not tokens:
        raise ValueError("the text is a BOS token and nothing else")
    return TextPerplexity(
        token=exponential(total / tokens),
        word=exponential(total / words),
        byte=exponential(total / length),
        tokens=tokens,
        words=words,
        bytes=length,
        context=context,
        stride=stride,
    )


@torch.inference_mode()
def _negative_log_likelihood(
    model: PreTrainedModel,
    sequence: torch.Tensor,
    context: int,
    stride: int,
    advance: Callable[[int, int], None] | None,
) -> float:
    """Of every token of `sequence` (T,) but the first, in nats."""
    total, done, last = 0.0, 0, len(sequence) - 1
    begin = 0
    while done < last:
        end = min(begin + context, last)
        if end == last:
            begin = max(0, last - context)  # the last window is as long as the others
        logits = model(sequence[begin:end].unsqueeze(0), use_cache=False).logits[0, done - begin :].float()
        total += cross_entropy(logits, sequence[done + 1 : end + 1], reduction="sum").item()
        done, begin = end, begin + stride
        if advance is not None:
            advance(done, last)
    return total
