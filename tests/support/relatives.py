"""Tiny checkpoints of differential models, Motif and DiffLlama, as their own code saves them."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

from .llamas import VOCAB_SIZE, byte_tokenizer
from .tiny import make_asymmetric

MOTIF_CONFIG: dict[str, Any] = {
    "architectures": ["MotifForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_motif.MotifConfig", "AutoModelForCausalLM": "modeling_motif.Motif"},
    "model_type": "Motif",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 10,
    "num_noise_heads": 2,
    "num_key_value_heads": 4,
    "k_ratio": 1,
    "head_dim": 8,
    "hidden_act": "poly_norm",
    "max_position_embeddings": 128,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "attn_rms_norm_eps": 2e-5,
    "use_bias": False,
    "use_cache": True,
    "attention_dropout": 0.0,
    "rope_theta": 100.0,
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def motif_config(**changes: Any) -> dict[str, Any]:
    """The config.json of a tiny Motif-2, 4:1, updated with `changes`; a value of `...` removes a field."""
    return {name: value for name, value in (MOTIF_CONFIG | changes).items() if value is not ...}


def motif_shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Motif's tensors, derived from its config as in its code."""
    hidden, inner = fields["hidden_size"], fields["intermediate_size"]
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    width = fields.get("head_dim") or hidden // heads
    noise = fields.get("num_noise_heads") or heads // 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (fields["vocab_size"], hidden)}
    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        linear = {
            "self_attn.q_proj": (heads * width, hidden),
            "self_attn.k_proj": (kv_heads * width, hidden),
            "self_attn.v_proj": (kv_heads * width, hidden),
            "self_attn.o_proj": (hidden, 2 * (heads - noise) * width),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        for name, shape in linear.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if _has_bias(fields, name):
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        shapes |= {f"{prefix}self_attn.lambda_{name}": (width,) for name in ("q1", "k1", "q2", "k2")}
        shapes[f"{prefix}self_attn.subln.weight"] = (2 * width,)
        if fields["hidden_act"] == "poly_norm":
            shapes |= {f"{prefix}mlp.act_fn.weight": (3,), f"{prefix}mlp.act_fn.bias": (1,)}
        shapes |= {f"{prefix}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (hidden,)
    if not fields.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (fields["vocab_size"], hidden)
    return shapes


def _has_bias(fields: dict[str, Any], name: str) -> bool:
    """Whether a linear layer has a bias, as Motif's code for vLLM reads its config."""
    if name.startswith("mlp."):
        return bool(fields.get("use_bias"))
    in_attention = bool(fields.get("attention_bias") or fields.get("use_bias"))
    qkv_bias = fields.get("qkv_bias")
    return in_attention if qkv_bias is None or name.endswith("o_proj") else qkv_bias


def random_state(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random weights in which no two rows are equal: each row has its own scale, and each λ a moderate value."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "lambda" in name:
            tensor = noise * (0.3 if len(shape) == 1 else 0.5 / math.sqrt(shape[-1]))
        elif name.endswith(".bias"):
            tensor = 0.3 * noise
        elif len(shape) == 1:
            tensor = torch.linspace(0.5, 1.5, shape[0]) + 0.1 * noise
        else:
            tensor = noise * torch.linspace(0.5, 1.5, shape[0]).unsqueeze(-1) / math.sqrt(shape[-1])
        state[name] = tensor.to(dtype)
    return state


def save_motif(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny Motif to `folder`: config.json, and weights in one file."""
    fields = motif_config(torch_dtype=str(dtype).removeprefix("torch."), **changes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    save_file(random_state(motif_shapes(fields), dtype, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_diffllama(
    folder: Path, *, dtype: torch.dtype = torch.float32, tokenizer: bool = False, seed: int = 0, **changes: Any
) -> Path:
    """Save a tiny DiffLlama to `folder` with transformers; each layer has its own non-zero λ."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "rms_norm_eps": 3e-6,
    }
    config = DiffLlamaConfig(**(fields | changes))
    make_asymmetric(DiffLlamaForCausalLM(config), seed).to(dtype).save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder
