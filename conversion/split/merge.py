r"""Merging the KV heads of a layer to fewer, so that query heads come to share one; in closed form.

RoPE turns every pair of components (i, i + d/2) as one complex number, so a key k_j (d) is d/2 numbers z_j, and a
logit is Σ Re(q conj(z)). Whatever multiplies a frequency by a constant commutes with RoPE. For members j of a group
that are to share a key, at each frequency,

    k̄ = Σ conj(a_j) z_j    with z_j ≈ u_j k̄,    so that their queries become conj(u_j) q,

which loses least of the logits where u is the leading eigenvector of E[z zᴴ], each z_j weighted by its queries.
Keys that are normed after their projection can change sign, and no more: they are averages.

Values v_j (d), weighted by what the output projection makes of them, L_j = (Σ Oᵀ O)^½, are kept in the d directions of
the stacked L_j v_j that have most energy: v̄ = Σ V_jᵀ L_j v_j, and the columns that read v_j become O L_j⁻¹ V_j.
All of it is float64.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

SMALLEST = 1e-12  # relative; what is below counts as nothing in an inverse


@dataclass(frozen=True)
class Merge:
    """How the KV heads of a layer were merged.

    Attributes:
        groups: For each KV head of the result, the source's KV heads that it stands for.
        lost_keys: Share of the energy of the attention's logits that the merged keys do not give, by their statistics.
        lost_values: Share of the energy of its values, weighted by the output projection, that merged ones do not give.
        error: |y − y'|² / |y|² of the attention's output with merged keys and values, and the output projection that
            fits best, before heads are divided.
    """

    groups: list[list[int]]
    lost_keys: float
    lost_values: float
    error: float


class Statistics:
    """Second moments of the queries, keys and values of a layer, of K KV heads of width d, F = d/2 frequencies.

    Args:
        heads: Query heads.
        kv_heads: K.
        head_dim: d.
        normed: Whether queries and keys are normed after their projection.
        device: Where they are.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, *, normed: bool, device: torch.device | str = "cpu"):
        self.heads, self.kv_heads, self.head_dim, self.normed = heads, kv_heads, head_dim, normed
        frequencies, width = head_dim // 2, kv_heads * head_dim
        real: dict = {"dtype": torch.float64, "device": device}
        self.keys = torch.zeros(frequencies, kv_heads, kv_heads, dtype=torch.complex128, device=device)  # E[z zᴴ]
        self.queries = torch.zeros(frequencies, kv_heads, **real)  # E|q|² of the heads that read a key
        self.values = torch.zeros(width, width, **real)
        self.projected = torch.zeros(kv_heads, **real)  # E|k|² before a norm

    def hooks(self) -> dict[str, Callable[[torch.Tensor], None]]:
        """What to call with the outputs (B, T, …) of which module of the attention."""
        queries, keys = ("q_norm", "k_norm") if self.normed else ("q_proj", "k_proj")
        hooks: dict[str, Callable[[torch.Tensor], None]] = {queries: self._add_queries, keys: self._add_keys}
        hooks["v_proj"] = self._add_values
        if self.normed:
            hooks["k_proj"] = self._add_projected
        return hooks

    def is_finite(self) -> bool:
        """Whether every number is."""
        return all(bool(torch.isfinite(each).all()) for each in (self.keys, self.queries, self.values, self.projected))

    def _add_queries(self, outputs: torch.Tensor) -> None:
        energy = self._by_head(outputs).square().sum(0).unflatten(-1, (2, -1)).sum(-2)  # (H, F)
        self.queries += energy.unflatten(0, (self.kv_heads, -1)).sum(1).T

    def _add_keys(self, outputs: torch.Tensor) -> None:
        z = _as_complex(self._by_head(outputs)).permute(2, 0, 1)  # (F, tokens, K)
        self.keys += z.transpose(1, 2) @ z.conj()

    def _add_values(self, outputs: torch.Tensor) -> None:
        v = self._by_head(outputs).flatten(1)
        self.values += v.T @ v

    def _add_projected(self, outputs: torch.Tensor) -> None:
        self.projected += self._by_head(outputs).square().sum((0, 2))

    def _by_head(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.double().reshape(-1, outputs[0, 0].numel() // self.head_dim, self.head_dim)


def merge_layer(
    tensors: Mapping[str, torch.Tensor], statistics: Statistics, num_groups: int
) -> tuple[list[list[int]], dict[str, torch.Tensor], dict[str, float]]:
    """Merge the KV heads of a layer to `num_groups`.

    Args:
        tensors: Of the layer, by their names in it.
        statistics: Of the layer.
        num_groups: KV heads of the result, a divisor of the source's.

    Returns:
        The KV heads that each group is made of; q, k, v and o of the merged layer by their names, float32, query heads
        in the order of the groups; and what is lost, as `Merge` names it.
    """
    d, values = statistics.head_dim, _Values(tensors["self_attn.o_proj.weight"], statistics)
    groups = cluster(_key_distances(statistics) + values.distances(), num_groups)
    query, key, value = (_rows(tensors, name) for name in ("q_proj", "k_proj", "v_proj"))
    query, key = (_as_complex(rows.unflatten(0, (-1, d)).transpose(1, 2)).transpose(1, 2) for rows in (query, key))
    query = query.unflatten(0, (statistics.kv_heads, -1))  # (K, H / K, F, hidden)
    value, output = value.unflatten(0, (-1, d)), values.output
    made: dict[str, list[torch.Tensor]] = {name: [] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    lost_keys = lost_values = 0.0
    for group in groups:
        keys, merged = _merged_keys(statistics, group), values.merged(group)
        lost_keys, lost_values = lost_keys + keys.lost, lost_values + merged.lost
        made["k_proj"].append(_as_rows((keys.take.conj()[:, :, None] * key[group]).sum(0)))
        made["q_proj"].append(_as_rows(keys.turn.conj()[:, None, :, None] * query[group]))
        made["v_proj"].append(torch.einsum("jab,jbc->ac", merged.take, value[group]))
        made["o_proj"].append(torch.einsum("njha,jab->njhb", output[:, group], merged.turn).flatten(1))
    result = {"self_attn.o_proj.weight": torch.cat(made.pop("o_proj"), dim=1).float()}
    for name, parts in made.items():
        result |= _without_bias_column(tensors, name, torch.cat(parts).float())
    whole = statistics.queries * statistics.keys.diagonal(dim1=1, dim2=2).real
    lost = {"lost_keys": lost_keys / _positive(whole.sum()), "lost_values": lost_values / _positive(values.energy)}
    return groups, result, lost


def cluster(distance: torch.Tensor, num_groups: int) -> list[list[int]]:
    """Groups of equal size with small distances (K, K) within: the nearest together, and then exchanges that help."""
    d = distance.tolist()
    left, size = list(range(len(d))), len(d) // num_groups
    groups: list[list[int]] = []
    while left:
        group = [left.pop(0)]
        while len(group) < size:
            nearest = min(left, key=lambda head: sum(d[head][member] for member in group))
            group.append(nearest)
            left.remove(nearest)
        groups.append(group)

    def gain(one: list[int], i: int, other: list[int], j: int) -> float:
        """What exchanging one[i] and other[j] saves."""
        a, b = one[i], other[j]
        near_one, near_other = one[:i] + one[i + 1 :], other[:j] + other[j + 1 :]
        return sum(d[a][x] - d[b][x] for x in near_one) + sum(d[b][x] - d[a][x] for x in near_other)

    least = 1e-9 * float(distance.abs().mean())  # below it are differences of rounding, which need not end
    improved = True
    while improved:
        improved = False
        for first, one in enumerate(groups):
            for other in groups[first + 1 :]:
                for i in range(size):
                    for j in range(size):
                        if gain(one, i, other, j) > least:
                            one[i], other[j] = other[j], one[i]
                            improved = True
    return sorted(sorted(group) for group in groups)


@dataclass(frozen=True)
class _Merged:
    """How members are taken into what they share, and how those that read a member read that."""

    take: torch.Tensor
    turn: torch.Tensor
    lost: float


def _merged_keys(statistics: Statistics, group: list[int]) -> _Merged:
    """`take` and `turn` are a and u, (members, F)."""
    z = statistics.keys[:, group][:, :, group]  # (F, members, members)
    weight = statistics.queries[:, group]
    weight = weight.clamp_min(_positive(1e-6 * weight.mean()))
    if statistics.normed:
        return _averaged_keys(z, weight, statistics.projected[group])
    root = weight.sqrt()
    energies, vectors = torch.linalg.eigh(root[:, :, None] * z * root[:, None, :])
    leading, vector = energies[:, -1], vectors[..., -1]  # (F), (F, members)
    largest = vector.gather(1, vector.abs().argmax(1, keepdim=True))
    vector = vector * (largest.conj() / largest.abs())  # alike keys are not turned
    # k̄ as large as the keys are, for the sake of dtypes with a narrow range.
    size = _scale(z.diagonal(dim1=1, dim2=2).real.mean(1), leading)[:, None]
    lost = energies[:, :-1].clamp_min(0).sum().item()
    return _Merged((vector * root * size).T, (vector / (root * size)).T, lost)


def _averaged_keys(z: torch.Tensor, weight: torch.Tensor, projected: torch.Tensor) -> _Merged:
    """Averages of keys of equal size, up to the sign of a frequency: more would not go through the norm."""
    root = weight.sqrt()
    _, vectors = torch.linalg.eigh(root[:, :, None] * z.real * root[:, None, :])
    sign = torch.where(vectors[..., -1] < 0, -1.0, 1.0).to(weight)  # (F, members)
    sign = sign * sign[:, :1]  # the first member's queries stay
    mean = torch.einsum("fi,fij->fj", sign, z.real)  # E[k̄ z_j], before the norm brings k̄ to size
    energy = z.diagonal(dim1=1, dim2=2).real  # (F, members)
    size = _scale(energy.mean(1).sum(), (mean * sign).sum())
    left = energy - 2 * size * mean * sign + (size**2 * (mean * sign).sum(1))[:, None]
    typical = projected.mean().sqrt() / projected.clamp_min(_positive(SMALLEST * projected.mean())).sqrt()
    take = (sign * typical).T.to(torch.complex128) / len(projected)
    return _Merged(take, sign.T.to(torch.complex128), (weight * left).clamp_min(0).sum().item())


def _key_distances(statistics: Statistics) -> torch.Tensor:
    """(K, K): share of the energy of the logits that is lost if two share a key."""
    root = statistics.queries.sqrt()
    z = root[:, :, None] * statistics.keys * root[:, None, :]
    energy = z.diagonal(dim1=1, dim2=2).real
    off = z.real if statistics.normed else z.abs()
    one, other = energy[:, :, None], energy[:, None, :]
    lesser = (one + other) / 2 - ((one - other).square() / 4 + off.square()).sqrt()  # of the two eigenvalues
    return lesser.clamp_min(0).sum(0) / _positive(energy.sum())


class _Values:
    """The values of a layer, weighted by the columns of the output projection that read them."""

    def __init__(self, output: torch.Tensor, statistics: Statistics):
        self.head_dim = d = statistics.head_dim
        self.kv_heads = statistics.kv_heads
        self.output = output.double().unflatten(1, (statistics.kv_heads, -1, d))  # (hidden, K, H / K, d)
        energies, vectors = torch.linalg.eigh(torch.einsum("nkha,nkhb->kab", self.output, self.output))
        energies = energies.clamp_min(0)
        root = energies.sqrt()
        inverse = torch.where(energies > SMALLEST * energies[:, -1:], 1 / root, 0.0)
        self.root = (vectors * root[:, None]) @ vectors.mT  # L, (K, d, d)
        self.inverse = (vectors * inverse[:, None]) @ vectors.mT
        blocks = statistics.values.unflatten(1, (-1, d)).unflatten(0, (-1, d))  # (K, d, K, d)
        self.sizes = torch.einsum("kaka->k", blocks)
        self.blocks = torch.einsum("iab,ibjc,jcd->iajd", self.root, blocks, self.root)
        self.energy = torch.einsum("kaka->", self.blocks)

    def distances(self) -> torch.Tensor:
        """(K, K): share of their energy that is lost if two share a value."""
        lost = torch.zeros(self.kv_heads, self.kv_heads, dtype=torch.float64)
        for one in range(self.kv_heads):
            for other in range(one):
                energies = torch.linalg.eigvalsh(self._moments([other, one]))
                lost[one, other] = lost[other, one] = energies[: self.head_dim].clamp_min(0).sum()
        return lost.to(self.energy.device) / _positive(self.energy)

    def merged(self, group: list[int]) -> _Merged:
        """`take` and `turn` are (members, d, d): of v̄ = Σ take v, and of the columns that become O · turn."""
        energies, vectors = torch.linalg.eigh(self._moments(group))
        kept = vectors[:, -self.head_dim :].unflatten(0, (-1, self.head_dim))  # V, (members, d, d)
        size = _scale(self.sizes[group].mean(), energies[-self.head_dim :].sum())
        lost = energies[: -self.head_dim].clamp_min(0).sum().item()
        return _Merged(size * (kept.mT @ self.root[group]), self.inverse[group] @ kept / size, lost)

    def _moments(self, group: list[int]) -> torch.Tensor:
        return self.blocks[group][:, :, group].flatten(2).flatten(0, 1)


def _rows(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The weight of a projection, with its bias, if there is one, as a last column."""
    weight, bias = (tensors.get(f"self_attn.{name}.{part}") for part in ("weight", "bias"))
    assert weight is not None
    return weight.double() if bias is None else torch.cat([weight, bias[:, None]], dim=1).double()


def _without_bias_column(tensors: Mapping[str, torch.Tensor], name: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    weight, bias = f"self_attn.{name}.weight", f"self_attn.{name}.bias"
    if bias not in tensors:
        return {weight: rows}
    return {weight: rows[:, :-1].contiguous(), bias: rows[:, -1].contiguous()}


def _as_complex(x: torch.Tensor) -> torch.Tensor:
    """(…, d) → (…, d/2): the pairs that RoPE turns."""
    return torch.complex(*x.chunk(2, dim=-1))


def _as_rows(z: torch.Tensor) -> torch.Tensor:
    """(…, d/2, hidden) of pairs → rows of heads (… · d, hidden)."""
    return torch.cat([z.real, z.imag], dim=-2).flatten(0, -2)


def _scale(wanted: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """What brings something of that energy to the energy that is wanted; 1 where there is nothing to bring."""
    return torch.where((wanted > 0) & (energy > 0), (wanted / energy).sqrt(), 1.0)


def _positive(number: torch.Tensor) -> float:
    return max(number.item(), torch.finfo(torch.float64).tiny)
