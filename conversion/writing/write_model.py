"""Writing the folder of a converted model: weights, configuration, assets, checks, provenance and card."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from gda.common.files import in_background, remove, write_text
from gda.common.trainable import Trainable
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.modes.low_rank import layer_errors
from gda.conversion.push import PushReport
from gda.conversion.sources.source import Source
from gda.conversion.split.splitter import SplitReport, SplitResult
from gda.conversion.tensors.recipes import Recipe
from gda.conversion.tensors.safetensors_io import SafetensorsReader
from gda.conversion.verify import VerificationFailed, VerifyReport, verify_opened
from gda.conversion.writing.card import CARD_FILE, model_card
from gda.conversion.writing.headmap import head_map
from gda.conversion.writing.provenance import Settings, write_provenance
from gda.conversion.writing.staging import staged_model
from gda.conversion.writing.stream import shards_of, write_checkpoint

WORK_FOLDER = "work"  # within the folder that is being filled; none of it is in the result


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did, or with `dry_run` would do.

    Attributes:
        out: The folder.
        config: The GDA configuration.
        num_tensors, num_parameters, nbytes, num_files: Size of the result.
        num_dense_parameters: What it would have with dense projections; the same where they are.
        projection_errors: With `qk_rank`, relative error of the weight (Frobenius) for each layer, by projection, "q"
            and where keys are paired "k"; empty for a dry run.
        notes: What of the source is not in the result.
        split: How heads were divided, and what it cost; None if they were not, and for a dry run.
        sha256: By file of weights; empty for a dry run.
        verification: The report of `verify`; None if it was not asked for.
        pushed: The report of `push`; None if it was not asked for.
        dry_run: Whether nothing was written.
    """

    out: Path
    config: GDAConfig
    num_tensors: int
    num_parameters: int
    nbytes: int
    num_files: int
    num_dense_parameters: int
    projection_errors: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    split: SplitReport | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    verification: VerifyReport | None = None
    pushed: PushReport | None = None
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        sizes = ("num_tensors", "num_parameters", "nbytes", "num_files", "num_dense_parameters")
        report = {name: getattr(self, name) for name in sizes}
        return {
            "out": str(self.out),
            "dry_run": self.dry_run,
            "head_map": head_map(self.config),
            "num_signal_heads": self.config.num_signal_heads,
            "num_noise_heads": self.config.num_noise_heads,
            **report,
            "qk_rank": self.config.qk_rank,
            "projection_errors": self.projection_errors,
            "notes": self.notes,
            "split": None if self.split is None else self.split.to_dict(),
            "sha256": self.sha256,
            "verification": None if self.verification is None else self.verification.to_dict(),
            "pushed": None if self.pushed is None else self.pushed.to_dict(),
        }


Report = TypeVar("Report", bound=ConvertReport)


def planned_report(
    out: Path,
    config: GDAConfig,
    recipes: dict[str, Recipe],
    dense: dict[str, Recipe],
    *,
    settings: Settings,
    notes: list[str],
    dry_run: bool,
) -> ConvertReport:
    """What can be said of a model before it is made. `dense` are the recipes of the same with dense projections."""
    return ConvertReport(
        out=out,
        config=config,
        num_tensors=len(recipes),
        num_parameters=sum(recipe.spec.numel for recipe in recipes.values()),
        nbytes=sum(recipe.spec.nbytes for recipe in recipes.values()),
        num_files=len(shards_of(recipes, settings.max_shard_size)),
        num_dense_parameters=sum(recipe.spec.numel for recipe in dense.values()),
        notes=notes,
        dry_run=dry_run,
    )


def write_model(
    report: Report,
    source: Source,
    settings: Settings,
    recipes: dict[str, Recipe],
    *,
    dense: dict[str, Recipe] | None,
    verify: bool,
    resume: bool,
    overwrite: bool,
    bundle_code: bool,
    console: Console | None,
    workers: int = 1,
    trainable: Trainable | None = None,
    divide: Callable[[Path], SplitResult] | None = None,
) -> Report:
    """Make the folder that `report` plans, verified and whole, and complete the report.

    `dense` are the recipes that were factored on the way, if any; `trainable` is written beside the weights, if given;
    `divide` splits heads, in a folder for its work, and says what the plan could not know.

    Raises:
        FileExistsError, ValueError, OSError: as `convert`.
        VerificationFailed: as `convert`.
    """
    with staged_model(report.out, overwrite=overwrite, resumable=True, resume=resume) as folder:
        _require_space(folder, report, resume)
        source_hashes = in_background(source.hashes)
        if divide is not None:
            divided = divide(folder / WORK_FOLDER)
            recipes = divided.recipes
            report = replace(report, config=divided.config, split=divided.report)
        split = None if report.split is None else report.split.to_dict()
        files = write_checkpoint(
            folder,
            recipes,
            source,
            max_shard_size=settings.max_shard_size,
            settings=asdict(settings) | {"divided": split},
            keep=(WORK_FOLDER,),
            workers=workers,
            console=console,
        )
        report.config.save_pretrained(folder, bundle_code=bundle_code)
        source.copy_assets(folder)
        if trainable is not None:
            trainable.write(folder)
        errors = {}
        if dense is not None:
            errors = layer_errors(report.config, dense, source.read, SafetensorsReader(folder).read)
        verification = None
        if verify:
            verification = verify_opened(source, folder, settings=settings, console=console)
            if not verification.passed:
                raise VerificationFailed(verification)
        made = write_provenance(
            folder,
            settings=settings,
            source=source,
            source_hashes=source_hashes.result(),
            recipes=recipes,
            files=files,
            projection_errors=errors,
            split=split,
            verification=None if verification is None else verification.to_dict(),
        )
        card = model_card(report.config, name=report.out.name, made=made, has_code=bundle_code)
        write_text(folder / CARD_FILE, card)
        _remove_work(folder)  # not before: a run that is killed while it verifies would have to train again
    return replace(report, sha256=files, verification=verification, projection_errors=errors)


def _remove_work(folder: Path) -> None:
    """Remove what a split left; first its name, since half of it would be taken for the whole by a run that resumes."""
    if (work := folder / WORK_FOLDER).exists():
        done = work.with_name(f"{WORK_FOLDER}.done")
        work.rename(done)
        remove(done)


def _require_space(folder: Path, report: ConvertReport, resume: bool) -> None:
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if resume else 0
    free = shutil.disk_usage(folder).free + there
    if free < report.nbytes:
        raise OSError(
            f"{report.out.parent} has {free / 1e9:.1f} GB free, but the result needs {report.nbytes / 1e9:.1f} GB"
        )
