"""What `convert` was asked for, checked against the source."""

from transformers import PreTrainedConfig

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.families.registry import CONVERTIBLE_TYPES
from gda.conversion.modes.expand import listed, possible_noise_heads
from gda.conversion.modes.split import kv_heads_of, split_options
from gda.conversion.sources.source import Source


def require_type(source: Source, qk_rank: int | None) -> None:
    """Raise ValueError if `convert` makes nothing of a source of that type, or not with that `qk_rank`."""
    if isinstance(source.config, GDAConfig):
        if qk_rank is None:
            raise ValueError(f"{source.name} is a 'gda' model already")
        if source.config.qk_rank is not None:
            raise ValueError(
                f"{source.name} has qk_rank={source.config.qk_rank} already; `gda fold` makes it dense first"
            )
    elif source.config.model_type not in CONVERTIBLE_TYPES:
        raise ValueError(f"{source.name} is a {source.config.model_type!r} model, which cannot be converted")
    if qk_rank is not None and not source.can_run:
        raise ValueError(
            f"--qk-rank: a {source.config.model_type} model cannot be run to compare it with the result; "
            "convert it first, and then its GDA folder with --qk-rank"
        )


def refuse_choices(source: Source, **choices: object) -> None:
    """Raise ValueError naming the first choice that is made, though the source leaves none."""
    for name, value in choices.items():
        if value is not None:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} is for a Llama, Mistral or Qwen: {source.name}, a {source.config.model_type} model, "
                "has its noise heads and λ"
            )


def refuse_calibration(**choices: object) -> None:
    """Raise ValueError naming the first choice that is made, though only a split has it."""
    for name, value in choices.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for --mode split; the other modes lose nothing to fit")


def noise_heads_of(
    config: PreTrainedConfig,
    noise_heads: int | None,
    ratio: str | int | None,
    *,
    mode: str = "expand",
    merge_kv: int | None = None,
) -> int | None:
    """The noise heads to add, or to split off, said by their number or by a ratio; None where neither says it.

    Raises:
        ValueError: for a ratio that is none, or both.
    """
    if ratio is None:
        return noise_heads
    if noise_heads is not None:
        raise ValueError("--ratio and --noise-heads say the same in two ways; pass one of them")
    signal, _, noise = str(ratio).partition(":")
    if not signal.isdecimal() or noise not in ("", "1") or int(signal) < 1:
        raise ValueError(f"--ratio {ratio} is not a ratio such as 4 or 4:1")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if mode == "split":
        if heads % (int(signal) + 1):
            possible = split_options(heads, kv_heads_of(config, merge_kv))
            raise ValueError(f"--ratio {ratio} does not divide the {heads} query heads of the source; {possible}")
        return heads // (int(signal) + 1)
    if heads % int(signal):
        raise ValueError(
            f"--ratio {ratio} does not divide the {heads} query heads of the source; "
            f"possible for --noise-heads: {listed(possible_noise_heads(heads, kv_heads), heads)}"
        )
    return heads // int(signal)
