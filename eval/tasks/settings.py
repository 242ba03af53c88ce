"""Settings of the generated tasks, read from lm-eval's metadata, and how the length of text is counted."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Settings = TypeVar("Settings", bound=DataclassInstance)

log = logging.getLogger(__name__)

CountTokens = Callable[[str], int]
# Arguments of lm-eval's models that concern the tokenizer. They arrive with the metadata.
TOKENIZER_OPTIONS = ("revision", "subfolder", "gguf_file", "trust_remote_code")


def read_settings(
    kind: "type[Settings]", metadata: Mapping[str, Any], sweep: Mapping[str, Any] | None = None
) -> "Settings":
    """Read the settings of a task.

    `metadata` is what lm-eval passes to a `custom_dataset`: the `metadata` of the task's YAML file, overridden by the
    user's `--metadata`, together with the model's arguments. `sweep`, the `dataset_kwargs` of the YAML file, overrides
    both.

    Raises:
        ValueError: for a name that resembles a setting, a missing setting, or a value out of range. (`seed` causes a
            warning only: some of lm-eval's models have an argument of that name.)
    """
    names = [field.name for field in fields(kind)]
    for name in metadata:
        if name not in names and (resembled := get_close_matches(name, names, n=1, cutoff=0.8)):
            raise ValueError(f"metadata has no setting `{name}`; did you mean `{resembled[0]}`?")
    if "seed" in metadata:
        _warn_once("`seed` in the metadata does not affect the tasks' data; `data_seed` does")
    given = {**metadata, **(sweep or {})}
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"metadata lacks the setting(s) {', '.join(missing)}")
    try:
        return kind(**{name: given[name] for name in names})
    except ValueError as error:
        raise ValueError(f"metadata: {error}") from None


def require_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise ValueError unless `value` is an integer of at least `low` and at most `high`."""
    limits = f"at least {low}" if high is None else f"from {low} to {high}"
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        raise ValueError(f"`{name}` must be an integer, {limits}; got {value!r}")


def token_counter(metadata: Mapping[str, Any]) -> CountTokens:
    """The function that counts length: in tokens if the metadata names a tokenizer, otherwise in words.

    The tokenizer is `tokenizer` (an object, a folder or a Hub id), or else `pretrained`.

    Raises:
        ValueError: if the tokenizer cannot be read.
    """
    tokenizer = metadata.get("tokenizer") or metadata.get("pretrained")
    if isinstance(tokenizer, str):
        options = {name: metadata[name] for name in TOKENIZER_OPTIONS if metadata.get(name) is not None}
        tokenizer = _load_tokenizer(tokenizer, tuple(options.items()))
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        _warn_once(
            'no tokenizer is known, so length is counted in words; name one: --metadata \'{"tokenizer": "FOLDER"}\''
        )
        return count_words
    return tokens_of(tokenizer)


def tokens_of(tokenizer: PreTrainedTokenizerBase) -> CountTokens:
    """The function that counts tokens, without special tokens."""
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def count_words(text: str) -> int:
    """Number of words, separated by white space."""
    return len(text.split())


@cache
def _load_tokenizer(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, **dict(options))
    except Exception as error:  # there is no common error class
        raise ValueError(
            f"the tokenizer of {name} cannot be read ({' '.join(str(error).split())}); name another: "
            '--metadata \'{"tokenizer": "FOLDER"}\''
        ) from None


@cache
def _warn_once(message: str) -> None:
    log.warning(message)


def as_test_split(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Documents in the form that lm-eval expects from a `custom_dataset`."""
    from datasets import Dataset

    return {"test": Dataset.from_list(documents)}
