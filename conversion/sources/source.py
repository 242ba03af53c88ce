"""Where a conversion reads from: a folder of safetensors, a repository of the Hub, or a GGUF file."""

import contextlib
import copy
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gda.common.assets import ASSET_PATTERNS, copy_assets
from gda.common.errors import first_line
from gda.common.files import sha256
from gda.common.trainable import TRAINABLE_FILE
from gda.conversion.families import motif
from gda.conversion.families.llamalike import LLAMALIKES, refuse_unread
from gda.conversion.sources.config_file import read_config_file
from gda.conversion.sources.hub import check_downloaded, download
from gda.conversion.tensors.file_range import FileRange
from gda.conversion.tensors.recipes import checkpoint_specs
from gda.conversion.tensors.safetensors_io import SafetensorsReader, TensorSpec

PROVENANCE_FILE = "conversion.json"
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
MODEL_PATTERNS = (PROVENANCE_FILE, TRAINABLE_FILE, "config.json", *WEIGHT_PATTERNS, *ASSET_PATTERNS)

CONVERTIBLE_TYPES = (*LLAMALIKES, "diffllama", motif.MODEL_TYPE)

# Buffers that old checkpoints saved and that transformers computes.
COMPUTED_TENSORS = re.compile(r"\.rotary_emb\.inv_freq$")


class Source(ABC):
    """A checkpoint to convert: its config, the shapes of its tensors, and each tensor when asked for.

    Attributes:
        name: What to call it: a Hub id, or the name of the folder or file.
        revision: The commit, for a Hub id.
        config: Its configuration, as transformers reads it; a Motif's as `motif` reads it.
        specs: Shape and dtype of each tensor of the model, by name.
        weight_files: The files that hold the tensors.
    """

    name: str
    revision: str | None
    config: PreTrainedConfig
    specs: dict[str, TensorSpec]
    weight_files: list[Path]

    @property
    def can_run(self) -> bool:
        """Whether transformers has a class for it; others are compared tensor by tensor."""
        return self.config.model_type != motif.MODEL_TYPE

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`."""

    def stored(self, name: str) -> FileRange | None:
        """Where the bytes of the tensor `name` lie, if they lie anywhere as they are."""
        return None

    @abstractmethod
    def load(self) -> PreTrainedModel:
        """The whole model in float32, loaded by transformers, with outputs in their usual form.

        Attention is sdpa, which runs everywhere, whatever the config names.

        Raises:
            ValueError: if transformers cannot load it.
        """

    @abstractmethod
    def copy_assets(self, folder: Path) -> None:
        """Put generation config, tokenizer and licences into `folder`."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, or None if there is none."""

    def card_data(self) -> dict[str, Any]:
        """Licence and languages from the metadata of the source's model card, for the card of what is made of it."""
        return {}

    def file_stamps(self) -> list[tuple[str, int, int]]:
        """Name, size and time of each file of weights: what work that was begun must find as it was."""
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.weight_files]

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file of weights."""
        return {path.name: sha256(path) for path in self.weight_files}

    def _check_tensors(self, where: Path) -> None:
        """Compare the tensors with what the config asks for.

        Raises:
            ValueError: naming the first tensor that is absent, superfluous or of another shape.
        """
        layers = {match.group(1) for name in self.specs if (match := re.match(r"model\.layers\.(\d+)\.", name))}
        if len(layers) != self.config.num_hidden_layers:
            raise ValueError(
                f"{where} holds {len(layers)} layers, but num_hidden_layers is {self.config.num_hidden_layers}"
            )
        try:
            expected = checkpoint_specs(self.config) if self.can_run else motif.source_specs(self.config)
        except Exception as error:  # whatever a contradictory config makes the model class raise
            said = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(f"{where}: its config.json describes no model that can be built: {said}") from None
        for name, spec in expected.items():
            if name not in self.specs:
                raise ValueError(f"{where} has no tensor {name}, which its config.json asks for")
            if self.specs[name].shape != spec.shape:
                raise ValueError(
                    f"{where}: tensor {name} has shape {self.specs[name].shape}, but config.json asks for {spec.shape}"
                )
        for name in [name for name in self.specs if name not in expected]:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                if not torch.equal(self.read(name), self.read("model.embed_tokens.weight")):
                    raise ValueError(
                        f"{where}: lm_head.weight differs from the embeddings, though config.json ties them; "
                        "set tie_word_embeddings to false there"
                    )
            elif not COMPUTED_TENSORS.search(name):
                raise ValueError(f"{where} holds tensor {name}, which is no part of a {self.config.model_type} model")
            del self.specs[name]


class FolderSource(Source):
    """A folder with config.json and safetensors weights."""

    def __init__(self, folder: Path, *, name: str | None = None, revision: str | None = None):
        self.folder = folder
        self.name = name or folder.resolve().name
        self.revision = revision
        self.config = read_config(folder)
        self._reader = SafetensorsReader(folder)
        self.specs = dict(self._reader.specs)
        self.weight_files = [folder / file for file in self._reader.files]
        self._check_tensors(folder)

    def read(self, name: str) -> torch.Tensor:
        return self._reader.read(name)

    def stored(self, name: str) -> FileRange | None:
        return self._reader.stored(name)

    def load(self) -> PreTrainedModel:
        config = copy.deepcopy(self.config)
        config._attn_implementation = "sdpa"  # as an argument it would give way to a config.json that names another
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.folder, config=config, dtype=torch.float32, trust_remote_code=False
            )
        except Exception as error:  # whatever a malformed file makes transformers raise
            raise ValueError(f"{self.folder}: transformers cannot load it: {first_line(error)}") from None
        model.config.return_dict, model.config.output_hidden_states = True, False
        return model.eval()

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file of weights.

        Raises:
            ValueError: if it is not the one that the Hub gave for a file that comes from there.
        """
        digests = super().hashes()
        if self.revision is not None:
            for file, digest in digests.items():
                check_downloaded(self.folder / file, digest)
        return digests

    def copy_assets(self, folder: Path) -> None:
        copy_assets(self.folder, folder)
        if not (folder / "generation_config.json").exists():
            GenerationConfig.from_model_config(self.config).save_pretrained(folder)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return read_tokenizer(self.folder)

    def card_data(self) -> dict[str, Any]:
        from huggingface_hub import ModelCard

        with contextlib.suppress(Exception):  # a card is a courtesy: a broken one must not stop a conversion
            data = ModelCard.load(self.folder / "README.md").data.to_dict()
            if isinstance(languages := data.get("language"), list):  # YAML takes Norwegian for a truth value
                data["language"] = ["no" if language is False else language for language in languages]
            return {key: data[key] for key in ("license", "license_name", "license_link", "language") if data.get(key)}
        return {}


def read_config(folder: Path) -> PreTrainedConfig:
    """Read `folder`/config.json by the library's own class for its model type; code in the folder is never run.

    Raises:
        FileNotFoundError, ValueError: naming the file, if it is absent or cannot be a config.
    """
    path = folder / "config.json"
    raw = read_config_file(folder)
    if not isinstance(raw.get("model_type"), str):
        raise ValueError(f"{path} names no model_type")
    model_type = raw["model_type"].lower()  # "Motif" in some of its releases
    require_known_type(model_type, path)
    if raw.get("quantization_config") is not None:
        raise ValueError(f"{path} has a quantization_config; dequantize the model and save it first")
    if model_type == motif.MODEL_TYPE:
        return motif.read_motif_config(raw, path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a malformed file makes the config class raise
        raise ValueError(f"{path} is not a valid configuration: {first_line(error)}") from None
    require_known_type(config.model_type, path)  # transformers makes a Ministral of a Mistral with layer_types
    refuse_unread(config, path)
    return config


def require_known_type(model_type: str, where: Path) -> None:
    """Raise ValueError if the tensors of that type of model are not known here."""
    if model_type not in (*CONVERTIBLE_TYPES, "gda"):
        raise ValueError(
            f"{where}: a model of type {model_type!r} cannot be converted; {', '.join(CONVERTIBLE_TYPES)} can"
        )


def read_tokenizer(folder: Path, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `folder`, or None if there is none that transformers can load."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **kwargs)
    except Exception:  # transformers has no common error for it; a model without a tokenizer is a model all the same
        return None


def open_source(location: str | Path, revision: str | None = None) -> Source:
    """Open a folder, a `.gguf` file, or a Hub id at `revision`.

    Raises:
        FileNotFoundError: if it is none of them.
        ValueError: if what it holds is not a checkpoint that can be converted.
    """
    path = Path(location)
    if revision is not None and path.exists():
        raise ValueError(f"--revision is for a Hub id, and {location} is here")
    if path.suffix == ".gguf":
        from gda.conversion.sources.gguf import GGUFSource

        return GGUFSource(path)
    if path.is_dir():
        return FolderSource(path)
    if path.exists():
        raise ValueError(f"{path} is neither a model folder nor a .gguf file")
    folder = resolve_folder(location, revision)
    return FolderSource(folder, name=str(location), revision=folder.name)  # the Hub's cache names folders by commit


def resolve_folder(location: str | Path, revision: str | None = None) -> Path:
    """The local folder of `location`: itself, or where the Hub's files are cached after downloading them.

    Raises:
        FileNotFoundError: if it is neither a folder nor a repository of the Hub.
        PermissionError, ConnectionError: if the Hub does not give it.
    """
    path = Path(location)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(location)) or str(location).startswith("."):
        raise FileNotFoundError(f"{location} does not exist")
    return download(str(location), revision, [*MODEL_PATTERNS, "README.md"])
