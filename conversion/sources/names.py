"""Names of tensors: those in a checkpoint, and those that transformers gives them in a causal language model."""

import re
from collections.abc import Collection, Iterable, Sequence

from transformers import PreTrainedConfig

BASE = "model."  # transformers' base_model_prefix of Llama and similar models
HEAD, EMBEDDINGS = "lm_head.weight", f"{BASE}embed_tokens.weight"
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
WRAPPED_LAYER = re.compile(rf"(.+?\.)(?:{re.escape(BASE)})?layers\.\d+\.")


def stored_names(stored: Iterable[str], expected: Collection[str], *, tied: bool) -> dict[str, str]:
    """The names `stored` in a checkpoint, by the names that `AutoModelForCausalLM.from_pretrained` gives them.

    transformers adds a missing `model.`, as in a checkpoint of the base model, and removes one too many. Of two tied
    tensors, either may be stored.

    Raises:
        ValueError: if two tensors would get the same name.
    """
    known, names = {*expected, HEAD}, dict[str, str]()
    for name in stored:
        loaded = next((each for each in (name.removeprefix(BASE), BASE + name) if each in known), name)
        if loaded in names:
            raise ValueError(f"both {names[loaded]} and {name} are there; remove one of them")
        names[loaded] = name
    if tied and EMBEDDINGS not in names and HEAD in names:
        names[EMBEDDINGS] = names.pop(HEAD)
    return names


def why_missing(missing: Sequence[str], found: Collection[str], config: PreTrainedConfig) -> str:
    """Why a checkpoint with the tensors `found` lacks those of a language model, and what to do: a predicate."""
    if adapted := next((name for name in found if ".lora_" in name), None):
        return f"holds layers of an adapter, such as {adapted}; call merge_and_unload() and save the model again"
    prefix = next((match[1] for name in found if (match := WRAPPED_LAYER.match(name)) and match[1] != BASE), None)
    if prefix is not None:
        unwrapped = stored_names(
            (name.removeprefix(prefix) for name in found), missing, tied=config.tie_word_embeddings
        )
        missing = [name for name in missing if name not in unwrapped]
    if missing == [HEAD] and (head := other_head(config)):
        return (
            f"is a {head} by its config.json, which has no {HEAD}; "
            "convert the causal language model that it was trained from"
        )
    if prefix is not None:
        return (
            f"has tensor names that begin with {prefix!r}, which transformers does not load; remove it: "
            f"AutoModelForCausalLM.from_pretrained(FOLDER, key_mapping={{'^{prefix}': ''}})"
            ".save_pretrained(NEW, save_original_format=False)"
        )
    return f"has no tensor {missing[0]}, which its config.json asks for"


def other_head(config: PreTrainedConfig) -> str | None:
    """The architecture in config.json, if it is not that of a causal language model."""
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    return name if name and not name.endswith("ForCausalLM") else None
