"""What of a source is not in a result, in words."""

from transformers import PreTrainedConfig

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.families.llamalike import LLAMALIKES, source_fields, unread_fields
from gda.conversion.families.registry import DIFFERENTIAL_FAMILIES
from gda.conversion.modes.low_rank import full_rank
from gda.conversion.writing.provenance import Settings


def notes_on(config: PreTrainedConfig, settings: Settings, keeps_bits: bool) -> list[str]:
    """What of the source is not in the result."""
    notes = []
    if settings.mode == "split":
        notes += _split_notes(config, settings)
    if not keeps_bits:
        notes.append(f"weights are cast to {settings.dtype}, which is not lossless")
    if config.attention_dropout:
        notes.append(f"attention_dropout={config.attention_dropout} is left out: differential attention defines none")
    if config.model_type in LLAMALIKES and (unread := unread_fields(config)):
        notes.append(f"transformers' {type(config).__name__} knows no {', '.join(unread)}; left out")
    if config.model_type in DIFFERENTIAL_FAMILIES:
        notes += DIFFERENTIAL_FAMILIES[config.model_type].notes(config)
    return notes


def _split_notes(config: PreTrainedConfig, settings: Settings) -> list[str]:
    merge_kv = (settings.split or {}).get("merge_kv")
    if merge_kv is None:
        return ["heads are divided, which is not lossless"]
    notes = [
        f"the {config.num_key_value_heads} KV heads of a layer are merged to {merge_kv}, and heads are divided, "
        "which is not lossless"
    ]
    if source_fields(config)["qk_norm"]:
        notes.append("keys are normed after their projection: merged ones are averages, up to the sign of a frequency")
    return notes


def rank_notes(config: GDAConfig, settings: Settings) -> list[str]:
    """What `qk_rank` leaves of the projections."""
    if config.qk_rank is None:
        return []
    what = "queries and keys" if "k" in config.factored_projections else "queries"
    if config.qk_rank < full_rank(config):
        return [
            f"qk_rank {config.qk_rank} is below the full rank of {full_rank(config)}: {what} are approximated, "
            "which is not lossless"
        ]
    if settings.lossless or settings.dtype != "keep":
        return []
    return [f"base and updates of {what} are rounded to a narrow dtype, which is not lossless; --dtype float32 is"]
