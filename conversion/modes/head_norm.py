"""A head norm for a pretrained model: exact at a fade of 0, and not far from it at 1.

An RMSNorm with the usual epsilon gives every head's output the same size. In a pretrained model that breaks much, since
heads say "nothing here" with an output near zero. With an epsilon of 1, the norm is nearly linear for outputs below 1,
x / √(mean x² + 1) ≈ x, and large outputs shrink most. Training decides how much it should normalize.

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
SMALLEST = OUTPUT_SIZE / 1024  # heads that output almost nothing are not scaled further
UNSCALED_NOTE = (
    "v_proj and o_proj in float16 are not scaled, so the head norm changes the model more at the end of the fade; "
    "--dtype float32 scales them"
)


def weight_recipe(name: str, spec: TensorSpec, config: GDAConfig, dtype: torch.dtype) -> Recipe:
    """The norm's weight: 1 / (1 − λ_init), which cancels the paper's factor, divided by √(1 − λ).

    Subtracting λ times a similar map makes outputs up to 1 − λ times smaller. The root splits the difference between
    making up for that at the end of the fade, and changing nothing in its middle.
    """
    lambda_init = config.layer_lambda_init(int(name.split(".")[2]))
    at_end = 0.5 if config.lambda_type == "sigmoid" else lambda_init
    weight = 1 / ((1 - lambda_init) * (1 - at_end) ** 0.5)
    return Recipe(
        TensorSpec(spec.shape, dtype), (), lambda: torch.full(spec.shape, weight), "1 / ((1 − λ_init) √(1 − λ))"
    )


def scales_values(source: dict[str, TensorSpec], dtype: torch.dtype | None) -> bool:
    """Whether values are scaled: not if any is in float16, whose smallest numbers would be rounded."""
    return all(
        (dtype or spec.dtype) != torch.float16
        for name, spec in source.items()
        if name.endswith(("v_proj.weight", "v_proj.bias", "o_proj.weight"))
    )


def with_scaled_values(recipe: Recipe, name: str, config: GDAConfig, source: dict[str, TensorSpec]) -> Recipe:
    """The recipe of tensor `name`, multiplied by its KV heads' powers of two if it is v_proj, divided if o_proj."""
    attention, _, parameter = name.partition("self_attn.")
    if parameter not in ("v_proj.weight", "v_proj.bias", "o_proj.weight"):
        return recipe
    num_groups = config.num_key_value_heads // (2 if config.kv_layout == "paired" else 1)
    values = [f"{attention}self_attn.v_proj.{part}" for part in ("weight", "bias")]
    scaled_by = (f"{attention}input_layernorm.weight", *(each for each in values if each in source))

    def make(tensor: torch.Tensor, *measured: torch.Tensor) -> torch.Tensor:
        scales = powers_of_two(*measured, num_groups=num_groups)
        made = recipe.of(tensor)  # first, since float16 could not hold the product
        if parameter == "o_proj.weight":
            return made.unflatten(1, (num_groups, -1)).div(scales[:, None]).flatten(1)
        heads = made.unflatten(0, (num_groups, -1))
        return heads.mul(scales.view(-1, *[1] * (heads.dim() - 1))).flatten(0, 1)

    does = "divided" if parameter == "o_proj.weight" else "multiplied"
    how = f"{recipe.how}; {does} by a power of two per KV head"
    return replace(recipe, make=make, how=how, scaled_by=scaled_by)


def powers_of_two(
    norm: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None, *, num_groups: int
) -> torch.Tensor:
    """(hidden,), (G · d, hidden), (G · d,) → (G,) in float32: what brings heads to an output of about OUTPUT_SIZE.

    Inputs are taken as independent, with the variance that the layer's norm gives them. Attention averages them, and
    passes a bias on as it is.
    """
    squares = AVERAGING**2 * (value.double() * norm.double()).square().sum(1)
    if bias is not None:
        squares = squares + bias.double().square()
    size = squares.unflatten(0, (num_groups, -1)).mean(1).sqrt()
    return torch.exp2(torch.log2(OUTPUT_SIZE / size.clamp_min(SMALLEST)).round()).float()
