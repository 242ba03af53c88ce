"""The model card: what a model is, what it was made from, how it was verified and how to load it."""

from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Template, UndefinedError
from transformers import PreTrainedConfig

from gda._version import __version__
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.writing.headmap import head_map

DISTRIBUTION = "grouped-differential-attention"
PLACEHOLDER = "path/or/id"  # in the card of a folder, for the repository that it is pushed to
# By name. conversion.json, which anybody may have written, names the mode_… that is used.
TEMPLATES = {path.name.split(".")[0]: path for path in (Path(__file__).parent / "templates").glob("*.md.jinja")}


def model_card(
    config: PreTrainedConfig,
    *,
    made: dict[str, Any] | None,
    has_code: bool,
    name: str = "",
    history: list[str] | None = None,
    card_data: dict[str, Any] | None = None,
) -> str:
    """The text of a README.md with metadata, from `made`, the content of conversion.json.

    Without conversion.json, `made` is None, `name` is the model's name, and `history` and `card_data` are what is known
    of it.

    Raises:
        ValueError: if `made` is not the content of a conversion.json of ours.
    """
    is_gda = isinstance(config, GDAConfig)
    try:
        unconverted = {"name": name, "revision": None, "card_data": card_data or {}}
        source: dict[str, Any] = unconverted if made is None else made["source"]
        known = dict(source["card_data"])
        of_source = known.pop("base_model", None)
        base_model = of_source if source["revision"] is None else source["name"]
        data = ModelCardData(
            **known,
            base_model=base_model,
            base_model_relation="finetune" if base_model else None,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["grouped-differential-attention", *(["gda"] if is_gda else [])],
        )
        card = ModelCard.from_template(
            data,
            template_str=_template("model_card" if is_gda else "exported_card"),
            title=source["name"].rsplit("/", 1)[-1].removesuffix(".gguf"),
            made=made,
            history=(history or []) if made is None else made.get("history", []),
            how="" if made is None else _rendered(f"mode_{made['settings']['mode']}", config, made),
            verification="" if made is None else _rendered("verification", config, made),
            config=config,
            head_map=head_map(config) if isinstance(config, GDAConfig) else "",
            has_code=has_code,
            install=how_to_install(),
            engines=is_gda and config.kv_layout == "shared" and config.num_noise_heads >= config.num_key_value_heads,
            version=__version__ if made is None else made["versions"]["gda"],
        )
    except (AttributeError, KeyError, TypeError, UndefinedError) as error:
        raise ValueError(f"conversion.json does not describe a conversion ({error!r}); remove it") from None
    return str(card)


def how_to_install() -> str:
    """How a reader of a card installs this package: from the `Repository` that setup.cfg names, or from a clone."""
    try:
        links = metadata(DISTRIBUTION).get_all("Project-URL", [])
    except PackageNotFoundError:  # run from the source tree
        links = []
    for link in links:
        name, _, address = link.partition(", ")
        if name == "Repository":
            return f"`pip install git+{address}`"
    return "`pip install -c constraints.txt -e .` in a clone of its repository"


def _template(name: str) -> str:
    return TEMPLATES[name].read_text(encoding="utf-8")


def _rendered(name: str, config: PreTrainedConfig, made: dict[str, Any]) -> str:
    """A part of the card."""
    return Template(_template(name)).render(config=config, made=made)
