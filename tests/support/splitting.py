"""Splits of tiny models: short texts, few training steps, and helpers for checking report and result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import gda
from gda.common.text import python_documentation
from gda.conversion.split import splitter as split_module

CONTEXT = 128  # the longest sequence of the tiny models
STEPS = 4
TOKENS = 10 * CONTEXT


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few training steps, in full precision."""
    monkeypatch.setattr(split_module, "EFFORTS", {"fast": 0, "default": STEPS, "best": 2 * STEPS})
    monkeypatch.setattr(split_module, "_multiplies_bfloat16", lambda device: False)


def save_text(path: Path, characters: int = 12_000) -> Path:
    """English, as a text file."""
    path.write_text(python_documentation()[:characters], encoding="utf-8")
    return path


def split(source: Path, out: Path, **options: Any) -> Any:
    """Split a source; by default in closed form only and without verification."""
    settings = {"effort": "fast", "verify": False, "calibration_tokens": TOKENS}
    if "calibration" not in options:
        settings["calibration"] = save_text(source.parent / "text.txt")
    return gda.convert(source, out, mode="split", **(settings | options))


def windows_of(source: Path, text: Path, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Token ids (sequences, T) of a text: those that the split is fitted to, and the last tenth, held out."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids[:tokens]
    windows = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    held_out = max(1, round(len(windows) / 10))
    return windows[:-held_out], windows[-held_out:]


def order_of(layer: Any, noise_heads: int) -> list[int]:
    """Indices of the source's heads in the order of the result's rows, from the report of a layer."""
    signal = torch.tensor(layer.signal_heads).view(noise_heads, -1)
    return torch.cat([signal, torch.tensor(layer.noise_heads).unsqueeze(1)], dim=1).flatten().tolist()


@torch.no_grad()
def captured(model: Any, part: Callable[[Any], torch.nn.Module], ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Input and output of a part of each layer, (tokens, width) each."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(_module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0].flatten(0, -2), output.flatten(0, -2)))

    hooks = [part(layer).register_forward_hook(see) for layer in model.model.layers]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen
