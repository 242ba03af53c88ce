"""Logits equal those of transformers' Llama, Mistral, Qwen2 and Qwen3 at λ = 0, and of DiffLlama at any λ."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gda import GDAForCausalLM
from gda.modeling_gda.attention_gda import rotate

from ..support.checkpoints import logits
from ..support.tiny import make_asymmetric, relative_error, tiny_config, tiny_model, token_ids

TOLERANCE = 1e-5
NUM_SIGNAL, NUM_KEY_VALUE, HEAD_DIM = 6, 2, 8
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": NUM_SIGNAL,
    "num_key_value_heads": NUM_KEY_VALUE,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
LAMBDA_ZERO = {
    "equal-pairs": {"lambda_type": "reparameterized", "lambda_init": 0.0},
    "tanh": {"lambda_type": "tanh"},
}


def source_model(
    model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig], **fields: Any
) -> PreTrainedModel:
    fields = SHAPE | fields
    fields["rope_parameters"] = dict(fields["rope_parameters"])  # configs write into it
    return make_asymmetric(model_class(config_class(**fields)), seed=1)


def gda_like(source: PreTrainedModel, num_noise: int = 2, **fields: Any) -> GDAForCausalLM:
    """A GDA model with the source's shape and weights, random noise heads and λ = 0."""
    config = source.config
    same = {name: getattr(config, name) for name in SHAPE} | {
        "num_attention_heads": config.num_attention_heads + num_noise,
        "num_noise_heads": num_noise,
        "rope_parameters": dict(config.rope_parameters),
        "attention_bias": getattr(config, "attention_bias", config.model_type == "qwen2"),
        "attention_out_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "tie_word_embeddings": config.tie_word_embeddings,
        "sliding_window": getattr(config, "sliding_window", None),
        "layer_types": getattr(config, "layer_types", None),
    }
    model = tiny_model(tiny_config(**(same | fields)), seed=2)
    state = model.state_dict()
    for name, weight in source.state_dict().items():
        if "q_proj" in name:
            put_signal_heads(state[name], weight, model.config.signal_noise_ratio)
        else:
            state[name].copy_(weight)
    for name, weight in state.items():
        if "lambda_q2" in name or "lambda_k2" in name:
            weight.copy_(state[name.replace("2", "1")])
        elif "lambda_proj" in name:
            weight.zero_()
    return model


def put_signal_heads(into: Tensor, heads: Tensor, ratio: int) -> None:
    """Write query heads to the signal heads of q_proj, whose rows are groups [signal_1 … signal_r, noise]."""
    for i, head in enumerate(heads.split(HEAD_DIM)):
        row = (i // ratio * (ratio + 1) + i % ratio) * HEAD_DIM
        into[row : row + HEAD_DIM] = head


@torch.no_grad()
def decoded(model: PreTrainedModel, ids: Tensor, prompt: int) -> Tensor:
    """Logits of a prompt, and then of single tokens with a cache."""
    cache = DynamicCache(config=model.config)
    sizes = [prompt] + [1] * (ids.shape[1] - prompt)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("zero", LAMBDA_ZERO.values(), ids=LAMBDA_ZERO)
@pytest.mark.parametrize("num_noise", [1, 2, 6], ids="noise{}".format)
@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 6}],
    ids=["plain", "tied", "biases", "multi-head"],
)
def test_llama(fields: dict[str, Any], num_noise: int, zero: dict[str, Any]) -> None:
    """With the Llama's weights as signal heads and λ = 0, for any noise heads."""
    llama = source_model(LlamaForCausalLM, LlamaConfig, **fields)
    ids = token_ids(2, 13)
    assert relative_error(logits(gda_like(llama, num_noise, **zero), ids), logits(llama, ids)) <= TOLERANCE


@pytest.mark.parametrize("zero", LAMBDA_ZERO.values(), ids=LAMBDA_ZERO)
def test_nonzero_lambda_changes_the_logits(zero: dict[str, Any]) -> None:
    """So the agreement with the Llama depends on λ = 0."""
    llama = source_model(LlamaForCausalLM, LlamaConfig)
    model, ids = gda_like(llama, **zero), token_ids(2, 13)
    for name, parameter in model.named_parameters():
        if "lambda_q2" in name or "lambda_proj" in name:
            parameter.data.add_(0.1)
    assert relative_error(logits(model, ids), logits(llama, ids)) > 1e-3


FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 5.0]}
LENGTHS = {"within": 8, "beyond": 24}  # max_position_embeddings is 16
ROPE = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "longrope": {"factor": 2.0, "original_max_position_embeddings": 16, **FACTORS},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "proportional": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kind", ROPE)
def test_rope_types(kind: str, length: int) -> None:
    """Every RoPE type of transformers, below and above the trained length."""
    rope = {"rope_type": kind, "rope_theta": 100.0, **ROPE[kind]}
    llama = source_model(LlamaForCausalLM, LlamaConfig, rope_parameters=rope)
    model, ids = gda_like(llama, lambda_init=0.0), token_ids(2, length)
    expected = logits(llama, ids)
    assert relative_error(logits(model, ids), expected) <= TOLERANCE
    assert relative_error(decoded(model, ids, prompt=6), decoded(llama, ids, prompt=6)) <= TOLERANCE
    plain = logits(gda_like(llama, lambda_init=0.0, rope_parameters=SHAPE["rope_parameters"].copy()), ids)
    if kind != "default" and (kind, length) != ("dynamic", LENGTHS["within"]):
        assert relative_error(plain, expected) > 1e-3


def test_every_rope_type_is_tested() -> None:
    """The table above has every RoPE type of the installed transformers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPE) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("num_noise", [1, 2, 6], ids="noise{}".format)
def test_mistral_sliding_window(num_noise: int) -> None:
    """With and without a cache."""
    mistral = source_model(MistralForCausalLM, MistralConfig, sliding_window=5)
    model, ids = gda_like(mistral, num_noise, lambda_init=0.0), token_ids(2, 13)
    expected = logits(mistral, ids)
    assert model.config.layer_types == ["sliding_attention"] * 2
    assert relative_error(logits(model, ids), expected) <= TOLERANCE
    assert relative_error(decoded(model, ids, prompt=7), expected) <= TOLERANCE
    for other in (4, 6, None):
        moved = logits(gda_like(mistral, num_noise, lambda_init=0.0, sliding_window=other, layer_types=None), ids)
        assert relative_error(moved, expected) > 1e-3


def test_qwen2_biases() -> None:
    """Biases of q, k and v, and none of o_proj."""
    qwen = source_model(Qwen2ForCausalLM, Qwen2Config)
    model, ids = gda_like(qwen, lambda_init=0.0), token_ids(2, 13)
    attention = model.model.layers[0].self_attn
    assert [getattr(attention, f"{name}_proj").bias is not None for name in "qkvo"] == [True, True, True, False]
    assert relative_error(logits(model, ids), logits(qwen, ids)) <= TOLERANCE


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True}], ids=["plain", "biases"])
def test_qwen3_qk_norm(fields: dict[str, Any]) -> None:
    qwen = source_model(Qwen3ForCausalLM, Qwen3Config, **fields)
    model, ids = gda_like(qwen, lambda_init=0.0, qk_norm=True), token_ids(2, 13)
    assert relative_error(logits(model, ids), logits(qwen, ids)) <= TOLERANCE


def test_qwen3_mixed_layer_types() -> None:
    """Full attention in the first layers, and a sliding window in the others."""
    qwen = source_model(Qwen3ForCausalLM, Qwen3Config, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    model, ids = gda_like(qwen, lambda_init=0.0, qk_norm=True), token_ids(2, 13)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert relative_error(logits(model, ids), logits(qwen, ids)) <= TOLERANCE
    assert relative_error(decoded(model, ids, prompt=7), logits(qwen, ids)) <= TOLERANCE


def gda_like_diffllama(source: DiffLlamaForCausalLM) -> GDAForCausalLM:
    """A paired 1:1 GDA model with the weights of a DiffLlama.

    A DiffLlama's heads come in halves: all signal heads, then all noise heads; likewise the keys, and the slabs v1 and
    v2. In GDA, the two members of a pair are neighbours. A DiffLlama's head norm has no weight.
    """
    config = source.config
    fields = {name: getattr(config, name) for name in SHAPE} | {
        "num_noise_heads": config.num_attention_heads // 2,
        "rope_parameters": dict(config.rope_parameters),
        "attention_bias": config.attention_bias,
        "kv_layout": "paired",
        "head_norm": True,
        "head_norm_eps": config.rms_norm_eps,
    }
    model = tiny_model(tiny_config(**fields))
    state = model.state_dict()
    for name, weight in source.state_dict().items():
        if any(f"{letter}_proj" in name for letter in "qkv"):
            first, second = (half.split(HEAD_DIM) for half in weight.chunk(2))
            weight = torch.cat([head for pair in zip(first, second, strict=True) for head in pair])
        state[name].copy_(weight)
    for layer in model.model.layers:
        layer.self_attn.subln.weight.data.fill_(1.0)
    return model


@pytest.mark.parametrize("key_value", [8, 4, 2], ids="kv{}".format)
@pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "rms_norm_eps": 0.01}], ids=["plain", "biases"])
def test_diffllama(fields: dict[str, Any], key_value: int) -> None:
    """The paired layout at 1:1 with head norm and a different λ in each layer, with and without a cache."""
    source = source_model(
        DiffLlamaForCausalLM,
        DiffLlamaConfig,
        hidden_size=32,
        num_attention_heads=8,
        num_key_value_heads=key_value,
        num_hidden_layers=3,
        **fields,
    )
    model, ids = gda_like_diffllama(source), token_ids(2, 13)
    expected = logits(source, ids)
    assert relative_error(logits(model, ids), expected) <= TOLERANCE
    assert relative_error(decoded(model, ids, prompt=7), expected) <= TOLERANCE
    for layer in model.model.layers:
        layer.self_attn.lambda_q1.data.mul_(1.1)
    assert relative_error(logits(model, ids), expected) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_equals_llamas_bit_for_bit(dtype: torch.dtype) -> None:
    """So that a converted model can equal its source exactly."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 11, heads, 6, generator=generator).to(dtype) for heads in (5, 2))
    angles = torch.randn(2, 11, 3, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    for got, wanted in zip(rotate(query, key, cos, sin), expected, strict=True):
        assert torch.equal(got.transpose(1, 2), wanted)
