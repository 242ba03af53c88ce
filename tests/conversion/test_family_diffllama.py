"""transformers' DiffLlama: converted with equal logits, and exported bit for bit."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DiffLlamaConfig, DiffLlamaForCausalLM

import gda
from gda import GDAConfig, GDAForCausalLM
from gda.conversion.families.diffllama import halves_to_pairs, pairs_to_halves

from ..support import naive
from ..support.checkpoints import logits
from ..support.llamas import change_config, tensors_of, with_older_names
from ..support.relatives import save_diffllama
from ..support.tiny import relative_error, tiny_model, token_ids

pytestmark = pytest.mark.sampled

TOLERANCE = 1e-5
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "MHA": {},
    "GQA": {"num_key_value_heads": 4},
    "one pair": {"num_key_value_heads": 2},
    "biases": {"attention_bias": True, "num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 16, "num_key_value_heads": 4},
    "gelu": {"hidden_act": "gelu", "rms_norm_eps": 0.01},
    "yarn": {"rope_parameters": YARN},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, tmp_path: Path) -> None:
    """With and without a cache, here and by `verify`."""
    source = save_diffllama(tmp_path / "diffllama", **VARIANTS[variant])
    report = gda.convert(source, tmp_path / "gda")
    assert report.verification is not None
    assert (report.verification.method, report.verification.greedy_match) == ("full", 1.0)
    ids = token_ids(2, 13)
    expected = logits(source, ids)
    model = GDAForCausalLM.from_pretrained(tmp_path / "gda").eval()
    with torch.no_grad():
        assert relative_error(model(ids).logits, expected) <= TOLERANCE
        first = model(ids[:, :6], use_cache=True)
        rest = model(ids[:, 6:], past_key_values=first.past_key_values).logits
    assert relative_error(torch.cat((first.logits, rest), dim=1), expected) <= TOLERANCE
    if "rope_parameters" not in VARIANTS[variant] and "hidden_act" not in VARIANTS[variant]:
        assert relative_error(naive.run(model.state_dict(), model.config, ids).logits, expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "layers", "tensors"])
def test_every_method_of_verify(method: str, tmp_path: Path) -> None:
    """All three pass, and all three detect a changed weight."""
    source = save_diffllama(tmp_path / "diffllama", tokenizer=True, num_key_value_heads=4)
    gda.convert(source, tmp_path / "gda", verify=False)
    report = gda.verify(source, tmp_path / "gda", method=method)
    assert report.passed
    assert report.prompts == ("none" if method == "tensors" else "texts")
    tensors = tensors_of(tmp_path / "gda")
    tensors["model.layers.1.self_attn.subln.weight"][0] = 2.0
    save_file(tensors, tmp_path / "gda" / "model.safetensors", metadata={"format": "pt"})
    assert not gda.verify(source, tmp_path / "gda", method=method).passed


@pytest.mark.parametrize(
    ("variant", "dtype"), zip(VARIANTS, itertools.cycle([torch.float32, torch.bfloat16]), strict=False)
)
def test_round_trip_is_bit_for_bit(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights and config equal the source's, and transformers loads them."""
    source = save_diffllama(tmp_path / "diffllama", dtype=dtype, **VARIANTS[variant])
    gda.convert(source, tmp_path / "gda")
    gda.export(tmp_path / "gda", tmp_path / "back", format="diffllama")
    for name in ("model.safetensors", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert after == with_older_names(before)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "back"), DiffLlamaForCausalLM)


def test_trained_model_is_exported_with_lambda(tmp_path: Path) -> None:
    source = save_diffllama(tmp_path / "diffllama")
    gda.convert(source, tmp_path / "gda")
    tensors = tensors_of(tmp_path / "gda")
    for name, tensor in tensors.items():
        if "subln" not in name:
            tensor += 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
    save_file(tensors, tmp_path / "gda" / "model.safetensors", metadata={"format": "pt"})
    gda.export(tmp_path / "gda", tmp_path / "back", format="diffllama")
    ids = token_ids(2, 13)
    trained = logits(tmp_path / "gda", ids)
    assert relative_error(logits(tmp_path / "back", ids), trained) <= TOLERANCE
    assert relative_error(logits(source, ids), trained) > 1e-3


def test_trained_head_norm_is_refused(tmp_path: Path) -> None:
    """A DiffLlama's norm has no weight. The message names the layer."""
    gda.convert(save_diffllama(tmp_path / "diffllama"), tmp_path / "gda")
    tensors = tensors_of(tmp_path / "gda")
    tensors["model.layers.2.self_attn.subln.weight"][5] = 1.001
    save_file(tensors, tmp_path / "gda" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"head norm of layer 2 .*subln is not 1"):
        gda.export(tmp_path / "gda", tmp_path / "back", format="diffllama")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kv_layout": "shared"}, "kv_layout"),
        ({"num_attention_heads": 8, "num_noise_heads": 2}, "num_noise_heads"),
        ({"lambda_type": "tanh"}, "lambda_type"),
        ({"head_norm": False}, "head_norm"),
        ({"head_norm_eps": 1e-3}, "head_norm_eps"),
        ({"qk_norm": True}, "qk_norm"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"hidden_act": "poly_norm"}, "poly_norm"),
        ({"lambda_init_offset": -1}, "layer 0"),
        ({"lambda_init": [0.2, 0.5]}, "layer 1"),
        ({"qk_rank": 2}, "qk_rank"),
    ],
    ids=str,
)
def test_inexpressible_models_are_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    """The message names the field or layer, and no files are written."""
    fitting = {"kv_layout": "paired", "num_attention_heads": 8, "num_noise_heads": 4, "head_norm": True}
    tiny_model(**(fitting | changes)).save_pretrained(tmp_path / "gda")
    with pytest.raises(ValueError, match=named):
        gda.export(tmp_path / "gda", tmp_path / "back", format="diffllama")
    assert not (tmp_path / "back").exists()


def test_lambda_std_dev_is_noted(tmp_path: Path) -> None:
    source = save_diffllama(tmp_path / "diffllama", lambda_std_dev=0.2)
    assert any("lambda_std_dev=0.2" in note for note in gda.convert(source, tmp_path / "gda").notes)


def test_attention_dropout_is_refused(tmp_path: Path) -> None:
    """One line names the file and the field."""
    source = save_diffllama(tmp_path / "diffllama")
    change_config(source, attention_dropout=0.1)
    with pytest.raises(ValueError, match="attention_dropout"):
        gda.convert(source, tmp_path / "gda")


@pytest.mark.parametrize("heads", [2, 4, 10])
def test_halves_to_pairs_and_back(heads: int) -> None:
    """Head h of the first half is followed by head h of the second."""
    rows = torch.arange(heads * 3).unsqueeze(-1) * torch.ones(1, 2)
    pairs = halves_to_pairs(rows, 3)
    for pair in range(heads // 2):
        for member in (0, 1):
            there = pairs[(2 * pair + member) * 3 : (2 * pair + member + 1) * 3]
            head = pair + member * heads // 2
            assert torch.equal(there, rows[head * 3 : (head + 1) * 3])
    assert torch.equal(pairs_to_halves(pairs, 3), rows)
    assert torch.equal(halves_to_pairs(rows[:, 0], 3), pairs[:, 0])


def test_preset_equals_transformers_default() -> None:
    preset, source = GDAConfig.preset("diffllama"), DiffLlamaConfig()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(preset, name) == getattr(source, name)
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "rope_parameters"):
        assert getattr(preset, name) == getattr(source, name)
