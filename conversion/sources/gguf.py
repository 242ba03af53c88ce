"""A GGUF file as a source: tensors are dequantized to float32 one at a time."""

import contextlib
import functools
import io
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
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

from gda.common.assets import TOKENIZER_CONFIG, tokenizer_config
from gda.common.errors import errors_as, first_line
from gda.common.extras import needed_by
from gda.common.files import stamp_of, write_json
from gda.common.screen import quiet_transformers
from gda.conversion.families.llamalike import head_dim
from gda.conversion.sources.config_file import require_known_type
from gda.conversion.sources.gguf_parts import parts_of, read_parts
from gda.conversion.sources.gguf_rope import ROPE_FREQS, scaling_in_metadata, scaling_in_tensor
from gda.conversion.sources.gguf_splits import correct_tokenizer, rule_of
from gda.conversion.sources.source import Source
from gda.conversion.sources.tokenizers import ANY_TOKENIZER, NoTokenizerError
from gda.conversion.tensors.file_range import FileRange
from gda.conversion.tensors.recipes import meta_model
from gda.conversion.tensors.safetensors_io import TensorSpec

# Metadata that changes what a model computes but that transformers ignores, with the value that changes nothing.
# llama.cpp's architecture name of a Mistral is "llama", and it runs a Mistral without its sliding window.
UNREAD_METADATA = {"expert_count": 0, "attention.sliding_window": 0}
HEAD_WIDTHS = ("attention.key_length", "attention.value_length")


class GGUFSource(Source):
    """A GGUF file of a Llama, Mistral, Qwen2 or Qwen3, or the files of one that llama.cpp has split.

    transformers' own tables translate names, row order of q and k, config and tokenizer. Scaling of RoPE, which it
    ignores, is added to the config.

    Raises:
        ImportError: if the package `gguf` is missing.
        FileNotFoundError: if one of its files is missing.
        ValueError: for a damaged file, another architecture, or contents that transformers would ignore silently.
    """

    def __init__(self, path: Path):
        with needed_by("reading a GGUF file", "gguf"):
            import gguf  # noqa: F401
        self.weight_files = parts_of(path)
        self.path = path = self.weight_files[0]
        self.name = path.name
        self.revision = None
        self._stamps = {file: stamp_of(file) for file in self.weight_files}
        self._reader, self._files = read_parts(self.weight_files)
        self._reader.fields.pop("general.name", None)  # "mistral" would make transformers take a Llama for a Mistral
        self.config = self._read_config()
        self._refuse_unread_contents()
        self._tensors = self._tensors_by_name()
        self.specs = {
            name: TensorSpec(tuple(int(size) for size in reversed(tensor.shape)), torch.float32)
            for name, tensor in self._tensors.items()
        }
        self._check_tensors(path, self._expected_specs(path))
        if self._entry("tokenizer.ggml.model") == "gpt2" and rule_of(self._entry) is None:
            rule = self._entry("tokenizer.ggml.pre")
            self.notes = (f"the rule {rule!r} for splitting text is not known here; check the ids of the tokenizer",)

    @contextlib.contextmanager
    def _read_alone(self) -> Iterator[tuple[str, str]]:
        """Yield a folder and a file that transformers reads as this file alone.

        From the file's own folder, it would prefer a tokenizer.json to the tokenizer in the file, ask whether to run
        code that a tokenizer_config.json names, and apply an adapter. So it gets an empty folder.

        It uses the file's parsed header and one name map, each of which takes it seconds to make: it makes a reader for
        the config, the tokenizer and the weights, and a name map for each module of the model.
        """
        package: Any = import_module("gguf")  # transformers looks both names up there whenever it reads a file
        original = package.GGUFReader, package.get_tensor_name_map
        here = self.path.absolute()
        package.GGUFReader = lambda path: self._reader if Path(path).absolute() == here else original[0](path)
        package.get_tensor_name_map = functools.cache(original[1])
        try:
            with tempfile.TemporaryDirectory(prefix="gda-") as empty:
                yield empty, str(here)
        finally:
            package.GGUFReader, package.get_tensor_name_map = original

    def _require_layers(self) -> None:
        """Refuse more layers than tensors: transformers creates lists and tables of that length."""
        layers = self._metadata("block_count")
        if not isinstance(layers, int) or layers > len(self._reader.tensors):
            raise ValueError(
                f"{self._architecture}.block_count is {layers}, but it holds {len(self._reader.tensors)} tensors"
            )

    def _read_config(self) -> PreTrainedConfig:
        from gguf import MODEL_ARCH_NAMES

        with errors_as(f"{self.path} is not a readable GGUF file of a model"):
            self._require_layers()
            with quiet_transformers(), self._read_alone() as (folder, file):
                read = AutoConfig.from_pretrained(folder, gguf_file=file)
            fields = {name: getattr(read, name) for name in type(read).__dataclass_fields__}
            config = type(read)(**fields)  # without attributes that a saved config should not have
        require_known_type(config.model_type, self.path)
        if config.model_type not in MODEL_ARCH_NAMES.values():
            raise ValueError(
                f"{self.path}: transformers has no table of GGUF tensors for a {config.model_type}; "
                "convert from the safetensors model"
            )
        config.dtype = torch.float32
        config.rope_parameters = config.rope_parameters | self._rope_scaling(config)
        return config

    def _rope_scaling(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The scaling of RoPE, in the metadata or a tensor that only llama.cpp's architecture "llama" has."""
        keys = [key.removeprefix(f"{self._architecture}.") for key in self._reader.fields]
        factors = next((tensor for tensor in self._reader.tensors if self._is_rope(tensor)), None)
        try:
            scaling = scaling_in_metadata(keys, self._metadata, config.max_position_embeddings)
            if factors is None or not (llama3 := scaling_in_tensor(config, torch.from_numpy(self._values(factors)))):
                return scaling
            if scaling:
                raise ValueError(f"it has both {ROPE_FREQS} and rope.scaling, but transformers supports only one")
            return llama3
        except (TypeError, ValueError) as error:  # TypeError: an entry is a list or a text
            raise ValueError(f"{self.path}: {error}; convert from the safetensors model") from None

    def _is_rope(self, tensor: Any) -> bool:
        return tensor.name == ROPE_FREQS and self._architecture == "llama"

    def _refuse_unread_contents(self) -> None:
        for key, read in (UNREAD_METADATA | dict.fromkeys(HEAD_WIDTHS, head_dim(self.config))).items():
            if (found := self._metadata(key)) not in (None, read):
                raise ValueError(
                    f"{self.path}: {self._architecture}.{key} is {found}, but transformers reads the model as if it "
                    f"were {read}; convert from the safetensors model"
                )

    @property
    def _architecture(self) -> str:
        """llama.cpp's name of the model type, which determines the tensors' layout and prefixes the metadata."""
        return self._reader.fields["general.architecture"].contents()

    def _metadata(self, key: str) -> Any:
        return self._entry(f"{self._architecture}.{key}")

    def _entry(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        return None if field is None else field.contents()

    def _tensors_by_name(self) -> dict[str, Any]:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        processor_class = TENSOR_PROCESSORS.get(self._architecture, TensorProcessor)
        self._processor = processor_class(config=self.config.to_dict())
        with self._read_alone():
            names = get_gguf_hf_weights_map(meta_model(self.config), self._processor, self._architecture)
        tensors = {}
        for tensor in self._reader.tensors:
            if self._is_rope(tensor):
                continue  # read as a part of the config
            if tensor.name not in names:
                raise ValueError(
                    f"{self.path}: tensor {tensor.name} has no counterpart in transformers' {self.config.model_type}; "
                    "convert from the safetensors model"
                )
            tensors[names[tensor.name]] = tensor
        return tensors

    def read(self, name: str) -> torch.Tensor:
        weights = self._values(self._tensors[name])
        processed = self._processor.process(weights=weights, name=self._tensors[name].name, tensor_key_mapping={})
        return torch.tensor(processed.weights, dtype=torch.float32)

    def _values(self, tensor: Any) -> np.ndarray:
        """The values of a tensor of the file, in float32."""
        from gguf import dequantize

        file = self._files[tensor.name]
        data = np.empty_like(tensor.data, subok=False)  # the reader's mapped data could kill the process
        stored = FileRange(file, int(tensor.data_offset), data.nbytes, self._stamps[file])
        stored.read_into(data.reshape(-1).view(np.uint8).data, f"tensor {tensor.name}")
        with errors_as(f"{self.path}: tensor {tensor.name} cannot be read"):
            return dequantize(data, tensor.tensor_type)

    def load(self) -> PreTrainedModel:
        # transformers dequantizes, names and orders the weights, so that verification is independent of `read`. Its
        # progress bar cannot be disabled.
        with (
            errors_as(f"{self.path}: transformers cannot load it"),
            contextlib.redirect_stderr(io.StringIO()),
            self._read_alone() as (folder, file),
        ):
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file, config=self.config, dtype=torch.float32, attn_implementation="sdpa"
            )
        model.name_or_path = model.config.name_or_path = str(self.path)  # which reports show
        return model.eval()

    def _read_tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            with quiet_transformers(), self._read_alone() as (folder, file):
                tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        except Exception as error:  # transformers has no common error for this
            raise NoTokenizerError(self.path, "the tokenizer cannot be loaded", first_line(error)) from None
        tokenizer.name_or_path = str(self.path)
        correct_tokenizer(tokenizer, self._entry)
        if max(tokenizer.all_special_ids, default=0) >= self.config.vocab_size:
            # Names with characters such as "▁" or "｜", which transformers reads as bytes.
            detail = "a special token would get an id beyond the embeddings; convert from the safetensors model"
            raise NoTokenizerError(self.path, "transformers misreads the tokenizer", detail)
        return tokenizer

    def copy_assets(self, folder: Path, *, tokenizer: bool = True) -> None:
        if tokenizer:
            with contextlib.suppress(NoTokenizerError):
                self.tokenizer().save_pretrained(folder)
                config = tokenizer_config(folder)
                if config["tokenizer_class"] == "TokenizersBackend":  # a name that transformers 4 doesn't know
                    write_json(folder / TOKENIZER_CONFIG, config | {"tokenizer_class": ANY_TOKENIZER})
        GenerationConfig.from_model_config(self.config).save_pretrained(folder)

    def card_data(self) -> dict[str, Any]:
        found = {"license": self._entry("general.license"), "language": self._entry("general.languages")}
        return {key: value for key, value in found.items() if value is not None}
