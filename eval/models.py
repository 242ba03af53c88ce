"""The model to evaluate (a folder, a Hub id, a GGUF file, or a model in memory), and the device that it runs on."""

import contextlib
import copy
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gda.common.errors import errors_as
from gda.common.files import in_background, sha256
from gda.common.places import gguf_file
from gda.common.screen import quiet_transformers
from gda.conversion.sources.config_file import read_config_file
from gda.conversion.sources.open import open_source, resolve_folder
from gda.conversion.sources.source import Source
from gda.conversion.sources.tokenizers import read_tokenizer
from gda.eval.options import TaskOptions

WEIGHTS = "*.safetensors"


def longest_sequence(config: PreTrainedConfig) -> int:
    """How many tokens a model reads at a time; without a limit, a number that no text has."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


@dataclass(frozen=True)
class Candidate:
    """A model that was found but is not loaded: `place` is its folder, or the model itself if it is in memory."""

    name: str
    place: Path | torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    revision: str | None
    weight_files: tuple[Path, ...]
    gguf: Source | None = None

    def hashes(self) -> "Future[dict[str, str]]":
        """SHA-256 of each weight file, computed in the background."""
        return in_background(lambda: {path.name: sha256(path) for path in self.weight_files})

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Quiet transformers, and name the model in whatever it raises for a malformed folder."""
        with quiet_transformers(), errors_as(f"{self.name} cannot be loaded"):
            yield

    def load(self, options: TaskOptions) -> PreTrainedModel:
        """Load the model, with the device and data type of `options`. One in memory keeps its own."""
        with self.loading():
            if isinstance(self.place, torch.nn.Module):
                return cast(PreTrainedModel, self.place).eval()
            if self.gguf is not None:
                model = self.gguf.load()
                model = model if options.dtype == "auto" else model.to(getattr(torch, options.dtype))
            else:
                model = CompleteOnly(AutoModelForCausalLM).from_pretrained(
                    self.place, dtype=options.dtype, trust_remote_code=False
                )
            return model.to(choose_device(options.device)).eval()  # type: ignore[arg-type]


@dataclass(frozen=True)
class CompleteOnly:
    """An auto class of transformers that refuses a checkpoint with missing weights instead of initializing them."""

    auto_class: Any

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        wanted = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that the error below names them
        wanted["use_safetensors"] = True  # otherwise transformers may read pickles
        model, info = self.auto_class.from_pretrained(*args, **(kwargs | wanted))
        for kind, problem in (("missing_keys", "has no"), ("mismatched_keys", "has a different shape for")):
            if names := sorted(key if isinstance(key, str) else key[0] for key in info[kind]):
                others = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ValueError(f"the checkpoint {problem} {names[0]}{others}, which its config.json requires")
        return model


def find_model(
    model: str | Path | torch.nn.Module, tokenizer: str | Path | PreTrainedTokenizerBase | None = None
) -> Candidate:
    """Find a model without loading it.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it has no tokenizer, is not a model folder, or its config.json cannot be a model's.
    """
    given = read_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else copy.deepcopy(tokenizer)
    if isinstance(model, torch.nn.Module):
        if given is None:
            raise ValueError("a model in memory needs its tokenizer: evaluate(model, tokenizer, tasks=…)")
        return Candidate(getattr(model, "name_or_path", "") or type(model).__name__, model, given, None, ())
    with quiet_transformers():
        if (file := gguf_file(model)) is not None:
            return _find_gguf(file, given)
        folder = resolve_folder(model)
    read_config_file(folder)  # refuses a hostile file
    weights = tuple(sorted(folder.glob(WEIGHTS)))
    if not weights:
        raise FileNotFoundError(f"{folder} holds no weights ({WEIGHTS}; pickle files are not read)")
    local = Path(model).is_dir()
    name = folder.resolve().name if local else str(model)
    given = given or read_tokenizer(folder, hub_id=None if local else name)
    check_tokenizer(given, name)
    return Candidate(name, folder, given, None if local else folder.name, weights)


def _find_gguf(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Candidate:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{path}: several processes need a model folder, not a GGUF file")
    source = open_source(path)
    tokenizer = tokenizer or source.tokenizer()
    check_tokenizer(tokenizer, path.name)
    return Candidate(path.name, path, tokenizer, None, tuple(source.weight_files), source)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ValueError if the tokenizer has no token to begin a text with."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name} has neither BOS nor EOS, and a text must begin with one of them")


def choose_device(device: str | None) -> str:
    """`device`, which must exist (lm-eval would use another one). None: CUDA if there is a GPU for it, else the CPU."""
    available = ["cpu"]
    if torch.cuda.is_available():
        available = ["cuda", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        available.append("mps")
    if device is None:
        return available[0]
    if device not in available:
        raise ValueError(f"--device {device} does not exist; available devices: {', '.join(available)}")
    return device
