# Copyright 2026 the authors of Grouped Differential Attention. Apache License 2.0, see
# https://www.apache.org/licenses/LICENSE-2.0. This file is of grouped-differential-attention 0.1.0, which saves it
# beside a model's weights, so that they load with transformers alone.
"""Grouped differential attention: two attention maps, subtracted."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward
from transformers.utils.generic import maybe_autocast

from .configuration_gda import GDAConfig


class GDARMSNormOfHead(LlamaRMSNorm):
    """RMSNorm over the width of one head's output, scaled by 1 − λ_init (arXiv 2410.05258, equation 3).

    The name must hold "RMSNorm", by which transformers knows what to initialize, and must not end in it: serving
    engines put a plain RMSNorm of their own in the place of every module whose name does, and the scale would be lost.
    """

    def __init__(self, width: int, eps: float, scale: float):
        super().__init__(width, eps=eps)
        self.scale = scale

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # One tensor of this size is made, where LlamaRMSNorm makes three.
        wide = hidden_states.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / wide.shape[-1]
        weight = self.weight.float() * self.scale
        return (wide * weight).mul_(torch.rsqrt(mean_square + self.variance_epsilon)).to(hidden_states.dtype)


class GrowthMask(nn.Module):
    """What new parts are multiplied by while a model grows (Masked Structure Growth, arXiv 2305.02869): from 0 to 1.

    The value is a tensor, so that a compiled model is not compiled again whenever it changes; the config keeps it.
    """

    value: torch.Tensor

    def __init__(self, config: GDAConfig):
        super().__init__()
        assert config.growth_mask is not None  # the config sees to it wherever something is new
        self.register_buffer("value", torch.tensor(config.growth_mask, dtype=torch.float32), persistent=False)

    def forward(self, is_new: torch.Tensor) -> torch.Tensor:
        """A factor for each part: the value where it is new, else 1."""
        return torch.where(is_new, self.value, 1.0)


class LambdaAnneal(nn.Module):
    """λ on its way from 0, over a target, to what is learned: (1 − a) · a · target + a · λ, with a from 0 to 1.

    As a mask of growth, a is a tensor that compiled models read anew, and the config keeps it.
    """

    value: torch.Tensor

    def __init__(self, config: GDAConfig):
        super().__init__()
        assert config.lambda_anneal is not None  # there would be none of these
        assert config.lambda_target is not None  # the config sees to it
        self.target = float(config.lambda_target)
        self.register_buffer("value", torch.tensor(config.lambda_anneal, dtype=torch.float32), persistent=False)

    def forward(self, lambda_: torch.Tensor) -> torch.Tensor:
        """What is subtracted by, where the parameters say λ; of its shape."""
        value = self.value.float()
        return (1 - value) * value * self.target + value * lambda_


class LambdaProjection(nn.Module):
    """W_λ x in float32, whatever the dtype of the model and under autocast: (B, T, hidden) → (B, T, S).

    It is no `nn.Linear`, for quantizers would take it for one of theirs.
    """

    def __init__(self, hidden_size: int, num_signal_heads: int):
        super().__init__()
        self.in_features, self.out_features = hidden_size, num_signal_heads  # tensor parallelism asks
        self.weight = nn.Parameter(torch.empty(num_signal_heads, hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), self.weight.float())


class SharedBase(nn.Linear):
    """W_base of each group: (…, hidden) → (…, groups · d). A class of its own, since it is initialized as no other."""


class HeadwiseUp(nn.Module):
    """P_k of the updates P_k R_k, for every head its own: (…, H · R) → (…, H · d). The weight is (H · d, R).

    It is no `nn.Linear`, for each head reads only its own R of the H · R inputs.
    """

    def __init__(self, rank: int, num_heads: int, head_dim: int, bias: bool):
        super().__init__()
        self.rank, self.head_dim = rank, head_dim
        self.in_features, self.out_features = num_heads * rank, num_heads * head_dim  # tensor parallelism asks
        self.weight = nn.Parameter(torch.empty(num_heads * head_dim, rank))
        self.bias = nn.Parameter(torch.empty(num_heads * head_dim)) if bias else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Tensor parallelism cuts inputs and weight alike, between heads: each rank has what belongs together.
        inputs = _local(hidden_states).unflatten(-1, (-1, self.rank))  # (…, H, R)
        weight = _local(self.weight).unflatten(0, (-1, self.head_dim))  # (H, d, R)
        output = torch.einsum("...hr,hdr->...hd", inputs, weight)
        if self.bias is not None:
            output = output + _local(self.bias).unflatten(0, (-1, self.head_dim)).to(output.dtype)
        return output.flatten(-2)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor that may be distributed."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE of queries and keys (B, T, heads, d), cosines and sines (B, T, d): what `apply_rotary_pos_emb` computes.

    Bit for bit, since a conversion starts equal to its Llama, but with two new tensors each instead of five: making a
    large tensor costs more than what is computed in it.
    """
    half = cos.shape[-1] // 2
    cos, signed = cos.unsqueeze(2), torch.cat((-sin[..., :half], sin[..., half:]), dim=-1).unsqueeze(2)

    def rotated(states: torch.Tensor) -> torch.Tensor:
        return states.roll(half, dims=-1).mul_(signed).add_(states * cos)

    return rotated(query), rotated(key)


class PackedQueries(nn.Module):
    """What a backend is told of query heads that were packed: there is one for each KV head."""

    num_key_value_groups = 1


class AttentionBranch(nn.Module):
    """One call of transformers' attention interface, for query heads that read the same number of KV heads each.

    It has no parameters: it is the module that an attention backend asks about heads, causality and layer.
    """

    def __init__(self, config: GDAConfig, layer_idx: int, num_key_value_groups: int, attention: Any):
        super().__init__()
        self._attention = (attention,)  # in a tuple, so that it is no submodule of the branch
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = num_key_value_groups
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.packed = PackedQueries()
        sliding = config.layer_type(layer_idx) == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        """Itself and the query projection: flash attention casts float32 queries to the dtype of a Linear it finds."""
        attention = self._attention[0]
        yield from (self, *(attention.q_proj if self.config.qk_rank is None else attention.q_base).modules())

    def forward(
        self,
        query: torch.Tensor,  # (B, H, T, d)
        key: torch.Tensor,  # (B, H / num_key_value_groups, T_kv, d)
        value: torch.Tensor,  # (B, H / num_key_value_groups, T_kv, d)
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return outputs (B, T, H, d) and, from the eager backend, attention maps (B, H, T, T_kv)."""
        implementation = self.config._attn_implementation
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        batch, heads, length, width = query.shape
        module: nn.Module = self
        # The query heads that read a KV head become the rows of one query, so that a step of decoding reads keys and
        # values once, not once for each of them. These backends know of a row only what its mask says.
        packed = length == 1 and self.num_key_value_groups > 1 and implementation in ("eager", "sdpa")
        if packed := packed and kwargs.get("cache") is None:  # no paged cache, which asks the module for more
            rows = (batch, -1, self.num_key_value_groups)
            module, query, kwargs = self.packed, query.reshape(*rows, width), kwargs | {"is_causal": False}
            if attention_mask is not None and attention_mask.shape[1] > 1:  # one for each head
                attention_mask = attention_mask.reshape(*rows, -1)
        output, maps = attention_interface(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        if packed:  # (B, H / G, G, d) and (B, G, H / G, T_kv)
            output = output.transpose(1, 2)
            maps = maps.reshape(batch, heads, 1, -1) if maps is not None else None
        # Serving engines return outputs as (T, H · d), of one sequence.
        output = output.reshape(batch, length, heads, -1)
        return output, maps if implementation in ("eager", "paged|eager") else None


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

    lambda_q1: nn.Parameter
    lambda_k1: nn.Parameter
    lambda_q2: nn.Parameter
    lambda_k2: nn.Parameter

    def __init__(self, config: GDAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_signal_per_noise = config.signal_noise_ratio
        self.num_roles = config.factored_projections  # heads that share a base, of projections that have one
        width = config.num_signal_heads * config.value_width
        self._add_projection("q", config.num_attention_heads)
        self._add_projection("k", config.num_key_value_heads)
        self._add_projection("v", config.num_key_value_heads)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bool(config.attention_out_bias))
        self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.lambda_init = config.layer_lambda_init(layer_idx)
        self.lambda_activation = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}.get(config.lambda_type)
        if self.lambda_activation is None:
            for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
                setattr(self, name, nn.Parameter(torch.empty(self.head_dim)))
        else:
            self.lambda_proj = LambdaProjection(config.hidden_size, config.num_signal_heads)
        self.subln: GDARMSNormOfHead | None = None
        if config.head_norm:
            self.subln = GDARMSNormOfHead(config.value_width, config.head_norm_eps, 1.0 - self.lambda_init)
        has_new_heads = config.masked_signal_heads is not None and not config.is_new_layer(layer_idx)
        self.growth_mask = GrowthMask(config) if has_new_heads else None
        self.lambda_anneal = None if config.lambda_anneal is None else LambdaAnneal(config)
        self._build_branches()

    def _add_projection(self, name: str, num_heads: int) -> None:
        """`q_proj`, or `q_base`, `q_down` and `q_up` where queries are a base and updates; `k` and `v` likewise."""
        config, rank = self.config, self.config.qk_rank
        if rank is None or name not in self.num_roles:
            width = num_heads * self.head_dim
            setattr(self, f"{name}_proj", nn.Linear(config.hidden_size, width, bias=config.attention_bias))
            return
        groups = num_heads // self.num_roles[name]
        setattr(self, f"{name}_base", SharedBase(config.hidden_size, groups * self.head_dim, bias=False))
        setattr(self, f"{name}_down", nn.Linear(config.hidden_size, num_heads * rank, bias=False))
        setattr(self, f"{name}_up", HeadwiseUp(rank, num_heads, self.head_dim, bias=config.attention_bias))

    def _project(self, name: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """Queries, keys or values (B, T, heads, d), heads in the order of a dense projection's rows."""
        roles = self.num_roles.get(name)
        if roles is None:
            return getattr(self, f"{name}_proj")(hidden_states).unflatten(-1, (-1, self.head_dim))
        base = getattr(self, f"{name}_base")(hidden_states)
        update = getattr(self, f"{name}_up")(getattr(self, f"{name}_down")(hidden_states))
        base = base.unflatten(-1, (-1, 1, self.head_dim))  # (B, T, groups, 1, d)
        return (base + update.unflatten(-1, (-1, roles, self.head_dim))).flatten(-3, -2)

    def _build_branches(self) -> None:
        config = self.config
        # A noise query may serve several KV heads: the call sees it once for each of them.
        self.num_noise_copies = max(1, config.num_key_value_heads // config.num_noise_heads)
        self.num_signal_per_copy = self.num_signal_per_noise // self.num_noise_copies
        heads_in_call = config.num_signal_heads + config.num_noise_heads * self.num_noise_copies
        self.branch = AttentionBranch(config, self.layer_idx, heads_in_call // config.num_key_value_heads, self)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, hidden)
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output (B, T, hidden) and, from eager if asked for, the differential maps (B, S, T, T_kv)."""
        query, key = self._project("q", hidden_states), self._project("k", hidden_states)
        value = self._project("v", hidden_states).transpose(1, 2)  # (B, G, T, d)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (each.transpose(1, 2) for each in rotate(query, key, *position_embeddings))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        lambda_ = self.compute_lambda(hidden_states)
        signal, noise, maps = self.attend(query, key, value, attention_mask, **kwargs)
        # Eager always has maps at hand; their difference is made for those who ask for it. The output is then made from
        # the difference, so that it has a gradient. (A paged cache keeps the values to itself.)
        difference = None
        if maps is not None and (kwargs.get("output_attentions") or self.config.output_attentions):
            difference = self.subtract_maps(*maps, lambda_)
        if difference is not None and kwargs.get("cache") is None:
            output = self.apply_maps(difference, value)
        else:
            output = self.subtract(signal, noise, lambda_)
        if self.subln is not None:
            output = self.subln(output)
        if self.growth_mask is not None:
            output = self._masked(output, self.growth_mask)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), difference

    def compute_lambda(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """λ in float32 whatever the model's dtype: (1,), or (B, T, S) where it depends on the token."""
        learned = self._learned_lambda(hidden_states)
        return learned if self.lambda_anneal is None else self.lambda_anneal(learned)

    def _learned_lambda(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """λ as its parameters say."""
        if self.lambda_activation is not None:
            return self.lambda_activation(self.lambda_proj(hidden_states))
        signal = (self.lambda_q1.float() * self.lambda_k1.float()).sum(dim=0, keepdim=True)
        noise = (self.lambda_q2.float() * self.lambda_k2.float()).sum(dim=0, keepdim=True)
        return signal.exp() - noise.exp() + self.lambda_init

    def _masked(self, output: torch.Tensor, growth_mask: GrowthMask) -> torch.Tensor:
        """Outputs (B, T, …, width) of the signal heads, those of the new heads masked: (B, T, groups, size, width)."""
        size, new = self.config.signal_group_size, self.config.masked_signal_heads
        assert new is not None  # there would be no mask
        mask = growth_mask(torch.arange(size, device=output.device) >= size - new)
        return output.flatten(2, 3).unflatten(2, (-1, size)) * mask.unsqueeze(-1).to(output.dtype)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Return signal (B, T, C, S/C, d), noise (B, T, C, 1, d) and their maps, C = noise heads the call sees."""
        if self.num_noise_copies > 1:
            _refuse_engine(kwargs, "has fewer noise heads than KV heads")
        output, maps = self.branch(self._repeat_noise(query), key, value, attention_mask, **kwargs)
        sizes = [self.num_signal_per_copy, 1]
        signal, noise = output.unflatten(2, (-1, sum(sizes))).split(sizes, dim=3)
        return signal, noise, None if maps is None else maps.unflatten(1, (-1, sum(sizes))).split(sizes, dim=2)

    def _repeat_noise(self, query: torch.Tensor) -> torch.Tensor:
        """(B, H, T, d): ``[s1 s2 s3 s4 n]`` becomes ``[s1 s2 n s3 s4 n]`` where a noise query serves two KV heads."""
        if self.num_noise_copies == 1:
            return query
        signal, noise = query.unflatten(1, (-1, self.num_signal_per_noise + 1)).split([self.num_signal_per_noise, 1], 2)
        signal = signal.unflatten(2, (self.num_noise_copies, -1))  # (B, N, copies, S / (N · copies), T, d)
        noise = noise.unsqueeze(2).expand(-1, -1, self.num_noise_copies, -1, -1, -1)
        return torch.cat((signal, noise), dim=3).flatten(1, 3)

    @staticmethod
    def subtract(signal: torch.Tensor, noise: torch.Tensor, lambda_: torch.Tensor) -> torch.Tensor:
        """signal − λ · noise in float32, in the signal's dtype: (B, T, C, S/C, width)."""
        if lambda_.dim() > 1:  # (B, T, S) → (B, T, C, S/C, 1)
            lambda_ = lambda_.unflatten(-1, signal.shape[2:4]).unsqueeze(-1)
        return torch.addcmul(signal, lambda_, noise, value=-1).to(signal.dtype)

    @staticmethod
    def subtract_maps(signal: torch.Tensor, noise: torch.Tensor, lambda_: torch.Tensor) -> torch.Tensor:
        """Maps (B, C, S/C, T, T_kv) and (B, C, 1, T, T_kv) → differential maps (B, S, T, T_kv)."""
        if lambda_.dim() > 1:  # (B, T, S) → (B, C, S/C, T, 1)
            lambda_ = lambda_.transpose(1, 2).unflatten(1, signal.shape[1:3]).unsqueeze(-1)
        return (signal - lambda_ * noise).to(signal.dtype).flatten(1, 2)

    @staticmethod
    def apply_maps(maps: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Maps (B, S, T, T_kv) and values (B, G, T_kv, width) → outputs (B, T, G, S/G, width)."""
        grouped = maps.unflatten(1, (value.shape[1], -1))  # (B, G, S/G, T, T_kv)
        return (grouped @ value.unsqueeze(2)).permute(0, 3, 1, 2, 4)


class GDAPairedAttention(GDAAttention):
    r"""
    Grouped differential attention with keys of their own for signal and noise (DIFF Transformer V1, Motif-2).

    KV heads come in pairs. Of a pair, the signal heads read key 0, the noise heads key 1, and both read the two value
    slabs v1 and v2 as one value of width 2 · head_dim. Values wider than keys leave the fast kernels of every backend,
    so the wide value is never built: each slab has a call of its own, and the halves are joined after the subtraction.

        signal heads ── key 0 ──┬── v1 ──┐
                                └── v2 ──┤  out_i = [o1_i − λ_i · o1_noise(i) , o2_i − λ_i · o2_noise(i)]
        noise heads  ── key 1 ──┬── v1 ──┤
                                └── v2 ──┘
    """

    def _build_branches(self) -> None:
        pairs = self.config.num_key_value_heads // 2
        self.signal_branch = AttentionBranch(self.config, self.layer_idx, self.config.num_signal_heads // pairs, self)
        self.noise_branch = AttentionBranch(self.config, self.layer_idx, self.config.num_noise_heads // pairs, self)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Return signal (B, T, N, r, 2d), noise (B, T, N, 1, 2d) and their maps."""
        _refuse_engine(kwargs, 'has kv_layout="paired"')
        if key.shape[1] % 2:
            raise ValueError(
                f"this rank holds {key.shape[1]} of {self.config.num_key_value_heads} KV heads, which cuts a pair; "
                "GDAConfig.num_key_value_heads must be a multiple of twice the tensor-parallel size"
            )
        if (paged_cache := kwargs.get("cache")) is not None:
            # Continuous batching updates its cache inside the attention call. Four calls must update it once.
            key, value = paged_cache.update(key, value, layer_idx=self.layer_idx, kwargs=kwargs)
            kwargs["cache"] = _UpdatedCache()
        ratio = self.num_signal_per_noise
        signal_query, noise_query = query.unflatten(1, (-1, ratio + 1)).split([ratio, 1], dim=2)
        signal, signal_maps = self._attend_slabs(
            self.signal_branch, signal_query.flatten(1, 2), key[:, 0::2], value, attention_mask, kwargs, member=0
        )
        noise, noise_maps = self._attend_slabs(
            self.noise_branch, noise_query.flatten(1, 2), key[:, 1::2], value, attention_mask, kwargs, member=1
        )
        maps = None
        if signal_maps is not None and noise_maps is not None:
            maps = signal_maps.unflatten(1, (-1, ratio)), noise_maps.unsqueeze(2)
        return signal.unflatten(2, (-1, ratio)), noise.unsqueeze(3), maps

    @staticmethod
    def apply_maps(maps: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Maps (B, S, T, T_kv) and slabs (B, G, T_kv, d) → outputs (B, T, G/2, 2S/G, 2d)."""
        return GDAAttention.apply_maps(maps, torch.cat((value[:, 0::2], value[:, 1::2]), dim=-1))

    @staticmethod
    def _attend_slabs(
        branch: AttentionBranch,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        kwargs: dict[str, Any],
        member: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs (B, T, heads, 2d) of `query` over both value slabs, and its maps."""
        halves = []
        for slab in (0, 1):
            caches = {}
            if "k_cache" in kwargs:  # block tables: backends read these, (blocks, block size, G, d), for key and value
                caches = {"k_cache": kwargs["k_cache"][:, :, member::2], "v_cache": kwargs["v_cache"][:, :, slab::2]}
            output, maps = branch(query, key, value[:, slab::2], attention_mask, **(kwargs | caches))
            halves.append(output)
        return torch.cat(halves, dim=-1), maps


def _refuse_engine(kwargs: dict[str, Any], reason: str) -> None:
    """vLLM and SGLang hand over one attention with its KV cache for each layer, of `num_attention_heads` heads."""
    if "attention_instances" in kwargs:
        raise ValueError(
            f"a serving engine gives a layer one attention call over its query heads, and this model {reason}; "
            "transformers itself can serve it"
        )


class _UpdatedCache:
    """Stands in for a paged cache that has been updated already, for backends that insist on updating one."""

    @staticmethod
    def update(key_states: torch.Tensor, value_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


ATTENTION_CLASSES = {"shared": GDAAttention, "paired": GDAPairedAttention}
