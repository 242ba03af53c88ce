"""Check that a converted model computes what its source computes."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from gda.common.errors import CheckFailed, first_line
from gda.common.options import takes
from gda.common.screen import quiet_transformers
from gda.configuration.configuration_gda import OWN_FIELDS
from gda.conversion.families.llamalike import DIFFERING_FIELDS, SHARED_FIELDS, layer_windows
from gda.conversion.logits import compare_by_layers, compare_whole, prompts_for
from gda.conversion.modes.registry import plan_again
from gda.conversion.options import VerifyOptions
from gda.conversion.sources.folder import FolderSource
from gda.conversion.sources.open import open_source, resolve_folder
from gda.conversion.sources.source import PROVENANCE_FILE, Source
from gda.conversion.sources.tokenizers import NoTokenizerError
from gda.conversion.tensors.layerwise import memory_to_use
from gda.conversion.writing.provenance import Settings, read_settings
from gda.conversion.writing.stream import different_tensors
from gda.conversion.writing.tokenizer_files import folder_difference
from gda.modeling_gda.attention_gda import UnusedCacheError

LOSSLESS_THRESHOLD = 1e-5

# Fields of the config that affect what a model with the same tensors computes.
COMPUTED_WITH = (
    *(name for name in SHARED_FIELDS if name != "use_cache" and not name.endswith("_token_id")),
    "num_attention_heads",
    *dict.fromkeys((*DIFFERING_FIELDS, *OWN_FIELDS)),
)


@dataclass(frozen=True)
class VerifyReport:
    """How far a converted model's logits are from its source's, in float32, and whether both generate the same text.

    Both decode with a cache, as `generate` of the installed transformers passes it. Only the source of two GDA models
    doesn't: a bug in its cache would be the converted model's too.

    Attributes:
        method: "full": both models run on all prompts; "layers": both run on two rows of 16 tokens with one layer in
            memory, and each layer is read once; "tensors": every tensor is converted again and compared bit for bit,
            and no model runs.
        prompts: What the models read: "texts" or "random ids"; "none" with "tensors".
        random_because: Why ids are random; None if they are not.
        tokenizers_compared: Whether the tokenizers were compared: not if the source's cannot be read. A conversion
            compares them before it writes the model, not here.
        different_tokenizer: What the tokenizers do differently; None if nothing.
        tokens: Number of positions whose logits are compared, for all of the following numbers up to
            `top1_agreement`. With "full", all positions of the prompts, typically 100 to 400; with "layers", the first
            12 of each row, 24 in all, so that KL and agreement of a lossy conversion are rough.
        relative: max |Δlogit| / max |logit|.
        max_abs, mean_abs: Largest and mean |Δlogit|.
        kl: KL(source ‖ converted), mean over positions, in nats.
        top1_agreement: Share of positions with the same most likely token.
        greedy_match: Share of prompts with the same greedy text. With "full" the text is a continuation of 16 tokens.
            With "layers", where it is the share of rows, the last 4 tokens of each row are fed one by one, and the
            text is the most likely next token after each. None with "tensors".
        greedy_ties: Share of prompts whose texts differ only at ties, where the source's logits of the two tokens are
            within 1e-4 of each other, relative to the largest logit at that position. Ties pass.
        threshold: Largest `relative` that passes; None if only non-finite logits fail.
        different_tensors: With "tensors", the names of tensors that differ.
        finite: Whether every logit is finite.
        passed: Whether logits are finite and within the threshold and, for a lossless conversion, every greedy text is
            the same or differs only at ties; with "tensors", whether none differs. Differing tokenizers never pass.
    """

    method: str
    prompts: str = "none"
    random_because: str | None = None
    tokenizers_compared: bool = False
    different_tokenizer: str | None = None
    tokens: int = 0
    relative: float | None = None
    max_abs: float | None = None
    mean_abs: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    greedy_match: float | None = None
    greedy_ties: float | None = None
    threshold: float | None = None
    different_tensors: list[str] = field(default_factory=list)
    finite: bool = True
    passed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)


class VerificationFailed(CheckFailed):
    """A converted model does not compute what its source computes. `report` has the numbers."""

    def __init__(self, report: VerifyReport):
        self.report = report
        if not report.finite:
            reason = "logits are not finite; does the source hold NaN or infinity?"
        elif report.different_tensors:
            reason = f"{len(report.different_tensors)} tensors differ, the first is {report.different_tensors[0]}"
        elif report.different_tokenizer is not None:
            reason = f"the tokenizers differ: {report.different_tokenizer}; convert again to get the source's files"
        elif not _within(report.relative, report.threshold):
            reason = f"relative |Δlogit| is {report.relative:.2e}, above the threshold of {report.threshold:.0e}"
        else:
            same = 100 * ((report.greedy_match or 0.0) + (report.greedy_ties or 0.0))
            reason = f"greedy text with a cache equals the source's for only {same:.0f} % of the prompts"
            if _within(report.relative, LOSSLESS_THRESHOLD):
                reason += (
                    ", though the logits without a cache agree; use a release of transformers other than "
                    f"{transformers.__version__}"
                )
        super().__init__(f"verification failed: {reason}")


@takes(VerifyOptions)
def verify(options: VerifyOptions, *, console: Console | None = None) -> VerifyReport:
    """Compare a converted model with its source.

    Raises:
        FileNotFoundError, ValueError: for bad input.
        CheckFailed: if the converted model doesn't accept the cache that transformers passes it.
    """
    with quiet_transformers():
        folder = resolve_folder(options.out)
        settings = read_settings(folder)
        source = open_source(options.source, options.revision)
        report = verify_opened(
            source, folder, settings=settings, method=options.method, threshold=options.threshold, console=console
        )
        return _with_tokenizers(report, source, folder)


def _with_tokenizers(report: VerifyReport, source: Source, folder: Path) -> VerifyReport:
    """The report with a comparison of the tokenizers, if the source's can be read."""
    try:
        tokenizer = source.tokenizer()
    except NoTokenizerError:
        return report
    different = folder_difference(tokenizer, folder)
    passed = report.passed and different is None
    return replace(report, tokenizers_compared=True, different_tokenizer=different, passed=passed)


def verify_opened(
    source: Source,
    folder: Path,
    *,
    settings: Settings | None,
    method: str = "auto",
    threshold: float | None = None,
    console: Console | None = None,
) -> VerifyReport:
    """`verify` for an opened source; `settings` are those in conversion.json, None if there are none."""
    lossless = threshold is None if settings is None else settings.lossless
    converted = FolderSource(folder)
    if source.config.vocab_size != converted.config.vocab_size:
        raise ValueError(
            f"{folder} has a vocabulary of {converted.config.vocab_size}, {source.name} of {source.config.vocab_size}"
        )
    if method == "auto" and not source.can_run:
        method = "tensors"
    if method == "tensors":
        if threshold is not None:
            raise ValueError(f"--threshold {threshold:g} has no effect: tensors are compared bit for bit; omit it")
        return _compare_tensors(source, converted, settings, console)
    if not source.can_run:
        raise ValueError(
            f"--method {method} runs the source, but transformers has no class for a {source.config.model_type} model; "
            "use tensors"
        )
    if not converted.can_run:
        raise ValueError(
            f"{folder} is a {converted.config.model_type} model, which transformers cannot run; convert it back with "
            "`gda convert`, and verify that"
        )
    return verify_by_logits(source, converted, lossless=lossless, method=method, threshold=threshold, console=console)


def verify_by_logits(
    source: Source,
    converted: Source,
    *,
    lossless: bool,
    method: str = "auto",
    threshold: float | None = None,
    console: Console | None = None,
) -> VerifyReport:
    """Compare the logits and the greedy texts of two opened models; `lossless` sets the default threshold."""
    if threshold is None and lossless:
        threshold = LOSSLESS_THRESHOLD
    if method == "auto":
        needed = 4 * sum(spec.numel for each in (source, converted) for spec in each.specs.values())
        method = "full" if needed < memory_to_use() else "layers"
    _require_same_windows(source, converted)
    prompts, random_because = prompts_for(source)
    compare = compare_whole if method == "full" else compare_by_layers
    try:
        parts, texts = compare(source, converted, prompts, console)
    except UnusedCacheError as error:
        raise CheckFailed(f"verification failed: {first_line(error)}") from None
    tokens = sum(part.tokens for part in parts)
    max_abs = max(0.0, *(part.max_abs for part in parts))  # begins with a number, since comparing with NaN is false
    relative = max_abs / max(torch.finfo(torch.float32).tiny, *(part.max_logit for part in parts))
    finite = all(part.finite for part in parts)
    decodes = not lossless or all(text.same_but_ties for text in texts)
    return VerifyReport(
        method=method,
        prompts="texts" if random_because is None else "random ids",
        random_because=random_because,
        tokens=tokens,
        relative=relative,
        max_abs=max_abs,
        mean_abs=sum(part.sum_abs for part in parts) / tokens,
        kl=max(0.0, sum(part.sum_kl for part in parts) / tokens),
        top1_agreement=sum(part.same_top_token for part in parts) / tokens,
        greedy_match=sum(text.same for text in texts) / len(texts),
        greedy_ties=sum(text.same_but_ties and not text.same for text in texts) / len(texts),
        threshold=threshold,
        finite=finite,
        passed=finite and _within(relative, threshold) and decodes,
    )


def _within(relative: float | None, threshold: float | None) -> bool:
    return relative is None or threshold is None or relative <= threshold


def _require_same_windows(source: Source, converted: Source) -> None:
    """Compare the sliding windows of all layers: the prompts are too short for most windows to matter."""
    expected, got = layer_windows(source.config), layer_windows(converted.config)
    if len(expected) != len(got):  # a grown model: its layers don't correspond to the source's one by one
        return
    for layer, (wanted, found) in enumerate(zip(expected, got, strict=True)):
        if wanted != found:
            raise ValueError(
                f"{converted.name}: layer {layer} has sliding_window={found}, but {source.name} has {wanted} there; "
                "see sliding_window and layer_types in config.json"
            )


def _compare_tensors(
    source: Source, converted: FolderSource, settings: Settings | None, console: Console | None
) -> VerifyReport:
    if settings is None:
        raise ValueError(
            f"--method tensors needs {PROVENANCE_FILE} in {converted.folder}: it records how each tensor was made"
        )
    planned = plan_again(source, settings)
    for name in COMPUTED_WITH:
        if getattr(converted.config, name) != getattr(planned.config, name):
            raise ValueError(
                f"{converted.folder}/config.json has {name}={getattr(converted.config, name)!r}, "
                f"but {source.name} asks for {getattr(planned.config, name)!r}"
            )
    different = different_tensors(converted.folder, planned.recipes, source, console)
    return VerifyReport(method="tensors", different_tensors=different, passed=not different)
