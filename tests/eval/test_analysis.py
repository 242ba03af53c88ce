"""Attention maps by layer, compared with the reference loops and the eager backend, and their statistics."""

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, GPT2Config, GPT2LMHeadModel

from gda import GDAForCausalLM
from gda.eval.attention.analysis import LayerAttention, MapStatistics, attention_arrays, visit_attention

from ..support import naive
from ..support.llamas import llama_model
from ..support.tiny import relative_error, tiny_model, token_ids

LENGTH = 13
PAIRED = {"kv_layout": "paired", "num_key_value_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "shared": {},
    "paired": PAIRED,
    "sigmoid": {"lambda_type": "sigmoid"},
    "tanh": {"lambda_type": "tanh"},
    "paired sigmoid": PAIRED | {"lambda_type": "sigmoid"},
    "paired tanh, head norm": PAIRED | {"lambda_type": "tanh", "head_norm": True},
    "a noise head over two KV heads": {"num_attention_heads": 10, "num_key_value_heads": 4, "lambda_type": "sigmoid"},
    "sliding": {"sliding_window": 5},
    "paired, one layer sliding": PAIRED | {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
    "qk_norm": {"qk_norm": True},
}


def visited(model: Any, ids: Tensor, **options: Any) -> list[LayerAttention]:
    layers: list[LayerAttention] = []
    visit_attention(model, ids, layers.append, **options)
    return layers


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> GDAForCausalLM:
    return tiny_model(**MODELS[request.param])


def test_differences_equal_the_loops(model: GDAForCausalLM) -> None:
    ids = token_ids(LENGTH)
    expected = naive.run(model.state_dict(), model.config, ids.unsqueeze(0)).maps
    layers = visited(model, ids)
    assert [maps.layer for maps in layers] == [0, 1]
    for maps, of_layer in zip(layers, expected, strict=True):
        assert relative_error(maps.difference, of_layer[0]) < 1e-5


def test_signal_noise_and_lambda_equal_the_loops(model: GDAForCausalLM) -> None:
    """In the first layer, whose input is known."""
    ids, config = token_ids(LENGTH), model.config
    state = {name: weight.double() for name, weight in model.state_dict().items()}
    prefix = "model.layers.0."
    weights = {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
    x = naive.rms_norm(state["model.embed_tokens.weight"][ids], weights["input_layernorm.weight"], config.rms_norm_eps)
    lambda_ = [naive.lambda_of_head(x, weights, config, 0, head)[:, 0] for head in range(config.num_signal_heads)]
    maps = visited(model, ids)[0]
    assert maps.noise is not None
    assert maps.lambda_ is not None
    assert relative_error(maps.lambda_, torch.stack([head.expand(LENGTH) for head in lambda_])) < 1e-5
    for kind in (maps.signal, maps.noise):
        assert torch.allclose(kind.sum(dim=-1), torch.ones(()))
        assert (kind >= 0).all()
    # difference = signal − λ · noise, and the difference is checked, so checking one of the two is enough.
    query, key = (
        naive.heads(naive.linear(x, weights, f"self_attn.{name}_proj"), config.head_dim) for name in ("q", "k")
    )
    if config.qk_norm:
        query = [naive.rms_norm(q, weights["self_attn.q_norm.weight"], config.rms_norm_eps) for q in query]
        key = [naive.rms_norm(k, weights["self_attn.k_norm.weight"], config.rms_norm_eps) for k in key]
    cos, sin = naive.rope(config, LENGTH)
    window = config.sliding_window if config.layer_types[0] == "sliding_attention" else None
    seen = naive.visible(torch.ones(LENGTH, dtype=torch.bool), window)
    ratio = config.signal_noise_ratio
    for i in range(config.num_signal_heads):
        group, place = divmod(i, ratio)
        if config.kv_layout == "shared":
            of_key = i // (config.num_signal_heads // config.num_key_value_heads)
        else:
            of_key = 2 * (i // (config.num_signal_heads // (config.num_key_value_heads // 2)))
        rotated = (naive.rotate(one, cos, sin) for one in (query[group * (ratio + 1) + place], key[of_key]))
        assert relative_error(maps.signal[i], naive.attention_map(*rotated, seen)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_differences_equal_output_attentions(name: str) -> None:
    """Bit for bit in the first layer; the inputs of later layers are rounded differently."""
    eager, sdpa = (tiny_model(attention=backend, **MODELS[name]) for backend in ("eager", "sdpa"))
    ids = token_ids(LENGTH)
    expected = eager(ids.unsqueeze(0), output_attentions=True).attentions
    for one in (eager, sdpa):
        first, second = visited(one, ids)
        assert torch.equal(first.difference, expected[0][0])
        assert relative_error(second.difference, expected[1][0]) < 2e-6


def test_a_llama_has_signal_maps_only() -> None:
    model, ids = llama_model(), token_ids(LENGTH)
    layers = visited(model, ids)
    model.set_attn_implementation("eager")
    for maps, expected in zip(layers, model(ids.unsqueeze(0), output_attentions=True).attentions, strict=True):
        assert torch.equal(maps.signal, expected[0])
        assert (maps.noise, maps.lambda_) == (None, None)
        assert maps.difference is maps.signal


@pytest.mark.parametrize("first_row", [1, 7, LENGTH - 1])
def test_first_row_does_not_change_the_rows_after_it(model: GDAForCausalLM, first_row: int) -> None:
    ids = token_ids(LENGTH)
    for whole, part in zip(visited(model, ids), visited(model, ids, first_row=first_row), strict=True):
        assert part.noise is not None
        assert part.lambda_ is not None
        assert whole.noise is not None
        assert whole.lambda_ is not None
        for of_whole, of_part in (
            (whole.signal[:, first_row:], part.signal),
            (whole.noise[:, first_row:], part.noise),
            (whole.lambda_[:, first_row:], part.lambda_),
        ):
            assert relative_error(of_part, of_whole) < 1e-5


@pytest.mark.slow
def test_one_layer_is_in_memory_at_a_time() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def visit(maps: LayerAttention) -> None:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        alive.extend(weakref.ref(tensor) for tensor in (maps.signal, maps.noise) if tensor is not None)

    for model in (tiny_model(num_hidden_layers=4), tiny_model(num_hidden_layers=4, **PAIRED)):
        alive.clear()
        visit_attention(model, token_ids(LENGTH), visit)
        assert len(alive) == 8


def test_the_model_is_not_changed() -> None:
    model = tiny_model().train()
    before = model(token_ids(1, LENGTH)).logits

    def fail(_: LayerAttention) -> None:
        raise KeyError("stop")

    visited(model, token_ids(LENGTH), first_row=3)
    with pytest.raises(KeyError, match="stop"):
        visit_attention(model, token_ids(LENGTH), fail)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert torch.equal(model(token_ids(1, LENGTH)).logits, before)


def test_a_model_without_a_head_and_one_in_bfloat16() -> None:
    model, ids = tiny_model(lambda_type="sigmoid"), token_ids(LENGTH)
    for whole, decoder in zip(visited(model, ids), visited(model.model, ids), strict=True):
        assert torch.equal(whole.difference, decoder.difference)
    half = model.bfloat16()
    half.set_attn_implementation("eager")
    expected = half(ids.unsqueeze(0), output_attentions=True).attentions
    for maps, of_layer in zip(visited(half, ids.unsqueeze(0)), expected, strict=True):
        assert maps.difference.dtype == torch.bfloat16
        assert relative_error(maps.difference, of_layer[0]) < 0.05


def test_unreadable_models_and_inputs_are_refused() -> None:
    diff_llama = DiffLlamaForCausalLM(
        DiffLlamaConfig(
            vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=8
        )
    )
    with pytest.raises(ValueError, match="gda convert"):
        visited(diff_llama, token_ids(2) % 9)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="no attention like Llama's"):
        visited(gpt2, token_ids(2) % 9)
    model = tiny_model()
    for ids in (token_ids(2, 3), torch.zeros(0, dtype=torch.long)):
        with pytest.raises(ValueError, match="one text"):
            visited(model, ids)
    for first_row in (-1, 3):
        with pytest.raises(ValueError, match="first_row"):
            visited(model, token_ids(3), first_row=first_row)


# ----------------------------------------------------------------------------------------------------------- statistics


def counted(rows: list[list[float]]) -> tuple[float, float, float]:
    """Entropy, first-token share and negative share of one head, row by row and token by token."""
    entropies, firsts, negatives = [], [], []
    for row in rows:
        total = sum(abs(a) for a in row)
        shares = [abs(a) / total for a in row]
        entropies.append(-sum(p * math.log(p) for p in shares if p > 0))
        firsts.append(shares[0])
        negatives.append(sum(-a for a in row if a < 0) / total)
    return tuple(sum(values) / len(rows) for values in (entropies, firsts, negatives))  # type: ignore[return-value]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first_row", [4, None])
def test_statistics_equal_the_loops(name: str, first_row: int | None) -> None:
    """By default over the rows from the second on."""
    model, ids = tiny_model(**MODELS[name]), token_ids(LENGTH)
    arrays = attention_arrays(model, ids, first_row=first_row)
    start = 1 if first_row is None else first_row
    for maps in visited(model, ids):
        assert maps.lambda_ is not None
        assert arrays.lambda_ is not None
        lambda_ = [sum(head[start:]) / (LENGTH - start) for head in maps.lambda_.tolist()]
        assert arrays.lambda_[maps.layer].tolist() == pytest.approx(lambda_, abs=1e-6)
        for kind, tensor in (("signal", maps.signal), ("noise", maps.noise), ("difference", maps.difference)):
            assert tensor is not None
            statistics = getattr(arrays, kind)
            expected = [counted(head[start:]) for head in tensor.double().tolist()]
            for index, measure in enumerate(("entropy", "first_token", "negative")):
                values = getattr(statistics, measure)[maps.layer].tolist()
                assert values == pytest.approx([head[index] for head in expected], abs=1e-5)
    assert arrays.signal.negative.max() == 0


def test_statistics_of_a_llama_and_of_one_token() -> None:
    arrays = attention_arrays(llama_model(), token_ids(LENGTH))
    assert (arrays.noise, arrays.difference, arrays.lambda_) == (None, None, None)
    assert arrays.signal.entropy.shape == (2, 4)
    one = attention_arrays(llama_model(), token_ids(1)).signal
    assert one.first_token[0].tolist() == [1.0] * 4
    assert one.entropy[0].tolist() == [0.0] * 4


def test_statistics_of_zeros_are_zero() -> None:
    statistics = MapStatistics.of_layer(torch.zeros(2, 3, 4))
    for measure in (statistics.entropy, statistics.first_token, statistics.negative):
        assert measure.tolist() == [0.0, 0.0]
