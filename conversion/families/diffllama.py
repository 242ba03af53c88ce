"""transformers' DiffLlama: a paired GDA at 1:1 with another order of heads and a head norm without weights.

DiffLlama   q heads    s0 s1 s2 s3  n0 n1 n2 n3        halves: all signal heads, then all noise heads
            k heads    s0 s1        n0 n1
            v heads    a0 a1        b0 b1              the first half of each pair's value, then the second

GDA         q heads    s0 n0 s1 n1 s2 n2 s3 n3         pairs [signal, noise]
            k heads    s0 n0 s1 n1
            v heads    a0 b0 a1 b1
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import DiffLlamaConfig, PreTrainedConfig

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.families.llamalike import SHARED_FIELDS, slides, with_floats
from gda.conversion.tensors.recipes import Recipe, all_copied, checkpoint_specs, copied
from gda.conversion.tensors.safetensors_io import TensorSpec

MODEL_TYPE = "diffllama"
CAN_RUN = True
LAMBDA_INIT_OFFSET = 0
SAME_FIELDS = (*SHARED_FIELDS, "head_dim", "attention_bias")
REORDERED = (".q_proj.", ".k_proj.", ".v_proj.")

source_specs = checkpoint_specs


def halves_to_pairs(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder rows (H · head_dim, …) from halves, a0 a1 … b0 b1 …, to pairs, a0 b0 a1 b1 …"""
    return heads.unflatten(0, (2, -1, head_dim)).transpose(0, 1).flatten(0, 2)


def pairs_to_halves(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder rows (H · head_dim, …) from pairs, a0 b0 a1 b1 …, to halves, a0 a1 … b0 b1 …"""
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
        lambda_init_offset=LAMBDA_INIT_OFFSET,
        head_norm=True,
        head_norm_eps=source.rms_norm_eps,
        dtype=dtype or source.dtype,
        architectures=["GDAForCausalLM"],
    )


def mapped_recipes(config: GDAConfig, source: dict[str, TensorSpec], dtype: torch.dtype | None) -> dict[str, Recipe]:
    """Reorder the rows of q, k and v to pairs, add head norm weights of 1, and copy the rest."""
    reorder = partial(halves_to_pairs, head_dim=config.head_dim)

    def recipe(name: str, spec: TensorSpec) -> Recipe:
        if name.endswith(".subln.weight"):
            ones = TensorSpec(spec.shape, dtype or source["model.norm.weight"].dtype)
            return Recipe(ones, (), lambda: torch.ones(spec.shape), "1, since the source's head norm has no weight")
        return _reordered(copied(name, source[name], dtype), reorder, "halves reordered to pairs")

    return {name: recipe(name, spec) for name, spec in checkpoint_specs(config).items()}


def _reordered(copy: Recipe, reorder: Callable[[torch.Tensor], torch.Tensor], how: str) -> Recipe:
    """The copy of a tensor with its rows reordered, if it is of q, k or v."""
    is_reordered = any(part in copy.sources[0] for part in REORDERED)
    return replace(copy, make=reorder, how=how) if is_reordered else copy


def notes(config: PreTrainedConfig) -> list[str]:
    """What a DiffLlama's config has and GDA's does not."""
    if config.lambda_std_dev == DiffLlamaConfig().lambda_std_dev:
        return []
    return [f"lambda_std_dev={config.lambda_std_dev}, used to initialize λ vectors, is dropped"]


def required_fields(config: GDAConfig) -> dict[str, Any]:
    """The fields of a GDA configuration that a DiffLlama can express, with their only possible values."""
    return {
        "kv_layout": "paired",
        "num_noise_heads": config.num_attention_heads // 2,
        "lambda_type": "reparameterized",
        "head_norm": True,
        "head_norm_eps": config.rms_norm_eps,
        "qk_norm": False,
        "qk_rank": None,
        "attention_out_bias": config.attention_bias,
        "mlp_bias": False,
        "sliding_window": None if slides(config) else config.sliding_window,  # of no layer
    }


def require_plain_norms(config: GDAConfig, read: Callable[[str], torch.Tensor]) -> None:
    """Raise ValueError unless MLPs have no PolyNorm and head norms have weights of 1, as in every DiffLlama."""
    if config.hidden_act == "poly_norm":
        raise ValueError("hidden_act='poly_norm' has no counterpart in a DiffLlama")
    for layer in range(config.num_hidden_layers):
        if not torch.all(read(f"model.layers.{layer}.self_attn.subln.weight") == 1):
            raise ValueError(
                f"the head norm of layer {layer} has trained weights (subln is not 1), but a DiffLlama's has none"
            )


def exported_config(config: GDAConfig) -> DiffLlamaConfig:
    """The DiffLlama configuration of a GDA model that can be exported."""
    return DiffLlamaConfig(
        **with_floats({name: getattr(config, name) for name in SAME_FIELDS}),
        num_attention_heads=config.num_attention_heads,
        dtype=config.dtype,
        architectures=["DiffLlamaForCausalLM"],
    )


def exported_recipes(config: GDAConfig, source: dict[str, TensorSpec], dtype: torch.dtype | None) -> dict[str, Recipe]:
    """Reorder the rows of q, k and v to halves, drop the head norm's weights, which are 1, and copy the rest."""
    reorder, how = partial(pairs_to_halves, head_dim=config.head_dim), "pairs reordered to halves"
    copies = all_copied(exported_config(config), source, dtype)
    return {name: _reordered(copy, reorder, how) for name, copy in copies.items()}
