"""What a split did, and what it cost on each text."""

from dataclasses import asdict, dataclass
from typing import Any

from gda.common.numbers import finite
from gda.conversion.split.calibration import HELD_OUT_TOKENS

WORSE = 1.15  # times the source's perplexity: reported as a warning


@dataclass(frozen=True)
class SplitLayer:
    """The split of one layer."""

    signal_heads: list[int]  # indices of the source's heads, in the order of the result
    noise_heads: list[int]
    lambda_: float  # λ of the result; a token-dependent λ is averaged over the held-out text
    error_before: float  # weighted |y − y'|² / |y|² of the attention's output, with the source's output projection
    error_after: float  # the same with the output projection that fits best
    subtracted: float  # |W (λ o_noise)|² / |W (o − λ o_noise)|² of the result: energy of the subtracted part


@dataclass(frozen=True)
class TextLoss:
    """Perplexities on the held-out part of one text.

    Attributes:
        text: Its name.
        fitted: Whether the split was fitted to other parts of it.
        tokens: Number of held-out tokens.
        perplexity_source, perplexity: Perplexity of the source and of the result.
        ratio: The second divided by the first.
        interval: 95 % confidence interval of the ratio; None for a single sequence.
    """

    text: str
    fitted: bool
    tokens: int
    perplexity_source: float
    perplexity: float
    ratio: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class SplitReport:
    """How heads were split, and what it cost.

    Attributes:
        calibration: Names of the calibration texts.
        tokens: Number of tokens fitted to.
        effort: "fast" or "default".
        steps: Number of training steps.
        inside: Names of the texts on which the following perplexities are measured: the calibration files, or without
            files, the sampled text.
        held_out_tokens: Number of tokens of these texts that are held out for measuring.
        perplexity_source: Perplexity of the source.
        perplexity_closed_form: Perplexity after the closed form.
        perplexity: Perplexity of the result.
        ratio_interval: 95 % confidence interval of `perplexity` / `perplexity_source`; None for a single sequence.
        texts: Perplexities by text, also on texts that the split was not fitted to.
        layers: The split of each layer.
    """

    calibration: str
    tokens: int
    effort: str
    steps: int
    inside: str
    held_out_tokens: int
    perplexity_source: float
    perplexity_closed_form: float
    perplexity: float
    ratio_interval: tuple[float, float] | None
    texts: list[TextLoss]
    layers: list[SplitLayer]

    @property
    def warnings(self) -> list[str]:
        """What a user of the result must know."""
        worse = [each.text for each in self.texts if not each.ratio < WORSE]
        short = [each.text for each in self.texts if each.tokens < HELD_OUT_TOKENS]
        found = [f"perplexity is {WORSE} times the source's or more on {' and on '.join(worse)}"] if worse else []
        if short:
            names = " and of ".join(short)
            found.append(f"fewer than {HELD_OUT_TOKENS:,} tokens are held out of {names}: ratios are rough")
        return found

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        report: dict[str, Any] = finite(asdict(self) | {"warnings": self.warnings})
        return report
