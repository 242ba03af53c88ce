"""LLaMA-Pro (arXiv 2401.02415): copies of layers that add nothing to the residual stream until they are trained.

layers  0 1 2 3   →   0 1 1′ 2 3 3′        o_proj and down_proj of a copy are 0, unless it is faded in
"""

from dataclasses import replace
from functools import partial

import torch

from gda.conversion.conversion import Conversion, with_fields
from gda.conversion.tensors.axes import LAYER
from gda.conversion.tensors.recipes import Recipe

ADDS_TO_THE_STREAM = ("self_attn.o_proj.", "mlp.down_proj.")


def copy_positions(layers: int, copied: list[int]) -> list[int]:
    """The positions of the copies in the grown model; each follows its original."""
    origins = sorted([*range(layers), *copied])
    return [layer for layer, origin in enumerate(origins) if layer and origins[layer - 1] == origin]


def deepen(model: Conversion, copied: list[int], *, silent: bool) -> Conversion:
    """Insert copies of these layers after their originals. Every layer keeps its λ_init and its kind of attention.

    With `silent`, copies add nothing to the residual stream. Otherwise, the caller has to fade them in.
    """
    old = model.config
    origins = sorted([*range(old.num_hidden_layers), *copied])
    new = copy_positions(old.num_hidden_layers, copied)

    assert old.layer_types is not None  # filled in at construction
    layer_types, lambda_init = [old.layer_types[origin] for origin in origins], old.lambda_init
    if lambda_init is None or isinstance(lambda_init, list):
        lambda_init = [old.layer_lambda_init(origin) for origin in origins]
    config = with_fields(old, num_hidden_layers=len(origins), layer_types=layer_types, lambda_init=lambda_init)

    by_layer: dict[int, dict[str, Recipe]] = {origin: {} for origin in origins}
    recipes = {}
    for name, recipe in model.recipes.items():
        if match := LAYER.fullmatch(name):
            by_layer[int(match.group(1))][match.group(2)] = recipe
        else:
            recipes[name] = recipe
    for layer, origin in enumerate(origins):
        for rest, recipe in by_layer[origin].items():
            made = _of_copy(recipe, rest, origin, silent) if layer in new else recipe
            recipes[f"model.layers.{layer}.{rest}"] = made
    copies = rf"model\.layers\.({'|'.join(map(str, new))})\..+"
    return replace(model, config=config, recipes=recipes, new=(copies, *model.new))


def _of_copy(recipe: Recipe, rest: str, origin: int, silent: bool) -> Recipe:
    if silent and rest.startswith(ADDS_TO_THE_STREAM):
        make = partial(torch.zeros, recipe.spec.shape, dtype=recipe.spec.dtype)
        return Recipe(recipe.spec, (), make, f"zero: this copy of layer {origin} has no effect at first")
    return replace(recipe, how=f"of layer {origin}: {recipe.how}")
