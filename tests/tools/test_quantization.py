"""Quantized on a CPU by torchao and bitsandbytes: projections only; the result is saved, loaded and generates."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ..support.tiny import tiny_config, tiny_model

# The input of each projection is a multiple of 64: bitsandbytes 0.50 fails on other 4-bit models on a CPU, Llamas too.
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 8, "num_noise_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "head norm": {"head_norm": True},
    "tanh": {"lambda_type": "tanh"},
    "paired": {"kv_layout": "paired", "num_key_value_heads": 4},
}


def torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes(bits: int) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4")


# What each needs, how it is asked for, and the largest error of the logits, relative to their norm.
METHODS: dict[str, tuple[str, Callable[[], Any], float]] = {
    "torchao int8": ("torchao", torchao_int8, 0.1),
    "bitsandbytes 8-bit": ("bitsandbytes", lambda: bitsandbytes(8), 0.1),
    "bitsandbytes 4-bit": ("bitsandbytes", lambda: bitsandbytes(4), 0.6),
}


def is_quantized(weight: torch.Tensor) -> bool:
    return type(weight) is not nn.Parameter


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_quantized_model(method: str, name: str, tmp_path: Path) -> None:
    package, config, limit = METHODS[method]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    plain = tiny_model(tiny_config(**SHAPE | MODELS[name]))
    plain.save_pretrained(tmp_path / "plain")
    ids = torch.arange(3, 40)[None]
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config(), dtype=torch.float32
    )
    for key, weight in quantized.named_parameters():
        is_projection = key.endswith("_proj.weight") and "lambda" not in key
        assert is_quantized(weight) == is_projection, key
        if not is_projection:
            assert weight.dtype == torch.float32, key
            assert torch.equal(weight, plain.get_parameter(key)), key
    with torch.no_grad():
        quantized.save_pretrained(tmp_path / "quantized")  # bitsandbytes repacks 4-bit weights when they are first used
        wanted, found = plain(ids).logits, quantized(ids).logits
        assert 0 < (found - wanted).norm() / wanted.norm() < limit
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
        assert torch.equal(again(ids).logits, found)
        texts = [model.generate(ids, max_new_tokens=5, do_sample=False) for model in (quantized, again)]
    assert torch.equal(*texts)
