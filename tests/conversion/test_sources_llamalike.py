"""Mistral, Qwen2 and Qwen3: converted with logits equal to transformers' classes, and exported again."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
)

import gda
from gda.common.errors import CheckFailed
from gda.conversion.families.llamalike import DIFFERING_FIELDS, SHARED_FIELDS, source_fields, target_config
from gda.conversion.logits import _rows, prompts_for
from gda.conversion.sources.compare_tokenizers import difference
from gda.conversion.sources.folder import FolderSource

from ..support.checkpoints import load, logits
from ..support.commands import Command, assert_refused
from ..support.fuzzing import FUZZ, VALUES, converts_or_says_why
from ..support.gguf_files import write_gguf
from ..support.hub_server import Hub
from ..support.llama_like import CLASSES, LENGTH, save_source, some_ids, source_model
from ..support.llamas import change_config, files_of, llama_config, tensors_of, with_older_names
from ..support.tiny import relative_error, tiny_config, tiny_model

pytestmark = pytest.mark.sampled

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOWS = {"use_sliding_window": True, "sliding_window": 6}
# By name: the model type, and what differs from SHAPE.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 6}),
    "mistral, window of 1": ("mistral", {"sliding_window": 1}),
    "mistral, window beyond the sequence": ("mistral", {"sliding_window": 4096}),
    "mistral, head_dim": ("mistral", {"sliding_window": 7, "head_dim": 16}),
    "mistral, tied, bf16": ("mistral", {"sliding_window": 5, "tie_word_embeddings": True, "dtype": torch.bfloat16}),
    "mistral, shards": ("mistral", {"sliding_window": 6, "max_shard_size": "20KB"}),
    "mistral, mha": ("mistral", {"sliding_window": 6, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2, a window that is not used": ("qwen2", {"sliding_window": 6}),
    "qwen2, max_window_layers": ("qwen2", {**WINDOWS, "max_window_layers": 1}),
    "qwen2, all layers slide": ("qwen2", {**WINDOWS, "max_window_layers": 0}),
    "qwen2, no layer slides": ("qwen2", {**WINDOWS, "max_window_layers": 2}),
    "qwen2, layer_types": ("qwen2", {**WINDOWS, "num_hidden_layers": 3, "layer_types": MIXED}),
    "qwen2, tied, bf16, shards": (
        "qwen2",
        {"tie_word_embeddings": True, "dtype": torch.bfloat16, "max_shard_size": "20KB"},
    ),
    "qwen2, a head_dim that its class does not define": ("qwen2", {"head_dim": 16}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2, 7 heads a KV head": (
        "qwen2",
        {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 56},
    ),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3, head_dim": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3, attention_bias": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3, layer_types": ("qwen3", {"head_dim": 8, **WINDOWS, "num_hidden_layers": 3, "layer_types": MIXED}),
    "qwen3, bf16, shards": ("qwen3", {"head_dim": 8, "dtype": torch.bfloat16, "max_shard_size": "20KB"}),
    "qwen3, yarn": ("qwen3", {"head_dim": 8, "rope_parameters": YARN}),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_type = pytest.mark.parametrize("model_type", CLASSES)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source of each type. Tests copy them."""
    folder = tmp_path_factory.mktemp("sources")
    for model_type in CLASSES:
        save_source(folder / model_type, model_type, **({"head_dim": 8} if model_type == "qwen3" else {}))
    return folder


def save_variant(folder: Path, variant: str) -> Path:
    model_type, changes = VARIANTS[variant]
    return save_source(folder, model_type, **changes)


# ------------------------------------------------------------------------------------------------------------- lossless


@each_variant
def test_logits_and_greedy_tokens_equal_the_source(variant: str, tmp_path: Path) -> None:
    """Beyond every window, in one call and token by token with a cache; verification agrees."""
    source = save_variant(tmp_path / "source", variant)
    report = gda.convert(source, tmp_path / "gda", max_shard_size="30KB")
    original, converted = load(source), load(tmp_path / "gda")
    assert isinstance(original, CLASSES[VARIANTS[variant][0]][1])
    assert isinstance(converted, gda.GDAForCausalLM)
    ids = some_ids()
    assert relative_error(logits(converted, ids), logits(original, ids)) <= 1e-5
    texts = [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, use_cache=True)
        for model in (original, converted)
    ]
    assert torch.equal(*texts)
    verification = report.verification
    assert verification is not None
    assert (verification.method, verification.passed, verification.greedy_match) == ("full", True, 1.0)
    assert verification.threshold == 1e-5
    assert [note for note in report.notes if not note.startswith("tokenizer_config.json names")] == []


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("variant", ["mistral, window", "qwen2, layer_types", "qwen3, layer_types"])
def test_left_padding_and_backends(variant: str, attention: str, tmp_path: Path) -> None:
    """A left-padded batch with every window and every backend."""
    gda.convert(save_variant(tmp_path / "source", variant), tmp_path / "gda", verify=False)
    models = [load(tmp_path / name, attn_implementation=attention) for name in ("source", "gda")]
    ids, mask = some_ids(), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    # Compiling flex_attention takes ten seconds, and torch 2.13's kernel for AVX2 gives NaN, also in a stock Mistral.
    with torch.compiler.set_stance("force_eager"):
        expected, got = (logits(model, ids, attention_mask=mask, position_ids=positions) for model in models)
    assert relative_error(got[mask.bool()], expected[mask.bool()]) <= 1e-5


def test_window_affects_the_output(tmp_path: Path) -> None:
    """Otherwise the tests above could not detect a wrong window."""
    source = save_variant(tmp_path / "source", "mistral, window")
    gda.convert(source, tmp_path / "gda", verify=False)
    expected = logits(load(source), some_ids())
    change_config(tmp_path / "gda", sliding_window=7)
    assert relative_error(logits(load(tmp_path / "gda"), some_ids()), expected) > 1e-3


@pytest.mark.slow
@each_variant
def test_verification_by_layers_and_by_tensors(variant: str, tmp_path: Path) -> None:
    """Both pass for a conversion and fail for changed weights."""
    source = save_variant(tmp_path / "source", variant)
    gda.convert(source, tmp_path / "gda", verify=False)
    assert gda.verify(source, tmp_path / "gda", method="tensors").passed
    assert gda.verify(source, tmp_path / "gda", method="layers").passed
    tensors = tensors_of(tmp_path / "gda")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1.0
    for file in (tmp_path / "gda").glob("model*"):
        file.unlink()
    save_file(tensors, tmp_path / "gda" / "model.safetensors", metadata={"format": "pt"})
    assert not gda.verify(source, tmp_path / "gda", method="tensors").passed
    assert not gda.verify(source, tmp_path / "gda", method="layers").passed


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mistral, window", "qwen2, layer_types", "qwen3, layer_types", "qwen3"])
def test_layers_give_the_numbers_of_whole_models(variant: str, tmp_path: Path) -> None:
    """Also with windows, for a model with other weights."""
    source = save_variant(tmp_path / "source", variant)
    gda.convert(source, tmp_path / "gda", verify=False)
    tensors = tensors_of(tmp_path / "gda")
    tensors["model.layers.0.self_attn.v_proj.weight"] *= 1.3
    save_file(tensors, tmp_path / "gda" / "model.safetensors", metadata={"format": "pt"})
    rows, prefill = _rows(prompts_for(FolderSource(source))[0])
    expected, got = (logits(load(folder), rows[:, :prefill]) for folder in (source, tmp_path / "gda"))
    report = gda.verify(source, tmp_path / "gda", method="layers")
    assert report.relative is not None
    assert report.relative > 1e-3
    assert report.relative == pytest.approx(relative_error(got, expected), rel=1e-4)
    kl = torch.nn.functional.kl_div(got.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="sum")
    assert report.kl == pytest.approx(kl.item() / rows[:, :prefill].numel(), rel=1e-3)


@pytest.mark.parametrize("method", ["full", "layers", "tensors"])
@pytest.mark.parametrize(
    "changes",
    [{"sliding_window": 4095}, {"sliding_window": None, "layer_types": ["full_attention"] * 2}],
    ids=["another", "none"],
)
def test_windows_longer_than_the_prompts_are_compared(changes: dict[str, Any], method: str, tmp_path: Path) -> None:
    """Verification compares the windows themselves and names the layer."""
    source = save_variant(tmp_path / "source", "mistral, window beyond the sequence")
    gda.convert(source, tmp_path / "gda", verify=False)
    change_config(tmp_path / "gda", **changes)
    with pytest.raises(ValueError, match="sliding_window"):
        gda.verify(source, tmp_path / "gda", method=method)


@pytest.mark.parametrize("lambda_type", ["reparameterized", "tanh"])
@pytest.mark.parametrize("noise_heads", [1, 2, 4])
@each_type
def test_every_new_weight_gets_a_gradient(model_type: str, noise_heads: int, lambda_type: str, tmp_path: Path) -> None:
    """λ is exactly 0 with a gradient at the first step. After it, every noise row and bias has a gradient."""
    source = save_source(tmp_path / "source", model_type, head_dim=8)
    gda.convert(source, tmp_path / "gda", noise_heads=noise_heads, lambda_type=lambda_type, verify=False)
    assert gda.inspect(tmp_path / "gda").lambdas == [0.0, 0.0]
    model = load(tmp_path / "gda").train()
    ids = some_ids()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "lambda" in name:
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0, name
    optimizer.step()
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        parameters = [layer.self_attn.q_proj.weight] + ([layer.self_attn.q_proj.bias] if model_type == "qwen2" else [])
        for parameter in parameters:
            rows = parameter.grad.unflatten(0, (noise_heads, -1, 8))[:, -1]
            assert (rows.flatten(1).abs().max(dim=1).values > 0).all()


@each_type
def test_tensors_equal_the_sources(model_type: str, tmp_path: Path) -> None:
    """Bit for bit, including the signal rows and biases of q_proj. Only λ is added."""
    source = save_source(tmp_path / "source", model_type, head_dim=8, dtype=torch.bfloat16)
    gda.convert(source, tmp_path / "gda", verify=False)
    before, after = tensors_of(source), tensors_of(tmp_path / "gda")
    assert {name for name in after if "lambda" not in name} == set(before)
    assert any(name.endswith("q_proj.bias") for name in after) == (model_type == "qwen2")
    for name, tensor in before.items():
        if ".q_proj." in name:
            signal = after[name].unflatten(0, (2, 3, 8))[:, :2].flatten(0, 2)
            assert torch.equal(signal, tensor), name
        else:
            assert torch.equal(after[name], tensor), name


def test_checkpoint_loads_in_its_own_dtype(tmp_path: Path) -> None:
    """In bfloat16, logits equal the source's up to rounding."""
    source = save_variant(tmp_path / "source", "qwen3, bf16, shards")
    gda.convert(source, tmp_path / "gda", verify=False)
    original, converted = load(source, "auto"), load(tmp_path / "gda", "auto")
    assert converted.dtype == original.dtype == torch.bfloat16
    assert relative_error(logits(converted, some_ids()), logits(original, some_ids())) <= 1e-2


# --------------------------------------------------------------------------------------------------------------- config


@each_variant
def test_config_json_has_the_fields_of_the_source(variant: str, tmp_path: Path) -> None:
    """A window that no layer uses is omitted."""
    source = save_variant(tmp_path / "source", variant)
    report = gda.convert(source, tmp_path / "gda", verify=False)
    config = load(source).config
    fields = source_fields(config)
    assert fields.keys() == {*SHARED_FIELDS, *DIFFERING_FIELDS}
    written = json.loads((tmp_path / "gda" / "config.json").read_text())
    assert {name: written[name] for name in fields} == fields
    assert {name: getattr(report.config, name) for name in fields} == fields
    assert fields["attention_bias"] == (config.model_type == "qwen2" or getattr(config, "attention_bias", False))
    assert fields["attention_out_bias"] == getattr(config, "attention_bias", False)
    assert fields["qk_norm"] == (config.model_type == "qwen3")
    assert (fields["sliding_window"] is not None) == ("sliding_attention" in fields["layer_types"])
    made = json.loads((tmp_path / "gda" / "conversion.json").read_text())
    assert made["source"]["model_type"] == config.model_type
    assert made["source"]["head_dim"] == fields["head_dim"]


def test_inspect_cache_and_parts(tmp_path: Path) -> None:
    """For a Qwen2 without head_dim, with biases and norms."""
    gda.convert(save_variant(tmp_path / "source", "qwen2"), tmp_path / "gda", verify=False)
    report = gda.inspect(tmp_path / "gda")
    assert report.source_kv_cache_bytes_per_token == report.kv_cache_bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert report.num_parameters == load(tmp_path / "gda").num_parameters()
    assert report.parameters["attention output"] == 2 * 32 * 32  # and no bias


@pytest.mark.slow
def test_configs_of_older_transformers_are_read(tmp_path: Path) -> None:
    """Qwen2.5's own config.json: rope_theta, torch_dtype and use_mrope at top level, no layer_types."""
    source = save_source(tmp_path / "source", "qwen2")
    change_config(source, rope_parameters=..., layer_types=..., dtype=..., sliding_window=32768)
    change_config(source, rope_theta=77.0, rope_scaling=None, torch_dtype="float32", use_mrope=False)
    report = gda.convert(source, tmp_path / "gda")
    assert report.config.rope_parameters == {"rope_type": "default", "rope_theta": 77.0}
    assert [note for note in report.notes if not note.startswith("tokenizer_config.json names")] == []
    assert relative_error(logits(load(tmp_path / "gda"), some_ids()), logits(load(source), some_ids())) <= 1e-5


def test_dropped_fields_are_noted(tmp_path: Path) -> None:
    """attention_dropout, and fields that transformers' class does not read."""
    source = save_source(tmp_path / "source", "qwen3", head_dim=8, attention_dropout=0.1)
    change_config(source, logit_scale=0.5, rope_ratio=2)
    notes = "\n".join(gda.convert(source, tmp_path / "gda").notes)
    assert "attention_dropout=0.1 is ignored" in notes
    assert "fields of config.json that are not converted: logit_scale, rope_ratio" in notes


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "use_mrope": ("qwen2", {"use_mrope": True}, "use_mrope"),
    "mrope": (
        "qwen2",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        "mrope_section",
    ),
    "mrope by its older name": (
        "qwen2",
        {"rope_parameters": ..., "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rope_theta": 1e4},
        "mrope_section",
    ),
    "Ministral's layer types": (
        "mistral",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "config.json: a model of type 'ministral' cannot be converted",
    ),
    "Ministral 3's RoPE": (
        "mistral",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}},
        "llama_4_scaling_beta",
    ),
    "partial rotary": (
        "qwen3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "unknown RoPE": ("qwen3", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
    "a window of 0": ("mistral", {"sliding_window": 0}, "sliding_window"),
    "layers that slide without a window": (
        "qwen2",
        {"use_sliding_window": False, "layer_types": ["full_attention", "sliding_attention"]},
        "sliding_window",
    ),
    "layer types of another length": ("qwen3", {"layer_types": ["full_attention"]}, "layer"),
    "attention to later tokens": ("qwen2", {"is_causal": False}, "is_causal=false"),
    "weights under another name": ("qwen3", {"transformers_weights": "other.safetensors"}, "transformers_weights"),
    "chunked layers": ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
    "biases of o_proj": ("qwen3", {"attention_bias": True}, "bias"),
    "Qwen2-MoE": ("qwen2", {"model_type": "qwen2_moe"}, "qwen2_moe"),
    "Qwen3-MoE": ("qwen3", {"model_type": "qwen3_moe"}, "qwen3_moe"),
    "Mistral 3": ("mistral", {"model_type": "mistral3"}, "mistral3"),
    "Ministral": ("mistral", {"model_type": "ministral"}, "ministral"),
    "Ministral 3": ("mistral", {"model_type": "ministral3"}, "ministral3"),
    "Qwen3 weights under a Qwen2's name": ("qwen3", {"model_type": "qwen2"}, "bias"),
    "Qwen2 weights under a Qwen3's name": ("qwen2", {"model_type": "qwen3", "head_dim": 8}, "q_norm"),
    "Mistral weights under a Llama's name and a window": (
        "mistral",
        {"model_type": "llama", "layer_types": ["sliding_attention"] * 2},
        "layer_types",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unsupported_fields_are_refused(what: str, tmp_path: Path, command: Command) -> None:
    """Exit code 2 and one line with the field or type."""
    model_type, changes, named = REFUSED[what]
    source = save_source(tmp_path / "source", model_type, **({"head_dim": 8} if model_type == "qwen3" else {}))
    change_config(source, **changes)
    outcome = command("convert", source, tmp_path / "gda", "--no-verify")
    assert_refused(outcome, named)
    assert outcome.error.startswith(("gda: source: ", f"gda: {source}"))
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_any_config_converts_or_is_refused(data: st.DataObject, sources: Path, tmp_path: Path) -> None:
    """Wrong types, negative, huge and missing values of every field: success or one error, in bounded time."""
    model_type = data.draw(st.sampled_from(sorted(CLASSES)), label="model type")
    fields = sorted({*AutoConfig.for_model(model_type).to_dict(), "layer_types", "head_dim", "use_mrope"})
    changes = data.draw(st.dictionaries(st.sampled_from(fields), VALUES, min_size=1, max_size=2), label="changes")
    source = Path(shutil.copytree(sources / model_type, tmp_path / "source", dirs_exist_ok=True))
    change_config(source, **changes)
    converts_or_says_why(source, tmp_path)


@pytest.mark.parametrize("num_hidden_layers", [10**9, 10**30])
def test_huge_number_of_layers_is_refused(num_hidden_layers: int, tmp_path: Path) -> None:
    """Qwen's config class creates a list with an entry for each layer."""
    source = save_source(tmp_path / "source", "qwen2")
    change_config(source, num_hidden_layers=num_hidden_layers, layer_types=...)
    with pytest.raises(ValueError, match="num_hidden_layers"):
        gda.convert(source, tmp_path / "gda")


def test_tokenizer_files_of_mistral_are_copied(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "mistral")
    names = ("tekken.json", "tokenizer.model.v3")
    for name in names:
        (source / name).write_bytes(name.encode())
    gda.convert(source, tmp_path / "gda", verify=False)
    gda.export(tmp_path / "gda", tmp_path / "back", format="mistral")
    for folder in ("gda", "back"):
        assert [(tmp_path / folder / name).read_bytes() for name in names] == [name.encode() for name in names]


def test_unknown_type_is_refused_with_the_known_ones(tmp_path: Path, command: Command) -> None:
    source = save_source(tmp_path / "source", "qwen2")
    change_config(source, model_type="qwen2_moe")
    outcome = command("convert", source, tmp_path / "gda")
    assert "these can: llama, mistral, qwen2, qwen3, diffllama, motif" in outcome.error


# --------------------------------------------------------------------------------------------------------------- export


@each_variant
def test_round_trip_is_bit_for_bit(variant: str, tmp_path: Path) -> None:
    """Tensors, logits and other files equal the source's, and config.json except for unused windows.

    The tokenizer's files may be written anew, if another class reads them in a GDA model. They are read alike.
    """
    model_type, changes = VARIANTS[variant]
    source = save_variant(tmp_path / "source", variant)
    lambda_type = "tanh" if len(variant) % 2 else None  # which the way back does not depend on
    notes = gda.convert(source, tmp_path / "gda", lambda_type=lambda_type, verify=False).notes
    rewritten = (
        {"tokenizer.json", "tokenizer_config.json"} if "tokenizer_config.json names" in "".join(notes) else set()
    )
    gda.export(
        tmp_path / "gda",
        tmp_path / "back",
        format=model_type,
        max_shard_size=changes.get("max_shard_size", "5GB"),
    )
    before, after = files_of(source), files_of(tmp_path / "back")
    assert set(before) | {"README.md", "conversion.json"} == set(after)
    for name in before:
        if name not in {"config.json"} | rewritten:
            assert after[name] == before[name], name
    assert difference(AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "back")) is None
    output, again = with_older_names(json.loads(before["config.json"])), json.loads(after["config.json"])
    unused = {"max_window_layers"} if variant != "qwen2, max_window_layers" else set()
    if variant == "qwen2, no layer slides":
        unused |= {"use_sliding_window", "sliding_window"}
    assert {name for name in output | again if output.get(name, ...) != again.get(name, ...)} <= unused
    assert torch.equal(logits(load(tmp_path / "back"), some_ids()), logits(load(source), some_ids()))


# What one type cannot hold, and the type that is written in its place.
NOT_HELD: dict[str, tuple[str, str, str, str]] = {
    "a window": ("mistral, window", "llama", "sliding_window=6", "Mistral"),
    "biases of q, k and v": ("qwen2", "llama", "attention_out_bias=False", "Qwen2"),
    "qk norm": ("qwen3", "llama", "qk_norm=True", "Qwen3"),
    "qk norm in a Mistral": ("qwen3", "mistral", "qk_norm=True", "Qwen3"),
    "no biases": ("mistral, window", "qwen2", "attention_bias=False", "Mistral"),
    "no qk norm": ("mistral", "qwen3", "qk_norm=False", "Llama"),
    "mixed layers": ("qwen2, layer_types", "mistral", "attention_bias=True", "Qwen2"),
    "o_proj's bias": ("qwen3, attention_bias", "qwen2", "attention_out_bias=True", "Qwen3"),
}


@pytest.mark.parametrize("what", NOT_HELD)
def test_a_type_that_can_hold_the_model_is_chosen_and_named(what: str, tmp_path: Path, command: Command) -> None:
    """A note names the field, its value and the type; the result computes the same."""
    variant, asked, named, chosen = NOT_HELD[what]
    source = save_variant(tmp_path / "source", variant)
    gda.convert(source, tmp_path / "gda", verify=False)
    outcome = command("export", tmp_path / "gda", tmp_path / "back", "--format", asked)
    assert outcome.code == 0
    assert f"cannot have {named}; written as a {chosen}" in outcome.out
    assert load(tmp_path / "back").config.model_type == chosen.lower()
    assert torch.equal(logits(load(tmp_path / "back"), some_ids()), logits(load(source), some_ids()))


@pytest.mark.parametrize("target", ["motif", "diffllama"])
def test_shared_keys_have_no_counterpart_in_a_differential_model(target: str, tmp_path: Path, command: Command) -> None:
    """One line names the field and its value; nothing is left."""
    gda.convert(save_variant(tmp_path / "source", "qwen2"), tmp_path / "gda", verify=False)
    outcome = command("export", tmp_path / "gda", tmp_path / "back", "--format", target)
    assert (outcome.code, outcome.error.count("\n")) == (2, 1)
    assert "kv_layout='shared'" in outcome.error
    assert sorted(os.listdir(tmp_path)) == ["gda", "source"]


def test_mistral_without_a_window_is_exported_as_llama(tmp_path: Path) -> None:
    source = save_variant(tmp_path / "source", "mistral")
    gda.convert(source, tmp_path / "gda", verify=False)
    gda.export(tmp_path / "gda", tmp_path / "llama", format="llama")
    assert torch.equal(logits(load(tmp_path / "llama"), some_ids()), logits(load(source), some_ids()))


def test_output_bias_is_refused_by_diffllama(tmp_path: Path) -> None:
    """One field of it sets the biases of all projections."""
    model = tiny_model(
        kv_layout="paired",
        head_norm=True,
        num_noise_heads=4,
        attention_bias=True,
        attention_out_bias=False,
        head_norm_eps=1e-5,
    )
    model.save_pretrained(tmp_path / "gda")
    with pytest.raises(ValueError, match="attention_out_bias=False"):
        gda.export(tmp_path / "gda", tmp_path / "back", format="diffllama")


def test_target_and_source_fields_are_inverse() -> None:
    """`source_fields` reads what `target_config` writes, for a Llama too."""
    for config in (llama_config(attention_bias=True, mlp_bias=True), llama_config()):
        fields = source_fields(config)
        made = gda.GDAConfig(**fields, num_attention_heads=6, num_noise_heads=2, lambda_init=0.0)
        assert source_fields(target_config(made, "llama", (4, 2))) == fields
        assert target_config(made, "llama", (4, 2)).to_dict() | {
            "architectures": None,
            "dtype": None,
        } == config.to_dict() | {
            "architectures": None,
            "dtype": None,
        }


@pytest.mark.parametrize("target", ["llama", *CLASSES])
def test_integers_for_float_fields(target: str) -> None:
    """GDAConfig accepts 1 for 1.0, and transformers' classes do not."""
    config = tiny_config(rms_norm_eps=1, initializer_range=0)
    made = target_config(config, target, (6, 2))
    assert (made.rms_norm_eps, made.initializer_range) == (1.0, 0.0)
    made.rope_parameters["rope_theta"] = 5.0
    assert config.rope_parameters["rope_theta"] == 100.0


# ------------------------------------------------------------------------------------------------ ranks, folds, the Hub


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mistral, window", "qwen2", "qwen3, layer_types"])
def test_full_rank_and_fold(variant: str, tmp_path: Path) -> None:
    """Verified with both methods: equal to the source, biases and norms included."""
    source = save_variant(tmp_path / "source", variant)
    report = gda.convert(source, tmp_path / "shared", qk_rank=8)
    assert report.verification is not None
    assert report.verification.threshold == 1e-5
    assert gda.verify(source, tmp_path / "shared", method="layers").passed
    gda.fold(tmp_path / "shared", tmp_path / "dense")
    assert gda.verify(tmp_path / "shared", tmp_path / "dense", method="layers").passed
    expected = logits(load(source), some_ids())
    for folder in ("shared", "dense"):
        assert relative_error(logits(load(tmp_path / folder), some_ids()), expected) <= 1e-5
    gda.export(tmp_path / "shared", tmp_path / "back", format=VARIANTS[variant][0])
    assert relative_error(logits(load(tmp_path / "back"), some_ids()), expected) <= 1e-5


@pytest.mark.slow
@each_type
def test_hub_id(model_type: str, hub: Hub, tmp_path: Path) -> None:
    """At its commit, with a card that names the base model."""
    save_source(tmp_path / "source", model_type, head_dim=8)
    huggingface_hub.HfApi().create_repo(f"me/{model_type}")
    huggingface_hub.HfApi().upload_folder(repo_id=f"me/{model_type}", folder_path=tmp_path / "source")
    report = gda.convert(f"me/{model_type}", tmp_path / "gda")
    assert report.verification is not None
    assert report.verification.passed
    assert f"base_model: me/{model_type}" in (tmp_path / "gda" / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------------------- GGUF


def gguf_of(path: Path, model_type: str, *, architecture: str | None = None, **options: Any) -> Path:
    """A GGUF file of a small model of that type, as llama.cpp's converter writes it."""
    pytest.importorskip("gguf")
    shape = {"hidden_size": 64, "intermediate_size": 96}
    changes = options.pop("changes", {})
    model = source_model(model_type, **(shape | changes))
    return write_gguf(path, model, architecture=architecture or model_type, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("model_type", "head_dim"), [("qwen2", None), ("qwen3", 128)], ids=["qwen2", "qwen3"])
def test_gguf_equals_the_model_it_was_written_from(
    model_type: str, head_dim: int | None, tied: bool, tmp_path: Path
) -> None:
    """With biases, q/k norms and the row order of each architecture."""
    changes: dict[str, Any] = {"tie_word_embeddings": tied} | ({} if head_dim is None else {"head_dim": head_dim})
    path = gguf_of(tmp_path / "tiny.gguf", model_type, changes=changes)
    report = gda.convert(path, tmp_path / "gda")
    assert report.verification is not None
    assert report.verification.passed
    assert report.verification.prompts == "texts"
    original = source_model(model_type, hidden_size=64, intermediate_size=96, **changes)
    assert relative_error(logits(load(tmp_path / "gda"), some_ids()), logits(original, some_ids())) <= 1e-5
    assert gda.verify(path, tmp_path / "gda", method="tensors").passed
    if model_type == "qwen2":  # transformers reads each tokenizer of a Qwen2 as its own, and this one is a Llama's
        with pytest.raises(CheckFailed, match="reads the tokenizer of a qwen2 differently"):
            gda.export(tmp_path / "gda", tmp_path / "back", format="qwen2")
    gda.export(tmp_path / "gda", tmp_path / "back", format=model_type, verify=model_type != "qwen2")
    assert relative_error(logits(load(tmp_path / "back"), some_ids()), logits(original, some_ids())) <= 1e-5


def test_mistral_gguf_converts_as_a_llama(tmp_path: Path) -> None:
    """llama.cpp stores a Mistral as a Llama, which is the same without a window."""
    changes = {"sliding_window": None, "head_dim": 16}
    named = {"general.name": "mistral"}  # transformers would look for tensors of a Mistral then
    path = gguf_of(tmp_path / "tiny.gguf", "mistral", architecture="llama", changes=changes, metadata=named)
    report = gda.convert(path, tmp_path / "gda")
    assert report.config.sliding_window is None
    original = source_model("mistral", hidden_size=64, intermediate_size=96, **changes)
    assert relative_error(logits(load(tmp_path / "gda"), some_ids()), logits(original, some_ids())) <= 1e-5


GGUF_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a window": ("mistral", {"architecture": "llama", "metadata": {"llama.attention.sliding_window": 4096}}, "window"),
    "heads of another width": (
        "qwen3",
        {"changes": {"head_dim": 16}, "metadata": {"qwen3.attention.key_length": 16}},
        "qwen3.attention.key_length is 16",
    ),
    "heads of another width, untold": ("qwen3", {"changes": {"head_dim": 16}}, "q_proj"),
    "experts": ("qwen3", {"changes": {"head_dim": 128}, "architecture": "qwen3moe"}, "qwen3_moe"),
    "a model for images": ("qwen2", {"architecture": "qwen2vl"}, "qwen2vl"),
    "no biases": ("mistral", {"architecture": "qwen2"}, "bias"),
}


@pytest.mark.parametrize("what", GGUF_REFUSED)
def test_gguf_that_transformers_misreads_is_refused(what: str, tmp_path: Path, command: Command) -> None:
    model_type, options, named = GGUF_REFUSED[what]
    path = gguf_of(tmp_path / "tiny.gguf", model_type, **options)
    outcome = command("convert", path, tmp_path / "gda", "--no-verify")
    assert (outcome.code, outcome.error.count("\n")) == (2, 1)
    assert named in outcome.error
    assert os.listdir(tmp_path) == ["tiny.gguf"]
