"""Random configurations: valid ones run, save, load, convert and grow, and others raise a ValueError that names a
field.

    python -m pytest -m long tests/project/test_properties.py       thousands of configurations, different in each run
    GDA_PROPERTY_FACTOR=0.1 python -m pytest -m long tests/…       a tenth of them
"""

import json
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

import gda
from gda import GDAConfig, GDAForCausalLM
from gda.conversion.sources.config_file import check_fields

from ..support.config_fields import OWN_FIELDS, possible_fields
from ..support.llama_like import CLASSES
from ..support.llamas import save_llama
from ..support.tiny import make_asymmetric, relative_error, tiny_config

pytestmark = pytest.mark.slow

FACTOR = float(os.environ.get("GDA_PROPERTY_FACTOR", "1"))
SECONDS = 20
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM)} | CLASSES
ACTIVATIONS = sorted(name for name in ACT2FN if not ACT2FN[name].state_dict())
LAYER_TYPES = ["full_attention", "sliding_attention"]
GDA_FIELDS = sorted({*json.loads(tiny_config().to_json_string())} | OWN_FIELDS)
# Entries of a config.json that transformers reads but does not write, and attributes of its classes.
OTHER_NAMES = [
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings", "torch_dtype"),
    *("num_labels", "id2label", "label2id", "problem_type", "quantization_config", "attn_implementation", "auto_map"),
    *("output_attentions", "name_or_path", "_name_or_path", "per_layer_config", "text_config", "is_encoder_decoder"),
    *("num_signal_heads", "noise_heads", "base_model_tp_plan", "attribute_map", "validate", "to_dict", "self", "cls"),
    *("__class__", "__dict__", "sub_configs", "model_type", "head_dimm", "", "a b", "pretraining_tp", "decoder"),
]


# --------------------------------------------------------------------------------------------------------- in two sizes


def in_two_sizes(
    short: int, many: int, *arguments: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a property with a few fixed examples and, in the long form, with many random ones."""
    long = round(FACTOR * many)

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("examples", [short, pytest.param(long, marks=pytest.mark.long)])
        def test(examples: int) -> None:
            limits = settings(
                max_examples=examples,
                deadline=None,
                derandomize=examples == short,
                database=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            )

            @limits
            @given(st.tuples(*arguments))
            def try_one(example: tuple[Any, ...]) -> None:
                with at_most(SECONDS):
                    check(*example)

            try_one()

        test.__doc__, test.__name__ = check.__doc__, check.__name__
        return test

    return decorate


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fail if a block computes for longer, for example in a loop up to a huge number."""

    def too_long(*_: Any) -> None:
        raise AssertionError(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# --------------------------------------------------------------------------------------------------------------- values


HUGE = [10**5, 2**31, 2**63, 2**64 - 1, -(2**63), 10**30, 10**400, 10**6, 2**20, 2**30, -1, 0, 1, 2, 3, 8]
NUMBERS = st.sampled_from(HUGE) | st.integers(-9, 99) | st.floats()


def nested(levels: int) -> Any:
    """Nested lists and dicts."""
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


WORDS = st.text(max_size=8) | st.just(70_000).map("a".__mul__) | st.sampled_from(LAYER_TYPES)
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
) | st.sampled_from([19, 21, 100, 900]).map(nested)
LISTS = st.lists(SCALARS, max_size=4) | st.lists(st.sampled_from(LAYER_TYPES), max_size=4)
ROPE_KEYS = [
    *("rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast"),
    *("beta_slow", "short_factor", "long_factor", "attention_factor", "mscale", "mscale_all_dim", "truncate", "type"),
    *("partial_rotary_factor", *LAYER_TYPES),
]
ROPE_TYPES = ["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"]
ANY_ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(ROPE_TYPES) | SCALARS},
    optional={key: NUMBERS | st.lists(NUMBERS, min_size=4, max_size=4) | ANY_JSON for key in ROPE_KEYS},
)
ANY_VALUE = ANY_JSON | NUMBERS | LISTS | ANY_ROPE


def changes_of(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """One to three fields with unsuitable values, and RoPE parameters that are almost valid."""
    name = st.sampled_from(names) | st.sampled_from(OTHER_NAMES) | st.text(max_size=8)
    odd = st.dictionaries(name, ANY_VALUE, min_size=1, max_size=3)
    rope = st.fixed_dictionaries({"rope_parameters": ANY_ROPE}, optional={"max_position_embeddings": NUMBERS})
    return odd | odd | rope


@st.composite
def possible_rope(draw: st.DrawFn, head_dim: int) -> dict[str, Any]:
    """RoPE parameters that obey the rules of their type."""
    kind = draw(st.sampled_from(ROPE_TYPES))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from([10, 100.0, 1e4, 5e5]))}
    if kind == "dynamic" and head_dim == 2:
        kind = rope["rope_type"] = "linear"
    if kind in ("linear", "dynamic", "yarn", "longrope", "llama3"):
        rope["factor"] = draw(st.floats(1, 32))
    if kind in ("yarn", "longrope", "llama3"):
        rope["original_max_position_embeddings"] = draw(st.integers(2, 8))
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        factors = st.lists(st.floats(1, 4), min_size=head_dim // 2, max_size=head_dim // 2)
        rope |= {"short_factor": draw(factors), "long_factor": draw(factors)}
    if kind == "proportional":
        rope["partial_rotary_factor"] = draw(st.sampled_from([0.5, 1.0]))
    return rope


@st.composite
def valid_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of any valid GDA model."""
    fields: dict[str, Any] = draw(possible_fields())
    return fields | {
        "qk_rank": draw(st.none() | st.integers(1, min(fields["head_dim"], fields["hidden_size"]))),
        "mlp_bias": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["silu", "poly_norm", "poly_norm", *ACTIVATIONS])),
        "rope_parameters": draw(possible_rope(fields["head_dim"])),
        "max_position_embeddings": draw(st.integers(8, 16)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
    }


@st.composite
def source_fields(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A family, and fields of a model of it: MHA, GQA or MQA, with any `head_dim` and biases."""
    family = draw(st.sampled_from([*FAMILIES, "llama"]))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    heads, layers = kv_heads * group, draw(st.integers(1, 3))
    width = 2 * draw(st.integers(1, 6))
    hidden = heads * 2 * draw(st.integers(4, 8))
    fields: dict[str, Any] = {
        "vocab_size": draw(st.integers(16, 40)),
        "hidden_size": hidden,
        "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "relu"])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "max_position_embeddings": draw(st.integers(8, 64)),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from([100.0, 1e4]))},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    if family != "qwen2":
        fields["head_dim"] = width
    if family in ("llama", "qwen3"):
        fields["attention_bias"] = draw(st.booleans())
    if family == "llama":
        fields |= {"mlp_bias": draw(st.booleans()), "rope_parameters": draw(possible_rope(width))}
    if family == "mistral":
        fields["sliding_window"] = draw(st.none() | st.integers(1, 8))
    if family in ("qwen2", "qwen3") and draw(st.booleans()):
        types = st.lists(st.sampled_from(LAYER_TYPES), min_size=layers, max_size=layers)
        fields |= {"use_sliding_window": True, "sliding_window": draw(st.integers(1, 8)), "layer_types": draw(types)}
    return family, fields


# ---------------------------------------------------------------------------------------------------------- comparisons


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Logits (2, 6, V) in float32."""
    ids = (torch.arange(12).view(2, 6) * 7) % model.config.vocab_size
    return model.eval()(ids, use_cache=False).logits.float()


@torch.no_grad()
def decoded(model: PreTrainedModel) -> torch.Tensor:
    """The same, from a prompt of four tokens and single tokens with a cache."""
    ids = (torch.arange(12).view(2, 6) * 7) % model.config.vocab_size
    first = model.eval()(ids[:, :4], use_cache=True)
    logits, cache = [first.logits], first.past_key_values
    for token in (4, 5):
        logits.append(model(ids[:, token : token + 1], past_key_values=cache).logits)
    return torch.cat(logits, 1).float()


def caches_hold(config: GDAConfig) -> bool:
    """Whether a model of this config computes the same with a cache of transformers (5.23).

    It does not if RoPE frequencies depend on the length or, because of a bug, with a window of 1.
    """
    assert config.rope_parameters is not None
    follow = config.rope_parameters["rope_type"] in ("dynamic", "longrope")
    return not follow and not (config.sliding_window == 1 and "sliding_attention" in (config.layer_types or []))


def own_fields(config: GDAConfig) -> dict[str, Any]:
    """Every field that this package adds."""
    return {name: getattr(config, name) for name in OWN_FIELDS}


def one_line(error: BaseException) -> None:
    """Whether the message is one readable line."""
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 1500


def says_well(error: BaseException, names: set[str]) -> None:
    """Whether an error is one line and names one of the fields."""
    one_line(error)
    message = str(error)
    shown = [re.escape(name if name.isidentifier() else repr(name)) for name in names]
    assert re.search(rf"(?<![^\W_])({'|'.join(shown)})(?![^\W_])", message), message


# ----------------------------------------------------------------------------------------------------------- properties


@in_two_sizes(
    6, 1500, valid_fields(), st.sampled_from([torch.float32, torch.float32, torch.bfloat16]), st.integers(0, 999)
)
def test_valid_config_runs_saves_and_loads(fields: dict[str, Any], dtype: torch.dtype, seed: int) -> None:
    """Decoding equals one pass; fields, tensors and logits reload, also with the Auto classes."""
    torch.manual_seed(seed)
    model = GDAForCausalLM(tiny_config(**fields))
    if dtype != torch.float32:  # as from_pretrained makes it, with λ in float32
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, bundle_code=False)
            model = GDAForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = logits_of(model)
    assert expected.shape == (2, 6, model.config.vocab_size)
    if dtype == torch.float32 and caches_hold(model.config):
        torch.testing.assert_close(decoded(model), expected, atol=1e-5, rtol=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for loader in (GDAForCausalLM, AutoModelForCausalLM):
            loaded = loader.from_pretrained(folder, dtype="auto")
            assert own_fields(loaded.config) == own_fields(GDAConfig.from_dict(model.config.to_dict()))
            state = loaded.state_dict()
            assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
            assert torch.equal(logits_of(loaded), expected)


@in_two_sizes(
    4,
    400,
    source_fields(),
    st.sampled_from([None, "reparameterized", "tanh"]),
    st.integers(1, 2),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 999),
)
def test_source_converts_and_exports(
    source: tuple[str, dict[str, Any]], lambda_type: str | None, noise: int, dtype: torch.dtype, seed: int
) -> None:
    """Logits are equal and `gda.verify` passes; an exported Llama is the same file."""
    family, fields = source
    group = fields["num_attention_heads"] // fields["num_key_value_heads"]
    noise_heads = fields["num_key_value_heads"] * (noise if group % noise == 0 else 1)
    config_class, model_class = FAMILIES[family]
    model = make_asymmetric(model_class(config_class(**fields)), seed).to(dtype)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model.save_pretrained(place / "source")
        options = {"noise_heads": noise_heads, "lambda_type": lambda_type, "seed": seed}
        gda.convert(place / "source", place / "gda", bundle_code=False, verify=False, **options)
        assert gda.verify(place / "source", place / "gda", method="tensors").passed
        # In float64: such small models amplify rounding so much that a Llama differs from itself by 1e-5.
        converted = GDAForCausalLM.from_pretrained(place / "gda", dtype=torch.float64).double()
        assert converted.config.num_noise_heads == noise_heads
        original = model_class.from_pretrained(place / "source", dtype=torch.float64).double()
        assert relative_error(logits_of(converted), logits_of(original)) < 1e-6
        if family == "llama":
            gda.export(place / "gda", place / "again", verify=False)
            weights = "model.safetensors"
            assert (place / "again" / weights).read_bytes() == (place / "source" / weights).read_bytes()


GROWTHS: dict[str, dict[str, Any]] = {
    "signal": {"signal": 2},
    "width": {"width": 2},
    "depth": {"depth": 5},
    "signal and depth": {"signal": 3, "depth": 4},
    "masked": {"masked": True, "mlp": 2.0},
}


@in_two_sizes(6, 1500, valid_fields(), st.sampled_from(sorted(GROWTHS)), st.integers(0, 999))
def test_gda_grows_with_equal_logits(fields: dict[str, Any], growth: str, seed: int) -> None:
    """With more heads, width or layers; or a ValueError of one line if that is impossible."""
    torch.manual_seed(seed)
    model = GDAForCausalLM(tiny_config(**fields)).eval()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model.save_pretrained(place / "gda")
        try:
            gda.grow(place / "gda", place / "grown", verify=False, bundle_code=False, **GROWTHS[growth])
        except ValueError as refusal:
            one_line(refusal)
            assert os.listdir(place) == ["gda"]
            return
        model = GDAForCausalLM.from_pretrained(place / "gda")
        grown = GDAForCausalLM.from_pretrained(place / "grown")
        torch.testing.assert_close(logits_of(grown), logits_of(model), atol=1e-5, rtol=1e-3)


@in_two_sizes(150, 20_000, changes_of(GDA_FIELDS))
def test_any_field_value_is_accepted_or_refused(changes: dict[str, Any]) -> None:
    """A model can be built and JSON round-trips, or a ValueError names the field."""
    fields = json.loads(tiny_config().to_json_string()) | changes
    try:
        check_fields(fields, Path("config.json"))
        config = GDAConfig.from_dict(fields)
    except ValueError as error:
        says_well(error, {*GDA_FIELDS, *changes})
        return
    again = GDAConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_json_string() == config.to_json_string()
    if config.num_hidden_layers <= 8:
        with torch.device("meta"):
            model = GDAForCausalLM(config)
        if sum(parameter.numel() for parameter in model.parameters()) < 2**20:
            torch.manual_seed(0)
            assert logits_of(GDAForCausalLM(config)).shape == (2, 6, config.vocab_size)


LLAMA_FIELDS = sorted(json.loads(LlamaConfig().to_json_string()))


@in_two_sizes(40, 3000, changes_of(LLAMA_FIELDS))
def test_any_source_field_value_is_accepted_or_refused(changes: dict[str, Any]) -> None:
    """The Llama converts, or a ValueError names the problem."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        save_llama(place / "llama", tokenizer=False)
        path = place / "llama" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        try:
            gda.convert(place / "llama", place / "out", dry_run=True)
        except ValueError as error:
            one_line(error)
            if "config.json" not in str(error):
                says_well(error, {*LLAMA_FIELDS, *GDA_FIELDS, *changes})
        assert os.listdir(place) == ["llama"]
