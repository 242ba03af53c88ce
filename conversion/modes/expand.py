r"""Llama, Mistral or Qwen → GDA without loss: noise heads join the query heads, and λ starts at exactly 0.

    source  q heads          0 1 2 3   4 5 6 7   …          k, v, o, MLP, norms, embeddings: copied
            KV heads            0         1

    GDA     q heads          0 1 2 3 n  4 5 6 7 n  …        signal rows copied; n = mean of its group + a little noise
            KV heads             0          1
            λ                        0                      so the noise maps have no weight yet

λ = 0 must not be a dead start. If all λ vectors were zero, neither they nor the noise rows would ever get a gradient.
With two equal pairs of non-zero vectors, λ = exp(s) − exp(s) + 0 is exactly 0 and every λ vector has a gradient.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedConfig

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.conversion import Conversion
from gda.conversion.families.llamalike import source_fields
from gda.conversion.modes.checks import SPLIT_ONLY, errors_named, exported, losses, refuse, requested_noise_heads
from gda.conversion.options import NewHeadOptions
from gda.conversion.sources.source import Source
from gda.conversion.tensors.recipes import (
    DTYPES,
    Recipe,
    checkpoint_specs,
    copied,
    generator_for,
    is_lossless,
    lambda_recipe,
)
from gda.conversion.tensors.safetensors_io import TensorSpec

# Standard deviation of the noise on a group's mean query, relative to that of the group's own rows.
NOISE_QUERY_JITTER = 0.05
EXPORTED_NOTE = "an exported GDA model is not restored: its noise heads are converted as ordinary query heads"
LAMBDA = r"model\.layers\.\d+\.self_attn\.lambda_.+"


def plan(source: Source, options: NewHeadOptions) -> Conversion:
    """Add noise heads to a Llama, Mistral or Qwen."""
    refuse(options, SPLIT_ONLY, "is only for --mode split")
    heads, dtype = source.config.num_attention_heads, DTYPES[options.dtype]
    possible = listed(possible_noise_heads(heads, source.config.num_key_value_heads), heads)
    noise = requested_noise_heads(
        options, heads, counted_in_heads=False, possible=f"possible for --noise-heads: {possible}"
    )
    lambda_type = options.lambda_type or "reparameterized"
    with errors_named(source):
        config = expanded_config(source.config, noise_heads=noise, lambda_type=lambda_type, dtype=dtype)
    recipes = expanded_recipes(config, source.specs, seed=options.seed, dtype=dtype)
    return Conversion(
        mode="expand",
        config=config,
        recipes=recipes,
        lossless=is_lossless(recipes, source.specs),
        notes=losses(source, recipes, options.dtype) + ([] if exported(source) is None else [EXPORTED_NOTE]),
        kept={"query": signal_queries(config)},
        new=(LAMBDA,),
    )


def signal_queries(config: GDAConfig) -> torch.Tensor:
    """Which rows of q_proj are those of signal heads, as booleans."""
    is_signal = torch.ones(config.num_noise_heads, config.signal_noise_ratio + 1, dtype=torch.bool)
    is_signal[:, -1] = False
    return is_signal.flatten().repeat_interleave(config.head_dim)


def possible_noise_heads(signal_heads: int, kv_heads: int) -> list[int]:
    """The numbers of noise heads that can be added to `signal_heads` query heads over `kv_heads` KV heads."""
    return [
        noise
        for noise in range(1, signal_heads + 1)
        if signal_heads % noise == 0 and (noise % kv_heads == 0 or kv_heads % noise == 0)
    ]


def listed(noise_heads: list[int], signal_heads: int) -> str:
    """Numbers of noise heads with their ratios, for an error message."""
    return ", ".join(f"{noise} ({signal_heads // noise}:1)" for noise in noise_heads)


def expanded_config(
    source: PreTrainedConfig, *, noise_heads: int | None, lambda_type: str, dtype: torch.dtype | None
) -> GDAConfig:
    """The GDA configuration of `source` with `noise_heads` added; None adds one for each KV head.

    Raises:
        ValueError: for an impossible number of noise heads, naming the possible ones, or a λ type that is never 0.
    """
    signal, kv_heads = source.num_attention_heads, source.num_key_value_heads
    noise = kv_heads if noise_heads is None else noise_heads
    possible = possible_noise_heads(signal, kv_heads)
    if noise not in possible:
        raise ValueError(
            f"{noise} noise heads cannot be added to {signal} query heads over {kv_heads} KV heads; "
            f"possible for --noise-heads: {listed(possible, signal)}"
        )
    if lambda_type == "sigmoid":
        raise ValueError(
            "--lambda-type sigmoid cannot start equal to the source, because a sigmoid is never 0; "
            "use reparameterized or tanh"
        )
    return GDAConfig(
        **source_fields(source),
        num_attention_heads=signal + noise,
        num_noise_heads=noise,
        kv_layout="shared",
        lambda_type=lambda_type,
        lambda_init=0.0,
        dtype=dtype or source.dtype,
        architectures=["GDAForCausalLM"],
    )


def expanded_recipes(
    config: GDAConfig, source: dict[str, TensorSpec], *, seed: int, dtype: torch.dtype | None
) -> dict[str, Recipe]:
    """The recipes of the expanded checkpoint, in the order in which transformers saves its tensors."""
    recipes = {}
    for name, spec in checkpoint_specs(config).items():
        if ".lambda_" in name:
            recipes[name] = lambda_recipe(name, spec, seed)
        elif ".q_proj." in name:
            target = TensorSpec(spec.shape, dtype or source[name].dtype)
            make = partial(_with_noise_rows, config=config, generator=partial(generator_for, name, seed))
            how = f"signal rows copied; noise rows: mean of their group + N(0, ({NOISE_QUERY_JITTER} std)²)"
            recipes[name] = Recipe(target, (name,), make, how)
        else:
            recipes[name] = copied(name, source[name], dtype)
    return recipes


def _with_noise_rows(
    query: torch.Tensor, *, config: GDAConfig, generator: Callable[[], torch.Generator]
) -> torch.Tensor:
    """(S · d, …) → ((S + N) · d, …): after each group of r signal heads, a noise head near their mean."""
    groups = query.unflatten(0, (config.num_noise_heads, config.signal_noise_ratio, config.head_dim))
    wide = groups.float()
    jitter = torch.randn(wide[:, :1].shape, generator=generator())
    noise = wide.mean(dim=1, keepdim=True) + NOISE_QUERY_JITTER * wide.std() * jitter
    return torch.cat([groups, noise.to(query.dtype)], dim=1).flatten(0, 2)
