"""The model to evaluate: a folder, a Hub id, a GGUF file, or a model in memory."""

import copy
import os
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gda.common.errors import first_line
from gda.common.files import in_background, sha256
from gda.common.screen import quiet_transformers
from gda.conversion.sources.config_file import read_config_file
from gda.conversion.sources.open import open_source, resolve_folder
from gda.conversion.sources.readers import read_tokenizer
from gda.conversion.sources.source import Source
from gda.eval.device import choose_device
from gda.eval.lm_eval.harness import GDALM, check_tokenizer
from gda.eval.options import TaskOptions

WEIGHTS = "*.safetensors"


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

    def load(self, options: TaskOptions, *, show_prompts: int = 0, progress: bool = True) -> GDALM:
        """Load the model for lm-eval, with the batch size, device and data type of `options`."""
        arguments: dict[str, Any] = {"batch_size": options.batch_size, "tokenizer": self.tokenizer}
        arguments |= {"show_prompts": show_prompts, "progress": progress}
        with quiet_transformers():
            try:
                if isinstance(self.place, torch.nn.Module):
                    return GDALM(self.place, **arguments)
                if self.gguf is not None:
                    model = self.gguf.load().to(choose_device(options.device))  # type: ignore[arg-type]
                    return GDALM(
                        model if options.dtype == "auto" else model.to(getattr(torch, options.dtype)), **arguments
                    )
                return GDALM(str(self.place), device=options.device, dtype=options.dtype, **arguments)
            except Exception as error:  # transformers and lm-eval have no common error class
                raise ValueError(f"{self.name} cannot be loaded: {first_line(error)}") from None


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
        if Path(model).suffix == ".gguf":
            return _find_gguf(Path(model), given)
        folder = resolve_folder(model)
    read_config_file(folder)  # refuses a hostile file
    weights = tuple(sorted(folder.glob(WEIGHTS)))
    if not weights:
        raise FileNotFoundError(f"{folder} holds no weights ({WEIGHTS}; pickle files are not read)")
    local = Path(model).is_dir()
    name = folder.resolve().name if local else str(model)
    given = given or read_tokenizer(folder)
    check_tokenizer(given, name)
    return Candidate(name, folder, given, None if local else folder.name, weights)


def _find_gguf(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Candidate:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{path}: several processes need a model folder, not a .gguf file")
    source = open_source(path)
    tokenizer = tokenizer or source.tokenizer()
    if tokenizer is None:
        raise ValueError(f"{path} holds no tokenizer that transformers can load")
    check_tokenizer(tokenizer, path.name)
    return Candidate(path.name, path, tokenizer, None, (path,), source)
