"""A GDA model with a shared base and low-rank updates → the dense one that it is: W_k = B + P_k R_k, multiplied out."""

from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from gda.common.files import check_places, refuse_existing
from gda.common.screen import quiet_transformers
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.modes.low_rank import PARTS, dense_config, folded, same_config
from gda.conversion.sources.open import open_source
from gda.conversion.sources.source import Source
from gda.conversion.tensors.recipes import Recipe, checkpoint_specs, copied, is_lossless
from gda.conversion.tensors.safetensors_io import TensorSpec
from gda.conversion.writing.provenance import DTYPES, Settings
from gda.conversion.writing.write_model import ConvertReport, planned_report, write_model


def fold(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "keep",
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
    verify: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    bundle_code: bool = True,
    dry_run: bool = False,
    console: Console | None = None,
) -> ConvertReport:
    """Write a GDA model with `qk_rank` (arXiv 2501.17900) as the dense GDA model that computes the same.

    Tensors are streamed, `out` appears only when it is whole and verified, as with `convert`.

    Args:
        model: Folder or Hub id of a GDA model with `qk_rank`.
        out: The folder to make.
        dtype: "keep", "float32", "bfloat16" or "float16"; λ keeps its own. In a dtype narrower than float32 the
            products are rounded, so the logits are equal to that rounding only.
        max_shard_size: As in `save_pretrained`.
        revision: Branch, tag or commit, for a Hub id.
        verify: Compare the result with the model before it appears.
        resume: Go on from the shards that a killed run finished.
        overwrite: Replace `out` if it exists.
        bundle_code: Put the code of the model beside the weights.
        dry_run: Check everything, write nothing.
        console: Where progress is shown; nowhere if None.

    Returns:
        A report, as of `convert`.

    Raises:
        ValueError: if there is nothing to fold, and for other bad input.
        FileNotFoundError, FileExistsError, OSError: for bad input.
        VerificationFailed: if the result does not compute what the model computes; `out` is then not made.
    """
    check_places(model, out)
    out = Path(out)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    refuse_existing(out, overwrite)
    with quiet_transformers():
        source = open_source(model, revision)
        factored = _require_factored(source)
        config = same_config(dense_config(factored), DTYPES[dtype])
        recipes = folded_recipes(factored, source.specs, DTYPES[dtype])
        products = [recipe for recipe in recipes.values() if len(recipe.sources) == len(PARTS)]
        wide = all(recipe.spec.dtype.itemsize >= 4 for recipe in products)
        lossless = wide and is_lossless(recipes, source.specs)
        settings = Settings("fold", dtype, 0, max_shard_size, config.num_noise_heads, config.lambda_type, lossless)
        notes = []
        if not lossless:
            name = str(products[0].spec.dtype).removeprefix("torch.")
            notes.append(f"the folded weights are rounded to {name}, which is not lossless; --dtype float32 is")
        report = planned_report(out, config, recipes, recipes, settings=settings, notes=notes, dry_run=dry_run)
        if dry_run:
            return report
        return write_model(
            report,
            source,
            settings,
            recipes,
            dense=recipes,
            verify=verify,
            resume=resume,
            overwrite=overwrite,
            bundle_code=bundle_code,
            console=console,
        )


def _require_factored(source: Source) -> GDAConfig:
    config = source.config
    if not isinstance(config, GDAConfig):
        raise ValueError(f"{source.name} is a {config.model_type!r} model; only a GDA model with qk_rank can be folded")
    if config.qk_rank is None:
        raise ValueError(f"{source.name} has no qk_rank: its projections are dense, so there is nothing to fold")
    return config


def folded_recipes(config: GDAConfig, source: dict[str, TensorSpec], dtype: torch.dtype | None) -> dict[str, Recipe]:
    """How each tensor of the dense checkpoint is made of those of a factored one, whose configuration is given."""
    recipes = {}
    for name, spec in checkpoint_specs(dense_config(config)).items():
        projection = next((p for p in config.factored_projections if f".{p}_proj." in name), None)
        if projection is None:
            recipes[name] = copied(name, source[name], None if ".lambda_" in name else dtype)
        elif name.endswith(".bias"):
            bias = name.replace("_proj.bias", "_up.bias")
            recipes[name] = copied(bias, source[bias], dtype)
        else:
            parts = tuple(name.replace("_proj.", f"_{part}.") for part in PARTS)
            target = TensorSpec(spec.shape, dtype or source[parts[0]].dtype)
            make = partial(folded, roles=config.factored_projections[projection], head_dim=config.head_dim)
            recipes[name] = Recipe(target, parts, make, "of each head, the base of its group + up · down")
    return recipes
