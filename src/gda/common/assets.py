"""Files that belong to a model besides config and weights."""

import shutil
from pathlib import Path

LICENCE_PATTERNS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
# These are copied byte for byte.
ASSET_PATTERNS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",  # Mistral's
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    *LICENCE_PATTERNS,
)


def copy_assets(source: Path, folder: Path) -> None:
    """Copy generation config, tokenizer and licences of the model in `source` into `folder`, byte for byte."""
    for pattern in ASSET_PATTERNS:
        for path in sorted(path for path in source.glob(pattern) if path.is_file()):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
