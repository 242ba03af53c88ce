r"""Which head counts can be split, and how each tensor of the result is made.

source  q heads          0 1 2 3   4 5 6 7   …          k, v, MLP, norms, embeddings: copied
        KV heads            0         1

GDA     q heads          0 2 3 1   4 5 6 7   …          rows of q in another order; in each group the last is noise
        KV heads            0         1                 o: solved again, for the heads that are left
        λ                     λ of the layer
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedConfig

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.families.llamalike import source_fields
from gda.conversion.split.heads import Split
from gda.conversion.split.merge import Merge
from gda.conversion.tensors.axes import LAYER
from gda.conversion.tensors.recipes import Recipe, checkpoint_specs, copied, lambda_recipe
from gda.conversion.tensors.safetensors_io import TensorSpec

# λ to try for a layer, by type. One that depends on the token begins where its projection is 0.
LAMBDAS: dict[str, list[float]] = {"reparameterized": [0.1, 0.3], "tanh": [0.0], "sigmoid": [0.5]}
# Projections whose tensors are those of the merged layer, where KV heads are merged.
MERGED = ("q_proj", "k_proj", "v_proj")


def possible_noise_heads(heads: int, kv_heads: int) -> list[int]:
    """Every number of `heads` query heads over `kv_heads` KV heads that can become noise heads."""
    in_group = heads // kv_heads
    return [kv_heads * noise for noise in range(1, in_group) if in_group % noise == 0]


def split_options(heads: int, kv_heads: int) -> str:
    """What `--noise-heads` may be, for a message."""
    possible = ", ".join(f"{each} ({heads // each - 1}:1)" for each in possible_noise_heads(heads, kv_heads))
    if not possible:
        merged = " or ".join(map(str, possible_merges(kv_heads)))
        return (
            f"with {heads} query heads over {kv_heads} KV heads none shares a KV head, as signal and noise must; "
            f"{f'--merge-kv {merged} merges KV heads first, and ' if merged else ''}--mode expand adds noise heads"
        )
    return f"possible for --noise-heads: {possible}"


def possible_merges(kv_heads: int) -> list[int]:
    """Every number of KV heads that `kv_heads` of them can be merged to, in groups of equal size."""
    return [groups for groups in range(1, kv_heads) if kv_heads % groups == 0]


def kv_heads_of(source: PreTrainedConfig, merge_kv: int | None) -> int:
    """The KV heads of the result, with the source's merged to `merge_kv`, or as they are.

    Raises:
        ValueError: for a number that they cannot be merged to, naming those that can.
    """
    kv_heads: int = source.num_key_value_heads
    if merge_kv is None:
        return kv_heads
    if merge_kv not in possible_merges(kv_heads):
        possible = ", ".join(map(str, possible_merges(kv_heads)))
        remedy = f"possible: {possible}" if possible else "leave --merge-kv away"
        raise ValueError(f"--merge-kv {merge_kv}: the source has {kv_heads} KV heads to merge; {remedy}")
    return merge_kv


def split_config(
    source: PreTrainedConfig,
    *,
    noise_heads: int | None,
    lambda_type: str,
    dtype: torch.dtype | None,
    merge_kv: int | None = None,
) -> GDAConfig:
    """The GDA configuration of `source` with `noise_heads` of its heads as noise heads (one for each KV head if None).

    With `merge_kv` it has that many KV heads, each in place of as many of the source's. λ_init is that of a start; a
    finished split has one for each layer.

    Raises:
        ValueError: for head counts that cannot be split, naming those that can, and for another λ type.
    """
    if lambda_type not in LAMBDAS:
        raise ValueError(f"--lambda-type {lambda_type} is not one of {', '.join(LAMBDAS)}")
    heads, kv_heads = source.num_attention_heads, kv_heads_of(source, merge_kv)
    noise = kv_heads if noise_heads is None else noise_heads
    if noise not in possible_noise_heads(heads, kv_heads):
        raise ValueError(
            f"--mode split: {noise} of {heads} query heads cannot become noise heads; {split_options(heads, kv_heads)}"
        )
    return GDAConfig(
        **(source_fields(source) | {"num_key_value_heads": kv_heads}),
        num_attention_heads=heads,
        num_noise_heads=noise,
        kv_layout="shared",
        lambda_type=lambda_type,
        lambda_init=LAMBDAS[lambda_type][0],
        dtype=dtype or source.dtype,
        architectures=["GDAForCausalLM"],
    )


def drafts(config: GDAConfig, source: PreTrainedConfig) -> list[Split]:
    """For each layer a split that is not chosen yet, nor how KV heads are merged."""
    order = list(range(config.num_attention_heads))
    merge = None
    if config.num_key_value_heads != source.num_key_value_heads:
        merge = Merge([[] for _ in range(config.num_key_value_heads)], 0.0, 0.0, 0.0)
    return [Split(order, 0.0, 0.0, 0.0, torch.empty(0), merge)] * config.num_hidden_layers


def split_recipes(
    config: GDAConfig,
    source: dict[str, TensorSpec],
    splits: Sequence[Split],
    *,
    merged: Callable[[int, str], torch.Tensor] | None,
    trained: Callable[[int, str], torch.Tensor] | None,
    seed: int,
    dtype: torch.dtype | None,
) -> dict[str, Recipe]:
    """How each tensor of the result is made, in the order in which transformers saves them.

    Args:
        config: Of the result.
        source: The source's tensors.
        splits: How the heads of each layer are divided.
        merged: Gives a tensor of q, k or v of a layer whose KV heads were merged, by its name there; None where there
            is none yet.
        trained: Gives a tensor of a layer, by its name there, that was trained after that; None if none was.
        seed: Of the λ vectors.
        dtype: Of the result; None to keep the source's.
    """
    recipes = {}
    for name, spec in checkpoint_specs(config).items():
        match = LAYER.fullmatch(name)
        if match is None or not match.group(2).startswith("self_attn."):
            recipes[name] = copied(name, source[name], dtype)
            continue
        layer, inner = int(match.group(1)), match.group(2)
        split = splits[layer]
        if split.merge is not None and inner.split(".")[1] in MERGED:
            target = TensorSpec(spec.shape, dtype or source[name].dtype)
            make = partial(_from_work, partial(_given, merged, layer, inner))
            recipe = Recipe(target, (name,), make, _how_merged(inner, split))
        else:
            recipe = _attention_recipe(name, spec, config, source, split, seed, dtype)
        if trained is not None:
            make = partial(_from_work, partial(trained, layer, inner))
            recipe = replace(recipe, make=make, how=f"{recipe.how}; then trained on the source's predictions")
        recipes[name] = recipe
    return recipes


def _attention_recipe(
    name: str,
    spec: TensorSpec,
    config: GDAConfig,
    source: dict[str, TensorSpec],
    split: Split,
    seed: int,
    dtype: torch.dtype | None,
) -> Recipe:
    if ".lambda_" in name:
        return lambda_recipe(name, spec, seed)
    if ".q_proj." in name:
        target = TensorSpec(spec.shape, dtype or source[name].dtype)
        make = partial(reordered, order=split.order, head_dim=config.head_dim)
        return Recipe(target, (name,), make, f"rows of heads {split.order}, of which every last of a group is noise")
    if name.endswith(".o_proj.weight"):
        target = TensorSpec(spec.shape, dtype or source[name].dtype)
        make = partial(_from_work, lambda: split.output)
        return Recipe(target, (name,), make, "solved for the output that the source's gives, by calibration")
    return copied(name, source[name], dtype)


def _how_merged(inner: str, split: Split) -> str:
    assert split.merge is not None
    if ".q_proj." in inner:
        return f"rows of heads {split.order}, of which every last of a group is noise, turned to the merged keys"
    return f"KV heads {split.merge.groups} merged, group by group, by calibration"


def _given(merged: Callable[[int, str], torch.Tensor] | None, layer: int, inner: str) -> torch.Tensor:
    assert merged is not None
    return merged(layer, inner)


def _from_work(read: Callable[[], torch.Tensor], *_source: torch.Tensor) -> torch.Tensor:
    return read()


def reordered(query: torch.Tensor, *, order: list[int], head_dim: int) -> torch.Tensor:
    """The rows (H · d, …) of heads, or entries of their biases, with the heads in that order."""
    return query.unflatten(0, (-1, head_dim))[order].flatten(0, 1)
