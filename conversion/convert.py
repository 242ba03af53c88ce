"""From a checkpoint of a Llama, Mistral or Qwen, or of a relative, to a GDA checkpoint."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from transformers import PreTrainedConfig

from gda._files import check_places, in_background, refuse_existing, remove, write_text
from gda._screen import quiet_transformers
from gda._trainable import Trainable
from gda.configuration.configuration_gda import GDAConfig

from .card import CARD_FILE, model_card
from .expand import listed, possible_noise_heads
from .factor import factored_config, factored_recipes, full_rank, is_exact, layer_errors
from .headmap import head_map
from .hub import check_name, require_token
from .llamalike import LLAMALIKES, source_fields, unread_fields
from .plan import mode_of, planned_config, planned_recipes
from .provenance import DTYPES, Settings, write_provenance
from .push import PushReport, push
from .recipes import Recipe, is_lossless
from .relatives import RELATIVES
from .safetensors_io import SafetensorsReader
from .sources import CONVERTIBLE_TYPES, Source, open_source
from .split.layout import kv_heads_of, split_options
from .split.split import Divided, SplitReport, Splitter
from .staging import staged_model
from .stream import shards_of, write_checkpoint
from .verify import VerificationFailed, VerifyReport, verify_opened

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


def convert(
    source: str | Path,
    out: str | Path,
    *,
    mode: str | None = None,
    noise_heads: int | None = None,
    ratio: str | int | None = None,
    lambda_type: str | None = None,
    merge_kv: int | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None,
    effort: str | None = None,
    qk_rank: int | None = None,
    seed: int = 0,
    dtype: str = "keep",
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
    verify: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    bundle_code: bool = True,
    push_to_hub: str | None = None,
    private: bool | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> ConvertReport:
    """Convert a Llama into a GDA model that computes the same and can learn to do better, or a relative into GDA.

    Of a Llama, Mistral, Qwen2 or Qwen3, every query head stays as a signal head; noise heads are added and λ starts at
    exactly 0, with a live gradient. A Motif or a DiffLlama has noise heads and λ already: its tensors are mapped, bit
    for bit. With `qk_rank` the queries, of a GDA model too, then become a shared base with low-rank updates.

    With mode "split" a Llama keeps its number of heads, and some of them become noise heads: the result is another
    model, fitted to the source by calibration text, and the report says what it costs.

    Tensors are streamed: memory is that of a few of them. Verification, after it, loads source and result if they take
    less than a quarter of the free memory, else a layer at a time. `out` appears only when it is whole and verified.

    Args:
        source: A folder of safetensors, a Hub id or a `.gguf` file.
        out: The folder to make.
        mode: "expand" or "split", for a Llama, Mistral or Qwen, or "map", for a relative; None takes the lossless one.
        noise_heads: Noise heads to add, or to split off; by default one for each KV head.
        ratio: Signal heads for each noise head, 4 or "4:1", instead of `noise_heads`.
        lambda_type: Of a Llama, Mistral or Qwen, "reparameterized" (the default) or "tanh"; for a split "sigmoid", too.
        merge_kv: For a split, merge the KV heads of each layer to that many first, a divisor of their number: query
            heads that have a KV head each come to share one. It is done in closed form, by calibration.
        calibration: For a split, the text that it is fitted to: a text file, or `.jsonl` with a field `text`. By
            default the documentation that comes with Python.
        calibration_tokens: For a split, how many tokens of it to read; 65,536 by default.
        effort: For a split, "fast": heads, λ and output projections in closed form, layer by layer; "default": then the
            attention is trained for 80 steps on the source's predictions; "best": for 320.
        qk_rank: Make queries, and paired keys, a base that the roles of a group share and an update of this rank for
            each, as in the Shared DIFF Transformer. Of full rank, the smaller of head_dim and hidden_size, this is
            exact; below it is an approximation. Then the source may be a GDA model as well.
        seed: Of the new weights.
        dtype: "keep", "float32", "bfloat16" or "float16"; λ is float32 always.
        max_shard_size: As in `save_pretrained`.
        revision: Branch, tag or commit, for a Hub id.
        verify: Compare the result with the source before it appears.
        resume: Go on from the shards that a killed run finished.
        overwrite: Replace `out` if it exists.
        bundle_code: Put the code of the model beside the weights, so that `out` loads with `trust_remote_code=True`
            where this package is not installed.
        push_to_hub: A repository to push `out` to when it is there.
        private: Whether that repository is private if it is made.
        dry_run: Check everything, write nothing.
        console: Where progress is shown; nowhere if None.

    Returns:
        A report.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: for bad input, in one line that names the remedy.
        PermissionError, ConnectionError: if the Hub does not take or give a model; see `push`.
        VerificationFailed: if the result does not compute what the source computes; `out` is then not made.
    """
    check_places(source, out)
    out = Path(out)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    if private is not None and push_to_hub is None:
        raise ValueError("--private and --public are about the repository of --push-to-hub, which is not given")
    if push_to_hub is not None:
        check_name(push_to_hub)
    refuse_existing(out, overwrite)
    with quiet_transformers():
        opened = open_source(source, revision)
        _require_type(opened, qk_rank)
        mode = mode_of(opened.config, mode)
        if mode == "map":
            refuse_choices(opened, noise_heads=noise_heads, ratio=ratio, lambda_type=lambda_type)
        if mode != "split":
            _refuse_calibration(
                merge_kv=merge_kv, calibration=calibration, calibration_tokens=calibration_tokens, effort=effort
            )
        elif qk_rank is not None:
            raise ValueError("--qk-rank goes with --mode split in two steps: split first, and then factor the result")
        noise = noise_heads_of(opened.config, noise_heads, ratio, mode=mode, merge_kv=merge_kv)
        lambda_type = lambda_type or "reparameterized"
        try:
            config = planned_config(
                opened, mode=mode, noise_heads=noise, lambda_type=lambda_type, dtype=dtype, merge_kv=merge_kv
            )
        except ValueError as error:
            raise ValueError(f"{opened.name}: {error}") from None
        dense = recipes = planned_recipes(opened, config, mode=mode, seed=seed, dtype=dtype)
        lossless = keeps_bits = is_lossless(dense, opened.specs)
        if qk_rank is not None:
            config = factored_config(config, qk_rank)
            recipes = factored_recipes(config, dense)
            lossless = is_exact(config, recipes, opened.specs)
        settings = Settings(
            mode,
            dtype,
            seed,
            max_shard_size,
            config.num_noise_heads,
            config.lambda_type,
            lossless and mode != "split",
            config.qk_rank,
        )
        splitter = None
        if mode == "split":
            splitter = Splitter(
                opened, config, calibration=calibration, tokens=calibration_tokens, effort=effort, seed=seed
            )
            settings = replace(settings, split=splitter.settings())
        notes = notes_on(opened.config, settings, keeps_bits) + _rank_notes(config, settings)
        if splitter is not None:
            expected = f"--effort {splitter.effort} takes about {max(1, round(splitter.minutes()))} minutes here"
            if dry_run:
                notes.append(expected)
            elif console is not None:
                console.print(expected, highlight=False)
        report = planned_report(out, config, recipes, dense, settings=settings, notes=notes, dry_run=dry_run)
        if dry_run:
            return report
        if push_to_hub is not None:
            require_token(push_to_hub)
        report = write_model(
            report,
            opened,
            settings,
            recipes,
            dense=dense,
            verify=verify,
            resume=resume,
            overwrite=overwrite,
            bundle_code=bundle_code,
            console=console,
            divide=None if splitter is None else partial(splitter.run, dtype=DTYPES[dtype], console=console),
        )
    if push_to_hub is None:
        return report
    return replace(report, pushed=_push(out, push_to_hub, private, bundle_code, console))


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
    trainable: Trainable | None = None,
    divide: Callable[[Path], Divided] | None = None,
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


def _push(out: Path, repo: str, private: bool | None, bundle_code: bool, console: Console | None) -> PushReport:
    try:
        return push(out, repo, private=private, bundle_code=bundle_code, console=console)
    except (ConnectionError, PermissionError, ValueError) as error:
        raise type(error)(f"{error}; {out} is whole: `gda push {out} {repo}` goes on") from None


def _require_type(source: Source, qk_rank: int | None) -> None:
    if isinstance(source.config, GDAConfig):
        if qk_rank is None:
            raise ValueError(f"{source.name} is a 'gda' model already")
        if source.config.qk_rank is not None:
            raise ValueError(
                f"{source.name} has qk_rank={source.config.qk_rank} already; `gda fold` makes it dense first"
            )
    elif source.config.model_type not in CONVERTIBLE_TYPES:
        raise ValueError(f"{source.name} is a {source.config.model_type!r} model, which cannot be converted")
    if qk_rank is not None and not source.can_run:
        raise ValueError(
            f"--qk-rank: a {source.config.model_type} model cannot be run to compare it with the result; "
            "convert it first, and then its GDA folder with --qk-rank"
        )


def refuse_choices(source: Source, **choices: object) -> None:
    """Raise ValueError naming the first choice that is made, though the source leaves none."""
    for name, value in choices.items():
        if value is not None:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} is for a Llama, Mistral or Qwen: {source.name}, a {source.config.model_type} model, "
                "has its noise heads and λ"
            )


def _refuse_calibration(**choices: object) -> None:
    for name, value in choices.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for --mode split; the other modes lose nothing to fit")


def noise_heads_of(
    config: PreTrainedConfig,
    noise_heads: int | None,
    ratio: str | int | None,
    *,
    mode: str = "expand",
    merge_kv: int | None = None,
) -> int | None:
    """The noise heads to add, or to split off, said by their number or by a ratio; None where neither says it.

    Raises:
        ValueError: for a ratio that is none, or both.
    """
    if ratio is None:
        return noise_heads
    if noise_heads is not None:
        raise ValueError("--ratio and --noise-heads say the same in two ways; pass one of them")
    signal, _, noise = str(ratio).partition(":")
    if not signal.isdecimal() or noise not in ("", "1") or int(signal) < 1:
        raise ValueError(f"--ratio {ratio} is not a ratio such as 4 or 4:1")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if mode == "split":
        if heads % (int(signal) + 1):
            possible = split_options(heads, kv_heads_of(config, merge_kv))
            raise ValueError(f"--ratio {ratio} does not divide the {heads} query heads of the source; {possible}")
        return heads // (int(signal) + 1)
    if heads % int(signal):
        raise ValueError(
            f"--ratio {ratio} does not divide the {heads} query heads of the source; "
            f"possible for --noise-heads: {listed(possible_noise_heads(heads, kv_heads), heads)}"
        )
    return heads // int(signal)


def notes_on(config: PreTrainedConfig, settings: Settings, keeps_bits: bool) -> list[str]:
    """What of the source is not in the result."""
    notes = []
    if settings.mode == "split":
        notes += _split_notes(config, settings)
    if not keeps_bits:
        notes.append(f"weights are cast to {settings.dtype}, which is not lossless")
    if config.attention_dropout:
        notes.append(f"attention_dropout={config.attention_dropout} is left out: differential attention defines none")
    if config.model_type in LLAMALIKES and (unread := unread_fields(config)):
        notes.append(f"transformers' {type(config).__name__} knows no {', '.join(unread)}; left out")
    if config.model_type in RELATIVES:
        notes += RELATIVES[config.model_type].notes(config)
    return notes


def _split_notes(config: PreTrainedConfig, settings: Settings) -> list[str]:
    merge_kv = (settings.split or {}).get("merge_kv")
    if merge_kv is None:
        return ["heads are divided, which is not lossless"]
    notes = [
        f"the {config.num_key_value_heads} KV heads of a layer are merged to {merge_kv}, and heads are divided, "
        "which is not lossless"
    ]
    if source_fields(config)["qk_norm"]:
        notes.append("keys are normed after their projection: merged ones are averages, up to the sign of a frequency")
    return notes


def _rank_notes(config: GDAConfig, settings: Settings) -> list[str]:
    if config.qk_rank is None:
        return []
    what = "queries and keys" if "k" in config.factored_projections else "queries"
    if config.qk_rank < full_rank(config):
        return [
            f"qk_rank {config.qk_rank} is below the full rank of {full_rank(config)}: {what} are approximated, "
            "which is not lossless"
        ]
    if settings.lossless or settings.dtype != "keep":
        return []
    return [f"base and updates of {what} are rounded to a narrow dtype, which is not lossless; --dtype float32 is"]


def _require_space(folder: Path, report: ConvertReport, resume: bool) -> None:
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if resume else 0
    free = shutil.disk_usage(folder).free + there
    if free < report.nbytes:
        raise OSError(
            f"{report.out.parent} has {free / 1e9:.1f} GB free, but the result needs {report.nbytes / 1e9:.1f} GB"
        )
