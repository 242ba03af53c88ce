r"""How each tensor of a split model is made: some query heads of each KV group become noise heads.

source  q heads          0 1 2 3   4 5 6 7   …          k, v, MLP, norms, embeddings: copied
        KV heads            0         1

GDA     q heads          0 2 3 1   4 5 6 7   …          q: rows reordered; the last head of each group is the noise head
        KV heads            0         1                 o: solved again for the heads that remain
        λ                     λ of the layer
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedConfig

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.families.llamalike import source_fields
from gda.conversion.families.plain_heads import select_heads
from gda.conversion.split.heads import Split
from gda.conversion.tensors.axes import LAYER
from gda.conversion.tensors.recipes import Recipe, checkpoint_specs, copied, lambda_recipe
from gda.conversion.tensors.safetensors_io import TensorSpec

# Values of λ that the closed form tries for each layer, by type. A token-dependent λ starts with a projection of 0.
LAMBDAS: dict[str, list[float]] = {"reparameterized": [0.1, 0.3], "tanh": [0.0], "sigmoid": [0.5]}


def split_config(
    source: PreTrainedConfig, *, noise_heads: int, lambda_type: str, dtype: torch.dtype | None
) -> GDAConfig:
    """The GDA configuration of `source` with `noise_heads` of its heads as noise heads.

    λ_init is that of the start; a finished split has one for each layer.
    """
    return GDAConfig(
        **source_fields(source),
        num_attention_heads=source.num_attention_heads,
        num_noise_heads=noise_heads,
        kv_layout="shared",
        lambda_type=lambda_type,
        lambda_init=LAMBDAS[lambda_type][0],
        dtype=dtype or source.dtype,
        architectures=["GDAForCausalLM"],
    )


def drafts(config: GDAConfig) -> list[Split]:
    """A placeholder for each layer's split, before it is chosen."""
    order = list(range(config.num_attention_heads))
    return [Split(order, 0.0, 0.0, 0.0, torch.empty(0))] * config.num_hidden_layers


def split_recipes(
    config: GDAConfig,
    source: dict[str, TensorSpec],
    splits: Sequence[Split],
    *,
    trained: Callable[[int, str], torch.Tensor] | None,
    seed: int,
    dtype: torch.dtype | None,
) -> dict[str, Recipe]:
    """How each tensor of the result is made, in the order in which transformers saves them.

    `trained` returns a trained attention tensor, given its layer and its name in the layer; None without training.
    """
    recipes = {}
    for name, spec in checkpoint_specs(config).items():
        recipe = lambda_recipe(name, spec, seed) if ".lambda_" in name else copied(name, source[name], dtype)
        match = LAYER.fullmatch(name)
        if match is not None and match[2].startswith("self_attn."):
            layer, inner = int(match[1]), match[2]
            split, target = splits[layer], TensorSpec(spec.shape, recipe.spec.dtype)
            if inner.startswith("self_attn.q_proj."):
                make = partial(select_heads, heads=split.order, head_dim=config.head_dim)
                how = f"rows of heads {split.order}; the last head of each group is noise"
                recipe = Recipe(target, (name,), make, how)
            elif inner == "self_attn.o_proj.weight":
                how = "solved to reproduce the source's attention output on calibration text"
                recipe = Recipe(target, (name,), partial(_instead, split.output), how)
            if trained is not None:
                how = f"{recipe.how}; then trained on the source's predictions"
                recipe = replace(recipe, make=partial(_instead, trained(layer, inner)), how=how)
        recipes[name] = recipe
    return recipes


def _instead(tensor: torch.Tensor, *_source: torch.Tensor) -> torch.Tensor:
    """The tensor that takes the place of the source's."""
    return tensor
