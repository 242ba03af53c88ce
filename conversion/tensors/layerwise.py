"""Running a language model with one layer in memory at a time."""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import get_max_memory
from torch.func import functional_call
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_sliding_window_causal_mask

from gda.conversion.families.llamalike import layer_windows
from gda.conversion.tensors.recipes import meta_model
from gda.modeling_gda.attention_gda import Fade

# How much of the free memory a model may use.
SHARE_OF_MEMORY = 1 / 4

# The name of the cache argument in the installed transformers, from its Llama class, because ours is being verified.
CACHE_ARGUMENT = next(
    (
        name
        for name, argument in inspect.signature(LlamaForCausalLM.forward).parameters.items()
        if "Cache" in str(argument.annotation)
    ),
    "cache",
)


def memory_to_use(device: str = "cpu") -> float:
    """Bytes of the device's memory that may be used to keep what could be read or computed again."""
    return get_max_memory()["cpu" if device == "cpu" else torch.cuda.current_device()] * SHARE_OF_MEMORY


def layer_prefix(index: int) -> str:
    """Prefix of the names of a layer's tensors."""
    return f"model.layers.{index}."


class LayerwiseModel:
    """A causal language model whose caller reads the tensors of a layer, in float32, before running it.

    `read` returns the tensor with a given name. Sequences are complete and have no padding.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        read: Callable[[str], torch.Tensor],
        device: torch.device | str = "cpu",
    ):
        self.model = meta_model(config).eval()  # a source may have dropout
        self.config = self.model.config
        self.device = torch.device(device)
        self._read = read
        self._rotary = self._new_rotary()
        self._windows = layer_windows(self.config)
        for part in self.model.modules():
            if isinstance(part, Fade):  # its value is in the config, not in the checkpoint
                part.value = torch.tensor(config.fade, device=self.device)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self._windows)

    def layer(self, index: int) -> Any:
        """The module of layer `index`, on the meta device, for hooks and shapes."""
        return self.model.model.layers[index]

    def tensors(self, index: int, without: str | None = None) -> dict[str, torch.Tensor]:
        """The tensors of layer `index`, by their names in it, except those whose names start with `without`."""
        names = [name for name in self.layer(index).state_dict() if without is None or not name.startswith(without)]
        return {name: self._tensor(layer_prefix(index) + name) for name in names}

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, T) → hidden states (B, T, hidden)."""
        # Look the rows up before casting, so that no copy of the whole matrix is made.
        rows = torch.nn.functional.embedding(ids, self._read("model.embed_tokens.weight"))
        return rows.to(self.device, torch.float32)

    def run(self, index: int, tensors: Mapping[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        """Run layer `index` with the given tensors: hidden states (B, T, hidden) → (B, T, hidden)."""
        positions = torch.arange(states.shape[1], device=states.device).unsqueeze(0)
        inputs = {
            "attention_mask": self._mask(index, states, positions),
            "position_ids": positions,
            "position_embeddings": self._rotary(states, positions),
        }
        return functional_call(self.layer(index), dict(tensors), (states,), inputs)

    def decode(
        self, index: int, tensors: Mapping[str, torch.Tensor], states: torch.Tensor, prefill: int
    ) -> torch.Tensor:
        """Run layer `index` with a cache, as `generate` does: hidden states (B, T, hidden) → (B, T, hidden).

        The first `prefill` positions are one step, and each further position is another. The model's own forward
        makes masks and positions and passes the cache to the layer.
        """
        model = self._model_of_one_layer(index)
        parameters = {f"{layer_prefix(0)}{name}": tensor for name, tensor in tensors.items()}
        inputs = {"use_cache": True, CACHE_ARGUMENT: DynamicCache(config=model.config)}
        steps = (states[:, :prefill], *states[:, prefill:].split(1, dim=1))
        outputs = [functional_call(model, parameters, (), inputs | {"inputs_embeds": step}).logits for step in steps]
        return torch.cat(outputs, dim=1)

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Last norm and language-model head as a function: hidden states (…, hidden) → logits (…, vocabulary)."""
        norm = {name: self._tensor(f"model.norm.{name}") for name in self.model.model.norm.state_dict()}
        tied = self.config.tie_word_embeddings
        weight = self._tensor("model.embed_tokens.weight" if tied else "lm_head.weight")

        def logits(states: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(functional_call(self.model.model.norm, norm, (states,)), weight)

        return logits

    def _model_of_one_layer(self, index: int) -> PreTrainedModel:
        """A model whose only layer is layer `index`; its "logits" are hidden states."""
        model, layer = self._bare, copy.deepcopy(self.layer(index))
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = 0  # the cache of a model with one layer has one entry
        model.model.layers = torch.nn.ModuleList([layer])
        model.model.rotary_emb = self._new_rotary()  # dynamic RoPE remembers the longest sequence it has seen
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = [self.config.layer_types[index]]
        return model

    @functools.cached_property
    def _bare(self) -> PreTrainedModel:
        """The model without embeddings, norm and head. Its config is separate from that of the layers."""
        model = copy.deepcopy(self.model)
        model.config = model.model.config = copy.deepcopy(self.config)
        model.config.num_hidden_layers = 1
        model.config.return_dict, model.config.output_hidden_states = True, False
        model.model.norm, model.lm_head = torch.nn.Identity(), torch.nn.Identity()
        return model

    def _new_rotary(self) -> torch.nn.Module:
        return type(self.model.model.rotary_emb)(self.config).to(self.device)

    def _tensor(self, name: str) -> torch.Tensor:
        return self._read(name).to(self.device, torch.float32)

    def _mask(self, index: int, states: torch.Tensor, positions: torch.Tensor) -> Any:
        """The attention mask of a layer. None means causal, as for sdpa."""
        window = self._windows[index]
        if window is None or window >= states.shape[1]:
            return None
        # By position, because transformers has renamed the fourth, the cache. There is no cache and no padding.
        return create_sliding_window_causal_mask(self.config, states, None, None, positions)
