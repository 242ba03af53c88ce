"""Mapping a differential model to GDA: a Motif or a DiffLlama tensor by tensor, or a GDA model unchanged."""

import copy

import torch

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.conversion import Conversion
from gda.conversion.families.registry import DIFFERENTIAL_FAMILIES
from gda.conversion.modes.checks import NEW_HEADS_ONLY, errors_named, losses, refuse
from gda.conversion.options import WriteOptions
from gda.conversion.sources.source import Source
from gda.conversion.tensors.recipes import DTYPES, Recipe, checkpoint_specs, copied, is_lossless
from gda.conversion.tensors.safetensors_io import TensorSpec


def plan(source: Source, options: WriteOptions) -> Conversion:
    """Keep every tensor of a differential model, under GDA's name and in GDA's order of rows."""
    kind, dtype, notes = source.config.model_type, DTYPES[options.dtype], []
    refuse(
        options,
        NEW_HEADS_ONLY,
        f"is only for a Llama, Mistral or Qwen; {source.name} is a {kind} model and already has noise heads and λ",
    )
    if isinstance(source.config, GDAConfig):
        config = same_config(source.config, dtype)
        recipes = same_recipes(config, source.specs, dtype)
    else:
        family = DIFFERENTIAL_FAMILIES[kind]
        with errors_named(source):
            config = family.config(source.config, dtype)
        recipes = family.recipes(config, source.specs, dtype)
        notes = family.notes(source.config)
    return Conversion(
        mode="map",
        config=config,
        recipes=recipes,
        lossless=is_lossless(recipes, source.specs),
        notes=losses(source, recipes, options.dtype) + notes,
    )


def same_config(config: GDAConfig, dtype: torch.dtype | None) -> GDAConfig:
    """A copy of the configuration of a GDA model, in `dtype` if given."""
    same = copy.deepcopy(config)
    if dtype is not None:
        same.dtype = dtype
    return same


def same_recipes(config: GDAConfig, source: dict[str, TensorSpec], dtype: torch.dtype | None) -> dict[str, Recipe]:
    """The tensors of a GDA model as they are, in `dtype` if given; λ keeps its own."""
    names = checkpoint_specs(config)
    return {name: copied(name, source[name], None if ".lambda_" in name else dtype) for name in names}
