"""Does the converted model compute what its source computes?"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.progress import track
from transformers import GenerationConfig, PreTrainedModel

from gda.common.errors import CheckFailed, first_line
from gda.common.screen import quiet_transformers, shows_progress
from gda.configuration.configuration_gda import ANNEAL_FIELDS, GROWTH_FIELDS, GDAConfig
from gda.conversion.families.llamalike import DIFFERING_FIELDS, SHARED_FIELDS, layer_windows
from gda.conversion.growth.operators import planned_growth
from gda.conversion.modes.plan import mode_of, planned_config, planned_recipes
from gda.conversion.sources.folder import FolderSource
from gda.conversion.sources.open import open_source, resolve_folder
from gda.conversion.sources.source import PROVENANCE_FILE, Source
from gda.conversion.tensors.layerwise import LayerwiseModel, memory_to_use
from gda.conversion.tensors.recipes import Recipe
from gda.conversion.writing.provenance import Settings, read_settings
from gda.conversion.writing.stream import different_tensors
from gda.modeling_gda.attention_gda import UnusedCacheError

LOSSLESS_THRESHOLD = 1e-5
GREEDY_TOKENS = 16
TIE = 1e-4  # Two logits this close, relative to the largest of their position, are equal but for rounding.
RANDOM_PROMPTS, RANDOM_LENGTH = 8, 48
# What the method "layers" decodes: rows of the prompts' tokens, the last of each one by one.
ROWS, ROW_LENGTH, ROW_STEPS = 8, 32, 8

# Fields that decide what equal tensors compute.
COMPUTED_WITH = (
    *(name for name in SHARED_FIELDS if name != "use_cache" and not name.endswith("_token_id")),
    *DIFFERING_FIELDS,
    "num_attention_heads",
    "num_noise_heads",
    "kv_layout",
    "lambda_type",
    "lambda_init",
    "lambda_init_offset",
    "head_norm",
    "head_norm_eps",
    "qk_rank",
    *GROWTH_FIELDS,
    *ANNEAL_FIELDS,
)

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


@dataclass(frozen=True)
class VerifyReport:
    """How far the logits of a converted model lie from its source's, in float32, and whether it decodes the same text.

    The converted model decodes with a cache, as `generate` of the installed transformers hands it over. So does the
    source, except a GDA model: its cache is not trusted, since both models would share a fault of it.

    Attributes:
        method: "full": both models run; "layers": both run layer by layer, one layer in memory, and each layer is read
            once; "tensors": every tensor is made again from the source and compared bit for bit, nothing is run.
        prompts: "texts", or "random ids" where the source has no tokenizer that can be loaded and fits it.
        tokens: Positions compared.
        relative: max |Δlogit| / max |logit|.
        max_abs, mean_abs: Of Δlogit.
        kl: KL(source ‖ converted), mean over positions, in nats.
        top1_agreement: Share of positions with the same most likely token.
        greedy_match: Share of prompts with the same greedy text. With "full" the text is a continuation of 16 tokens.
            With "layers" the prompts' own tokens are cut into rows, the last 8 of each row go in one by one, and the
            text is the most likely next token after each. None with "tensors".
        greedy_ties: Share of prompts whose texts differ only where the source's logits of the two tokens lie within
            1e-4 of each other, relative to the largest logit there: a tie, which is excused.
        threshold: The largest `relative` that passes; None where only non-finite logits fail.
        different_tensors: With "tensors", the names of those that differ.
        finite: Whether every logit is.
        passed: Whether logits are finite and within the threshold and, for a lossless conversion, every greedy text is
            the same but for ties.
    """

    method: str
    prompts: str
    tokens: int
    relative: float | None
    max_abs: float | None
    mean_abs: float | None
    kl: float | None
    top1_agreement: float | None
    greedy_match: float | None
    greedy_ties: float | None
    threshold: float | None
    different_tensors: list[str]
    finite: bool
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)


class VerificationFailed(CheckFailed):
    """A converted model does not compute what its source computes. `report` says by how much."""

    def __init__(self, report: VerifyReport):
        self.report = report
        if not report.finite:
            reason = "logits are not finite; does the source hold NaN or infinity?"
        elif report.different_tensors:
            reason = f"{len(report.different_tensors)} tensors differ, the first is {report.different_tensors[0]}"
        elif not _within(report.relative, report.threshold):
            reason = f"relative |Δlogit| is {report.relative:.2e}, the threshold is {report.threshold:.0e}"
        else:
            same = 100 * ((report.greedy_match or 0.0) + (report.greedy_ties or 0.0))
            reason = f"greedy text with a cache is the source's for only {same:.0f} % of the prompts"
            if _within(report.relative, LOSSLESS_THRESHOLD):
                reason += (
                    ", though the logits without a cache agree; use another release of transformers than "
                    f"{transformers.__version__}"
                )
        super().__init__(f"verification failed: {reason}")


def verify(
    source: str | Path,
    out: str | Path,
    *,
    method: str = "auto",
    threshold: float | None = None,
    revision: str | None = None,
    console: Console | None = None,
) -> VerifyReport:
    """Compare a converted model with its source.

    Args:
        source: What it was made of: a folder, a Hub id or a `.gguf` file.
        out: The converted model's folder.
        method: "full", "layers" or "tensors" (see `VerifyReport`). "auto" is "full" where both models fit into a
            quarter of the free memory, else "layers"; it is "tensors" for a source that transformers cannot run.
        threshold: Largest relative |Δlogit| that passes. By default 1e-5, or none where conversion.json says that the
            conversion was lossy.
        revision: Of the source, for a Hub id.
        console: Where progress is shown; nowhere if None.

    Raises:
        FileNotFoundError, ValueError: for bad input.
        CheckFailed: if the converted model refuses the cache that transformers hands it.
    """
    with quiet_transformers():
        folder = resolve_folder(out)
        settings = read_settings(folder)
        opened = open_source(source, revision)
        return verify_opened(opened, folder, settings=settings, method=method, threshold=threshold, console=console)


def verify_opened(
    source: Source,
    folder: Path,
    *,
    settings: Settings | None,
    method: str = "auto",
    threshold: float | None = None,
    console: Console | None = None,
) -> VerifyReport:
    """`verify` for a source that is open already; `settings` are those of the conversion, where known."""
    if threshold is not None and not 0 <= threshold < math.inf:
        raise ValueError(f"--threshold {threshold} is not a number from 0 on")
    lossless = threshold is None if settings is None else settings.lossless
    if threshold is None and lossless:
        threshold = LOSSLESS_THRESHOLD
    converted = FolderSource(folder)
    if source.config.vocab_size != converted.config.vocab_size:
        raise ValueError(
            f"{folder} has a vocabulary of {converted.config.vocab_size}, {source.name} of {source.config.vocab_size}"
        )
    if method == "auto":
        method = "tensors" if not source.can_run else "full" if _both_fit(source, converted) else "layers"
    if method == "tensors":
        return _compare_tensors(source, converted, settings)
    if method not in ("full", "layers"):
        raise ValueError(f"--method {method} is not one of auto, full, layers, tensors")
    if not source.can_run:
        raise ValueError(
            f"--method {method} runs the source, and transformers has no class for a {source.config.model_type} model; "
            "use tensors"
        )
    _require_same_windows(source, converted)
    kind, prompts = _prompt_ids(source)
    try:
        with torch.inference_mode():
            if method == "full":
                differences, texts = _compare_whole(source, converted, prompts, console)
            else:
                differences, texts = _compare_by_layers(source, converted, prompts)
    except UnusedCacheError as error:
        raise CheckFailed(f"verification failed: {first_line(error)}") from None
    return differences.report(method, kind, texts, threshold, lossless=lossless)


def _compare_whole(
    source: Source, converted: Source, prompts: list[torch.Tensor], console: Console | None
) -> tuple["_Differences", list["_Text"]]:
    """Run both models on each prompt, and let both continue it."""
    differences, texts = _Differences(), []
    expected, got = source.load(), converted.load()
    for ids in track(prompts, "verifying", console=console, transient=True, disable=not shows_progress(console)):
        differences.add(*(model(ids, use_cache=False).logits for model in (expected, got)))
        wanted = _greedy(expected, ids, use_cache=_cache_is_trusted(source))
        found = _greedy(got, ids, use_cache=True)
        texts.append(_compared_texts(expected, wanted, found))
    return differences, texts


def _compare_by_layers(
    source: Source, converted: Source, prompts: list[torch.Tensor]
) -> tuple["_Differences", list["_Text"]]:
    """Run both models layer by layer on each prompt, and on rows of the prompts' tokens with a cache."""
    differences, (rows, prefill) = _Differences(), _rows(prompts)
    pairs = zip(
        _logits_by_layers(source, prompts, rows, prefill if _cache_is_trusted(source) else None),
        _logits_by_layers(converted, prompts, rows, prefill),
        strict=True,
    )
    for pair in itertools.islice(pairs, len(prompts)):
        differences.add(*pair)
    expected, got = next(pairs)  # of the rows
    wanted, found = (logits[:, prefill - 1 :].argmax(-1) for logits in (expected, got))
    parted = wanted != found
    excused = ~parted | _is_tie(expected[:, prefill - 1 :], found)
    return differences, [_Text(not row.any(), bool(tied.all())) for row, tied in zip(parted, excused, strict=True)]


class _Text(NamedTuple):
    """Whether a greedy text is the source's, and whether it is but for ties."""

    same: bool
    excused: bool


class _Differences:
    """Sums over positions of what the report averages."""

    def __init__(self) -> None:
        self.tokens = self.agreeing = 0
        self.max_abs = self.max_logit = self.sum_abs = self.sum_kl = 0.0
        self.finite = True

    def add(self, expected: torch.Tensor, got: torch.Tensor) -> None:  # (1, T, vocabulary)
        difference = (got - expected).abs()
        self.finite &= bool(torch.isfinite(expected).all() and torch.isfinite(got).all())
        self.tokens += expected.shape[1]
        self.max_abs = max(self.max_abs, difference.max().item())
        self.max_logit = max(self.max_logit, expected.abs().max().item())
        self.sum_abs += difference.mean(dim=-1).sum().item()
        self.agreeing += int((expected.argmax(-1) == got.argmax(-1)).sum())
        log_p, log_q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
        self.sum_kl += (log_p.exp() * (log_p - log_q)).sum().item()

    def report(
        self, method: str, prompts: str, texts: list[_Text], threshold: float | None, *, lossless: bool
    ) -> VerifyReport:
        same, excused = (sum(marks) for marks in zip(*texts, strict=True))
        decodes = excused == len(texts) or not lossless
        relative = self.max_abs / max(self.max_logit, torch.finfo(torch.float32).tiny)
        return VerifyReport(
            method=method,
            prompts=prompts,
            tokens=self.tokens,
            relative=relative,
            max_abs=self.max_abs,
            mean_abs=self.sum_abs / self.tokens,
            kl=max(0.0, self.sum_kl / self.tokens),
            top1_agreement=self.agreeing / self.tokens,
            greedy_match=same / len(texts),
            greedy_ties=(excused - same) / len(texts),
            threshold=threshold,
            different_tensors=[],
            finite=self.finite,
            passed=self.finite and _within(relative, threshold) and decodes,
        )


def _prompt_ids(source: Source) -> tuple[str, list[torch.Tensor]]:
    """The fixed prompts as ids (1, T); seeded random ids where the source has no tokenizer that fits it."""
    if (tokenizer := source.tokenizer()) is not None:
        prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
        if all(ids and max(ids) < source.config.vocab_size for ids in prompts):
            return "texts", [torch.tensor([ids]) for ids in prompts]
    generator = torch.Generator().manual_seed(0)
    shape = (RANDOM_PROMPTS, RANDOM_LENGTH)
    return "random ids", list(torch.randint(source.config.vocab_size, shape, generator=generator).split(1))


def _both_fit(source: Source, converted: Source) -> bool:
    needed = 4 * sum(spec.numel for each in (source, converted) for spec in each.specs.values())
    return needed < memory_to_use()


def _within(relative: float | None, threshold: float | None) -> bool:
    return relative is None or threshold is None or relative <= threshold


def _cache_is_trusted(source: Source) -> bool:
    return source.config.model_type != "gda"


def _greedy(model: PreTrainedModel, ids: torch.Tensor, *, use_cache: bool) -> torch.Tensor:
    """Prompt (1, T) → prompt and greedy continuation (1, T + 16)."""
    model.generation_config = GenerationConfig()  # no stopping, no penalty, whatever the checkpoint prefers
    mask = torch.ones_like(ids)
    settings = {"do_sample": False, "max_new_tokens": GREEDY_TOKENS, "use_cache": use_cache}
    return model.generate(ids, attention_mask=mask, **settings)  # type: ignore[operator]


def _compared_texts(source: PreTrainedModel, wanted: torch.Tensor, found: torch.Tensor) -> _Text:
    """Compare texts (1, T). What follows the token at which they part is not compared."""
    parted = (wanted != found)[0].nonzero()
    if not len(parted):
        return _Text(same=True, excused=True)
    place = int(parted[0])
    logits = source(wanted[:, :place], use_cache=False).logits[0, -1]
    return _Text(same=False, excused=bool(_is_tie(logits, found[0, place])))


def _is_tie(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Whether the logit of each of the `tokens` (…) is the largest of `logits` (…, vocabulary) but for rounding."""
    behind = logits.amax(-1) - logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return behind <= TIE * logits.abs().amax(-1)


def _rows(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The prompts' tokens as rows of one length, which need no padding, and how many of each row go in at once."""
    ids = torch.cat(prompts, dim=1)[0]
    number = max(1, min(ROWS, len(ids) // (2 * ROW_STEPS)))
    length = min(ROW_LENGTH, len(ids) // number)
    return ids[: number * length].view(number, length), max(1, length - ROW_STEPS)


def _logits_by_layers(
    source: Source, prompts: list[torch.Tensor], rows: torch.Tensor, prefill: int | None
) -> Iterator[torch.Tensor]:
    """Logits (1, T, vocabulary) of each prompt and (rows, T, vocabulary) of `rows`, with one layer in memory at a time.

    Args:
        source: The model.
        prompts: Ids (1, T), run without a cache.
        rows: Ids (rows, T), decoded with a cache after the first `prefill` of each, or run without if that is None.
        prefill: See `rows`.
    """
    model = LayerwiseModel(source.config, source.read)
    # Together, since some sources dequantize the embeddings whenever they are read.
    embedded = model.embed(torch.cat((*prompts, rows.view(1, -1)), dim=1))
    *hidden, decoded = embedded.split([*(ids.shape[1] for ids in prompts), rows.numel()], dim=1)
    decoded = decoded.view(*rows.shape, -1)
    for index in range(model.num_layers):
        tensors = model.tensors(index)
        hidden = [model.run(index, tensors, states) for states in hidden]
        if prefill is None:
            decoded = model.run(index, tensors, decoded)
        else:
            decoded = model.decode(index, tensors, decoded, prefill)
    yield from map(model.head(), (*hidden, decoded))


def _require_same_windows(source: Source, converted: Source) -> None:
    """The prompts are shorter than most windows, so that running them would not tell one window from another."""
    expected, got = layer_windows(source.config), layer_windows(converted.config)
    if len(expected) != len(got):  # no layer of the one is said to be a layer of the other
        return
    for layer, (wanted, found) in enumerate(zip(expected, got, strict=True)):
        if wanted != found:
            raise ValueError(
                f"{converted.name}: layer {layer} has sliding_window={found}, but {source.name} has {wanted} there; "
                "see sliding_window and layer_types in config.json"
            )


def _compare_tensors(source: Source, converted: FolderSource, settings: Settings | None) -> VerifyReport:
    if settings is None:
        raise ValueError(f"--method tensors needs {PROVENANCE_FILE} in {converted.folder}: it says how they were made")
    if settings.qk_rank is not None or settings.mode in ("fold", "split"):
        raise ValueError(
            "--method tensors compares bits, and those of products, factorizations and fits depend on the machine; "
            "use full or layers"
        )
    config, recipes = _planned(source, settings)
    for name in COMPUTED_WITH:
        if getattr(converted.config, name) != getattr(config, name):
            raise ValueError(
                f"{converted.folder}/config.json has {name}={getattr(converted.config, name)!r}, "
                f"but {source.name} asks for {getattr(config, name)!r}"
            )
    different = different_tensors(converted.folder, recipes, source)
    return VerifyReport(
        method="tensors",
        prompts="none",
        tokens=0,
        relative=None,
        max_abs=None,
        mean_abs=None,
        kl=None,
        top1_agreement=None,
        greedy_match=None,
        greedy_ties=None,
        threshold=None,
        different_tensors=different,
        finite=True,
        passed=not different,
    )


def _planned(source: Source, settings: Settings) -> tuple[GDAConfig, dict[str, Recipe]]:
    """What a conversion of these settings makes of the source."""
    if settings.growth is not None:
        draft = planned_growth(source, settings)
        return draft.config, draft.recipes
    mode = mode_of(source.config, settings.mode)
    config = planned_config(
        source,
        mode=mode,
        noise_heads=settings.num_noise_heads,
        lambda_type=settings.lambda_type,
        dtype=settings.dtype,
    )
    return config, planned_recipes(source, config, mode=mode, seed=settings.seed, dtype=settings.dtype)
