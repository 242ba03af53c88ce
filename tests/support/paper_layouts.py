"""Conversions to the layouts of the GDA paper, and how exact they are: each layout and λ, from each kind of source."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import gda

from .checkpoints import load, logits
from .gguf_files import SHAPE, write_gguf
from .llama_like import save_source, some_ids
from .llamas import llama_model, save_llama
from .tiny import relative_error

LAYOUTS: dict[str, dict[str, Any]] = {
    "paired": {"kv_layout": "paired"},
    "head norm": {"head_norm": True},
    "both": {"kv_layout": "paired", "head_norm": True},
    "neither": {},
}
LAMBDAS: dict[str, dict[str, Any]] = {
    "reparameterized": {},
    "schedule": {"lambda_init": "schedule"},
    "tanh": {"lambda_type": "tanh"},
    "sigmoid": {"lambda_type": "sigmoid"},
}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


SOURCES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: save_llama(folder / "source", attention_bias=True),
    "mistral": lambda folder: save_source(folder / "source", "mistral", sliding_window=6),
    "qwen2": lambda folder: save_source(folder / "source", "qwen2"),
    "qwen3": lambda folder: save_source(folder / "source", "qwen3", head_dim=8),
    "gguf": lambda folder: write_gguf(_made(folder) / "source.gguf", llama_model(**SHAPE)),
}


@dataclass(frozen=True)
class Exactness:
    """Relative |Δlogit| of a conversion.

    Attributes:
        start: Of the result from its source.
        end: Of the result at a fade of 1 from the same weights loaded without the fields of fading in.
        change: Of the result at a fade of 1 from its source; None if nothing is faded in.
    """

    start: float
    end: float
    change: float | None


def is_faded(options: dict[str, Any]) -> bool:
    """Whether a conversion with these options fades something in."""
    return "head_norm" in options or "lambda_init" in options or options.get("lambda_type") == "sigmoid"


def measure(source: Path, folder: Path, options: dict[str, Any]) -> Exactness:
    """Convert a source with these options into `folder`, and run the result at both ends of its fade."""
    report = gda.convert(source, folder / "gda", **options)
    assert report.verification is not None
    assert report.verification.greedy_match == 1
    place = {"gguf_file": source.name} if source.suffix == ".gguf" else {}
    original = AutoModelForCausalLM.from_pretrained(
        source.parent if place else source, dtype=torch.float32, **place
    ).eval()
    model, ids = load(folder / "gda"), some_ids()
    wanted = logits(original, ids)
    start, change = relative_error(logits(model, ids), wanted), None
    if is_faded(options):
        model.set_fade(1.0)
        change = relative_error(logits(model, ids), wanted)
    model.save_pretrained(folder / "end")
    plain = load(folder / "end")
    assert plain.config.fade is None
    return Exactness(start, relative_error(logits(model, ids), logits(plain, ids)), change)
