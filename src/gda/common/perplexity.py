"""Perplexity: of sequences of tokens, of a whole text, and relative to another model's."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gda.common.numbers import exponential


@dataclass(frozen=True)
class SequenceLoss:
    """Negative log-likelihood of the counted tokens of one sequence, in nats, and their number."""

    nats: float
    tokens: int


def sequence_losses(predictions: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[SequenceLoss]:
    """The loss of each sequence, given logits (T, vocabulary) and ids (T,). The first token is not counted."""
    return [
        SequenceLoss(cross_entropy(logits[:-1].float(), ids[1:], reduction="sum").item(), len(ids) - 1)
        for logits, ids in predictions
    ]


def mean_perplexity(losses: Sequence[SequenceLoss]) -> float:
    """exp of the mean negative log-likelihood per token. Infinity where the result exceeds a float."""
    return exponential(sum(each.nats for each in losses) / sum(each.tokens for each in losses))


def ratio_interval(ours: Sequence[SequenceLoss], theirs: Sequence[SequenceLoss]) -> tuple[float, float] | None:
    """95 % confidence interval of the ratio of two perplexities on the same sequences.

    Sequences are taken as independent. Their differences in nats are pooled over tokens (a ratio estimator), with
    Student's t for few sequences. None for a single sequence, or where the two models read different sequences.
    """
    count, tokens = len(ours), [each.tokens for each in ours]
    if count < 2 or tokens != [each.tokens for each in theirs]:
        return None
    differences = [mine.nats - other.nats for mine, other in zip(ours, theirs, strict=True)]
    mean = sum(differences) / sum(tokens)
    squares = sum((nats - mean * number) ** 2 for nats, number in zip(differences, tokens, strict=True))
    margin = _student_quantile(0.975, count - 1) * math.sqrt(squares * count / (count - 1)) / sum(tokens)
    return exponential(mean - margin), exponential(mean + margin)


def _student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t within 1 %: exact up to 2 degrees of freedom, then Abramowitz and Stegun, 26.7.5."""
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) * math.sqrt(2 / (4 * probability * (1 - probability)))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: torch.Tensor, *, context: int = 512) -> float:
    """Perplexity of two or more `ids` (T,), read in sequences of `context` tokens without overlap."""
    if len(ids) < 2:
        raise ValueError("perplexity needs at least two tokens")
    sequences = ids.split(context)
    predictions = ((model(each.unsqueeze(0), use_cache=False).logits[0], each) for each in sequences)
    return mean_perplexity(sequence_losses(predictions))


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
    losses: tuple[SequenceLoss, ...] = field(repr=False)


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
    complete: this is lm-eval's rolling log-likelihood, which, however, counts a BOS that the tokenizer adds. `advance`
    is called with the number of tokens done and their total.

    Raises:
        ValueError: for an empty text or one that is only a BOS token, an impossible stride, a tokenizer without BOS and
            EOS, or one with ids that the model has no embeddings for.
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
    if (largest := max(first, *ids)) >= (embeddings := model.get_input_embeddings().num_embeddings):
        raise ValueError(f"the tokenizer gives ids up to {largest}, but the model has {embeddings} embeddings")
    sequence = torch.tensor(ids if ids[0] == first else [first, *ids], device=model.device)
    losses = _losses_of_text(model, sequence, context, stride, advance)
    total = sum(each.nats for each in losses)
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
        losses=tuple(losses),
    )


@torch.inference_mode()
def _losses_of_text(
    model: PreTrainedModel,
    sequence: torch.Tensor,
    context: int,
    stride: int,
    advance: Callable[[int, int], None] | None,
) -> list[SequenceLoss]:
    """The loss of every token of `sequence` (T,) but the first, by the sequence of `context` tokens that counts it."""
    losses, done, last = [], 0, len(sequence) - 1
    begin = 0
    while done < last:
        end = min(begin + context, last)
        if end == last:
            begin = max(0, last - context)  # the last sequence is as long as the others
        logits = model(sequence[begin:end].unsqueeze(0), use_cache=False).logits[0, done - begin :].float()
        nats = cross_entropy(logits, sequence[done + 1 : end + 1], reduction="sum").item()
        losses.append(SequenceLoss(nats, end - done))
        done, begin = end, begin + stride
        if advance is not None:
            advance(done, last)
    return losses
