"""Files that belong to a model besides config and weights."""

import re
import shutil
from pathlib import Path
from typing import Any

from gda.common.files import read_json

TOKENIZER_CONFIG = "tokenizer_config.json"

LICENCE_PATTERNS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
VOCABULARY_PATTERNS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",  # Mistral's
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
)
OTHER_PATTERNS = ("generation_config.json", *LICENCE_PATTERNS)  # of files that don't belong to a tokenizer
TOKENIZER_PATTERNS = (
    *VOCABULARY_PATTERNS,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
ASSET_PATTERNS = (*OTHER_PATTERNS, *TOKENIZER_PATTERNS)  # of files that are copied byte for byte


def copy_assets(source: Path, folder: Path, *, tokenizer: bool = True) -> None:
    """Copy generation config, licences and the tokenizer, if wanted, of a model into `folder`, byte for byte."""
    patterns = ASSET_PATTERNS if tokenizer else OTHER_PATTERNS
    paths = [path for pattern in patterns for path in sorted(source.glob(pattern))]
    for path in (*paths, *(tokenizer_code(source) if tokenizer else [])):
        if path.is_file():
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json of the folder; empty without one, ValueError if it holds no object."""
    path = folder / TOKENIZER_CONFIG
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object")
    return config


def own_code(folder: Path) -> list[str]:
    """The classes that tokenizer_config.json names as code: "module.Class", or "repository--module.Class"."""
    named = tokenizer_config(folder).get("auto_map")
    classes = named.get("AutoTokenizer") if isinstance(named, dict) else named
    return [each for each in (classes if isinstance(classes, list) else [classes]) if isinstance(each, str)]


def tokenizer_code(folder: Path) -> list[Path]:
    """The Python files in the folder that hold the tokenizer's own code: those of `own_code` and what they import."""
    waiting = [each.split(".")[0] for each in own_code(folder)]
    found: dict[str, Path] = {}
    while waiting:
        name = waiting.pop()
        path = folder / f"{name}.py"
        if re.fullmatch(r"\w+", name) and name not in found and path.is_file():
            found[name] = path
            code = path.read_text(encoding="utf-8", errors="replace")
            waiting += re.findall(r"^\s*(?:from|import)\s+\.(\w+)", code, re.MULTILINE)
    return sorted(found.values())
