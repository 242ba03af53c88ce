"""config.json as it is read from a model's folder, checked before a config class sees it.

The checks here are about files: a value of a wrong kind, or a number so large that whoever counts to it never ends.
`GDAConfig` checks the rules of GDA.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gda.common.files import read_json
from gda.configuration.configuration_gda import MAX_LAYERS, ROPE_ARGUMENTS, GDAConfig

MAX_SIZE = 2**30
MAX_NESTING = 20  # levels of lists and dictionaries; Python's own limit ends in a RecursionError

# Bounds far above every model. A config class may make a list of that length, and a model a buffer.
BOUNDS = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), (1, MAX_SIZE)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), (1, 16_384)),
    "num_hidden_layers": (1, MAX_LAYERS),
    "head_dim": (1, 65_536),
    "sliding_window": (0, MAX_SIZE),
    "num_labels": (1, 100_000),  # transformers copies the map of labels each time that it shows a config
}

# Fields that tell transformers of parts that a GDA model does not have.
FOREIGN_PARTS = ("per_layer_config", "text_config", "decoder", "generator", "text_encoder", "mlp_layer_types")
# Names that a config.json may hold although they are attributes of the class and no fields.
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


# Rules for what transformers takes unchecked into the config of a GDA model, and fails on later.
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


def read_config_file(folder: Path) -> dict[str, Any]:
    """The fields in `folder`/config.json.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, and the field that no config class should be given.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a model folder holds one")
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} names no model_type: it holds no dictionary of fields")
    check_fields(fields, path)
    return fields


def check_fields(fields: dict[str, Any], path: Path) -> None:
    """Check the fields of a config.json of any model, and further those of a GDA model.

    Raises:
        ValueError: naming `path`, the field, the rule and the value.
    """

    def require(holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"{path}: {_shown(name)} {rule}; got {fields[name]!r:.200}.")

    for name, value in fields.items():
        if _nests_deeply(value):  # a value that Python may be unable to show
            raise ValueError(f"{path}: {_shown(name)} must not nest deeper than {MAX_NESTING} levels")
        require(name != "self", name, "is no field")
    for name, (least, most) in BOUNDS.items():
        if isinstance(number := fields.get(name), int):
            require(least <= number <= most, name, f"must be from {least} to {most}")
    if fields.get("model_type") == GDAConfig.model_type:
        for name in fields:
            require(not _belongs_to_the_class(name), name, "belongs to the class and cannot be given")
        for name in GDA_RULES.keys() & fields.keys():
            holds, rule = GDA_RULES[name]
            require(holds(fields[name]), name, rule)


def _shown(name: str) -> str:
    """A name as a message shows it; a file may hold any."""
    return name if name.isidentifier() else f"{name!r:.200}"


def _nests_deeply(value: Any) -> bool:
    """Whether lists and dictionaries are nested beyond the limit; level by level, since recursion has a limit too."""
    level = [value]
    for _ in range(MAX_NESTING):
        containers = [each for each in level if isinstance(each, dict | list)]
        level = [inner for each in containers for inner in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return False
    return True


def _belongs_to_the_class(name: str) -> bool:
    """Whether a field of that name would hide a method or a property of GDAConfig."""
    fields = {field.name for field in dataclasses.fields(GDAConfig)}
    return hasattr(GDAConfig, name) and name not in fields | {*ALLOWED_ATTRIBUTES, *FOREIGN_PARTS}
