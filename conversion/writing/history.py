"""The steps that led to a model: conversions, growth and training, as sentences for its card."""

from pathlib import Path
from typing import Any

from gda.common.files import read_json
from gda.conversion.sources.folder import FolderSource
from gda.conversion.sources.source import PROVENANCE_FILE, TRAINING_FILE, Source

# The files that record the steps. A trained model has the second one, and no longer the tensors of the first.
RECORDS = (PROVENANCE_FILE, TRAINING_FILE)


def history_of(folder: Path) -> list[str]:
    """The steps that a folder records, oldest first; empty without a record."""
    for name in RECORDS:
        if (folder / name).is_file():
            record = read_json(folder / name)
            steps = record.get("history") if isinstance(record, dict) else None
            return [step for step in steps if isinstance(step, str)] if isinstance(steps, list) else []
    return []


def with_conversion(source: Source, made: dict[str, Any]) -> list[str]:
    """The steps of a source, and the conversion that conversion.json describes."""
    before = history_of(source.folder) if isinstance(source, FolderSource) else []
    settings, split, verification = made["settings"], made["split"], made["verification"]
    growth = {
        name: value for name, value in (settings["growth"] or {}).items() if value is not None and value is not False
    }
    options = f" ({', '.join(f'{name} {value}' for name, value in growth.items())})" if growth else ""
    commit = f" at commit {source.revision}" if source.revision else ""
    result = ""
    if split is not None and split["perplexity"] is not None:
        result = f"; held-out perplexity {split['perplexity']:.3f}, that of the source {split['perplexity_source']:.3f}"
    elif verification is not None and verification["relative"] is not None:
        result = f"; largest difference of a logit {verification['relative']:.1e}, relative to the largest logit"
    return [*before, f"`{settings['mode']}`{options} of {source.name}{commit}{result}."]
