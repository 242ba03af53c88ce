"""A folder of safetensors as a source."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from gda.common.assets import copy_assets
from gda.common.errors import errors_as
from gda.common.trainable import TRAINABLE_FILE
from gda.conversion.sources.config_file import read_config
from gda.conversion.sources.names import stored_names
from gda.conversion.sources.source import Source, card_fields
from gda.conversion.sources.tokenizers import read_tokenizer
from gda.conversion.tensors.file_range import FileRange
from gda.conversion.tensors.safetensors_io import SafetensorsReader


class FolderSource(Source):
    """A folder with config.json and safetensors weights."""

    def __init__(self, folder: Path, *, name: str | None = None, revision: str | None = None):
        self.folder = folder
        self.name = name or folder.resolve().name
        self.revision = revision
        self.config = read_config(folder)
        self._reader = SafetensorsReader(folder)
        self.weight_files = [folder / file for file in self._reader.files]
        self.trainable = path if (path := folder / TRAINABLE_FILE).is_file() else None
        self.specs = self._reader.specs
        expected = self._expected_specs(folder)
        with errors_as(str(folder), caught=ValueError):
            self._stored = stored_names(self.specs, expected, tied=self.config.tie_word_embeddings)
        self.specs = {name: self._reader.specs[stored] for name, stored in self._stored.items()}
        self._check_tensors(folder, expected)

    def read(self, name: str) -> torch.Tensor:
        return self._reader.read(self._stored[name])

    def stored(self, name: str) -> FileRange | None:
        return self._reader.stored(self._stored[name])

    def load(self) -> PreTrainedModel:
        config = copy.deepcopy(self.config)
        config._attn_implementation = "sdpa"  # as an argument, one that config.json names would override it
        with errors_as(f"{self.folder}: transformers cannot load it"):
            model = AutoModelForCausalLM.from_pretrained(
                self.folder, config=config, dtype=torch.float32, trust_remote_code=False
            )
        model.config.return_dict, model.config.output_hidden_states = True, False
        return model.eval()

    def copy_assets(self, folder: Path, *, tokenizer: bool = True) -> None:
        copy_assets(self.folder, folder, tokenizer=tokenizer)
        if not (folder / "generation_config.json").exists():
            GenerationConfig.from_model_config(self.config).save_pretrained(folder)

    def _read_tokenizer(self) -> PreTrainedTokenizerBase:
        return read_tokenizer(self.folder, config=self.config, hub_id=self.name if self.revision else None)

    def card_data(self) -> dict[str, Any]:
        return card_fields(self.folder)
