"""The models that are compared, by name: configs, attention layers and whole models with random weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from gda import GDAConfig, GDAForCausalLM
from gda.modeling_gda.attention_gda import ATTENTION_CLASSES, CACHE_ARGUMENT, GDAAttention

LLAMA, DIFFLLAMA, NAIVE = "Llama", "DiffLlama", "naive differential"


class NaiveDifferentialAttention(GDAAttention):
    """The formula written out: two softmaxes, both maps in memory, and their difference times the values.

    It has the weights and the output of a GDA layer with shared keys and values.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (
            getattr(self, f"{name}_proj")(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name in "qkv"
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if (cache := others.get(CACHE_ARGUMENT)) is not None:
            key, value = cache.update(key, value, self.layer_idx)
        per_noise = self.num_signal_per_noise
        signal_query, noise_query = query.unflatten(1, (-1, per_noise + 1)).split([per_noise, 1], dim=2)
        maps = [
            self.softmax(each.flatten(1, 2), key, attention_mask) for each in (signal_query, noise_query)
        ]  # (B, S, T, T_kv), (B, N, T, T_kv)
        noise = maps[1].repeat_interleave(per_noise, dim=1)
        difference = maps[0] - self.compute_lambda(hidden_states).to(noise.dtype) * noise
        repeated = value.repeat_interleave(difference.shape[1] // value.shape[1], dim=1)
        return self.o_proj((difference @ repeated).transpose(1, 2).flatten(2)), None

    def softmax(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT * self.head_dim**-0.5
        length, kv_length = scores.shape[-2:]
        if mask is None and length > 1:
            mask = torch.ones(length, kv_length, dtype=torch.bool, device=query.device).tril(kv_length - length)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)


@dataclass(frozen=True)
class Shape:
    """The sizes of the Llama that others are compared with."""

    heads: int
    kv_heads: int
    hidden: int = 2048
    head_dim: int = 64
    mlp: int = 8192
    layers: int = 1
    vocabulary: int = 128


def fields_of(shape: Shape) -> dict[str, Any]:
    """Fields of a config that all models of a shape share."""
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 1 << 16,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def config_of(name: str, shape: Shape, backend: str) -> Any:
    """The config of a Llama, a DiffLlama, the naive layer or a GDA such as "GDA 3:1".

    One in (ratio + 1) heads is a noise head: of the Llama's heads, or added to them in "GDA expanded 4:1". "GDA paired
    4:1" is like Motif-2: it has a pair of KV heads for each KV head of the Llama, and a head norm.
    """
    fields = fields_of(shape)
    if name in (LLAMA, DIFFLLAMA):
        config_class: Any = {LLAMA: LlamaConfig, DIFFLLAMA: DiffLlamaConfig}[name]
        config = config_class(**fields, num_attention_heads=shape.kv_heads)
        config.num_attention_heads = shape.heads  # with head_dim given the class need not want a divisor of hidden
    else:
        ratio = 3 if name == NAIVE else int(name.split()[-1].removesuffix(":1"))
        fields |= {"num_attention_heads": shape.heads, "num_noise_heads": shape.heads // (ratio + 1)}
        if "expanded" in name:
            noise = shape.heads // ratio
            fields |= {"num_attention_heads": shape.heads + noise, "num_noise_heads": noise}
        elif "paired" in name:
            fields |= {"kv_layout": "paired", "head_norm": True, "num_key_value_heads": 2 * shape.kv_heads}
        config = GDAConfig(**fields, lambda_init=0.1)
    config._attn_implementation = backend
    return config


def build_layer(name: str, shape: Shape, backend: str) -> nn.Module:
    """An attention layer with random weights."""
    config = config_of(name, shape, backend)
    stock = {LLAMA: LlamaAttention, DIFFLLAMA: DiffLlamaAttention, NAIVE: NaiveDifferentialAttention}
    layer_class = stock.get(name) or ATTENTION_CLASSES[config.kv_layout]
    torch.manual_seed(0)
    layer: nn.Module = layer_class(config, 0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer.eval()


def build_model(name: str, shape: Shape, backend: str) -> Any:
    """A language model with random weights."""
    model_class: Any = {LLAMA: LlamaForCausalLM, DIFFLLAMA: DiffLlamaForCausalLM}.get(name, GDAForCausalLM)
    torch.manual_seed(0)
    return model_class._from_config(config_of(name, shape, backend), attn_implementation=backend)
