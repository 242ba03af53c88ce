"""GGUF files of tiny models, as llama.cpp's converter writes them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .llamas import MERGES, SPECIAL_TOKENS, VOCAB_SIZE, byte_tokenizer

# llama.cpp's names for the parts of a Llama, and of the models like it.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Q8_0 packs 32 values of a row: every row is a multiple of 32 long.
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def gguf_name(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` → `blk.0.attn_q.weight`."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers.", "blk.")


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k in llama.cpp's order: the two halves of a head that RoPE pairs are interleaved."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def llama3_factors(base: float, width: int, scaling: dict[str, Any]) -> Tensor:
    """`rope_freqs.weight` as llama.cpp's converter computes it in `LlamaModel.generate_extra_tensors`.

    Each frequency of a head of `width` is divided by its factor.
    """
    factor, low, high = (scaling[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    length, factors = scaling["original_max_position_embeddings"], []
    for frequency in 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)):
        wavelength = 2 * math.pi / frequency
        smooth = (length / wavelength - low) / (high - low)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    quantization: Any = None,
    architecture: str = "llama",
    tokenizer: bool = True,
    extra_tensors: dict[str, Tensor] | None = None,
    metadata: dict[str, Any] | None = None,
    max_tensors: int = 0,
) -> Path:
    """Write `model` as llama.cpp's converter does: matrices in `quantization` (None: float32), vectors in float32.

    With `max_tensors`, the model is split into files of so many tensors. The first file is returned.
    """
    gguf = pytest.importorskip("gguf")
    config = model.config
    head_dim = model.get_submodule("model.layers.0.self_attn").head_dim
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=max_tensors)
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        vocabulary = byte_tokenizer().get_vocab()
        writer.add_tokenizer_model("gpt2")
        if "tokenizer.ggml.pre" not in (metadata or {}):
            writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
        writer.add_token_types([3] * len(SPECIAL_TOKENS) + [1] * (VOCAB_SIZE - len(SPECIAL_TOKENS)))
        writer.add_token_merges([" ".join(pair) for pair in MERGES])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_unk_token_id(2)
        writer.add_chat_template("{{ messages[0].content }}")
    for key, value in (metadata or {}).items():
        add = {
            str: writer.add_string,
            bool: writer.add_bool,
            float: writer.add_float32,
            int: writer.add_uint32,
        }[type(value)]
        add(key, value)
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    tensors = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float()
        for part, number in heads.items():
            weight = permuted(weight, number) if part in name and architecture == "llama" else weight
        tensors[gguf_name(name)] = weight
    for name, tensor in (tensors | (extra_tensors or {})).items():
        data = tensor.contiguous().numpy()
        if quantization is not None and data.ndim == 2:
            packed = gguf.quants.quantize(data, quantization)
            writer.add_tensor(name, packed, raw_dtype=quantization)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"), default=path)
