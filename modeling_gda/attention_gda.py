# Copyright 2026 the authors of Grouped Differential Attention. Apache License 2.0, see
# https://www.apache.org/licenses/LICENSE-2.0. This file is of grouped-differential-attention 0.1.0, which saves it
# beside a model's weights, so that they load with transformers alone.
"""Grouped differential attention: two attention maps, subtracted."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm, eager_attention_forward

from .configuration_gda import GDAConfig

# The name under which this release of transformers passes a layer its cache; 5.24 changed it.
CACHE_ARGUMENT = next(
    (each.name for each in signature(Qwen3Attention.forward).parameters.values() if "Cache" in str(each.annotation)),
    "cache",
)
# The name under which a layer passes its own arguments on to `Cache.update`: before 5.4, and again from 5.24 on.
UPDATE_ARGUMENT = "kwargs" if CACHE_ARGUMENT == "cache" else None
if "cache_kwargs" in signature(Cache.update).parameters:
    UPDATE_ARGUMENT = "cache_kwargs"

Pair = tuple[Tensor, Tensor]  # signal and noise heads, or keys and values


class UnusedCacheError(TypeError):
    """A cache was passed under an unknown name; decoding without it would give other text."""


class GDARMSNormOfHead(nn.Module):
    """RMSNorm over the width of one head's output, scaled by 1 − λ_init (arXiv 2410.05258, equation 3).

    transformers initializes what is called "RMSNorm"; a name that ends in it would make serving engines replace the
    module by a norm of their own, which has no scale.
    """

    def __init__(self, width: int, eps: float, scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps
        self.scale = scale

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Allocates one tensor of this size, where Llama's norm allocates three.
        wide = hidden_states.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / wide.shape[-1]
        weight = self.weight.float() * self.scale
        return (wide * weight).mul_(torch.rsqrt(mean_square + self.variance_epsilon)).to(hidden_states.dtype)


class Fade(nn.Module):
    """The config's `fade`, from 0 to 1, as a tensor, which compiled models read in every step."""

    value: Tensor

    def __init__(self, config: GDAConfig):
        super().__init__()
        self.register_buffer("value", torch.tensor(config.fade, dtype=torch.float32), persistent=False)

    def forward(self, is_new: Tensor) -> Tensor:
        """A factor for each part: the value where it is new, else 1 (Masked Structure Growth, arXiv 2305.02869)."""
        return torch.where(is_new, self.value, 1.0)


class Subtraction(nn.Module):
    """signal − λ · noise, in float32 and then in the signal's dtype. As a module, forward hooks can observe it.

    Of S signal heads in C groups, signal is (B, T, C, S/C, width), noise (B, T, C, 1, width) and λ (1,) or (B, T, S).
    The width is that of the outputs or, where attention maps are asked for, the number of keys.
    """

    def forward(self, signal: Tensor, noise: Tensor, lambda_: Tensor) -> Tensor:
        if lambda_.dim() > 1:  # (B, T, S) → (B, T, C, S/C, 1)
            lambda_ = lambda_.unflatten(-1, signal.shape[2:4]).unsqueeze(-1)
        return torch.addcmul(signal, lambda_, noise, value=-1).to(signal.dtype)


class LambdaProjection(nn.Module):
    """W_λ x in float32, whatever the model's dtype and under autocast: (B, T, hidden) → (B, T, S).

    It is not an `nn.Linear`, which quantizers would replace.
    """

    def __init__(self, hidden_size: int, num_signal_heads: int):
        super().__init__()
        self.in_features, self.out_features = hidden_size, num_signal_heads  # tensor parallelism reads them
        self.weight = nn.Parameter(torch.empty(num_signal_heads, hidden_size, dtype=torch.float32))

    def forward(self, hidden_states: Tensor) -> Tensor:
        device = hidden_states.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            return nn.functional.linear(hidden_states.float(), self.weight.float())


class SharedBase(nn.Linear):
    """W_base of each group: (…, hidden) → (…, groups · d). Its class tells how it is initialized."""


class HeadwiseUp(nn.Module):
    """P_k of the updates P_k R_k, one per head: (…, H · R) → (…, H · d). The weight is (H · d, R).

    It is not an `nn.Linear`, since each head reads only its own R of the H · R inputs.
    """

    def __init__(self, rank: int, num_heads: int, head_dim: int, bias: bool):
        super().__init__()
        self.rank, self.head_dim = rank, head_dim
        self.in_features, self.out_features = num_heads * rank, num_heads * head_dim  # tensor parallelism reads them
        self.weight = nn.Parameter(torch.empty(num_heads * head_dim, rank))
        self.bias = nn.Parameter(torch.empty(num_heads * head_dim)) if bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Tensor parallelism cuts inputs and weight alike, between heads.
        inputs = _local(hidden_states).unflatten(-1, (-1, self.rank))  # (…, H, R)
        weight = _local(self.weight).unflatten(0, (-1, self.head_dim))  # (H, d, R)
        output = torch.einsum("...hr,hdr->...hd", inputs, weight)
        if self.bias is not None:
            output = output + _local(self.bias).unflatten(0, (-1, self.head_dim)).to(output.dtype)
        return output.flatten(-2)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be distributed."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE of queries and keys (B, T, heads, d) by cosines and sines (B, T, d).

    Equals transformers' `apply_rotary_pos_emb` bit for bit, but allocates two tensors for each instead of five.
    """
    half = cos.shape[-1] // 2
    cos, signed = cos.unsqueeze(2), torch.cat((-sin[..., :half], sin[..., half:]), dim=-1).unsqueeze(2)

    def rotated(states: Tensor) -> Tensor:
        return states.roll(half, dims=-1).mul_(signed).add_(states * cos)

    return rotated(query), rotated(key)


class GDAAttention(nn.Module):
    r"""
    Grouped differential attention (arXiv 2510.06949) over keys and values that signal and noise heads share.

    With S signal heads, N noise heads and r = S / N, rows of q_proj are N groups of ``[signal_1 … signal_r, noise]``.
    That order keeps each group beside the KV head it reads, so all query heads go through **one** call of the
    attention interface, as in Llama, and the subtraction follows:

        q heads     s s s s n  s s s s n  …      one call   →  o = softmax(q kᵀ) v
        KV heads        0          1      …                →  out_i = o_i − λ_i · o_noise(i)

    With fewer noise heads than KV heads, each noise query is repeated for the KV heads of its group before the call.

    With `qk_rank` the heads of a group share a base: q = W_base x + P_k (R_k x) (arXiv 2501.17900), in the same order.
    """

    q_proj: Callable[[Tensor], Tensor]
    k_proj: Callable[[Tensor], Tensor]
    v_proj: Callable[[Tensor], Tensor]
    lambda_vectors = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")  # where λ is reparameterized

    def __init__(self, config: GDAConfig, layer_idx: int):
        super().__init__()
        _refuse_engine(config)
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_type(layer_idx) == "sliding_attention" else None
        self.num_signal_per_noise = config.signal_noise_ratio
        # In the shared layout a noise query may serve several KV heads: the call sees it once for each of them.
        copies = config.num_key_value_heads // config.num_noise_heads if config.kv_layout == "shared" else 1
        self.num_noise_copies = max(1, copies)
        heads_in_call = config.num_signal_heads + config.num_noise_heads * self.num_noise_copies
        self.num_key_value_groups = heads_in_call // config.num_key_value_heads
        self._add_projection("q", config.num_attention_heads)
        self._add_projection("k", config.num_key_value_heads)
        self._add_projection("v", config.num_key_value_heads)
        self._bind_factored_projections()
        width = config.num_signal_heads * config.value_width
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bool(config.attention_out_bias))
        self.q_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.lambda_init = config.layer_lambda_init(layer_idx)
        self.lambda_activation = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}.get(config.lambda_type)
        if self.lambda_activation is None:
            for name in self.lambda_vectors:
                setattr(self, name, nn.Parameter(torch.empty(self.head_dim, dtype=torch.float32)))
        else:
            self.lambda_proj = LambdaProjection(config.hidden_size, config.num_signal_heads)
        self.subtract = Subtraction()
        self.subln: GDARMSNormOfHead | None = None
        if config.head_norm:
            self.subln = GDARMSNormOfHead(config.value_width, config.head_norm_eps, 1.0 - self.lambda_init)
        self.fade = None if config.fade is None else Fade(config)
        self.is_new = config.is_new_layer(layer_idx)
        self.num_masked_heads = 0 if self.is_new else config.masked_signal_heads or 0

    def _add_projection(self, name: str, num_heads: int) -> None:
        """Add `q_proj`, or with `qk_rank` `q_base`, `q_down` and `q_up`; `k` and `v` likewise."""
        config, rank = self.config, self.config.qk_rank
        if rank is None or name not in config.factored_projections:
            width = num_heads * self.head_dim
            setattr(self, f"{name}_proj", nn.Linear(config.hidden_size, width, bias=config.attention_bias))
            return
        groups = num_heads // config.factored_projections[name]
        setattr(self, f"{name}_base", SharedBase(config.hidden_size, groups * self.head_dim, bias=False))
        setattr(self, f"{name}_down", nn.Linear(config.hidden_size, num_heads * rank, bias=False))
        setattr(self, f"{name}_up", HeadwiseUp(rank, num_heads, self.head_dim, bias=config.attention_bias))

    def _bind_factored_projections(self) -> None:
        """Make functions of `q_proj` and, with paired keys, `k_proj`."""
        for name in self.config.factored_projections:
            setattr(self, f"{name}_proj", partial(self._project_by_factors, name))

    def _replicate_for_data_parallel(self) -> "GDAAttention":
        replica = super()._replicate_for_data_parallel()
        replica._bind_factored_projections()  # to the replica's weights
        return replica

    def _project_by_factors(self, name: str, hidden_states: Tensor) -> Tensor:
        """Queries or keys (B, T, heads · d), heads in the order of a dense projection's rows."""
        base = getattr(self, f"{name}_base")(hidden_states)
        update = getattr(self, f"{name}_up")(getattr(self, f"{name}_down")(hidden_states))
        base = base.unflatten(-1, (-1, 1, self.head_dim))  # (B, T, groups, 1, d)
        roles = self.config.factored_projections[name]
        return (base + update.unflatten(-1, (-1, roles, self.head_dim))).flatten(-3)

    def forward(
        self,
        hidden_states: Tensor,  # (B, T, hidden)
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output (B, T, hidden) and, from eager if asked for, the differential maps (B, S, T, T_kv)."""
        # The projections and the one call of the interface are written as in Llama, since vLLM reads this source.
        hidden_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape))
        key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape))
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        query_states, key_states = rotate(query_states, key_states, *position_embeddings)
        query_states, key_states = query_states.transpose(1, 2), key_states.transpose(1, 2)
        key_states, value_states = self._update_cache(key_states, value_states, position_embeddings, kwargs)
        lambda_ = self.compute_lambda(hidden_states)

        attention_interface: Callable = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attention_interface = partial(self.attend, attention_interface)
        outputs, maps = attention_interface(
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        if maps is None:
            output, difference = self.subtract(*outputs, lambda_), None
        else:
            difference = self.subtract(*maps, lambda_).flatten(2, 3).transpose(1, 2)
            output = self.apply_maps(difference, value_states)  # so that the maps have a gradient
        if self.subln is not None:
            normed = self.subln(output)
            if self.fade is not None and self.config.faded_head_norm:
                normed = torch.lerp(output, normed, self.fade.value.to(output.dtype))
            output = normed
        if self.num_masked_heads:
            output = self.mask_new_heads(output)
        output = self.o_proj(output.reshape(*hidden_states.shape[:-1], -1))
        if self.fade is not None and self.is_new:
            output = output * self.fade.value
        return output, difference

    def _update_cache(self, key: Tensor, value: Tensor, rotation: Pair, kwargs: dict[str, Any]) -> Pair:
        """Put keys and values (B, G, T, d) into the cache, if there is one, and return all that it holds.

        Raises:
            UnusedCacheError: if `kwargs` holds a cache under a name that this release does not use.
        """
        cache = kwargs.pop(CACHE_ARGUMENT, None)
        for name, argument in kwargs.items():
            paged = name == "cache" and not isinstance(argument, Cache)  # before 5.24 the interface updates it
            if not paged and (isinstance(argument, Cache) or type(argument).__name__.endswith("Cache")):
                raise UnusedCacheError(
                    f"GDAAttention got a {type(argument).__name__} as `{name}`, and from transformers "
                    f"{transformers.__version__} expects it as `{CACHE_ARGUMENT}`; update the model's code"
                )
        if cache is None:
            return key, value
        arguments = {} if UPDATE_ARGUMENT is None else {UPDATE_ARGUMENT: kwargs}
        if UPDATE_ARGUMENT == "cache_kwargs":  # a cache that drops keys has to rotate those that it keeps
            arguments = {UPDATE_ARGUMENT: kwargs | dict(zip(("cos", "sin"), rotation, strict=True))}
        return cache.update(key, value, self.layer_idx, **arguments)

    def compute_lambda(self, hidden_states: Tensor) -> Tensor:
        """λ in float32 whatever the model's dtype: (1,), or (B, T, S) where it depends on the token."""
        if self.lambda_activation is not None:
            lambda_ = self.lambda_activation(self.lambda_proj(hidden_states))
        else:
            q1, k1, q2, k2 = (getattr(self, name).float() for name in self.lambda_vectors)
            lambda_ = (q1 * k1).sum(0, keepdim=True).exp() - (q2 * k2).sum(0, keepdim=True).exp() + self.lambda_init
        if self.fade is not None and self.config.lambda_target is not None:
            fade = self.fade.value.float()
            lambda_ = (1 - fade) * fade * self.config.lambda_target + fade * lambda_
        return lambda_

    def mask_new_heads(self, output: Tensor) -> Tensor:
        """Multiply the outputs of new signal heads by `fade`: (B, T, C, S/C, width) → (B, T, groups, r, width)."""
        assert self.fade is not None
        size = self.config.signal_group_size
        mask = self.fade(torch.arange(size, device=output.device) >= size - self.num_masked_heads)
        return output.flatten(2, 3).unflatten(2, (-1, size)) * mask.unsqueeze(-1).to(output.dtype)

    def attend(
        self, interface: Callable, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Pair, Pair | None]:
        """Call the attention interface with queries (B, H, T, d), keys and values (B, G, T_kv, d).

        Returns:
            Outputs of signal heads (B, T, C, S/C, width) and noise heads (B, T, C, 1, width), where C is the number of
            noise heads in the call; and their maps, likewise with T_kv for the width, from eager if they are asked for.
        """
        ratio, copies = self.num_signal_per_noise, self.num_noise_copies
        batch, _, length, width = query.shape
        if copies > 1:  # [s1 s2 s3 s4 n] becomes [s1 s2 n s3 s4 n]
            signal, noise = query.unflatten(1, (-1, ratio + 1)).split([ratio, 1], dim=2)
            signal = signal.unflatten(2, (copies, -1))  # (B, N, copies, S / (N · copies), T, d)
            noise = noise.unsqueeze(2).expand(-1, -1, copies, -1, -1, -1)
            query = torch.cat((signal, noise), dim=3).flatten(1, 3)
        output, maps = _call(interface, self, query, key, value, mask, **kwargs)
        sizes = [ratio // copies, 1]
        # Serving engines return the outputs of one sequence as (T, H · d).
        outputs = output.reshape(batch, length, -1, sum(sizes), width).split(sizes, dim=3)
        return outputs, None if maps is None else maps.unflatten(2, (-1, sum(sizes))).split(sizes, dim=3)

    @staticmethod
    def apply_maps(maps: Tensor, value: Tensor) -> Tensor:
        """Maps (B, S, T, T_kv) and values (B, G, T_kv, width) → outputs (B, T, G, S/G, width)."""
        grouped = maps.unflatten(1, (value.shape[1], -1))  # (B, G, S/G, T, T_kv)
        return (grouped @ value.unsqueeze(2)).permute(0, 3, 1, 2, 4)


class GDAPairedAttention(GDAAttention):
    r"""
    Grouped differential attention with separate keys for signal and noise (DIFF Transformer V1, Motif-2).

    KV heads come in pairs. Of a pair, the signal heads read key 0, the noise heads key 1, and both read the two value
    slabs v1 and v2 as one value of width 2 · head_dim. No backend has a fast kernel for values wider than keys, so
    there is one call per slab, and the halves are joined before the subtraction.

        signal heads ── key 0 ──┬── v1 ──┐
                                └── v2 ──┤  out_i = [o1_i − λ_i · o1_noise(i) , o2_i − λ_i · o2_noise(i)]
        noise heads  ── key 1 ──┬── v1 ──┤
                                └── v2 ──┘
    """

    def attend(
        self, interface: Callable, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Pair, Pair | None]:
        """As in the shared layout, with C = N and outputs of width 2 · d, by four calls of the interface."""
        if key.shape[1] % 2:
            raise ValueError(
                f"this rank holds {key.shape[1]} of {self.config.num_key_value_heads} KV heads, which cuts a pair; "
                "GDAConfig.num_key_value_heads must be a multiple of twice the tensor-parallel size"
            )
        if (cache := kwargs.pop("cache", None)) is not None:  # before transformers 5.24 each call would update it
            if self.config._attn_implementation == "paged|eager" or "kwargs" not in signature(cache.update).parameters:
                raise ValueError(
                    'continuous batching of kv_layout="paired" needs transformers 5.24, or 5.19 with sdpa or flash '
                    f"attention; this is {transformers.__version__}"
                )
            key, value = cache.update(key, value, self.layer_idx, kwargs)
        batch, _, length, _ = query.shape
        ratio = self.num_signal_per_noise
        outputs, maps = [], []
        for member, heads in enumerate(query.unflatten(1, (-1, ratio + 1)).split([ratio, 1], dim=2)):
            size = heads.shape[2]
            heads = heads.flatten(1, 2)
            module = _HeadsOfAttention(self, heads.shape[1] // (key.shape[1] // 2))
            halves = []
            for slab in (0, 1):
                keys, values = key[:, member::2], value[:, slab::2]
                starts = {"k_cache": member, "v_cache": slab}  # block tables (blocks, block size, G, d), where in use
                caches = {name: kwargs[name][:, :, start::2] for name, start in starts.items() if name in kwargs}
                output, map_ = _call(interface, module, heads, keys, values, mask, **(kwargs | caches))
                halves.append(output.reshape(batch, length, -1, size, self.head_dim))
            outputs.append(torch.cat(halves, dim=-1))
            if map_ is not None:
                maps.append(map_.unflatten(2, (-1, size)))
        return (outputs[0], outputs[1]), (maps[0], maps[1]) if maps else None

    @staticmethod
    def apply_maps(maps: Tensor, value: Tensor) -> Tensor:
        """Maps (B, S, T, T_kv) and slabs (B, G, T_kv, d) → outputs (B, T, G/2, 2S/G, 2d)."""
        return GDAAttention.apply_maps(maps, torch.cat((value[:, 0::2], value[:, 1::2]), dim=-1))


def _call(
    interface: Callable, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """One call of the interface: outputs (B, T, H, d) and, from eager if asked for, maps (B, T, H, T_kv).

    In a decoding step the query heads of a KV head become rows of one query, so that keys and values are read once and
    not once per head. Only for backends that learn a row's position from the mask alone.
    """
    groups, implementation = module.num_key_value_groups, module.config._attn_implementation
    packs = query.shape[2] == 1 and groups > 1 and implementation in ("eager", "sdpa")
    packs = packs and kwargs.get("cache") is None  # a paged cache reads more of the module
    batch, heads, _, width = query.shape
    if packs:
        module, query = _HeadsOfAttention(module, 1), query.reshape(batch, -1, groups, width)
        kwargs["is_causal"] = False
        if mask is not None and mask.shape[1] > 1:  # one for each head
            mask = mask.reshape(batch, -1, groups, mask.shape[-1])
    output, maps = interface(module, query, key, value, mask, **kwargs)
    # Flex attention returns something else in the place of maps.
    if implementation != "eager" or not (kwargs.get("output_attentions") or module.config.output_attentions):
        maps = None
    if packs:  # (B, H / G, G, d) and (B, G, H / G, T_kv)
        output = output.transpose(1, 2).reshape(batch, 1, heads, width)
        maps = None if maps is None else maps.reshape(batch, heads, 1, -1)
    return output, None if maps is None else maps.transpose(1, 2)


class _HeadsOfAttention:
    """The attention module with another `num_key_value_groups`, for a call with some of its heads."""

    def __init__(self, attention: GDAAttention, num_key_value_groups: int):
        self._attention = attention
        self.num_key_value_groups = num_key_value_groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


def _refuse_engine(config: GDAConfig) -> None:
    """vLLM and SGLang give each layer one attention call, of `num_attention_heads` heads, with its KV cache."""
    engine = str(config._attn_implementation)
    paired, fewer = config.kv_layout == "paired", config.num_noise_heads < config.num_key_value_heads
    if engine.startswith(("vllm", "sglang")) and (paired or fewer):
        reason = 'kv_layout="paired"' if paired else "fewer noise heads than KV heads"
        raise ValueError(f"{engine} cannot run a model with {reason}; serve it with transformers (`gda serve`)")


ATTENTION_CLASSES = {"shared": GDAAttention, "paired": GDAPairedAttention}
