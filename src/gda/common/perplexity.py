"""Perplexity: of token sequences, and of a whole text. A leaf module: it imports no room."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gda.common.numbers import exponential


def negative_log_likelihood(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """−Σ ln p of token ids (T,) by logits (T, vocabulary), in nats."""
    return cross_entropy(logits.float(), ids.to(logits.device), reduction="sum").item()


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: torch.Tensor, *, context: int = 512) -> float:
    """exp of the mean negative log-likelihood of `ids` (T,), read as sequences of `context` tokens.

    The first token of each sequence has nothing before it and does not count.

    Raises:
        ValueError: if there are fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError("perplexity needs at least two tokens")
    total, counted = 0.0, 0
    for sequence in ids.split(context):
        if len(sequence) > 1:
            logits = model(sequence.unsqueeze(0), use_cache=False).logits[0, :-1]
            total += negative_log_likelihood(logits, sequence[1:])
            counted += len(sequence) - 1
    return math.exp(total / counted)


@dataclass(frozen=True)
class TextPerplexity:
    """Perplexity of a whole text. Every token counts once.

    Attributes:
        token, word, byte: exp of the negative log-likelihood per token, word and byte. Models with different
            tokenizers can be compared by word or byte only. Words are separated by white space.
        tokens, words, bytes: Length of the text.
        context: Tokens that the model reads at a time.
        stride: Tokens between the starts of two contexts. Tokens in the overlap are read again and not counted again.
    """

    token: float
    word: float
    byte: float
    tokens: int
    words: int
    bytes: int
    context: int
    stride: int


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

    The first token is predicted from BOS, or from EOS if the tokenizer has no BOS, so every token counts. With the
    default stride this is lm-eval's rolling log-likelihood: contexts do not overlap, except that the last one begins
    early enough to be as long as the others.

    Args:
        model: A language model.
        tokenizer: Its tokenizer.
        text: The text.
        context: Tokens that the model reads at a time.
        stride: Tokens between the starts of two contexts, at most `context`. Default: `context`.
        advance: Called with the number of tokens done and their total.

    Raises:
        ValueError: for an empty text, or a context or stride out of range.
    """
    stride = context if stride is None else stride
    if not 0 < stride <= context:
        raise ValueError(f"stride {stride} is not between 1 and the context of {context} tokens")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not ids or not text.strip():
        raise ValueError("the text is empty")
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError("the tokenizer has neither a BOS nor an EOS token to begin the text with")
    sequence = torch.tensor(ids if ids[0] == first else [first, *ids], device=model.device)
    tokens, words, length = len(sequence) - 1, len(text.split()), len(text.encode())
    if not tokens:
        raise ValueError("the text consists of a BOS token only")
    total = _rolling_negative_log_likelihood(model, sequence, context, stride, advance)
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
def _rolling_negative_log_likelihood(
    model: PreTrainedModel,
    sequence: torch.Tensor,
    context: int,
    stride: int,
    advance: Callable[[int, int], None] | None,
) -> float:
    """−Σ ln p of every token of `sequence` (T,) but the first, in nats."""
    total, done, last = 0.0, 0, len(sequence) - 1
    start = 0
    while done < last:
        end = min(start + context, last)
        if end == last:
            start = max(0, last - context)  # the last context is as long as the others
        logits = model(sequence[start:end].unsqueeze(0), use_cache=False).logits[0, done - start :]
        total += negative_log_likelihood(logits, sequence[done + 1 : end + 1])
        done, start = end, start + stride
        if advance is not None:
            advance(done, last)
    return total
