r"""A GDA model whose λ is a number and that has no head norm, as a decoder with plain attention.

Its subtraction is linear in the outputs of the attention maps. So each map becomes a query head of its own, and o_proj
subtracts (W_i: the columns of o_proj that read signal head i):

    y = Σ_i W_i (o_i − λ o_noise(i)) = Σ_i W_i o_i + Σ_n (−λ Σ_{i in group n} W_i) o_n

    shared keys    GDA    q heads    s s s n   s s s n       o_proj   W W W         W W W
                          KV heads   0         1
                   plain  q heads    s s s n   s s s n       o_proj   W W W −λΣW    W W W −λΣW
                          KV heads   0         1             a noise query of several KV heads is repeated for each

    paired keys    GDA    KV heads   keys k, k'; values v1, v2; both maps read both values
                   plain  KV heads   (k, v1) (k, v2) (k', v1) (k', v2); a noise query is repeated for each signal head

While λ is 0, the noise heads contribute nothing and can be dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.tensors.recipes import Recipe
from gda.conversion.tensors.safetensors_io import TensorSpec


@dataclass(frozen=True)
class QueryHead:
    """A query head of the plain decoder."""

    row: int  # the head of GDA's q_proj that it is
    blocks: tuple[int, ...]  # the blocks of head_dim columns of GDA's o_proj whose sum reads its output
    is_noise: bool  # whether this sum is multiplied by −λ


@dataclass(frozen=True)
class PlainHeads:
    """The heads of the plain decoder.

    Attributes:
        query: Its query heads, KV head by KV head.
        key, value: For each of its KV heads, the head of GDA's k_proj and v_proj that it is.
    """

    query: list[QueryHead]
    key: list[int]
    value: list[int]

    @property
    def rows(self) -> dict[str, list[int]]:
        """By projection, the head of GDA's projection that each head of the plain decoder's is."""
        return {"q_proj": [head.row for head in self.query], "k_proj": self.key, "v_proj": self.value}


def plain_heads(config: GDAConfig, *, with_noise: bool) -> PlainHeads:
    """The heads of the plain decoder. Without noise heads, it computes what the model computes at λ = 0."""
    members = (False, True) if with_noise else (False,)
    if config.kv_layout == "paired":
        return _heads_of_pairs(config, members)
    size, kv_heads = config.signal_group_size, list(range(config.num_key_value_heads))
    heads = []
    for first in range(0, config.num_signal_heads, size):
        group = tuple(range(first, first + size))
        heads += [QueryHead(_row(config, head, False), (head,), False) for head in group]
        if with_noise:
            heads.append(QueryHead(_row(config, first, True), group, True))
    return PlainHeads(heads, kv_heads, kv_heads)


def _heads_of_pairs(config: GDAConfig, members: tuple[bool, ...]) -> PlainHeads:
    heads, key, value = [], [], []
    per_pair = config.num_signal_heads // (config.num_key_value_heads // 2)
    for pair in range(config.num_key_value_heads // 2):
        for is_noise in members:
            for slab in (0, 1):
                key.append(2 * pair + is_noise)
                value.append(2 * pair + slab)
                for head in range(pair * per_pair, (pair + 1) * per_pair):
                    heads.append(QueryHead(_row(config, head, is_noise), (2 * head + slab,), is_noise))
    return PlainHeads(heads, key, value)


def _row(config: GDAConfig, signal: int, is_noise: bool) -> int:
    """The head of q_proj that a signal head or its noise head is; groups are `[signal_1 … signal_r, noise]`."""
    group, place = divmod(signal, config.signal_noise_ratio)
    return group * (config.signal_noise_ratio + 1) + (config.signal_noise_ratio if is_noise else place)


def plain_recipes(
    config: GDAConfig, recipes: dict[str, Recipe], heads: PlainHeads, lambdas: Sequence[float]
) -> dict[str, Recipe]:
    """The recipes of the plain decoder with these heads, given those of a GDA model, dense and without masks.

    `lambdas` are λ of each layer.
    """
    rows, plain = heads.rows, {}
    for name, recipe in recipes.items():
        projection, parameter = name.split(".")[-2:]
        if projection in rows:
            recipe = _with_rows(recipe, rows[projection], config.head_dim)
        elif (projection, parameter) == ("o_proj", "weight"):
            recipe = _with_columns(recipe, heads.query, lambdas[_layer(name)], config.head_dim)
        if ".lambda_" not in name:
            plain[name] = recipe
    return plain


def zero_biases(recipes: dict[str, Recipe], projections: tuple[str, ...]) -> dict[str, Recipe]:
    """Biases of 0 for these projections of all layers."""
    biases = {}
    for name, recipe in recipes.items():
        if name.endswith(tuple(f".{projection}.weight" for projection in projections)):
            spec = TensorSpec(recipe.spec.shape[:1], recipe.spec.dtype)
            biases[f"{name.removesuffix('weight')}bias"] = Recipe(spec, (), partial(torch.zeros, spec.shape), "zero")
    return biases


def unmasked_recipes(config: GDAConfig, recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    """The recipes with the masks of masked growth (arXiv 2305.02869) multiplied into o_proj and down_proj.

    Raises:
        ValueError: for new layers that are partly blended in, which no plain layer computes.
    """
    if config.blended_layers and config.fade:
        raise ValueError(
            f"new layers are blended with their input (blended_layers) at fade={config.fade:.4g}, which no plain layer "
            "computes; train the model until its fade is 1"
        )
    unmasked = dict(recipes)
    for name, recipe in recipes.items():
        projection, parameter = name.split(".")[-2:]
        if config.fade is None or projection not in ("o_proj", "down_proj"):
            continue
        if _layer(name) in (config.masked_layers or []):
            scale = torch.tensor(config.fade, dtype=torch.float64)
        elif parameter == "weight":
            scale = _mask(config, projection)
        else:
            continue
        if (scale != 1).any():
            unmasked[name] = _then(recipe, recipe.spec.shape, "masks multiplied in", partial(_scaled, scale=scale))
    return unmasked


def _mask(config: GDAConfig, projection: str) -> Tensor:
    """The factor of each input of o_proj or down_proj: `fade` for new heads or neurons, else 1."""
    if projection == "down_proj":
        is_new = torch.arange(config.intermediate_size) >= config.intermediate_size - (config.masked_neurons or 0)
    else:
        place = torch.arange(config.num_signal_heads) % config.signal_group_size
        is_new = place >= config.signal_group_size - (config.masked_signal_heads or 0)
        is_new = is_new.repeat_interleave(config.value_width)
    return torch.where(is_new, float(config.fade or 0.0), 1.0).double()


def _scaled(tensor: Tensor, *, scale: Tensor) -> Tensor:
    return tensor.double() * scale


def _layer(name: str) -> int:
    return int(name.split(".")[2])


def _then(recipe: Recipe, shape: tuple[int, ...], how: str, make: Callable[[Tensor], Tensor]) -> Recipe:
    """The recipe with one more step. The tensor is rounded to its dtype once, after all steps."""

    def both(*tensors: Tensor) -> Tensor:
        return make(recipe.make(*tensors))

    return replace(recipe, spec=TensorSpec(shape, recipe.spec.dtype), make=both, how=f"{recipe.how}; {how}")


def _with_rows(recipe: Recipe, heads: list[int], head_dim: int) -> Recipe:
    """The rows of these heads of a projection's weight or bias."""
    rows, *rest = recipe.spec.shape
    if heads == list(range(rows // head_dim)):
        return recipe
    make = partial(select_heads, heads=heads, head_dim=head_dim)
    return _then(recipe, (len(heads) * head_dim, *rest), f"rows of heads {_short(heads)}", make)


def _short(heads: list[int]) -> str:
    return f"{', '.join(map(str, heads[:8]))}{', …' if len(heads) > 8 else ''}"


def select_heads(projection: Tensor, *, heads: list[int], head_dim: int) -> Tensor:
    """Rows of a weight or bias: (n · d, …) → (len(heads) · d, …)."""
    return projection.unflatten(0, (-1, head_dim))[heads].flatten(0, 1)


def _with_columns(recipe: Recipe, heads: list[QueryHead], lambda_: float, head_dim: int) -> Recipe:
    """o_proj with a block of columns for each query head."""
    hidden, columns = recipe.spec.shape
    if [head.blocks for head in heads] == [(block,) for block in range(columns // head_dim)]:
        return recipe
    make = partial(columns_of, heads=heads, lambda_=lambda_, head_dim=head_dim)
    how = f"columns of noise heads: −λ times the sum of their group's, λ = {lambda_:.6g}"
    return _then(recipe, (hidden, len(heads) * head_dim), how, make)


def columns_of(output: Tensor, *, heads: list[QueryHead], lambda_: float, head_dim: int) -> Tensor:
    """o_proj (hidden, blocks · d) → (hidden, H · d) in float64."""
    blocks = output.double().unflatten(1, (-1, head_dim))
    columns = [(-lambda_ if head.is_noise else 1.0) * blocks[:, list(head.blocks)].sum(dim=1) for head in heads]
    return torch.stack(columns, dim=1).flatten(1, 2)
