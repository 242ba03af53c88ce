"""The newest vLLM builds, rewrites and loads GDA models with its transformers backend, without a GPU.

Its fusers read the source of each layer and replace the modules that they recognize by fused layers. Only its attention
kernel is replaced here, by PyTorch's attention over the heads, scale and window that vLLM set.

`run.py` unpacks vLLM's wheel, saves the models and runs this file.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GDA, REFUSED, STOCK
from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model

MODELS = Path(os.environ["GDA_ENGINE_MODELS"])
Record = Callable[[str, object], None]

# vLLM's fusers that apply, for models that differ from the default.
ATTENTION, MLP = ["QKVFuser", "AttentionFuser"], ["GLUFuser"]
OTHERWISE = {
    ("poly-norm", "mlp"): ["MergedColumnParallelFuser"],  # its activation has no kernel, so only gate and up are merged
    ("qk-rank", "self_attn"): ["AttentionFuser"],  # the queries are not a single projection
}
OURS = {"GDAModel", "GDADecoderLayer", "GDAAttention", "Subtraction"}  # modules that vLLM does not replace
OURS_TOO = {
    "head-norm": {"GDARMSNormOfHead"},
    "sigmoid": {"LambdaProjection"},
    "tanh-and-norms": {"GDARMSNormOfHead", "LambdaProjection"},
    "poly-norm": {"GDARMSNormOfHead", "PolyNorm"},
    "qk-rank": {"HeadwiseUp"},
}


def attend(self: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    """Causal attention over one sequence, as vLLM's kernel: (T, H · d), (T, G · d), (T, G · d) → (T, H · d)."""
    length = query.shape[0]
    shapes = ((query, self.num_heads), (key, self.num_kv_heads), (value, self.num_kv_heads))
    heads = [states.view(1, length, number, self.head_size).transpose(1, 2) for states, number in shapes]
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    seen = (distance >= 0) & (distance < (self.sliding_window or length))
    output = torch.nn.functional.scaled_dot_product_attention(
        *heads, attn_mask=seen, scale=self.impl.scale, enable_gqa=True
    )
    return output[0].transpose(0, 1).flatten(1)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "forward", attend)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # there is no accelerator


def build(folder: Path, dtype: str = "float32") -> tuple[VllmConfig, Any]:
    """Return vLLM's settings and its model for a folder, with the weights loaded."""
    model_config = ModelConfig(
        str(folder),
        model_impl="transformers",
        trust_remote_code=True,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=64,
        enforce_eager=True,
    )
    config = VllmConfig(model_config=model_config, device_config=DeviceConfig(device="cpu"), load_config=LoadConfig())
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/meeting", 0, backend="gloo")
            ensure_model_parallel_initialized(1, 1)
        return config, get_model(vllm_config=config)


def recognized(model: Any, layer: int) -> dict[str, list[str]]:
    """The fusers that vLLM applied in a layer, by module."""
    prefix = f"model.layers.{layer}."
    names = {name.removeprefix(prefix): fusers for name, fusers in model.fusers.items() if name.startswith(prefix)}
    return {name: [type(fuser).__name__ for fuser in fusers] for name, fusers in names.items()}


@pytest.mark.parametrize("name", [*STOCK, *GDA])
@torch.no_grad()
def test_recognizes_loads_and_computes(name: str, record_property: Record) -> None:
    config, model = build(MODELS / name)
    for layer in range(config.model_config.hf_config.num_hidden_layers):
        found = recognized(model, layer)
        assert found["self_attn"] == OTHERWISE.get((name, "self_attn"), ATTENTION)
        assert found["mlp"] == OTHERWISE.get((name, "mlp"), MLP)
        assert found["input_layernorm"] == found["post_attention_layernorm"] == ["RMSNormFuser"]
    own = {type(module).__name__ for module in model.modules() if type(module).__module__.startswith("transformers_")}
    assert own == (set() if name in STOCK else OURS | OURS_TOO.get(name, set()))

    expected = json.loads((MODELS / name / "expected.json").read_text())
    ids, logits = torch.tensor(expected["prompts"][0]), torch.tensor(expected["logits"])
    with set_current_vllm_config(config), set_forward_context(None, config):
        got = model.compute_logits(model(ids, torch.arange(len(ids))))
    error = ((got - logits).abs().max() / logits.abs().max()).item()
    assert error <= 1e-5
    fusers = " + ".join(found["self_attn"] + found["mlp"]).replace("Fuser", "")
    record_property("row", f"{name} | {fusers}; loads; logits within {error:.0e} of transformers'")


@pytest.mark.parametrize("name", ["shared", "sigmoid"])
def test_keeps_lambda_in_float32(name: str, record_property: Record) -> None:
    """In a bfloat16 model, as in transformers."""
    _, model = build(MODELS / name, dtype="bfloat16")
    lambdas = {name: parameter.dtype for name, parameter in model.named_parameters() if "lambda_" in name}
    assert lambdas
    assert set(lambdas.values()) == {torch.float32}
    assert model.model.layers[0].self_attn.qkv_proj.weight.dtype == torch.bfloat16
    record_property("row", f"{name}, bfloat16 | loads; λ stays in float32")


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_models_are_refused_when_they_load(name: str, record_property: Record) -> None:
    with pytest.raises(ValueError, match="serve it with transformers") as error:
        build(MODELS / name)
    assert "\n" not in str(error.value)
    record_property("row", f"{name} | refused: {error.value}")
