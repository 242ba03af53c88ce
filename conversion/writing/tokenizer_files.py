"""The tokenizer files of a result, which transformers must read as it reads the source's."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from gda.common.assets import TOKENIZER_CONFIG, own_code, tokenizer_config
from gda.common.errors import CheckFailed
from gda.common.files import read_json, write_json
from gda.conversion.sources.adapter import AdapterSource
from gda.conversion.sources.compare_tokenizers import difference
from gda.conversion.sources.source import Source
from gda.conversion.sources.tokenizers import ANY_TOKENIZER, NoTokenizerError, has_vocabulary, read_tokenizer

RUN_AS_THEY_ARE = {"PreTrainedTokenizer", "TokenizersBackend", "PythonBackend"}
# What a tokenizer class chooses by itself where tokenizer_config.json is silent.
CHOSEN_BY_CLASS = (
    *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
    *("model_input_names", "padding_side", "truncation_side", "clean_up_tokenization_spaces"),
)


def keep_tokenizer(source: Source, folder: Path, *, check: bool = True) -> list[str]:
    """`keep_reading` for a model of any kind, whose tokenizer may need code of its own.

    Raises:
        ImportError: if a package is missing that reads the source's tokenizer.
        CheckFailed: as `keep_reading`.
    """
    notes = _code_notes(source, folder)
    try:
        tokenizer = source.tokenizer()
    except NoTokenizerError as error:  # verification says why its prompts are random ids
        return notes if notes or error.detail is None else [f"tokenizers are not compared: {error}"]
    try:
        return [*notes, *keep_reading(tokenizer, folder, check=check)]
    except CheckFailed as error:
        raise CheckFailed(f"{error}; --no-verify writes the model all the same") from None


def keep_reading(tokenizer: PreTrainedTokenizerBase, folder: Path, *, check: bool = True) -> list[str]:
    """Make transformers read the tokenizer files in `folder` as it reads those that they were copied from.

    The files stay as they are if the class that tokenizer_config.json names is the one that reads them. For some model
    types transformers chooses another. Then tokenizer.json gets what that class does, and tokenizer_config.json names a
    class that runs it unchanged.

    `folder` also holds the config.json of the result. Notes say what was changed and, without `check`, what differs.

    Raises:
        CheckFailed: naming a string and its ids, if transformers cannot be made to read both alike.
    """
    changed = not _names_its_class(tokenizer, folder) and _write_as_read(tokenizer, folder)
    different = folder_difference(tokenizer, folder)
    if different is not None and not changed and (changed := _write_as_read(tokenizer, folder)):
        different = folder_difference(tokenizer, folder)
    notes = [f"{TOKENIZER_CONFIG} names {ANY_TOKENIZER}, so that the tokenizer gives the source's ids"] * changed
    if different is None:
        return notes
    model_type = read_json(folder / "config.json").get("model_type")
    found = f"transformers reads the tokenizer of a {model_type} differently than the source's: {different}"
    if check:
        raise CheckFailed(found)
    return [*notes, found]


def folder_difference(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str | None:
    """`difference` between a source's tokenizer and the one in `folder`."""
    try:
        return difference(tokenizer, read_tokenizer(folder))
    except NoTokenizerError as error:
        return f"{error.reason} ({error.detail})" if error.detail else error.reason


def _names_its_class(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether the files alone say how they are read: they name the class that reads them, and hold a tokenizer.json."""
    config = tokenizer_config(folder)
    if not (folder / "tokenizer.json").is_file() or config.get("fix_mistral_regex"):
        return False  # packages that not everyone has translate other files; the fix is made in folders of a Mistral
    names = [name.removesuffix("Fast") for name in (str(config.get("tokenizer_class")), type(tokenizer).__name__)]
    return names[0] == names[1] or RUN_AS_THEY_ARE.issuperset(names)


def _write_as_read(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Write what the tokenizer does into tokenizer.json and name a class that runs it; False if it has no such form."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    path = folder / "tokenizer.json"
    if not path.is_file() or Tokenizer.from_file(str(path)).to_str() != backend.to_str():
        backend.save(str(path))
    config = tokenizer_config(folder)
    config.pop("fix_mistral_regex", None)  # it is in tokenizer.json, and would be applied again
    config["tokenizer_class"] = ANY_TOKENIZER
    for name in CHOSEN_BY_CLASS:
        value = getattr(tokenizer, name)
        if value is None:
            config.pop(name, None)
        elif _content(config.get(name)) != value:
            config[name] = value
    write_json(folder / TOKENIZER_CONFIG, config)
    return True


def _content(value: Any) -> Any:
    """The text of a token that is written with its properties; other values as they are."""
    return value.get("content") if isinstance(value, dict) else value


def _code_notes(source: Source, folder: Path) -> list[str]:
    """A note on the tokenizer's own code, if it has any. That of a Hub id is named with the id: it isn't downloaded."""
    if not (named := own_code(folder)):
        return []
    if isinstance(source, AdapterSource) and not has_vocabulary(source.folder):
        source = source.base  # whose tokenizer it has
    if source.revision is not None:
        named = [each if "--" in each else f"{source.name}--{each}" for each in named]
        config = tokenizer_config(folder) | {"auto_map": {"AutoTokenizer": [named[0], named[-1]]}}
        write_json(folder / TOKENIZER_CONFIG, config)
    kept = "stays on the Hub" if "--" in named[0] else "is copied"
    return [f"the tokenizer has its own code, {named[0]}; it {kept} and is not run"]
