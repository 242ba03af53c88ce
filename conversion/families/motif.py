"""Motif-2-12.7B and Motif-2.6B: their tensors have the names and the row order of a paired GDA's.

Only config.json differs. transformers has no class for it, and code in a model's folder is never run, so it is read
here.

    Motif                      GDA
    num_noise_heads            the same; if absent, half of the query heads are noise heads (Motif-2.6B)
    attn_rms_norm_eps          head_norm_eps, with head_norm
    qkv_bias                   attention_bias: q, k and v have biases. Absent: as the next line
    attention_bias or use_bias attention_out_bias: o_proj has a bias
    use_bias                   mlp_bias
    λ_init of each layer       its schedule over the layers, with lambda_init_offset −1
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from gda.common.errors import errors_as
from gda.common.files import write_json
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.families import llamalike
from gda.conversion.tensors.recipes import all_copied, checkpoint_specs
from gda.conversion.tensors.safetensors_io import TensorSpec

MODEL_TYPE = "motif"
CAN_RUN = False
LAMBDA_INIT_OFFSET = -1

# Fields that config.json must have, and values that are assumed for others.
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
ASSUMED = {
    "rms_norm_eps": 1e-6,
    "attn_rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "poly_norm",
    "max_position_embeddings": 8192,
}
# Fields of Motif-3, which has the same model type and architecture, but another attention, residual stream and MLP.
MOTIF_3_FIELDS = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "num_experts", "n_routed_experts", "mhc_enabled")

# Fields with the same name and meaning in a Motif and in GDA.
SHARED_FIELDS = (*llamalike.SHARED_FIELDS, "num_attention_heads")


@strict
class MotifConfig(PreTrainedConfig):
    """A Motif's config.json. `assumed` names the fields that were missing and have assumed values."""

    model_type: ClassVar[str] = MODEL_TYPE

    vocab_size: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    num_noise_heads: int | None = None
    k_ratio: int | float = 1
    head_dim: int | None = None
    hidden_act: str = "poly_norm"
    max_position_embeddings: int = 8192
    initializer_range: int | float = 0.02
    rms_norm_eps: int | float = 1e-6
    attn_rms_norm_eps: int | float = 1e-5
    use_bias: bool = False
    attention_bias: bool = False
    qkv_bias: bool | None = None
    use_cache: bool = True
    attention_dropout: int | float = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    assumed: list[str] | None = None


def read_motif_config(raw: dict[str, Any], path: Path) -> MotifConfig:
    """Read the fields `raw` of the config.json at `path`.

    Raises:
        ValueError: naming file and field, for a field that is missing, impossible or unsupported.
    """
    for name in MOTIF_3_FIELDS:
        if raw.get(name):
            raise ValueError(
                f"{path} has {name}, a field of Motif-3, whose keys and values are latent; only Motif-2.6B and Motif-2 "
                "can be converted (docs/family.md)"
            )
    for name in REQUIRED:
        if raw.get(name) is None:
            raise ValueError(f"{path} has no {name}, which a Motif's config must have")
    assumed = [name for name in ASSUMED if raw.get(name) is None]
    if raw.get("rope_parameters") is not None and "rope_theta" in assumed:
        assumed.remove("rope_theta")
    fields = {
        name: value for name, value in raw.items() if value is not None and name not in ("model_type", "auto_map")
    }
    fields |= {name: ASSUMED[name] for name in assumed} | {"assumed": assumed}
    with errors_as(f"{path} is not a valid configuration"):
        config = MotifConfig(**fields)
    _refuse_unsupported(config, path)
    if config.num_noise_heads is None:
        config.num_noise_heads = config.num_attention_heads // 2
    if config.head_dim is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    with errors_as(str(path), ValueError):
        mapped_config(config, None)
    return config


def _refuse_unsupported(config: MotifConfig, path: Path) -> None:
    if config.k_ratio != 1:
        raise ValueError(
            f"{path} has k_ratio={config.k_ratio}: several signal keys for each noise key; GDA pairs them one to one, "
            "so only k_ratio=1 can be converted"
        )
    if config.num_noise_heads is None and config.num_attention_heads % 2:
        raise ValueError(
            f"{path} has no num_noise_heads, so half of the query heads are noise heads, but num_attention_heads="
            f"{config.num_attention_heads} is odd"
        )
    if config.use_sliding_window and config.sliding_window is not None:
        raise ValueError(f"{path} has use_sliding_window, but which layers of a Motif slide is unknown")
    if set(config.layer_types or ()) - {"full_attention"}:
        raise ValueError(f"{path} has layer_types={config.layer_types}; only full attention is supported in a Motif")


def mapped_config(source: PreTrainedConfig, dtype: torch.dtype | None) -> GDAConfig:
    """The GDA configuration of a Motif."""
    output_bias = source.attention_bias or source.use_bias
    return GDAConfig(
        **{name: getattr(source, name) for name in SHARED_FIELDS},
        head_dim=source.head_dim,
        num_noise_heads=source.num_noise_heads,
        kv_layout="paired",
        lambda_type="reparameterized",
        lambda_init=None,
        lambda_init_offset=LAMBDA_INIT_OFFSET,
        head_norm=True,
        head_norm_eps=source.attn_rms_norm_eps,
        attention_bias=output_bias if source.qkv_bias is None else source.qkv_bias,
        attention_out_bias=output_bias,
        mlp_bias=source.use_bias,
        dtype=dtype or source.dtype,
        architectures=["GDAForCausalLM"],
    )


mapped_recipes = all_copied  # tensors keep their names and the order of their rows


def source_specs(config: PreTrainedConfig) -> dict[str, TensorSpec]:
    """The tensors of a Motif with this config."""
    return checkpoint_specs(mapped_config(config, None))


def notes(config: PreTrainedConfig) -> list[str]:
    """Which fields of a Motif's config were assumed or are left out."""
    notes = [f"config.json has no {name}; {ASSUMED[name]} is assumed" for name in config.assumed or []]
    if config.sliding_window is not None:
        notes.append(f"sliding_window={config.sliding_window} is dropped, because use_sliding_window is not set")
    return notes


def required_fields(config: GDAConfig) -> dict[str, Any]:
    """The fields of a GDA configuration that a Motif can express, with their only possible values."""
    return {
        "kv_layout": "paired",
        "lambda_type": "reparameterized",
        "head_norm": True,
        "qk_norm": False,
        "qk_rank": None,
        "sliding_window": None if llamalike.slides(config) else config.sliding_window,  # of no layer
        "mlp_bias": config.mlp_bias and config.attention_out_bias,  # use_bias gives o_proj a bias too
    }


def exported_config(config: GDAConfig) -> MotifConfig:
    """The Motif configuration of a GDA model that can be exported."""
    return read_motif_config(_exported_fields(config), Path("config.json"))


def write_exported_config(config: GDAConfig, folder: Path) -> None:
    """Write `folder`/config.json as Motif's own code reads it."""
    write_json(folder / "config.json", _exported_fields(config))


def _exported_fields(config: GDAConfig) -> dict[str, Any]:
    """The fields of a Motif's config.json, with the older names of RoPE fields."""
    written = {
        "architectures": ["MotifForCausalLM"],
        "model_type": "Motif",
        **{name: getattr(config, name) for name in SHARED_FIELDS if name != "rope_parameters"},
        "head_dim": config.head_dim,
        "num_noise_heads": config.num_noise_heads,
        "k_ratio": 1,
        "attn_rms_norm_eps": config.head_norm_eps,
        "use_bias": config.mlp_bias,
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "sliding_window": None,
        "use_sliding_window": False,
        "torch_dtype": str(config.dtype or torch.float32).removeprefix("torch."),
    }
    if config.attention_out_bias != config.mlp_bias:
        written["attention_bias"] = config.attention_out_bias
    if config.attention_bias != config.attention_out_bias:
        written["qkv_bias"] = config.attention_bias
    if config.signal_noise_ratio == 1 and config.num_attention_heads * config.head_dim == config.hidden_size:
        del written["num_noise_heads"]  # Motif-2.6B's code doesn't know the field and takes half of the heads
    return written
