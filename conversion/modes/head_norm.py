"""A head norm for a pretrained model: exact at a fade of 0, and close to it at 1.

An RMSNorm with the usual epsilon gives every head's output the same size. In a pretrained model that breaks much, since
heads say "nothing here" with an output near zero. With an epsilon of 1, and outputs well below 1, the norm is close to
the identity, x / √(mean x² + 1) ≈ x, and only large outputs shrink. Training decides how much it should normalize.

Outputs get that size by a power of two per KV head, which rounds nothing: v_proj is multiplied, o_proj divided by it.
"""

from dataclasses import replace

import torch

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.tensors.recipes import Recipe
from gda.conversion.tensors.safetensors_io import TensorSpec

EPS = 1.0
OUTPUT_SIZE = 0.25  # RMS of a head's output that the powers of two aim at
# Attention averages values, so its outputs are smaller than these: 0.12 to 0.39 times in the layers of SmolLM2-135M.
AVERAGING = 0.2
LAMBDA_AT_START = {"sigmoid": 0.5, "tanh": 0.0}


def weight_recipe(name: str, spec: TensorSpec, config: GDAConfig, dtype: torch.dtype) -> Recipe:
    """The norm's weight: 1 / (1 − λ_init), which cancels the paper's factor, divided by √(1 − λ).

    Subtracting λ times a similar map makes outputs up to 1 − λ times smaller. The root splits the difference between
    making up for that at the end of the fade, and changing nothing in its middle.
    """
    lambda_init = config.layer_lambda_init(int(name.split(".")[2]))
    at_end = LAMBDA_AT_START.get(config.lambda_type, lambda_init)
    weight = 1 / ((1 - lambda_init) * (1 - at_end) ** 0.5)
    return Recipe(
        TensorSpec(spec.shape, dtype), (), lambda: torch.full(spec.shape, weight), "1 / ((1 − λ_init) √(1 − λ))"
    )


def with_scaled_values(recipe: Recipe, name: str, config: GDAConfig) -> Recipe:
    """The recipe of tensor `name`, multiplied by its KV heads' powers of two if it is v_proj, divided if o_proj.

    Nothing is scaled in float16, whose smallest numbers would be rounded.
    """
    attention, _, parameter = name.partition("self_attn.")
    if parameter not in ("v_proj.weight", "v_proj.bias", "o_proj.weight") or recipe.spec.dtype == torch.float16:
        return recipe
    num_groups = config.num_key_value_heads // (2 if config.kv_layout == "paired" else 1)

    def make(tensor: torch.Tensor, value: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        scales = powers_of_two(value, norm, num_groups)
        if parameter == "o_proj.weight":
            return recipe.make(tensor).unflatten(1, (num_groups, -1)).div(scales[:, None]).flatten(1)
        scaled = recipe.make(tensor).unflatten(0, (num_groups, -1))
        return scaled.mul(scales.view(-1, *[1] * (scaled.dim() - 1))).flatten(0, 1)

    sources = (name, f"{attention}self_attn.v_proj.weight", f"{attention}input_layernorm.weight")
    does = "divided" if parameter == "o_proj.weight" else "multiplied"
    return replace(recipe, sources=sources, make=make, how=f"{recipe.how}; {does} by a power of two per KV head")


def powers_of_two(value: torch.Tensor, norm: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(G · d, hidden) → (G,): what gives the heads that read each value an output of about OUTPUT_SIZE.

    Inputs are taken as independent, with the variance that the layer's norm gives them.
    """
    variance = (value.double() * norm.double()).square().sum(1).unflatten(0, (num_groups, -1)).mean(1)
    size = AVERAGING * variance.sqrt().clamp_min(1e-6)
    return torch.exp2(torch.log2(OUTPUT_SIZE / size).round()).to(value.dtype)
