"""Tiny checkpoints of model types close to Llama: Mistral, Qwen2 and Qwen3."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .llamas import VOCAB_SIZE, byte_tokenizer
from .tiny import make_asymmetric

LENGTH = 40  # of the sequences: longer than the sliding windows of the tests
CLASSES: dict[str, tuple[type, type]] = {
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "rms_norm_eps": 3e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def source_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A small model of this type in which all rows, norms and biases differ."""
    config_class, model_class = CLASSES[model_type]
    return make_asymmetric(model_class(config_class(**(SHAPE | changes))), seed)


def save_source(
    folder: Path,
    model_type: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    tokenizer: bool = True,
    **changes: Any,
) -> Path:
    """Save `source_model` with transformers' `save_pretrained`, and a tokenizer beside it if `tokenizer`."""
    model = source_model(model_type, **changes).to(dtype)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def some_ids(batch: int = 2, length: int = LENGTH) -> Tensor:
    """Random token ids (batch, length) without BOS and EOS."""
    return torch.randint(2, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(0))
