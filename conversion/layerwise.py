"""Running a language model with one of its layers in memory."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import get_max_memory
from torch.func import functional_call
from transformers import PreTrainedConfig
from transformers.masking_utils import create_sliding_window_causal_mask

from gda.modeling_gda.attention_gda import Fade

from .llamalike import layer_windows
from .recipes import meta_model

# What a model may take of the memory that is free.
SHARE_OF_MEMORY = 1 / 4


def memory_to_use() -> float:
    """Bytes that may be filled with what could as well be read again."""
    return get_max_memory()["cpu"] * SHARE_OF_MEMORY


def layer_prefix(index: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"model.layers.{index}."


class LayerwiseModel:
    """A causal language model whose tensors are read when a layer is run, in float32, and dropped after it.

    Sequences are whole and without padding.

    Args:
        config: Its configuration.
        read: Gives the tensor of a name.
        device: Where it computes.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        read: Callable[[str], torch.Tensor],
        device: torch.device | str = "cpu",
    ):
        self.model = meta_model(config)
        self.config = self.model.config
        self.device = torch.device(device)
        self._read = read
        self._rotary = type(self.model.model.rotary_emb)(self.config).to(self.device)
        self._windows = layer_windows(self.config)
        for part in self.model.modules():
            if isinstance(part, Fade):  # no tensor of the checkpoint, but of its config
                part.value = torch.tensor(getattr(config, part.field), device=self.device)

    def of_config(self, config: PreTrainedConfig) -> "LayerwiseModel":
        """A model of another configuration, with the same tensors where it asks for them."""
        return LayerwiseModel(config, self._read, self.device)

    @property
    def num_layers(self) -> int:
        """Its layers."""
        return len(self._windows)

    def layer(self, index: int) -> Any:
        """The module of layer `index`, on the meta device: for hooks, and for its shapes."""
        return self.model.model.layers[index]

    def tensors(self, index: int, without: str | None = None) -> dict[str, torch.Tensor]:
        """The tensors of layer `index` by their names in it, but for those that begin with `without`."""
        names = [name for name in self.layer(index).state_dict() if without is None or not name.startswith(without)]
        return {name: self._tensor(layer_prefix(index) + name) for name in names}

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, T) → hidden states (B, T, hidden)."""
        # The rows that are asked for, and no copy of the others in another dtype.
        rows = torch.nn.functional.embedding(ids, self._read("model.embed_tokens.weight"))
        return rows.to(self.device, torch.float32)

    def run(self, index: int, tensors: Mapping[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        """Layer `index`, with those tensors: hidden states (B, T, hidden) → (B, T, hidden)."""
        positions = torch.arange(states.shape[1], device=states.device).unsqueeze(0)
        inputs = {
            "attention_mask": self._mask(index, states, positions),
            "position_ids": positions,
            "position_embeddings": self._rotary(states, positions),
        }
        return functional_call(self.layer(index), dict(tensors), (states,), inputs)

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The last norm and the head, as a function of hidden states (…, hidden) → logits (…, vocabulary)."""
        norm = {name: self._tensor(f"model.norm.{name}") for name in self.model.model.norm.state_dict()}
        tied = self.config.tie_word_embeddings
        weight = self._tensor("model.embed_tokens.weight" if tied else "lm_head.weight")

        def logits(states: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(functional_call(self.model.model.norm, norm, (states,)), weight)

        return logits

    def _tensor(self, name: str) -> torch.Tensor:
        return self._read(name).to(self.device, torch.float32)

    def _mask(self, index: int, states: torch.Tensor, positions: torch.Tensor) -> Any:
        """What a layer may see; None is causal, as sdpa takes it."""
        window = self._windows[index]
        if window is None or window >= states.shape[1]:
            return None
        # By position: transformers has renamed the fourth, the cache. There is none, nor is there padding.
        return create_sliding_window_causal_mask(self.config, states, None, None, positions)
