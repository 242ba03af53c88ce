"""Tiny models with asymmetric weights: no two rows are equal, no norm is 1, no bias is 0, and every λ matters."""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gda import GDAConfig, GDAForCausalLM

VOCAB_SIZE = 61
Model = TypeVar("Model", bound=PreTrainedModel)

LAMBDA_NAMES = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def tiny_config(**changes: Any) -> GDAConfig:
    """A config of two small layers, 3:1 over two KV heads, updated with `changes`."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_noise_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return GDAConfig(**(fields | changes))


def tiny_model(
    config: GDAConfig | None = None, attention: str = "sdpa", seed: int = 0, **changes: Any
) -> GDAForCausalLM:
    """A GDA language model with asymmetric weights, in evaluation mode, of `config` or of `tiny_config(**changes)`."""
    model = GDAForCausalLM._from_config(config or tiny_config(**changes), attn_implementation=attention)
    return make_asymmetric(model, seed)


@torch.no_grad()
def make_asymmetric(model: Model, seed: int = 0) -> Model:
    """Fill a model so that exchanging any two rows, columns, heads, layers or norms changes its outputs."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not any(lambda_name in name for lambda_name in LAMBDA_NAMES):
            parameter.copy_(_asymmetric(name, parameter, generator))
    for layer, module in enumerate(module for module in model.modules() if hasattr(module, "lambda_q1")):
        set_lambda(module, 0.3 + 0.1 * layer, generator)
    return model.eval()


def _asymmetric(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    if name.endswith(".bias"):
        return 0.3 * noise
    if name.endswith("act_fn.weight"):
        return torch.tensor([0.6, -0.4, 0.9]) + 0.1 * noise
    scale = torch.linspace(0.5, 1.5, len(parameter))
    if parameter.dim() == 1:
        return scale + 0.1 * noise
    return noise * scale.unsqueeze(-1) / math.sqrt(parameter.shape[-1])


@torch.no_grad()
def set_lambda(attention: Any, value: float, generator: torch.Generator) -> None:
    """Set the four λ vectors of a layer to different values that give λ = `value`."""
    negative = 0.2
    positive = math.log(value - attention.lambda_init + math.exp(negative))
    for index, product in (("1", positive), ("2", negative)):
        query, key = torch.randn(2, attention.head_dim, generator=generator)
        key += query * (product - query @ key) / (query @ query)
        getattr(attention, f"lambda_q{index}").copy_(query)
        getattr(attention, f"lambda_k{index}").copy_(key)


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """max |got − expected| / max |expected|; shapes must be equal."""
    assert got.shape == expected.shape
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
