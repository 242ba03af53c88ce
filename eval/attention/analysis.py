"""Attention maps as tensors, one layer in memory at a time, and statistics of them.

A GDA layer computes S signal maps A_i and fewer noise maps, and signal head i attends by A_i − λ_i · A_noise(i)
(arXiv 2510.06949). A Llama's layer has signal maps only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class LayerAttention:
    """The maps of one layer for one text of T tokens: the attention of its last Q tokens, the rows.

    Attributes:
        layer: Index of the layer, from 0.
        signal: Signal maps, (S, Q, T). Rows sum to 1.
        noise: Noise maps, (M, Q, T), or None in a layer without noise heads. Rows sum to 1. Signal head i subtracts map
            i // (S / M). M is the number of noise heads; a noise head that serves several KV heads has a map for each.
        lambda_: λ of each signal head and row in float32, (S, Q), or None.
    """

    layer: int
    signal: torch.Tensor
    noise: torch.Tensor | None
    lambda_: torch.Tensor | None

    @cached_property
    def difference(self) -> torch.Tensor:
        """A_i − λ_i · A_noise(i), (S, Q, T), by which the layer attends. Rows sum to 1 − λ.

        Without noise heads, the signal maps.
        """
        if self.noise is None or self.lambda_ is None:
            return self.signal
        difference = torch.addcmul(self.signal, self.lambda_.unsqueeze(-1), self._noise_by_signal_head, value=-1)
        return difference.to(self.signal.dtype)

    @property
    def subtrahend(self) -> torch.Tensor:
        """λ_i · A_noise(i), (S, Q, T), of a layer with noise heads."""
        assert self.lambda_ is not None
        return self.lambda_.unsqueeze(-1) * self._noise_by_signal_head

    @property
    def _noise_by_signal_head(self) -> torch.Tensor:
        assert self.noise is not None
        return self.noise.repeat_interleave(len(self.signal) // len(self.noise), dim=0)

    def rows_from(self, first_row: int) -> "LayerAttention":
        """The same maps without the rows before `first_row`."""
        noise = None if self.noise is None else self.noise[:, first_row:]
        lambda_ = None if self.lambda_ is None else self.lambda_[:, first_row:]
        return LayerAttention(self.layer, self.signal[:, first_row:], noise, lambda_)


Visit = Callable[[LayerAttention], None]


@torch.no_grad()
def visit_attention(model: PreTrainedModel, input_ids: torch.Tensor, visit: Visit, *, first_row: int = 0) -> None:
    """Run `model` on one text and call `visit` with the maps of each layer as soon as they are computed.

    If `visit` keeps no maps, those of one layer are in memory at a time: (2 S + M) · Q · T numbers. The eager backend
    computes them and replaces the model's own backend during the run, which still reads the rows before `first_row`.

    Args:
        model: A GDA model of either layout with any λ, or a model like Llama, with or without a head.
        input_ids: Token ids (T,) or (1, T).
        visit: Called once for each layer, in order.
        first_row: First row of the maps. Earlier rows cost no maps, which makes long texts cheap.

    Raises:
        ValueError: if there is not exactly one text with tokens, `first_row` is not one of them, or the model's
            attention cannot be read or is not finite.
    """
    ids = _one_text(input_ids, first_row).to(model.device)
    modules = attention_modules(model)
    seen: list[int] = []

    def counting(maps: LayerAttention) -> None:
        _check_finite(maps, model.dtype)
        seen.append(maps.layer)
        visit(maps)

    decoder: Callable[..., Any] = model.base_model  # without the head, whose logits are not needed
    with _evaluating(model):
        cache = None
        if first_row:
            cache = DynamicCache(config=model.config)
            # The cache is passed by position, because its name depends on the release of transformers.
            decoder(ids[:, :first_row], None, None, cache, use_cache=True)
        with _observed(model, modules, ids.shape[1], counting):
            decoder(ids[:, first_row:], None, None, cache, use_cache=cache is not None)
    if len(seen) != len(modules):
        raise ValueError(f"{type(model).__name__} gave the attention maps of {len(seen)} of its {len(modules)} layers")


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """The attention module of each layer; ValueError if there is none, or they are differential but not GDA's."""
    modules = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "o_proj")]
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no attention like Llama's (self_attn.o_proj), so there are no maps to read"
        )
    if any(hasattr(module, "lambda_q1") and not is_differential(module) for module in modules):
        raise ValueError(f"{type(model).__name__} is differential but not a GDA model; convert it with `gda convert`")
    return modules


def is_differential(module: Any) -> bool:
    """Whether an attention module is GDA's. (Its class may be that of remote code.)"""
    return hasattr(module, "compute_lambda") and hasattr(module, "subtract")


def _one_text(input_ids: torch.Tensor, first_row: int) -> torch.Tensor:
    ids = input_ids.unsqueeze(0) if input_ids.dim() == 1 else input_ids
    if ids.dim() != 2 or len(ids) != 1 or not ids.numel():
        raise ValueError(f"attention is read from one text, token ids (T,) or (1, T), not {tuple(input_ids.shape)}")
    if not 0 <= first_row < ids.shape[1]:
        raise ValueError(f"first_row must be one of the text's {ids.shape[1]} tokens; got {first_row}")
    return ids


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _observed(model: PreTrainedModel, modules: Sequence[Any], length: int, visit: Visit) -> Iterator[None]:
    """Run the eager backend, the only one that returns maps, and call `visit` with those of each module."""
    backend = model.config._attn_implementation
    model.set_attn_implementation("eager")
    hooks: list[RemovableHandle] = []
    try:
        for module in modules:
            observe = _observe_subtraction if is_differential(module) else _observe_attention
            hooks += observe(module, length, visit)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(backend)


def _observe_subtraction(module: Any, length: int, visit: Visit) -> list[RemovableHandle]:
    """Have a GDA layer subtract its attention maps, and read them from the inputs of the subtraction."""

    def ask_for_maps(_: Any, arguments: Any, options: dict[str, Any]) -> Any:
        return arguments, options | {"output_attentions": True}

    def read(_: Any, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], __: Any) -> None:
        *both, lambda_ = inputs
        # (Q, C, S/C, T) and (Q, C, 1, T)
        signal, noise = (maps[0].flatten(1, 2).transpose(0, 1).contiguous() for maps in both)
        lambda_ = lambda_[0].T if lambda_.dim() > 1 else lambda_.expand(len(signal), signal.shape[1])
        visit(LayerAttention(module.layer_idx, _whole(signal, length), _whole(noise, length), lambda_))

    return [
        module.register_forward_pre_hook(ask_for_maps, with_kwargs=True),
        module.subtract.register_forward_hook(read),
    ]


def _observe_attention(module: nn.Module, length: int, visit: Visit) -> list[RemovableHandle]:
    """Read the maps from the output of an attention module without noise heads."""

    def read(module: Any, _: Any, output: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        if output[1] is not None:
            visit(LayerAttention(module.layer_idx, _whole(output[1][0], length), None, None))

    return [module.register_forward_hook(read)]


def _whole(maps: torch.Tensor, length: int) -> torch.Tensor:
    """Add zeros for the tokens that the cache of a sliding window has dropped: (H, Q, ≤ T) → (H, Q, T)."""
    return nn.functional.pad(maps, (length - maps.shape[-1], 0))


@dataclass(frozen=True)
class MapStatistics:
    """Statistics of the maps of one kind: arrays (L, H) in float32, means over the rows read.

    Attributes:
        entropy: Entropy of |a| / Σ|a| in a row, in nats: 0 if all attention is on one token, ln T if it is uniform.
        first_token: Share of a row's magnitude on the first token of the text, the attention sink.
        negative: Share of a row's magnitude that is negative.
    """

    entropy: np.ndarray
    first_token: np.ndarray
    negative: np.ndarray

    @classmethod
    def of_layer(cls, maps: torch.Tensor) -> "MapStatistics":
        """Statistics (H,) of the maps (H, Q, T) of one layer."""
        shares = row_shares(maps)
        return cls(
            entropy=row_entropy(shares).mean(dim=-1).cpu().numpy(),
            first_token=shares[..., 0].mean(dim=-1).cpu().numpy(),
            negative=(shares * (maps < 0)).sum(dim=-1).mean(dim=-1).cpu().numpy(),
        )

    @classmethod
    def of_model(cls, layers: "Sequence[MapStatistics]") -> "MapStatistics":
        """Statistics (L, H) from those (H,) of each layer."""
        return cls(*(np.stack([getattr(layer, each.name) for layer in layers]) for each in fields(cls)))


def row_shares(maps: torch.Tensor) -> torch.Tensor:
    """|a| / Σ|a| of each row in float32, (H, Q, T). Rows of signal and noise maps stay as they are, and zeros too."""
    magnitudes = maps.float().abs()
    return magnitudes / magnitudes.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def row_entropy(shares: torch.Tensor) -> torch.Tensor:
    """−Σ p ln p of each row in nats, (H, Q)."""
    return torch.special.entr(shares).sum(dim=-1)


@dataclass(frozen=True)
class AttentionArrays:
    """Numbers about the attention of every layer in one text, as arrays in float32.

    A group is a noise map with its signal maps.

    Attributes:
        signal: Statistics of the signal maps, (L, S).
        noise: Statistics of the noise maps, (L, M). Like the next two, None for a model without noise heads.
        difference: Statistics of signal − λ · noise, (L, S).
        lambda_: Mean λ of each signal head, (L, S).
        received: Attention of the signal maps on each token, (L, G, T): the mean over the heads of a group and the rows
            read. Sums to 1 over the tokens.
        cancelled: The part of `received` that the noise map cancels, (L, G, T): the mean of min(a, λ · a_noise) where
            λ · a_noise is positive. None without noise heads. The sum over the tokens is between 0 and 1.
    """

    signal: MapStatistics
    noise: MapStatistics | None
    difference: MapStatistics | None
    lambda_: np.ndarray | None
    received: np.ndarray
    cancelled: np.ndarray | None

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.received)

    @property
    def num_groups(self) -> int:
        """G: M for a GDA model, otherwise the number of KV heads."""
        return int(self.received.shape[1])


def attention_arrays(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    first_row: int | None = None,
    groups: int | None = None,
    visit: Visit | None = None,
) -> AttentionArrays:
    """Statistics of every layer's maps in one text, and the tokens that they attend to. The maps are not kept.

    Args:
        model: A model that `visit_attention` can read.
        input_ids: Token ids (T,) or (1, T).
        first_row: First row that counts. Default: the second, since the first token can only attend to itself.
        groups: Number of groups for the heads of a model without noise heads. Default: its number of KV heads.
        visit: Called with all rows of each layer's maps.

    Raises:
        ValueError: as of `visit_attention`.
    """
    length = input_ids.shape[-1]
    if first_row is None:
        first_row = 1 if length > 1 else 0
    _one_text(input_ids, first_row)
    plain_groups: int = groups or getattr(model.config, "num_key_value_heads", None) or 1
    statistics: dict[str, list[MapStatistics]] = {"signal": [], "noise": [], "difference": []}
    lambdas: list[np.ndarray] = []
    tokens: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def measure(maps: LayerAttention) -> None:
        read = maps.rows_from(first_row)
        statistics["signal"].append(MapStatistics.of_layer(read.signal))
        if read.noise is not None and read.lambda_ is not None:
            statistics["noise"].append(MapStatistics.of_layer(read.noise))
            statistics["difference"].append(MapStatistics.of_layer(read.difference))
            lambdas.append(read.lambda_.float().mean(dim=-1).cpu().numpy())
        tokens.append(token_shares(read, plain_groups))
        if visit is not None:
            visit(maps)

    visit_attention(model, input_ids, measure)
    cancelled = [each for _, each in tokens if each is not None]
    return AttentionArrays(
        **{kind: MapStatistics.of_model(layers) if layers else None for kind, layers in statistics.items()},  # type: ignore[arg-type]
        lambda_=np.stack(lambdas) if lambdas else None,
        received=torch.stack([each for each, _ in tokens]).numpy(),
        cancelled=torch.stack(cancelled).numpy() if cancelled else None,
    )


def _check_finite(maps: LayerAttention, dtype: torch.dtype) -> None:
    tensors = (tensor for tensor in (maps.signal, maps.noise, maps.lambda_) if tensor is not None)
    if not all(bool(tensor.float().sum().isfinite()) for tensor in tensors):
        raise ValueError(
            f"layer {maps.layer} has attention that is not finite; the weights are damaged, or overflow in "
            f"{str(dtype).removeprefix('torch.')}"
        )


def token_shares(maps: LayerAttention, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`AttentionArrays.received` and `.cancelled` of one layer, (G, T) in float32.

    In a layer without noise heads there are `groups` groups, or one if the heads cannot be divided.
    """
    if maps.noise is None:
        groups = groups if len(maps.signal) % groups == 0 else 1
        return maps.signal.float().unflatten(0, (groups, -1)).mean(dim=(1, 2)).cpu(), None
    in_groups = (len(maps.noise), -1)
    signal = maps.signal.float()
    both = torch.minimum(signal, maps.subtrahend.float().clamp_min(0.0))
    received, cancelled = (each.unflatten(0, in_groups).mean(dim=(1, 2)).cpu() for each in (signal, both))
    return received, cancelled
