"""The GDA models that are exported, one for each kind that a plain decoder can express, and their expected results."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import gda

from ..support.checkpoints import load
from ..support.llamas import VOCAB_SIZE, byte_tokenizer
from ..support.tiny import relative_error, tiny_model
from .engines import Config

PROMPTS = ["The cat sat on the mat in the hall", "An owl", "After that, the other half of the animals went home"]
NUM_TOKENS = 12  # prompt and new tokens together are longer than every window
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE + 5,  # as in many models, more rows than the tokenizer has tokens
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_noise_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
}


@dataclass(frozen=True)
class Kind:
    """A kind of GDA model.

    Attributes:
        written: The model type that it is exported to.
        fields: What differs from `SHAPE`.
        dtype: The dtype of the weights. Engines compute in float32.
        tolerance: Largest relative |Δlogit|.
    """

    written: str
    fields: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5


QKV_BIASES = {"attention_bias": True, "attention_out_bias": False}
MIXED = ["full_attention", "sliding_attention"]
KINDS = {
    "as many noise heads as KV heads": Kind("llama"),
    "more noise heads than KV heads": Kind("llama", {"num_noise_heads": 4}),
    "fewer noise heads than KV heads": Kind("mistral", {"num_key_value_heads": 6}),
    "wide heads": Kind("llama", {"head_dim": 16}),
    "wide heads, as a Mistral": Kind("mistral", {"head_dim": 16}),
    "heads that do not divide hidden_size": Kind("mistral", {"num_attention_heads": 6, "head_dim": 16}),
    "llama3 RoPE scaling": Kind("llama", {"rope_parameters": LLAMA3}),
    "all biases": Kind("llama", {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}),
    "tied embeddings": Kind("llama", {"tie_word_embeddings": True}),
    "biases of q, k and v": Kind("qwen2", QKV_BIASES),
    "biases of q, k and v, wide heads": Kind("llama", {**QKV_BIASES, "head_dim": 16}),
    "biases of q, k and v, heads that do not divide hidden_size": Kind("qwen2", {**QKV_BIASES, "hidden_size": 36}),
    "norm of q and k": Kind("qwen3", {"qk_norm": True, "head_dim": 16}),
    "windows in all layers": Kind("mistral", {"sliding_window": 6}),
    "windows in some layers": Kind("qwen2", {**QKV_BIASES, "sliding_window": 6, "layer_types": MIXED}),
    "paired keys": Kind("mistral", {"kv_layout": "paired", "num_key_value_heads": 4}),
    "low-rank queries": Kind("llama", {"qk_rank": 3}),
    "masked growth": Kind("llama", {"fade": 0.4, "masked_signal_heads": 1, "masked_neurons": 5, "masked_layers": [1]}),
    "λ fading in": Kind("llama", {"fade": 0.3, "lambda_target": 0.8}),
    "bfloat16": Kind("llama", {}, torch.bfloat16, tolerance=2e-2),
}


def export_all(root: Path) -> list[Path]:
    """Save and export a model of each kind, and return the exported folders, root/KIND/exported."""
    folders = []
    for seed, (name, kind) in enumerate(KINDS.items()):
        model = tiny_model(seed=seed, **(SHAPE | kind.fields)).to(kind.dtype)
        folder = root / name
        model.save_pretrained(folder / "gda")
        byte_tokenizer().save_pretrained(folder / "gda")
        same = kind.written != "qwen2"  # transformers reads the tokenizer of a Qwen2 in its own way
        gda.export(folder / "gda", folder / "exported", format=kind.written, verify=same)
        folders.append(folder / "exported")
    return folders


def config_of(folder: Path) -> Config:
    """The fields of a folder's config.json."""
    fields: Config = json.loads((folder / "config.json").read_text())
    return fields


@torch.no_grad()
def run_transformers(folders: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Run each folder in transformers, in float32 and with a cache. The result has the form of `run_engine`'s."""
    return {folder.parent.name: continued(load(folder)) for folder in folders}


def continued(model: PreTrainedModel) -> dict[str, Any]:
    """Return the tokens generated after each prompt, and the logits of the first prompt."""
    ids = [torch.tensor([byte_tokenizer().encode(prompt)]) for prompt in PROMPTS]
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "pad_token_id": 0}
    return {
        "tokens": [model.generate(each, **settings)[0, each.shape[1] :].tolist() for each in ids],
        "logits": model(ids[0]).logits[0].tolist(),
    }


def difference(got: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest relative |Δlogit|."""
    return relative_error(torch.tensor(got["logits"]), torch.tensor(expected["logits"]))
