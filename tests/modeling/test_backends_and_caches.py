"""Every attention backend, cache and way to generate gives the reference's results, and λ stays in float32."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    QuantizedCache,
    QuantoConfig,
    StaticCache,
)
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gda import GDAForCausalLM
from gda.modeling_gda import attention_gda
from gda.modeling_gda.attention_gda import CACHE_ARGUMENT, Subtraction

from ..support import naive
from ..support.tiny import relative_error, tiny_config, tiny_model, token_ids

pytestmark = pytest.mark.sampled

Calls = list[tuple[torch.Size, torch.Size, torch.Size]]

TOLERANCE = 1e-5
PROMPT, NEW_TOKENS = 7, 8
HALF_TOLERANCE = {torch.bfloat16: 0.07, torch.float16: 0.01}  # a tiny Llama is 0.023 off in bfloat16

KINDS: dict[str, dict[str, Any]] = {
    "shared": {},
    "repeated-noise": {"num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 4},
    "paired": {"kv_layout": "paired"},
    "paired-grouped": {
        "kv_layout": "paired",
        "num_attention_heads": 12,
        "num_noise_heads": 4,
        "num_key_value_heads": 4,
    },
}
MIXED = {
    "num_hidden_layers": 3,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
SLIDING_KINDS = {f"{name}-mixed": KINDS[name] | MIXED for name in ("shared", "paired")}
ALL_KINDS = KINDS | SLIDING_KINDS
LAMBDA_TYPES = ["reparameterized", "sigmoid", "tanh"]

every_kind = pytest.mark.parametrize("fields", ALL_KINDS.values(), ids=ALL_KINDS)
every_full_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
every_lambda_type = pytest.mark.parametrize("lambda_type", LAMBDA_TYPES)
each_layout = pytest.mark.parametrize("kv_layout", ["shared", "paired"])


def reference(model: GDAForCausalLM, ids: Tensor) -> Tensor:
    return naive.run(model.state_dict(), model.config, ids).logits


# --- backends ---------------------------------------------------------------------------------------------------------


@every_kind
@torch.no_grad()
def test_backends_agree(fields: dict[str, Any]) -> None:
    """eager, sdpa and flex_attention, with and without padding."""
    model, ids = tiny_model(**fields), token_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for attention_mask in (None, mask):
        logits = {}
        for backend in ("eager", "sdpa", "flex_attention"):
            model.set_attn_implementation(backend)
            with torch.compiler.set_stance("force_eager"):  # compiling flex_attention takes half a minute
                logits[backend] = model(ids, attention_mask=attention_mask).logits
        real = mask.bool() if attention_mask is not None else torch.ones_like(ids, dtype=torch.bool)
        expected = naive.run(model.state_dict(), model.config, ids, padding_mask=attention_mask).logits
        for backend, got in logits.items():
            assert relative_error(got[real], expected[real]) <= TOLERANCE, backend


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_compiles() -> None:
    """Compiled, as it is by default, it gives the same logits."""
    model, ids = tiny_model(head_dim=16), token_ids(1, 11)
    model.set_attn_implementation("flex_attention")
    assert relative_error(model(ids).logits, reference(model, ids)) <= TOLERANCE


@pytest.mark.parametrize("backend", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_supported(backend: str) -> None:
    """Requesting it fails only because its package or a GPU is missing."""
    assert GDAForCausalLM._supports_flash_attn
    assert GDAForCausalLM._supports_sdpa
    assert GDAForCausalLM._supports_flex_attn
    assert GDAForCausalLM._supports_attention_backend
    try:
        GDAForCausalLM._from_config(tiny_config(), attn_implementation=backend)
    except (ImportError, ValueError) as error:
        message = str(error)
    else:
        message = ""
    assert "does not support" not in message


def flash_in_plain_torch(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float,
    sliding_window: int | None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What a flash kernel computes: queries at the end of the keys, causal by a flag of its own."""
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert key.shape == value.shape
    assert query.shape[1] % key.shape[1] == 0
    assert module.is_causal
    assert dropout == 0.0
    assert attention_mask is None or attention_mask.dim() == 2
    length, kv_length = query.shape[2], key.shape[2]
    distance = torch.arange(kv_length - length, kv_length).unsqueeze(1) - torch.arange(kv_length)
    seen = (distance >= 0) & (distance < (sliding_window or kv_length))
    if attention_mask is not None:
        seen = seen & (attention_mask[:, None, None, :].bool() | (distance == 0))
    repeats = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeats, dim=1).mT * scaling
    output = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ value.repeat_interleave(repeats, dim=1)
    return output.transpose(1, 2), None


@every_kind
@torch.no_grad()
def test_flash_attention_conventions(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with a flash kernel's conventions gives the same logits, with a cache too."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash_in_plain_torch)
    model, ids = tiny_model(**fields), token_ids(2, 11)
    model.config._attn_implementation_internal = "flash_attention_2"
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    got, expected = model(ids, attention_mask=mask).logits, reference(model, ids[:1, 3:])
    assert relative_error(got[0, 3:], expected[0]) <= TOLERANCE
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([6, 1, 4], dim=1)]
    assert relative_error(torch.cat(pieces, dim=1), reference(model, ids)) <= TOLERANCE


@each_layout
def test_flash_attention_finds_the_dtype_of_the_weights(kv_layout: str) -> None:
    """transformers casts float32 queries to the dtype of the layer's weights."""
    attention = tiny_model(kv_layout=kv_layout).bfloat16().model.layers[0].self_attn
    assert get_target_dtype(torch.zeros(1, 1, 1, 8), attention) == torch.bfloat16


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The shapes of query, key and value in each call of the backend "counting"."""
    calls: Calls = []

    def counting(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((query.shape, key.shape, value.shape))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "counting", counting)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "counting", sdpa_mask)
    return calls


@every_kind
@torch.no_grad()
def test_attention_calls_of_a_layer(fields: dict[str, Any], attention_calls: Calls) -> None:
    """One call in the shared layout and four in the paired one, with all KV heads and no values wider than keys."""
    model, ids = tiny_model(attention="counting", **fields), token_ids(2, 11)
    config = model.config
    assert relative_error(model(ids).logits, reference(model, ids)) <= TOLERANCE
    shared = config.kv_layout == "shared"
    assert len(attention_calls) == (1 if shared else 4) * config.num_hidden_layers
    for query, key, value in attention_calls:
        assert query[-1] == key[-1] == value[-1] == config.head_dim
        assert key == value
        assert key[1] == (config.num_key_value_heads if shared else config.num_key_value_heads // 2)
    queries = sum(query[1] for query, _, _ in attention_calls) // config.num_hidden_layers
    if shared:
        copies = max(1, config.num_key_value_heads // config.num_noise_heads)
        assert queries == config.num_signal_heads + config.num_noise_heads * copies
    else:
        assert queries == 2 * config.num_attention_heads


@torch.no_grad()
def test_attention_calls_while_generating(
    attention_calls: Calls,
) -> None:
    """One call per layer and decoding step, with one query token."""
    model = tiny_model(attention="counting")
    model.generate(token_ids(1, PROMPT), max_new_tokens=4, do_sample=False)
    assert [query[2] for query, _, _ in attention_calls] == [PROMPT] * 2 + [1] * 6
    assert [key[2] for _, key, _ in attention_calls] == [length for length in range(PROMPT, PROMPT + 4) for _ in "ab"]


@each_layout
@torch.no_grad()
def test_packed_sequences(kv_layout: str) -> None:
    """Sequences in one row, separated by restarting positions, do not attend to each other."""
    model, ids = tiny_model(kv_layout=kv_layout), token_ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    logits = model(ids, position_ids=positions, use_cache=False).logits
    assert relative_error(logits[:, :4], reference(model, ids[:, :4])) <= TOLERANCE
    assert relative_error(logits[:, 4:], reference(model, ids[:, 4:])) <= TOLERANCE


# --- attention maps ---------------------------------------------------------------------------------------------------


@every_lambda_type
@every_kind
@torch.no_grad()
def test_attention_maps(fields: dict[str, Any], lambda_type: str) -> None:
    """`attentions` are the differential maps (B, S, T, T), and their rows sum to 1 − λ."""
    model, ids = tiny_model(attention="eager", lambda_type=lambda_type, **fields), token_ids(2, 9)
    lambdas = recorded_lambdas(model, lambda: model(ids))
    outputs = model(ids, output_attentions=True)
    expected = naive.run(model.state_dict(), model.config, ids)
    assert relative_error(outputs.logits, expected.logits) <= TOLERANCE
    assert len(outputs.attentions) == model.config.num_hidden_layers
    for maps, naive_maps, lambda_ in zip(outputs.attentions, expected.maps, lambdas, strict=True):
        assert maps.shape == (2, model.config.num_signal_heads, 9, 9)
        assert relative_error(maps, naive_maps) <= TOLERANCE
        row_sums = 1 - (lambda_.transpose(1, 2) if lambda_.dim() == 3 else lambda_.view(1, 1, 1))
        assert torch.allclose(maps.sum(dim=-1), row_sums.expand(maps.shape[:-1]), atol=1e-5)


def recorded_lambdas(model: GDAForCausalLM, call: Callable[[], Any]) -> list[Tensor]:
    """λ of each layer as the subtraction receives it during `call`."""
    lambdas: list[Tensor] = []
    hooks = [
        layer.self_attn.subtract.register_forward_hook(lambda _, inputs, __: lambdas.append(inputs[2]))
        for layer in model.model.layers
    ]
    call()
    for hook in hooks:
        hook.remove()
    assert len(lambdas) == model.config.num_hidden_layers
    return lambdas


@each_layout
@torch.no_grad()
def test_attention_maps_while_generating(kv_layout: str) -> None:
    """`generate` returns the maps of the prompt, and one row for each new token."""
    model, prompt = tiny_model(attention="eager", kv_layout=kv_layout, head_norm=True), token_ids(2, PROMPT)
    output = model.generate(
        prompt, max_new_tokens=4, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, uncached_greedy(model, prompt, 4))
    expected = naive.run(model.state_dict(), model.config, output.sequences).maps
    assert len(output.attentions) == 4
    for step, layers in enumerate(output.attentions):
        end = PROMPT + step
        begin = 0 if step == 0 else end - 1
        for maps, naive_maps in zip(layers, expected, strict=True):
            assert relative_error(maps, naive_maps[:, :, begin:end, :end]) <= TOLERANCE


@each_layout
@torch.no_grad()
def test_attention_maps_are_computed_on_request(kv_layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `output_attentions` there are none. Hidden states: one per layer, plus the embeddings."""
    model = tiny_model(attention="eager", kv_layout=kv_layout)
    forbidden = staticmethod(lambda *_: pytest.fail("maps that nobody asked for"))
    for layer in model.model.layers:
        monkeypatch.setattr(type(layer.self_attn), "apply_maps", forbidden)
    outputs = model(token_ids(1, 5), output_hidden_states=True)
    assert outputs.attentions is None
    assert [states.shape for states in outputs.hidden_states] == [(1, 5, model.config.hidden_size)] * 3


@torch.no_grad()
def test_attention_maps_requested_in_the_config() -> None:
    model, ids = tiny_model(attention="eager"), token_ids(2, 9)
    expected = model(ids, output_attentions=True).attentions
    model.config.output_attentions = True
    for maps, other in zip(model(ids).attentions, expected, strict=True):
        assert torch.equal(maps, other)


# --- caches -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decoded(model: GDAForCausalLM, ids: Tensor, cache: Cache, prompt: int = PROMPT) -> Tensor:
    """Logits of a prompt, and then of single tokens with a cache."""
    sizes = [prompt] + [1] * (ids.shape[1] - prompt)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@every_kind
def test_static_cache(fields: dict[str, Any], backend: str) -> None:
    """A static cache that is larger than needed gives the logits of the whole sequence."""
    model, ids = tiny_model(attention=backend, **fields), token_ids(2, 13)
    cache = StaticCache(config=model.config, max_cache_len=20)
    assert relative_error(decoded(model, ids, cache), reference(model, ids)) <= TOLERANCE
    sliding = [isinstance(layer, StaticSlidingWindowLayer) for layer in cache.layers]
    assert sliding == [kind == "sliding_attention" for kind in model.config.layer_types]


@each_layout
def test_sliding_window_cache_keeps_a_window(kv_layout: str) -> None:
    """Sliding layers cache at most their window, full layers everything, and logits are equal."""
    model, ids = tiny_model(kv_layout=kv_layout, **MIXED), token_ids(2, 13)
    cache = DynamicCache(config=model.config)
    assert relative_error(decoded(model, ids, cache), reference(model, ids)) <= TOLERANCE
    lengths = [layer.keys.shape[-2] for layer in cache.layers]
    assert lengths == [3, 13, 3]
    assert isinstance(cache.layers[0], DynamicSlidingWindowLayer)


class NoStream:
    """Replaces a CUDA stream where there is no CUDA, and runs everything in order."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@every_kind
def test_offloaded_cache(fields: dict[str, Any], implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in main memory gives the reference's tokens."""
    model, prompt = tiny_model(**fields), token_ids(2, PROMPT)
    expected = uncached_greedy(model, prompt)
    if torch.cuda.is_available():
        model, prompt = model.cuda(), prompt.cuda()
    else:
        monkeypatch.setattr(torch, "Stream", NoStream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda _: NoStream())
    offloaded: list[int] = []
    offload = Cache.offload
    monkeypatch.setattr(
        Cache, "offload", lambda cache, layer, *args: (offloaded.append(layer), offload(cache, layer, *args))
    )
    got = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation=implementation)
    assert torch.equal(got.cpu(), expected)
    assert offloaded == list(range(model.config.num_hidden_layers)) * NEW_TOKENS


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Unpack bytes into two- or four-bit integers, as quanto's C++ extension does."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def quantized_cache(model: GDAForCausalLM, backend: str, monkeypatch: pytest.MonkeyPatch) -> QuantizedCache:
    settings: dict[str, dict[str, Any]] = {
        "quanto": {"nbits": 4, "q_group_size": 8, "residual_length": 64},
        "hqq": {"nbits": 4, "axis_key": 1, "axis_value": 1, "q_group_size": 8, "residual_length": 64},
        "fp8": {},
    }
    if backend == "quanto":
        cpp = pytest.importorskip("optimum.quanto.library.extensions.cpp")
        monkeypatch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack))  # it takes two minutes to compile
    elif backend == "hqq":
        pytest.importorskip("hqq")
    return QuantizedCache(backend=backend, config=model.config, **settings[backend])


@pytest.mark.parametrize("backend", ["quanto", "hqq", "fp8"])
@every_full_kind
@torch.no_grad()
def test_quantized_cache(fields: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step equals that from the dequantized keys and values, and is close to the exact one."""
    model, ids = tiny_model(**fields), token_ids(2, PROMPT + 1)
    cache = quantized_cache(model, backend, monkeypatch)
    model(ids[:, :PROMPT], past_key_values=cache)
    restored = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        keys, values = layer._dequantize(layer._quantized_keys), layer._dequantize(layer._quantized_values)
        assert keys.shape == (2, model.config.num_key_value_heads, PROMPT, model.config.head_dim)
        restored.update(keys.clone(), values.clone(), index)
    step = model(ids[:, PROMPT:], past_key_values=cache).logits
    if backend != "fp8":  # which quantizes the new token before attention reads it
        assert relative_error(step, model(ids[:, PROMPT:], past_key_values=restored).logits) <= TOLERANCE
    assert TOLERANCE < relative_error(step, reference(model, ids)[:, PROMPT:]) < 0.25


@pytest.mark.parametrize("backend", ["quanto", "hqq", "fp8"])
@each_layout
def test_generate_from_a_quantized_cache(kv_layout: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token, which reads the exact prompt, is exact."""
    model, prompt = tiny_model(kv_layout=kv_layout), token_ids(2, PROMPT)
    cache = quantized_cache(model, backend, monkeypatch)
    got = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, past_key_values=cache)
    assert got.shape == (2, PROMPT + NEW_TOKENS)
    assert torch.equal(got[:, : PROMPT + 1], uncached_greedy(model, prompt, 1))
    assert cache.get_seq_length() == PROMPT + NEW_TOKENS - 1


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@every_full_kind
@torch.no_grad()
def test_cache_is_as_large_as_a_llamas(fields: dict[str, Any], kind: str) -> None:
    """For the same KV heads, with any noise heads and layout."""
    model = tiny_model(**fields)
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.num_key_value_heads * 6,
            intermediate_size=8,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_key_value_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        )
    )
    sizes = []
    for any_model in (model, llama):
        settings = {"config": any_model.config} | ({"max_cache_len": 16} if kind == "static" else {})
        cache = (StaticCache if kind == "static" else DynamicCache)(**settings)
        any_model(token_ids(2, PROMPT), past_key_values=cache)
        sizes.append([tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values)])
    assert sizes[0] == sizes[1]
    tokens = 16 if kind == "static" else PROMPT
    assert sum(sizes[0]) == config.num_hidden_layers * 2 * 2 * config.num_key_value_heads * tokens * config.head_dim * 4


@each_layout
def test_unused_cache_is_refused(kv_layout: str) -> None:
    """A cache under an unknown argument name is an error; otherwise it would be ignored silently."""
    model = tiny_model(kv_layout=kv_layout)
    cache = DynamicCache(config=model.config)
    message = rf"a DynamicCache as `kv_store`.*transformers {transformers.__version__}.*`{CACHE_ARGUMENT}`"
    with pytest.raises(TypeError, match=message):
        model(token_ids(1, 5), kv_store=cache)
    assert cache.get_seq_length() == 0


@each_layout
def test_generation_fails_if_the_cache_argument_is_renamed(kv_layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later release of transformers might do."""
    monkeypatch.setattr(attention_gda, "CACHE_ARGUMENT", "kv_store")
    with pytest.raises(TypeError, match=f"a DynamicCache as `{CACHE_ARGUMENT}`"):
        tiny_model(kv_layout=kv_layout).generate(token_ids(1, PROMPT), max_new_tokens=2, do_sample=False)


# --- generation -------------------------------------------------------------------------------------------------------


def uncached_greedy(model: GDAForCausalLM, prompt: Tensor, new_tokens: int = NEW_TOKENS) -> Tensor:
    """The reference's most likely tokens, each from a pass over the whole sequence."""
    sequence = prompt
    for _ in range(new_tokens):
        sequence = torch.cat((sequence, reference(model, sequence)[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return sequence


@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 3}],
    ids=["dynamic", "static", "none", "chunked-prefill"],
)
@every_kind
def test_greedy(fields: dict[str, Any], settings: dict[str, Any]) -> None:
    """With every cache."""
    model, prompt = tiny_model(**fields), token_ids(2, PROMPT)
    got = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **settings)
    assert torch.equal(got, uncached_greedy(model, prompt))


@each_layout
def test_generate_from_embeddings(kv_layout: str) -> None:
    """A prompt given as embeddings gives the same tokens."""
    model, prompt = tiny_model(kv_layout=kv_layout), token_ids(2, PROMPT)
    embedded = model.get_input_embeddings()(prompt).detach()
    got = model.generate(inputs_embeds=embedded, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(got, uncached_greedy(model, prompt)[:, PROMPT:])
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model(prompt, inputs_embeds=embedded)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()


@each_layout
def test_sampled(kv_layout: str) -> None:
    """With a seed, sampling with a cache equals sampling from the reference's probabilities."""
    model, prompt = tiny_model(kv_layout=kv_layout), token_ids(2, PROMPT)
    torch.manual_seed(3)
    got = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
    torch.manual_seed(3)
    sequence = prompt
    for _ in range(NEW_TOKENS):
        probabilities = reference(model, sequence)[:, -1].float().softmax(dim=-1)
        sequence = torch.cat((sequence, torch.multinomial(probabilities, num_samples=1)), dim=1)
    assert torch.equal(got, sequence)
    assert not torch.equal(got, uncached_greedy(model, prompt))


@each_layout
def test_beam_search(kv_layout: str) -> None:
    """Beams reorder the cache correctly: tokens equal those without a cache, and scores those of the reference."""
    model, prompt = tiny_model(kv_layout=kv_layout), token_ids(2, PROMPT)
    settings: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "num_beams": 4,
        "length_penalty": 0.0,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    got = model.generate(prompt, **settings)
    assert torch.equal(got.sequences, model.generate(prompt, use_cache=False, **settings).sequences)
    log_probabilities = reference(model, got.sequences).log_softmax(dim=-1)[:, PROMPT - 1 : -1]
    new_tokens = got.sequences[:, PROMPT:].unsqueeze(-1)
    scores = log_probabilities.gather(-1, new_tokens).sum(dim=(1, 2))
    assert torch.allclose(got.sequences_scores.double(), scores, atol=1e-4)
    assert got.beam_indices[:, 1:NEW_TOKENS].diff(dim=1).count_nonzero() > 0


@pytest.mark.parametrize("assistant_layout", ["shared", "paired"])
@each_layout
def test_assisted(kv_layout: str, assistant_layout: str) -> None:
    """A smaller GDA model as assistant does not change the tokens, whether its guesses are right or wrong."""
    model, prompt = tiny_model(kv_layout=kv_layout), token_ids(1, PROMPT)
    stranger = tiny_model(kv_layout=assistant_layout, num_hidden_layers=1, seed=5)
    for assistant in (stranger, tiny_model(kv_layout=kv_layout)):
        got = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=assistant)
        assert torch.equal(got, uncached_greedy(model, prompt))


@pytest.mark.parametrize(
    "settings", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=["dynamic", "static", "beams"]
)
@every_kind
def test_left_padding(fields: dict[str, Any], settings: dict[str, Any]) -> None:
    """In a left-padded batch, each prompt gets the tokens that it gets alone."""
    model = tiny_model(pad_token_id=0, **fields)
    prompts = [token_ids(1, length, seed=length) for length in (3, PROMPT, 5)]
    ids = torch.cat([torch.nn.functional.pad(prompt, (PROMPT - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (PROMPT - p.shape[1], 0)) for p in prompts])
    settings = settings | {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **settings)[:, PROMPT:]
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert row.tolist() == alone[0, prompt.shape[1] :].tolist()
        if "num_beams" not in settings:
            assert torch.equal(alone, uncached_greedy(model, prompt))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", "paged|eager"])
@every_kind
def test_continuous_batching(fields: dict[str, Any], backend: str) -> None:
    """`generate_batch` gives each prompt the reference's tokens, also for prompts that share pages."""
    model = tiny_model(**fields)
    model.set_attn_implementation(backend)
    first = token_ids(1, PROMPT)[0].tolist()
    prompts = [first, token_ids(1, 3, seed=1)[0].tolist(), [*first, 5, 9], token_ids(1, 12, seed=2)[0].tolist()]
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(page_size=4, num_blocks=24, max_batch_tokens=16),
    )
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        expected = uncached_greedy(model, torch.tensor([prompt]))[0].tolist()
        assert prompt + output.generated_tokens == expected
    assert model.config._attn_implementation == backend


# --- dtypes -----------------------------------------------------------------------------------------------------------


def norm_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖, which is less sensitive to single entries than the largest error."""
    return ((got.double() - expected).norm() / expected.norm()).item()


@every_lambda_type
@each_layout
@pytest.mark.parametrize("dtype", HALF_TOLERANCE, ids=str)
@torch.no_grad()
def test_half_precision(kv_layout: str, lambda_type: str, dtype: torch.dtype) -> None:
    """bfloat16 and float16 with both backends, with and without a cache, are close to float32."""
    model = tiny_model(kv_layout=kv_layout, lambda_type=lambda_type, head_norm=True, hidden_act="poly_norm")
    ids = token_ids(2, 9)
    expected = reference(model, ids)
    model = model.to(dtype)
    for backend in ("sdpa", "eager"):
        model.set_attn_implementation(backend)
        for logits in (model(ids).logits, decoded(model, ids, DynamicCache(config=model.config), prompt=4)):
            assert logits.dtype == dtype
            assert norm_error(logits, expected) <= HALF_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALF_TOLERANCE, ids=str)
@every_lambda_type
@each_layout
@torch.no_grad()
def test_loading_in_half_precision_keeps_lambda(
    kv_layout: str, lambda_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """λ's parameters stay float32 bit for bit; all others are cast."""
    model = tiny_model(kv_layout=kv_layout, lambda_type=lambda_type)
    model.save_pretrained(tmp_path)
    loaded = GDAForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    originals = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        if "lambda" in name:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, originals[name])
        else:
            assert parameter.dtype == dtype
    ids, hidden = token_ids(2, 9), torch.randn(2, 9, model.config.hidden_size).to(dtype)
    for ours, original in zip(loaded.model.layers, model.model.layers, strict=True):
        lambda_ = ours.self_attn.compute_lambda(hidden)
        assert lambda_.dtype == torch.float32
        assert torch.equal(lambda_, original.self_attn.compute_lambda(hidden.float()))
    lambdas = recorded_lambdas(loaded, lambda: loaded(ids))
    assert [lambda_.dtype for lambda_ in lambdas] == [torch.float32] * 2
    assert loaded(ids).logits.dtype == dtype
    loaded.save_pretrained(tmp_path / "again")
    again = GDAForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    for name, parameter in again.named_parameters():
        assert "lambda" not in name or torch.equal(parameter, originals[name])


@every_lambda_type
def test_a_new_model_in_half_precision_has_lambda_in_float32(lambda_type: str) -> None:
    model = GDAForCausalLM._from_config(tiny_config(lambda_type=lambda_type), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lambda" in name else torch.bfloat16), name


@every_lambda_type
@torch.no_grad()
def test_lambda_is_computed_in_float32_from_half_weights(lambda_type: str) -> None:
    """Also if λ's own parameters were cast."""
    model = tiny_model(lambda_type=lambda_type).to(torch.bfloat16)
    attention = model.model.layers[1].self_attn
    assert all(parameter.dtype == torch.bfloat16 for parameter in attention.parameters())
    hidden = torch.randn(2, 9, model.config.hidden_size).to(torch.bfloat16)
    lambda_ = attention.compute_lambda(hidden)
    assert lambda_.dtype == torch.float32
    weights = {f"self_attn.{name}": weight.double() for name, weight in attention.state_dict().items()}
    for head in range(model.config.num_signal_heads):
        for row in range(2):
            expected = naive.lambda_of_head(hidden[row].double(), weights, model.config, 1, head)
            got = lambda_[row, :, head : head + 1] if lambda_.dim() == 3 else lambda_.reshape(1, 1)
            assert relative_error(got, expected) <= 1e-6


@every_lambda_type
@each_layout
@torch.no_grad()
def test_lambda_is_computed_in_float32_under_autocast(kv_layout: str, lambda_type: str) -> None:
    """λ is unchanged, and the forward pass is close to float32."""
    model, ids = tiny_model(kv_layout=kv_layout, lambda_type=lambda_type), token_ids(2, 9)
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(2, 9, model.config.hidden_size)
    expected = attention.compute_lambda(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.nn.functional.linear(hidden, attention.q_proj.weight).dtype == torch.bfloat16
        lambda_ = attention.compute_lambda(hidden)
        lambdas = recorded_lambdas(model, lambda: model(ids))
        logits = model(ids).logits
    assert lambda_.dtype == torch.float32
    assert torch.equal(lambda_, expected)
    assert [recorded.dtype for recorded in lambdas] == [torch.float32] * 2
    assert norm_error(logits, reference(model, ids)) <= HALF_TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("lambda_shape", [(1,), (2, 3, 6)], ids=["one", "by-token-and-head"])
def test_subtraction_is_rounded_once(lambda_shape: tuple[int, ...]) -> None:
    """signal − λ · noise of bfloat16 outputs is computed in float32 and rounded at the end."""
    signal, noise = torch.randn(2, 3, 2, 3, 8).bfloat16(), torch.randn(2, 3, 2, 1, 8).bfloat16()
    lambda_ = torch.rand(lambda_shape)
    got = Subtraction()(signal, noise, lambda_)
    spread = lambda_ if lambda_.dim() == 1 else lambda_.view(2, 3, 2, 3, 1)
    assert torch.equal(got, (signal.float() - spread * noise.float()).bfloat16())
    assert not torch.equal(got, signal - (spread.bfloat16() * noise))


@pytest.mark.parametrize("lambda_type", ["sigmoid", "tanh"])
def test_quantization_keeps_lambda(lambda_type: str, tmp_path: Path) -> None:
    """If other projections are loaded as integers, λ's stays float32."""
    pytest.importorskip("optimum.quanto")
    model = tiny_model(lambda_type=lambda_type)
    model.save_pretrained(tmp_path)
    loaded = GDAForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8"))
    ours, original = loaded.model.layers[1].self_attn, model.model.layers[1].self_attn
    assert type(ours.q_proj) is not type(original.q_proj)
    assert type(ours.lambda_proj) is type(original.lambda_proj)
    assert torch.equal(ours.lambda_proj.weight, original.lambda_proj.weight)
