"""DIFF Transformer V1 and V2: state dicts of Microsoft's modules, against a plain reading of their forward.

The reading below is written head by head from what those modules do: interleaved RoPE by complex numbers, query heads
in pairs, and, in the naive V1 module, keys repeated before pairs are formed.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gda import GDAConfig, GDAForCausalLM
from gda.conversion.families.diff_transformer import (
    diff_v1_fields,
    diff_v2_fields,
    from_diff_v1,
    from_diff_v2,
    interleaved_to_half,
)

from ..support import naive
from ..support.relatives import random_state
from ..support.tiny import relative_error, tiny_config, tiny_model, token_ids

TOLERANCE = 1e-5
THETA = 100.0
TOKENS = 9


# -------------------------------------------------------------------------------------- what Microsoft's modules do


def turned(heads: Tensor) -> Tensor:
    """Interleaved RoPE of heads (H, T, d): neighbours are a complex number, turned by e^{i t θ^(−2j/d)}."""
    width = heads.shape[-1]
    rates = torch.tensor([THETA ** (-2 * j / width) for j in range(width // 2)], dtype=torch.float64)
    angles = torch.arange(heads.shape[1], dtype=torch.float64).unsqueeze(-1) * rates  # (T, d / 2)
    numbers = torch.view_as_complex(heads.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def causal_map(query: Tensor, key: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) (T, T), each token seeing itself and what is before it."""
    scores = query @ key.T / math.sqrt(query.shape[-1])
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


def split(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """W x of x (T, hidden), as `count` heads (count, T, width)."""
    return (x @ weight.double().T).unflatten(-1, (count, -1)).transpose(0, 1)


def v1_forward(state: dict[str, Tensor], x: Tensor, heads: int, kv_heads: int, depth: int, variant: str) -> Tensor:
    """V1 on one sequence x (T, hidden), `heads` and `kv_heads` counted in pairs."""
    query = turned(split(x, state["q_proj.weight"], 2 * heads))
    key = turned(split(x, state["k_proj.weight"], 2 * kv_heads))
    value = split(x, state["v_proj.weight"], kv_heads)
    repeats = heads // kv_heads
    q1, k1, q2, k2 = (state[f"lambda_{name}"].double() for name in ("q1", "k1", "q2", "k2"))
    start = 0.8 - 0.6 * math.exp(-0.3 * depth)
    weight = torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + start
    outputs = []
    for head in range(heads):
        if variant == "naive":  # 2 · kv_heads keys, each repeated, then read in pairs
            keys = key[2 * head // repeats], key[(2 * head + 1) // repeats]
        else:  # pairs of keys first, each pair repeated
            keys = key[2 * (head // repeats)], key[2 * (head // repeats) + 1]
        signal = causal_map(query[2 * head], keys[0])
        noise = causal_map(query[2 * head + 1], keys[1])
        output = (signal - weight * noise) @ value[head // repeats]
        normed = output / torch.sqrt((output**2).mean(-1, keepdim=True) + 1e-5) * state["subln.weight"].double()
        outputs.append((1 - start) * normed)
    return torch.cat(outputs, -1) @ state["out_proj.weight"].double().T


def v2_forward(state: dict[str, Tensor], x: Tensor, heads: int, kv_heads: int) -> Tensor:
    """V2 on one sequence x (T, hidden): one attention of 2 · heads queries, even ones minus σ(λ) times odd ones."""
    query = turned(split(x, state["q_proj.weight"], 2 * heads))
    key = turned(split(x, state["k_proj.weight"], kv_heads))
    value = split(x, state["v_proj.weight"], kv_heads)
    per_key = 2 * heads // kv_heads
    attended = [causal_map(query[i], key[i // per_key]) @ value[i // per_key] for i in range(2 * heads)]
    weight = torch.sigmoid(x @ state["lambda_proj.weight"].double().T)  # (T, heads)
    outputs = [attended[2 * i] - weight[:, i : i + 1] * attended[2 * i + 1] for i in range(heads)]
    return torch.cat(outputs, -1) @ state["o_proj.weight"].double().T


def v1_state(hidden: int, heads: int, kv_heads: int, seed: int = 0) -> dict[str, Tensor]:
    """Weights of one V1 module, by its names."""
    kv_width, width = hidden * kv_heads // heads, hidden // heads // 2
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (hidden, hidden),
        "k_proj.weight": (kv_width, hidden),
        "v_proj.weight": (kv_width, hidden),
        "out_proj.weight": (hidden, hidden),
        "subln.weight": (2 * width,),
    } | {f"lambda_{name}": (width,) for name in ("q1", "k1", "q2", "k2")}
    return random_state(shapes, seed=seed)


def v2_state(hidden: int, heads: int, kv_heads: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    """Weights of one V2 module, by its names."""
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (2 * heads * width, hidden),
        "k_proj.weight": (kv_heads * width, hidden),
        "v_proj.weight": (kv_heads * width, hidden),
        "o_proj.weight": (hidden, heads * width),
        "lambda_proj.weight": (heads, hidden),
    }
    return random_state(shapes, seed=seed)


# ---------------------------------------------------------------------------------------------------------- modules


@torch.no_grad()
def module_output(config: GDAConfig, layer: int, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the attention of `layer` computes of x (1, T, hidden) with `state` as its weights."""
    model = tiny_model(config).model
    attention = model.layers[layer].self_attn
    attention.load_state_dict(state)
    positions = torch.arange(x.shape[1]).unsqueeze(0)
    rotation = model.rotary_emb(x, position_ids=positions)
    return attention(x, position_embeddings=rotation)[0]


def config_of(fields: dict[str, Any], **changes: Any) -> GDAConfig:
    rope = {"rope_type": "default", "rope_theta": THETA}
    return tiny_config(**(fields | {"rope_parameters": rope, "num_hidden_layers": 3} | changes))


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "variant"),
    [(4, 4, "naive"), (4, 4, "flash"), (4, 2, "flash"), (6, 2, "flash"), (4, 1, "flash")],
)
def test_v1(heads: int, kv_heads: int, variant: str, layer: int) -> None:
    """A V1 module's weights in a paired layer give its outputs, λ_init by depth."""
    hidden = 16 * heads
    config = config_of(diff_v1_fields(hidden, heads, kv_heads))
    state, x = v1_state(hidden, heads, kv_heads), random_state({"x": (TOKENS, hidden)})["x"]
    expected = v1_forward(state, x.double(), heads, kv_heads, layer, variant)
    got = module_output(config, layer, from_diff_v1(state, config, variant=variant), x.unsqueeze(0))
    assert relative_error(got[0], expected) <= TOLERANCE


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, None), (4, 4), (4, 2), (6, 2), (4, 1)])
def test_v2(heads: int, kv_heads: int | None) -> None:
    """A V2 module's weights in a shared layer give its outputs."""
    config = config_of(diff_v2_fields(24, heads, kv_heads, 8))
    count = kv_heads or heads
    state, x = v2_state(24, heads, count, 8), random_state({"x": (TOKENS, 24)})["x"]
    expected = v2_forward(state, x.double(), heads, count)
    got = module_output(config, 1, from_diff_v2(state, config), x.unsqueeze(0))
    assert relative_error(got[0], expected) <= TOLERANCE


def test_the_order_of_rows_matters() -> None:
    """With q and k as they come, outputs are others: the agreement above rests on the permutation."""
    config = config_of(diff_v1_fields(64, 4))
    state, x = v1_state(64, 4, 4), random_state({"x": (TOKENS, 64)})["x"]
    mapped = from_diff_v1(state, config, variant="naive")
    plain = mapped | {name: state[name] for name in ("q_proj.weight", "k_proj.weight")}
    expected = v1_forward(state, x.double(), 4, 4, 0, "naive")
    assert relative_error(module_output(config, 0, plain, x.unsqueeze(0))[0], expected) > 1e-3


def test_the_variants_of_v1_agree_only_without_grouped_keys() -> None:
    """Why the naive module with grouped keys is refused: it computes something else of the same weights."""
    x = random_state({"x": (TOKENS, 64)})["x"].double()
    for kv_heads, same in ((4, True), (2, False)):
        state = v1_state(64, 4, kv_heads)
        outputs = [v1_forward(state, x, 4, kv_heads, 0, variant) for variant in ("naive", "flash")]
        assert (relative_error(*outputs) < 1e-12) == same
    with pytest.raises(ValueError, match="pairs repeated keys otherwise"):
        from_diff_v1(state, config_of(diff_v1_fields(64, 4, 2)), variant="naive")


# ----------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("version", [1, 2])
def test_a_model_whose_layers_hold_such_modules(version: int) -> None:
    """Attention modules under Llama's names for the rest, a layer λ_init of its own: logits of the mapped model."""
    fields = diff_v1_fields(64, 4, 2) if version == 1 else diff_v2_fields(64, 4, 2, 8)
    config = config_of(fields)
    theirs: dict[str, Tensor] = {
        name: tensor for name, tensor in tiny_model(config, seed=3).state_dict().items() if "self_attn" not in name
    }
    modules = []
    for layer in range(config.num_hidden_layers):
        module = v1_state(64, 4, 2, seed=layer) if version == 1 else v2_state(64, 4, 2, 8, seed=layer)
        modules.append(module)
        theirs |= {f"model.layers.{layer}.self_attn.{name}": tensor for name, tensor in module.items()}
    mapped = from_diff_v1(theirs, config, variant="flash") if version == 1 else from_diff_v2(theirs, config)
    model = GDAForCausalLM(config).eval()
    model.load_state_dict(mapped)

    ids = token_ids(1, TOKENS)
    x = theirs["model.embed_tokens.weight"][ids[0]].double()
    for layer, module in enumerate(modules):
        weights = {name: tensor.double() for name, tensor in theirs.items()}
        own = {name.removeprefix(f"model.layers.{layer}."): tensor for name, tensor in weights.items()}
        normed = naive.rms_norm(x, own["input_layernorm.weight"], config.rms_norm_eps)
        x = x + (v1_forward(module, normed, 4, 2, layer, "flash") if version == 1 else v2_forward(module, normed, 4, 2))
        normed = naive.rms_norm(x, own["post_attention_layernorm.weight"], config.rms_norm_eps)
        x = x + naive.mlp(normed, own, config, layer)
    expected = naive.rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T
    with torch.no_grad():
        assert relative_error(model(ids).logits[0], expected) <= TOLERANCE


# ------------------------------------------------------------------------------------------------------ permutation


@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 8), (2, 128)])
def test_interleaved_to_half(heads: int, width: int) -> None:
    """Neighbours 2j and 2j + 1 of a head end at j and j + d / 2; weights and biases alike."""
    rows = torch.arange(heads * width)
    moved = interleaved_to_half(rows, width)
    for head in range(heads):
        for j in range(width // 2):
            assert moved[head * width + j] == head * width + 2 * j
            assert moved[head * width + j + width // 2] == head * width + 2 * j + 1
    assert torch.equal(interleaved_to_half(rows.unsqueeze(-1).expand(-1, 5), width)[:, 4], moved)


def test_rotate_half_after_the_permutation_is_interleaved_rope() -> None:
    """Turned as GDA turns it, a permuted head is the permuted head that Microsoft's code turned."""
    head = random_state({"x": (TOKENS, 8)})["x"].double()
    cos, sin = naive.rope(config_of(diff_v1_fields(64, 4)), TOKENS)
    got = naive.rotate(interleaved_to_half(head.T, 8).T, cos, sin)
    assert relative_error(got, interleaved_to_half(turned(head.unsqueeze(0))[0].T, 8).T) < 1e-12


# -------------------------------------------------------------------------------------------------------- bad input


def test_fields_that_do_not_divide_are_refused() -> None:
    """In the words of Microsoft's arguments."""
    with pytest.raises(ValueError, match="embed_dim=60"):
        diff_v1_fields(60, 4)
    with pytest.raises(ValueError, match="num_kv_heads=3"):
        diff_v1_fields(64, 4, 3)
    with pytest.raises(ValueError, match="num_kv_heads=3"):
        diff_v2_fields(64, 4, 3, 8)
    with pytest.raises(ValueError, match="even width 5"):
        interleaved_to_half(torch.zeros(10, 2), 5)


def test_state_dicts_that_are_not_theirs_are_refused() -> None:
    """A wrong version, an unknown variant, a wrong shape, a stranger among the tensors: each is named."""
    v1, v2 = config_of(diff_v1_fields(64, 4)), config_of(diff_v2_fields(24, 4, 2, 8))
    state = v1_state(64, 4, 4)
    with pytest.raises(ValueError, match="lambda_proj"):
        from_diff_v2(state, v2)
    with pytest.raises(ValueError, match="kv_layout='paired', and DIFF V2"):
        from_diff_v2(v2_state(24, 4, 2, 8), v1)
    for changes, named in (
        ({"lambda_init_offset": -1}, "lambda_init_offset=-1, and DIFF V1 has 0"),
        ({"head_norm_eps": 1e-6}, "head_norm_eps"),
        ({"head_norm": False}, "head_norm=False"),
        ({"num_noise_heads": 2, "num_key_value_heads": 4}, "num_attention_heads"),
    ):
        with pytest.raises(ValueError, match=named):
            from_diff_v1(state, config_of(diff_v1_fields(64, 4) | changes), variant="flash")
    with pytest.raises(ValueError, match="fast"):
        from_diff_v1(state, v1, variant="fast")
    with pytest.raises(ValueError, match=r"k_proj.weight has shape \(32, 64\)"):
        from_diff_v1(state | {"k_proj.weight": state["k_proj.weight"][:32]}, v1, variant="flash")
    with pytest.raises(ValueError, match="gate_proj"):
        from_diff_v1(state | {"gate_proj.weight": state["q_proj.weight"]}, v1, variant="flash")
