r"""Llama, Mistral or Qwen → GDA without loss: noise heads join the query heads, and λ starts at exactly 0.

    source  q heads          0 1 2 3   4 5 6 7   …          k, v, o, MLP, norms, embeddings: copied
            KV heads            0         1

    GDA     q heads          0 1 2 3 n  4 5 6 7 n  …        signal rows copied; n = mean of its group + a little noise
            KV heads             0          1
            λ                        0                      so the noise maps have no weight yet

    paired  KV heads         0 n 1 n …                      noise key = key + a little noise; v = slabs (v, new), and
                                                            the columns of o_proj that read new slabs are zero

A head norm, a sigmoid λ and a λ_init that is not 0 would change the model at once. Training fades them in (`fade`).

λ = 0 must not be a dead start. If all λ vectors were zero, neither they nor the noise rows would ever get a gradient.
With two equal pairs of non-zero vectors, λ = exp(s) − exp(s) + 0 is exactly 0 and every λ vector has a gradient.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedConfig

from gda.common.errors import errors_as
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.conversion import Conversion
from gda.conversion.families.llamalike import source_fields
from gda.conversion.modes import head_norm
from gda.conversion.modes.checks import exported, losses
from gda.conversion.noise_heads import added
from gda.conversion.options import PAPER_ONLY, NewHeadOptions
from gda.conversion.sources.source import Source
from gda.conversion.tensors.recipes import (
    DTYPE_CHOICES,
    Recipe,
    checkpoint_specs,
    copied,
    generator_for,
    is_lossless,
    lambda_recipe,
)
from gda.conversion.tensors.safetensors_io import TensorSpec

# Standard deviation of the noise on new queries and keys, relative to that of the rows that they start from.
JITTER = 0.05
LAMBDA = r"model\.layers\.\d+\.self_attn\.lambda_.+"
HEAD_NORM = r"model\.layers\.\d+\.self_attn\.subln\.weight"
EXPORTED_NOTE = "an exported GDA model is not restored: its noise heads are converted as ordinary query heads"


def plan(source: Source, options: NewHeadOptions) -> Conversion:
    """Add noise heads to a Llama, Mistral or Qwen."""
    dtype = DTYPE_CHOICES[options.dtype]
    with errors_as(source.name, ValueError):
        config = expanded_config(source.config, options)
    recipes = expanded_recipes(config, source.specs, seed=options.seed, dtype=dtype)
    unscaled = config.head_norm and not head_norm.scales_values(source.specs, dtype)
    notes = [EXPORTED_NOTE] * (exported(source) is not None) + [head_norm.UNSCALED_NOTE] * unscaled
    layout = {name: value for name in PAPER_ONLY if (value := getattr(options, name)) is not None}
    return Conversion(
        mode="expand",
        config=config,
        recipes=recipes,
        lossless=is_lossless(recipes, source.specs),
        notes=losses(source, recipes, options.dtype) + notes,
        settings={"layout": layout} if layout else {},
        kept=_kept(config),
        new=(LAMBDA, HEAD_NORM),
    )


def _kept(config: GDAConfig) -> dict[str, torch.Tensor]:
    """The features that are copied from the source."""
    if config.kv_layout == "shared":
        return {"query": signal_queries(config)}
    first = torch.tensor([True, False]).repeat_interleave(config.head_dim)  # of a pair of keys, or of slabs
    pairs, blocks = config.num_key_value_heads // 2, config.num_signal_heads
    return {"query": signal_queries(config), "key": first.repeat(pairs), "output": first.repeat(blocks)}


def signal_queries(config: GDAConfig) -> torch.Tensor:
    """Which rows of q_proj are those of signal heads, as booleans."""
    is_signal = torch.ones(config.num_noise_heads, config.signal_noise_ratio + 1, dtype=torch.bool)
    is_signal[:, -1] = False
    return is_signal.flatten().repeat_interleave(config.head_dim)


def expanded_config(source: PreTrainedConfig, options: NewHeadOptions) -> GDAConfig:
    """The GDA configuration of `source` with the heads that the options ask for.

    Raises:
        ValueError: for an impossible number of noise heads, naming the possible ones, and for an unused λ_init.
    """
    signal, kv_heads = source.num_attention_heads, source.num_key_value_heads
    kv_layout, lambda_type = options.kv_layout or "shared", options.lambda_type or "reparameterized"
    noise = added(signal, kv_heads, noise_heads=options.noise_heads, ratio=options.ratio, kv_layout=kv_layout)
    scheduled = options.lambda_init == "schedule"
    if scheduled and lambda_type != "reparameterized":
        raise ValueError(f"--lambda-init schedule has no effect on λ with --lambda-type {lambda_type}; omit it")
    fades_lambda = scheduled or lambda_type == "sigmoid"
    return GDAConfig(
        **source_fields(source) | {"num_key_value_heads": kv_heads * (2 if kv_layout == "paired" else 1)},
        num_attention_heads=signal + noise,
        num_noise_heads=noise,
        kv_layout=kv_layout,
        lambda_type=lambda_type,
        lambda_init=None if scheduled else 0.0,
        lambda_target=0.0 if fades_lambda else None,  # straight to the λ that is learned, which starts at λ_init
        head_norm=bool(options.head_norm),
        head_norm_eps=head_norm.EPS if options.head_norm else 1e-5,
        faded_head_norm=options.head_norm or None,
        fade=0.0 if fades_lambda or options.head_norm else None,
        dtype=DTYPE_CHOICES[options.dtype] or source.dtype,
        architectures=["GDAForCausalLM"],
    )


def expanded_recipes(
    config: GDAConfig, source: dict[str, TensorSpec], *, seed: int, dtype: torch.dtype | None
) -> dict[str, Recipe]:
    """The recipes of the expanded checkpoint, in the order in which transformers saves its tensors."""
    specs = checkpoint_specs(config)
    recipes = {name: _recipe(name, spec, config, source, seed, dtype) for name, spec in specs.items()}
    if config.head_norm and head_norm.scales_values(source, dtype):
        return {name: head_norm.with_scaled_values(each, name, config, source) for name, each in recipes.items()}
    return recipes


def _recipe(
    name: str, spec: TensorSpec, config: GDAConfig, source: dict[str, TensorSpec], seed: int, dtype: torch.dtype | None
) -> Recipe:
    projection = name.split(".")[-2]
    if ".lambda_" in name:
        return lambda_recipe(name, spec, seed)
    if projection == "subln":
        return head_norm.weight_recipe(name, spec, config, dtype or source[name.replace("subln", "v_proj")].dtype)
    recipe = _wider(name, projection, TensorSpec(spec.shape, dtype or source[name].dtype), config, seed)
    return recipe or copied(name, source[name], dtype)


def _wider(name: str, projection: str, target: TensorSpec, config: GDAConfig, seed: int) -> Recipe | None:
    """How a projection gets the parts that are new in it; None for all other tensors."""
    draw = partial(generator_for, name, seed)
    if projection == "q_proj":
        make = partial(_with_noise_rows, config=config, generator=draw)
        how = f"signal rows copied; noise rows: mean of their group + N(0, ({JITTER} std)²)"
        return Recipe(target, (name,), make, how)
    if config.kv_layout == "paired" and projection in ("k_proj", "v_proj"):
        is_key = projection == "k_proj"
        make = partial(_with_new_members, head_dim=config.head_dim, is_key=is_key, generator=draw)
        new = f"noise keys: key + N(0, ({JITTER} std)²)" if is_key else "second slabs: N(0, std²)"
        return Recipe(target, (name,), make, f"heads copied; {new}")
    if config.kv_layout == "paired" and name.endswith("o_proj.weight"):
        return Recipe(target, (name,), partial(_with_zero_columns, head_dim=config.head_dim), "second slabs: zero")
    return None


def _with_noise_rows(
    query: torch.Tensor, *, config: GDAConfig, generator: Callable[[], torch.Generator]
) -> torch.Tensor:
    """(S · d, …) → ((S + N) · d, …): after each group of r signal heads, a noise head near their mean."""
    groups = query.unflatten(0, (config.num_noise_heads, config.signal_noise_ratio, config.head_dim))
    wide = groups.float()
    jitter = torch.randn(wide[:, :1].shape, generator=generator())
    noise = wide.mean(dim=1, keepdim=True) + JITTER * wide.std() * jitter
    return torch.cat([groups, noise.to(query.dtype)], dim=1).flatten(0, 2)


def _with_new_members(
    heads: torch.Tensor, *, head_dim: int, is_key: bool, generator: Callable[[], torch.Generator]
) -> torch.Tensor:
    """(G · d, …) → (2 G · d, …): after each key its noise key, or after each value a second slab."""
    first = heads.unflatten(0, (-1, 1, head_dim))
    wide = first.float()
    drawn = wide.std() * torch.randn(wide.shape, generator=generator())
    second = wide + JITTER * drawn if is_key else drawn
    return torch.cat([first, second.to(heads.dtype)], dim=1).flatten(0, 2)


def _with_zero_columns(output: torch.Tensor, *, head_dim: int) -> torch.Tensor:
    """o_proj (hidden, S · d) → (hidden, S · 2 d): the second slab of each head has no effect yet."""
    first = output.unflatten(1, (-1, 1, head_dim))
    return torch.cat([first, torch.zeros_like(first)], dim=2).flatten(1, 3)
