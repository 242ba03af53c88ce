"""What a converted checkpoint says of its own making: conversion.json and the model card."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from gda._files import read_json, write_json, write_text
from gda._version import __version__
from gda.configuration.configuration_gda import GDAConfig

from .headmap import head_map
from .recipes import Recipe
from .sources import PROVENANCE_FILE, Source

DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What a conversion was asked for: what the output's bytes depend on, beside the source and our version.

    `lossless` says whether the result must compute what its source computes.
    """

    mode: str
    dtype: str
    seed: int
    max_shard_size: str | int
    num_noise_heads: int
    lambda_type: str
    lossless: bool

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
    verification: dict[str, Any] | None,
) -> None:
    """Write conversion.json: source and its hashes, settings, versions, and what each tensor came from.

    It holds no date and no path, so that the same conversion gives the same bytes on any machine.
    """
    write_json(
        folder / PROVENANCE_FILE,
        {
            "versions": {"gda": __version__}
            | {name: version(name) for name in ("torch", "transformers", "safetensors")},
            "source": {
                "name": source.name,
                "revision": source.revision,
                "model_type": source.config.model_type,
                "num_attention_heads": source.config.num_attention_heads,
                "num_key_value_heads": source.config.num_key_value_heads,
                "head_dim": source.config.head_dim,
                "num_parameters": sum(spec.numel for spec in source.specs.values()),
                "sha256": source_hashes,
            },
            "settings": asdict(settings),
            "sha256": files,
            "verification": verification,
            "tensors": {name: {"from": list(recipe.sources), "how": recipe.how} for name, recipe in recipes.items()},
        },
    )


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


def write_card(
    folder: Path, *, settings: Settings, source: Source, config: GDAConfig, verification: dict[str, Any] | None
) -> None:
    """Write README.md, the model card: what it was made of, the head map, the numbers of the verification."""
    on_hub = source.revision is not None
    data = ModelCardData(
        **source.card_data(),
        base_model=source.name if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["grouped-differential-attention", "gda"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "templates" / "model_card.md.jinja"),
        title=f"{source.name.rsplit('/', 1)[-1].removesuffix('.gguf')} with Grouped Differential Attention",
        source=source,
        settings=settings,
        config=config,
        head_map=head_map(config),
        verification=verification,
        version=__version__,
    )
    write_text(folder / "README.md", str(card))
