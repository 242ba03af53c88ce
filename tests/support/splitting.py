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
from gda.conversion.split import calibration
from gda.conversion.split import splitter as split_module
from gda.conversion.split.rows import SHORT

CONTEXT = 128  # the longest sequence of the tiny models
STEPS = 4
HELD_OUT = 2  # sequences of each text
TOKENS = 10 * CONTEXT


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few training steps, in full precision."""
    monkeypatch.setattr(split_module, "EFFORTS", {"fast": 0, "default": STEPS})
    monkeypatch.setattr(split_module, "_multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr(calibration, "HELD_OUT_TOKENS", HELD_OUT * CONTEXT)


def save_text(path: Path, characters: int = 12_000) -> Path:
    """English, as a text file."""
    path.write_text(python_documentation()[:characters], encoding="utf-8")
    return path


def split(source: Path, out: Path, **options: Any) -> Any:
    """Split a source; by default on a text alone, in closed form and without verification."""
    settings = {"effort": "fast", "verify": False, "calibration_tokens": TOKENS}
    if "calibration" not in options:
        settings["calibration"] = (str(save_text(source.parent / "text.txt")), "sampled:0")
    return gda.convert(source, out, mode="split", **(settings | options))


def windows_of(source: Path, text: Path, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Token ids (sequences, T) of a text: those that the split is fitted to, in random order, and those held out."""
    windows = _windows(source, text.read_text(encoding="utf-8"))
    fitted = min(tokens // CONTEXT, len(windows) - HELD_OUT)
    order = torch.randperm(fitted, generator=torch.Generator().manual_seed(0))
    return windows[order], windows[fitted : fitted + HELD_OUT]


def short_and_whole(source: Path, windows: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences (sequences, T) that windows in this order are read as: every fourth is cut into short ones."""
    short = windows[3::4].reshape(-1, SHORT)
    short[1::2, 0] = AutoTokenizer.from_pretrained(source).bos_token_id
    return short, torch.stack([each for index, each in enumerate(windows) if index % 4 != 3])


def measured_windows(source: Path, text: Path) -> Tensor:
    """Token ids (sequences, T) that a split is measured on: held out from its text, and Python's documentation."""
    return torch.cat([windows_of(source, text)[1], _windows(source, python_documentation())[[0, -1]]])


def _windows(source: Path, text: str) -> Tensor:
    """Every other one begins with BOS, in the place of a token, since the tokenizer has it and does not add it."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    windows = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    windows[1::2, 0] = tokenizer.bos_token_id
    return windows


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
