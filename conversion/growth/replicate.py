"""Replicating features without changing what a model computes: writers repeat, readers share.

A feature that becomes n equal ones is written n times, by n equal rows. What reads it must then not count it n-fold:
its column W becomes n columns that sum to W (Net2Net, arXiv 1511.05641; HyperCloning, arXiv 2409.12903).

    before   y = W x                     after   y = W1 x1 + W2 x2,   x1 = x2 = x,   W1 + W2 = W

With W1 = W2 the replicas would have equal gradients for ever. They differ by a little noise that sums to zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows are worked on in pieces of about that many elements in float64, so that memory does not grow with the tensor.
PIECE = 1 << 20


@dataclass(frozen=True)
class Replicas:
    """How the features of one axis are replicated, all the same number of times or some not at all.

    Attributes:
        count: Replicas of each feature that is replicated.
        origin: For each new feature, the old one that it is a replica of.
        copy: Which replica of that it is, from 0; the first counts as the old feature.
    """

    count: int
    origin: Tensor
    copy: Tensor

    @classmethod
    def tiled(cls, size: int, count: int) -> "Replicas":
        """The whole axis `count` times, one after the other."""
        return cls(count, torch.arange(size).repeat(count), torch.arange(count).repeat_interleave(size))

    @classmethod
    def of_blocks(cls, blocks: list[int], width: int, count: int) -> "Replicas":
        """Blocks of `width` features, each kept once (1) or replicated (`count`) next to itself, as `blocks` says."""
        origin, copy = [], []
        for block, times in enumerate(blocks):
            for replica in range(times):
                origin.append(block * width + torch.arange(width))
                copy.append(torch.full((width,), replica))
        return cls(count, torch.cat(origin), torch.cat(copy))


def repeated(tensor: Tensor, axis: int, replicas: Replicas) -> Tensor:
    """The tensor with each feature of `axis` repeated: for what writes them."""
    return tensor.index_select(axis, replicas.origin)


def shared_out(
    weight: Tensor, rows: Replicas | None, columns: Replicas, noise: float, generator: torch.Generator
) -> Tensor:
    """Rows repeated, and each column shared out to its replicas so that they sum to it, for what reads them.

    The sum is exact in the weight's own dtype, whatever the count; so is the model in a narrow one.

    Args:
        weight: (out, in).
        rows: How rows are repeated, each with noise of its own; None leaves them.
        columns: How columns are.
        noise: Standard deviation of what the replicas of an entry differ by, before it is made to sum to zero. It is
            less where an entry is so small that it could not be held exactly: no share becomes twice as large.
        generator: Of the noise.

    Returns:
        (new out, new in) in the dtype of `weight`.
    """
    origin = torch.arange(len(weight)) if rows is None else rows.origin
    made = torch.empty(len(origin), len(columns.origin), dtype=weight.dtype)
    step = max(1, PIECE // (weight.shape[1] * columns.count))
    for begin in range(0, len(origin), step):
        piece = weight[origin[begin : begin + step]]
        drawn = None
        if noise > 0:
            drawn = noise * torch.randn(columns.count, *piece.shape, generator=generator)
        made[begin : begin + step] = split_exactly(piece, columns.count, drawn)[columns.copy, :, columns.origin].T
    return made


def split_exactly(weight: Tensor, count: int, noise: Tensor | None = None) -> Tensor:
    """`count` tensors near `weight` / `count` + `noise` that sum to `weight` exactly, in the dtype of `weight`.

    All is done in whole multiples of the last binary digit that a share has, of which the weight itself is one. So the
    dtype holds each share exactly, a narrow one too; noise that would take a share to more digits is made less.

    Args:
        weight: Any shape.
        count: Shares, from 1.
        noise: (count, …); its mean over the shares is taken off it.

    Returns:
        (count, …).
    """
    if count == 1:
        return weight.unsqueeze(0)
    info = torch.finfo(weight.dtype)
    wide = weight.to(torch.float32 if info.bits == 16 else torch.float64)
    size = (wide / count).abs()
    if noise is not None:
        noise = noise.to(wide.dtype)
        noise = noise - noise.mean(dim=0)  # after widening: what is left of the sum goes to the last share
        largest = noise.abs().amax(dim=0).clamp_min(torch.finfo(wide.dtype).tiny)
        size = torch.where(size == 0, largest, size)  # zero is a multiple of everything
    unit = torch.ldexp(torch.full_like(size, info.eps / 2), torch.frexp(size).exponent)
    unit = unit.clamp_min(info.smallest_normal * info.eps)
    whole = wide / unit
    share = whole / count
    if noise is not None:
        room = (2 / info.eps - 1 - share.abs()).clamp_min(0)
        noise = noise * (torch.minimum(room, largest / unit) / largest)
    shares = torch.empty(count, *weight.shape, dtype=weight.dtype)
    taken = torch.zeros_like(whole)
    end = torch.zeros_like(whole)
    for each in range(count - 1):
        end = end + share if noise is None else end + share + noise[each]
        rounded = end.round()
        shares[each] = (rounded - taken) * unit
        taken = rounded
    shares[-1] = (whole - taken) * unit
    return shares


def deviation(tensor: Tensor) -> float:
    """Standard deviation over all entries, in pieces."""
    flat = tensor.reshape(-1)
    number, total, squares = len(flat), 0.0, 0.0
    for piece in flat.split(PIECE):
        wide = piece.double()
        total += wide.sum().item()
        squares += wide.square().sum().item()
    return max(0.0, squares / number - (total / number) ** 2) ** 0.5
