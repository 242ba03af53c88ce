"""The attention layers that are compared, with random weights, by name."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DiffLlamaConfig, LlamaConfig
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from gda import GDAConfig
from gda.modeling_gda.attention_gda import ATTENTION_CLASSES, GDAAttention

LLAMA, DIFFLLAMA, NAIVE = "Llama", "DiffLlama", "naive differential"


STOCK: dict[str, tuple[Any, Any]] = {
    LLAMA: (LlamaConfig, LlamaAttention),
    DIFFLLAMA: (DiffLlamaConfig, DiffLlamaAttention),
}


class NaiveDifferentialAttention(GDAAttention):
    """The formula as it is written: two softmaxes, both maps in memory, their difference times the values.

    It has the weights of a GDA layer with shared keys and values, and gives what that gives.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (self._project(name, hidden_states).transpose(1, 2) for name in "qkv")
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
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
    """The sizes of the Llama that layers are compared with."""

    heads: int
    kv_heads: int
    hidden: int = 2048
    head_dim: int = 64

    def fields(self) -> dict[str, Any]:
        return {
            "vocab_size": 128,
            "hidden_size": self.hidden,
            "intermediate_size": 4 * self.hidden,
            "num_hidden_layers": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 1 << 15,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


def gda_config(shape: Shape, noise_heads: int, **fields: Any) -> GDAConfig:
    defaults = {"num_noise_heads": noise_heads, "lambda_init": 0.1}
    return GDAConfig(**shape.fields() | defaults | fields)


def build(name: str, shape: Shape, backend: str) -> nn.Module:
    """A layer with random weights: Llama, DiffLlama, the naive one, or a GDA such as "GDA 3:1" or "GDA paired 4:1".

    "GDA expanded 4:1" has noise heads in addition to the shape's.
    """
    torch.manual_seed(0)
    if name in (LLAMA, DIFFLLAMA):
        config_class, layer_class = STOCK[name]
        config: Any = config_class(**shape.fields() | {"num_attention_heads": shape.kv_heads})
        config.num_attention_heads = shape.heads  # the config's class would want hidden to be a multiple
    elif name == NAIVE:
        config, layer_class = gda_config(shape, shape.heads // 4), NaiveDifferentialAttention
    else:
        kind, ratio = name.removeprefix("GDA ").rpartition(" ")[0], int(name.split()[-1].removesuffix(":1"))
        fields: dict[str, Any] = {}
        noise = shape.heads // (ratio + 1)
        if kind == "expanded":
            noise = shape.heads // ratio
            fields["num_attention_heads"] = shape.heads + noise
        elif kind == "paired":  # as Motif-2: a pair where Llama has one KV head, and heads are normalized
            fields = {"kv_layout": "paired", "head_norm": True, "num_key_value_heads": 2 * shape.kv_heads}
        config = gda_config(shape, noise, **fields)
        layer_class = ATTENTION_CLASSES[config.kv_layout]
    config._attn_implementation = backend
    layer = layer_class(config, 0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer.eval()
