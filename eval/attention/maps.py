"""Attention maps small enough for a page: the lower triangle in 8 bits, averaged where it is still too large.

A value a of a map whose largest magnitude is m is kept as q = round(n · √(|a| / m)), with n = 255 levels, or 127 levels
and a sign for maps with negative values. The square root suits attention, most of which is small: the error is at most
m · (q + 1/4) / n², about √(a · m) / n. `MapPlan` says what is averaged over p × p tokens and over the heads of a group.
"""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gda.eval.attention.analysis import LayerAttention

POOLS = (1, 2, 4, 8, 16, 32, 64)
LEVELS, SIGNED_LEVELS = 255, 127


@dataclass(frozen=True)
class MapKind:
    """One of the maps of each group, and whether its values may be negative.

    Its name is "signal", "noise", "difference" or "baseline", followed by the head's number in its group if it is not
    the mean over the group.
    """

    name: str
    signed: bool


@dataclass(frozen=True)
class LayerMaps:
    """The maps kept of one layer, of K kinds."""

    kinds: list[MapKind]
    scales: np.ndarray  # largest magnitude of each map, (G, K) in float32
    levels: np.ndarray  # levels of the lower triangle of each map, (G, K, n (n + 1) / 2) in 8 bits


@dataclass(frozen=True)
class MapPlan:
    """Which maps are kept, and how finely."""

    layers: tuple[int, ...]  # layers whose maps are kept
    pool: int  # one value is the mean over `pool` × `pool` tokens
    heads: bool  # whether the maps of each signal head are kept, or the mean over the heads of a group
    size: int  # side n of a kept map

    @classmethod
    def that_fits(
        cls,
        layers: Sequence[int],
        *,
        groups: int,
        heads: int,
        tokens: int,
        limit: int,
        differential: bool = True,
        baseline: bool = False,
    ) -> "MapPlan":
        """The finest plan of at most `limit` bytes before compression, or else the coarsest plan.

        A layer has `groups` groups of `heads` signal heads, noise and difference maps if `differential`, and a map of
        the baseline for each group if there is a `baseline`.
        """
        plans = [
            cls(tuple(layers), pool, each_head, -(-tokens // pool))
            for pool in POOLS
            for each_head in ([True, False] if heads > 1 else [True])
        ]
        for plan in plans:
            signal_maps = heads if plan.heads else 1
            maps = (2 * signal_maps + 1 if differential else signal_maps) + baseline
            if len(layers) * groups * maps * plan.values <= limit:
                return plan
        return plans[-1]

    @property
    def values(self) -> int:
        """Number of values of a kept map."""
        return self.size * (self.size + 1) // 2

    def kinds(self, heads: int, *, differential: bool) -> list[MapKind]:
        """The kinds of map kept of a group with `heads` signal heads, in order."""
        numbers = [f" {head}" for head in range(heads)] if self.heads and heads > 1 else [""]
        signals = [MapKind(f"signal{number}", False) for number in numbers]
        if not differential:
            return signals
        return [*signals, MapKind("noise", False), *(MapKind(f"difference{number}", True) for number in numbers)]

    def reductions(self, heads: int) -> list[str]:
        """What is averaged, in words; empty if nothing is."""
        reductions = []
        if not self.heads and heads > 1:
            reductions.append(f"signal and difference maps are the mean over the {heads} signal heads of a group")
        if self.pool > 1:
            reductions.append(f"each value of a map is the mean over {self.pool} × {self.pool} tokens")
        return reductions


def group_maps(maps: LayerAttention, plan: MapPlan, groups: int) -> list[tuple[MapKind, torch.Tensor]]:
    """The maps (G, n, n) of each kind that `plan` keeps of a layer, in float32, averaged as it says."""
    kinds = plan.kinds(len(maps.signal) // groups, differential=maps.noise is not None)
    found: list[torch.Tensor] = []
    for kind in kinds:
        name, _, number = kind.name.partition(" ")
        all_heads = {"signal": maps.signal, "noise": maps.noise, "difference": maps.difference}[name]
        assert all_heads is not None
        in_groups = all_heads.float().unflatten(0, (groups, -1))
        found.append(pooled(in_groups[:, int(number)] if number else in_groups.mean(dim=1), plan.pool))
    return list(zip(kinds, found, strict=True))


def baseline_maps(maps: LayerAttention, plan: MapPlan, groups: int) -> list[tuple[MapKind, torch.Tensor]]:
    """The baseline's map for each group: the mean over the heads at its place, or else over all heads."""
    heads = maps.difference.float()
    count = groups if len(heads) % groups == 0 else 1
    means = pooled(heads.unflatten(0, (count, -1)).mean(dim=1), plan.pool)
    return [(MapKind("baseline", maps.noise is not None), means.expand(groups, -1, -1))]


def pooled(maps: torch.Tensor, pool: int) -> torch.Tensor:
    """The mean over each square of `pool` × `pool` tokens, counting only what is causal: (G, T, T) → (G, n, n)."""
    if pool == 1:
        return maps
    tokens = maps.shape[-1]
    causal = torch.ones(tokens, tokens).tril().to(maps)
    padding = -tokens % pool

    def sums(values: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(values, (0, padding, 0, padding))
        return padded.unflatten(-1, (-1, pool)).unflatten(-3, (-1, pool)).sum(dim=(-1, -3))

    return sums(maps) / sums(causal).clamp_min(1.0)


def pack(maps: Sequence[tuple[MapKind, torch.Tensor]]) -> LayerMaps:
    """Pack maps (G, n, n). A signed value is kept as 127 plus or minus its level."""
    scales, levels = [], []
    for kind, of_groups in maps:
        rows, columns = torch.tril_indices(*of_groups.shape[1:])
        values = of_groups[:, rows, columns].cpu()
        scale = values.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        roots = (values.abs() / scale).sqrt()
        if kind.signed:
            level = SIGNED_LEVELS + values.sign() * (roots * SIGNED_LEVELS).round()
        else:
            level = (roots * LEVELS).round()
        scales.append(scale[:, 0].numpy())
        levels.append(level.to(torch.uint8).numpy())
    return LayerMaps([kind for kind, _ in maps], np.stack(scales, axis=1).astype(np.float32), np.stack(levels, axis=1))


def unpack(kind: MapKind, scale: float, levels: np.ndarray) -> np.ndarray:
    """One map (n, n) from its scale and levels, with zeros above the diagonal."""
    size = int(((8 * len(levels) + 1) ** 0.5 - 1) / 2)
    steps = (levels.astype(np.float32) - SIGNED_LEVELS) / SIGNED_LEVELS if kind.signed else levels / np.float32(LEVELS)
    found = np.zeros((size, size), dtype=np.float32)
    found[np.tril_indices(size)] = np.sign(steps) * steps**2 * scale
    return found


def deflated(*arrays: np.ndarray) -> str:
    """The arrays' bytes, little-endian and concatenated, compressed by zlib, in base 64."""
    data = b"".join(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays)
    return base64.b64encode(zlib.compress(data, 6)).decode()
