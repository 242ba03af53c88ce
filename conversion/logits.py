"""Comparing two models by the logits and the greedy text that they produce."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from transformers import GenerationConfig, PreTrainedModel

from gda.common.screen import progress_bars
from gda.conversion.sources.source import Source
from gda.conversion.sources.tokenizers import NoTokenizerError
from gda.conversion.tensors.layerwise import LayerwiseModel

GREEDY_TOKENS = 16
TIE = 1e-4  # Two logits this close, relative to the largest at their position, differ by rounding only.
RANDOM_PROMPTS, RANDOM_LENGTH = 8, 48
# `compare_by_layers` cuts the first tokens of the prompts into rows, and decodes the last ones of each row one by one.
# There are so few because each costs two operations per weight, and verification must take at most twice the time of
# the conversion. Lossy conversions get no more, since no threshold applies to them: a split measures its perplexity on
# thousands of held-out tokens, and `gda eval` measures any model.
ROWS, ROW_LENGTH, ROW_STEPS = 2, 16, 4

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village at the edge of a great forest, there lived",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n",
    "Water boils at 100 degrees Celsius at sea level because",
    "Question: If a train travels 60 miles in 90 minutes, how fast is it going?\nAnswer:",
    "Der schnelle braune Fuchs springt über den faulen Hund, und dann",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Dear Sir or Madam,\n\nI am writing to you with regard to",
)


class GreedyText(NamedTuple):
    """Whether a greedy text equals the source's, and whether it does except for ties."""

    same: bool
    same_but_ties: bool


class LogitDifferences(NamedTuple):
    """Maxima and sums over the logits of some tokens; `sum_abs` is of the mean over the vocabulary."""

    tokens: int
    same_top_token: int
    max_abs: float
    max_logit: float
    sum_abs: float
    sum_kl: float
    finite: bool


def logit_differences(expected: torch.Tensor, got: torch.Tensor) -> LogitDifferences:
    """Compare the logits (B, T, vocabulary) of the source and of the converted model."""
    difference = (got - expected).abs()
    log_p, log_q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return LogitDifferences(
        tokens=expected[..., 0].numel(),
        same_top_token=int((expected.argmax(-1) == got.argmax(-1)).sum()),
        max_abs=difference.max().item(),
        max_logit=expected.abs().max().item(),
        sum_abs=difference.mean(dim=-1).sum().item(),
        sum_kl=(log_p.exp() * (log_p - log_q)).sum().item(),
        finite=bool(torch.isfinite(expected).all() and torch.isfinite(got).all()),
    )


def prompts_for(source: Source) -> tuple[list[torch.Tensor], str | None]:
    """What both models read: token ids (1, T) of the prompts; or random ids, with a fixed seed, and the reason."""
    try:
        tokenizer = source.tokenizer()
        prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
        if (largest := max(max(ids, default=0) for ids in prompts)) >= source.config.vocab_size:
            reason = f"the tokenizer gives id {largest}, but the model has {source.config.vocab_size} embeddings"
        elif all(prompts):
            return [torch.tensor([ids]) for ids in prompts], None
        else:
            reason = "the tokenizer gives no ids for some prompts"
    except NoTokenizerError as error:
        reason = error.reason
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(source.config.vocab_size, (RANDOM_PROMPTS, RANDOM_LENGTH), generator=generator)
    return list(ids.split(1)), reason


@torch.inference_mode()
def compare_whole(
    source: Source, converted: Source, prompts: list[torch.Tensor], console: Console | None
) -> tuple[list[LogitDifferences], list[GreedyText]]:
    """Load both models, run them on each prompt, and let both continue it."""
    models, parts, texts = (source.load(), converted.load()), [], []
    with progress_bars(console) as progress:
        for ids in progress.track(prompts, description="verifying"):
            parts.append(logit_differences(*(model(ids, use_cache=False).logits for model in models)))
            wanted = _greedy(models[0], ids, use_cache=_trusts_cache(source, converted))
            found = _greedy(models[1], ids, use_cache=True)
            texts.append(_compare_texts(models[0], wanted, found))
    return parts, texts


@torch.inference_mode()
def compare_by_layers(
    source: Source, converted: Source, prompts: list[torch.Tensor], console: Console | None
) -> tuple[list[LogitDifferences], list[GreedyText]]:
    """Run both models layer by layer on rows of the prompts' tokens, with a cache.

    Logits of the prefill are compared, and the texts that the steps after it give.
    """
    rows, prefill = _rows(prompts)
    with progress_bars(console, TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()) as progress:
        layers = source.config.num_hidden_layers + converted.config.num_hidden_layers
        advance = partial(progress.advance, progress.add_task("verifying, layer", total=layers))
        cached = prefill if _trusts_cache(source, converted) else None
        expected = _logits_by_layers(source, rows, cached, advance)
        got = _logits_by_layers(converted, rows, prefill, advance)
    wanted, found = (logits[:, prefill - 1 :].argmax(-1) for logits in (expected, got))
    same = wanted == found
    same_but_ties = same | _is_tie(expected[:, prefill - 1 :], found)
    texts = [GreedyText(bool(row.all()), bool(tied.all())) for row, tied in zip(same, same_but_ties, strict=True)]
    return [logit_differences(expected[:, :prefill], got[:, :prefill])], texts


def _trusts_cache(source: Source, converted: Source) -> bool:
    """Of two GDA models, the source decodes without a cache: a bug in its cache would be the converted model's too."""
    return {source.config.model_type, converted.config.model_type} != {"gda"}


def _greedy(model: PreTrainedModel, ids: torch.Tensor, *, use_cache: bool) -> torch.Tensor:
    """Prompt (1, T) → prompt and greedy continuation (1, T + 16)."""
    model.generation_config = GenerationConfig()  # the checkpoint's may stop early or penalize repetition
    mask = torch.ones_like(ids)
    settings = {"do_sample": False, "max_new_tokens": GREEDY_TOKENS, "use_cache": use_cache}
    return model.generate(ids, attention_mask=mask, **settings)  # type: ignore[operator]


def _compare_texts(source: PreTrainedModel, wanted: torch.Tensor, found: torch.Tensor) -> GreedyText:
    """Compare texts (1, T) up to the first token that differs."""
    different = (wanted != found)[0].nonzero()
    if not len(different):
        return GreedyText(same=True, same_but_ties=True)
    place = int(different[0])
    logits = source(wanted[:, :place], use_cache=False).logits[0, -1]
    return GreedyText(same=False, same_but_ties=bool(_is_tie(logits, found[0, place])))


def _is_tie(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Whether the logit of each of the `tokens` (…) is the largest of `logits` (…, vocabulary) up to rounding."""
    behind = logits.amax(-1) - logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return behind <= TIE * logits.abs().amax(-1)


def _rows(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The prompts' tokens as rows of equal length, which need no padding, and the length of their prefill."""
    ids = torch.cat(prompts, dim=1)[0]
    number = max(1, min(ROWS, len(ids) // (2 * ROW_STEPS)))
    length = min(ROW_LENGTH, len(ids) // number)
    return ids[: number * length].view(number, length), max(1, length - ROW_STEPS)


def _logits_by_layers(
    source: Source, rows: torch.Tensor, prefill: int | None, advance: Callable[[], None]
) -> torch.Tensor:
    """Logits (rows, T, vocabulary) of rows (rows, T) of ids; one layer is in memory.

    The first `prefill` ids of each row are read at once, and the others one by one, with a cache. Without `prefill`,
    rows run without a cache. `advance` is called after each layer.
    """
    model = LayerwiseModel(source.config, source.read, narrow=True)
    states = model.embed(rows)
    for index in range(model.num_layers):
        if prefill is None:
            states = model.run(index, model.tensors(index), states)
        else:
            states = model.decode(index, model.tensors(index), states, prefill)
        advance()
    return model.head()(states)
