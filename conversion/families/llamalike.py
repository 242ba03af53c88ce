"""Llama, Mistral, Qwen2 and Qwen3: one decoder, whose configurations differ in a few fields and their names.

              biases of q, k, v   bias of o_proj    MLP biases   norm of q and k   layers that slide
    Llama     attention_bias      attention_bias    mlp_bias     no                none
    Mistral   no                  no                no           no                all, if sliding_window is set
    Qwen2     yes                 no                no           no                as in layer_types
    Qwen3     attention_bias      attention_bias    no           yes               as in layer_types

All four have the tensor names of GDA. `source_fields` translates such a configuration to fields of `GDAConfig`, and
`target_config` translates back. A field that doesn't survive the round trip cannot be exported.
"""

import copy
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from gda.common.errors import first_line
from gda.common.files import read_json, write_json
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.tensors.safetensors_io import INDEX_FILE, WEIGHTS_FILE

# Fields with the same name and meaning in all of them and in GDA.
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
)
# Fields of GDA that they express differently.
DIFFERING_FIELDS = (
    "head_dim",
    "attention_bias",
    "attention_out_bias",
    "mlp_bias",
    "qk_norm",
    "sliding_window",
    "layer_types",
)
# RoPE parameters for images or very long texts, which transformers' text models of these types ignore silently.
UNSUPPORTED_ROPE = ("mrope_section", "mrope_interleaved", "llama_4_scaling_beta")
# Entries of a config.json that transformers reads though its class has no such field, or that don't matter.
HARMLESS_FIELDS = ("auto_map", "transformers_weights", "head_dim", "layer_types", "is_causal")


LLAMALIKES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
NAMES = "Llama, Mistral, Qwen2 or Qwen3"
RUNNERS = "transformers, `gda serve` or the transformers backend of an engine"  # of models that no such type can hold


def source_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of `GDAConfig` for the configuration of a Llama, Mistral, Qwen2 or Qwen3, except heads, λ and dtype.

    With `num_attention_heads` signal heads and λ = 0, a GDA model with these fields computes what the source computes.
    """
    # A config.json may set fields that the class of its model type does not have, and that transformers ignores.
    kind, known = config.model_type, type(config).__dataclass_fields__
    bias = kind == "qwen2" or ("attention_bias" in known and config.attention_bias)
    window = config.sliding_window if "sliding_window" in known else None
    if "layer_types" in known:
        layer_types = list(config.layer_types)
    else:
        layer_types = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    return {
        **{name: copy.deepcopy(getattr(config, name)) for name in SHARED_FIELDS},
        "head_dim": head_dim(config),
        "attention_bias": bias,
        "attention_out_bias": bias and kind != "qwen2",
        "mlp_bias": "mlp_bias" in known and config.mlp_bias,
        "qk_norm": kind == "qwen3",
        # A window that no layer uses is dropped: DynamicCache and others look at sliding_window alone.
        "sliding_window": window if "sliding_attention" in layer_types else None,
        "layer_types": layer_types,
    }


def slides(config: GDAConfig) -> bool:
    """Whether a layer has a sliding window."""
    return "sliding_attention" in (config.layer_types or [])


def head_dim(config: PreTrainedConfig) -> int:
    """Width of a head; hidden_size / num_attention_heads if the configuration has no head_dim."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def with_floats(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config with floats where transformers' classes refuse integers."""
    return fields | {name: float(fields[name]) for name in ("rms_norm_eps", "initializer_range")}


def target_config(config: GDAConfig, model_type: str, heads: tuple[int, int]) -> PreTrainedConfig:
    """The configuration of that model type for a GDA model as a plain decoder, as far as the type can express it.

    `heads` are the numbers of its query heads and KV heads.
    """
    target, window = LLAMALIKES[model_type], slides(config)
    shared = with_floats({name: copy.deepcopy(getattr(config, name)) for name in SHARED_FIELDS})
    known = target.__dataclass_fields__
    own: dict[str, Any] = {name: getattr(config, name) for name in ("attention_bias", "mlp_bias") if name in known}
    own |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    if not (model_type == "qwen2" and has_usual_heads(config, heads)):
        own["head_dim"] = config.head_dim  # the class of a Qwen2 has no such field, but reads it if it is set
    if "sliding_window" in known:
        own["sliding_window"] = config.sliding_window if window else None
    if "max_window_layers" in known and window:
        own["use_sliding_window"] = True
        # layer_types takes precedence; both agree where windows come last.
        own["max_window_layers"] = (config.layer_types or []).count("full_attention")
        own["layer_types"] = list(config.layer_types or [])
    return target(**shared | own, dtype=config.dtype, architectures=[target.__name__.replace("Config", "ForCausalLM")])


def save_target_config(target: PreTrainedConfig, config: GDAConfig, folder: Path) -> None:
    """Write `folder`/config.json with the field names of transformers 5 and, beside them, those of transformers 4.

    transformers 5 saves `rope_parameters` and `dtype` only. transformers 4 and engines such as mlx-lm read `rope_theta`
    and `rope_scaling`; without them they compute with a default, silently.
    """
    target.save_pretrained(folder)
    path = folder / "config.json"
    fields = read_json(path)
    fields |= {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
    fields |= {"torch_dtype": fields["dtype"]} if "dtype" in fields else {}
    write_json(path, dict(sorted(fields.items())))


def choose_target(config: GDAConfig, model_type: str, heads: tuple[int, int]) -> tuple[str, str | None]:
    """`model_type`, or the first type that can express the model if that one cannot, and the reason for another one.

    Raises:
        ValueError: naming the field that no type can express, and what runs the model instead.
    """
    reason = _inexpressible(config, model_type, heads)
    if reason is None:
        return model_type, None
    able = next((name for name in LLAMALIKES if _inexpressible(config, name, heads) is None), None)
    if able is not None:
        return able, f"a {model_type.capitalize()} cannot have {reason}; written as a {able.capitalize()}"
    hint = f"run it with {RUNNERS}"
    if config.head_norm and config.kv_layout == "paired":
        hint += "; --format motif or diffllama may express it"
    raise ValueError(f"no {NAMES} can hold the model; a {model_type.capitalize()} cannot have {reason}: {hint}")


def _inexpressible(config: GDAConfig, model_type: str, heads: tuple[int, int]) -> str | None:
    """The first field, with its value, that doesn't survive a translation to that model type and back."""
    if config.head_norm:
        return "head_norm=True"
    if config.hidden_act == "poly_norm":
        return "hidden_act='poly_norm'"
    if model_type == "llama" and config.hidden_size % heads[0]:  # LlamaConfig refuses it, even if head_dim is given
        return f"{heads[0]} query heads, which do not divide hidden_size={config.hidden_size}"
    try:
        back = source_fields(target_config(config, model_type, heads))
    except StrictDataclassError as error:  # transformers checks the ranges of a type's fields
        return f"these fields ({first_line(error)})"
    differing = [name for name in DIFFERING_FIELDS if back[name] != getattr(config, name)]
    if "sliding_window" in differing and not slides(config):
        differing.remove("sliding_window")  # no layer uses the window
    if projections := zero_bias_projections(config, model_type, heads):
        differing.remove("attention_out_bias" if projections == ("o_proj",) else "attention_bias")
    return f"{differing[0]}={getattr(config, differing[0])!r}" if differing else None


def zero_bias_projections(config: GDAConfig, model_type: str, heads: tuple[int, int]) -> tuple[str, ...]:
    """The projections that get a bias of 0, because the type has biases that the model has not.

    A Llama, whose o_proj has a bias if q, k and v do, stands in for a Qwen2 that engines could not run. A Qwen2, which
    has biases of q, k and v, is the only type without norms of q and k whose layers differ in their windows.
    """
    qkv, out = config.attention_bias, config.attention_out_bias
    if model_type == "llama" and qkv and not out and not has_usual_heads(config, heads):
        return ("o_proj",)
    differ = slides(config) and "full_attention" in (config.layer_types or [])
    return ("q_proj", "k_proj", "v_proj") if model_type == "qwen2" and differ and not qkv and not out else ()


def has_usual_heads(config: GDAConfig, heads: tuple[int, int]) -> bool:
    """Whether heads are hidden_size / num_attention_heads wide, as engines assume for a Qwen2.

    vLLM 0.32, mlx-lm 0.32 and CTranslate2 4.8 ignore its head_dim.
    """
    return config.hidden_size // heads[0] == config.head_dim


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer, None for full attention, for a configuration of any model type."""
    if config.model_type in LLAMALIKES:
        fields = source_fields(config)
        kinds, window = fields["layer_types"], fields["sliding_window"]
    else:
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
    return [window if kind == "sliding_attention" else None for kind in kinds]


def refuse_unread(config: PreTrainedConfig, where: Path) -> None:
    """Raise ValueError for a Llama-like configuration with fields that its class in transformers ignores silently."""
    if config.model_type not in LLAMALIKES:
        return
    for name in UNSUPPORTED_ROPE:
        if name in (config.rope_parameters or {}):
            raise ValueError(f"{where}: rope_parameters has {name}, which is not part of a {config.model_type} model")
    if getattr(config, "use_mrope", False):
        raise ValueError(f"{where} has use_mrope, a RoPE for images, which is not part of a {config.model_type} model")
    read = WEIGHTS_FILE if (where.parent / WEIGHTS_FILE).exists() else INDEX_FILE
    if (file := getattr(config, "transformers_weights", None)) not in (None, read):
        raise ValueError(
            f"{where} has transformers_weights={file!r}, but {read} is read; rename it and remove the field"
        )
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds != source_fields(config)["layer_types"]:
        raise ValueError(
            f"{where} has layer_types={kinds}, which a {config.model_type} model does not read; "
            "remove the field, or name the model_type that does"
        )


def unread_fields(config: PreTrainedConfig) -> list[str]:
    """Fields of a config.json that its class doesn't define, except harmless ones."""
    known = type(config).__dataclass_fields__
    return sorted(
        name
        for name, value in vars(config).items()
        if name not in known and name not in HARMLESS_FIELDS and not name.startswith("_") and value
    )
