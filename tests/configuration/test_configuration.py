"""GDAConfig: defaults, rules, config.json, and models of every valid configuration."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from transformers import AutoConfig

from gda import GDAConfig, GDAForCausalLM, GDAModel
from gda.configuration.configuration_gda import FADED

from ..support.config_fields import ANY_FIELDS, OWN_FIELDS, possible_fields
from ..support.tiny import tiny_config, tiny_model, token_ids

# A value for every field of GDAConfig, none of them its default.
NO_DEFAULT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_noise_heads": 3,
    "num_key_value_heads": 6,
    "head_dim": 6,
    "kv_layout": "paired",
    "lambda_type": "tanh",
    "lambda_init": [0.1, 0.25],
    "lambda_init_offset": -1,
    "head_norm": True,
    "head_norm_eps": 0.5,
    "qk_norm": True,
    "qk_rank": 2,
    "fade": 0.25,
    "masked_signal_heads": 1,
    "masked_neurons": 7,
    "masked_layers": [1],
    "blended_layers": True,
    "faded_head_norm": True,
    "lambda_target": 0.2,
    "hidden_act": "poly_norm",
    "max_position_embeddings": 99,
    "initializer_range": 0.5,
    "rms_norm_eps": 0.25,
    "use_cache": False,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": [2, 4],
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 77.0, "factor": 3.0},
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}
# Fields that hold one value only.
FIXED: dict[str, Any] = {"attention_dropout": 0.0}


def test_defaults() -> None:
    """`GDAConfig()` has Llama-3-8B's shape, with 40 query heads, of which 8 are noise heads, and 8 KV heads."""
    config = GDAConfig()
    expected = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 40,
        "num_noise_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "kv_layout": "shared",
        "lambda_type": "reparameterized",
        "lambda_init": None,
        "lambda_init_offset": 0,
        "head_norm": False,
        "qk_norm": False,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.model_type == "gda"


@pytest.mark.parametrize(
    ("heads", "noise", "signal", "ratio"), [(40, 8, 32, 4), (12, 3, 9, 3), (2, 1, 1, 1), (8, 1, 7, 7), (24, 4, 20, 5)]
)
def test_derived_head_counts(heads: int, noise: int, signal: int, ratio: int) -> None:
    """Signal heads are the query heads minus the noise heads; the ratio is signal heads per noise head."""
    config = tiny_config(num_attention_heads=heads, num_noise_heads=noise, num_key_value_heads=1)
    assert (config.num_signal_heads, config.signal_noise_ratio) == (signal, ratio)


@pytest.mark.parametrize("name", ["num_signal_heads", "signal_noise_ratio", "signal_group_size", "value_width"])
def test_derived_properties_are_read_only(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(tiny_config(), name, 1)


def test_value_width() -> None:
    """head_dim in the shared layout, and twice that in the paired one."""
    assert tiny_config(head_dim=10).value_width == 10
    assert tiny_config(head_dim=10, kv_layout="paired").value_width == 20


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.2, 0.8 - 0.6 * 0.7408182206817179]),
        ({"lambda_init_offset": -1}, [-0.00991528454552, 0.2]),
        ({"lambda_init_offset": 1}, [0.8 - 0.6 * 0.7408182206817179, 0.8 - 0.6 * 0.5488116360940264]),
        ({"lambda_init": 0.3}, [0.3, 0.3]),
        ({"lambda_init": 0}, [0.0, 0.0]),
        ({"lambda_init": [0.5, -1]}, [0.5, -1.0]),
    ],
    ids=str,
)
def test_lambda_init_of_a_layer(fields: dict[str, Any], expected: list[float]) -> None:
    """The depth schedule, one value for all layers, or a list."""
    config = tiny_config(**fields)
    assert [config.layer_lambda_init(layer) for layer in (0, 1)] == pytest.approx(expected, abs=1e-12)


def test_layer_types_are_filled_in() -> None:
    """Without `layer_types`, all layers slide if there is a window, and none otherwise."""
    assert tiny_config(num_hidden_layers=3).layer_types == ["full_attention"] * 3
    assert tiny_config(num_hidden_layers=3, sliding_window=4).layer_types == ["sliding_attention"] * 3


@pytest.mark.parametrize("bias", [True, False])
def test_attention_out_bias_defaults_to_attention_bias(bias: bool) -> None:
    """It is set at construction and saved. Setting it to None later is refused."""
    assert tiny_config(attention_bias=bias).attention_out_bias is bias
    config = tiny_config(attention_bias=bias, attention_out_bias=not bias)
    assert json.loads(config.to_json_string())["attention_out_bias"] is not bias
    attention = GDAModel(config).layers[0].self_attn
    assert [getattr(attention, f"{name}_proj").bias is not None for name in "qkvo"] == [bias, bias, bias, not bias]
    factored = tiny_config(attention_bias=bias, attention_out_bias=not bias, qk_rank=2)
    attention = GDAModel(factored).layers[0].self_attn
    assert (attention.q_up.bias is not None, attention.o_proj.bias is not None) == (bias, not bias)
    config.attention_out_bias = None
    with pytest.raises(ValueError, match=r"GDAConfig\.attention_out_bias must be true or false"):
        GDAModel(config)


@pytest.mark.parametrize("fields", [{}, {"lambda_type": "tanh"}, {"head_norm": True, "qk_norm": True}], ids=str)
def test_tensor_parallel_plan_names_modules(fields: dict[str, Any]) -> None:
    """Every entry of the plan matches modules of the model."""
    model = GDAModel(tiny_config(**fields))
    names = {name for name, _ in model.named_modules()}
    for pattern in model.config.base_model_tp_plan:
        for layer in range(model.config.num_hidden_layers):
            assert pattern.replace("*", str(layer)) in names


# Changes, the field that the error must name, and words of its rule.
BROKEN_RULES: list[tuple[dict[str, Any], str, str]] = [
    *(
        ({name: value}, name, "at least 1")
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_noise_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "sliding_window",
        )
        for value in (0, -2)
    ),
    *(({name: value}, name, "positive") for name in ("rms_norm_eps", "head_norm_eps") for value in (0, -1e-5)),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps", "positive"),
    ({"kv_layout": "split"}, "kv_layout", "one of ('shared', 'paired')"),
    ({"hidden_act": "polynorm"}, "hidden_act", "an activation of transformers"),
    ({"attention_dropout": 0.1}, "attention_dropout", "must be 0"),
    ({"num_noise_heads": 8}, "num_noise_heads", "below num_attention_heads=8"),
    ({"num_noise_heads": 9}, "num_noise_heads", "below num_attention_heads=8"),
    ({"num_noise_heads": 3}, "num_noise_heads", "divide the number of signal heads (5"),
    ({"num_noise_heads": 5}, "num_noise_heads", "divide the number of signal heads (3"),
    ({"num_key_value_heads": 4}, "num_key_value_heads", "divide the number of signal heads (6)"),
    ({"num_attention_heads": 8, "num_noise_heads": 2, "num_key_value_heads": 3}, "num_noise_heads", "multiple of it"),
    ({"kv_layout": "paired", "num_key_value_heads": 3}, "num_key_value_heads", "even"),
    ({"kv_layout": "paired", "num_key_value_heads": 8}, "num_key_value_heads", "divide both"),
    ({"kv_layout": "paired", "num_key_value_heads": 12}, "num_key_value_heads", "divide both"),
    ({"lambda_type": "exp"}, "lambda_type", "one of ('reparameterized', 'sigmoid', 'tanh')"),
    ({"lambda_init": [0.1]}, "lambda_init", "one value for each of the 2 layers"),
    ({"lambda_init": []}, "lambda_init", "one value for each of the 2 layers"),
    ({"lambda_init": float("inf")}, "lambda_init", "finite"),
    ({"lambda_init": [0.1, float("nan")]}, "lambda_init", "finite"),
    ({"layer_types": ["full_attention"]}, "layer_types", "one type for each of the 2 layers"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types", "may hold only"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window", "must be given"),
    ({"fade": 0.5}, "fade", "nothing is faded in"),
    ({"fade": 1.5, "masked_neurons": 1}, "fade", "from 0 to 1"),
    ({"fade": -0.5, "masked_neurons": 1}, "fade", "from 0 to 1"),
    ({"fade": float("nan"), "masked_neurons": 1}, "fade", "from 0 to 1"),
    ({"fade": 1.5, "lambda_target": 0.2}, "fade", "from 0 to 1"),
    ({"fade": float("nan"), "lambda_target": 0.2}, "fade", "from 0 to 1"),
    ({"fade": "half"}, "fade", "expected"),
    *(
        ({name: value}, name, "must be None if fade is")
        for name, value in (
            ("masked_signal_heads", 1),
            ("masked_neurons", 1),
            ("masked_layers", [1]),
            ("lambda_target", 0.2),
            ("blended_layers", True),
            ("faded_head_norm", True),
        )
    ),
    *(({"fade": 0, "masked_signal_heads": value}, "masked_signal_heads", "from 1 to 2") for value in (0, -1, 3)),
    *(({"fade": 0, "masked_neurons": value}, "masked_neurons", "from 1 to 39") for value in (0, -1, 40)),
    *(
        ({"fade": 0, "masked_layers": value}, "masked_layers", "some, not all, of the 2 layers")
        for value in ([], [0, 1], [1, 1])
    ),
    *(({"fade": 0, "masked_layers": value}, "masked_layers", "from 0 to 1") for value in ([2], [-1])),
    ({"fade": 0, "masked_signal_heads": 1, "num_attention_heads": 4}, "masked_signal_heads", "must be None"),
    ({"fade": 0.5, "blended_layers": True, "masked_neurons": 1}, "blended_layers", "with masked_layers"),
    ({"fade": 0.5, "blended_layers": False, "masked_layers": [1]}, "blended_layers", "with masked_layers"),
    ({"fade": 0.5, "faded_head_norm": True}, "faded_head_norm", "with head_norm"),
    ({"fade": 0.5, "faded_head_norm": False, "head_norm": True}, "faded_head_norm", "with head_norm"),
    ({"fade": 0.5, "lambda_target": float("inf")}, "lambda_target", "finite"),
    ({"head_dim": 7}, "head_dim", "even for rotary embeddings"),
    ({"rope_parameters": {"rope_type": "mrope"}}, "rope_parameters", "rope_type must be one of"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters", "factor"),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope_parameters",
        "partial_rotary_factor must be 1.0",
    ),
    ({"partial_rotary_factor": 0.5}, "rope_parameters", "partial_rotary_factor must be 1.0"),
    ({"num_noise_heads": "2"}, "num_noise_heads", "expected int, got str"),
    ({"num_noise_heads": 2.0}, "num_noise_heads", "expected int, got float"),
    ({"num_noise_heads": None}, "num_noise_heads", "expected int, got NoneType"),
    ({"head_norm": 1}, "head_norm", "expected bool, got int"),
    ({"kv_layout": None}, "kv_layout", "expected str, got NoneType"),
    ({"lambda_init": "auto"}, "lambda_init", "expected"),
    ({"layer_types": [1, 2]}, "layer_types", "expected"),
]


@pytest.mark.parametrize(("changes", "field", "rule"), BROKEN_RULES, ids=lambda value: str(value)[:60])
def test_broken_rule_is_named(changes: dict[str, Any], field: str, rule: str) -> None:
    """The ValueError names the field and its rule."""
    tiny_config()
    with pytest.raises(ValueError, match="GDAConfig") as error:
        tiny_config(**changes)
    message = str(error.value)
    assert message.startswith(f"GDAConfig.{field}")
    assert rule in message


@pytest.mark.parametrize(
    ("changes", "value"),
    [({"num_noise_heads": 3}, "3"), ({"kv_layout": "split"}, "'split'"), ({"lambda_init": [0.1]}, "[0.1]")],
    ids=str,
)
def test_error_shows_the_value(changes: dict[str, Any], value: str) -> None:
    """At the end of the message."""
    with pytest.raises(ValueError, match="GDAConfig") as error:
        tiny_config(**changes)
    assert str(error.value).endswith(f"got {value}.")


TYPOS = {
    "num_noise_head": "num_noise_heads",
    "n_noise_heads": "num_noise_heads",
    "kv_layuot": "kv_layout",
    "lambda_typ": "lambda_type",
    "lamda_init": "lambda_init",
    "lambda_init_ofset": "lambda_init_offset",
    "headnorm": "head_norm",
    "head_norms_eps": "head_norm_eps",
    "qknorm": "qk_norm",
    "attention_output_bias": "attention_out_bias",
    "fades": "fade",
    "mask_neurons": "masked_neurons",
    "lamda_target": "lambda_target",
}


@pytest.mark.parametrize(("typo", "meant"), TYPOS.items())
def test_misspelled_field_is_refused(typo: str, meant: str) -> None:
    """The message names the field that was probably meant."""
    with pytest.raises(ValueError, match=f"no field `{typo}`; did you mean `{meant}`"):
        tiny_config(**{typo: 1})


@pytest.mark.parametrize("name", ["preset", "layer_type", "_whole"])
def test_taken_name_is_refused(name: str) -> None:
    """As a field, it would hide a method, or what the config keeps for itself."""
    with pytest.raises(ValueError, match=f"{name} is not a field of a config"):
        tiny_config(**{name: "full_attention"})


def test_other_arguments_are_kept() -> None:
    """Arguments that resemble none of our fields are saved in config.json."""
    config = tiny_config(source_of_data="a tool")
    assert json.loads(config.to_json_string())["source_of_data"] == "a tool"


@pytest.mark.parametrize("model_class", [GDAModel, GDAForCausalLM])
def test_rules_are_checked_when_a_model_is_built(model_class: type) -> None:
    """For fields that were changed after construction."""
    config = tiny_config()
    config.num_noise_heads = 3
    with pytest.raises(ValueError, match=r"GDAConfig\.num_noise_heads must divide"):
        model_class(config)
    config = tiny_config(pad_token_id=5)
    config.vocab_size = 5
    with pytest.raises(ValueError, match=r"pad_token_id"):
        model_class(config)


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 4}])
def test_more_layers_of_the_same_type(fields: dict[str, Any]) -> None:
    """As PEFT's `layer_replication` sets them; with layers of several types, it is unknown which the new ones have."""
    config = tiny_config(**fields)
    (kind,) = set(config.layer_types)
    config.num_hidden_layers += 2
    assert config.layer_types == [kind] * config.num_hidden_layers
    config.validate_architecture()
    config.num_hidden_layers -= 2
    assert config.to_dict() == tiny_config(**fields).to_dict()


def test_wrong_type_is_refused_on_assignment() -> None:
    with pytest.raises(ValueError, match=r"GDAConfig\.hidden_size: .*expected int, got str"):
        tiny_config().hidden_size = "24"


def test_every_field_is_tested() -> None:
    """The table of values above covers all fields and contains no default."""
    assert NO_DEFAULT.keys() | FIXED.keys() == OWN_FIELDS
    default = GDAConfig()
    assert not [name for name, value in NO_DEFAULT.items() if getattr(default, name) == value]


@pytest.mark.parametrize("fields", [{}, NO_DEFAULT], ids=["defaults", "no-default"])
def test_json_round_trip(fields: dict[str, Any], tmp_path: Path) -> None:
    """Every field is read back unchanged, and is saved with a default value too; those of fading only if one is set."""
    config = GDAConfig(**fields)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "gda"
    own = [name for name in OWN_FIELDS if config.fade is not None or name not in ("fade", *FADED)]
    assert {name: written.get(name) for name in OWN_FIELDS} == {name: getattr(config, name) for name in OWN_FIELDS}
    assert set(own) == written.keys() & set(OWN_FIELDS)
    for name, value in fields.items():
        assert written[name] == value
    for loaded in (GDAConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is GDAConfig
        assert {name: getattr(loaded, name) for name in OWN_FIELDS} == {name: written.get(name) for name in OWN_FIELDS}


def test_auto_config() -> None:
    config = AutoConfig.for_model("gda", num_attention_heads=6, num_noise_heads=1, num_key_value_heads=1)
    assert type(config) is GDAConfig
    assert config.signal_noise_ratio == 5


def heads_are_possible(heads: int, noise: int, key_value: int, kv_layout: str) -> bool:
    """The rules of head counts, written independently: signal i and noise i // r must find their KV heads."""
    signal = heads - noise
    if noise < 1 or key_value < 1 or signal < 1 or signal % noise:
        return False
    if kv_layout == "shared":
        return signal % key_value == 0 and (noise % key_value == 0 or key_value % noise == 0)
    return key_value % 2 == 0 and signal % (key_value // 2) == 0 and noise % (key_value // 2) == 0


@pytest.mark.parametrize("kv_layout", ["shared", "paired"])
def test_exactly_the_possible_head_counts_are_accepted(kv_layout: str) -> None:
    """Over a grid of head counts."""
    outcomes = set()
    for heads, noise, key_value in product(range(1, 11), range(5), range(7)):
        counts = {"num_attention_heads": heads, "num_noise_heads": noise, "num_key_value_heads": key_value}
        possible = heads_are_possible(heads, noise, key_value, kv_layout)
        outcomes.add(possible)
        if possible:
            tiny_config(kv_layout=kv_layout, **counts)
        else:
            with pytest.raises(ValueError, match=r"^GDAConfig\.num_"):
                tiny_config(kv_layout=kv_layout, **counts)
    assert outcomes == {True, False}


def check_it_runs(config: GDAConfig) -> None:
    torch.manual_seed(0)
    model = GDAForCausalLM(config).eval()
    with torch.no_grad():
        logits = model(torch.zeros(2, 5, dtype=torch.long)).logits
    assert logits.shape == (2, 5, config.vocab_size)
    assert logits.isfinite().all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(ANY_FIELDS)
def test_any_integers_run_or_are_refused_by_name(fields: dict[str, Any]) -> None:
    """For any integers, the model runs or a ValueError names one of the fields."""
    try:
        config = tiny_config(**fields)
    except ValueError as error:
        message = str(error)
        assert message.startswith("GDAConfig.")
        assert message.removeprefix("GDAConfig.").split()[0].rstrip(":") in OWN_FIELDS
        return
    check_it_runs(config)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(possible_fields())
def test_every_valid_config_runs(fields: dict[str, Any]) -> None:
    """It is accepted and gives finite logits."""
    check_it_runs(tiny_config(**fields))


# Configs that no model can be built from, or none whose logits are finite.
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"pad_token_id": 61}, "pad_token_id"),
    ({"pad_token_id": -62}, "pad_token_id"),
    ({"initializer_range": -0.5}, "initializer_range"),
    ({"initializer_range": float("nan")}, "initializer_range"),
    ({"lambda_init_offset": -3000}, "lambda_init_offset"),
    ({"lambda_init_offset": -1000}, "lambda_init_offset"),
    ({"lambda_init_offset": float("nan")}, "lambda_init_offset"),
    ({"lambda_init": 10**400}, "lambda_init"),
    ({"lambda_init": 1e300}, "lambda_init"),
    ({"num_signal_heads": 6}, "num_signal_heads"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "linear", "factor": None}}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}}, "rope_parameters"),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
        "rope_parameters",
    ),
    (
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "factor": 2.0,
                "short_factor": [1.0, 2.0],
                "long_factor": [1.0, 2.0, 3.0],
            }
        },
        "rope_parameters",
    ),
    ({"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 2.0}}, "rope_parameters"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10.0}}}, "rope_parameters"),
    ({"rope_parameters": {"full_attention": 5}}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 2**24}}, "rope_parameters"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ({"initializer_range": 1e300}, "initializer_range"),
    ({"hidden_act": "xielu"}, "hidden_act"),
    ({"hidden_act": "prelu"}, "hidden_act"),
]


@pytest.mark.parametrize(("changes", "field"), IMPOSSIBLE, ids=lambda value: str(value)[:70])
def test_impossible_values_are_refused_by_name(changes: dict[str, Any], field: str) -> None:
    """The ValueError names the field."""
    with pytest.raises(ValueError, match=rf"^GDAConfig\.{field}"):
        tiny_config(**changes)


def test_field_named_cls() -> None:
    """A field `cls` is not taken for the argument of a class method."""
    assert GDAConfig.from_dict(tiny_config().to_dict() | {"cls": 1}).cls == 1


def test_long_values_are_shortened_in_messages() -> None:
    for name in ("hidden_act", "num_noise_heads", "lambda_init", "rope_parameters"):
        with pytest.raises(ValueError, match=f"GDAConfig.{name}") as error:
            tiny_config(**{name: "a" * 70_000})
        assert len(str(error.value)) < 1000


def test_config_json_has_no_class_variables(tmp_path: Path) -> None:
    config = tiny_config()
    config.save_pretrained(tmp_path)
    assert GDAConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    written = json.loads((tmp_path / "config.json").read_text())
    assert not written.keys() & {"default_theta", "keys_to_ignore_at_inference", "base_model_pp_plan"}


def test_model_without_defaults_reloads(tmp_path: Path) -> None:
    """A model without any default value reloads with the same config and logits."""
    model = tiny_model(GDAConfig(**NO_DEFAULT))
    model.save_pretrained(tmp_path)
    loaded = GDAForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in NO_DEFAULT} == NO_DEFAULT
    with torch.no_grad():
        assert torch.equal(loaded(token_ids(2, 9)).logits, model(token_ids(2, 9)).logits)


@pytest.mark.parametrize("factor", ["linear", "dynamic"])
def test_other_scaling_of_rope_keeps_its_base(factor: str, tmp_path: Path) -> None:
    """As an argument of `from_pretrained`, and set on a config."""
    tiny_config().save_pretrained(tmp_path)  # with a base of 100
    given = {"rope_type": factor, "factor": 2.0}
    config = AutoConfig.from_pretrained(tmp_path, rope_parameters=given)
    assert config.rope_parameters == given | {"rope_theta": 100.0}
    config.rope_parameters = {"rope_type": "default"}
    assert config.rope_parameters["rope_theta"] == 100.0
    config.rope_parameters = {"rope_type": "default", "rope_theta": 7.0}
    assert config.rope_theta == 7.0


def test_yarn_of_unknown_original_length() -> None:
    """It is the length of the model, as in transformers' own configs (which releases before 5 do not write down)."""
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    found = GDAModel(tiny_config(rope_parameters=rope)).rotary_emb.inv_freq
    expected = GDAModel(tiny_config(rope_parameters=rope | {"original_max_position_embeddings": 128}))
    assert torch.equal(found, expected.rotary_emb.inv_freq)
