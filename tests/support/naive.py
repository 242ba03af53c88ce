"""Grouped differential attention in plain loops: the reference for the fast implementation.

Written from the equations. It reads weights by their names in a checkpoint and calls no code of the model. With S
signal heads, N noise heads and r = S / N, signal head i = 0 … S − 1 of a layer gives

    out_i = A_i V_i − λ_i · A_noise(i) V_i        A = softmax(q kᵀ / √d) over the visible tokens

and the layer's output is W_O · concat_i(norm(out_i)). Noise head i // r serves signal head i.

In masked growth, the output of every new signal head, neuron and layer is multiplied by m = `fade`, or a new layer is
blended: m · layer(x) + (1 − m) · x. While λ is faded
in, λ_i is (1 − m) · m · target + m · λ_i as computed from its parameters. While the head norm is faded in, it gives
(1 − m) · out_i + m · norm(out_i).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gda import GDAConfig

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class NaiveOutput:
    """`logits` (B, T, vocab_size) and, for each layer, the differential maps A_i − λ_i · A_noise(i) (B, S, T, T)."""

    logits: Tensor
    maps: list[Tensor]


def run(
    state: State,
    config: GDAConfig,
    input_ids: Tensor,
    padding_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> NaiveOutput:
    """Logits and maps of token ids (B, T). `padding_mask` (B, T) is 0 for padding, which no token sees.

    `rotation` are cosines and sines (T, head_dim) to use instead of those of plain RoPE.
    """
    state = {name: weight.to(dtype) for name, weight in state.items()}
    cos, sin = rotation or rope(config, input_ids.shape[1])
    logits, maps = [], []
    for row, ids in enumerate(input_ids):
        real = torch.ones_like(ids, dtype=torch.bool) if padding_mask is None else padding_mask[row].bool()
        x = state["model.embed_tokens.weight"][ids]
        row_maps = []
        for layer in range(config.num_hidden_layers):
            weights = {
                name.removeprefix(f"model.layers.{layer}."): weight
                for name, weight in state.items()
                if name.startswith(f"model.layers.{layer}.")
            }
            window = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
            before = x
            normed = rms_norm(x, weights["input_layernorm.weight"], config.rms_norm_eps)
            attended, layer_maps = attention(
                normed, weights, config, layer, cos.to(dtype), sin.to(dtype), visible(real, window)
            )
            is_new = layer in (config.masked_layers or [])
            m = config.fade if is_new and not config.blended_layers else 1.0
            x = x + m * attended
            normed = rms_norm(x, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
            x = x + m * mlp(normed, weights, config, layer)
            if is_new and config.blended_layers:
                x = config.fade * x + (1 - config.fade) * before
            row_maps.append(layer_maps)
        x = rms_norm(x, state["model.norm.weight"], config.rms_norm_eps)
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        logits.append(x @ state[head].T)
        maps.append(row_maps)
    return NaiveOutput(torch.stack(logits), [torch.stack(layer_maps) for layer_maps in zip(*maps, strict=True)])


def attention(
    x: Tensor, weights: State, config: GDAConfig, layer: int, cos: Tensor, sin: Tensor, may_see: Tensor
) -> tuple[Tensor, Tensor]:
    """Output (T, hidden) and differential maps (S, T, T) of one layer for one sequence x (T, hidden)."""
    query_heads = projected_heads(x, weights, config, "q")
    key_heads = projected_heads(x, weights, config, "k")
    value_heads = heads(linear(x, weights, "self_attn.v_proj"), config.head_dim)
    if config.qk_norm:
        query_heads = [rms_norm(q, weights["self_attn.q_norm.weight"], config.rms_norm_eps) for q in query_heads]
        key_heads = [rms_norm(k, weights["self_attn.k_norm.weight"], config.rms_norm_eps) for k in key_heads]
    query_heads = [rotate(q, cos, sin) for q in query_heads]
    key_heads = [rotate(k, cos, sin) for k in key_heads]

    num_noise = config.num_noise_heads
    num_signal = config.num_attention_heads - num_noise
    ratio = num_signal // num_noise
    outputs, maps = [], []
    for i in range(num_signal):
        noise = i // ratio
        # Rows of q_proj are groups [signal_1 … signal_r, noise], one group for each noise head.
        group = query_heads[noise * (ratio + 1) : (noise + 1) * (ratio + 1)]
        signal_query, noise_query = group[i % ratio], group[ratio]
        if config.kv_layout == "shared":
            kv_head = i // (num_signal // config.num_key_value_heads)
            signal_key = noise_key = key_heads[kv_head]
            value = value_heads[kv_head]
        else:
            num_pairs = config.num_key_value_heads // 2
            signal_pair = i // (num_signal // num_pairs)
            noise_pair = noise // (num_noise // num_pairs)
            signal_key, noise_key = key_heads[2 * signal_pair], key_heads[2 * noise_pair + 1]
            value = torch.cat((value_heads[2 * signal_pair], value_heads[2 * signal_pair + 1]), dim=-1)
        signal_map = attention_map(signal_query, signal_key, may_see)
        noise_map = attention_map(noise_query, noise_key, may_see)
        lambda_ = faded(lambda_of_head(x, weights, config, layer, i), config)
        output = signal_map @ value - lambda_ * (noise_map @ value)
        if config.head_norm:
            normed = rms_norm(output, weights["self_attn.subln.weight"], config.head_norm_eps)
            m = config.fade if config.faded_head_norm else 1.0
            output = (1 - m) * output + m * normed * (1 - lambda_init(config, layer))
        outputs.append(output * mask_of_head(config, layer, i))
        maps.append(signal_map - lambda_ * noise_map)
    return linear(torch.cat(outputs, dim=-1), weights, "self_attn.o_proj"), torch.stack(maps)


def projected_heads(x: Tensor, weights: State, config: GDAConfig, name: str) -> list[Tensor]:
    """Queries ("q") or keys ("k") (T, d) of each head.

    With qk_rank, role k of a group has the weight W_base + P_k R_k. Groups of queries are those of q_proj; keys are
    dense where signal and noise share them, and pairs of a signal and a noise key where they don't.
    """
    if config.qk_rank is None or (name == "k" and config.kv_layout == "shared"):
        return heads(linear(x, weights, f"self_attn.{name}_proj"), config.head_dim)
    if name == "q":
        groups = config.num_noise_heads
        roles = config.num_attention_heads // groups
    else:
        groups, roles = config.num_key_value_heads // 2, 2
    width, rank = config.head_dim, config.qk_rank
    base, down, up = (weights[f"self_attn.{name}_{part}.weight"] for part in ("base", "down", "up"))
    projected = []
    for group in range(groups):
        for role in range(roles):
            head = group * roles + role
            w_base = base[group * width : (group + 1) * width]
            p = up[head * width : (head + 1) * width]
            r = down[head * rank : (head + 1) * rank]
            q = x @ (w_base + p @ r).T
            if config.attention_bias:
                q = q + weights[f"self_attn.{name}_up.bias"][head * width : (head + 1) * width]
            projected.append(q)
    return projected


def mask_of_head(config: GDAConfig, layer: int, signal_head: int) -> float:
    """m for the last `masked_signal_heads` of the signal heads that read the same keys, values and noise."""
    if config.masked_signal_heads is None or is_faded_as_a_whole(config, layer):
        return 1.0
    num_signal = config.num_attention_heads - config.num_noise_heads
    sets = config.num_key_value_heads if config.kv_layout == "shared" else config.num_key_value_heads // 2

    def read_by(i: int) -> tuple[int, int]:
        return i // (num_signal // sets), i // (num_signal // config.num_noise_heads)

    same = [i for i in range(num_signal) if read_by(i) == read_by(signal_head)]
    return config.fade if signal_head in same[-config.masked_signal_heads :] else 1.0


def is_faded_as_a_whole(config: GDAConfig, layer: int) -> bool:
    """Whether a layer is new and random. In a new copy, new heads and neurons are masked as in its original."""
    return layer in (config.masked_layers or []) and not config.blended_layers


def attention_map(query: Tensor, key: Tensor, may_see: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) (T, T) of one head."""
    scores = query @ key.T / math.sqrt(query.shape[-1])
    return scores.masked_fill(~may_see, -math.inf).softmax(dim=-1)


def lambda_of_head(x: Tensor, weights: State, config: GDAConfig, layer: int, signal_head: int) -> Tensor:
    """λ of one signal head: (T, 1), or (1, 1) for one λ per layer."""
    if config.lambda_type == "reparameterized":
        q1, k1, q2, k2 = (weights[f"self_attn.lambda_{name}"] for name in ("q1", "k1", "q2", "k2"))
        return ((q1 @ k1).exp() - (q2 @ k2).exp() + lambda_init(config, layer)).reshape(1, 1)
    projected = x @ weights["self_attn.lambda_proj.weight"][signal_head]
    return (torch.sigmoid(projected) if config.lambda_type == "sigmoid" else torch.tanh(projected)).unsqueeze(-1)


def faded(lambda_: Tensor, config: GDAConfig) -> Tensor:
    """(1 − α) · (t / T) · λ_target + α · λ_learned with α = t / T."""
    if config.lambda_target is None:
        return lambda_
    t = alpha = config.fade
    return (1 - alpha) * t * config.lambda_target + alpha * lambda_


def lambda_init(config: GDAConfig, layer: int) -> float:
    """λ_init of a layer, counted from 0: one value, a value per layer, or 0.8 − 0.6 · exp(−0.3 · (layer + offset))."""
    if config.lambda_init is None:
        return 0.8 - 0.6 * math.exp(-0.3 * (layer + config.lambda_init_offset))
    return config.lambda_init[layer] if isinstance(config.lambda_init, list) else config.lambda_init


def visible(real: Tensor, window: int | None) -> Tensor:
    """(T, T): whether token t sees token s. Every token sees itself, so that rows of padding are defined."""
    is_real = real.tolist()
    tokens = range(len(is_real))
    reach = len(is_real) if window is None else window
    return torch.tensor([[s == t or (t - reach < s < t and is_real[s]) for s in tokens] for t in tokens])


def mlp(x: Tensor, weights: State, config: GDAConfig, layer: int) -> Tensor:
    """W_down (m · act(W_gate x) · W_up x)."""
    gate = linear(x, weights, "mlp.gate_proj")
    m = torch.ones_like(gate)
    if config.masked_neurons is not None and not is_faded_as_a_whole(config, layer):
        m[..., -config.masked_neurons :] = config.fade
    if config.hidden_act == "poly_norm":
        gate = poly_norm(gate, weights["mlp.act_fn.weight"], weights["mlp.act_fn.bias"], m)
    else:
        assert config.hidden_act == "silu"
        gate = gate * torch.sigmoid(gate)
    return linear(m * gate * linear(x, weights, "mlp.up_proj"), weights, "mlp.down_proj")


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, m: Tensor) -> Tensor:
    """w₀ · n(x³) + w₁ · n(x²) + w₂ · n(x) + b with n(z) = z / √(mean(z²) + 1e-6), a mean weighted by m."""
    total = bias
    for w, power in zip(weight, (3, 2, 1), strict=True):
        z = x**power
        mean = (m * z * z).sum(dim=-1, keepdim=True) / m.sum(dim=-1, keepdim=True)
        total = total + w * z / torch.sqrt(mean + 1e-6)
    return total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w · x / √(mean(x²) + ε)."""
    return weight * x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)


def rope(config: GDAConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, head_dim) of plain RoPE: angle t · θ^(−2j / d) at positions j and j + d / 2."""
    theta, width = config.rope_parameters["rope_theta"], config.head_dim
    frequencies = [theta ** (-2 * j / width) for j in range(width // 2)]
    angles = torch.tensor(
        [[t * frequency for frequency in frequencies * 2] for t in range(length)], dtype=torch.float64
    )
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_j, x_{j + d / 2}) of each token by its angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def heads(x: Tensor, width: int) -> list[Tensor]:
    """(T, H · d) → H tensors (T, d)."""
    return list(x.split(width, dim=-1))


def linear(x: Tensor, weights: State, name: str) -> Tensor:
    """W x + b, or W x if the checkpoint has no bias."""
    product = x @ weights[f"{name}.weight"].T
    return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product
