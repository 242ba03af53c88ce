"""Presets of known shapes: sizes, parameter counts, and unknown names."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import gda
from gda import GDAConfig
from gda.configuration.presets import PRESETS
from gda.conversion.demo import find_demo_model
from gda.conversion.families.motif import mapped_config, read_motif_config
from gda.conversion.modes.expand import expanded_config
from gda.conversion.options import ConvertOptions

from ..support.checkpoints import needs_smollm2
from ..support.relatives import motif_config, motif_shapes

# Billions of parameters, from the names of the models or the sum of their sizes.
BILLIONS = {
    "motif-2-12.7b": 12.7,
    "motif-2.6b": 2.6,
    "motif-2.6b-lc": 2.6,
    "diff-v1": 3.8,
    "diff-v2": 8.6,
    "diffllama": 1.2,
    "llama-3-8b-expand": 8.2,
    "llama-3.2-1b-expand": 1.3,
    "smollm2-135m-expand": 0.138,
}


def on_meta(config: GDAConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_every_preset_is_tested() -> None:
    assert set(BILLIONS) == set(PRESETS)


@pytest.mark.parametrize("name", BILLIONS)
def test_preset_has_its_size(name: str) -> None:
    """On the meta device; the parameter count agrees with the name."""
    count = on_meta(GDAConfig.preset(name)).num_parameters() / 1e9
    digits = len(str(BILLIONS[name]).split(".")[1])
    assert round(count, digits) == BILLIONS[name]


def test_motif_2_at_full_size_has_its_tensors() -> None:
    """643 tensors with the parameters of the release, and the shapes of an independent port."""
    model = on_meta(GDAConfig.preset("motif-2-12.7b"))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == 643
    layer = "model.layers.39."
    wanted = {
        f"{layer}self_attn.q_proj.weight": (5120, 4096),
        f"{layer}self_attn.k_proj.weight": (2048, 4096),
        f"{layer}self_attn.v_proj.weight": (2048, 4096),
        f"{layer}self_attn.o_proj.weight": (4096, 8192),
        f"{layer}self_attn.subln.weight": (256,),
        f"{layer}self_attn.lambda_q1": (128,),
        f"{layer}mlp.gate_proj.weight": (16384, 4096),
        f"{layer}mlp.up_proj.weight": (16384, 4096),
        f"{layer}mlp.down_proj.weight": (4096, 16384),
        f"{layer}mlp.act_fn.weight": (3,),
        f"{layer}mlp.act_fn.bias": (1,),
        f"{layer}input_layernorm.weight": (4096,),
    }
    assert {name: shapes[name] for name in wanted} == wanted
    fields = motif_config(
        vocab_size=219520,
        hidden_size=4096,
        intermediate_size=16384,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_noise_heads=8,
        num_key_value_heads=16,
        head_dim=128,
    )
    assert shapes == motif_shapes(fields)
    read = mapped_config(read_motif_config(fields, Path("config.json")), None)
    mapped = {name: tuple(tensor.shape) for name, tensor in on_meta(read).state_dict().items()}
    assert mapped == shapes
    assert sum(tensor.numel() for tensor in on_meta(read).state_dict().values()) == 12_703_860_896


def test_releases_of_motif_2_6b() -> None:
    """The long-context release has more positions and another RoPE base, and nothing else differs."""
    first, long = GDAConfig.preset("motif-2.6b"), GDAConfig.preset("motif-2.6b-lc")
    assert (first.max_position_embeddings, long.max_position_embeddings) == (4096, 16384)
    assert (first.rope_theta, long.rope_theta) == (1e4, 5e5)
    long.max_position_embeddings, long.rope_theta = 4096, 1e4
    assert first.to_dict() == long.to_dict()


def test_overrides_do_not_change_the_preset() -> None:
    """Configs modify their RoPE fields, so presets must not share them."""
    first = GDAConfig.preset("motif-2-12.7b", num_hidden_layers=2, rope_parameters={"rope_theta": 5.0})
    assert (first.num_hidden_layers, first.rope_parameters["rope_theta"]) == (2, 5.0)
    GDAConfig.preset("motif-2-12.7b").rope_parameters["rope_theta"] = 7.0
    second = GDAConfig.preset("motif-2-12.7b")
    assert (second.num_hidden_layers, second.rope_parameters["rope_theta"]) == (40, 1e6)
    with pytest.raises(ValueError, match="num_noise_heads"):
        GDAConfig.preset("motif-2-12.7b", num_noise_heads=7)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("motif-2-12b", "motif-2-12.7b"),
        ("Motif-2.6B", "motif-2.6b"),
        ("diff-v3", "diff-v1"),
        ("llama-3-8b", "llama-3-8b-expand"),
        ("xyz", "there are motif-2-12.7b"),
    ],
)
def test_unknown_preset(wrong: str, meant: str) -> None:
    """The message suggests a similar name or lists all."""
    with pytest.raises(ValueError, match=meant):
        GDAConfig.preset(wrong)


def test_family_table_names_presets_and_tests() -> None:
    """Each preset is in docs/family.md, and each test file named there exists."""
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "family.md").read_text(encoding="utf-8")
    assert [name for name in PRESETS if f"`{name}`" not in text and not name.endswith("-expand")] == []
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", text))
    assert len(named) > 5
    assert [name for name in named if not (root / name).is_file()] == []


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (  # embed_dim=3072, num_heads=12: pairs of query heads, each with a pair of keys
            "diff-v1",
            {
                "hidden_size": 3072,
                "num_attention_heads": 24,
                "num_noise_heads": 12,
                "num_key_value_heads": 24,
                "head_dim": 128,
                "kv_layout": "paired",
                "lambda_type": "reparameterized",
                "lambda_init": None,
                "lambda_init_offset": 0,
                "head_norm": True,
                "head_norm_eps": 1e-5,
                "qk_norm": False,
                "qk_rank": None,
            },
        ),
        (  # d_model=4096, num_heads=32 after the subtraction, num_kv_heads=8, head_dim=128
            "diff-v2",
            {
                "hidden_size": 4096,
                "num_attention_heads": 64,
                "num_noise_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "kv_layout": "shared",
                "lambda_type": "sigmoid",
                "lambda_init": 0.0,
                "head_norm": False,
                "qk_norm": False,
                "qk_rank": None,
            },
        ),
    ],
)
def test_diff_presets_match_microsofts_arguments(name: str, fields: dict[str, Any]) -> None:
    """Microsoft's modules count pairs of heads in V1 and differences in V2."""
    preset = GDAConfig.preset(name)
    assert {field: getattr(preset, field) for field in fields} == fields


LLAMAS: dict[str, dict[str, Any]] = {
    "llama-3-8b-expand": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-3.2-1b-expand": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_presets_equal_expanded_configs(name: str) -> None:
    """In every field that affects the result."""
    llama = LlamaConfig(
        **LLAMAS[name],
        vocab_size=128256,
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        bos_token_id=128000,
        eos_token_id=128001,
    )
    expanded = expanded_config(llama, ConvertOptions("llama", "gda"))
    own = {"dtype", "architectures"}  # of a checkpoint, which a preset is not
    wanted = {field: value for field, value in expanded.to_dict().items() if field not in own}
    got = {field: value for field, value in GDAConfig.preset(name).to_dict().items() if field not in own}
    assert got == wanted


@pytest.mark.slow
@needs_smollm2
def test_smollm2_preset_equals_its_conversion(tmp_path: Path) -> None:
    """For the GGUF file that the demo uses."""
    config = gda.convert(find_demo_model(), tmp_path / "gda", dry_run=True).config
    preset = GDAConfig.preset("smollm2-135m-expand")
    own = {"dtype", "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "rms_norm_eps"}
    wanted = {field: value for field, value in config.to_dict().items() if field not in own}
    assert {field: value for field, value in preset.to_dict().items() if field not in own} == wanted
    assert preset.rms_norm_eps == pytest.approx(config.rms_norm_eps)  # a float32 in the file
