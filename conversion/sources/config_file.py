"""The one place where the config.json of a model folder is read, and checked before a config class reads it.

A malformed or hostile file could otherwise make transformers crash, hang or fill the memory: by a value of another
type, a huge number or deep nesting. `GDAConfig` checks the rules of GDA.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from gda.common.errors import errors_as
from gda.common.files import read_json
from gda.common.places import ADAPTER_CONFIG
from gda.configuration.configuration_gda import MAX_LAYERS, ROPE_ARGUMENTS, GDAConfig
from gda.conversion.families import motif
from gda.conversion.families.llamalike import refuse_unread
from gda.conversion.families.registry import CONVERTIBLE_TYPES, OTHER_RELATIVES
from gda.conversion.sources.adapter import is_adapter

MAX_SIZE = 2**30
MAX_NESTING = 20  # levels of lists and dictionaries; deeper ones can raise RecursionError

# Far beyond every model. Config classes create lists of these lengths, and models create buffers.
BOUNDS = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), (1, MAX_SIZE)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), (1, 16_384)),
    "num_hidden_layers": (1, MAX_LAYERS),
    "head_dim": (1, 65_536),
    "sliding_window": (0, MAX_SIZE),
    "num_labels": (1, 100_000),  # transformers copies the map of labels each time that it prints a config
}

# Fields that describe parts that a GDA model doesn't have.
FOREIGN_PARTS = ("per_layer_config", "text_config", "decoder", "generator", "text_encoder", "mlp_layer_types")
# Attributes of the class, not fields, that a config.json may nevertheless set.
ALLOWED_ATTRIBUTES = (
    "_attn_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "torch_dtype",
    *ROPE_ARGUMENTS,
)


def _names_a_dtype(value: Any) -> bool:
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    return value is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)


def _maps_labels(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(key.removeprefix("-").isdecimal() for key in value))


# Rules for values that transformers accepts unchecked for a GDA model, and fails on later.
GDA_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{name: (lambda value: value is None, "must be null: a GDA model has no such part") for name in FOREIGN_PARTS},
    **dict.fromkeys(("dtype", "torch_dtype"), (_names_a_dtype, "must name a floating-point type of torch")),
    "is_encoder_decoder": (lambda value: not value, "must be false"),
    "id2label": (_maps_labels, "must map numbers to names"),
    "label2id": (lambda value: value is None or isinstance(value, dict), "must map names to numbers"),
    "num_labels": (lambda value: isinstance(value, int), "must be an integer"),
    "quantization_config": (lambda value: value is None or isinstance(value, dict), "must be a dictionary"),
    "attn_implementation": (
        lambda value: value is None or isinstance(value, str | dict),
        "must be the name of an implementation of attention",
    ),
}


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


def read_config_file(folder: Path) -> dict[str, Any]:
    """Read and check the fields in `folder`/config.json.

    Raises:
        FileNotFoundError: if there is no such file, or only an adapter.
        ValueError: naming the file and the field, if no config class should read it; or if there is an adapter, too.
    """
    path = folder / "config.json"
    if (folder / ADAPTER_CONFIG).is_file():  # transformers would apply it, or load its base instead
        if is_adapter(folder):
            raise FileNotFoundError(f"{folder} is an adapter; merge it into its model: gda convert {folder} OUT")
        raise ValueError(f"{folder} holds both a model and an adapter; move {ADAPTER_CONFIG} out of it")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a model folder must have one")
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} names no model_type: it is not a dictionary of fields")
    check_fields(fields, path)
    return fields


def check_fields(fields: dict[str, Any], path: Path) -> None:
    """Raise ValueError, naming `path` and the field, for an invalid config.json; stricter for a GDA model."""

    def require(holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"{path}: {_printable(name)} {rule}; got {fields[name]!r:.200}.")

    for name, value in fields.items():
        if _nests_deeply(value):  # printing it could fail
            raise ValueError(f"{path}: {_printable(name)} must not nest deeper than {MAX_NESTING} levels")
        require(name != "self", name, "is not a field")
        require(name != "configuration_files", name, "would make transformers read another, unchecked file")
    for name, (least, most) in BOUNDS.items():
        if isinstance(number := fields.get(name), int):
            require(least <= number <= most, name, f"must be from {least} to {most}")
    if fields.get("model_type") == GDAConfig.model_type:
        allowed = {*ALLOWED_ATTRIBUTES, *FOREIGN_PARTS, *(field.name for field in dataclasses.fields(GDAConfig))}
        for name in fields:  # one could overwrite a method or a property
            is_attribute = hasattr(GDAConfig, name) and name not in allowed
            require(not is_attribute, name, "is an attribute of the class and cannot be set")
        for name in GDA_RULES.keys() & fields.keys():
            holds, rule = GDA_RULES[name]
            require(holds(fields[name]), name, rule)


def _printable(name: str) -> str:
    """A field name as printed in a message."""
    return name if name.isidentifier() else f"{name!r:.200}"


def _nests_deeply(value: Any) -> bool:
    """Whether lists and dictionaries are nested too deeply; without recursion, which has a limit itself."""
    level = [value]
    for _ in range(MAX_NESTING):
        containers = [each for each in level if isinstance(each, dict | list)]
        level = [inner for each in containers for inner in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return False
    return True
