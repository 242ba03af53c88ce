"""torch.compile without graph breaks and torch.export, for the forward pass and for decoding with a static cache."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from gda import GDAConfig, GDAForCausalLM

pytestmark = pytest.mark.slow

VOCAB = 48
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {"num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 2},
    "more-noise-than-kv": {"num_attention_heads": 12, "num_noise_heads": 4, "num_key_value_heads": 2},
    "fewer-noise-than-kv": {"num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 4},
    "paired": {"kv_layout": "paired", "num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 4},
}
CALLS_A_LAYER = {"shared": 1, "more-noise-than-kv": 1, "fewer-noise-than-kv": 1, "paired": 4}
EXTRAS = {"head_norm": True, "qk_norm": True, "hidden_act": "poly_norm"}
ONE_LAYER = {"num_hidden_layers": 1}
SLIDING_LAYER = ONE_LAYER | {"sliding_window": 4}
SLIDING = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_lambda_type = pytest.mark.parametrize("lambda_type", ["reparameterized", "sigmoid", "tanh"])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny_model(layout: str, lambda_type: str, **fields: Any) -> GDAForCausalLM:
    config = GDAConfig(
        **SIZES | {"bos_token_id": None, "eos_token_id": None, "lambda_type": lambda_type} | LAYOUTS[layout] | fields
    )
    return scattered(GDAForCausalLM(config))


def tiny_llama() -> LlamaForCausalLM:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return scattered(LlamaForCausalLM(LlamaConfig(**SIZES | heads | ONE_LAYER)))


def scattered(model: PreTrainedModel) -> Any:
    """Weights with rows of different sizes, so that exchanged heads change the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            rows = torch.linspace(0.5, 1.5, weight.shape[0]).view(-1, *[1] * (weight.dim() - 1))
            weight.copy_(0.2 * noise + 0.5 if weight.dim() == 1 else noise * rows / weight.shape[1] ** 0.5)
    return model.eval()


def token_ids(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


class Graphs(list[torch.fx.GraphModule]):
    """A compiler backend that runs graphs unchanged and records them."""

    def __call__(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        self.append(graph)
        return graph.forward

    def __deepcopy__(self, _: dict) -> "Graphs":
        return self

    def attention_calls(self) -> int:
        nodes = [node for graph in self for node in graph.graph.nodes if node.op == "call_function"]
        return sum("scaled_dot_product_attention" in str(node.target) for node in nodes)


@each_layout
@each_lambda_type
def test_forward_compiles_to_one_graph(layout: str, lambda_type: str) -> None:
    """With a padding mask, and with one attention call per layer (paired: four)."""
    model = tiny_model(layout, lambda_type)
    ids, mask = token_ids(), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        found = compiled(ids, attention_mask=mask, use_cache=False).logits
        wanted = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found, wanted)
    assert len(graphs) == 1
    assert graphs.attention_calls() == 2 * CALLS_A_LAYER[layout]


@pytest.mark.parametrize(("layout", "lambda_type"), [("shared", "sigmoid"), ("paired", "reparameterized")])
@pytest.mark.parametrize("fields", [EXTRAS | ONE_LAYER, SLIDING_LAYER], ids=["extras", "sliding"])
def test_training_compiles_to_one_graph(layout: str, lambda_type: str, fields: dict[str, Any]) -> None:
    """Loss and gradients equal those of eager execution."""
    model = tiny_model(layout, lambda_type, **fields).train()
    ids = token_ids()
    model(ids, labels=ids, use_cache=False).loss.backward()
    wanted = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids, use_cache=False).loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def decode(model: PreTrainedModel, step: Callable, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits (B, T, vocab) of a prompt from `model`, and then token by token from `step`."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 4)
    with torch.no_grad():
        logits = [model(ids[:, :prompt], past_key_values=cache).logits]
        for position in range(prompt, ids.shape[1]):
            positions = torch.full((ids.shape[0], 1), position)
            token = ids[:, position : position + 1]
            logits.append(step(token, past_key_values=cache, position_ids=positions).logits)
    return torch.cat(logits, dim=1)


@each_layout
@each_lambda_type
def test_decode_step_compiles_once(layout: str, lambda_type: str) -> None:
    """One graph serves every step, and logits equal those of one uncached pass."""
    model = tiny_model(layout, lambda_type)
    ids = token_ids()
    graphs = Graphs()
    found = decode(model, torch.compile(model, fullgraph=True, backend=graphs), ids, prompt=8)
    torch.testing.assert_close(found, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    assert graphs.attention_calls() == 2 * CALLS_A_LAYER[layout]


@pytest.mark.parametrize("layout", ["shared", "paired"])
@pytest.mark.parametrize("fields", [EXTRAS, SLIDING], ids=["extras", "sliding"])
def test_decoding_variants_compile_to_one_graph(layout: str, fields: dict[str, Any]) -> None:
    """Norms, PolyNorm and a sliding window with a rolling static cache."""
    model = tiny_model(layout, "tanh", **fields)
    ids = token_ids()
    graphs = Graphs()
    found = decode(model, torch.compile(model, fullgraph=True, backend=graphs), ids, prompt=3)
    torch.testing.assert_close(found, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert graphs


@each_layout
def test_generate_with_a_compiled_static_cache(layout: str) -> None:
    """`generate` compiles the decode step to one graph and gives the same tokens."""
    model = tiny_model(layout, "sigmoid")
    ids = token_ids()
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(ids, **arguments)
    graphs = Graphs()
    compile_config = CompileConfig(fullgraph=True, backend=graphs, mode=None)
    compile_config._compile_all_devices = True
    found = model.generate(ids, cache_implementation="static", compile_config=compile_config, **arguments)
    assert torch.equal(found, wanted)
    assert len(graphs) == 1
    assert len(wanted[:, 12:].unique()) > 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_forward() -> None:
    """The compiled CPU code gives the eager logits."""
    model = tiny_model("shared", "sigmoid", num_hidden_layers=1)
    ids = token_ids()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def export(model: PreTrainedModel, *, strict: bool, dynamic: bool) -> torch.export.ExportedProgram:
    """Export the forward pass for ids (2, 12), or for any batch size and length."""
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=512)}
    return torch.export.export(
        model,
        (),
        {"input_ids": token_ids(), "use_cache": False},
        dynamic_shapes={"input_ids": sizes if dynamic else None, "use_cache": None},
        strict=strict,
    )


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize(("strict", "dynamic"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    "make_model",
    [
        pytest.param(tiny_llama, id="llama"),
        *(
            pytest.param(lambda layout=layout, kind=kind, fields=fields: tiny_model(layout, kind, **fields), id=name)
            for name, layout, kind, fields in [
                ("shared", "shared", "reparameterized", EXTRAS | ONE_LAYER),
                ("sliding", "shared", "tanh", SLIDING_LAYER),
                ("fewer-noise-than-kv", "fewer-noise-than-kv", "sigmoid", ONE_LAYER),
                ("paired", "paired", "reparameterized", EXTRAS | ONE_LAYER),
                ("paired-by-token", "paired", "tanh", ONE_LAYER),
            ]
        ),
    ],
)
def test_export_gives_an_equal_program(make_model: Callable[[], PreTrainedModel], strict: bool, dynamic: bool) -> None:
    """Logits are equal, with dynamic shapes also for other sizes."""
    model = make_model()
    program = export(model, strict=strict, dynamic=dynamic).module()
    sizes = [(2, 12), (3, 5), (1, 20)] if dynamic else [(2, 12)]
    for batch, length in sizes:
        ids = token_ids(batch, length)
        found = program(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits, msg=f"{batch} × {length}")


@pytest.mark.parametrize("layout", ["shared", "paired"])
def test_exported_program_saves_and_loads(layout: str, tmp_path: Any) -> None:
    """With all weights, λ included."""
    model = tiny_model(layout, "reparameterized")
    torch.export.save(export(model, strict=False, dynamic=False), tmp_path / "model.pt2")
    wanted = model(token_ids(), use_cache=False).logits
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(input_ids=token_ids(), use_cache=False).logits, wanted)
