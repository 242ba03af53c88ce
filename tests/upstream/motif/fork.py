"""Motif's own code for vLLM, run without vLLM.

These files of the fork are run as they are: the model, its attention backend (order of heads, λ, subtraction, head
norm), the norms with PolyNorm, and RoPE. Stand-ins replace the rest: parallel linear layers, the paged attention of one
kernel call, the skeleton of Llama and the loading of weights. Everything else of vLLM is a mock.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FORK = Path(os.environ["GDA_MOTIF_VLLM"])


class Linear(nn.Linear):
    """A linear layer that returns its output and a bias to be added later, as vLLM's do."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


def qkv_linear(
    *, hidden_size: int, head_size: int, total_num_heads: int, total_num_kv_heads: int, bias: bool, **_: Any
) -> Linear:
    return Linear(hidden_size, head_size * (total_num_heads + 2 * total_num_kv_heads), bias=bias)


def merged_linear(*, input_size: int, output_sizes: list[int], bias: bool, **_: Any) -> Linear:
    return Linear(input_size, sum(output_sizes), bias=bias)


def row_linear(*, input_size: int, output_size: int, bias: bool, **_: Any) -> Linear:
    return Linear(input_size, output_size, bias=bias)


class CustomOp(nn.Module):
    """An operation that runs as the fork writes it in PyTorch, not as a kernel."""

    @staticmethod
    def register(name: str) -> Any:
        return lambda made: made

    def forward(self, *arguments: Any) -> Any:
        return self.forward_native(*arguments)


class AttentionMetadataBuilder:
    def __class_getitem__(cls, item: object) -> type:
        return cls


class Attention(nn.Module):
    """One sequence through the fork's backend, without a cache."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        *,
        num_kv_heads: int,
        attn_backend: Any,
        grouped_differential_attention_config: dict[str, Any],
        **_: Any,
    ):
        super().__init__()
        self.backend = STAND_INS["vllm.attention.backends.registry"]["AttentionBackendEnum"].GROUPED_DIFF_ATTN
        self.impl = attn_backend.get_impl_cls()(
            *(num_heads, head_size, scale, num_kv_heads, None, None, "auto"),
            attn_type=STAND_INS["vllm.attention.backends.abstract"]["AttentionType"].DECODER,
            grouped_differential_attention_config=grouped_differential_attention_config,
        )
        self.impl.forward_single_attention = self.attend
        self.scale = scale

    def attend(self, layer: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        """Causal attention of (T, heads, d); query head h reads KV head h // (H / G), as in FlashAttention."""
        query, key, value = (states.transpose(0, 1) for states in (query, key, value))
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return attended.transpose(0, 1).contiguous()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, output_shape: tuple[int, int]) -> Tensor:
        metadata = SimpleNamespace(num_actual_tokens=len(query))
        return self.impl.forward(self, query, key, value, torch.empty(0), metadata, torch.empty(output_shape))


class LlamaForCausalLM(nn.Module):
    """Embeddings, decoder layers that hand their residual on, a norm and a head."""

    def __init__(self, *, vllm_config: Any, prefix: str, layer_type: Any):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            layer_type(vllm_config=vllm_config, prefix=f"model.layers.{layer}")
            for layer in range(config.num_hidden_layers)
        )
        norm = sys.modules["vllm.model_executor.layers.layernorm"].RMSNorm
        self.norm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (T, vocabulary) of the tokens (T,) of one sequence."""
        hidden, residual = self.embed_tokens(ids), None
        for layer in self.layers:
            hidden, residual = layer(torch.arange(len(ids)), hidden, residual)
        return self.lm_head(self.norm(hidden, residual)[0])


PLATFORM = SimpleNamespace(is_cuda=lambda: False, is_rocm=lambda: False, is_cpu=lambda: True)
# By module, what takes the place of what vLLM defines there.
STAND_INS: dict[str, dict[str, Any]] = {
    "vllm.attention.backends.abstract": {
        "AttentionBackend": object,
        "AttentionImpl": object,
        "AttentionType": SimpleNamespace(DECODER="decoder", ENCODER_ONLY="encoder_only"),
        "is_quantized_kv_cache": lambda dtype: False,
    },
    "vllm.attention.backends.registry": {"AttentionBackendEnum": SimpleNamespace(GROUPED_DIFF_ATTN="grouped")},
    "vllm.attention.layer": {"Attention": Attention},
    "vllm.distributed": {"get_tensor_model_parallel_world_size": lambda: 1},
    "vllm.model_executor.custom_op": {"CustomOp": CustomOp},
    "vllm.model_executor.layers.linear": {
        "MergedColumnParallelLinear": merged_linear,
        "QKVParallelLinear": qkv_linear,
        "RowParallelLinear": row_linear,
    },
    "vllm.model_executor.models.llama": {"LlamaForCausalLM": LlamaForCausalLM},
    "vllm.model_executor.models.utils": {"extract_layer_index": lambda prefix: int(prefix.split(".")[2])},
    "vllm.platforms": {"current_platform": PLATFORM},
    "vllm.v1.attention.backends.utils": {"AttentionMetadataBuilder": AttentionMetadataBuilder},
}


class Module(ModuleType):
    """A module of vLLM in which every name that has no stand-in is a mock."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return STAND_INS.get(self.__name__, {}).get(name) or MagicMock(name=f"{self.__name__}.{name}")


class Finder(MetaPathFinder, Loader):
    """Finds the modules of vLLM: files of the fork where there are any, otherwise stand-ins."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.split(".")[0] != "vllm":
            return None
        file = FORK.joinpath(*name.split("."))
        if file.with_suffix(".py").is_file():
            return spec_from_file_location(name, file.with_suffix(".py"))
        if (file / "__init__.py").is_file():
            return spec_from_file_location(name, file / "__init__.py", submodule_search_locations=[str(file)])
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint with q, k, v and gate, up joined, as vLLM's loader does."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    for whole, parts in {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.items():
        for name in [name for name in tensors if f".{parts[0]}." in name]:
            taken = [tensors.pop(name.replace(parts[0], part)) for part in parts]
            tensors[name.replace(parts[0], whole)] = torch.cat(taken)
    return tensors


def load_fork(fields: dict[str, Any], state: dict[str, Tensor], lambda_inits: list[float] | None = None) -> nn.Module:
    """Motif's model with these fields of config.json and tensors; by default with λ_init by its own schedule."""
    # vLLM completes a config before a model reads it; `get_rope` wants a rope_type.
    config = SimpleNamespace(**fields | {"rope_scaling": fields["rope_scaling"] or {"rope_type": "default"}})
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=config), cache_config=None, quant_config=None)
    motif = sys.modules.get("vllm.model_executor.models.motif") or import_motif()
    model = motif.MotifForCausalLM(vllm_config=vllm_config).eval()
    tensors = fused(state)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    model.load_state_dict(tensors)
    for layer, value in zip(model.layers, lambda_inits or (), strict=bool(lambda_inits)):
        layer.self_attn.attn.impl.grouped_differential_attention_config["lambda_init"] = value
    return model


def import_motif() -> ModuleType:
    """Import the fork's model. Only this module sees the stand-ins."""
    sys.meta_path.insert(0, Finder())
    try:
        return __import__("vllm.model_executor.models.motif", fromlist=["MotifForCausalLM"])
    finally:
        sys.meta_path.pop(0)


@torch.no_grad()
def fork_logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits (B, T, vocabulary) that Motif's code computes with the checkpoint in a folder."""
    fields = json.loads((folder / "config.json").read_text())
    model = load_fork(fields, load_file(folder / "model.safetensors"))
    return torch.stack([model(row) for row in ids])
