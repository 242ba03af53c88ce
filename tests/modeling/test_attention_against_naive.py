"""The model agrees with the reference loops of its equations, to 1e-5 in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gda import GDAForCausalLM

from ..support import naive
from ..support.head_layouts import MIXED, PATHS, heads
from ..support.tiny import relative_error, tiny_config, tiny_model, token_ids

TOLERANCE = 1e-5
LENGTH = 11


def shared_heads() -> dict[str, dict[str, Any]]:
    """Every ratio, with more, as many and fewer noise heads than KV heads."""
    cases = {}
    for ratio in (1, 2, 3, 4, 5, 7):
        for noise, key_value in ((4, 2), (2, 2), (3, 3), (2, 1), (1, 1)):
            cases[f"{ratio}:1-noise{noise}-kv{key_value}"] = heads(ratio * noise, noise, key_value)
        for copies in range(2, ratio + 1):
            if ratio % copies == 0:
                cases[f"{ratio}:1-noise2-kv{2 * copies}"] = heads(ratio * 2, 2, 2 * copies)
    cases["multi-head-one-noise"] = heads(6, 1, 6)
    cases["multi-head-two-noise"] = heads(8, 2, 8)
    cases["multi-query-one-noise"] = heads(7, 1, 1)
    cases["multi-query-many-noise"] = heads(6, 6, 1)
    return cases


def paired_heads() -> dict[str, dict[str, Any]]:
    """Ratios with one and several signal and noise heads per pair of KV heads."""
    paired = {"kv_layout": "paired"}
    cases = {}
    for ratio in (1, 2, 3, 4, 5, 7):
        for noise, key_value in ((2, 4), (4, 4), (1, 2), (3, 2)):
            cases[f"paired-{ratio}:1-noise{noise}-kv{key_value}"] = heads(ratio * noise, noise, key_value, **paired)
    return cases


VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True},
    "input-biases": {"attention_bias": True, "attention_out_bias": False},
    "output-bias": {"attention_bias": False, "attention_out_bias": True},
    "all-biases": {"attention_bias": True, "mlp_bias": True},
    "head-dim-below-hidden-over-heads": {"head_dim": 2},
    "head-dim-above-hidden-over-heads": {"head_dim": 20},
    "head-dim-equal-hidden-over-heads": {"hidden_size": 64, "head_dim": 8},
    "sigmoid": {"lambda_type": "sigmoid"},
    "tanh": {"lambda_type": "tanh"},
    "lambda-init-float": {"lambda_init": 0.15},
    "lambda-init-list": {"lambda_init": [0.1, -0.2]},
    "lambda-init-offset": {"lambda_init_offset": -1},
    "head-norm": {"head_norm": True},
    "head-norm-eps": {"head_norm": True, "head_norm_eps": 0.5},
    "head-norm-lambda-init": {"head_norm": True, "lambda_init": [0.0, 0.7]},
    "head-norm-sigmoid": {"head_norm": True, "lambda_type": "sigmoid"},
    "head-norm-tanh": {"head_norm": True, "lambda_type": "tanh", "lambda_init": 0.25},
    "head-norm-fading": {"head_norm": True, "fade": 0.3, "faded_head_norm": True, "lambda_init": 0.25},
    "rms-norm-eps": {"rms_norm_eps": 0.5},
    "qk-norm": {"qk_norm": True},
    "qk-norm-eps": {"qk_norm": True, "rms_norm_eps": 0.1},
    "poly-norm": {"hidden_act": "poly_norm"},
    "motif": {"head_norm": True, "hidden_act": "poly_norm", "lambda_init_offset": -1},
    "everything": {
        "attention_bias": True,
        "mlp_bias": True,
        "head_norm": True,
        "qk_norm": True,
        "hidden_act": "poly_norm",
        "lambda_type": "sigmoid",
        "tie_word_embeddings": True,
    },
    "sliding": {"sliding_window": 4},
    "sliding-one-token": {"sliding_window": 1},
    "mixed-layer-types": {"sliding_window": 3, "num_hidden_layers": 3, "layer_types": MIXED},
}


def agree(fields: dict[str, Any], attention: str = "sdpa") -> float:
    model = tiny_model(attention=attention, **fields)
    ids = token_ids(2, LENGTH)
    with torch.no_grad():
        logits = model(ids).logits
    return relative_error(logits, naive.run(model.state_dict(), model.config, ids).logits)


@pytest.mark.parametrize("fields", shared_heads().values(), ids=shared_heads())
def test_shared_ratios(fields: dict[str, Any]) -> None:
    """Every query head reads the KV head of its group, and every noise map is subtracted from its own signal maps."""
    assert agree(fields) <= TOLERANCE


@pytest.mark.parametrize("fields", paired_heads().values(), ids=paired_heads())
def test_paired_ratios(fields: dict[str, Any]) -> None:
    """Signal and noise heads read their own keys, and both value slabs in order."""
    assert agree(fields) <= TOLERANCE


@pytest.mark.parametrize("kv_layout", ["shared", "paired"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_variants(fields: dict[str, Any], kv_layout: str) -> None:
    """Every field of the config, in both layouts."""
    assert agree({"kv_layout": kv_layout, **fields}) <= TOLERANCE


@pytest.mark.parametrize("fields", PATHS.values(), ids=PATHS)
def test_eager_agrees(fields: dict[str, Any]) -> None:
    assert agree(fields, attention="eager") <= TOLERANCE


@pytest.mark.parametrize("kv_layout", ["shared", "paired"])
def test_float64_agrees_to_rope_rounding(kv_layout: str) -> None:
    """transformers computes RoPE, norms and softmax in float32."""
    model = tiny_model(kv_layout=kv_layout, head_norm=True, lambda_type="sigmoid").double()
    ids = token_ids(1, LENGTH)
    with torch.no_grad():
        logits = model(ids).logits
    assert relative_error(logits, naive.run(model.state_dict(), model.config, ids).logits) <= 2e-6


def reference(model: GDAForCausalLM, ids: Tensor) -> Tensor:
    return naive.run(model.state_dict(), model.config, ids).logits


@pytest.mark.parametrize("fields", PATHS.values(), ids=PATHS)
@torch.no_grad()
def test_token_by_token(fields: dict[str, Any]) -> None:
    """Decoding with a cache equals one pass over the sequence."""
    model, ids = tiny_model(**fields), token_ids(2, LENGTH)
    cache = DynamicCache(config=model.config)
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(LENGTH)]
    assert cache.get_seq_length() == LENGTH
    assert relative_error(torch.cat(steps, dim=1), reference(model, ids)) <= TOLERANCE


@pytest.mark.parametrize("sizes", [(5, 4, 2), (1, 9, 1)], ids=str)
@pytest.mark.parametrize("fields", PATHS.values(), ids=PATHS)
@torch.no_grad()
def test_chunked_prefill(fields: dict[str, Any], sizes: tuple[int, ...]) -> None:
    """A prompt in several pieces equals one pass over the sequence."""
    model, ids = tiny_model(**fields), token_ids(2, sum(sizes))
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)]
    assert relative_error(torch.cat(pieces, dim=1), reference(model, ids)) <= TOLERANCE


@pytest.mark.parametrize("positions", ["counted", "default"])
@pytest.mark.parametrize("fields", PATHS.values(), ids=PATHS)
@torch.no_grad()
def test_left_padded_batch(fields: dict[str, Any], positions: str) -> None:
    """Each row equals the row alone, for any start of the positions."""
    model = tiny_model(**fields)
    padding = torch.tensor([4, 0, 1])
    mask = (torch.arange(LENGTH) >= padding.unsqueeze(1)).long()
    ids = token_ids(3, LENGTH)
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0) if positions == "counted" else None
    logits = model(ids, attention_mask=mask, position_ids=position_ids).logits
    masked = naive.run(model.state_dict(), model.config, ids, padding_mask=mask).logits
    for row, pad in enumerate(padding.tolist()):
        assert relative_error(logits[row, pad:], reference(model, ids[row : row + 1, pad:])[0]) <= TOLERANCE
        assert relative_error(logits[row, pad:], masked[row, pad:]) <= TOLERANCE


@pytest.mark.parametrize("fields", PATHS.values(), ids=PATHS)
@torch.no_grad()
def test_left_padded_decoding(fields: dict[str, Any]) -> None:
    """A padded prompt and then single tokens with a cache: each row equals the row alone."""
    model, prompt = tiny_model(**fields), 6
    padding = torch.tensor([3, 0])
    mask = (torch.arange(LENGTH) >= padding.unsqueeze(1)).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    ids = token_ids(2, LENGTH)
    cache = DynamicCache(config=model.config)
    steps = []
    for begin, end in [(0, prompt), *((t, t + 1) for t in range(prompt, LENGTH))]:
        steps.append(
            model(
                ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=cache,
            ).logits
        )
    logits = torch.cat(steps, dim=1)
    for row, pad in enumerate(padding.tolist()):
        assert relative_error(logits[row, pad:], reference(model, ids[row : row + 1, pad:])[0]) <= TOLERANCE


ROPE = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 5.0],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("kv_layout", ["shared", "paired"])
@pytest.mark.parametrize("kind", ROPE)
@torch.no_grad()
def test_rope_kinds(kind: str, kv_layout: str) -> None:
    """With non-zero λ, every RoPE type rotates signal and noise heads by a Llama's angles."""
    rope = {"rope_type": kind, "rope_theta": 100.0, **ROPE[kind]}
    model = tiny_model(tiny_config(kv_layout=kv_layout, rope_parameters=rope, max_position_embeddings=8))
    llama = LlamaConfig(
        hidden_size=24, num_attention_heads=3, head_dim=8, rope_parameters=dict(rope), max_position_embeddings=8
    )
    ids = token_ids(1, LENGTH)
    cos, sin = LlamaRotaryEmbedding(llama)(torch.empty(0), torch.arange(LENGTH).unsqueeze(0))
    expected = naive.run(model.state_dict(), model.config, ids, rotation=(cos[0], sin[0])).logits
    assert relative_error(model(ids).logits, expected) <= TOLERANCE
    assert relative_error(reference(model, ids), expected) > 1e-3
