"""A PEFT adapter as a source: its base model with the adapter merged."""

import copy
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gda.common.assets import copy_assets
from gda.common.errors import first_line
from gda.common.extras import needed_by
from gda.common.files import read_json
from gda.common.places import ADAPTER_CONFIG
from gda.conversion.sources.source import Source, card_fields
from gda.conversion.sources.tokenizers import has_vocabulary, read_tokenizer
from gda.conversion.tensors.safetensors_io import INDEX_FILE, WEIGHTS_FILE

ADAPTER_FILE = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter, and no model. Some programs write the base's config.json beside it."""
    weights = (WEIGHTS_FILE, INDEX_FILE)
    return (folder / ADAPTER_CONFIG).is_file() and not any((folder / file).is_file() for file in weights)


def base_of(folder: Path) -> tuple[str, str | None]:
    """The folder or Hub id of the model that an adapter belongs to, and the revision of the latter.

    Raises:
        ValueError: if adapter_config.json names none or repeats layers, or the weights are not safetensors.
    """
    fields = read_json(folder / ADAPTER_CONFIG)
    base = fields.get("base_model_name_or_path") if isinstance(fields, dict) else None
    if not isinstance(base, str) or not base:
        raise ValueError(f"{folder / ADAPTER_CONFIG} names no base_model_name_or_path; add the model that it adapts")
    if fields.get("layer_replication"):
        raise ValueError(f"{folder} repeats layers; merge it with PEFT, save the model, and convert that")
    if not (folder / ADAPTER_FILE).is_file():
        raise ValueError(f"{folder} has no {ADAPTER_FILE}; save the adapter as safetensors")
    return base, None if Path(base).exists() else fields.get("revision")


class AdapterSource(Source):
    """A LoRA or another adapter that PEFT can merge. The merged model is in memory, in float32, rounded to
    the data types of the base.

    Raises:
        ImportError: if PEFT is missing.
        ValueError: if PEFT cannot load or merge the adapter.
    """

    def __init__(self, folder: Path, base: Source, *, name: str | None = None, revision: str | None = None):
        self.folder, self.base = folder, base
        self.name, self.revision = name or folder.resolve().name, revision
        self.config, self.specs = base.config, base.specs
        self.trainable = base.trainable
        self.notes = (*base.notes, f"the adapter {self.name} is merged into {base.name}")
        self.weight_files = [*base.weight_files, folder / ADAPTER_FILE]
        self._model: PreTrainedModel | None = None
        self._merging = threading.Lock()

    @property
    def _merged(self) -> PreTrainedModel:
        with self._merging:  # several threads read tensors
            if self._model is None:
                self._model = self._merge()
        return self._model

    def _merge(self) -> PreTrainedModel:
        with needed_by("merging an adapter", "train"):
            from peft import PeftModel, get_peft_model_state_dict
        try:
            adapted = PeftModel.from_pretrained(self.base.load(), str(self.folder))
            if not hasattr(adapted, "merge_and_unload"):  # for example a prompt, which no weight can hold
                raise ValueError(f"PEFT cannot merge {adapted.active_peft_config.peft_type.value}")
            with safe_open(self.folder / ADAPTER_FILE, framework="pt") as file:
                expected, found = set(get_peft_model_state_dict(adapted)), set(file.keys())
            if differing := sorted(expected ^ found):  # PEFT would leave these weights as they were initialized
                which = "has no" if differing[0] in expected else "has a superfluous"
                raise ValueError(f"its tensors do not fit: it {which} {differing[0]}")
            model = adapted.merge_and_unload(safe_merge=True)
            if self.config.tie_word_embeddings and not _is_tied(model):
                remedy = "merge it with PEFT, set tie_word_embeddings to false, save the model, and convert that"
                raise ValueError(f"it unties the embeddings; {remedy}")
        except Exception as error:  # a malformed adapter can make PEFT raise anything
            reason = first_line(error)
            if "size mismatch" in reason and self.base.config.model_type == "gda":
                reason = (
                    "it fits a model of another shape; if that is the one which the GDA model was converted from, name "
                    f"it as base_model_name_or_path in {ADAPTER_CONFIG}, and convert the adapter"
                )
            raise ValueError(f"{self.folder} cannot be merged into {self.base.name}: {reason}") from None
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.specs:
                    parameter.copy_(parameter.to(self.specs[name].dtype))
        return model.eval()

    def read(self, name: str) -> torch.Tensor:
        return self._merged.get_parameter(name).detach().to(self.specs[name].dtype)

    def load(self) -> PreTrainedModel:
        return copy.deepcopy(self._merged)  # which `read` reads

    def _read_tokenizer(self) -> PreTrainedTokenizerBase:
        own = has_vocabulary(self.folder)
        return read_tokenizer(self.folder, config=self.config) if own else self.base.tokenizer()

    def copy_assets(self, folder: Path, *, tokenizer: bool = True) -> None:
        own = has_vocabulary(self.folder)  # files of two tokenizers must not be mixed
        self.base.copy_assets(folder, tokenizer=tokenizer and not own)
        copy_assets(self.folder, folder, tokenizer=tokenizer and own)

    def card_data(self) -> dict[str, Any]:
        base, own = self.base.card_data(), card_fields(self.folder)
        own.pop("base_model", None)  # perhaps a path
        if "license" in own:  # it counts, with its own name and link
            base = {name: value for name, value in base.items() if not name.startswith("license")}
        return base | own | ({"base_model": self.base.name} if self.base.revision else {})


def _is_tied(model: PreTrainedModel) -> bool:
    inputs: Any = model.get_input_embeddings()
    outputs: Any = model.get_output_embeddings()
    return bool(inputs.weight.data_ptr() == outputs.weight.data_ptr())
