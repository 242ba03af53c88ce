"""GDA → Llama, Mistral, Qwen, Motif or DiffLlama, where nothing is lost by it: the inverse of the conversion.

A Llama, Mistral or Qwen is what an expansion gives back while its λ is still 0. The others are differential, and take λ
along.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from gda.common.files import check_places, refuse_existing
from gda.common.screen import quiet_transformers
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.families import diffllama, motif
from gda.conversion.families.llamalike import LLAMALIKES, require_target, target_config
from gda.conversion.modes.expand import drop_noise_rows
from gda.conversion.sources.open import open_source
from gda.conversion.sources.source import Source
from gda.conversion.tensors.recipes import Recipe, checkpoint_specs, copied
from gda.conversion.tensors.safetensors_io import TensorSpec
from gda.conversion.writing.staging import staged_model
from gda.conversion.writing.stream import write_checkpoint


@dataclass(frozen=True)
class ExportReport:
    """What was exported: the folder, the format, SHA-256 by file of weights, and what the result lacks."""

    out: Path
    format: str
    num_tensors: int
    num_parameters: int
    sha256: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {**vars(self), "out": str(self.out)}


def export(
    model: str | Path,
    out: str | Path,
    *,
    format: str = "llama",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    console: Console | None = None,
) -> ExportReport:
    """Write a GDA model as the model of another type that it was, bit for bit where nothing was trained.

    Args:
        model: Folder or Hub id of a GDA model. For a Llama, Mistral or Qwen, its λ is exactly 0 in every layer.
        out: The folder to make.
        format: "llama", "mistral", "qwen2", "qwen3", "motif" or "diffllama".
        max_shard_size: As in `save_pretrained`.
        overwrite: Replace `out` if it exists.
        console: Where progress is shown; nowhere if None.

    Raises:
        ValueError: if the model computes something that the other cannot, naming the field or the layer.
        FileNotFoundError, FileExistsError: for bad input.
    """
    if format not in FORMATS:
        raise ValueError(f"--format {format} is not one of {', '.join(FORMATS)}")
    target = FORMATS[format]
    check_places(model, out)
    out = Path(out)
    refuse_existing(out, overwrite)
    with quiet_transformers():
        source = open_source(model)
        config = source.config
        if not isinstance(config, GDAConfig):
            raise ValueError(f"{model} is a {config.model_type!r} model, not a GDA model")
        if config.qk_rank is not None:
            raise ValueError(
                f"{source.name} has qk_rank={config.qk_rank}, which no format holds; `gda fold` makes it dense first"
            )
        if config.growth_mask is not None:
            raise ValueError(f"{source.name} is in masked growth, which no format holds; train until its masks are 1")
        if config.lambda_anneal is not None:
            raise ValueError(f"{source.name} anneals λ, which no format holds; train until its lambda_anneal is 1")
        try:
            target.check(source, config)
        except ValueError as error:
            raise ValueError(f"{source.name}: {error}") from None
        recipes = target.recipes(config, source.specs)
        with staged_model(out, overwrite=overwrite) as folder:
            files = write_checkpoint(
                folder,
                recipes,
                source,
                max_shard_size=max_shard_size,
                settings={"format": format},
                console=console,
            )
            target.write_config(config, folder)
            source.copy_assets(folder)
    parameters = sum(recipe.spec.numel for recipe in recipes.values())
    return ExportReport(out, format, len(recipes), parameters, files, list(target.notes))


def _require_llamalike(source: Source, config: GDAConfig, model_type: str) -> None:
    require_target(config, model_type)
    for layer, value in enumerate(layer_lambdas(source, config)):
        if value != 0.0:
            described = "depends on the token" if value is None else f"is {value:.3g}"
            raise ValueError(
                f"λ of layer {layer} {described}, so exporting to {LLAMALIKES[model_type].name} would lose it"
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
    """What a GDA model can be written as.

    Attributes:
        check: Raises ValueError for a model that computes what the format cannot.
        recipes: How each tensor of the format is made of the model's.
        write_config: Writes config.json into a folder.
        notes: What the folder lacks.
    """

    check: Callable[[Source, GDAConfig], None]
    recipes: Callable[[GDAConfig, dict[str, TensorSpec]], dict[str, Recipe]]
    write_config: Callable[[GDAConfig, Path], None]
    notes: list[str] = field(default_factory=list)


def _llamalike_format(model_type: str) -> Format:
    return Format(
        check=partial(_require_llamalike, model_type=model_type),
        recipes=partial(_llamalike_recipes, model_type=model_type),
        write_config=lambda config, folder: target_config(config, model_type).save_pretrained(folder),
    )


FORMATS = {
    **{model_type: _llamalike_format(model_type) for model_type in LLAMALIKES},
    "motif": Format(
        check=lambda source, config: motif.require_exportable(config),
        recipes=motif.exported_recipes,
        write_config=motif.write_exported_config,
        notes=["Motif's own code is not written; put configuration_motif.py and modeling_motif.py beside it to run it"],
    ),
    "diffllama": Format(
        check=lambda source, config: diffllama.require_exportable(config, source.read),
        recipes=diffllama.exported_recipes,
        write_config=lambda config, folder: diffllama.exported_config(config).save_pretrained(folder),
    ),
}
