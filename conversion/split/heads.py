r"""Choosing noise heads, and solving for the output projection that goes with them, in closed form.

For one layer, o (H · d) are the outputs of its heads side by side, y (hidden) is the output of the source's attention,
and f = P o are differential features: the rows of P are o_i − λ o_noise(i). With moments C = E[o oᵀ] and R = E[y oᵀ],
the output projection that comes closest to y is

    W = R Pᵀ (P C Pᵀ + εI)⁻¹,    with error    E|y|² − 2 tr(W P Rᵀ) + tr(W P C Pᵀ Wᵀ).

Only C, R and E|y|² are kept of the activations, in float64.

Heads are chosen KV group by KV group, as if every head of the other groups were kept: by the covariance of the group's
outputs given the others', which follows from the inverse of C. So the systems to solve are small.
"""

from dataclasses import dataclass

import torch

RIDGE = 1e-6  # relative to the mean of the diagonal; 1e-6 to 1e-3 give the same results


class Moments:
    """Second moments of the outputs (H · d) of a layer's heads, and of the layer's attention (hidden)."""

    def __init__(self, width: int, hidden: int, device: torch.device | str = "cpu"):
        settings: dict = {"dtype": torch.float64, "device": device}
        self.heads = torch.zeros(width, width, **settings)  # C
        self.cross = torch.zeros(hidden, width, **settings)  # R
        self.target = torch.zeros((), **settings)  # E|y|²

    def add(self, heads: torch.Tensor, target: torch.Tensor) -> None:
        """Add outputs of the heads (…, H · d) and the attention outputs to reproduce (…, hidden)."""
        o, y = heads.flatten(0, -2).double(), target.flatten(0, -2).double()
        self.heads += o.T @ o
        self.cross += y.T @ o
        self.target += y.square().sum()


@dataclass(frozen=True)
class Split:
    """Which heads of a layer are signal and noise heads."""

    order: list[int]  # the source's heads in the order of the result's rows: groups of ``[signal_1 … signal_r, noise]``
    lambda_: float
    error_before: float  # |y − W f|² / |y|² with the source's output projection
    error_after: float  # the same with the output projection that fits best
    output: torch.Tensor  # the output projection that fits best, (hidden, S · d)


def split_layer(
    moments: Moments,
    output: torch.Tensor,
    *,
    num_noise_heads: int,
    num_kv_heads: int,
    head_dim: int,
    lambdas: list[float],
) -> Split:
    """Split the heads of a layer with the least error, over the λ in `lambdas`.

    `output` is the source's output projection (hidden, H · d), for the error before the fit.
    """
    width = len(moments.heads)
    covariance = moments.heads + _ridge(moments.heads)
    inverse = torch.linalg.inv(covariance)
    group_width, noise_in_group = width // num_kv_heads, num_noise_heads // num_kv_heads
    heads_in_group = group_width // head_dim
    coefficients = moments.cross @ inverse
    groups = []
    for group in range(num_kv_heads):
        rows = slice(group * group_width, (group + 1) * group_width)
        given_others = torch.linalg.inv(inverse[rows, rows])
        gram = coefficients[:, rows].T @ coefficients[:, rows]
        groups.append((given_others, gram))
    splits = []
    for lambda_ in lambdas:
        order = []
        for group, (given_others, gram) in enumerate(groups):
            chosen = _best_order(given_others, gram, heads_in_group, noise_in_group, head_dim, lambda_)
            order += [group * heads_in_group + head for head in chosen]
        splits.append(fitted(moments, output, order, num_noise_heads, head_dim, lambda_))
    return min(splits, key=lambda split: split.error_after)


def features(heads: int, noise_heads: int, head_dim: int, lambda_: float, order: list[int]) -> torch.Tensor:
    """P, (S · d, H · d): maps outputs of the heads, in the source's order, to differential features."""
    rows = torch.zeros(heads - noise_heads, heads, dtype=torch.float64)
    signal = 0
    for group in torch.tensor(order).view(noise_heads, -1).tolist():
        for head in group[:-1]:
            rows[signal, head], rows[signal, group[-1]] = 1.0, -lambda_
            signal += 1
    return torch.kron(rows, torch.eye(head_dim, dtype=torch.float64))


def _ridge(matrix: torch.Tensor) -> torch.Tensor:
    scale = RIDGE * matrix.diagonal().mean() + torch.finfo(torch.float64).tiny
    return scale * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _best_order(
    covariance: torch.Tensor, gram: torch.Tensor, heads: int, noise_heads: int, head_dim: int, lambda_: float
) -> list[int]:
    """The order of a group's heads with the least error: swap two heads of different roles until no swap helps.

    With one noise head, every choice is one swap away. With several, the search may end in a local minimum, so it is
    started from several orders.
    """
    slots = heads // noise_heads  # signal heads and, last, their noise head

    def loss(order: list[int]) -> float:
        p = features(heads, noise_heads, head_dim, lambda_, order).to(covariance)
        explained = p @ covariance
        system = explained @ p.T
        solved = torch.linalg.solve(system + _ridge(system), explained @ gram)
        return -(solved * explained).sum().item()  # the part of the error that depends on the order

    def improved(order: list[int]) -> tuple[float, list[int]]:
        least, improves = loss(order), True
        while improves:
            improves = False
            for one in range(heads):
                for other in range(one + 1, heads):
                    same_role = one % slots != slots - 1 and other % slots != slots - 1
                    if same_role and one // slots == other // slots:
                        continue  # signals of one noise head: their order makes no difference
                    tried = list(order)
                    tried[one], tried[other] = tried[other], tried[one]
                    if (lost := loss(tried)) < least * (1 + 1e-9 if least < 0 else 1 - 1e-9):
                        order, least, improves = tried, lost, True
        return least, order

    starts = range(1 if noise_heads == 1 else slots)
    _, order = min(improved([(head + start) % heads for head in range(heads)]) for start in starts)
    groups = [order[start : start + slots] for start in range(0, heads, slots)]
    return [head for *signals, noise in groups for head in (*sorted(signals), noise)]


def fitted(
    moments: Moments, output: torch.Tensor, order: list[int], noise_heads: int, head_dim: int, lambda_: float
) -> Split:
    """The split with this order and λ, and the output projection that fits it best."""
    p = features(len(order), noise_heads, head_dim, lambda_, order).to(moments.heads)
    covariance = p @ moments.heads @ p.T
    cross = moments.cross @ p.T
    weight = torch.linalg.solve(covariance + _ridge(covariance), cross.T).T
    signal = [head for group in torch.tensor(order).view(noise_heads, -1).tolist() for head in group[:-1]]
    kept = output.to(moments.heads).unflatten(1, (-1, head_dim))[:, signal].flatten(1)
    before, after = (_error(moments, covariance, cross, each) for each in (kept, weight))
    return Split(order, lambda_, before, after, weight)


def _error(moments: Moments, covariance: torch.Tensor, cross: torch.Tensor, weight: torch.Tensor) -> float:
    remaining = moments.target - 2 * (weight * cross).sum() + ((weight @ covariance) * weight).sum()
    return (remaining / moments.target.clamp(min=torch.finfo(torch.float64).tiny)).item()
