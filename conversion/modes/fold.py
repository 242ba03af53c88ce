"""Folding a GDA model with a shared base and low-rank updates into the equal dense one: W_k = B + P_k R_k."""

from functools import partial

import torch

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.conversion import Conversion, with_fields
from gda.conversion.modes.low_rank import PARTS, dense_specs, folded
from gda.conversion.options import NOTHING_TO_FOLD, WriteOptions
from gda.conversion.sources.source import Source
from gda.conversion.tensors.recipes import DTYPE_CHOICES, Recipe, copied, is_lossless
from gda.conversion.tensors.safetensors_io import TensorSpec


def plan(source: Source, options: WriteOptions) -> Conversion:
    """Multiply the factored projections of a GDA model out; ValueError if they are dense already."""
    factored, dtype = source.config, DTYPE_CHOICES[options.dtype]
    assert isinstance(factored, GDAConfig)
    if factored.qk_rank is None:
        raise ValueError(f"{source.name} {NOTHING_TO_FOLD}")
    recipes = folded_recipes(factored, source.specs, dtype)
    products = [recipe for recipe in recipes.values() if len(recipe.sources) == len(PARTS)]
    wide = all(recipe.spec.dtype.itemsize >= 4 for recipe in products)
    lossless = wide and is_lossless(recipes, source.specs)
    narrow = str(products[0].spec.dtype).removeprefix("torch.")
    note = f"the folded weights are rounded to {narrow}, which is not lossless; --dtype float32 avoids that"
    return Conversion(
        mode="fold",
        config=with_fields(factored, qk_rank=None, dtype=dtype or factored.dtype),
        recipes=recipes,
        lossless=lossless,
        notes=[] if lossless else [note],
    )


def folded_recipes(config: GDAConfig, source: dict[str, TensorSpec], dtype: torch.dtype | None) -> dict[str, Recipe]:
    """The recipes of the dense checkpoint, given the configuration and the tensors of one that may be factored."""
    recipes = {}
    for name, spec in dense_specs(config).items():
        projection = next((p for p in config.factored_projections if f".{p}_proj." in name), None)
        if projection is None:
            recipes[name] = copied(name, source[name], dtype)
        elif name.endswith(".bias"):
            bias = name.replace("_proj.bias", "_up.bias")
            recipes[name] = copied(bias, source[bias], dtype)
        else:
            parts = tuple(name.replace("_proj.", f"_{part}.") for part in PARTS)
            target = TensorSpec(spec.shape, dtype or source[parts[0]].dtype)
            make = partial(folded, roles=config.factored_projections[projection], head_dim=config.head_dim)
            recipes[name] = Recipe(target, parts, make, "of each head, the base of its group + up · down")
    return recipes
