"""Motif-2 and Motif-2.6B: converted, compared with their equations, and exported bit for bit."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

import gda
from gda import GDAConfig, GDAForCausalLM

from ..support import naive
from ..support.commands import Command, assert_refused
from ..support.hub_server import Blob, Hub
from ..support.llamas import byte_tokenizer, change_config, files_of, save_llama, tensors_of
from ..support.relatives import motif_config, save_motif
from ..support.tiny import relative_error, tiny_model, token_ids

pytestmark = pytest.mark.sampled

TOLERANCE = 1e-5
# By name, what differs from 8 signal and 2 noise heads over two pairs of keys.
VARIANTS: dict[str, dict[str, Any]] = {
    "4:1": {},
    "GQA inside the pairs": {"num_key_value_heads": 2},
    "pairs fewer than noise heads": {"num_attention_heads": 20, "num_noise_heads": 4},
    "1:1 by the key": {"num_attention_heads": 8, "num_noise_heads": 4},
    "1:1, no key": {"num_attention_heads": 4, "num_noise_heads": ..., "k_ratio": ..., "hidden_size": 32},
    "1:1, null": {"num_attention_heads": 4, "num_noise_heads": None, "hidden_size": 32},
    "1:1, GQA": {"num_attention_heads": 8, "num_key_value_heads": 4, "num_noise_heads": ...},
    "no head_dim": {"num_attention_heads": 4, "num_noise_heads": ..., "head_dim": ..., "hidden_size": 32},
    "biases": {"use_bias": True},
    "biases in attention": {"attention_bias": True},
    "biases of q, k and v": {"qkv_bias": True},
    "biases of the output": {"use_bias": True, "qkv_bias": False},
    "tied": {"tie_word_embeddings": True},
    "silu": {"hidden_act": "silu"},
    "nulls": {"use_bias": None, "k_ratio": None, "sliding_window": None, "attention_dropout": None},
    "lower case": {"model_type": "motif"},
    "rope_parameters": {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
}


def by_hand(fields: dict[str, Any]) -> GDAConfig:
    """The GDAConfig for a Motif's config.json, written independently of the converter."""
    heads = fields["num_attention_heads"]
    theta = fields.get("rope_theta") or fields["rope_parameters"]["rope_theta"]
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "hidden_act")
    return GDAConfig(
        **{name: fields[name] for name in (*same, "rms_norm_eps", "tie_word_embeddings")},
        num_attention_heads=heads,
        num_noise_heads=fields.get("num_noise_heads") or heads // 2,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        kv_layout="paired",
        lambda_init_offset=-1,
        head_norm=True,
        head_norm_eps=fields["attn_rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )


def converted(folder: Path, **changes: Any) -> Path:
    """A tiny Motif in `folder`/motif, and the path of its conversion."""
    gda.convert(save_motif(folder / "motif", **changes), folder / "gda")
    return folder / "gda"


# -------------------------------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_motif_matches_the_equations(variant: str, tmp_path: Path) -> None:
    """Logits against the loops of the reference, with and without a cache."""
    folder = converted(tmp_path, **VARIANTS[variant])
    config = by_hand(motif_config(**VARIANTS[variant]))
    ids = token_ids(2, 11)
    expected = naive.run(tensors_of(tmp_path / "motif"), config, ids).logits
    model = GDAForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert relative_error(model(ids).logits, expected) <= TOLERANCE
        first = model(ids[:, :6], use_cache=True)
        rest = model(ids[:, 6:], past_key_values=first.past_key_values).logits
    assert relative_error(torch.cat((first.logits, rest), dim=1), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("lambda_init_offset", 0),
        ("head_norm_eps", 1e-3),
        ("hidden_act", "silu"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 99.0}),
        ("rms_norm_eps", 1e-3),
    ],
)
def test_every_field_affects_the_comparison(field: str, wrong: Any, tmp_path: Path) -> None:
    """With another value of any field, the comparison above fails."""
    state, right, ids = tensors_of(save_motif(tmp_path / "motif")), by_hand(motif_config()), token_ids(1, 11)
    other = by_hand(motif_config())
    setattr(other, field, wrong)
    expected = naive.run(state, right, ids).logits
    assert relative_error(naive.run(state, other, ids).logits, expected) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_unchanged(dtype: torch.dtype, tmp_path: Path) -> None:
    """Names, dtypes and bits. Report and card say that no model was run."""
    report = gda.convert(save_motif(tmp_path / "motif", dtype=dtype), tmp_path / "gda")
    before, after = tensors_of(tmp_path / "motif"), tensors_of(tmp_path / "gda")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    assert report.verification is not None
    assert (report.verification.method, report.verification.passed) == ("tensors", True)
    assert "the models were not run" in (tmp_path / "gda" / "README.md").read_text()
    made = json.loads((tmp_path / "gda" / "conversion.json").read_text())
    assert made["settings"]["mode"] == "map"
    assert {tensor["how"] for tensor in made["tensors"].values()} == {"copied"}


def test_lambda_stays_in_float32(tmp_path: Path) -> None:
    """--dtype casts the other weights and is reported as lossy."""
    report = gda.convert(save_motif(tmp_path / "motif"), tmp_path / "gda", dtype="bfloat16")
    dtypes = {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "gda").items()}
    assert all((dtype == torch.float32) == (".lambda_" in name) for name, dtype in dtypes.items())
    assert any("not lossless" in note for note in report.notes)
    assert report.verification is not None
    assert report.verification.passed


def test_converted_config(tmp_path: Path) -> None:
    """It has every field that affects the result, and no reference to remote code."""
    config = json.loads((converted(tmp_path) / "config.json").read_text())
    wanted = {
        "model_type": "gda",
        "kv_layout": "paired",
        "num_attention_heads": 10,
        "num_noise_heads": 2,
        "num_key_value_heads": 4,
        "lambda_type": "reparameterized",
        "lambda_init": None,
        "lambda_init_offset": -1,
        "head_norm": True,
        "head_norm_eps": 2e-5,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 2,
    }
    assert {name: config[name] for name in wanted} == wanted
    assert "motif" not in json.dumps(config).lower()
    first = GDAConfig.from_pretrained(tmp_path / "gda").layer_lambda_init(0)
    assert first == pytest.approx(-0.00991528, abs=1e-8)  # 0.8 − 0.6 · e^0.3


def test_tokenizer_and_licence_are_copied_but_not_code(tmp_path: Path) -> None:
    source = save_motif(tmp_path / "motif")
    byte_tokenizer().save_pretrained(source)
    (source / "LICENSE").write_text("as you like")
    (source / "modeling_motif.py").write_text("raise SystemExit('run')")
    (source / "configuration_motif.py").write_text("raise SystemExit('run')")
    gda.convert(source, tmp_path / "gda")
    there = set(os.listdir(tmp_path / "gda"))
    assert {"tokenizer.json", "LICENSE", "modeling_gda.py"} <= there
    assert not {"modeling_motif.py", "configuration_motif.py"} & there


def test_verify_compares_tensors(tmp_path: Path) -> None:
    """`auto` chooses "tensors", a changed tensor is named, and running is refused with the reason."""
    folder = converted(tmp_path)
    assert gda.verify(tmp_path / "motif", folder).method == "tensors"
    for method in ("full", "layers"):
        with pytest.raises(ValueError, match="transformers has no class for a motif model"):
            gda.verify(tmp_path / "motif", folder, method=method)
    tensors = tensors_of(folder)
    tensors["model.layers.1.self_attn.subln.weight"][3] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = gda.verify(tmp_path / "motif", folder)
    assert not report.passed
    assert report.different_tensors == ["model.layers.1.self_attn.subln.weight"]
    change_config(folder, lambda_init_offset=0)
    with pytest.raises(ValueError, match="lambda_init_offset"):
        gda.verify(tmp_path / "motif", folder)


# --------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize(
    ("variant", "dtype"), zip(VARIANTS, itertools.cycle([torch.float32, torch.bfloat16]), strict=False)
)
def test_round_trip_is_bit_for_bit(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The weight file is identical, and the config has the fields that Motif's code reads."""
    folder = converted(tmp_path, **VARIANTS[variant], dtype=dtype)
    gda.export(folder, tmp_path / "back", format="motif")
    there, back = tmp_path / "motif", tmp_path / "back"
    assert (back / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (there, back))
    wanted = {name: value for name, value in before.items() if value is not None}
    wanted |= {"model_type": "Motif", "k_ratio": 1, "rope_scaling": None}
    wanted["head_dim"] = before.get("head_dim") or before["hidden_size"] // before["num_attention_heads"]
    wanted["rope_theta"] = before.get("rope_theta") or before["rope_parameters"]["rope_theta"]
    for name in ("auto_map", "rope_parameters", "num_noise_heads"):
        wanted.pop(name, None)
    assert {name: after[name] for name in wanted} == wanted
    heads = before["num_attention_heads"]
    assert after.get("num_noise_heads", heads // 2) == (before.get("num_noise_heads") or heads // 2)
    gda.convert(back, tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == tensors_of(folder).keys()
    assert GDAConfig.from_pretrained(tmp_path / "again").to_dict() == GDAConfig.from_pretrained(folder).to_dict()


def test_round_trip_with_scaled_rope(tmp_path: Path) -> None:
    """With the older names rope_theta and rope_scaling."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    folder = converted(tmp_path, rope_scaling=scaling)
    config = GDAConfig.from_pretrained(folder)
    assert config.rope_parameters == {**scaling, "rope_theta": 100.0}
    gda.export(folder, tmp_path / "back", format="motif")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (100.0, scaling)


# ------------------------------------------------------------------------------------------------------------ bad input


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "k_ratio": ({"k_ratio": 2}, "k_ratio=2"),
    "odd heads": ({"num_attention_heads": 5, "num_noise_heads": ...}, "num_attention_heads=5 is odd"),
    "no heads": ({"num_attention_heads": 0, "num_noise_heads": ...}, "num_attention_heads must be from 1"),
    "no width": ({"hidden_size": ...}, "has no hidden_size"),
    "null": ({"num_key_value_heads": None}, "has no num_key_value_heads"),
    "a string": ({"num_noise_heads": "two"}, "num_noise_heads"),
    "noise that does not divide": ({"num_noise_heads": 3}, "num_noise_heads"),
    "odd KV heads": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "Motif-3": ({"q_lora_rank": 512}, "q_lora_rank, a field of Motif-3"),
    "GDLA": ({"model_type": "motif3"}, "motif3 cannot be converted: the keys and values of Motif-3 are latent"),
    "Phi-4": ({"model_type": "phi4flash"}, "phi4flash cannot be converted: in Phi-4-mini-flash-reasoning, Mamba"),
    "axolotl's": (
        {"model_type": "llama-differential"},
        "llama-differential cannot be converted: the tensors of axolotl's",
    ),
    "seeing ahead": ({"is_causal": False}, "is_causal=false"),
    "experts": ({"num_experts": 8}, "num_experts, a field of Motif-3"),
    "layer types": ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    "layer types of a number": ({"layer_types": 5}, "layer_types"),
    "rotated in part": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "noise of none": ({"num_noise_heads": 0}, "num_noise_heads"),
    "windows": ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
    "an activation": ({"hidden_act": "poly"}, "hidden_act"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "rope": ({"rope_scaling": {"rope_type": "twisted"}}, "rope"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_impossible_config_is_refused(name: str, tmp_path: Path, command: Command) -> None:
    """File, field and reason in one line, exit code 2, and no files."""
    changes, named = BAD_CONFIGS[name]
    source = save_motif(tmp_path / "motif")
    change_config(source, **changes)
    outcome = command("convert", source, tmp_path / "gda")
    assert (outcome.code, outcome.out) == (2, "")
    assert len(outcome.error.splitlines()) == 1
    assert named in outcome.error
    assert "config.json" in outcome.error
    assert os.listdir(tmp_path) == ["motif"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.self_attn.subln.weight"),
            "has no tensor model.layers.1.self_attn.subln",
        ),
        (lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(80)}), "q_proj.bias"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(23)}), "model.norm.weight has shape"),
        (lambda tensors: tensors.pop("model.layers.0.mlp.act_fn.bias"), "act_fn.bias"),
    ],
    ids=["missing", "superfluous", "misshapen", "no PolyNorm"],
)
def test_tensors_that_do_not_fit_the_config_are_named(
    change: Any, named: str, tmp_path: Path, command: Command
) -> None:
    """The first one that is missing, superfluous or of another shape."""
    source = save_motif(tmp_path / "motif")
    tensors = tensors_of(source)
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_refused(command("convert", source, tmp_path / "gda"), named)


@pytest.mark.parametrize("option", [("--ratio", "4"), ("--noise-heads", "2"), ("--lambda-type", "tanh")])
def test_options_for_llamas_are_refused(option: tuple[str, str], tmp_path: Path, command: Command) -> None:
    """A Motif already has noise heads and λ."""
    outcome = command("convert", save_motif(tmp_path / "motif"), tmp_path / "gda", *option)
    reason = "is only for a Llama, Mistral or Qwen; motif is a motif model and already has noise heads"
    assert_refused(outcome, f"gda: {option[0]} {reason}")
    assert os.listdir(tmp_path) == ["motif"]


def test_wrong_mode_is_refused(tmp_path: Path, command: Command) -> None:
    """expand is for models without noise heads, and map for models with them."""
    motif, llama = save_motif(tmp_path / "motif"), save_llama(tmp_path / "llama")
    expanded = command("convert", motif, tmp_path / "gda", "--mode", "expand")
    assert_refused(expanded, "--mode expand needs a model without noise heads; use --mode map")
    mapped = command("convert", llama, tmp_path / "gda", "--mode", "map")
    assert_refused(mapped, "--mode map needs a model with noise heads; use --mode expand")
    assert command("convert", llama, tmp_path / "gda", "--mode", "relabel").code == 2
    assert command("convert", motif, tmp_path / "gda", "--mode", "map").code == 0


def test_missing_fields_get_defaults_with_a_note(tmp_path: Path, command: Command) -> None:
    source = save_motif(tmp_path / "motif", attn_rms_norm_eps=..., rope_theta=..., max_position_embeddings=...)
    outcome = command("convert", source, tmp_path / "gda")
    assert "note: config.json has no attn_rms_norm_eps; 1e-05 is assumed" in outcome.out
    assert "note: config.json has no rope_theta; 10000.0 is assumed" in outcome.out
    assert "note: config.json has no max_position_embeddings; 8192 is assumed" in outcome.out
    config = GDAConfig.from_pretrained(tmp_path / "gda")
    assert (config.head_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 10000.0)


def test_unused_window_is_dropped_with_a_note(tmp_path: Path) -> None:
    report = gda.convert(
        save_motif(tmp_path / "motif", sliding_window=4096, use_sliding_window=False), tmp_path / "gda"
    )
    assert any("sliding_window=4096 is dropped" in note for note in report.notes)
    assert report.config.sliding_window is None


def test_motif_on_the_hub_is_converted_without_its_code(tmp_path: Path, hub: Hub, command: Command) -> None:
    """Config and weights are downloaded, and the code beside them is not."""
    source = save_motif(tmp_path / "motif")
    for name in ("configuration_motif.py", "modeling_motif.py"):
        (source / name).write_text("raise SystemExit")
    huggingface_hub.create_repo("some-one/motif")
    files = {path: Blob(data, path.endswith(".safetensors")) for path, data in files_of(source).items()}
    commit = hub.repos["some-one/motif"].commit("main", "all of it", files)
    outcome = command("convert", "some-one/motif", tmp_path / "gda")
    assert outcome.code == 0, outcome.error
    assert not hub.asked(r"resolve/.*\.py$")
    made = json.loads((tmp_path / "gda" / "conversion.json").read_text())
    assert (made["source"]["model_type"], made["source"]["revision"]) == ("motif", commit)


def test_output_of_the_commands(tmp_path: Path, command: Command) -> None:
    """The head map, the verification and, for export, what is not written."""
    outcome = command("convert", save_motif(tmp_path / "motif"), tmp_path / "gda")
    assert "8 signal + 2 noise, 4:1, 3 layers" in outcome.out
    assert "verified tensor by tensor, without running the models: 0 differ" in outcome.out
    outcome = command("export", tmp_path / "gda", tmp_path / "back", "--format", "motif")
    assert "note: Motif's own code is not written" in outcome.out
    assert command("verify", tmp_path / "motif", tmp_path / "gda").code == 0
    assert_refused(command("inspect", tmp_path / "motif"), "gda convert")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kv_layout": "shared"}, "kv_layout"),
        ({"lambda_type": "sigmoid"}, "lambda_type"),
        ({"head_norm": False}, "head_norm"),
        ({"qk_norm": True}, "qk_norm"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"lambda_init_offset": 0}, "λ_init of layer 0"),
        ({"lambda_init": [-0.00991528454, 0.3]}, "λ_init of layer 0"),
        ({"qk_rank": 2}, "qk_rank"),
    ],
    ids=str,
)
def test_inexpressible_models_are_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    """The message names the field or layer, and no files are written."""
    fitting = {"kv_layout": "paired", "lambda_init_offset": -1, "head_norm": True, "hidden_act": "poly_norm"}
    tiny_model(**(fitting | changes)).save_pretrained(tmp_path / "gda")
    with pytest.raises(ValueError, match=named):
        gda.export(tmp_path / "gda", tmp_path / "back", format="motif")
    assert not (tmp_path / "back").exists()


def test_killed_conversion_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished shards are kept."""
    from gda.conversion.tensors.safetensors_io import SafetensorsReader

    source = save_motif(tmp_path / "motif")
    read, calls = SafetensorsReader.read, []

    def stopping(self: SafetensorsReader, name: str) -> torch.Tensor:
        calls.append(name)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return read(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(SafetensorsReader, "read", stopping)
        with pytest.raises(KeyboardInterrupt):
            gda.convert(source, tmp_path / "gda", max_shard_size="20KB")
    gda.convert(source, tmp_path / "gda", max_shard_size="20KB", resume=True)
    gda.convert(source, tmp_path / "whole", max_shard_size="20KB")
    before, after = files_of(tmp_path / "whole"), files_of(tmp_path / "gda")
    assert before.keys() == after.keys()
    assert all(before[name] == after[name] for name in before if name != "README.md")
