"""GDA → Llama, where nothing is lost by it: the inverse of an expansion whose λ is still 0."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import LlamaConfig

from gda._files import check_places, refuse_existing
from gda.configuration.configuration_gda import GDAConfig

from .expand import SHARED_FIELDS, drop_noise_rows
from .recipes import Recipe, checkpoint_specs, copied
from .safetensors_io import TensorSpec
from .sources import Source, open_source, quiet_transformers
from .staging import staged_model
from .stream import write_checkpoint

FORMATS = ("llama",)

# What a Llama has no counterpart for, and the value with which a GDA model computes what a Llama can.
LLAMA_HAS_NO = {"kv_layout": "shared", "head_norm": False, "qk_norm": False, "sliding_window": None}


@dataclass(frozen=True)
class ExportReport:
    """What was exported: the folder, the format, and SHA-256 by file of weights."""

    out: Path
    format: str
    num_tensors: int
    num_parameters: int
    sha256: dict[str, str]

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
    """Write a GDA model as a Llama, bit for bit the one that it was expanded from where nothing was trained.

    Args:
        model: Folder or Hub id of a GDA model whose λ is exactly 0 in every layer.
        out: The folder to make.
        format: "llama".
        max_shard_size: As in `save_pretrained`.
        overwrite: Replace `out` if it exists.
        console: Where progress is shown; nowhere if None.

    Raises:
        ValueError: if the model computes something that a Llama cannot, naming the field or the layer.
        FileNotFoundError, FileExistsError: for bad input.
    """
    if format not in FORMATS:
        raise ValueError(f"--format {format} is not one of {', '.join(FORMATS)}")
    check_places(model, out)
    out = Path(out)
    refuse_existing(out, overwrite)
    with quiet_transformers():
        source = open_source(model)
        config = source.config
        if not isinstance(config, GDAConfig):
            raise ValueError(f"{model} is a {config.model_type!r} model, not a GDA model")
        _refuse_lossy(source, config)
        target = _llama_config(config)
        recipes = {name: _recipe(name, source.specs[name], config) for name in checkpoint_specs(target)}
        with staged_model(out, overwrite=overwrite) as folder:
            files = write_checkpoint(
                folder,
                recipes,
                source,
                max_shard_size=max_shard_size,
                settings={"format": format},
                console=console,
            )
            target.save_pretrained(folder)
            source.copy_assets(folder)
    parameters = sum(recipe.spec.numel for recipe in recipes.values())
    return ExportReport(out, format, len(recipes), parameters, files)


def _refuse_lossy(source: Source, config: GDAConfig) -> None:
    for name, value in LLAMA_HAS_NO.items():
        if getattr(config, name) != value:
            raise ValueError(f"{source.name}: {name}={getattr(config, name)!r} has no counterpart in a Llama")
    if config.hidden_act == "poly_norm":
        raise ValueError(f"{source.name}: hidden_act='poly_norm' has no counterpart in a Llama")
    for layer, value in enumerate(layer_lambdas(source, config)):
        if value != 0.0:
            described = "depends on the token" if value is None else f"is {value:.3g}"
            raise ValueError(f"{source.name}: λ of layer {layer} {described}, so exporting to Llama would lose it")


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


def _llama_config(config: GDAConfig) -> LlamaConfig:
    return LlamaConfig(
        **{name: getattr(config, name) for name in SHARED_FIELDS},
        num_attention_heads=config.num_signal_heads,
        dtype=config.dtype,
        architectures=["LlamaForCausalLM"],
    )


def _recipe(name: str, spec: TensorSpec, config: GDAConfig) -> Recipe:
    if ".q_proj." not in name:
        return copied(name, spec, None)
    rows = config.num_signal_heads * config.head_dim
    target = TensorSpec((rows, *spec.shape[1:]), spec.dtype)
    return Recipe(target, (name,), partial(drop_noise_rows, config=config), "noise rows dropped")
