"""What a converted checkpoint says of its own making: conversion.json."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gda._version import __version__
from gda.common.files import read_json, write_json
from gda.conversion.families.llamalike import head_dim
from gda.conversion.sources.source import PROVENANCE_FILE, Source
from gda.conversion.tensors.recipes import Recipe

DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What a conversion was asked for: what the output's bytes depend on, beside the source and our version.

    `lossless` says whether the result must compute what its source computes. Where a model is grown, noise heads and λ
    type are those before it grew, and `growth` holds the fields of `Growth`. `split` says what heads were split by.
    """

    mode: str
    dtype: str
    seed: int
    max_shard_size: str | int
    num_noise_heads: int
    lambda_type: str
    lossless: bool
    qk_rank: int | None = None
    growth: dict[str, Any] | None = None
    split: dict[str, Any] | None = None

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype asked for; None to keep the source's."""
        return DTYPES[self.dtype]


def write_provenance(
    folder: Path,
    *,
    settings: Settings,
    source: Source,
    source_hashes: dict[str, str],
    recipes: dict[str, Recipe],
    files: dict[str, str],
    projection_errors: dict[str, list[float]],
    split: dict[str, Any] | None,
    verification: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write conversion.json, and return it: source and its hashes, settings, versions, and what each tensor came from.

    It holds no date and no path, so that the same conversion gives the same bytes on any machine.
    """
    made = {
        "versions": {"gda": __version__} | {name: version(name) for name in ("torch", "transformers", "safetensors")},
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
        "split": split,
        "verification": verification,
        "tensors": {name: {"from": list(recipe.sources), "how": recipe.how} for name, recipe in recipes.items()},
    }
    write_json(folder / PROVENANCE_FILE, made)
    return made


def read_settings(folder: Path) -> Settings | None:
    """The settings in `folder`/conversion.json; None if there is no such file.

    Raises:
        ValueError: if there is one and it is not ours.
    """
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return None
    try:
        settings = Settings(**read_json(path)["settings"])
        settings.torch_dtype  # noqa: B018 - a dtype that there is
    except (KeyError, TypeError):
        raise ValueError(f"{path} does not hold the settings of a conversion; remove it") from None
    return settings
