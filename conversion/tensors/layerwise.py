"""Running a language model with one layer in memory at a time."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_sliding_window_causal_mask

from gda.conversion.families.llamalike import layer_windows
from gda.conversion.tensors.recipes import meta_model
from gda.modeling_gda.attention_gda import Fade

# How much of the memory a model, or a cache, may use.
SHARE_OF_MEMORY = 1 / 4

# Elements of a matrix that are cast at a time: 4 MB in float32.
BLOCK = 1 << 20

# The name of the cache argument in the installed transformers, from its Llama class, because ours is being verified.
CACHE_ARGUMENT = next(
    (
        name
        for name, argument in inspect.signature(LlamaForCausalLM.forward).parameters.items()
        if "Cache" in str(argument.annotation)
    ),
    "cache",
)


def free_memory(device: str = "cpu") -> int:
    """Bytes of the device's memory that are free."""
    return psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]


def total_memory(device: str = "cpu") -> int:
    """Bytes of the device's memory."""
    return psutil.virtual_memory().total if device == "cpu" else torch.cuda.mem_get_info()[1]


def memory_to_use(device: str = "cpu") -> float:
    """Bytes of the device's memory that may be used to keep what could be read or computed again."""
    return free_memory(device) * SHARE_OF_MEMORY


def layer_prefix(index: int) -> str:
    """Prefix of the names of a layer's tensors."""
    return f"model.layers.{index}."


class CastingInBlocks(TorchFunctionMode):
    """Lets linear maps have weights in another dtype than their inputs, without a copy of the weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and args[0].dtype != args[1].dtype:
            return linear_in_blocks(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def linear_in_blocks(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Inputs (…, n) times the transposed weight (m, n), whose rows are cast to the inputs' dtype block by block.

    For inference only: the memory of a cast block is used again for the next.
    """
    if weight.dtype == inputs.dtype:
        return torch.nn.functional.linear(inputs, weight, bias)
    blocks = weight.split(max(1, BLOCK // weight.shape[1]))
    cast = inputs.new_empty(blocks[0].shape)  # one for all blocks: new memory takes longer than the product
    output = torch.cat(
        [torch.nn.functional.linear(inputs, cast[: len(block)].copy_(block)) for block in blocks], dim=-1
    )
    return output if bias is None else output + bias


class LayerwiseModel:
    """A causal language model whose caller reads the tensors of a layer before running it in float32.

    `read` returns the tensor with a given name. Tensors are cast to float32 when they are read. With `narrow`, matrices
    keep their dtype, and a run casts them in blocks: it takes less memory, and less time for few positions. Sequences
    are complete and have no padding.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        read: Callable[[str], torch.Tensor],
        device: torch.device | str = "cpu",
        *,
        narrow: bool = False,
    ):
        self.model = meta_model(config).eval()  # a source may have dropout
        self.config = self.model.config
        self.device = torch.device(device)
        self._read = read
        self._narrow = narrow
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

    def tensors(self, index: int, given: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The tensors of layer `index`, by their names in it: the `given` ones, and the others as they are read."""
        here = {name: tensor.to(self.device) for name, tensor in (given or {}).items()}
        names = [name for name in self.layer(index).state_dict() if name not in here]
        linear = self._linear_weights(index) if self._narrow else ()
        return here | {name: self._tensor(layer_prefix(index) + name, narrow=name in linear) for name in names}

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
        return self._call(self.layer(index), tensors, (states,), inputs)

    def decode(
        self, index: int, tensors: Mapping[str, torch.Tensor], states: torch.Tensor, prefill: int
    ) -> torch.Tensor:
        """Run layer `index` with a cache, as `generate` does: hidden states (B, T, hidden) → (B, T, hidden).

        The first `prefill` positions are one step, and each further position is another. Only the attention takes these
        steps: the rest of the layer computes each position by itself, and runs once over all of them.
        """
        model = self._model_of_one_layer(index)
        layer = model.model.layers[0]
        mlp, layer.mlp = layer.mlp, torch.nn.Identity()
        attended = self._attended(model, _without(tensors, "mlp."), states, prefill)
        layer.mlp, layer.self_attn = mlp, _Returning(attended)
        return self._call(layer, _without(tensors, "self_attn."), (states,), {})

    def _attended(
        self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], states: torch.Tensor, prefill: int
    ) -> tuple[torch.Tensor | None, ...]:
        """What the attention of a model's one layer returns in the steps of `decode`, joined as if in one step.

        The model's own forward makes masks and positions and passes the cache to the layer.
        """
        outputs: list[tuple[torch.Tensor, ...]] = []
        attention = model.model.layers[0].self_attn
        attention.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        parameters = {f"{layer_prefix(0)}{name}": tensor for name, tensor in tensors.items()}
        inputs = {"use_cache": True, CACHE_ARGUMENT: DynamicCache(config=model.config)}
        for step in (states[:, :prefill], *states[:, prefill:].split(1, dim=1)):
            self._call(model, parameters, (), inputs | {"inputs_embeds": step})
        return torch.cat([output[0] for output in outputs], dim=1), *outputs[0][1:]

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Last norm and language-model head as a function: hidden states (…, hidden) → logits (…, vocabulary)."""
        norm = {name: self._tensor(f"model.norm.{name}") for name in self.model.model.norm.state_dict()}
        tied = self.config.tie_word_embeddings
        weight = self._tensor("model.embed_tokens.weight" if tied else "lm_head.weight", narrow=self._narrow)

        def logits(states: torch.Tensor) -> torch.Tensor:
            normed = functional_call(self.model.model.norm, norm, (states,))
            return (linear_in_blocks if self._narrow else torch.nn.functional.linear)(normed, weight)

        return logits

    def _model_of_one_layer(self, index: int) -> PreTrainedModel:
        """A model whose only layer is a copy of layer `index`."""
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

    def _linear_weights(self, index: int) -> set[str]:
        """Names of the tensors of layer `index` that are only read by a linear map."""
        parts = self.layer(index).named_modules()
        return {f"{name}.weight" for name, part in parts if isinstance(part, torch.nn.Linear)}

    def _tensor(self, name: str, *, narrow: bool = False) -> torch.Tensor:
        return self._read(name).to(self.device, None if narrow else torch.float32)

    def _call(self, module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], args: Any, inputs: Any) -> Any:
        with CastingInBlocks() if self._narrow else contextlib.nullcontext():
            return functional_call(module, dict(tensors), args, inputs)

    def _mask(self, index: int, states: torch.Tensor, positions: torch.Tensor) -> Any:
        """The attention mask of a layer. None means causal, as for sdpa."""
        window = self._windows[index]
        if window is None or window >= states.shape[1]:
            return None
        # By position, because transformers has renamed the fourth, the cache. There is no cache and no padding.
        return create_sliding_window_causal_mask(self.config, states, None, None, positions)


def _without(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


class _Returning(torch.nn.Module):
    """In the place of a module whose output is known."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output
