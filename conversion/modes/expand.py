r"""Llama, Mistral or Qwen → GDA without loss: noise heads join the query heads, and λ starts at exactly 0.

    source  q heads          0 1 2 3   4 5 6 7   …          k, v, o, MLP, norms, embeddings: copied
            KV heads            0         1

    GDA     q heads          0 1 2 3 n  4 5 6 7 n  …        signal rows copied; n = mean of its group + a little noise
            KV heads             0          1
            λ                        0                      so the maps of n are there, and weigh nothing yet

λ = 0 must not be a dead start. With all λ vectors zero, no λ vector and no noise row would ever get a gradient;
with two equal pairs of vectors that are not zero, λ = exp(s) − exp(s) + 0 = 0 exactly and every λ vector has one.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedConfig

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.families.llamalike import source_fields
from gda.conversion.tensors.recipes import Recipe, checkpoint_specs, copied, generator_for
from gda.conversion.tensors.safetensors_io import TensorSpec

# Standard deviation of what is added to the mean query of a group, relative to that of the group's own rows.
NOISE_QUERY_JITTER = 0.05
LAMBDA_VECTOR_STD = 0.1


def possible_noise_heads(signal_heads: int, kv_heads: int) -> list[int]:
    """Every number of noise heads that can be added to `signal_heads` query heads over `kv_heads` KV heads."""
    return [
        noise
        for noise in range(1, signal_heads + 1)
        if signal_heads % noise == 0 and (noise % kv_heads == 0 or kv_heads % noise == 0)
    ]


def listed(noise_heads: list[int], signal_heads: int) -> str:
    """Numbers of noise heads with their ratios, for a message."""
    return ", ".join(f"{noise} ({signal_heads // noise}:1)" for noise in noise_heads)


def expanded_config(
    source: PreTrainedConfig, *, noise_heads: int | None, lambda_type: str, dtype: torch.dtype | None
) -> GDAConfig:
    """The GDA configuration of `source` with `noise_heads` added (one for each KV head where None).

    Raises:
        ValueError: for a number of noise heads that is impossible (naming the possible ones) or a λ that is never 0.
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
            "--lambda-type sigmoid cannot start equal to the source, since a sigmoid is never 0; "
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
    """How each tensor of the expanded checkpoint is made, in the order in which transformers saves them."""
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
    """(S · d, …) → ((S + N) · d, …): after each group of r signal heads, the noise head that starts near their mean."""
    groups = query.unflatten(0, (config.num_noise_heads, config.signal_noise_ratio, config.head_dim))
    wide = groups.float()
    jitter = torch.randn(wide[:, :1].shape, generator=generator())
    noise = wide.mean(dim=1, keepdim=True) + NOISE_QUERY_JITTER * wide.std() * jitter
    return torch.cat([groups, noise.to(query.dtype)], dim=1).flatten(0, 2)


def lambda_recipe(name: str, spec: TensorSpec, seed: int) -> Recipe:
    """How a tensor of λ begins, so that λ is λ_init, or what its function makes of 0, and has a gradient."""
    if name.endswith(".lambda_proj.weight"):
        return Recipe(spec, (), partial(torch.zeros, spec.shape), "zero, where tanh and sigmoid are steepest")
    # lambda_q2 is drawn as lambda_q1 was, and k2 as k1, so that the two exponentials cancel exactly.
    drawn_as = name[:-1] + "1"

    def make() -> torch.Tensor:
        return LAMBDA_VECTOR_STD * torch.randn(spec.shape, generator=generator_for(drawn_as, seed))

    return Recipe(spec, (), make, f"N(0, {LAMBDA_VECTOR_STD}²), the same in both pairs")


def drop_noise_rows(query: torch.Tensor, config: GDAConfig) -> torch.Tensor:
    """((S + N) · d, …) → (S · d, …): the inverse of adding noise heads."""
    groups = query.unflatten(0, (config.num_noise_heads, config.signal_noise_ratio + 1, config.head_dim))
    return groups[:, :-1].flatten(0, 2)
