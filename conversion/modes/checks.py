"""What several modes check and report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gda.common.options import Options, flag
from gda.conversion.families.llamalike import LLAMALIKES, unread_fields
from gda.conversion.options import PAPER_ONLY
from gda.conversion.sources.source import PROVENANCE_FILE, Source
from gda.conversion.tensors.recipes import Recipe, is_lossless
from gda.conversion.writing.provenance import read_settings

# Fields of the GDA model that the plain model lacks, or has with other values.
EXPORTED_FIELDS = (
    "num_attention_heads",
    "num_noise_heads",
    "num_key_value_heads",
    "kv_layout",
    "attention_bias",
    "attention_out_bias",
)


class BrokenTieError(ValueError):
    """An exported model was trained since, so that it is an ordinary Llama now."""


@dataclass(frozen=True)
class Export:
    """What conversion.json says of an export with noise heads."""

    fields: dict[str, Any]  # `EXPORTED_FIELDS` of the GDA model
    lambdas: list[float]  # λ of each layer


def exported(source: Source) -> Export | None:
    """The export, if the source, or the base of an adapter, is a plain model that `gda export` wrote with noise heads.

    Raises:
        ValueError: if conversion.json says it is, but does not describe it.
    """
    folder: Path | None = getattr(getattr(source, "base", source), "folder", None)  # of an adapter, its base's
    settings = None if folder is None else read_settings(folder)
    if settings is None or not settings.export or source.config.model_type not in LLAMALIKES:
        return None
    try:
        if settings.export["heads"] != "all":
            return None
        fields = {name: settings.export["fields"][name] for name in EXPORTED_FIELDS}
        lambdas = [float(value) for value in settings.export["lambdas"]]
        # The plain model has all heads of the GDA model: larger numbers are not its own, and could fill the memory.
        if max(fields[name] for name in fields if name.startswith("num_")) > source.config.num_attention_heads:
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"{folder}/{PROVENANCE_FILE} does not describe an export; remove it") from None
    return Export(fields, lambdas)


def refuse_new_heads(options: Options, reason: str) -> None:
    """Raise ValueError naming the first option of new noise heads that is given."""
    for name in ("noise_heads", "ratio", "lambda_type", *PAPER_ONLY):
        if getattr(options, name, None) is not None:
            raise ValueError(f"{flag(name)} {reason}")


def losses(source: Source, recipes: dict[str, Recipe], dtype: str) -> list[str]:
    """Notes on what a cast, or GDA itself, loses of a source."""
    config, notes = source.config, losses_of_cast(source, recipes, dtype)
    if config.attention_dropout:
        notes.append(f"attention_dropout={config.attention_dropout} is ignored: differential attention has no dropout")
    if config.model_type != "gda" and (unread := unread_fields(config)):
        notes.append(f"fields of config.json that are not converted: {', '.join(unread)}")
    return notes


def losses_of_cast(source: Source, recipes: dict[str, Recipe], dtype: str) -> list[str]:
    """A note if a cast loses something of a source."""
    return [] if is_lossless(recipes, source.specs) else [f"weights are cast to {dtype}, which is not lossless"]
