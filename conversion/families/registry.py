"""The model types that can be converted.

Llama, Mistral, Qwen2 and Qwen3 are described by the table in `llamalike`: noise heads and λ are added to them. The
families below are differential already: their tensors are renamed and reordered, and nothing is added.
"""

from gda.conversion.families import diffllama, motif
from gda.conversion.families.llamalike import LLAMALIKES

# A family is a file with these names:
#   CAN_RUN                                whether transformers has a class for the model type
#   source_specs(config)                   the tensors that a checkpoint of a source's config holds
#   mapped_config(source, dtype)           GDA's configuration for a source's, in that dtype or its own; or ValueError
#   mapped_recipes(config, source, dtype)  how each tensor is made, from that configuration and the source's tensors
#   notes(config)                          what was assumed about the source's config, or has no counterpart in GDA
DIFFERENTIAL_FAMILIES = {diffllama.MODEL_TYPE: diffllama, motif.MODEL_TYPE: motif}
# Model types with differential attention that a GDA model cannot hold, and why.
OTHER_RELATIVES = {
    "phi4flash": "in Phi-4-mini-flash-reasoning, Mamba layers alternate with differential attention",
    "motif3": "the keys and values of Motif-3 are latent (GDLA), and its MLPs have experts",
    "llama-differential": "the tensors of axolotl's differential Llama are not read",
}
CONVERTIBLE_TYPES = (*LLAMALIKES, *DIFFERENTIAL_FAMILIES)
