"""The one place where the config of a model folder is read."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from gda.common.errors import errors_as
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.families import motif
from gda.conversion.families.llamalike import refuse_unread
from gda.conversion.families.registry import CONVERTIBLE_TYPES, OTHER_RELATIVES
from gda.conversion.sources.config_file import read_config_file


def read_config(folder: Path) -> PreTrainedConfig:
    """Read `folder`/config.json of any model type that can be converted, or of a GDA model.

    transformers' own config class reads it; code in the folder is never run. The file is checked first, so that no
    value in it can hang or crash a config class.

    Raises:
        FileNotFoundError: if there is no config.json.
        ValueError: naming the file and the field, if it is not a valid config of a known model type.
    """
    path = folder / "config.json"
    raw = read_config_file(folder)
    if not isinstance(raw.get("model_type"), str):
        raise ValueError(f"{path} names no model_type")
    model_type = raw["model_type"].lower()  # some releases of Motif write "Motif"
    require_known_type(model_type, path)
    if raw.get("quantization_config") is not None:
        raise ValueError(f"{path} has a quantization_config; dequantize the model and save it first")
    if not raw.get("is_causal", True):
        raise ValueError(f"{path} has is_causal=false, but a GDA model is causal")
    if model_type == motif.MODEL_TYPE:
        return motif.read_motif_config(raw, path)
    with errors_as(f"{path} is not a valid configuration"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    require_known_type(config.model_type, path)  # transformers turns a Mistral with layer_types into a Ministral
    refuse_unread(config, path)
    return config


def read_gda_config(folder: Path) -> GDAConfig:
    """Read `folder`/config.json of a GDA language model.

    Raises:
        FileNotFoundError, ValueError: as `read_config`, and for a model of another type or another head.
    """
    path, config = folder / "config.json", read_config(folder)
    if not isinstance(config, GDAConfig):
        raise ValueError(
            f"{path} has model_type {config.model_type!r}, so this is not a GDA model; convert it with `gda convert`"
        )
    if (architectures := config.architectures or ["GDAForCausalLM"]) != ["GDAForCausalLM"]:
        raise ValueError(f"{path}: architectures must be ['GDAForCausalLM'], a language model; got {architectures}")
    return config


def require_known_type(model_type: str, where: Path) -> None:
    """Raise ValueError, naming `where`, unless `model_type` is one that can be converted or "gda"."""
    if model_type in OTHER_RELATIVES:
        reason = OTHER_RELATIVES[model_type]
        raise ValueError(f"{where}: {model_type} cannot be converted: {reason} (docs/family.md)")
    if model_type not in (*CONVERTIBLE_TYPES, "gda"):
        raise ValueError(
            f"{where}: a model of type {model_type!r} cannot be converted; these can: {', '.join(CONVERTIBLE_TYPES)}"
        )
