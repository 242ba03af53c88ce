"""Does the converted model compute what its source computes?"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import GenerationConfig, PreTrainedModel

from gda._errors import CheckFailed
from gda._screen import quiet_transformers, shows_progress
from gda.configuration.configuration_gda import ANNEAL_FIELDS, GROWTH_FIELDS, GDAConfig

from .growth import planned_growth
from .layerwise import LayerwiseModel, memory_to_use
from .llamalike import DIFFERING_FIELDS, SHARED_FIELDS, layer_windows
from .plan import mode_of, planned_config, planned_recipes
from .provenance import Settings, read_settings
from .recipes import Recipe
from .sources import PROVENANCE_FILE, FolderSource, Source, open_source, resolve_folder
from .stream import different_tensors

LOSSLESS_THRESHOLD = 1e-5
GREEDY_TOKENS = 16
RANDOM_PROMPTS, RANDOM_LENGTH = 8, 48

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
    """How far the logits of a converted model lie from its source's, in float32.

    Attributes:
        method: "full": both models run; "layers": both run layer by layer, one layer in memory; "tensors": every
            tensor is made again from the source and compared bit for bit, nothing is run.
        prompts: "texts", or "random ids" where the source has no tokenizer that can be loaded and fits it.
        tokens: Positions compared.
        relative: max |Δlogit| / max |logit|.
        max_abs, mean_abs: Of Δlogit.
        kl: KL(source ‖ converted), mean over positions, in nats.
        top1_agreement: Share of positions with the same most likely token.
        greedy_match: Share of prompts whose greedy continuation with cache is the same; None unless "full".
        threshold: The largest `relative` that passes; None where only non-finite logits fail.
        different_tensors: With "tensors", the names of those that differ.
        finite: Whether every logit is.
        passed: Whether it does.
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
        else:
            reason = f"relative |Δlogit| is {report.relative:.2e}, the threshold is {report.threshold:.0e}"
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
    if threshold is None and (settings is None or settings.lossless):
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
    differences = _Differences()
    greedy_match = None
    with torch.inference_mode():
        if method == "full":
            models = [each.load() for each in (source, converted)]
            for ids in track(
                prompts, "verifying", console=console, transient=True, disable=not shows_progress(console)
            ):
                differences.add(*(model(ids, use_cache=False).logits for model in models))
            matches = [_greedy(models[0], ids) == _greedy(models[1], ids) for ids in prompts]
            greedy_match = sum(matches) / len(matches)
        else:
            for pair in zip(_logits_by_layers(source, prompts), _logits_by_layers(converted, prompts), strict=True):
                differences.add(*pair)
    return differences.report(method, kind, greedy_match, threshold)


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

    def report(self, method: str, prompts: str, greedy_match: float | None, threshold: float | None) -> VerifyReport:
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
            greedy_match=greedy_match,
            threshold=threshold,
            different_tensors=[],
            finite=self.finite,
            passed=self.finite and (threshold is None or relative <= threshold),
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


def _greedy(model: PreTrainedModel, ids: torch.Tensor) -> list[int]:
    model.generation_config = GenerationConfig()  # no stopping, no penalty, whatever the checkpoint prefers
    mask = torch.ones_like(ids)
    settings = {"do_sample": False, "max_new_tokens": GREEDY_TOKENS, "use_cache": True}
    return model.generate(ids, attention_mask=mask, **settings)[0].tolist()  # type: ignore[operator]


def _logits_by_layers(source: Source, prompts: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Logits (1, T, vocabulary) of each prompt, with one layer of the model in memory at a time."""
    model = LayerwiseModel(source.config, source.read)
    # Together, since some sources dequantize the embeddings whenever they are read.
    hidden = list(model.embed(torch.cat(prompts, dim=1)).split([ids.shape[1] for ids in prompts], dim=1))
    for index in range(model.num_layers):
        tensors = model.tensors(index)
        hidden = [model.run(index, tensors, states) for states in hidden]
    yield from map(model.head(), hidden)


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
