"""Mapping a differential model to GDA: a Motif or a DiffLlama tensor by tensor, or a GDA model unchanged."""

from gda.common.errors import errors_as
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.conversion import Conversion, with_fields
from gda.conversion.families.registry import DIFFERENTIAL_FAMILIES
from gda.conversion.modes.checks import losses, refuse_new_heads
from gda.conversion.options import WriteOptions
from gda.conversion.sources.source import Source
from gda.conversion.tensors.recipes import DTYPE_CHOICES, all_copied, is_lossless


def plan(source: Source, options: WriteOptions) -> Conversion:
    """Keep every tensor of a differential model, under GDA's name and in GDA's order of rows."""
    kind, dtype, notes = source.config.model_type, DTYPE_CHOICES[options.dtype], []
    refuse_new_heads(
        options,
        f"is only for a Llama, Mistral or Qwen; {source.name} is a {kind} model and already has noise heads and λ",
    )
    if isinstance(source.config, GDAConfig):
        config = with_fields(source.config, dtype=dtype or source.config.dtype)
        recipes = all_copied(config, source.specs, dtype)
    else:
        family = DIFFERENTIAL_FAMILIES[kind]
        with errors_as(source.name, ValueError):
            config = family.mapped_config(source.config, dtype)
        recipes = family.mapped_recipes(config, source.specs, dtype)
        notes = family.notes(source.config)
    return Conversion(
        mode="map",
        config=config,
        recipes=recipes,
        lossless=is_lossless(recipes, source.specs),
        notes=losses(source, recipes, options.dtype) + notes,
    )
