"""Attention maps small enough for a page: the lower triangle, in 8 bits, and what does not fit is averaged.

A value a of a map whose largest magnitude is m is kept as q = round(n · √(|a| / m)) with n = 255 levels, or 127 and a
sign where values may be negative. Square roots, since most attention is small: the error is at most
m · (q + 1/4) / n², about √(a · m) / n. Averaging, over p × p tokens and over a group's heads, is told in `MapPlan`.
"""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gda.eval.attention.analysis import LayerAttention

POOLS = (1, 2, 4, 8, 16)
LEVELS, SIGNED_LEVELS = 255, 127


@dataclass(frozen=True)
class MapKind:
    """One of the maps of each group.

    Attributes:
        name: "signal", "noise", "difference" or "baseline"; with the number of the head in its group if not the mean.
        signed: Whether values may be negative.
    """

    name: str
    signed: bool


@dataclass(frozen=True)
class MapPlan:
    """Which maps are kept, and how finely.

    Attributes:
        layers: Those whose maps are kept.
        pool: Side of the square of tokens that one value is the mean of; 1 keeps every value.
        heads: Whether each signal head has maps of its own; if not, a group has the mean over its heads.
        size: Side of a kept map.
    """

    layers: tuple[int, ...]
    pool: int
    heads: bool
    size: int

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
        """The finest plan of at most `limit` bytes before compression, or the coarsest there is.

        Args:
            layers: Whose maps are wanted.
            groups: Of a layer.
            heads: Signal heads of a group.
            tokens: Of the text.
            limit: In bytes.
            differential: Whether there are noise maps and differences.
            baseline: Whether a map of the baseline stands beside those of each group.
        """
        plans = [
            cls(tuple(layers), pool, each, -(-tokens // pool))
            for pool in POOLS
            for each in ([True, False] if heads > 1 else [True])
        ]
        for plan in plans:
            shown = heads if plan.heads else 1
            maps = (2 * shown + 1 if differential else shown) + baseline
            if len(layers) * groups * maps * plan.values <= limit:
                return plan
        return plans[-1]

    @property
    def values(self) -> int:
        """Of one kept map."""
        return self.size * (self.size + 1) // 2

    def kinds(self, heads: int, *, differential: bool) -> list[MapKind]:
        """What is kept of each group with that many signal heads, in order."""
        numbers = [f" {head}" for head in range(heads)] if self.heads and heads > 1 else [""]
        signals = [MapKind(f"signal{number}", False) for number in numbers]
        if not differential:
            return signals
        return [*signals, MapKind("noise", False), *(MapKind(f"difference{number}", True) for number in numbers)]

    def reductions(self, heads: int) -> list[str]:
        """In words, what was averaged; none if nothing was."""
        told = []
        if not self.heads and heads > 1:
            told.append(f"signal and difference maps are the mean over the {heads} signal heads of a group")
        if self.pool > 1:
            told.append(f"every value of a map is the mean over {self.pool} × {self.pool} tokens")
        return told


def group_maps(maps: LayerAttention, plan: MapPlan, groups: int) -> list[tuple[MapKind, torch.Tensor]]:
    """The maps (G, n, n) of each kind that `plan` keeps of a layer, in float32, averaged as it says.

    Args:
        maps: All rows of the layer's maps.
        plan: What to keep.
        groups: G; of a layer with noise heads the number of its noise maps.
    """
    heads = len(maps.signal) // groups
    differential = maps.noise is not None
    found: list[torch.Tensor] = []
    for kind in plan.kinds(heads, differential=differential):
        name, _, number = kind.name.partition(" ")
        all_heads = {"signal": maps.signal, "noise": maps.noise, "difference": maps.difference}[name]
        assert all_heads is not None
        of_group = all_heads.float().unflatten(0, (groups, -1))
        found.append(pooled(of_group[:, int(number)] if number else of_group.mean(dim=1), plan.pool))
    return list(zip(plan.kinds(heads, differential=differential), found, strict=True))


def pooled(maps: torch.Tensor, pool: int) -> torch.Tensor:
    """The mean of each square of `pool` tokens a side, over what causal attention can see: (G, T, T) → (G, n, n)."""
    if pool == 1:
        return maps
    tokens = maps.shape[-1]
    seen = torch.ones(tokens, tokens).tril().to(maps)
    pad = -tokens % pool

    def sums(values: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(values, (0, pad, 0, pad))
        return padded.unflatten(-1, (-1, pool)).unflatten(-3, (-1, pool)).sum(dim=(-1, -3))

    return sums(maps) / sums(seen).clamp_min(1.0)


def pack(maps: Sequence[tuple[MapKind, torch.Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Largest magnitudes (G, K) in float32, and the lower triangles (G, K, n (n + 1) / 2) in 8 bits.

    A value that may be negative is kept as 127 plus or minus its level.
    """
    scales, levels = [], []
    for kind, of_groups in maps:
        rows, columns = torch.tril_indices(*of_groups.shape[1:])
        values = of_groups[:, rows, columns].cpu()
        scale = values.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        roots = (values.abs() / scale).sqrt()
        level = (
            (SIGNED_LEVELS + values.sign() * (roots * SIGNED_LEVELS).round())
            if kind.signed
            else (roots * LEVELS).round()
        )
        scales.append(scale[:, 0].numpy())
        levels.append(level.to(torch.uint8).numpy())
    return np.stack(scales, axis=1).astype(np.float32), np.stack(levels, axis=1)


def unpack(kind: MapKind, scale: float, levels: np.ndarray) -> np.ndarray:
    """One kept map (n, n) of `pack`'s scale and levels, zeros above the diagonal."""
    size = int(((8 * len(levels) + 1) ** 0.5 - 1) / 2)
    steps = (levels.astype(np.float32) - SIGNED_LEVELS) / SIGNED_LEVELS if kind.signed else levels / np.float32(LEVELS)
    found = np.zeros((size, size), dtype=np.float32)
    found[np.tril_indices(size)] = np.sign(steps) * steps**2 * scale
    return found


def deflated(*arrays: np.ndarray) -> str:
    """The arrays' bytes, little-endian, one after the other, compressed by zlib, in base 64."""
    data = b"".join(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays)
    return base64.b64encode(zlib.compress(data, 6)).decode()
