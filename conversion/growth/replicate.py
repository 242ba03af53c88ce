"""Replicating features without changing what a model computes: tensors that write them repeat, readers share.

A feature that becomes n equal ones is written by n equal rows. A tensor that reads it must not count it n times: its
column W becomes n columns that sum to W (Net2Net, arXiv 1511.05641; HyperCloning, arXiv 2409.12903).

    before   y = W x                     after   y = W1 x1 + W2 x2,   x1 = x2 = x,   W1 + W2 = W

With W1 = W2 the replicas would always have equal gradients, so they differ by a little noise that sums to zero.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.conversion import Conversion, with_fields
from gda.conversion.growth.features import occurrences, signal_origins, still_kept, tiled_origins
from gda.conversion.options import GrowOptions
from gda.conversion.tensors.axes import KINDS, axes_of, reads
from gda.conversion.tensors.recipes import Recipe, generator_for
from gda.conversion.tensors.safetensors_io import TensorSpec

# Rows are processed in pieces of about that many elements in float64, so that memory does not grow with the tensor.
PIECE = 1 << 20
HEADS = ("num_attention_heads", "num_noise_heads", "num_key_value_heads")
# By operator, the fields of the configuration that grow, and the kinds of features that are tiled.
TILED: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "width": (("hidden_size", "intermediate_size", *HEADS), KINDS),
    "hidden": (("hidden_size",), frozenset({"hidden"})),
    "mlp": (("intermediate_size",), frozenset({"neuron"})),
}


def replicate_signal(model: Conversion, times: int, options: GrowOptions) -> Conversion:
    """Replicate each signal head (group-differentiated growth, arXiv 2510.06949); noise heads, keys and values stay."""
    old = model.config
    config = with_fields(old, num_attention_heads=times * old.num_signal_heads + old.num_noise_heads)
    return _replicated(model, config, signal_origins(old, times, replicate=True), times, "signal", options)


def tile(model: Conversion, operator: str, times: int, options: GrowOptions) -> Conversion:
    """Tile the features of an operator of `TILED` (HyperCloning, arXiv 2409.12903); head_dim stays."""
    old, (names, kinds) = model.config, TILED[operator]
    config = with_fields(old, **{name: times * getattr(old, name) for name in names})
    return _replicated(model, config, tiled_origins(old, times, kinds), times, operator, options)


def _replicated(
    model: Conversion, config: GDAConfig, origins: dict[str, Tensor], times: int, key: str, options: GrowOptions
) -> Conversion:
    """The model with features replicated `times`. With the seed, `key` makes the noise of each operator its own."""

    def noise(name: str, weight: Tensor) -> tuple[float, torch.Generator]:
        spread = deviation(weight) or config.initializer_range  # a constant weight gets the noise of a new one
        return options.noise_std * spread, generator_for(f"{key}:{name}", options.seed)

    recipes = {
        name: _replicated_recipe(name, recipe, model.config, origins, times, noise)
        for name, recipe in model.recipes.items()
    }
    return replace(model, config=config, recipes=recipes, kept=still_kept(dict(model.kept), origins))


def _replicated_recipe(
    name: str,
    recipe: Recipe,
    config: GDAConfig,
    origins: dict[str, Tensor],
    times: int,
    noise: Callable[[str, Tensor], tuple[float, torch.Generator]],
) -> Recipe:
    repeats: dict[int, Tensor] = {}
    shares: dict[int, Tensor] = {}
    for axis, kind in enumerate(axes_of(name)):
        if kind in origins:
            (shares if reads(name, axis, config) else repeats)[axis] = origins[kind]
    if not repeats and not shares:
        return recipe

    def make(*tensors: Tensor) -> Tensor:
        made = recipe.of(*tensors)
        if not shares:
            for axis, rows in repeats.items():
                made = made.index_select(axis, rows)
            return made
        ((axis, columns),) = shares.items()  # a tensor reads its last axis and writes the one before
        matrix = made if made.dim() == 2 else made[None]
        return shared_out(matrix, repeats.get(axis - 1), columns, *noise(name, made)).view(shape)

    shape = list(recipe.spec.shape)
    how, axes = [recipe.how], ("rows", "columns")
    for axis, origin in (repeats | shares).items():
        shape[axis] = len(origin)
        how.append(f"{axes[axis]} × {times}" if axis in repeats else f"{axes[axis]} shared out to {times} replicas")
    return replace(recipe, spec=TensorSpec(tuple(shape), recipe.spec.dtype), make=make, how="; ".join(how))


def shared_out(
    weight: Tensor, rows: Tensor | None, columns: Tensor, noise: float, generator: torch.Generator
) -> Tensor:
    """Repeat the rows of a weight (out, in), and share each column out to its replicas so that they sum to it.

    `rows` and `columns` give the old row and column of each new one. The sum is exact in the dtype of the weight, a
    narrow one too, for any number of replicas. `noise` is the standard deviation of the difference between replicas,
    before it is made to sum to zero. It is less where an entry is too small to hold it exactly: no share becomes twice
    as large.
    """
    origin = torch.arange(len(weight)) if rows is None else rows
    share = occurrences(columns)
    count = int(share.max()) + 1
    made = torch.empty(len(origin), len(columns), dtype=weight.dtype)
    step = max(1, PIECE // (weight.shape[1] * count))
    for begin in range(0, len(origin), step):
        piece = weight[origin[begin : begin + step]]
        drawn = None
        if noise > 0:
            drawn = noise * torch.randn(count, *piece.shape, generator=generator)
        made[begin : begin + step] = split_exactly(piece, count, drawn)[share, :, columns].T
    return made


def split_exactly(weight: Tensor, count: int, noise: Tensor | None = None) -> Tensor:
    """`count` tensors (count, …) near `weight` / `count` + `noise` that sum to `weight` exactly, in its dtype.

    Shares are whole multiples of the last binary digit of a share, as the weight itself is. So the dtype holds each
    share exactly, even a narrow one; noise that would need more digits is reduced. The mean of the noise (count, …)
    over the shares is subtracted.
    """
    if count == 1:
        return weight.unsqueeze(0)
    info = torch.finfo(weight.dtype)
    wide = weight.to(torch.float32 if info.bits == 16 else torch.float64)
    size = (wide / count).abs()
    if noise is not None:
        noise = noise.to(wide.dtype)
        noise = noise - noise.mean(dim=0)  # after widening: the last share takes the remainder of the sum
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
    """Standard deviation over all entries, computed in pieces."""
    flat = tensor.reshape(-1)
    number, total, squares = len(flat), 0.0, 0.0
    for piece in flat.split(PIECE):
        wide = piece.double()
        total += wide.sum().item()
        squares += wide.square().sum().item()
    return max(0.0, squares / number - (total / number) ** 2) ** 0.5
