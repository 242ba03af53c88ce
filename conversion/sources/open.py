"""Opening what a user names: a folder, a Hub id or a GGUF file."""

from pathlib import Path

from huggingface_hub import is_offline_mode

from gda.common.assets import ASSET_PATTERNS, LICENCE_PATTERNS
from gda.common.places import ADAPTER_CONFIG, check_model, gguf_file
from gda.common.trainable import TRAINABLE_FILE
from gda.conversion.sources.adapter import AdapterSource, base_of, is_adapter
from gda.conversion.sources.folder import FolderSource
from gda.conversion.sources.gguf import GGUFSource
from gda.conversion.sources.hub import download
from gda.conversion.sources.source import CARD_FILE, PROVENANCE_FILE, TRAINING_FILE, Source

# The files of a model folder. The card is read as well.
MODEL_PATTERNS = (
    PROVENANCE_FILE,
    TRAINABLE_FILE,
    "config.json",
    ADAPTER_CONFIG,
    "*.safetensors",
    "*.safetensors.index.json",
    *ASSET_PATTERNS,
)

# What transformers leaves out when it fills the Hub's cache.
DESCRIPTIONS = (*LICENCE_PATTERNS, PROVENANCE_FILE, TRAINABLE_FILE, TRAINING_FILE, CARD_FILE)


def open_source(location: str | Path, revision: str | None = None) -> Source:
    """Open a folder, a GGUF file, or a Hub id at `revision`. An adapter is merged into its base model.

    Raises:
        FileNotFoundError: if it is none of them.
        ValueError: if it does not hold a checkpoint that can be converted, or is empty.
    """
    return _opened(location, revision, None)


def _opened(location: str | Path, revision: str | None, adapted_by: Path | None) -> Source:
    """`open_source`. The base of an adapter may not be one itself."""
    check_model(location)
    path = Path(location)
    if revision is not None and path.exists():
        raise ValueError(f"--revision is for a Hub id, but {location} is a local path")
    if (file := gguf_file(path)) is not None:
        source = GGUFSource(file)
        if path.is_dir():
            source.notes += (f"{file.name}, the only GGUF model in {path.name}, is read",)
        return source
    if path.is_dir():
        return _opened_adapter(path, adapted_by) if is_adapter(path) else FolderSource(path)
    folder = resolve_folder(location, revision)
    named = {"name": str(location), "revision": folder.name}  # the Hub's cache names folders by commit
    if is_adapter(folder):
        return _opened_adapter(folder, adapted_by, **named)
    if not any(folder.glob("*.safetensors*")):
        if is_offline_mode():
            raise FileNotFoundError(f"the Hub's cache has no safetensors of {location}; unset HF_HUB_OFFLINE")
        raise FileNotFoundError(
            f"{location} has no safetensors on the Hub; if it has a GGUF file, `hf download` it and name the file"
        )
    return FolderSource(folder, **named)


def _opened_adapter(folder: Path, adapted_by: Path | None, **named: str) -> AdapterSource:
    """The adapter in a folder; ValueError if another adapter names it as its base."""
    if adapted_by is not None:
        base = named.get("name", folder)
        raise ValueError(f"{adapted_by} is an adapter of {base}, which is an adapter itself; merge that one first")
    base, revision = base_of(folder)
    try:
        return AdapterSource(folder, _opened(base, revision, folder), **named)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path: {error}") from None


def resolve_folder(location: str | Path, revision: str | None = None) -> Path:
    """The local folder of `location`: itself, or the Hub's cache after downloading what is missing.

    Raises:
        FileNotFoundError: if it is neither a folder nor a repository on the Hub.
        ValueError: if it is empty.
        PermissionError, ConnectionError: if the Hub cannot be reached or denies access.
    """
    check_model(location)
    path = Path(location)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{location} is not a model folder")
    try:
        return download(str(location), revision, [*MODEL_PATTERNS, TRAINING_FILE, CARD_FILE], optional=DESCRIPTIONS)
    except (FileNotFoundError, ConnectionError) as error:  # perhaps a mistyped path, models/llama
        raise type(error)(f"there is no folder {location} here, and {error}") from None
