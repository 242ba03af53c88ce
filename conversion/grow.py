"""A GDA model, or a Llama on its way to one, becomes a larger model that computes the same."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from gda.common.files import check_places, refuse_existing
from gda.common.screen import quiet_transformers
from gda.common.trainable import Trainable
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.families.registry import CONVERTIBLE_TYPES
from gda.conversion.growth.operators import (
    DEFAULT_NOISE,
    Draft,
    Growth,
    grown,
    layers_to_copy,
    planned,
    trainable,
    whole,
)
from gda.conversion.modes.choices import noise_heads_of, refuse_choices
from gda.conversion.modes.low_rank import dense_config
from gda.conversion.modes.notes import notes_on
from gda.conversion.modes.plan import mode_of
from gda.conversion.sources.open import open_source
from gda.conversion.sources.source import Source
from gda.conversion.tensors.recipes import checkpoint_specs, is_lossless
from gda.conversion.writing.headmap import head_map
from gda.conversion.writing.provenance import DTYPES, Settings
from gda.conversion.writing.write_model import ConvertReport, planned_report, write_model


@dataclass(frozen=True, kw_only=True)
class GrowReport(ConvertReport):
    """What growth did, or with `dry_run` would do: the report of a conversion, and what there was before.

    Attributes:
        growth: What was asked for.
        before: The configuration of the model that grew; of a Llama, that of the GDA model which it becomes.
        num_parameters_before: Of that model.
        copied_layers: The layers of the source that are copied.
        new_layers: Where their copies are in the result.
        trainable: What trainable.json holds.
    """

    growth: Growth
    before: GDAConfig
    num_parameters_before: int
    copied_layers: list[int] = field(default_factory=list)
    new_layers: list[int] = field(default_factory=list)
    trainable: Trainable

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return super().to_dict() | {
            "growth": self.growth.to_dict(),
            "head_map_before": head_map(self.before),
            "num_layers_before": self.before.num_hidden_layers,
            "num_layers": self.config.num_hidden_layers,
            "hidden_size_before": self.before.hidden_size,
            "hidden_size": self.config.hidden_size,
            "num_parameters_before": self.num_parameters_before,
            "copied_layers": self.copied_layers,
            "new_layers": self.new_layers,
            "trainable": self.trainable.to_dict(),
        }


def grow(
    model: str | Path,
    out: str | Path,
    *,
    signal: int | float | None = None,
    depth: int | None = None,
    layers: list[int] | None = None,
    width: int | float | None = None,
    masked: bool = False,
    mlp: float | None = None,
    noise_std: float = DEFAULT_NOISE,
    noise_heads: int | None = None,
    ratio: str | int | None = None,
    lambda_type: str | None = None,
    seed: int = 0,
    dtype: str = "keep",
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
    verify: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    bundle_code: bool = True,
    dry_run: bool = False,
    console: Console | None = None,
) -> GrowReport:
    """Grow a model into a larger one that computes the same, whatever its λ.

    Several operators may be given at once. They are applied in the order depth, signal, width. Each keeps what the
    model computes, so another order would only give other weights of the same function.

    - `signal`: group-differentiated growth (arXiv 2510.06949). Each signal head becomes so many replicas, r:1 becomes
      signal · r:1; noise heads, keys and values stay. The columns of o_proj are shared out to the replicas.
    - `depth`: LLaMA-Pro (arXiv 2401.02415). Copies of layers, after their originals, whose o_proj and down_proj are
      zero. Every layer keeps its λ_init and its kind of attention.
    - `width`: HyperCloning (arXiv 2409.12903). Hidden size, MLP and heads are tiled, head_dim stays.
    - `masked`: Masked Structure Growth (arXiv 2305.02869), by `signal`, `mlp` and `depth`. New heads, neurons and
      layers are no replicas but begin as in a new model, behind a mask: it is 0 here, `gda.training.GrowthMaskCallback`
      raises it while training, and at 1 it is gone. Weights that are masked by 0 have no gradient yet.

    Replicas would learn the same for ever; `noise_std` tells them apart. It is noise on the weights that read them,
    which sums to zero over each set of replicas, exactly, in the dtype of the weights: no logit changes.

    Tensors are streamed, `out` appears only when it is whole and verified, as with `convert`. It holds trainable.json:
    which parameters are new (`gda.common.trainable.Trainable`).

    Args:
        model: Folder, Hub id or `.gguf` file: a GDA model, or one that `convert` takes, which is converted on the way.
        out: The folder to make.
        signal: Replicas of each signal head, from 2.
        depth: Layers of the result.
        layers: Layers to copy, from 0; one named twice is copied twice. By default the last of each of as many even
            parts as there are copies. Alone, it says the depth as well.
        width: Times the hidden size, from 2.
        masked: Put new parts behind a mask, instead of exact replicas.
        mlp: If masked, times the number of neurons, such as 1.5.
        noise_std: Standard deviation of the noise, relative to that of the weight; 0 leaves replicas equal.
        noise_heads, ratio, lambda_type: Of the expansion of a Llama, as in `convert`.
        seed: Of the noise, and of the new weights of an expansion.
        dtype: "keep", "float32", "bfloat16" or "float16"; λ keeps its own.
        max_shard_size: As in `save_pretrained`.
        revision: Branch, tag or commit, for a Hub id.
        verify: Compare the result with the source before it appears.
        resume: Go on from the shards that a killed run finished.
        overwrite: Replace `out` if it exists.
        bundle_code: Put the code of the model beside the weights.
        dry_run: Check everything, write nothing.
        console: Where progress is shown; nowhere if None.

    Returns:
        A report.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: for bad input, in one line that names the remedy.
        VerificationFailed: if the result does not compute what the source computes; `out` is then not made.
    """
    check_places(model, out)
    out = Path(out)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    refuse_existing(out, overwrite)
    growth = Growth(
        signal=whole("--signal", signal),
        width=whole("--width", width),
        depth=depth,
        layers=layers,
        noise_std=noise_std,
        masked=masked,
        mlp=mlp,
    )
    with quiet_transformers():
        source = open_source(model, revision)
        _require_type(source)
        if mode_of(source.config, None) == "map":
            refuse_choices(source, noise_heads=noise_heads, ratio=ratio, lambda_type=lambda_type)
        before = planned(
            source,
            noise_heads=noise_heads_of(source.config, noise_heads, ratio),
            lambda_type=lambda_type or "reparameterized",
            seed=seed,
            dtype=dtype,
        )
        after = grown(before, growth, seed=seed)
        keeps_bits = is_lossless(after.recipes, source.specs)
        settings = Settings(
            "grow",
            dtype,
            seed,
            max_shard_size,
            before.config.num_noise_heads,
            before.config.lambda_type,
            lossless=keeps_bits,
            qk_rank=None,
            growth=growth.to_dict(),
        )
        notes = notes_on(source.config, settings, keeps_bits) + _notes(growth)
        report = _planned_report(out, before, after, growth, settings=settings, notes=notes, dry_run=dry_run)
        if dry_run:
            return report
        return write_model(
            report,
            source,
            settings,
            after.recipes,
            dense=None,
            verify=verify,
            resume=resume,
            overwrite=overwrite,
            bundle_code=bundle_code,
            console=console,
            trainable=report.trainable,
        )


def _planned_report(
    out: Path, before: Draft, after: Draft, growth: Growth, *, settings: Settings, notes: list[str], dry_run: bool
) -> GrowReport:
    report = planned_report(
        out, after.config, after.recipes, after.recipes, settings=settings, notes=notes, dry_run=dry_run
    )
    dense = sum(spec.numel for spec in checkpoint_specs(dense_config(after.config)).values())
    deeper = growth.depth is not None or growth.layers is not None
    return GrowReport(
        **(vars(report) | {"num_dense_parameters": dense}),
        growth=growth,
        before=before.config,
        num_parameters_before=sum(recipe.spec.numel for recipe in before.recipes.values()),
        copied_layers=layers_to_copy(before.config.num_hidden_layers, growth) if deeper else [],
        new_layers=after.new_layers,
        trainable=trainable(after),
    )


def _require_type(source: Source) -> None:
    kind = source.config.model_type
    if not isinstance(source.config, GDAConfig) and kind not in CONVERTIBLE_TYPES:
        raise ValueError(f"{source.name} is a {kind!r} model, which cannot become a GDA model and grow")


def _notes(growth: Growth) -> list[str]:
    if growth.noise_std == 0 and (growth.signal or growth.width):
        return ["--noise-std 0: replicas are equal and have equal gradients, so training will not tell them apart"]
    return []
