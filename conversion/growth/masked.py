"""Masked Structure Growth (arXiv 2305.02869): new heads and neurons, random or copied layers, at a fade of 0."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.conversion import Conversion, with_fields
from gda.conversion.growth.features import NEW, signal_origins, still_kept
from gda.conversion.growth.growth import grown_neurons
from gda.conversion.options import GrowOptions
from gda.conversion.tensors.axes import LAYER, axes_of
from gda.conversion.tensors.recipes import LAMBDA_VECTOR_STD, Recipe, checkpoint_specs, generator_for
from gda.conversion.tensors.safetensors_io import TensorSpec


def mask_growth(model: Conversion, options: GrowOptions, new_layers: list[int]) -> Conversion:
    """Add new heads and neurons, and make the copied layers `new_layers` new, at a fade of 0.

    New layers get random weights or, with `--new-layers copy`, are blended in as they are.

    Raises:
        ValueError: if something of the model is being faded in already, at a fade that is not 0.
    """
    old = model.config
    if old.fade:
        part = "the head norm" if old.faded_head_norm else "λ"
        raise ValueError(
            f"--masked: {part} of the source is at fade {old.fade:g}, but new parts start at 0; "
            "train the source until its fade is 1"
        )
    origins: dict[str, Tensor] = {}
    changes: dict[str, Any] = {"fade": 0.0, "masked_layers": new_layers or None}
    changes["blended_layers"] = bool(new_layers and options.new_layers == "copy") or None
    if options.signal is not None:
        times = int(options.signal)
        origins |= signal_origins(old, times, replicate=False)
        changes["num_attention_heads"] = times * old.num_signal_heads + old.num_noise_heads
        changes["masked_signal_heads"] = (times - 1) * old.signal_group_size
    if options.mlp is not None:
        neurons = grown_neurons(options.mlp, old.intermediate_size)
        added = neurons - old.intermediate_size
        origins["neuron"] = torch.cat((torch.arange(old.intermediate_size), torch.full((added,), NEW)))
        changes |= {"intermediate_size": neurons, "masked_neurons": added}
    config = with_fields(old, **changes)
    shapes = {name: spec.shape for name, spec in checkpoint_specs(config).items()}
    recipes = {
        name: _masked_recipe(name, recipe, shapes[name], config, origins, options.seed)
        for name, recipe in model.recipes.items()
    }
    return replace(model, config=config, recipes=recipes, kept=still_kept(dict(model.kept), origins))


def _masked_recipe(
    name: str, recipe: Recipe, shape: tuple[int, ...], config: GDAConfig, origins: dict[str, Tensor], seed: int
) -> Recipe:
    spec = TensorSpec(shape, recipe.spec.dtype)

    def draw() -> Tensor:
        return _initialized(name, shape, config, generator_for(f"masked:{name}", seed))

    if (layer := LAYER.fullmatch(name)) and config.is_new_layer(int(layer.group(1))):
        return Recipe(spec, (), draw, "new layer, initialized as in a new model")
    axis = next((axis for axis, kind in enumerate(axes_of(name)) if kind in origins), None)
    if axis is None:
        return recipe
    kept = torch.nonzero(origins[str(axes_of(name)[axis])] != NEW).flatten()

    def make(*tensors: Tensor) -> Tensor:
        old = recipe.of(*tensors)
        return draw().to(spec.dtype).index_copy_(axis, kept, old)

    what = "columns" if axis == 1 else "rows"
    return replace(recipe, spec=spec, make=make, how=f"{recipe.how}; new {what} initialized as in a new model")


def _initialized(name: str, shape: tuple[int, ...], config: GDAConfig, generator: torch.Generator) -> Tensor:
    """The tensor `name` in float32, initialized as `GDAForCausalLM` initializes it."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if name.endswith(("norm.weight", "subln.weight")):
        return torch.ones(shape)
    if name.endswith("act_fn.weight"):
        return torch.full(shape, 1 / 3)
    std = float(config.initializer_range)
    if ".lambda_" in name and not name.endswith("lambda_proj.weight"):
        std = LAMBDA_VECTOR_STD
    elif name.endswith("_base.weight"):
        std /= 2**0.5
    elif name.endswith("_up.weight"):
        assert config.qk_rank is not None  # otherwise there is no such tensor
        std = (2 * config.qk_rank) ** -0.5
    return std * torch.randn(shape, generator=generator)
