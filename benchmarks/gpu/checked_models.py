"""The models of the correctness check: configs, weights, and the weights in float64."""

from typing import Any

import torch
from kit import Row
from measuring import device
from torch import Tensor

from gda import GDAConfig, GDAForCausalLM

SHAPE: Row = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
CONFIGS: dict[str, Row] = {
    "shared 3:1": {"num_attention_heads": 8, "num_noise_heads": 2, "num_key_value_heads": 2},
    "paired 3:1, head norm": {
        "num_attention_heads": 8,
        "num_noise_heads": 2,
        "num_key_value_heads": 4,
        "kv_layout": "paired",
        "head_norm": True,
    },
    "shared 4:1, 1 noise head for 2 KV heads": {
        "num_attention_heads": 5,
        "num_noise_heads": 1,
        "num_key_value_heads": 2,
    },
    "shared 4:1, tanh λ": {
        "num_attention_heads": 10,
        "num_noise_heads": 2,
        "num_key_value_heads": 2,
        "lambda_type": "tanh",
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_model(fields: Row, folder: str) -> None:
    """Save a float32 model with asymmetric weights: rows, layers and norms all differ."""
    torch.manual_seed(0)
    model: Any = GDAForCausalLM(GDAConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if ".lambda_q" in name or ".lambda_k" in name:
                parameter.copy_(0.1 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(torch.linspace(0.7, 1.3, len(parameter)) + 0.1 * noise)
            else:
                scale = torch.linspace(0.7, 1.3, len(parameter)).unsqueeze(-1)
                parameter.copy_(scale * noise / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)


def load(folder: str, dtype: str) -> Any:
    """Load it like a user does."""
    model: Any = GDAForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation="sdpa")
    return model.to(device()).eval()


def state_of(model: Any, gradients: bool = False) -> dict[str, Tensor]:
    """The weights in float64 on the CPU."""
    return {
        name: weight.detach().cpu().double().requires_grad_(gradients) for name, weight in model.state_dict().items()
    }
