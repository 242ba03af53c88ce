"""Any configuration: a valid one makes a model that is saved and loaded as it is, and a Llama converts equal."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import gda
from gda import GDAConfig, GDAForCausalLM

from .llamas import llama_config
from .test_configuration import OWN_FIELDS, possible_fields
from .tiny import make_asymmetric, tiny_config

SHORT, LONG = 5, 2000
KEPT = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
LLAMA_FIELDS = sorted({*tiny_config().to_dict()} - {"transformers_version", "architectures", "auto_map"})
ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, -1, 0, 10**30])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def in_two_sizes(
    *arguments: st.SearchStrategy[Any],
) -> Callable[[Callable[..., None]], Callable[[int], None]]:
    """Run a property on a few examples that are always the same, and in the long form on thousands that are not."""

    def decorate(check: Callable[..., None]) -> Callable[[int], None]:
        @pytest.mark.parametrize("examples", [SHORT, pytest.param(LONG, marks=pytest.mark.long)])
        def test(examples: int) -> None:
            limits = settings(
                max_examples=examples,
                deadline=None,
                derandomize=examples == SHORT,
                print_blob=True,
                suppress_health_check=KEPT,
            )
            limits(given(*arguments)(check))()

        test.__doc__, test.__name__ = check.__doc__, check.__name__
        return test

    return decorate


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Logits (2, 5, V) in float32."""
    ids = torch.arange(10).view(2, 5) % model.config.vocab_size
    return model.eval()(ids, use_cache=False).logits.float()


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """max |Δ| / max |expected|."""
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


@in_two_sizes(possible_fields(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
def test_a_valid_config_makes_a_model_that_is_saved_and_loaded(
    fields: dict[str, Any], dtype: torch.dtype, seed: int
) -> None:
    """Every field comes back, every tensor bit for bit, and the logits are the same, by our class and by Auto's."""
    torch.manual_seed(seed)
    model = GDAForCausalLM(tiny_config(**fields)).to(dtype)
    expected = logits_of(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for loader in (GDAForCausalLM, AutoModelForCausalLM):
            loaded = loader.from_pretrained(folder, dtype="auto")
            config = loaded.config
            assert {name: getattr(config, name) for name in OWN_FIELDS} == {
                name: getattr(model.config, name) for name in OWN_FIELDS
            }
            state = loaded.state_dict()
            assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
            assert torch.equal(logits_of(loaded), expected)


@st.composite
def llama_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a Llama, and head counts that expand."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return {
        "vocab_size": draw(st.integers(2, 40)),
        "hidden_size": 2 * draw(st.integers(1, 12)),
        "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 6)),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "relu"])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


@in_two_sizes(
    llama_fields(), st.sampled_from([None, "reparameterized", "tanh"]), st.integers(1, 2), st.integers(0, 2**31)
)
def test_a_llama_converts_equal_and_back(
    fields: dict[str, Any], lambda_type: str | None, noise: int, seed: int
) -> None:
    """As GDA it computes the same logits, and exported it is the same files of weights."""
    group = fields["num_attention_heads"] // fields["num_key_value_heads"]
    noise_heads = fields["num_key_value_heads"] * (noise if group % noise == 0 else 1)
    llama = make_asymmetric(LlamaForCausalLM(llama_config(**fields)), seed % 1000)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        llama.save_pretrained(place / "llama")
        gda.convert(
            place / "llama",
            place / "gda",
            noise_heads=noise_heads,
            lambda_type=lambda_type,
            seed=seed,
            verify=False,
            bundle_code=False,
        )
        converted = GDAForCausalLM.from_pretrained(place / "gda")
        assert converted.config.num_noise_heads == noise_heads
        assert difference(logits_of(converted), logits_of(llama)) < 1e-5
        gda.export(place / "gda", place / "again")
        weights = "model.safetensors"
        assert (place / "again" / weights).read_bytes() == (place / "llama" / weights).read_bytes()


@in_two_sizes(st.dictionaries(st.sampled_from(LLAMA_FIELDS), ANY_JSON, min_size=1, max_size=3))
def test_any_value_of_any_field_is_taken_or_refused_by_name(changes: dict[str, Any]) -> None:
    """Whatever JSON holds, in config.json or by argument: a config, or a ValueError that names a field."""
    fields = json.loads(tiny_config().to_json_string()) | changes
    try:
        GDAConfig.from_dict(fields)
    except ValueError as error:
        assert any(name in str(error) for name in fields), error


@in_two_sizes(possible_fields())
def test_a_gda_grows_equal(fields: dict[str, Any]) -> None:
    """Twice the signal heads, where nothing else grows: the same logits, or a refusal that is a ValueError."""
    torch.manual_seed(0)
    model = GDAForCausalLM(tiny_config(**fields)).eval()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model.save_pretrained(place / "gda")
        try:
            gda.grow(place / "gda", place / "grown", signal=2, verify=False, bundle_code=False)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            return
        grown = GDAForCausalLM.from_pretrained(place / "grown")
        assert grown.config.num_signal_heads == 2 * model.config.num_signal_heads
        assert difference(logits_of(grown), logits_of(model)) < 1e-4
