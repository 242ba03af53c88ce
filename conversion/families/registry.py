"""The model types that can be converted.

Llama, Mistral, Qwen2 and Qwen3 are described by the table in `llamalike`: noise heads and λ are added to them. The
families below are differential already: their tensors are renamed and reordered, and nothing is added.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.families import diffllama, motif
from gda.conversion.families.llamalike import LLAMALIKES
from gda.conversion.tensors.recipes import Recipe, checkpoint_specs
from gda.conversion.tensors.safetensors_io import TensorSpec


@dataclass(frozen=True)
class DifferentialFamily:
    """How checkpoints of one differential model type become GDA checkpoints.

    Attributes:
        config: GDA's configuration for a source's, in the given dtype or its own. Raises ValueError.
        recipes: How each tensor is made, from that configuration and the source's tensors.
        notes: What was guessed about the source's config, or has no counterpart in GDA.
        specs: The tensors that a checkpoint of a source's config holds.
        can_run: Whether transformers has a class for the model type.
    """

    config: Callable[[PreTrainedConfig, torch.dtype | None], GDAConfig]
    recipes: Callable[[GDAConfig, dict[str, TensorSpec], torch.dtype | None], dict[str, Recipe]]
    notes: Callable[[PreTrainedConfig], list[str]]
    specs: Callable[[PreTrainedConfig], dict[str, TensorSpec]] = checkpoint_specs
    can_run: bool = True


DIFFERENTIAL_FAMILIES = {
    diffllama.MODEL_TYPE: DifferentialFamily(diffllama.mapped_config, diffllama.mapped_recipes, diffllama.notes),
    motif.MODEL_TYPE: DifferentialFamily(
        motif.mapped_config, motif.mapped_recipes, motif.notes, specs=motif.source_specs, can_run=False
    ),
}
# Model types with differential attention that a GDA model cannot hold, and why.
OTHER_RELATIVES = {
    "phi4flash": "in Phi-4-mini-flash-reasoning, Mamba layers alternate with differential attention",
    "motif3": "the keys and values of Motif-3 are latent (GDLA), and its MLPs have experts",
    "llama-differential": "the tensors of axolotl's differential Llama are not read",
}
CONVERTIBLE_TYPES = (*LLAMALIKES, *DIFFERENTIAL_FAMILIES)
