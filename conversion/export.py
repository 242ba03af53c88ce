"""Export a GDA model to a Llama, Mistral, Qwen, Motif or DiffLlama, where nothing is lost: the inverse of `convert`.

A Llama, Mistral or Qwen can hold an expanded model while its λ is still 0. Motif and DiffLlama are differential: λ is
kept.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from gda.common.files import check_places, refuse_existing
from gda.common.options import takes
from gda.common.screen import quiet_transformers
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.families import diffllama, motif
from gda.conversion.families.llamalike import LLAMALIKES, require_target, save_target_config, target_config
from gda.conversion.modes.expand import drop_noise_rows
from gda.conversion.options import ExportOptions
from gda.conversion.sources.open import open_source
from gda.conversion.sources.source import Source
from gda.conversion.tensors.recipes import Recipe, checkpoint_specs, copied
from gda.conversion.tensors.safetensors_io import TensorSpec
from gda.conversion.writing.headmap import in_masked_growth
from gda.conversion.writing.staging import staged_model
from gda.conversion.writing.stream import write_checkpoint


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        out: The folder.
        format: The model type.
        num_tensors, num_parameters: Size of the result.
        sha256: SHA-256 of each file of weights.
        notes: What the folder lacks.
    """

    out: Path
    format: str
    num_tensors: int
    num_parameters: int
    sha256: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {**vars(self), "out": str(self.out)}


@takes(ExportOptions)
def export(options: ExportOptions, *, console: Console | None = None) -> ExportReport:
    """Export a GDA model to another model type. Tensors that were not trained equal the source's bit for bit.

    Raises:
        ValueError: naming the field or the layer, if the other type cannot compute what the model computes.
        FileNotFoundError, FileExistsError: for bad input.
    """
    target, out = FORMATS[options.format], Path(options.out)
    check_places(options.model, options.out)
    refuse_existing(out, options.overwrite)
    with quiet_transformers():
        source = open_source(options.model)
        config = _require_exportable(source)
        try:
            target.check(source, config)
        except ValueError as error:
            raise ValueError(f"{source.name}: {error}") from None
        recipes = target.recipes(config, source.specs)
        with staged_model(out, overwrite=options.overwrite) as folder:
            files = write_checkpoint(
                folder,
                recipes,
                source,
                max_shard_size=options.max_shard_size,
                settings={"format": options.format},
                console=console,
            )
            target.write_config(config, folder)
            source.copy_assets(folder)
    parameters = sum(recipe.spec.numel for recipe in recipes.values())
    return ExportReport(out, options.format, len(recipes), parameters, files, list(target.notes))


def _require_exportable(source: Source) -> GDAConfig:
    config = source.config
    if not isinstance(config, GDAConfig):
        raise ValueError(f"{source.name} is a {config.model_type!r} model, not a GDA model")
    if config.qk_rank is not None:
        raise ValueError(f"{source.name} has qk_rank={config.qk_rank}, which no format can hold; run `gda fold` first")
    if config.fade is not None:
        state = "is in masked growth" if in_masked_growth(config) else "is fading in λ"
        raise ValueError(f"{source.name} {state}, which no format can express; train it until its fade is 1")
    return config


def _require_llamalike(source: Source, config: GDAConfig, model_type: str) -> None:
    require_target(config, model_type)
    for layer, value in enumerate(layer_lambdas(source, config)):
        if value != 0.0:
            described = "depends on the token" if value is None else f"is {value:.3g}"
            raise ValueError(
                f"λ of layer {layer} {described}, so exporting to {LLAMALIKES[model_type].name} would lose it"
            )


def _require_motif(source: Source, config: GDAConfig) -> None:
    _require_fields(config, "a Motif", motif.required_fields(config))
    _require_schedule(config, "a Motif", motif.LAMBDA_INIT_OFFSET)


def _require_diffllama(source: Source, config: GDAConfig) -> None:
    _require_fields(config, "a DiffLlama", diffllama.required_fields(config))
    _require_schedule(config, "a DiffLlama", diffllama.LAMBDA_INIT_OFFSET)
    diffllama.require_plain_norms(config, source.read)


def _require_fields(config: GDAConfig, target: str, required: dict[str, Any]) -> None:
    """Raise ValueError naming the first field with another value than `target` requires."""
    for name, value in required.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name}={getattr(config, name)!r} has no counterpart in {target}")


def _require_schedule(config: GDAConfig, target: str, offset: int) -> None:
    """Raise ValueError naming the first layer whose λ_init is not 0.8 − 0.6 · exp(−0.3 · (layer + `offset`))."""
    for layer in range(config.num_hidden_layers):
        scheduled = 0.8 - 0.6 * math.exp(-0.3 * (layer + offset))
        if not math.isclose(config.layer_lambda_init(layer), scheduled, rel_tol=1e-12, abs_tol=1e-12):
            raise ValueError(
                f"λ_init of layer {layer} is {config.layer_lambda_init(layer):.6g}, but the code of {target} "
                f"computes {scheduled:.6g} there (lambda_init_offset {offset})"
            )


def layer_lambdas(source: Source, config: GDAConfig) -> list[float | None]:
    """λ of each layer; None where it depends on the token."""
    return [_layer_lambda(source, config, layer) for layer in range(config.num_hidden_layers)]


def _layer_lambda(source: Source, config: GDAConfig, layer: int) -> float | None:
    attention = f"model.layers.{layer}.self_attn"
    if config.lambda_type == "reparameterized":
        q1, k1, q2, k2 = (source.read(f"{attention}.lambda_{name}").float() for name in ("q1", "k1", "q2", "k2"))
        value = (q1 * k1).sum(0).exp() - (q2 * k2).sum(0).exp() + config.layer_lambda_init(layer)
        return value.item()
    if source.read(f"{attention}.lambda_proj.weight").any():
        return None
    return 0.5 if config.lambda_type == "sigmoid" else 0.0


def _llamalike_recipes(config: GDAConfig, specs: dict[str, TensorSpec], model_type: str) -> dict[str, Recipe]:
    names = checkpoint_specs(target_config(config, model_type))
    return {name: _llamalike_recipe(name, specs[name], config) for name in names}


def _llamalike_recipe(name: str, spec: TensorSpec, config: GDAConfig) -> Recipe:
    if ".q_proj." not in name:
        return copied(name, spec, None)
    rows = config.num_signal_heads * config.head_dim
    target = TensorSpec((rows, *spec.shape[1:]), spec.dtype)
    return Recipe(target, (name,), partial(drop_noise_rows, config=config), "noise rows dropped")


@dataclass(frozen=True)
class Format:
    """A model type that a GDA model can be exported to.

    Attributes:
        check: Raises ValueError if the type cannot compute what the model computes.
        recipes: How each tensor is made from the model's.
        write_config: Writes config.json into a folder.
        notes: What the exported folder lacks.
    """

    check: Callable[[Source, GDAConfig], None]
    recipes: Callable[[GDAConfig, dict[str, TensorSpec]], dict[str, Recipe]]
    write_config: Callable[[GDAConfig, Path], None]
    notes: list[str] = field(default_factory=list)


def _llamalike_format(model_type: str) -> Format:
    return Format(
        check=partial(_require_llamalike, model_type=model_type),
        recipes=partial(_llamalike_recipes, model_type=model_type),
        write_config=lambda config, folder: save_target_config(target_config(config, model_type), config, folder),
    )


FORMATS = {
    **{model_type: _llamalike_format(model_type) for model_type in LLAMALIKES},
    "motif": Format(
        check=_require_motif,
        recipes=motif.exported_recipes,
        write_config=motif.write_exported_config,
        notes=["Motif's own code is not written; to run it, add configuration_motif.py and modeling_motif.py"],
    ),
    "diffllama": Format(
        check=_require_diffllama,
        recipes=diffllama.exported_recipes,
        write_config=lambda config, folder: save_target_config(diffllama.exported_config(config), config, folder),
    ),
}
