"""Motif-2 and Motif-2.6B: read, computed as their equations say, and given back bit for bit."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gda
from gda import GDAConfig, GDAForCausalLM

from . import naive
from .llamas import byte_tokenizer, change_config, tensors_of
from .relatives import motif_config, save_motif
from .tiny import relative_error, token_ids

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
    "tied": {"tie_word_embeddings": True},
    "silu": {"hidden_act": "silu"},
    "lower case": {"model_type": "motif"},
    "rope_parameters": {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
}


def by_hand(fields: dict[str, Any]) -> GDAConfig:
    """The equations of a Motif's config.json as a GDAConfig, written down here and not by the converter."""
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
    """A tiny Motif in `folder`/motif, and what it becomes, whose path is returned."""
    gda.convert(save_motif(folder / "motif", **changes), folder / "gda")
    return folder / "gda"


# --------------------------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_converted_motif_computes_the_equations(variant: str, tmp_path: Path) -> None:
    """Logits against the loop-by-loop reading of the source's own tensors and config, whole and from the cache."""
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
def test_the_agreement_rests_on_each_field(field: str, wrong: Any, tmp_path: Path) -> None:
    """Another value of one field is another model: the comparison above could not pass with it."""
    state, right, ids = tensors_of(save_motif(tmp_path / "motif")), by_hand(motif_config()), token_ids(1, 11)
    other = by_hand(motif_config())
    setattr(other, field, wrong)
    expected = naive.run(state, right, ids).logits
    assert relative_error(naive.run(state, other, ids).logits, expected) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_kept_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    """Names, dtypes and bits are the source's; the report says that nothing was run, and so does the card."""
    report = gda.convert(save_motif(tmp_path / "motif", dtype=dtype), tmp_path / "gda")
    before, after = tensors_of(tmp_path / "motif"), tensors_of(tmp_path / "gda")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    assert report.verification is not None
    assert (report.verification.method, report.verification.passed) == ("tensors", True)
    assert "nothing was run" in (tmp_path / "gda" / "README.md").read_text()
    made = json.loads((tmp_path / "gda" / "conversion.json").read_text())
    assert made["settings"]["mode"] == "map"
    assert {tensor["how"] for tensor in made["tensors"].values()} == {"copied"}


def test_lambda_stays_in_float32_under_a_lower_dtype(tmp_path: Path) -> None:
    """--dtype narrows the weights, not λ, and is said to be lossy."""
    report = gda.convert(save_motif(tmp_path / "motif"), tmp_path / "gda", dtype="bfloat16")
    dtypes = {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "gda").items()}
    assert all((dtype == torch.float32) == (".lambda_" in name) for name, dtype in dtypes.items())
    assert any("not lossless" in note for note in report.notes)
    assert report.verification is not None
    assert report.verification.passed


def test_the_converted_config_says_everything(tmp_path: Path) -> None:
    """Each field that decides what is computed, and none of the source's remote code."""
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


def test_tokenizer_and_licence_come_along_and_code_does_not(tmp_path: Path) -> None:
    """What lies beside the weights is copied, except what could be run."""
    source = save_motif(tmp_path / "motif")
    byte_tokenizer().save_pretrained(source)
    (source / "LICENSE").write_text("as you like")
    (source / "modeling_motif.py").write_text("raise SystemExit('run')")
    (source / "configuration_motif.py").write_text("raise SystemExit('run')")
    gda.convert(source, tmp_path / "gda")
    there = set(os.listdir(tmp_path / "gda"))
    assert {"tokenizer.json", "LICENSE", "modeling_gda.py"} <= there
    assert not {"modeling_motif.py", "configuration_motif.py"} & there


def test_verify_compares_tensors_and_runs_nothing(tmp_path: Path) -> None:
    """`auto` is tensor by tensor, a changed tensor is named, and running is refused with the reason."""
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


# ---------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_the_same_motif_bit_for_bit(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The file of weights is the same file; the config has the fields that Motif's code reads, with their values."""
    folder = converted(tmp_path, **VARIANTS[variant], dtype=dtype)
    gda.export(folder, tmp_path / "back", format="motif")
    there, back = tmp_path / "motif", tmp_path / "back"
    assert (back / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (there, back))
    wanted = before | {"model_type": "Motif", "k_ratio": 1}
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


def test_scaled_rope_there_and_back(tmp_path: Path) -> None:
    """The older names of RoPE's fields: rope_theta and rope_scaling."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    folder = converted(tmp_path, rope_scaling=scaling)
    config = GDAConfig.from_pretrained(folder)
    assert config.rope_parameters == {**scaling, "rope_theta": 100.0}
    gda.export(folder, tmp_path / "back", format="motif")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (100.0, scaling)
