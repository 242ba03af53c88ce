"""A GDA model with one λ per layer and no head norm, exported as a plain Llama, Mistral or Qwen."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

import gda
from gda.conversion.tensors.safetensors_io import SafetensorsReader
from gda.conversion.verify import VerificationFailed

from ..support.checkpoints import load, logits
from ..support.llamas import change_config, files_of, save_llama
from ..support.tiny import relative_error, tiny_config, tiny_model, token_ids

# By name: fields of the GDA model, and the type, query heads and KV heads that it is written with.
KINDS: dict[str, tuple[dict[str, Any], tuple[str, int, int]]] = {
    "N = G": ({}, ("llama", 8, 2)),
    "N > G": ({"num_attention_heads": 12, "num_noise_heads": 4}, ("llama", 12, 2)),
    "N < G": ({"num_attention_heads": 9, "num_noise_heads": 1}, ("mistral", 10, 2)),
    "biases": ({"attention_bias": True, "mlp_bias": True}, ("llama", 8, 2)),
    "biases of q, k, v": ({"attention_bias": True, "attention_out_bias": False, "hidden_size": 64}, ("qwen2", 8, 2)),
    "biases of q, k, v, wide heads": ({"attention_bias": True, "attention_out_bias": False}, ("llama", 8, 2)),
    "biases of q, k, v, 36 / 8 heads": (
        {"attention_bias": True, "attention_out_bias": False, "hidden_size": 36},
        ("qwen2", 8, 2),
    ),
    "tied": ({"tie_word_embeddings": True}, ("llama", 8, 2)),
    "norm of q and k": ({"qk_norm": True}, ("qwen3", 8, 2)),
    "windows": ({"sliding_window": 5}, ("mistral", 8, 2)),
    "windows of some layers": (
        {"qk_norm": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
        ("qwen3", 8, 2),
    ),
    "windows of some layers, no biases": (
        {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
        ("qwen2", 8, 2),
    ),
    "low rank": ({"qk_rank": 3}, ("llama", 8, 2)),
    "paired": ({"kv_layout": "paired", "num_key_value_heads": 4}, ("llama", 24, 8)),
    "paired low rank": ({"kv_layout": "paired", "qk_rank": 3, "attention_bias": True}, ("llama", 24, 4)),
    "new signal heads": ({"fade": 0.3, "masked_signal_heads": 1}, ("llama", 8, 2)),
    "new signal heads, paired": (
        {"kv_layout": "paired", "num_key_value_heads": 4, "fade": 0.3, "masked_signal_heads": 1},
        ("llama", 24, 8),
    ),
    "new neurons": ({"fade": 0.3, "masked_neurons": 7}, ("llama", 8, 2)),
    "new layers": ({"fade": 0.3, "masked_layers": [1], "attention_bias": True, "mlp_bias": True}, ("llama", 8, 2)),
    "λ fading in": ({"fade": 0.3, "lambda_target": 0.8}, ("llama", 8, 2)),
}


def saved(folder: Path, **changes: Any) -> Path:
    """A tiny GDA model with λ of 0.3 and 0.4."""
    tiny_model(**changes).save_pretrained(folder)
    return folder


def saved_with_constant_lambda(folder: Path, lambda_type: str) -> Path:
    """A tiny GDA model whose λ is the function of 0 for every token: 0 for tanh, ½ for sigmoid."""
    model = tiny_model(lambda_type=lambda_type)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.lambda_proj.weight.zero_()
    model.save_pretrained(folder)
    return folder


def greedy(model: Any, ids: torch.Tensor) -> list[list[int]]:
    """Greedy continuations of 12 tokens with a cache."""
    model.generation_config = GenerationConfig()
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_model_equals_the_gda_model(kind: str, tmp_path: Path) -> None:
    """Logits of transformers' own class within 1e-5, and the same greedy text with a cache."""
    changes, (model_type, heads, kv_heads) = KINDS[kind]
    model = saved(tmp_path / "gda", **changes)
    report = gda.export(model, tmp_path / "plain")
    assert (report.format, report.num_attention_heads, report.num_key_value_heads) == (model_type, heads, kv_heads)
    ids = token_ids(3, 21)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain).__module__.startswith("transformers.models.")
    assert relative_error(logits(plain, ids), logits(model, ids)) < 1e-5
    assert greedy(plain, ids) == greedy(load(model), ids)
    assert report.verification is not None
    assert report.verification.passed
    assert report.verification.threshold == 1e-5


def test_columns_of_noise_heads_by_hand(tmp_path: Path) -> None:
    """2 KV heads with 3 signal heads and a noise head each, λ = 0.4 in layer 1."""
    model = saved(tmp_path / "gda")
    gda.export(model, tmp_path / "plain")
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "plain"))
    name = "model.layers.1.self_attn.o_proj.weight"
    w = before[name].double().split(8, dim=1)  # six signal heads of width 8
    expected = [w[0], w[1], w[2], -0.4 * (w[0] + w[1] + w[2]), w[3], w[4], w[5], -0.4 * (w[3] + w[4] + w[5])]
    assert torch.allclose(after[name].double(), torch.cat(expected, dim=1), rtol=1e-5, atol=0)
    unchanged = {key for key in after if ".o_proj." not in key}
    assert unchanged == {key for key in before if ".o_proj." not in key and ".lambda_" not in key}
    assert all(torch.equal(before[key], after[key]) for key in unchanged)


def test_config_without_a_dtype(tmp_path: Path) -> None:
    """As in old checkpoints."""
    change_config(saved(tmp_path / "gda"), dtype=...)
    assert gda.export(tmp_path / "gda", tmp_path / "plain").num_tensors > 0


def test_cast_is_noted_once(tmp_path: Path) -> None:
    """Also where λ is 0, so that nothing is computed."""
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", verify=False)
    report = gda.export(tmp_path / "gda", tmp_path / "plain", dtype="bfloat16")
    assert report.notes == ["weights are cast to bfloat16, which is not lossless"]


def test_all_heads_at_lambda_0(tmp_path: Path) -> None:
    """By default noise heads are dropped; with --heads all they are kept, with columns of zeros."""
    model = saved_with_constant_lambda(tmp_path / "gda", "tanh")
    assert gda.export(model, tmp_path / "original").num_attention_heads == 6
    assert gda.export(model, tmp_path / "all", heads="all").num_attention_heads == 8
    ids = token_ids(2, 9)
    for folder in ("original", "all"):
        assert relative_error(logits(tmp_path / folder, ids), logits(model, ids)) < 1e-5


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
def test_narrow_dtype_is_rounded_once_with_a_note(dtype: torch.dtype, least: float, tmp_path: Path) -> None:
    """Columns of noise heads are the rounded float64 product; float32 on request is exact."""
    tiny_model().to(dtype).save_pretrained(tmp_path / "gda")
    report = gda.export(tmp_path / "gda", tmp_path / "plain")
    name = str(dtype).removeprefix("torch.")
    assert report.notes == [
        f"the computed weights are rounded to {name}, which is not lossless; --dtype float32 avoids that"
    ]
    assert report.verification is not None
    assert report.verification.threshold is None
    wide = gda.export(tmp_path / "gda", tmp_path / "wide", dtype="float32")
    assert wide.notes == []
    assert wide.verification is not None
    assert wide.verification.relative is not None
    assert wide.verification.relative < 1e-5 < least < report.verification.relative
    narrow, exact = (SafetensorsReader(tmp_path / folder) for folder in ("plain", "wide"))
    for tensor in narrow.specs:
        assert torch.equal(narrow.read(tensor), exact.read(tensor).to(dtype)), tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_norm": True}, "a Llama cannot have head_norm=True: run it with transformers, `gda serve`"),
        ({"kv_layout": "paired", "head_norm": True}, "--format motif or diffllama may express it"),
        ({"hidden_act": "poly_norm"}, "a Llama cannot have hidden_act='poly_norm'"),
        ({"lambda_type": "tanh"}, "λ of layer 0 depends on the token, which no Llama computes; run the model with"),
        ({"lambda_type": "sigmoid"}, "λ of layer 0 depends on the token"),
        ({"sliding_window": 5, "attention_bias": True}, "a Llama cannot have sliding_window=5"),
    ],
    ids=str,
)
def test_models_beyond_a_llama_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """One line with the reason and what runs the model instead, and no files."""
    with pytest.raises(ValueError, match=message) as refused:
        gda.export(saved(tmp_path / "gda", **changes), tmp_path / "plain")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "plain").exists()


def test_another_type_is_chosen_with_a_note(tmp_path: Path) -> None:
    """LlamaConfig requires heads that divide hidden_size, and MistralConfig doesn't."""
    model = saved(tmp_path / "gda", hidden_size=36)
    report = gda.export(model, tmp_path / "plain")
    assert report.format == "mistral"
    assert report.notes == [
        "a Llama cannot have 8 query heads, which do not divide hidden_size=36; written as a Mistral"
    ]
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["sliding_window"] is None


def test_sigmoid_of_zero_is_one_half(tmp_path: Path) -> None:
    """A token-dependent λ with a zero projection is a constant."""
    saved_with_constant_lambda(tmp_path / "gda", "sigmoid")
    gda.export(tmp_path / "gda", tmp_path / "plain")
    ids = token_ids(2, 9)
    assert relative_error(logits(tmp_path / "plain", ids), logits(tmp_path / "gda", ids)) < 1e-5


def test_card_and_provenance(tmp_path: Path) -> None:
    """The card describes the export and its verification; conversion.json has λ and the origin of each tensor."""
    gda.export(saved(tmp_path / "gda"), tmp_path / "plain")
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "exported to a llama" in card
    assert "the 8 query heads here" in card
    assert "| same greedy text, with cache | 100.00 % of prompts |" in card
    made = json.loads((tmp_path / "plain" / "conversion.json").read_text())
    assert made["settings"]["export"]["lambdas"] == pytest.approx([0.3, 0.4], abs=1e-6)
    assert "λ = 0.4" in made["tensors"]["model.layers.1.self_attn.o_proj.weight"]["how"]
    assert set(made["tensors"]) == set(SafetensorsReader(tmp_path / "plain").specs)


def test_streaming_dry_run_and_verify(tmp_path: Path) -> None:
    """Shards and workers give the same tensors, --dry-run writes nothing, and `gda verify` compares the two folders."""
    model = saved(tmp_path / "gda")
    assert gda.export(model, tmp_path / "plain", dry_run=True).num_attention_heads == 8
    assert not (tmp_path / "plain").exists()
    gda.export(model, tmp_path / "plain")
    gda.export(model, tmp_path / "shards", max_shard_size="8KB", workers=2)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, parts = (SafetensorsReader(tmp_path / folder) for folder in ("plain", "shards"))
    assert whole.specs == parts.specs
    assert all(torch.equal(whole.read(name), parts.read(name)) for name in whole.specs)
    assert gda.verify(model, tmp_path / "plain").passed
    assert gda.verify(model, tmp_path / "plain", method="layers").passed
    again = files_of(tmp_path / "plain")
    gda.export(model, tmp_path / "plain", overwrite=True)
    assert files_of(tmp_path / "plain") == again


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    """One line names the tensor and the remedy; nothing is written."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "gda")
    with pytest.raises(ValueError, match=r"up_proj.weight has values that float16 cannot hold; use bfloat16"):
        gda.export(tmp_path / "gda", tmp_path / "plain", dtype="float16", verify=False)
    assert not (tmp_path / "plain").exists()


def test_damaged_result_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification reads the written files: a wrong λ in the output projection fails."""
    monkeypatch.setattr("gda.conversion.modes.export.layer_lambdas", lambda config, read: [0.3, 0.41])
    with pytest.raises(VerificationFailed, match="relative"):
        gda.export(saved(tmp_path / "gda"), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


# --------------------------------------------------------------------------------------------------------- and back

RESTORED = (
    *("N = G", "N > G", "N < G", "biases", "biases of q, k, v, wide heads"),
    *("tied", "norm of q and k", "windows", "windows of some layers, no biases", "paired"),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESTORED)
def test_an_exported_model_is_restored(kind: str, tmp_path: Path) -> None:
    """All tensors but λ's are those of the GDA model, and λ is the same and has a gradient."""
    model = saved(tmp_path / "gda", **KINDS[kind][0])
    gda.export(model, tmp_path / "plain")
    report = gda.convert(tmp_path / "plain", tmp_path / "again")
    assert report.verification is not None
    assert report.verification.threshold == 1e-5
    before, after = SafetensorsReader(model), SafetensorsReader(tmp_path / "again")
    assert before.specs == after.specs
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.specs if ".lambda_" not in name)
    ids = token_ids(3, 21)
    assert relative_error(logits(tmp_path / "again", ids), logits(model, ids)) < 1e-5
    assert gda.verify(tmp_path / "plain", tmp_path / "again", method="tensors").passed
    restored = load(tmp_path / "again").train()
    restored(ids, labels=ids).loss.backward()
    for layer, value in zip(restored.model.layers, (0.3, 0.4), strict=True):
        assert layer.self_attn.compute_lambda(None).item() == pytest.approx(value, abs=1e-6)
        assert all(getattr(layer.self_attn, name).grad.abs().max() > 0 for name in layer.self_attn.lambda_vectors)


def test_a_rounded_export_is_restored_up_to_rounding(tmp_path: Path) -> None:
    """In bfloat16 the tie holds up to the rounding of the noise heads' columns, and the report says so."""
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "gda")
    gda.export(tmp_path / "gda", tmp_path / "plain")
    report = gda.convert(tmp_path / "plain", tmp_path / "again")
    assert any("not lossless" in note for note in report.notes)
    before, after = SafetensorsReader(tmp_path / "gda"), SafetensorsReader(tmp_path / "again")
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.specs if ".lambda_" not in name)


@pytest.mark.parametrize("tensor", ["o_proj", "q_proj"])
def test_a_plain_model_that_was_trained_is_an_ordinary_llama(tensor: str, tmp_path: Path) -> None:
    """Where heads are no longer tied, noise heads are added to all of them, with a note; --mode restore is refused."""
    gda.export(saved(tmp_path / "gda", **KINDS["N < G"][0]), tmp_path / "plain")
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    weights[f"model.layers.1.self_attn.{tensor}.weight"][-1, -1] += 1e-3
    save_file(weights, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    report = gda.convert(tmp_path / "plain", tmp_path / "again")
    assert report.config.num_signal_heads == 10
    assert any("not restored" in note for note in report.notes)
    with pytest.raises(ValueError, match=f"layers.1.self_attn.{tensor}.weight was trained since the export"):
        gda.convert(tmp_path / "plain", tmp_path / "other", mode="restore")


def test_a_bias_that_only_the_plain_model_has_must_still_be_0(tmp_path: Path) -> None:
    """A Llama has a bias of o_proj where q, k and v have one, and the GDA model has none."""
    gda.export(saved(tmp_path / "gda", **KINDS["biases of q, k, v, wide heads"][0]), tmp_path / "plain")
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    bias = weights["model.layers.1.self_attn.o_proj.bias"]
    assert not bias.any()
    bias[3] += 1e-3
    save_file(weights, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.self_attn.o_proj.bias was trained since the export"):
        gda.convert(tmp_path / "plain", tmp_path / "again", mode="restore")


NO_BIAS = {
    "num_attention_heads": 8,
    "num_noise_heads": 2,
    "num_key_value_heads": 2,
    "kv_layout": "shared",
    "attention_bias": False,
    "attention_out_bias": True,
}
HUGE = {
    "num_attention_heads": 4 * 10**9,
    "num_noise_heads": 10**9,
    "num_key_value_heads": 2,
    "kv_layout": "shared",
    "attention_bias": False,
    "attention_out_bias": False,
}


@pytest.mark.parametrize(
    "change", [{"lambdas": None}, {"fields": {}}, {"lambdas": ["x"]}, {"fields": HUGE}, {"fields": NO_BIAS}], ids=str
)
def test_a_hostile_record_of_an_export(change: dict[str, Any], tmp_path: Path) -> None:
    """One line names the file and the remedy."""
    gda.export(saved(tmp_path / "gda"), tmp_path / "plain")
    path = tmp_path / "plain" / "conversion.json"
    made = json.loads(path.read_text())
    made["settings"]["export"] |= change
    path.write_text(json.dumps(made))
    with pytest.raises(ValueError, match=r"conversion\.json does not describe an export; remove it"):
        gda.convert(tmp_path / "plain", tmp_path / "again")


def test_an_export_without_noise_heads_is_an_ordinary_llama(tmp_path: Path) -> None:
    """There is nothing to restore."""
    saved_with_constant_lambda(tmp_path / "gda", "tanh")
    gda.export(tmp_path / "gda", tmp_path / "plain")
    assert gda.convert(tmp_path / "plain", tmp_path / "again").config.num_signal_heads == 6
    with pytest.raises(ValueError, match="omit --mode restore"):
        gda.convert(tmp_path / "plain", tmp_path / "other", mode="restore")


def test_query_rows_of_repeated_noise_heads() -> None:
    """A noise query that serves two KV heads is repeated after the signal heads of each."""
    from gda.conversion.families.plain_heads import plain_heads

    heads = plain_heads(tiny_config(num_attention_heads=5, num_noise_heads=1), with_noise=True)
    assert [(head.row, head.blocks, head.is_noise) for head in heads.query] == [
        (0, (0,), False),
        (1, (1,), False),
        (4, (0, 1), True),
        (2, (2,), False),
        (3, (3,), False),
        (4, (2, 3), True),
    ]


def test_a_conversion_says_whether_it_can_be_exported(tmp_path: Path) -> None:
    """Six query heads do not divide a hidden size of 32, as a Llama needs, and a Mistral has no biases."""
    for name, biases in (("plain", False), ("biases", True)):
        llama = save_llama(tmp_path / name, attention_bias=biases)
        assert gda.convert(llama, tmp_path / f"{name}-gda", verify=False).is_plain is not biases
    assert gda.export(tmp_path / "plain-gda", tmp_path / "all", heads="all").format == "mistral"
    with pytest.raises(ValueError, match="6 query heads, which do not divide hidden_size=32"):
        gda.export(tmp_path / "biases-gda", tmp_path / "none", heads="all")


def test_a_field_that_a_type_refuses(tmp_path: Path) -> None:
    """By transformers' validators, which older releases lack: a Llama's initializer_range is at most 1."""
    folder = saved(tmp_path / "gda", initializer_range=2.0)
    assert gda.grow(folder, tmp_path / "grown", signal=2, verify=False).to_dict()["is_plain"]
    report = gda.export(folder, tmp_path / "plain")
    try:
        LlamaConfig(initializer_range=2.0)
        assert report.format == "llama"
    except StrictDataclassError:
        assert report.format == "mistral"
        assert re.match(r"a Llama cannot have these fields \(.*initializer_range.* got 2\.0\.?\); ", report.notes[0])
