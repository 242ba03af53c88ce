"""Exporting a GDA model to a Llama, Mistral, Qwen, Motif or DiffLlama that computes the same function.

A Llama, Mistral or Qwen holds every model whose λ is a number and that has no head norm (`families.plain_heads`). Motif
and DiffLlama are differential themselves.
"""

import math
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from gda.common.errors import errors_as
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.conversion import Conversion, with_fields
from gda.conversion.families import diffllama, motif
from gda.conversion.families.llamalike import (
    LLAMALIKES,
    RUNNERS,
    choose_target,
    has_usual_heads,
    save_target_config,
    target_config,
    zero_bias_projections,
)
from gda.conversion.families.plain_heads import plain_heads, plain_recipes, unmasked_recipes, zero_biases
from gda.conversion.modes.checks import EXPORTED_FIELDS, losses_of_cast
from gda.conversion.modes.fold import folded_recipes
from gda.conversion.options import ExportOptions
from gda.conversion.sources.source import Source
from gda.conversion.tensors.lambdas import layer_lambdas
from gda.conversion.tensors.recipes import DTYPE_CHOICES, all_copied, is_lossless

QWEN2_NOTE = "vLLM, mlx-lm and CTranslate2 cannot run it, because they ignore head_dim of a Qwen2; transformers can"
MOTIF_NOTE = (
    "Motif's own code is not written, and the result is not verified, since transformers cannot run it; add "
    "configuration_motif.py and modeling_motif.py to run it"
)


def plan(source: Source, options: ExportOptions) -> Conversion:
    """Express a GDA model as a model of another type.

    Raises:
        ValueError: naming the field or the layer, if no such type can compute what the model computes.
    """
    assert isinstance(source.config, GDAConfig)
    config = with_fields(source.config, dtype=DTYPE_CHOICES[options.dtype] or source.config.dtype)
    with errors_as(source.name, ValueError):
        if options.format in (*LLAMALIKES, "gguf"):
            return _as_plain(source, config, options)
        return _as_differential(source, config, options)


def _as_plain(source: Source, config: GDAConfig, options: ExportOptions) -> Conversion:
    lambdas = layer_lambdas(config, source.read)
    with_noise = any(lambdas) if options.heads is None else options.heads == "all"
    heads = plain_heads(config, with_noise=with_noise or None in lambdas)
    counts = (len(heads.query), len(heads.key))
    is_gguf = options.format == "gguf"  # which names no model type, so any will do
    model_type, reason = choose_target(config, "llama" if is_gguf else options.format, counts)
    numbers = [_number(layer, value, with_noise) for layer, value in enumerate(lambdas)]
    recipes = folded_recipes(config, source.specs, DTYPE_CHOICES[options.dtype])
    unmasked = unmasked_recipes(config, recipes)
    plain = plain_recipes(config, unmasked, heads, numbers)
    computed = config.qk_rank is not None or unmasked != recipes or any(numbers)
    rounded = [recipe.spec for recipe in plain.values() if computed and recipe.spec.dtype.itemsize < 4]
    plain |= zero_biases(plain, zero_bias_projections(config, model_type, counts))
    notes = [] if is_gguf else _notes_on_type(config, model_type, counts, reason)
    if rounded:
        dtype = str(rounded[0].dtype).removeprefix("torch.")
        notes.append(f"the computed weights are rounded to {dtype}, which is not lossless; --dtype float32 avoids that")
    elif not is_gguf:
        notes += losses_of_cast(source, plain, options.dtype)
    target = target_config(config, model_type, counts)
    settings = {
        "format": model_type,
        "heads": "all" if with_noise else "original",
        "lambdas": numbers,
        "fields": {name: getattr(config, name) for name in EXPORTED_FIELDS},
    }
    return Conversion(
        mode="export",
        config=target,
        recipes=plain,
        lossless=is_lossless(plain, source.specs) and not rounded,
        notes=notes,
        settings={"export": settings},
        save_config=partial(save_target_config, target, config),
    ).in_order()


def _notes_on_type(config: GDAConfig, model_type: str, counts: tuple[int, int], reason: str | None) -> list[str]:
    notes = [] if reason is None else [reason]
    if projections := zero_bias_projections(config, model_type, counts):
        notes.append(f"bias of 0 added to {', '.join(projections)}, because a {model_type} has one there")
    if model_type == "qwen2" and not has_usual_heads(config, counts):
        notes.append(QWEN2_NOTE)
    return notes


def _number(layer: int, value: float | None, with_noise: bool) -> float:
    """λ of a layer, if it is a number that the plain model can have."""
    if value is None:
        raise ValueError(
            f"λ of layer {layer} depends on the token, which no Llama computes; run the model with {RUNNERS}"
        )
    if value and not with_noise:
        raise ValueError(f"λ of layer {layer} is {value:.3g}, so it needs its noise heads; omit --heads original")
    return value


def _as_differential(source: Source, config: GDAConfig, options: ExportOptions) -> Conversion:
    if options.heads is not None:
        raise ValueError(f"--heads is for --format {', '.join(LLAMALIKES)}, not for {options.format}")
    if config.fade is not None:
        raise ValueError(
            f"fade={config.fade:.4g} has no counterpart in a {options.format}; train the model until its fade is 1"
        )
    dtype = DTYPE_CHOICES[options.dtype]
    target: PreTrainedConfig
    if options.format == "motif":
        _require_expressible(config, "a Motif", motif.required_fields(config), motif.LAMBDA_INIT_OFFSET)
        recipes, notes = all_copied(config, source.specs, dtype), [MOTIF_NOTE]
        target, save_config = motif.exported_config(config), partial(motif.write_exported_config, config)
    else:
        _require_expressible(config, "a DiffLlama", diffllama.required_fields(config), diffllama.LAMBDA_INIT_OFFSET)
        diffllama.require_plain_norms(config, source.read)
        recipes, notes = diffllama.exported_recipes(config, source.specs, dtype), []
        target = diffllama.exported_config(config)
        save_config = partial(save_target_config, target, config)
    return Conversion(
        mode="export",
        config=target,
        recipes=recipes,
        lossless=is_lossless(recipes, source.specs),
        notes=[*notes, *losses_of_cast(source, recipes, options.dtype)],
        settings={"export": {"format": options.format}},
        save_config=save_config,
    )


def _require_expressible(config: GDAConfig, target: str, required: dict[str, Any], offset: int) -> None:
    """Raise ValueError naming the first field or layer that `target` cannot express.

    Fields must have the `required` values, and λ_init must be 0.8 − 0.6 · exp(−0.3 · (layer + `offset`)).
    """
    for name, value in required.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name}={getattr(config, name)!r} has no counterpart in {target}")
    for layer in range(config.num_hidden_layers):
        scheduled = 0.8 - 0.6 * math.exp(-0.3 * (layer + offset))
        if not math.isclose(config.layer_lambda_init(layer), scheduled, rel_tol=1e-12, abs_tol=1e-12):
            raise ValueError(
                f"λ_init of layer {layer} is {config.layer_lambda_init(layer):.6g}, but the code of {target} "
                f"computes {scheduled:.6g} there (lambda_init_offset {offset})"
            )
