"""conversion.json: what a converted checkpoint was made from, with which settings, and how each tensor was made.

It also holds the history of the model: the conversions, growth and training that led to it, as sentences for its card.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gda.common.files import read_json, write_json
from gda.common.versions import versions
from gda.conversion.conversion import Conversion
from gda.conversion.families.llamalike import head_dim
from gda.conversion.options import CheckpointOptions
from gda.conversion.sources.adapter import AdapterSource
from gda.conversion.sources.folder import FolderSource
from gda.conversion.sources.source import PROVENANCE_FILE, TRAINING_FILE, Source
from gda.conversion.tensors.recipes import DTYPE_CHOICES


@dataclass(frozen=True)
class Settings:
    """The settings that the bytes of the result depend on, apart from the source and our version.

    Attributes:
        mode, dtype, seed, max_shard_size: Options of the command.
        num_noise_heads, lambda_type: Those of the result, or of the model before it grew; None if it was exported
            to a type without them.
        lossless: Whether the result must compute what its source computes.
        qk_rank: Rank of the factorization, if the conversion did one.
        growth: The options of the growth, if the model grew.
        layout: The options of λ_init, the KV layout and the head norm, if given.
        split: How the split was fitted, if heads were split.
        export: The format of an export; for a plain decoder also its heads, λ of each layer, and the fields of the GDA
            model that the format cannot hold.
    """

    mode: str
    dtype: str
    seed: int
    max_shard_size: str | int
    num_noise_heads: int | None
    lambda_type: str | None
    lossless: bool
    qk_rank: int | None = None
    layout: dict[str, Any] | None = None
    growth: dict[str, Any] | None = None
    split: dict[str, Any] | None = None
    export: dict[str, Any] | None = None

    @classmethod
    def of(cls, conversion: Conversion, options: CheckpointOptions) -> "Settings":
        """The settings of a planned conversion."""
        heads = (conversion.before or conversion).config
        return cls(
            mode=conversion.mode,
            dtype=options.dtype,
            seed=getattr(options, "seed", 0),  # folding has no random numbers and no seed
            max_shard_size=options.max_shard_size,
            num_noise_heads=getattr(heads, "num_noise_heads", None),
            lambda_type=getattr(heads, "lambda_type", None),
            lossless=conversion.lossless,
            **conversion.settings,
        )


def write_provenance(
    folder: Path,
    *,
    conversion: Conversion,
    settings: Settings,
    source: Source,
    source_hashes: dict[str, str],
    files: dict[str, str],
    projection_errors: dict[str, list[float]],
    verification: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write conversion.json and return its content.

    It holds no date and no path. Versions and measured numbers depend on the machine; the settings don't.
    """
    made: dict[str, Any] = {
        "versions": versions("torch", "transformers", "safetensors"),
        "source": {
            "name": source.name,
            "revision": source.revision,
            "card_data": source.card_data(),
            "model_type": source.config.model_type,
            "num_hidden_layers": source.config.num_hidden_layers,
            "num_attention_heads": source.config.num_attention_heads,
            "num_key_value_heads": source.config.num_key_value_heads,
            "head_dim": head_dim(source.config),
            "num_parameters": sum(spec.numel for spec in source.specs.values()),
            "sha256": source_hashes,
        },
        "settings": asdict(settings),
        "sha256": files,
        "projection_errors": projection_errors,
        "split": None if conversion.split is None else conversion.split.to_dict(),
        "verification": verification,
        "tensors": {
            name: {"from": [*recipe.sources, *recipe.scaled_by], "how": recipe.how}
            for name, recipe in conversion.recipes.items()
        },
    }
    made["history"] = _with_conversion(source, made)
    write_json(folder / PROVENANCE_FILE, made)
    return made


def read_settings(folder: Path) -> Settings | None:
    """The settings in `folder`/conversion.json; None if there is no such file, ValueError if it is not one of ours."""
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return None
    try:
        settings = Settings(**read_json(path)["settings"])
        DTYPE_CHOICES[settings.dtype]
    except (KeyError, TypeError):
        raise ValueError(f"{path} does not hold the settings of a conversion; remove it") from None
    return settings


def history_of(folder: Path) -> list[str]:
    """The steps that a folder records, oldest first; empty without a record."""
    for name in (PROVENANCE_FILE, TRAINING_FILE):  # a trained model no longer has the tensors of the first
        if (folder / name).is_file():
            record = read_json(folder / name)
            steps = record.get("history") if isinstance(record, dict) else None
            return [step for step in steps if isinstance(step, str)] if isinstance(steps, list) else []
    return []


def _steps_of(source: Source) -> list[str]:
    if isinstance(source, AdapterSource):
        base = f"{source.base.name}{_at_commit(source.base)}"
        return [*_steps_of(source.base), f"The adapter {source.name} was merged into {base}."]
    return history_of(source.folder) if isinstance(source, FolderSource) else []


def _at_commit(source: Source) -> str:
    return f" at commit {source.revision}" if source.revision else ""


def _with_conversion(source: Source, made: dict[str, Any]) -> list[str]:
    """The steps of a source, and the conversion that conversion.json describes."""
    settings, split, verification = made["settings"], made["split"], made["verification"]
    given = {**(settings["layout"] or {}), "qk_rank": settings["qk_rank"], **(settings["growth"] or {})}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    options = f" ({', '.join(f'{name} {value}' for name, value in given.items())})" if given else ""
    result = ""
    if split is not None and split["perplexity"] is not None:
        result = f"; held-out perplexity {split['perplexity']:.3f}, that of the source {split['perplexity_source']:.3f}"
    elif verification is not None and verification["relative"] is not None:
        result = f"; largest difference of a logit {verification['relative']:.1e}, relative to the largest logit"
    return [*_steps_of(source), f"`{settings['mode']}`{options} of {source.name}{_at_commit(source)}{result}."]
