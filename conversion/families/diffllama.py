"""DiffLlama of transformers: a paired GDA at 1:1 whose heads stand in halves, and whose head norm has no weight.

DiffLlama   q heads    s0 s1 s2 s3  n0 n1 n2 n3        all signal heads, then all noise heads
            k heads    s0 s1        n0 n1
            v heads    a0 a1        b0 b1              slab a of each pair, then slab b

GDA         q heads    s0 n0 s1 n1 s2 n2 s3 n3         in groups [signal, noise]
            k heads    s0 n0 s1 n1
            v heads    a0 b0 a1 b1
"""

from collections.abc import Callable

import torch
from transformers import DiffLlamaConfig, PreTrainedConfig

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.families.llamalike import SHARED_FIELDS
from gda.conversion.families.refusals import require_fields, require_schedule
from gda.conversion.tensors.recipes import Recipe, checkpoint_specs, copied
from gda.conversion.tensors.safetensors_io import TensorSpec

MODEL_TYPE = "diffllama"
SAME_FIELDS = (*SHARED_FIELDS, "head_dim", "attention_bias")
REORDERED = (".q_proj.", ".k_proj.", ".v_proj.")


def halves_to_pairs(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (H · head_dim, …) of heads in halves, a0 a1 … b0 b1 …, as pairs a0 b0 a1 b1 …"""
    return heads.unflatten(0, (2, -1, head_dim)).transpose(0, 1).flatten(0, 2)


def pairs_to_halves(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (H · head_dim, …) of heads in pairs, a0 b0 a1 b1 …, as halves a0 a1 … b0 b1 …"""
    return heads.unflatten(0, (-1, 2, head_dim)).transpose(0, 1).flatten(0, 2)


def mapped_config(source: PreTrainedConfig, dtype: torch.dtype | None) -> GDAConfig:
    """The GDA configuration of a DiffLlama."""
    return GDAConfig(
        **{name: getattr(source, name) for name in SAME_FIELDS},
        num_attention_heads=source.num_attention_heads,
        num_noise_heads=source.num_attention_heads // 2,
        kv_layout="paired",
        lambda_type="reparameterized",
        lambda_init=None,
        lambda_init_offset=0,
        head_norm=True,
        head_norm_eps=source.rms_norm_eps,
        dtype=dtype or source.dtype,
        architectures=["GDAForCausalLM"],
    )


def mapped_recipes(config: GDAConfig, source: dict[str, TensorSpec], dtype: torch.dtype | None) -> dict[str, Recipe]:
    """Rows of q, k and v in pairs; a weight of 1 for the head norm; the rest as it is, and λ never narrowed."""

    def recipe(name: str, spec: TensorSpec) -> Recipe:
        if name.endswith(".subln.weight"):
            norm = source["model.norm.weight"].dtype
            ones = TensorSpec(spec.shape, dtype or norm)
            return Recipe(ones, (), lambda: torch.ones(spec.shape), "one: the source's head norm has no weight")
        if any(part in name for part in REORDERED):
            target = TensorSpec(spec.shape, dtype or source[name].dtype)
            return Recipe(target, (name,), lambda rows: halves_to_pairs(rows, config.head_dim), "halves put in pairs")
        return copied(name, source[name], torch.float32 if dtype is not None and ".lambda_" in name else dtype)

    return {name: recipe(name, spec) for name, spec in checkpoint_specs(config).items()}


def notes(config: PreTrainedConfig) -> list[str]:
    """What of a DiffLlama's config has no counterpart."""
    if config.lambda_std_dev == DiffLlamaConfig().lambda_std_dev:
        return []
    return [f"lambda_std_dev={config.lambda_std_dev}, with which λ vectors are drawn for training, is left out"]


def require_exportable(config: GDAConfig, read: Callable[[str], torch.Tensor]) -> None:
    """Raise ValueError naming the field or the layer, if a DiffLlama cannot compute what the model computes."""
    wanted = {
        "kv_layout": "paired",
        "num_noise_heads": config.num_attention_heads // 2,
        "lambda_type": "reparameterized",
        "head_norm": True,
        "head_norm_eps": config.rms_norm_eps,
        "qk_norm": False,
        "qk_rank": None,
        "attention_out_bias": config.attention_bias,
        "mlp_bias": False,
        "sliding_window": None,
    }
    require_fields(config, "a DiffLlama", wanted)
    if config.hidden_act == "poly_norm":
        raise ValueError("hidden_act='poly_norm' has no counterpart in a DiffLlama")
    require_schedule(config, "a DiffLlama", 0)
    for layer in range(config.num_hidden_layers):
        if not torch.all(read(f"model.layers.{layer}.self_attn.subln.weight") == 1):
            raise ValueError(
                f"the head norm of layer {layer} has a trained weight (subln is not 1), and a DiffLlama's has none"
            )


def exported_config(config: GDAConfig) -> DiffLlamaConfig:
    """The DiffLlama configuration of a GDA that `require_exportable` lets pass."""
    return DiffLlamaConfig(
        **{name: getattr(config, name) for name in SAME_FIELDS},
        num_attention_heads=config.num_attention_heads,
        dtype=config.dtype,
        architectures=["DiffLlamaForCausalLM"],
    )


def exported_recipes(config: GDAConfig, source: dict[str, TensorSpec]) -> dict[str, Recipe]:
    """Rows of q, k and v in halves; the head norm's weight, which is 1, left out; the rest as it is."""

    def recipe(name: str) -> Recipe:
        if any(part in name for part in REORDERED):
            return Recipe(
                source[name], (name,), lambda rows: pairs_to_halves(rows, config.head_dim), "pairs put in halves"
            )
        return copied(name, source[name], None)

    return {name: recipe(name) for name in checkpoint_specs(exported_config(config))}
