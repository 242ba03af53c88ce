"""Write the folder of a converted model: weights, configuration, tokenizer, checks, provenance and card."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from gda.common.errors import DISK_IS_FULL, CheckFailed, errors_naming
from gda.common.files import (
    StagedFolder,
    in_background,
    obstacle,
    partial_of,
    refuse_overlap,
    remove,
    require_space,
    write_text,
)
from gda.common.trainable import TRAINABLE_FILE
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.conversion import Conversion
from gda.conversion.families.llamalike import choose_target
from gda.conversion.families.plain_heads import plain_heads
from gda.conversion.modes.low_rank import dense_specs, layer_errors
from gda.conversion.options import BundleOptions, CheckpointOptions
from gda.conversion.push import PushReport
from gda.conversion.sources.folder import FolderSource
from gda.conversion.sources.source import CARD_FILE, TRAINING_FILE, Source
from gda.conversion.split.report import SplitReport
from gda.conversion.tensors.safetensors_io import SafetensorsReader
from gda.conversion.verify import VerificationFailed, VerifyReport, verify_opened
from gda.conversion.writing.card import model_card
from gda.conversion.writing.headmap import head_map
from gda.conversion.writing.provenance import Settings, write_provenance
from gda.conversion.writing.stream import MANIFEST_FILE, mark_mode, shards_of, write_checkpoint
from gda.conversion.writing.tokenizer_files import keep_tokenizer

WORK_FOLDER = "work"  # within the folder that is being filled; not in the result
OF_TRAINING = (TRAINING_FILE, "`gda train`")  # in the folder of an unfinished run


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did, or with `dry_run` would do.

    Attributes:
        out: The folder.
        config: The GDA configuration.
        num_tensors, num_parameters, nbytes, num_files: Size of the result.
        num_dense_parameters: Number of parameters with dense projections, for a result with `qk_rank`.
        projection_errors: With `qk_rank`, relative error of the weight (Frobenius) for each layer, by projection: "q",
            and "k" where keys are paired. Empty for a dry run.
        notes: What is lost, assumed or left out.
        split: How heads were split, and what was lost; None for other modes and for a dry run.
        sha256: Hash of each weight file; empty for a dry run.
        verification: The report of `verify`; None if it was not asked for.
        pushed: The report of `push`; None if it was not asked for.
        dry_run: Whether nothing was written.
        file_type: The type of most matrices of a GGUF file, such as "Q8_0"; None for a folder.
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
    file_type: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether `gda export` can write the model as a Llama, Mistral or Qwen, now and after training."""
        if self.config.lambda_type != "reparameterized":
            return False
        heads = plain_heads(self.config, with_noise=True)
        try:
            choose_target(self.config, "llama", (len(heads.query), len(heads.key)))
        except ValueError:
            return False
        return True

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        sizes = ("num_tensors", "num_parameters", "nbytes", "num_files", "num_dense_parameters")
        return {
            "out": str(self.out),
            "dry_run": self.dry_run,
            "head_map": head_map(self.config),
            "num_signal_heads": self.config.num_signal_heads,
            "num_noise_heads": self.config.num_noise_heads,
            **{name: getattr(self, name) for name in sizes},
            "is_plain": self.is_plain,
            "qk_rank": self.config.qk_rank,
            "projection_errors": self.projection_errors,
            "notes": self.notes,
            "split": None if self.split is None else self.split.to_dict(),
            "sha256": self.sha256,
            "verification": None if self.verification is None else self.verification.to_dict(),
            "pushed": None if self.pushed is None else self.pushed.to_dict(),
        }


def write_model(
    conversion: Conversion, source: Source, out: Path, options: CheckpointOptions, *, console: Console | None = None
) -> ConvertReport:
    """Write a planned conversion to the folder `out`, which appears only when it is complete and verified."""
    with tempfile.TemporaryDirectory(prefix="gda-") as scratch:
        assets = Path(scratch) / "assets"
        assets.mkdir()
        notes = _write_assets(conversion, source, assets, check=options.verify)  # first, since it can refuse
        for file in source.weight_files:  # those of an adapter's base, too
            refuse_overlap(file, out)
            refuse_overlap(file, partial_of(out))
        report = _planned_report(conversion, source, out, options, notes)
        if options.dry_run:
            message = obstacle(out, resume=options.resume, overwrite=options.overwrite, foreign=OF_TRAINING)
            return replace(report, notes=[*report.notes, *filter(None, [message])])
        return _write(report, conversion, source, assets, options, console)


def _write_assets(conversion: Conversion, source: Source, folder: Path, *, check: bool) -> list[str]:
    """Write the source's tokenizer and other files, and a config, since the model type affects a tokenizer.

    Returns notes.
    """
    with errors_naming(folder):
        _save_config(conversion, folder, bundle_code=False)
        source.copy_assets(folder)
        return [*_keep_trainable(conversion, source, folder), *keep_tokenizer(source, folder, check=check)]


def _keep_trainable(conversion: Conversion, source: Source, folder: Path) -> list[str]:
    """Copy the source's trainable.json if it is right for the result; a note if not, and the result has none."""
    of_gda = isinstance(conversion.config, GDAConfig)
    if source.trainable is None or not of_gda or conversion.new_parameters is not None:
        return []
    shapes = {name: recipe.spec.shape for name, recipe in conversion.recipes.items()}
    if shapes == {name: spec.shape for name, spec in source.specs.items()}:
        shutil.copyfile(source.trainable, folder / TRAINABLE_FILE)
        return []
    return [f"{source.trainable} names tensors that the result doesn't have: `gda train --train new` can't train it"]


def _copy_files(assets: Path, folder: Path) -> None:
    """Unlike `shutil.copytree`, which hides why the disk refuses a file, and copies modes that a disk may not have."""
    for path in sorted(assets.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(assets)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _save_config(conversion: Conversion, folder: Path, *, bundle_code: bool) -> None:
    if conversion.save_config is None:
        conversion.config.save_pretrained(folder, bundle_code=bundle_code)
    else:
        conversion.save_config(folder)


@contextlib.contextmanager
def _staged(out: Path, options: CheckpointOptions) -> Iterator[Path]:
    """Yield a folder to fill by `write_checkpoint`, and rename it to `out` when the block ends.

    If the block fails, the folder is removed, with three exceptions: Ctrl-C keeps it; --resume keeps it unless a check
    failed; a full disk keeps it if it holds the work of a split, which may have taken hours. Errors are those of
    `StagedFolder`.
    """
    staged = StagedFolder(out, overwrite=options.overwrite, resume=options.resume, foreign=OF_TRAINING)
    try:
        yield staged.folder
        staged.finish(without=MANIFEST_FILE)
    except BaseException as error:
        is_full = isinstance(error, OSError) and error.errno in DISK_IS_FULL and (staged.folder / WORK_FOLDER).is_dir()
        continues = (options.resume or is_full) and not isinstance(error, CheckFailed)
        staged.keep() if continues or isinstance(error, KeyboardInterrupt) else staged.discard()
        if is_full and isinstance(error, OSError):
            error.strerror = f"{error.strerror}; the work so far is kept: make room, and pass --resume to go on"
        raise


def _write(
    report: ConvertReport,
    conversion: Conversion,
    source: Source,
    assets: Path,
    options: CheckpointOptions,
    console: Console | None,
) -> ConvertReport:
    out, bundle_code = report.out, isinstance(options, BundleOptions) and options.bundle_code
    with _staged(out, options) as folder:
        finished = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if options.resume else 0
        require_space(out.parent, report.nbytes + conversion.work_bytes, reusable=finished)
        source_hashes = in_background(source.hashes)
        mark_mode(folder, conversion.mode)
        if conversion.work is not None:
            conversion = conversion.work(folder / WORK_FOLDER, console)
        settings = Settings.of(conversion, options)
        # What tells one fit from another, but not what is measured again when a run is resumed.
        layers = [] if conversion.split is None else conversion.split.layers
        fit = [[each.signal_heads, each.noise_heads, each.error_before, each.error_after] for each in layers]
        files = write_checkpoint(
            folder,
            conversion.recipes,
            source,
            max_shard_size=options.max_shard_size,
            settings=asdict(settings) | {"fit": fit},
            keep=(WORK_FOLDER,),
            workers=options.workers,
            console=console,
        )
        _copy_files(assets, folder)
        _save_config(conversion, folder, bundle_code=bundle_code)
        if (new_parameters := conversion.new_parameters) is not None:
            new_parameters.write(folder)
        errors = _projection_errors(conversion, source, folder)
        verification = None
        if options.verify and FolderSource(folder).can_run:
            verification = verify_opened(source, folder, settings=settings, console=console)
            if not verification.passed:
                raise VerificationFailed(verification)
        made = write_provenance(
            folder,
            conversion=conversion,
            settings=settings,
            source=source,
            source_hashes=source_hashes.result(),
            files=files,
            projection_errors=errors,
            verification=None if verification is None else verification.to_dict(),
        )
        card = model_card(conversion.config, made=made, has_code=bundle_code)
        write_text(folder / CARD_FILE, card)
        # Last, so that a run which is interrupted during verification can resume without fitting again.
        _remove_work(folder)
    return replace(
        report,
        config=conversion.config,
        split=conversion.split,
        sha256=files,
        verification=verification,
        projection_errors=errors,
    )


def _planned_report(
    conversion: Conversion, source: Source, out: Path, options: CheckpointOptions, notes: list[str]
) -> ConvertReport:
    dense = conversion.num_parameters
    if getattr(conversion.config, "qk_rank", None) is not None:
        dense = sum(spec.numel for spec in dense_specs(conversion.config).values())
    return ConvertReport(
        out=out,
        config=conversion.config,
        num_tensors=len(conversion.recipes),
        num_parameters=conversion.num_parameters,
        nbytes=conversion.nbytes,
        num_files=len(shards_of(conversion.recipes, options.max_shard_size)),
        num_dense_parameters=dense,
        notes=[*source.notes, *conversion.notes, *notes],
        dry_run=options.dry_run,
    )


def _projection_errors(conversion: Conversion, source: Source, folder: Path) -> dict[str, list[float]]:
    """The errors of the projections that this conversion factorized."""
    before = conversion.before
    if before is None or before.config.qk_rank is not None:
        return {}
    return layer_errors(conversion.config, before.recipes, source.read, SafetensorsReader(folder).read)


def _remove_work(folder: Path) -> None:
    """Remove the work folder. It is renamed first, so that a later run does not use a partly removed one."""
    if (work := folder / WORK_FOLDER).exists():
        done = work.with_name(f"{WORK_FOLDER}.done")
        work.rename(done)
        remove(done)
