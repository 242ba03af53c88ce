"""What is to be evaluated: a folder, a Hub id, a GGUF file, or a model in memory."""

import contextlib
import copy
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.api.task
import lm_eval.evaluator
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gda.common.errors import first_line
from gda.common.files import in_background, sha256
from gda.common.screen import quiet_transformers
from gda.conversion.sources.config_file import read_config_file
from gda.conversion.sources.open import open_source, resolve_folder
from gda.conversion.sources.source import Source
from gda.eval.lm_eval.harness import GDALM, check_tokenizer, default_device

WEIGHTS = "*.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


@dataclass(frozen=True)
class Candidate:
    """A model that was found and not loaded yet.

    Attributes:
        name: What to call it.
        place: Its folder, or itself if it is in memory.
        tokenizer: Its tokenizer.
        revision: The commit, for a Hub id.
        weight_files: Where its weights lie; empty in memory.
        gguf: The opened file, if it is one.
    """

    name: str
    place: Path | torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    revision: str | None
    weight_files: tuple[Path, ...]
    gguf: Source | None = None

    def hashes(self) -> "Future[dict[str, str]]":
        """SHA-256 of each file of weights, computed in the background."""
        return in_background(lambda: {path.name: sha256(path) for path in self.weight_files})

    def load(
        self,
        *,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        show_prompts: int = 0,
        progress: bool = True,
    ) -> GDALM:
        """Load it for lm-eval.

        Raises:
            ValueError: if it cannot be.
        """
        settings: dict[str, Any] = {"batch_size": batch_size, "tokenizer": self.tokenizer}
        settings |= {"show_prompts": show_prompts, "progress": progress}
        with quiet_transformers():
            try:
                if isinstance(self.place, torch.nn.Module):
                    return GDALM(self.place, **settings)
                if self.gguf is not None:
                    gguf = self.gguf.load().to(device or default_device())  # type: ignore[arg-type]
                    return GDALM(gguf if dtype == "auto" else gguf.to(getattr(torch, dtype)), **settings)
                return GDALM(str(self.place), device=device, dtype=dtype, **settings)
            except Exception as error:  # whatever a malformed folder makes transformers or lm-eval raise
                raise ValueError(f"{self.name} cannot be loaded: {first_line(error)}") from None


def find_model(
    model: str | Path | torch.nn.Module, tokenizer: str | Path | PreTrainedTokenizerBase | None = None
) -> Candidate:
    """Find a model without loading it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it has no tokenizer, is not a model folder, or its config.json cannot be a model's.
    """
    if str(model) == "":
        raise ValueError("the name of the model is empty; name a folder, a Hub id or a .gguf file")
    given = _read_tokenizer(str(tokenizer)) if isinstance(tokenizer, str | Path) else copy.deepcopy(tokenizer)
    if isinstance(model, torch.nn.Module):
        if given is None:
            raise ValueError("a model in memory needs its tokenizer: evaluate(model, tokenizer, tasks=…)")
        return Candidate(getattr(model, "name_or_path", "") or type(model).__name__, model, given, None, ())
    with quiet_transformers():
        if Path(model).suffix == ".gguf":
            return _find_gguf(Path(model), given)
        folder = resolve_folder(model)
    read_config_file(folder)  # refuses a file that no config should be made of
    weights = tuple(sorted(folder.glob(WEIGHTS)))
    if not weights:
        raise FileNotFoundError(f"{folder} holds no weights ({WEIGHTS}; pickles are not read)")
    local = Path(model).is_dir()
    name = folder.resolve().name if local else str(model)
    given = given or _read_tokenizer(str(folder))
    check_tokenizer(given, name)
    return Candidate(name, folder, given, None if local else folder.name, weights)


def _read_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """
    Raises:
        ValueError: if there is none that can be read.
    """
    if Path(place).is_dir() and not any((Path(place) / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(f"{place} holds no tokenizer ({', '.join(TOKENIZER_FILES)})")
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(place)
        except Exception as error:  # of many kinds, by what is wrong with the files
            raise ValueError(f"the tokenizer of {place} cannot be loaded: {first_line(error)}") from None


def _find_gguf(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Candidate:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{path}: several processes need a model folder, not a .gguf file")
    source = open_source(path)
    tokenizer = tokenizer or source.tokenizer()
    if tokenizer is None:
        raise ValueError(f"{path} holds no tokenizer that transformers can load")
    check_tokenizer(tokenizer, path.name)
    return Candidate(path.name, path, tokenizer, None, (path,), source)


@contextlib.contextmanager
def quiet_lm_eval(*, progress: bool = True) -> Iterator[None]:
    """Keep lm-eval's warnings off the screen, and without `progress` its bars.

    What matters of the warnings is in the report; the bar of building requests has no switch of its own. Nor has git,
    which lm-eval asks for the commit of whatever folder one stands in, and which complains where there is none.
    """
    logger = logging.getLogger("lm_eval")
    before = lm_eval.evaluator.get_git_commit_hash, lm_eval.api.task.tqdm, logger.level
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    lm_eval.api.task.tqdm = partial(tqdm, disable=not progress, desc="Building requests", leave=False)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        lm_eval.evaluator.get_git_commit_hash, lm_eval.api.task.tqdm, level = before
        logger.setLevel(level)
