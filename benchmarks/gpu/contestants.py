"""The models of the speed comparison: Llama, GDA and DiffLlama of one shape, with their FLOPs and bytes."""

from typing import Any

import torch
from layers import DIFFLLAMA, LLAMA, Shape, fields_of
from measuring import device
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations import sdpa_attention
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gda import GDAConfig, GDAForCausalLM

SHARED, TANH, PAIRED = "GDA 4:1 shared", "GDA 4:1 shared, tanh λ", "GDA 4:1 paired, head norm"
NAMES = (LLAMA, SHARED, TANH, PAIRED, DIFFLLAMA)


def packed_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """sdpa that reads keys and values once in a decode step with a mask, as GDA and later releases of transformers do.

    Earlier releases copy them for each query head, which would make the Llama several times slower.
    """
    if query.shape[2] != 1 or mask is None:
        return sdpa_attention.sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    batch, heads, _, width = query.shape
    packed = query.reshape(batch, key.shape[1], -1, width)
    out = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=kwargs.get("scaling"))
    return out.reshape(batch, heads, 1, width).transpose(1, 2).contiguous(), None


# The implementation of the Llama's decode steps with a static cache.
DECODING = "sdpa" if hasattr(sdpa_attention, "pack_gqa") else "sdpa_packed"
AttentionInterface.register("sdpa_packed", packed_sdpa)
AttentionMaskInterface.register("sdpa_packed", sdpa_mask)


LAYER = Shape(heads=32, kv_heads=8, head_dim=128, hidden=4096, mlp=64, layers=1, vocabulary=64)  # Llama-3-8B
MODEL = Shape(heads=32, kv_heads=8, head_dim=64, hidden=2048, mlp=8192, layers=16, vocabulary=128256)  # Llama-3.2-1B


def heads_of(name: str, shape: Shape) -> tuple[int, int]:
    """Signal and noise heads.

    Shared: all heads of the Llama stay signal heads, and one noise head is added for every four of them. Paired: values
    are twice as wide, so half as many signal heads give an o_proj and a KV cache of the Llama's size.
    """
    signal = shape.heads // 2 if name == PAIRED else shape.heads
    return signal, signal // 4


def config_of(name: str, shape: Shape) -> Any:
    fields = fields_of(shape)
    if name in (LLAMA, DIFFLLAMA):
        config_class: Any = LlamaConfig if name == LLAMA else DiffLlamaConfig
        return config_class(**fields, num_attention_heads=shape.heads)
    signal, noise = heads_of(name, shape)
    fields |= {"num_attention_heads": signal + noise, "num_noise_heads": noise}
    if name == TANH:
        fields["lambda_type"] = "tanh"
    if name == PAIRED:
        fields |= {"kv_layout": "paired", "head_norm": True}
    return GDAConfig(**fields)


def build(name: str, shape: Shape) -> Any:
    """A bfloat16 model with random weights, made on the device."""
    model_class: Any = {LLAMA: LlamaForCausalLM, DIFFLLAMA: DiffLlamaForCausalLM}.get(name, GDAForCausalLM)
    torch.manual_seed(0)
    with torch.device(device()):
        model = model_class._from_config(config_of(name, shape), attn_implementation="sdpa", dtype=torch.bfloat16)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------ counting


def forward_flops(name: str, module: nn.Module, shape: Shape, tokens: int, with_head: bool) -> float:
    """FLOPs of the matrix products of a layer or a model: projections, and the causal half of the attention.

    Every map is counted once and multiplied once with its values, as in the equations. A prefill needs the language-
    model head for one token only, which is not counted; training needs it for all.
    """
    linear = sum(
        each.in_features * each.out_features
        for part, each in module.named_modules()
        if isinstance(each, nn.Linear) and (with_head or "lm_head" not in part)
    )
    if name == TANH:
        linear += shape.layers * shape.hidden * heads_of(name, shape)[0]  # W_λ
    if name == LLAMA:
        widths = shape.heads * 2
    elif name == DIFFLLAMA:
        widths = shape.heads * 3  # half of the heads are noise; values are twice as wide
    else:
        widths = sum(heads_of(name, shape)) * (3 if name == PAIRED else 2)
    attention = shape.layers * widths * shape.head_dim * tokens / 2
    return 2 * tokens * (linear + attention)


def decode_bytes(module: nn.Module, shape: Shape, context: int, batch: int, passes: int) -> float:
    """Bytes of weights, read once, and of keys and values. Embeddings count once, as the tied head.

    `passes` over keys and values: one with a static cache; three with a dynamic one, which is copied and then read.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    return weights + passes * 4 * shape.layers * shape.kv_heads * shape.head_dim * context * batch
