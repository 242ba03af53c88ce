"""Restoring a GDA model from the plain Llama, Mistral or Qwen that `gda export` wrote.

conversion.json says which query heads were noise heads, and λ of each layer. Training the plain model breaks the tie
between the columns of o_proj that read signal heads and those that read noise heads. Then it is an ordinary Llama.
"""

from collections.abc import Container
from functools import partial

import torch
from torch import Tensor

from gda.common.errors import errors_as
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.conversion import Conversion
from gda.conversion.families.llamalike import source_fields
from gda.conversion.families.plain_heads import PlainHeads, columns_of, plain_heads, select_heads
from gda.conversion.modes.checks import BrokenTieError, exported, losses, refuse_new_heads
from gda.conversion.modes.expand import LAMBDA
from gda.conversion.options import NOT_EXPORTED, ConvertOptions
from gda.conversion.sources.source import PROVENANCE_FILE, Source
from gda.conversion.tensors.recipes import DTYPE_CHOICES, Recipe, checkpoint_specs, copied, is_lossless, lambda_recipe
from gda.conversion.tensors.safetensors_io import TensorSpec


def plan(source: Source, options: ConvertOptions) -> Conversion:
    """Take the heads of an exported GDA model apart again.

    Raises:
        BrokenTieError: if the exported model was trained since.
        ValueError: for a source that was not exported with its noise heads.
    """
    refuse_new_heads(
        options, "has no effect on an exported GDA model, which has noise heads; omit it, or pass --mode expand"
    )
    export, dtype = exported(source), DTYPE_CHOICES[options.dtype]
    if export is None:
        raise ValueError(f"{source.name} {NOT_EXPORTED}")
    with errors_as(source.name, ValueError):
        config = GDAConfig(
            **source_fields(source.config) | export.fields,
            lambda_type="reparameterized",
            lambda_init=export.lambdas,
            dtype=dtype or source.config.dtype,
            architectures=["GDAForCausalLM"],
        )
        heads = plain_heads(config, with_noise=True)
        if len(heads.query) != source.config.num_attention_heads:
            raise ValueError(f"{PROVENANCE_FILE} is of a model with {len(heads.query)} query heads; remove it")
    specs = checkpoint_specs(config)
    if any(".lambda_" not in name and name not in source.specs for name in specs):
        raise ValueError(f"{source.name}: {PROVENANCE_FILE} does not describe an export; remove it")
    for layer, lambda_ in enumerate(export.lambdas):
        _require_tied(source, heads, layer, lambda_, specs, config.head_dim)
    recipes = {name: _recipe(name, spec, source.specs, heads, config.head_dim, options) for name, spec in specs.items()}
    rounded = any(spec.dtype.itemsize < 4 for spec in source.specs.values())
    notes = ["its noise heads were rounded when it was exported, so this is not lossless"] if rounded else []
    return Conversion(
        mode="restore",
        config=config,
        recipes=recipes,
        lossless=is_lossless(recipes, source.specs) and not rounded,
        notes=losses(source, recipes, options.dtype) + notes,
        new=(LAMBDA,),
    )


def _require_tied(
    source: Source, heads: PlainHeads, layer: int, lambda_: float, specs: Container[str], head_dim: int
) -> None:
    """Raise BrokenTieError unless equal heads are equal, and o_proj subtracts with λ, up to its rounding.

    Biases that are not among the `specs` of the GDA model must be 0.
    """

    def require(holds: bool, name: str) -> None:
        if not holds:
            raise BrokenTieError(f"{source.name}: {name} was trained since the export; omit --mode restore")

    prefix = f"model.layers.{layer}.self_attn"
    for projection, rows in heads.rows.items():
        for kind in ("weight", "bias"):
            if (name := f"{prefix}.{projection}.{kind}") in source.specs:
                stored = source.read(name)
                first = select_heads(stored, heads=[rows.index(row) for row in rows], head_dim=head_dim)
                require(torch.equal(stored, first), name)
    for name in (f"{prefix}.{each}.bias" for each in (*heads.rows, "o_proj")):
        if name in source.specs and name not in specs:
            require(not source.read(name).any(), name)
    name = f"{prefix}.o_proj.weight"
    stored = source.read(name)
    blocks = _signal_columns(stored, heads=heads, head_dim=head_dim)
    expected = columns_of(blocks, heads=heads.query, lambda_=lambda_, head_dim=head_dim)
    largest = columns_of(blocks.abs(), heads=heads.query, lambda_=-abs(lambda_), head_dim=head_dim)
    # The stored sum and each of its terms were rounded once.
    finite = torch.finfo(stored.dtype)
    require(bool(((stored.double() - expected).abs() <= 2 * finite.eps * largest + finite.tiny).all()), name)


def _recipe(
    name: str, spec: TensorSpec, plain: dict[str, TensorSpec], heads: PlainHeads, head_dim: int, options: ConvertOptions
) -> Recipe:
    if ".lambda_" in name:
        return lambda_recipe(name, spec, options.seed)
    projection, dtype = name.split(".")[-2], DTYPE_CHOICES[options.dtype]
    target = TensorSpec(spec.shape, dtype or plain[name].dtype)
    if (rows := heads.rows.get(projection)) is not None:
        first = [rows.index(row) for row in sorted(set(rows))]
        make = partial(select_heads, heads=first, head_dim=head_dim)
        return Recipe(target, (name,), make, "each head once, in GDA's order")
    if projection == "o_proj" and name.endswith(".weight"):
        make = partial(_signal_columns, heads=heads, head_dim=head_dim)
        return Recipe(target, (name,), make, "columns of the signal heads")
    return copied(name, plain[name], dtype)


def _signal_columns(output: Tensor, *, heads: PlainHeads, head_dim: int) -> Tensor:
    """o_proj (hidden, H · d) of the plain decoder → (hidden, blocks · d) of the GDA model."""
    places = {head.blocks[0]: place for place, head in enumerate(heads.query) if not head.is_noise}
    return output.unflatten(1, (-1, head_dim))[:, [places[block] for block in sorted(places)]].flatten(1, 2)
