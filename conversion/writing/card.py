"""The model card: what a model is, what it was made of, how far it was checked, how to load it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import UndefinedError

from gda._version import __version__
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.writing.headmap import head_map

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"


def model_card(config: GDAConfig, *, name: str, made: dict[str, Any] | None, has_code: bool) -> str:
    """A model card with metadata, as the text of a README.md.

    Args:
        config: The model's.
        name: What to call the model if it does not say what it was made of.
        made: What its conversion.json holds; None if it has none.
        has_code: Whether the model's code lies beside it.

    Raises:
        ValueError: if `made` is not what a conversion writes.
    """
    try:
        source = made["source"] if made is not None else {"name": name, "revision": None, "card_data": {}}
        on_hub = source["revision"] is not None
        data = ModelCardData(
            **source["card_data"],
            base_model=source["name"] if on_hub else None,
            base_model_relation="finetune" if on_hub else None,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["grouped-differential-attention", "gda"],
        )
        card = ModelCard.from_template(
            data,
            template_str=TEMPLATE.read_text(encoding="utf-8"),
            title=source["name"].rsplit("/", 1)[-1].removesuffix(".gguf"),
            made=made,
            config=config,
            head_map=head_map(config),
            has_code=has_code,
            engines=config.kv_layout == "shared" and config.num_noise_heads >= config.num_key_value_heads,
            version=__version__ if made is None else made["versions"]["gda"],
        )
    except (AttributeError, KeyError, TypeError, UndefinedError) as error:
        raise ValueError(f"conversion.json is not one of a conversion ({error!r}); remove it") from None
    return str(card)
