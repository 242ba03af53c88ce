"""Systems that are differential already: their checkpoints become GDA by another order of rows, or by none."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.families import diffllama, motif
from gda.conversion.tensors.recipes import Recipe
from gda.conversion.tensors.safetensors_io import TensorSpec


@dataclass(frozen=True)
class Relative:
    """How the checkpoints of one model type are read.

    Attributes:
        config: The GDA configuration of a source's, in a dtype or in its own. Raises ValueError.
        recipes: How each tensor is made, given that configuration and the source's tensors.
        notes: What of the source's config was guessed, or is left out.
    """

    config: Callable[[PreTrainedConfig, torch.dtype | None], GDAConfig]
    recipes: Callable[[GDAConfig, dict[str, TensorSpec], torch.dtype | None], dict[str, Recipe]]
    notes: Callable[[PreTrainedConfig], list[str]]


RELATIVES = {
    diffllama.MODEL_TYPE: Relative(diffllama.mapped_config, diffllama.mapped_recipes, diffllama.notes),
    motif.MODEL_TYPE: Relative(motif.mapped_config, motif.mapped_recipes, motif.notes),
}
