"""Perplexity: of sequences of tokens, and of a whole text."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gda.common.numbers import exponential


def mean_perplexity(predictions: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """exp of the mean negative log-likelihood over sequences of logits (T, vocabulary) and ids (T,).

    The first token of a sequence is not counted. Infinity where the result exceeds a float.
    """
    total, counted = 0.0, 0
    for logits, ids in predictions:
        total += cross_entropy(logits[:-1].float(), ids[1:], reduction="sum").item()
        counted += len(ids) - 1
    return exponential(total / counted)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: torch.Tensor, *, context: int = 512) -> float:
    """Perplexity of two or more `ids` (T,), read in sequences of `context` tokens without overlap."""
    if len(ids) < 2:
        raise ValueError("perplexity needs at least two tokens")
    sequences = ids.split(context)
    return mean_perplexity((model(each.unsqueeze(0), use_cache=False).logits[0], each) for each in sequences)


@dataclass(frozen=True)
class TextPerplexity:
    """Perplexity of a whole text: every token is counted once.

    Attributes:
        token, word, byte: exp of the negative log-likelihood per token, word and byte. Only the last two can be
            compared between models with different tokenizers. Words are separated by white space.
        tokens, words, bytes: Their numbers.
        context: Tokens that the model reads at a time.
        stride: Tokens from the start of one sequence to the start of the next. Tokens that a sequence shares with the
            one before are read but not counted again.
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

    The first token is predicted from BOS, or from EOS if the tokenizer has no BOS, so every token is counted. With
    `stride` = `context`, the default, sequences don't overlap, except that the last one starts early enough to be
    complete: this is lm-eval's rolling log-likelihood. `advance` is called with the number of tokens done and their
    total.

    Raises:
        ValueError: for an empty text or an impossible stride.
    """
    stride = context if stride is None else stride
    if not 0 < stride <= context:
        raise ValueError(f"stride {stride} is not between 1 and the context of {context} tokens")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not ids or not text.strip():
        raise ValueError("the text is empty")
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError("the tokenizer has neither a BOS nor an EOS token to start with")
    sequence = torch.tensor(ids if ids[0] == first else [first, *ids], device=model.device)
    total = _negative_log_likelihood(model, sequence, context, stride, advance)
    tokens, words, length = len(sequence) - 1, len(text.split()), len(text.encode())
    if not tokens:
        raise ValueError("the text is only a BOS token")
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
    """Sum over every token of `sequence` (T,) but the first, in nats."""
    total, done, last = 0.0, 0, len(sequence) - 1
    begin = 0
    while done < last:
        end = min(begin + context, last)
        if end == last:
            begin = max(0, last - context)  # the last sequence is as long as the others
        logits = model(sequence[begin:end].unsqueeze(0), use_cache=False).logits[0, done - begin :].float()
        total += cross_entropy(logits, sequence[done + 1 : end + 1], reduction="sum").item()
        done, begin = end, begin + stride
        if advance is not None:
            advance(done, last)
    return total
