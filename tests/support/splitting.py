"""Splits of tiny models: short texts, few steps, and what the report says put together again."""

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
    """A few steps of training in full precision, and no verification of what is tested here by other means."""
    monkeypatch.setattr(split_module, "EFFORTS", {"fast": 0, "default": STEPS, "best": 2 * STEPS})
    monkeypatch.setattr(split_module, "_multiplies_bfloat16", lambda device: False)


def save_text(path: Path, characters: int = 12_000) -> Path:
    """English, as a text file."""
    path.write_text(python_documentation()[:characters], encoding="utf-8")
    return path


def split(source: Path, out: Path, **options: Any) -> Any:
    """Split by the closed form alone, without verification, unless told otherwise."""
    settings = {"effort": "fast", "verify": False, "calibration_tokens": TOKENS}
    if "calibration" not in options:
        settings["calibration"] = save_text(source.parent / "text.txt")
    return gda.convert(source, out, mode="split", **(settings | options))


def windows_of(source: Path, text: Path, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Ids (windows, T) of the text: those that are fitted to, and the tenth at the end that are not."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids[:tokens]
    windows = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    held_out = max(1, round(len(windows) / 10))
    return windows[:-held_out], windows[-held_out:]


def order_of(layer: Any, noise_heads: int) -> list[int]:
    """The source's heads in the order of the result's rows, by the report on a layer."""
    signal = torch.tensor(layer.signal_heads).view(noise_heads, -1)
    return torch.cat([signal, torch.tensor(layer.noise_heads).unsqueeze(1)], dim=1).flatten().tolist()


@torch.no_grad()
def captured(model: Any, part: Callable[[Any], torch.nn.Module], ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What goes into and comes out of a part of each layer, (tokens, width) each."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(_module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0].flatten(0, -2), output.flatten(0, -2)))

    hooks = [part(layer).register_forward_hook(see) for layer in model.model.layers]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen
