"""Comparing variants of a small model at equal FLOPs and equal data, paired by seed."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gda import GDAConfig, GDAForCausalLM

# Two-sided 95 % points of Student's t by degrees of freedom; beyond the table the next smaller one, which is wider.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 12: 2.179,
       15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What all variants have in common. `length` is that of a sequence."""

    hidden: int
    layers: int
    head_dim: int
    kv_heads: int
    length: int


@dataclass(frozen=True)
class Heads:
    """What sets a variant apart: numbers of heads, and fields of its config."""

    signal: int
    noise: int
    fields: Mapping[str, Any]

    @property
    def is_paired(self) -> bool:
        return self.fields.get("kv_layout") == "paired"


def flops(shape: Shape, heads: Heads, mlp: int) -> int:
    """FLOPs per token of the matrix products of a forward pass; half of the scores are masked."""
    all_heads, value_width = heads.signal + heads.noise, shape.head_dim * (2 if heads.is_paired else 1)
    kv_heads = heads.fields.get("num_key_value_heads", shape.kv_heads)
    queries_keys_values = shape.hidden * shape.head_dim * (all_heads + 2 * kv_heads)
    output = heads.signal * value_width * shape.hidden
    attention = all_heads * (shape.head_dim + value_width) * shape.length // 2
    lambdas = shape.hidden * heads.signal if heads.fields.get("lambda_type") in ("sigmoid", "tanh") else 0
    return 2 * shape.layers * (queries_keys_values + output + lambdas + attention + 3 * shape.hidden * mlp)


def mlp_width(shape: Shape, heads: Heads, wanted: int) -> int:
    """The width of the MLP, a multiple of 8, that comes closest to the FLOPs `wanted`."""
    without, per_width = flops(shape, heads, 0), flops(shape, heads, 1) - flops(shape, heads, 0)
    return max(8, round((wanted - without) / per_width / 8) * 8)


def build(shape: Shape, heads: Heads, mlp: int, seed: int, **fields: Any) -> Any:
    """An untrained model; `fields` of its config are those that shape, heads and MLP leave open."""
    fields |= {
        "hidden_size": shape.hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads.signal + heads.noise,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},  # defaults of the two classes differ
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    } | dict(heads.fields)
    torch.manual_seed(seed)
    if not heads.noise:
        return LlamaForCausalLM(LlamaConfig(**fields))
    return GDAForCausalLM(GDAConfig(**fields, num_noise_heads=heads.noise))


def interval(differences: list[float]) -> dict[str, float | None]:
    """Mean and half the width of its 95 % t-interval."""
    freedom = len(differences) - 1
    if freedom < 1:
        return {"mean": statistics.fmean(differences), "half_width": None}
    t = T95[max(each for each in T95 if each <= freedom)]
    half = t * statistics.stdev(differences) / math.sqrt(len(differences))
    return {"mean": statistics.fmean(differences), "half_width": half}
