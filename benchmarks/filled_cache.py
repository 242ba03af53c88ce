"""A KV cache during generation, the same in every repetition."""

from typing import Any

import torch
from measuring import device
from transformers import Cache, DynamicCache, StaticCache

CACHES = ("dynamic", "static")


class FilledCache:
    """Random keys and values of `context` tokens in every layer of a model.

    A dynamic cache, which `generate` uses by default, is copied to a longer one with every token. A static one has
    space for one more token.
    """

    def __init__(self, kind: str, config: Any, batch: int, context: int, dtype: torch.dtype):
        self.context = context
        self.cache: Cache = (
            DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=context + 1)
        )
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        for index in range(config.num_hidden_layers):
            self.cache.update(*(torch.randn(shape, device=device()).to(dtype) for _ in range(2)), index)
        self.filled = [(layer.keys, layer.values) for layer in self.cache.layers]

    def rewind(self) -> None:
        """Remove the token that was appended."""
        for layer, (keys, values) in zip(self.cache.layers, self.filled, strict=True):
            if isinstance(self.cache, StaticCache):
                layer.cumulative_length.fill_(self.context)
            else:
                layer.keys, layer.values = keys, values
