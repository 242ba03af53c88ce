"""Shared DIFF Transformer: queries, and paired keys, as a base that roles share and an update of low rank for each."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from gda import GDAForCausalLM

from . import naive
from .test_attention_against_naive import PATHS, heads
from .tiny import relative_error, tiny_model, token_ids

TOLERANCE = 1e-5
LENGTH = 11

HEADS: dict[str, dict[str, Any]] = {
    "grouped": heads(6, 2, 2),
    "multi-head": heads(6, 6, 6),
    "multi-head-one-noise": heads(6, 1, 6),
    "multi-query": heads(6, 2, 1),
    "multi-query-one-noise": heads(5, 1, 1),
    "more-noise-than-kv": heads(8, 4, 2),
    "fewer-noise-than-kv": heads(8, 2, 4),
    "paired": heads(6, 2, 4, kv_layout="paired"),
    "paired-one-pair": heads(6, 2, 2, kv_layout="paired"),
    "paired-more-noise-than-pairs": heads(8, 4, 4, kv_layout="paired"),
    "paired-1:1": heads(3, 3, 6, kv_layout="paired"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "reparameterized": {},
    "sigmoid": {"lambda_type": "sigmoid"},
    "tanh": {"lambda_type": "tanh"},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head-dim-above-hidden-over-heads": {"head_dim": 20},
    "head-dim-above-hidden": {"head_dim": 32, "qk_rank": 24},
    "head-dim-below-hidden-over-heads": {"head_dim": 2, "qk_rank": 1},
    "full-rank": {"qk_rank": 8},
    "rank-1": {"qk_rank": 1},
    "norms": {"qk_norm": True, "head_norm": True},
    "sliding": {"sliding_window": 3},
}
BOTH_LAYOUTS = pytest.mark.parametrize("kv_layout", ["shared", "paired"])


def reference(model: GDAForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return naive.run(model.state_dict(), model.config, ids).logits


@torch.no_grad()
def agree(attention: str = "sdpa", **fields: Any) -> float:
    model, ids = tiny_model(attention=attention, **({"qk_rank": 3} | fields)), token_ids(2, LENGTH)
    return relative_error(model(ids).logits, reference(model, ids))


# ------------------------------------------------------------------------------------------------ against the equations


@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_every_role_reads_its_base_and_its_update(rank: int, fields: dict[str, Any]) -> None:
    """W_base + P_k R_k, head by head, whatever the numbers of signal, noise and KV heads."""
    assert agree(qk_rank=rank, **fields) <= TOLERANCE


@BOTH_LAYOUTS
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_variants(fields: dict[str, Any], kv_layout: str) -> None:
    """With every λ type, with biases, norms, windows, and head widths of their own."""
    assert agree(kv_layout=kv_layout, **fields) <= TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
@BOTH_LAYOUTS
def test_backends(kv_layout: str, attention: str) -> None:
    """The attention is that of dense projections, so every backend takes it."""
    assert agree(attention, kv_layout=kv_layout) <= TOLERANCE


@pytest.mark.parametrize("fields", PATHS.values(), ids=PATHS)
@torch.no_grad()
def test_decoding(fields: dict[str, Any]) -> None:
    """A prompt and then one token at a time from the cache."""
    model, ids = tiny_model(qk_rank=3, **fields), token_ids(2, LENGTH)
    cache = DynamicCache(config=model.config)
    pieces = [(0, 6), *pairwise(range(6, LENGTH + 1))]
    logits = torch.cat([model(ids[:, begin:end], past_key_values=cache).logits for begin, end in pieces], dim=1)
    assert relative_error(logits, reference(model, ids)) <= TOLERANCE
