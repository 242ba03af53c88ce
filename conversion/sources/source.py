"""What a conversion reads: the interface of a source."""

import contextlib
import functools
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gda.common.errors import first_line
from gda.common.files import sha256
from gda.conversion.families.registry import DIFFERENTIAL_FAMILIES
from gda.conversion.sources.hub import check_downloaded
from gda.conversion.sources.names import EMBEDDINGS, HEAD, LAYER, other_head, why_missing
from gda.conversion.tensors.file_range import FileRange
from gda.conversion.tensors.recipes import checkpoint_specs
from gda.conversion.tensors.safetensors_io import TensorSpec

CARD_FILE = "README.md"
CARD_FIELDS = ("license", "license_name", "license_link", "language", "base_model")
PROVENANCE_FILE = "conversion.json"
TRAINING_FILE = "training.json"

# Buffers that old checkpoints saved and that transformers computes.
COMPUTED_TENSORS = re.compile(r"\.rotary_emb\.inv_freq$")


def card_fields(folder: Path) -> dict[str, Any]:
    """Licence, language and base model in the metadata of a folder's card; empty without a card that can be read."""
    with contextlib.suppress(Exception):  # a conversion doesn't need the card: a broken one must not stop it
        data = ModelCard.load(folder / CARD_FILE).data.to_dict()
        if isinstance(languages := data.get("language"), list):  # YAML reads Norwegian's `no` as false
            data["language"] = ["no" if language is False else language for language in languages]
        return {key: data[key] for key in CARD_FIELDS if data.get(key)}
    return {}


class Source(ABC):
    """A checkpoint to convert: its config, the shapes of its tensors, and each tensor on request."""

    name: str  # a Hub id, or the name of the folder or file
    revision: str | None  # the commit, for a Hub id; else None
    config: PreTrainedConfig  # of transformers' class for its model type, or `MotifConfig`
    specs: dict[str, TensorSpec]  # shape and dtype of each tensor of the model, by name
    weight_files: list[Path]
    notes: tuple[str, ...] = ()  # what the user should know about how it was read
    trainable: Path | None = None  # its trainable.json, if there is one

    @property
    def can_run(self) -> bool:
        """Whether transformers has a class for the model; others are compared tensor by tensor."""
        family = DIFFERENTIAL_FAMILIES.get(self.config.model_type)
        return family is None or family.CAN_RUN

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Read the tensor `name`."""

    def stored(self, name: str) -> FileRange | None:
        """The bytes of the tensor `name` in a file; None where no file holds them unencoded."""
        return None

    @abstractmethod
    def load(self) -> PreTrainedModel:
        """Load the whole model in float32 for evaluation, with sdpa attention; ValueError if transformers cannot."""

    @abstractmethod
    def copy_assets(self, folder: Path, *, tokenizer: bool = True) -> None:
        """Write generation config, licences and, if wanted, the tokenizer into `folder`."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which is read once.

        Raises:
            ImportError: naming the remedy, if a package is missing.
            NoTokenizerError: if there is none that can be read.
        """
        return self._tokenizer

    @functools.cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self._read_tokenizer()

    @abstractmethod
    def _read_tokenizer(self) -> PreTrainedTokenizerBase: ...

    def card_data(self) -> dict[str, Any]:
        """Licence and languages from the metadata of the source's model card, for the result's card."""
        return {}

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file of weights; ValueError if it is not the one that the Hub gave."""
        digests = {path: sha256(path) for path in self.weight_files}
        for path, digest in digests.items():
            check_downloaded(path, digest)
        return {path.name: digest for path, digest in digests.items()}

    def _check_tensors(self, where: Path, expected: dict[str, TensorSpec]) -> None:
        """Raise ValueError unless the tensors are the `expected` ones; drop superfluous ones that are harmless."""
        if missing := [name for name in expected if name not in self.specs]:
            raise ValueError(f"{where} {why_missing(missing, self.specs, self.config)}")
        for name, spec in expected.items():
            if self.specs[name].shape != spec.shape:
                raise ValueError(
                    f"{where}: tensor {name} has shape {self.specs[name].shape}, but config.json asks for {spec.shape}"
                )
        for name in [name for name in self.specs if name not in expected]:
            if name == HEAD and self.config.tie_word_embeddings:
                if not torch.equal(self.read(name), self.read(EMBEDDINGS)):
                    raise ValueError(
                        f"{where}: {HEAD} differs from the embeddings, though config.json ties them; set "
                        "tie_word_embeddings to false there to use both, as transformers does, or remove the tensor"
                    )
            elif not COMPUTED_TENSORS.search(name):
                kind = f"{self.config.model_type} model"
                if head := other_head(self.config):  # transformers would drop what this architecture has learned
                    kind = f"causal language model but of a {head}; only language models can be converted"
                raise ValueError(f"{where} holds tensor {name}, which is not part of a {kind}")
            del self.specs[name]

    def _expected_specs(self, where: Path) -> dict[str, TensorSpec]:
        """The tensors that the config asks for. ValueError, before a model is built, for another number of layers."""
        layers = {match[1] for name in self.specs if (match := LAYER.search(name))}
        if len(layers) != self.config.num_hidden_layers:
            raise ValueError(
                f"{where} holds {len(layers)} layers, but num_hidden_layers is {self.config.num_hidden_layers}"
            )
        family = DIFFERENTIAL_FAMILIES.get(self.config.model_type)
        try:
            return (checkpoint_specs if family is None else family.source_specs)(self.config)
        except Exception as error:  # a contradictory config can make the model class raise anything
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(f"{where}: no model can be built from its config.json: {reason}") from None
