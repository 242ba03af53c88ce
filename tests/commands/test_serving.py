"""Serving: `transformers serve` with a converted model, and the requirements of vLLM and SGLang.

Neither engine is installed here (`tests/upstream/engines` runs them). A stand-in modifies a model as they do: each
layer gets the engine's attention with its own KV cache, which is called with one sequence and returns (T, H · d); norms
and linear layers are replaced by class name and plan; layers of other ranks are left out.
"""

import copy
import inspect
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.models import OptionInfo

import gda
from gda.commands.serve import options_of_transformers

from ..support.commands import Command
from ..support.llamas import save_llama
from ..support.machines import free_port
from ..support.tiny import relative_error, tiny_config, tiny_model, token_ids

SERVED: dict[str, dict[str, Any]] = {
    "3:1": {},
    "7:1, one KV head": {"num_noise_heads": 1, "num_key_value_heads": 1},
    "every head its KV head": {"num_attention_heads": 4, "num_noise_heads": 2},
    "two noise heads a KV head": {"num_attention_heads": 16, "num_noise_heads": 4},
    "sigmoid": {"lambda_type": "sigmoid"},
    "tanh, norms": {"lambda_type": "tanh", "head_norm": True, "qk_norm": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "poly_norm": {"hidden_act": "poly_norm", "head_norm": True},
    "qk_rank": {"qk_rank": 3, "attention_bias": True},
}
each_served = pytest.mark.parametrize("fields", SERVED.values(), ids=SERVED)


class EngineAttention:
    """One layer's attention in an engine: heads and widths from the config, and a KV cache."""

    def __init__(self, config: gda.GDAConfig):
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.keys, self.values = torch.empty(2, 0, self.kv_heads, self.width)
        self.calls = 0
        self.scale = 0.0

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(T, H · d), (T, G · d), (T, G · d) → (T, H · d), causal over the cache."""
        self.calls += 1
        self.keys = torch.cat((self.keys, key.view(-1, self.kv_heads, self.width)))
        self.values = torch.cat((self.values, value.view(-1, self.kv_heads, self.width)))
        query = query.view(-1, self.heads, self.width)
        repeats = self.heads // self.kv_heads
        keys, values = (held.repeat_interleave(repeats, dim=1) for held in (self.keys, self.values))
        scores = torch.einsum("thd,shd->hts", query, keys) * self.scale
        steps, seen = query.shape[0], keys.shape[0]
        hidden = torch.ones(steps, seen, dtype=torch.bool).triu(seen - steps + 1)
        maps = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hts,shd->thd", maps, values).reshape(steps, -1)


def engine_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    attention_instances: dict[int, EngineAttention] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function that an engine registers with transformers."""
    assert attention_instances is not None
    attention = attention_instances[module.layer_idx]  # type: ignore[index]
    attention.scale = float(scaling or 0)
    steps = query.shape[-2]
    return attention.forward(*(x.transpose(1, 2).reshape(steps, -1) for x in (query, key, value))), None


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the attention of an engine with transformers during a test."""
    for name in ("engine", "vllm", "sglang"):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, engine_attention)


def served(model: gda.GDAForCausalLM, ids: torch.Tensor, chunks: list[int]) -> tuple[torch.Tensor, int]:
    """Last hidden states of `ids` (T,), fed to the decoder in `chunks`, and the attention calls."""
    decoder = copy.deepcopy(model.model)
    decoder.config._attn_implementation = "engine"
    attentions = {layer: EngineAttention(decoder.config) for layer in range(decoder.config.num_hidden_layers)}
    states, begin = [], 0
    for chunk in chunks:
        positions = torch.arange(begin, begin + chunk)
        output = decoder(
            input_ids=ids[None, begin : begin + chunk],
            use_cache=False,
            position_ids=positions[None],
            attention_instances=attentions,
            return_dict=False,
        )
        states.append(output[0][0])
        begin += chunk
    return torch.cat(states), sum(attention.calls for attention in attentions.values())


@each_served
@torch.no_grad()
def test_engine_equals_transformers(fields: dict[str, Any]) -> None:
    """Prefill, a chunk and single tokens, with one attention call per layer."""
    model = tiny_model(**fields)
    ids = token_ids(12)
    states, calls = served(model, ids, [5, 4, 1, 1, 1])
    assert calls == 5 * model.config.num_hidden_layers
    assert relative_error(states, model.model(ids[None]).last_hidden_state[0]) <= 1e-5


@pytest.mark.parametrize("name", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"kv_layout": "paired", "num_key_value_heads": 4}, "paired"),
        ({"num_noise_heads": 1, "num_attention_heads": 5, "num_key_value_heads": 2}, "fewer noise heads"),
    ],
)
def test_unsupported_models_are_refused(fields: dict[str, Any], reason: str, name: str) -> None:
    """In one line when the engine loads the model."""
    config = tiny_config(**fields)
    config._attn_implementation = name
    with pytest.raises(ValueError, match=reason) as error:
        gda.GDAModel(config)
    assert "gda serve" in str(error.value)
    assert "\n" not in str(error.value)


def test_class_attributes_that_engines_check() -> None:
    assert gda.GDAForCausalLM._supports_attention_backend
    assert gda.GDAModel.is_backend_compatible()
    model = tiny_model()
    assert type(model.get_decoder()) is gda.GDAModel
    assert model.model.get_input_embeddings() is model.model.embed_tokens
    assert all(getattr(module, "is_causal", True) for module in model.modules())


def test_config_fields_that_engines_set() -> None:
    """vLLM sets `rope_theta`; transformers up to 5.20 sets the plan of a tied model."""
    config = tiny_config()
    config.rope_theta = 77.0
    assert config.rope_parameters["rope_theta"] == config.rope_theta == 77.0
    config.base_model_tp_plan = {**config.base_model_tp_plan, "embed_tokens": "embedding_rowwise"}
    assert "embed_tokens" in config.base_model_tp_plan


@each_served
@torch.no_grad()
def test_norms_can_be_replaced_by_class_name(fields: dict[str, Any]) -> None:
    """Engines replace each module whose class name ends in RMSNorm."""
    model = tiny_model(**fields)
    ids = token_ids(1, 9)
    expected = model(ids).logits
    exchanged = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                plain = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                plain.weight = child.weight
                setattr(module, name, plain)
                exchanged += 1
    assert exchanged >= 2 * model.config.num_hidden_layers + 1
    assert relative_error(model(ids).logits, expected) <= 1e-5


@each_served
def test_tensor_parallel_plan_for_engines(fields: dict[str, Any]) -> None:
    """An engine uses the first pattern that matches the start of a name, and supports few styles."""
    model = tiny_model(**fields).model
    cut = {"q_proj", "q_base", "q_down", "k_proj", "v_proj", "gate_proj", "up_proj"}
    whole = {"gate_proj", "up_proj", "down_proj"} if fields.get("hidden_act") == "poly_norm" else set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        style = next((style for pattern, style in model.tp_plan.items() if re.match(pattern, name)), None)
        last = name.rsplit(".", 1)[-1]
        assert style == (None if last in whole else "colwise" if last in cut else "rowwise"), name


class OfAnotherRank(nn.Module):
    """Replaces a layer of another rank: it returns its first argument."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """(T, H · d), (T, G · d), (T, G · d) → (T, H · d), causal over the cache."""
        return args[0] if args else next(iter(kwargs.values()))


@torch.no_grad()
def test_pipeline_plan() -> None:
    """Embeddings and the first layers on one rank, the last layers and the norm on the other."""
    model = tiny_model(num_hidden_layers=3).model
    ids = token_ids(1, 8)
    expected = model(ids).last_hidden_state
    assert list(model._pp_plan) == ["embed_tokens", "layers", "norm"]
    first, last = copy.deepcopy(model), copy.deepcopy(model)
    first.norm, first.layers[2] = OfAnotherRank(), OfAnotherRank()
    last.embed_tokens, last.layers[0], last.layers[1] = (OfAnotherRank() for _ in range(3))
    between = first(ids).last_hidden_state
    assert relative_error(last(inputs_embeds=between).last_hidden_state, expected) <= 1e-6


@pytest.mark.parametrize("what", ["nothing", "llama", "classifier"])
def test_serve_refuses_other_models_before_starting(what: str, tmp_path: Path, command: Command) -> None:
    """In one line."""
    save_llama(tmp_path / "llama")
    gda.GDAForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "classifier")
    outcome = command("serve", tmp_path / what)
    assert outcome.code == 2
    assert outcome.error.count("\n") == 1
    assert what in outcome.error


# --------------------------------------------------------------------------------------------------- transformers serve


def ask(url: str, body: dict[str, Any] | None = None) -> str:
    """The response of an HTTP server."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(answer.read().decode())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of `gda serve`, in its own process, and the folder of its model."""
    folder = tmp_path / "llama-1.0-gda"
    gda.convert(save_llama(tmp_path / "llama"), folder, verify=False)
    port = free_port()
    options = ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "gda.cli", "serve", folder, *options], stdout=out, stderr=out)
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            try:
                ask(f"http://127.0.0.1:{port}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", folder
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
@torch.no_grad()
def test_transformers_serves_a_converted_model(server: tuple[str, Path]) -> None:
    """A chat and a streamed chat over HTTP, and `transformers chat`, give what `generate` gives."""
    address, folder = server
    messages = [{"role": "user", "content": "the thing in an other"}]
    (listed,) = json.loads(ask(f"{address}/v1/models"))["data"]
    assert listed["id"] == str(folder)
    body = {"model": str(folder), "messages": messages, "max_tokens": 6, "temperature": 0}
    answer = json.loads(ask(f"{address}/v1/chat/completions", body))
    lines = ask(f"{address}/v1/chat/completions", body | {"stream": True}).splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    streamed = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    expected = tokenizer.decode(generated, skip_special_tokens=True)
    assert expected
    assert answer["choices"][0]["message"]["content"] == expected
    assert streamed == expected.rstrip("\N{REPLACEMENT CHARACTER}")  # a stream waits for the rest of a character
    assert answer["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(folder), f"{address}/v1"]
    command += ["max_new_tokens=6", "do_sample=False"]
    said = f"{messages[0]['content']}\n!exit\n"
    chat = subprocess.run(command, input=said, capture_output=True, text=True, cwd=folder.parent, timeout=120)
    assert streamed.split()[0] in chat.stdout, chat.stderr


def test_options_of_transformers_serve() -> None:
    """`gda serve` refuses others before transformers is imported, so its list must be complete."""
    serve = pytest.importorskip("transformers.cli.serve").Serve
    kinds = {each.name: each.annotation.__metadata__[0] for each in inspect.signature(serve).parameters.values()}
    options = {f"--{name.replace('_', '-')}" for name, kind in kinds.items() if isinstance(kind, OptionInfo)}
    assert options == set(options_of_transformers())
