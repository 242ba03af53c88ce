"""A converted Llama computes the same function, can be trained, and has the files that transformers writes."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

import gda
from gda import GDAConfig
from gda.configuration.configuration_gda import FADED
from gda.conversion.verify import VerificationFailed
from gda.conversion.writing.write_model import ConvertReport

from ..support.checkpoints import load, logits
from ..support.children import ENDED, in_child
from ..support.llamas import VARIANTS, byte_tokenizer, change_config, files_of, llama_config, save_llama, tensors_of
from ..support.tiny import relative_error

pytestmark = pytest.mark.sampled

# Noise heads for 8 query heads over 4 KV heads: fewer than the KV heads, as many, more.
EIGHT_OVER_FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": True}
LAMBDA_VECTORS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def convert(source: Path, out: Path, **options: Any) -> ConvertReport:
    """`gda.convert` without verification, which the tests do themselves."""
    return gda.convert(source, out, **({"verify": False} | options))


def some_ids(vocab_size: int, seed: int = 0) -> Tensor:
    """Two sequences that are longer than the original context of the scaled RoPEs."""
    return torch.randint(vocab_size, (2, 50), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------- lossless


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens_equal_the_llamas(variant: str, tmp_path: Path) -> None:
    """For every kind of Llama, with a cache; verification agrees."""
    source = save_llama(tmp_path / "llama", **VARIANTS[variant])
    report = gda.convert(source, tmp_path / "gda", max_shard_size="30KB")

    llama, converted = load(source), load(tmp_path / "gda")
    assert isinstance(llama, LlamaForCausalLM)
    assert isinstance(converted, gda.GDAForCausalLM)
    ids = some_ids(llama.config.vocab_size)
    assert relative_error(logits(converted, ids), logits(llama, ids)) <= 1e-5
    texts = [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=True)
        for model in (llama, converted)
    ]
    assert torch.equal(*texts)

    verification = report.verification
    assert verification is not None
    assert (verification.method, verification.passed, verification.greedy_match) == ("full", True, 1.0)
    assert verification.relative is not None
    assert verification.relative <= verification.threshold == 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoint_loads_in_its_own_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Without a dtype argument, weights have the source's dtype, λ is float32, and logits equal the Llama's."""
    source = save_llama(tmp_path / "llama", dtype=dtype)
    convert(source, tmp_path / "gda")
    llama, converted = load(source, "auto"), load(tmp_path / "gda", "auto")
    assert converted.dtype == llama.dtype == dtype
    for name, parameter in converted.named_parameters():
        assert parameter.dtype == (torch.float32 if "lambda" in name else dtype), name
    ids = some_ids(llama.config.vocab_size)
    assert relative_error(logits(converted, ids), logits(llama, ids)) <= 1e-2


def test_source_config_without_dtype(tmp_path: Path) -> None:
    """The converted model still loads in the dtype of its weights."""
    source = save_llama(tmp_path / "llama", dtype=torch.bfloat16)
    change_config(source, dtype=...)
    convert(source, tmp_path / "gda")
    assert load(source, "auto").dtype == torch.bfloat16
    assert load(tmp_path / "gda", "auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "scaling", [None, {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 3.0}], ids=str
)
def test_configs_of_older_transformers_are_read(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    """rope_theta and rope_scaling at top level, torch_dtype, and no head_dim or num_key_value_heads."""
    source = save_llama(tmp_path / "llama", num_key_value_heads=4, max_position_embeddings=32)
    change_config(source, rope_parameters=..., dtype=..., head_dim=..., num_key_value_heads=..., torch_dtype="float32")
    change_config(source, rope_theta=77.0, rope_scaling=scaling)
    convert(source, tmp_path / "gda")
    llama, converted = load(source), load(tmp_path / "gda")
    assert converted.config.rope_parameters == llama.config.rope_parameters
    assert llama.config.rope_parameters["rope_theta"] == 77.0
    ids = some_ids(llama.config.vocab_size)
    assert relative_error(logits(converted, ids), logits(llama, ids)) <= 1e-5


def test_config_without_rope_keeps_llamas_default(tmp_path: Path) -> None:
    """A Llama without RoPE fields has theta 10,000, not GDA's default of 500,000."""
    source = save_llama(tmp_path / "llama")
    change_config(source, rope_parameters=...)
    convert(source, tmp_path / "gda")
    llama, converted = load(source), load(tmp_path / "gda")
    assert converted.config.rope_parameters == llama.config.rope_parameters
    ids = some_ids(llama.config.vocab_size)
    assert relative_error(logits(converted, ids), logits(llama, ids)) <= 1e-5


def test_inv_freq_buffers_and_tied_head_are_dropped(tmp_path: Path) -> None:
    """The result is still lossless without tensors that transformers computes or ties."""
    source = save_llama(tmp_path / "llama", tie_word_embeddings=True)
    tensors = tensors_of(source)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = gda.convert(source, tmp_path / "gda")
    assert report.verification is not None
    assert report.verification.passed
    assert not {"model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"} & set(tensors_of(tmp_path / "gda"))


@pytest.mark.parametrize("method", ["full", "layers"])
def test_tied_config_with_different_lm_head_fails_verification(method: str, tmp_path: Path) -> None:
    """transformers unties such a model, so dropping its lm_head changes the result."""
    source = save_llama(tmp_path / "llama", tie_word_embeddings=True)
    tensors = tensors_of(source)
    tensors["lm_head.weight"] = 2.0 * tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    reason = None
    try:
        convert(source, tmp_path / "gda")
    except ValueError as error:
        reason = str(error)
    if reason is not None:
        assert "lm_head.weight" in reason
        return
    ids = some_ids(load(source).config.vocab_size)
    equal = relative_error(logits(load(tmp_path / "gda"), ids), logits(load(source), ids)) <= 1e-5
    assert gda.verify(source, tmp_path / "gda", method=method).passed == equal


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("lambda_type", ["reparameterized", "tanh"])
@pytest.mark.parametrize("noise_heads", [2, 4, 8])
def test_every_new_weight_gets_a_gradient(noise_heads: int, lambda_type: str, tmp_path: Path) -> None:
    """λ has a gradient at step 0, and every noise row of q_proj (weight and bias) after two optimizer steps."""
    source = save_llama(tmp_path / "llama", **EIGHT_OVER_FOUR)
    convert(source, tmp_path / "gda", noise_heads=noise_heads, lambda_type=lambda_type)
    model = load(tmp_path / "gda").train()
    assert model.config.num_noise_heads == noise_heads
    ids = some_ids(model.config.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    for step in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        if step == 0:
            lambdas = {name: p.grad for name, p in model.named_parameters() if "lambda" in name}
            assert len(lambdas) == 2 * (4 if lambda_type == "reparameterized" else 1)
            for name, gradient in lambdas.items():
                assert gradient is not None, name
                assert (gradient != 0).all(), name
        if step < 2:
            optimizer.step()

    ratio = model.config.signal_noise_ratio
    for layer in model.model.layers:
        for gradient in (layer.self_attn.q_proj.weight.grad, layer.self_attn.q_proj.bias.grad):
            noise_rows = gradient.unflatten(0, (noise_heads, ratio + 1, -1))[:, -1]
            assert (noise_rows != 0).all()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("noise_heads", [1, 2, 4, 8])
def test_lambda_is_exactly_zero_with_nonzero_vectors(noise_heads: int, tmp_path: Path) -> None:
    """The two exponentials are equal, no vector is zero, and the vectors differ between layers."""
    source = save_llama(tmp_path / "llama", **EIGHT_OVER_FOUR)
    convert(source, tmp_path / "gda", noise_heads=noise_heads)
    assert gda.inspect(tmp_path / "gda").lambdas == [0.0, 0.0]
    tensors = tensors_of(tmp_path / "gda")
    first = {name: tensors[f"model.layers.0.self_attn.{name}"] for name in LAMBDA_VECTORS}
    assert torch.equal(first["lambda_q1"], first["lambda_q2"])
    assert torch.equal(first["lambda_k1"], first["lambda_k2"])
    assert not torch.equal(first["lambda_q1"], first["lambda_k1"])
    assert not torch.equal(first["lambda_q1"], tensors["model.layers.1.self_attn.lambda_q1"])
    for vector in first.values():
        assert vector.dtype == torch.float32
        assert (vector != 0).all()


# ----------------------------------------------------------------------------------------------------------- provenance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise_heads", [1, 2, 4, 8])
def test_signal_rows_equal_the_source_and_noise_rows_their_mean(
    noise_heads: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The ratio is signal : noise. By default there is one noise head per KV head."""
    source = save_llama(tmp_path / "llama", dtype=dtype, **EIGHT_OVER_FOUR)
    convert(source, tmp_path / "gda", noise_heads=noise_heads)
    before, after = tensors_of(source), tensors_of(tmp_path / "gda")
    ratio, width = 8 // noise_heads, 8
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        if ".q_proj." not in name:
            assert torch.equal(after[name], tensor), name
            continue
        heads = [after[name][start : start + width] for start in range(0, len(after[name]), width)]
        assert len(heads) == 8 + noise_heads
        source_head = 0
        for group in range(noise_heads):
            members = heads[group * (ratio + 1) : (group + 1) * (ratio + 1)]
            for member in members[:-1]:
                assert torch.equal(member, tensor[source_head * width : (source_head + 1) * width]), name
                source_head += 1
            mean = torch.stack([member.float() for member in members[:-1]]).mean(0)
            off = (members[-1].float() - mean).abs()
            assert 0 < off.max() <= 0.05 * tensor.float().std() * 6, name
            assert not any(torch.equal(members[-1], member) for member in members[:-1])
    new = {name.rpartition(".")[2] for name in set(after) - set(before)}
    assert new == set(LAMBDA_VECTORS)


@pytest.mark.parametrize(
    ("options", "noise_heads"),
    [
        ({}, 4),
        ({"noise_heads": 2}, 2),
        ({"ratio": 4}, 2),
        ({"ratio": "4"}, 2),
        ({"ratio": "4:1"}, 2),
        ({"ratio": "1:1"}, 8),
        ({"ratio": 8}, 1),
    ],
    ids=str,
)
def test_noise_heads_and_ratio_agree(options: dict[str, Any], noise_heads: int, tmp_path: Path) -> None:
    """The ratio is signal : noise. By default there is one noise head per KV head."""
    report = convert(save_llama(tmp_path / "llama", **EIGHT_OVER_FOUR), tmp_path / "gda", **options)
    config = GDAConfig.from_pretrained(tmp_path / "gda")
    assert config.num_noise_heads == report.config.num_noise_heads == noise_heads
    assert (config.num_signal_heads, config.num_attention_heads) == (8, 8 + noise_heads)


@pytest.mark.parametrize(
    "options",
    [{"noise_heads": 3}, {"noise_heads": 0}, {"noise_heads": -4}, {"noise_heads": 16}, {"ratio": 3}, {"ratio": "16:1"}],
    ids=str,
)
def test_impossible_noise_heads_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    """The message lists every possible number, and no files are left."""
    source = save_llama(tmp_path / "llama", **EIGHT_OVER_FOUR)
    with pytest.raises(ValueError, match=r"1 \(8:1\), 2 \(4:1\), 4 \(2:1\), 8 \(1:1\)"):
        convert(source, tmp_path / "gda", **options)
    assert os.listdir(tmp_path) == ["llama"]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "possible"), [(9, 3, {1, 3, 9}), (6, 2, {1, 2, 6}), (4, 4, {1, 2, 4}), (6, 1, {1, 2, 3, 6})]
)
def test_exactly_the_listed_numbers_of_noise_heads_convert(
    heads: int, kv_heads: int, possible: set[int], tmp_path: Path
) -> None:
    """Numbers convert if they divide the signal heads and fit the KV heads, and no others do."""
    changes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 36, "head_dim": 4}
    source = save_llama(tmp_path / "llama", **({**changes, "hidden_size": 4 * heads}))
    converted = set()
    for noise_heads in range(1, heads + 2):
        try:
            gda.convert(source, tmp_path / "gda", noise_heads=noise_heads, dry_run=True)
        except ValueError:
            continue
        converted.add(noise_heads)
    assert converted == possible


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_casts_everything_but_lambda(dtype: str, tmp_path: Path) -> None:
    """λ stays in float32, and config.json names the dtype."""
    source = save_llama(tmp_path / "llama", dtype=torch.bfloat16, attention_bias=True)
    convert(source, tmp_path / "gda", dtype=dtype)
    wanted = getattr(torch, dtype)
    before, after = tensors_of(source), tensors_of(tmp_path / "gda")
    for name, tensor in after.items():
        assert tensor.dtype == (torch.float32 if "lambda" in name else wanted), name
        if name in before and ".q_proj." not in name:
            assert torch.equal(tensor, before[name].to(wanted)), name
    assert json.loads((tmp_path / "gda" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lossless_casts_are_verified_as_lossless(dtype: str, tmp_path: Path) -> None:
    """From bfloat16 to float32 or bfloat16, the limit of 1e-5 applies, and the card mentions no loss."""
    source = save_llama(tmp_path / "llama", dtype=torch.bfloat16)
    report = gda.convert(source, tmp_path / "gda", dtype=dtype)
    assert report.verification is not None
    assert report.verification.threshold == 1e-5
    assert "not lossless" not in (tmp_path / "gda" / "README.md").read_text()


def test_lossy_cast_is_reported(tmp_path: Path) -> None:
    """From float32 to bfloat16, differences are reported without a limit, and the card says so."""
    source = save_llama(tmp_path / "llama")
    report = gda.convert(source, tmp_path / "gda", dtype="bfloat16")
    assert report.verification is not None
    assert report.verification.threshold is None
    assert report.verification.passed
    assert report.verification.relative is not None
    assert report.verification.relative > 1e-4
    assert "not lossless" in (tmp_path / "gda" / "README.md").read_text()
    assert not gda.verify(source, tmp_path / "gda", threshold=1e-5).passed


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB", "1KB"])
@pytest.mark.parametrize("variant", ["gqa", "tied", "mlp_bias", "bf16", "fp16"])
def test_files_equal_those_of_save_pretrained(variant: str, max_shard_size: str, tmp_path: Path) -> None:
    """Names, order and bytes of the shards and the index."""
    source = save_llama(tmp_path / "llama", **VARIANTS[variant], num_hidden_layers=3)
    report = convert(source, tmp_path / "gda", max_shard_size=max_shard_size)
    # A model from the constructor: one from from_pretrained is saved in alphabetical order instead.
    loaded = load(tmp_path / "gda", "auto")
    made = gda.GDAForCausalLM._from_config(loaded.config)
    made.load_state_dict(loaded.state_dict(), assign=True)
    made.tie_weights()
    made.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    ours, theirs = files_of(tmp_path / "gda"), files_of(tmp_path / "saved")
    weights = sorted(name for name in theirs if name.endswith(".safetensors"))
    assert weights == sorted(name for name in ours if name.endswith(".safetensors"))
    assert report.num_files == len(weights)
    for name in weights:
        assert ours[name] == theirs[name], name
    assert ours.get("model.safetensors.index.json") == theirs.get("model.safetensors.index.json")
    assert ("model.safetensors.index.json" in ours) == (max_shard_size != "5GB")


def test_file_equals_that_of_safetensors_save_file(tmp_path: Path) -> None:
    """With tensors of four dtypes."""
    from gda.conversion.tensors.safetensors_io import TensorSpec, file_order, write_safetensors

    dtypes = [torch.float16, torch.float64, torch.bfloat16, torch.float32]
    tensors = {
        f"{name}.{index}é": torch.randn(index + 1, 3).to(dtype)
        for name in ("b", "a.c", "a")
        for index, dtype in enumerate(dtypes)
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    digest = write_safetensors(tmp_path / "ours", specs, ((name, tensors[name]) for name in file_order(specs)))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == hashlib.sha256((tmp_path / "theirs").read_bytes()).hexdigest()


def test_companion_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    """Tokenizer, chat template, generation config and licence; no other file of the source."""
    source = save_llama(tmp_path / "llama")
    (source / "LICENSE").write_bytes(b"A licence.\r\n")
    (source / "USE_POLICY.md").write_text("Be kind.")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "tokenizer.model").write_bytes(bytes(range(256)))
    (source / "pytorch_model.bin").write_bytes(b"not to be copied")
    (source / "modeling_llama.py").write_text("raise SystemExit")
    convert(source, tmp_path / "gda")
    before, after = files_of(source), files_of(tmp_path / "gda")
    made = {"model.safetensors", "config.json", "conversion.json", "trainable.json", "README.md"}
    made |= {"configuration_gda.py", "modeling_gda.py", "attention_gda.py"}
    assert set(after) - made == {
        "LICENSE",
        "USE_POLICY.md",
        "additional_chat_templates/tools.jinja",
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    for name in set(after) - made:
        assert after[name] == before[name], name
    assert made <= set(after)


def test_tokenizer_of_out_equals_the_sources(tmp_path: Path) -> None:
    """AutoTokenizer gives the same ids and the same chat text."""
    source = save_llama(tmp_path / "llama")
    convert(source, tmp_path / "gda")
    original, copied = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "gda")
    text = "The other of them ran.\n"
    assert copied(text).input_ids == original(text).input_ids == byte_tokenizer()(text).input_ids
    messages = [{"role": "user", "content": "Hi"}]
    assert copied.apply_chat_template(messages, tokenize=False) == "<|user|>Hi"


def test_generation_config_is_created_from_the_config(tmp_path: Path) -> None:
    """So that generation stops at the source's end token."""
    source = save_llama(tmp_path / "llama")
    (source / "generation_config.json").unlink()
    convert(source, tmp_path / "gda")
    assert load(tmp_path / "gda").generation_config.eos_token_id == load(source).generation_config.eos_token_id == 1


def test_config_json_holds_every_field(tmp_path: Path) -> None:
    """It has all fields of GDAConfig and no settings of the conversion."""
    import dataclasses

    from transformers import PreTrainedConfig

    source = save_llama(tmp_path / "llama", attention_bias=True, rms_norm_eps=7e-6)
    convert(source, tmp_path / "gda", ratio=2, seed=3)
    written = json.loads((tmp_path / "gda" / "config.json").read_text())
    own = (
        {field.name for field in dataclasses.fields(GDAConfig)}
        - {*FADED, "fade"}
        - {field.name for field in dataclasses.fields(PreTrainedConfig)}
    )
    assert own <= set(written)
    assert not {"seed", "mode", "max_shard_size", "ratio", "noise_heads"} & set(written)
    assert written["model_type"] == "gda"
    assert written["architectures"] == ["GDAForCausalLM"]
    assert written["lambda_init"] == 0.0
    of_source = json.loads((source / "config.json").read_text())
    for name in set(of_source) & set(written) - {"model_type", "architectures", "num_attention_heads"}:
        assert written[name] == of_source[name], name
    loaded = load(tmp_path / "gda").config
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "gda" / "config.json").read_bytes()


def test_conversion_json_records_the_origin_of_everything(tmp_path: Path) -> None:
    """Hashes of source and result, settings, versions and the origin of each tensor, without paths and dates."""
    source = save_llama(tmp_path / "llama", **VARIANTS["shards"])
    report = gda.convert(source, tmp_path / "gda", ratio=4, seed=5, lambda_type="tanh", max_shard_size="20KB")
    output = json.loads((tmp_path / "gda" / "conversion.json").read_text())

    def digests(folder: Path) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}

    assert len(digests(source)) > 1
    assert output["source"]["sha256"] == digests(source)
    assert output["source"]["name"] == "llama"
    assert output["source"]["num_parameters"] == load(source).num_parameters()
    assert output["sha256"] == report.sha256 == digests(tmp_path / "gda")
    assert output["settings"] == {
        "mode": "expand",
        "dtype": "keep",
        "seed": 5,
        "max_shard_size": "20KB",
        "num_noise_heads": 1,
        "lambda_type": "tanh",
        "lossless": True,
        "qk_rank": None,
        "layout": None,
        "growth": None,
        "split": None,
        "export": None,
    }
    assert output["versions"]["gda"] == gda.__version__
    assert output["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report.verification is not None
    assert output["verification"] == report.verification.to_dict()
    assert set(output["tensors"]) == set(tensors_of(tmp_path / "gda"))
    of_source = set(tensors_of(source))
    for name, origin in output["tensors"].items():
        assert origin["how"], name
        assert origin["from"] == ([name] if name in of_source else []), name
    assert str(tmp_path) not in json.dumps(output)


def test_model_card_has_metadata_and_verified_numbers(tmp_path: Path) -> None:
    """huggingface_hub parses it; it names the library, tags and the source's licence."""
    source = save_llama(tmp_path / "llama")
    (source / "README.md").write_text("---\nlicense: llama3.2\nlanguage:\n- en\n---\n# A Llama\n")
    report = gda.convert(source, tmp_path / "gda", dtype="bfloat16")
    card = huggingface_hub.ModelCard.load(tmp_path / "gda" / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["license"], data["language"]) == ("transformers", "llama3.2", ["en"])
    assert "gda" in data["tags"]
    assert "base_model" not in data  # a folder's name is not a Hub id
    verification = report.verification
    assert verification is not None
    assert f"{verification.relative:.2e}" in card.text
    assert f"{verification.kl:.2e}" in card.text
    assert f"{verification.tokens} tokens" in card.text
    assert "s s n  s s n" in card.text
    assert verification.greedy_match is not None
    assert f"{100 * verification.greedy_match:.2f} %" in card.text


@pytest.mark.parametrize(
    "options", [{}, {"head_norm": True, "kv_layout": "paired"}, {"lambda_type": "sigmoid"}], ids=str
)
def test_model_card_says_what_is_faded_in(options: dict[str, Any], tmp_path: Path) -> None:
    """A λ that is faded in has no gradient before."""
    report = gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", verify=False, **options)
    card = (tmp_path / "gda" / "README.md").read_text()
    assert ("have gradients from the first training steps on" in card) == (report.config.lambda_target is None)
    assert ("raises `fade` from 0 to 1" in card) == (report.config.fade is not None)


def test_history_names_the_options(tmp_path: Path) -> None:
    """After training it is the only record of them."""
    options = {"qk_rank": 4, "head_norm": True}
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", verify=False, **options)
    record = json.loads((tmp_path / "gda" / "conversion.json").read_text())
    (step,) = record["history"]
    assert step.startswith("`expand` (")
    assert "head_norm True" in step
    assert "qk_rank 4" in step


def test_model_card_without_verification(tmp_path: Path) -> None:
    """It contains no numbers."""
    convert(save_llama(tmp_path / "llama"), tmp_path / "gda")
    text = huggingface_hub.ModelCard.load(tmp_path / "gda" / "README.md").text
    assert "Not verified." in text
    assert 'from_pretrained("path/or/id", trust_remote_code=True)' in text  # which needs no installation
    assert "KL divergence" not in text


@pytest.mark.parametrize(
    ("links", "wanted"),
    [
        ([], "`pip install -c constraints.txt -e .` in a clone of its repository"),
        (["Documentation, https://a.example", "Repository, https://b.example/gda"], "git+https://b.example/gda`"),
    ],
    ids=["no repository", "repository"],
)
def test_model_card_says_how_to_install_the_package(
    links: list[str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = Message()
    for link in links:
        described["Project-URL"] = link
    monkeypatch.setattr("gda.conversion.writing.card.metadata", lambda _name: described)
    convert(save_llama(tmp_path / "llama"), tmp_path / "gda")
    assert wanted in (tmp_path / "gda/README.md").read_text()


# ---------------------------------------------------------------------------------------------------------- determinism


def test_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    """Two conversions of equal sources are equal byte for byte, verification included."""
    outputs = []
    for place in ("first", "second"):
        source = save_llama(tmp_path / place / "llama", **VARIANTS["shards"])
        gda.convert(source, tmp_path / place / "gda", seed=7, max_shard_size="20KB")
        outputs.append(files_of(tmp_path / place / "gda"))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("lambda_type", ["reparameterized", "tanh"])
def test_seed_changes_only_noise_rows_and_lambda_vectors(lambda_type: str, tmp_path: Path) -> None:
    source = save_llama(tmp_path / "llama", attention_bias=True)
    for seed in (0, 1):
        convert(source, tmp_path / str(seed), seed=seed, lambda_type=lambda_type)
    first, second = tensors_of(tmp_path / "0"), tensors_of(tmp_path / "1")
    assert set(first) == set(second)
    for name in first:
        if ".q_proj." in name:
            a, b = (tensors[name].unflatten(0, (2, 3, 8)) for tensors in (first, second))
            assert torch.equal(a[:, :2], b[:, :2]), name
            assert (a[:, 2] != b[:, 2]).any(dim=-1).all(), name
        elif any(vector in name for vector in LAMBDA_VECTORS):
            assert not torch.equal(first[name], second[name]), name
        else:
            assert torch.equal(first[name], second[name]), name


def test_number_of_threads_changes_no_byte(tmp_path: Path) -> None:
    """Sums over large matrices are divided among threads."""
    source = save_llama(
        tmp_path / "llama", hidden_size=512, num_attention_heads=16, num_key_value_heads=4, head_dim=32, vocab_size=300
    )

    def on(threads: int) -> None:
        torch.set_num_threads(threads)
        convert(source, tmp_path / str(threads))

    for threads in (1, 2, 3):
        assert in_child(lambda threads=threads: on(threads)) == ENDED
    one, two, three = (files_of(tmp_path / str(threads)) for threads in (1, 2, 3))
    assert one == two == three


# -------------------------------------------------------------------------------------------------------------- dry run


def test_dry_run_writes_nothing_and_reports_the_same_numbers(tmp_path: Path) -> None:
    """Not even the parents of OUT are created."""
    source = save_llama(tmp_path / "llama", **VARIANTS["shards"])
    options: dict[str, Any] = {"ratio": 2, "max_shard_size": "20KB"}
    dry = gda.convert(source, tmp_path / "deep" / "gda", dry_run=True, **options)
    assert os.listdir(tmp_path) == ["llama"]
    real = convert(source, tmp_path / "gda", **options)
    assert dry.dry_run
    assert not real.dry_run
    assert (dry.num_tensors, dry.num_parameters, dry.nbytes, dry.num_files) == (
        real.num_tensors,
        real.num_parameters,
        real.nbytes,
        real.num_files,
    )
    model = load(tmp_path / "gda")
    assert real.num_parameters == model.num_parameters()
    assert real.nbytes == sum(t.numel() * t.element_size() for t in tensors_of(tmp_path / "gda").values())
    assert real.num_files == len(list((tmp_path / "gda").glob("*.safetensors"))) > 1


def test_report_is_json_serializable(tmp_path: Path) -> None:
    """The dictionary includes the verification."""
    report = gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda")
    output = report.to_dict()
    assert json.loads(json.dumps(output, allow_nan=False)) == output
    assert output["verification"]["passed"] is True
    assert (output["num_signal_heads"], output["num_noise_heads"]) == (4, 2)


def test_attention_dropout_is_dropped_with_a_note(tmp_path: Path) -> None:
    """Differential attention has no dropout."""
    source = save_llama(tmp_path / "llama", attention_dropout=0.1)
    report = convert(source, tmp_path / "gda")
    assert any("attention_dropout=0.1" in note for note in report.notes)
    assert load(tmp_path / "gda").config.attention_dropout == 0


def test_missing_parents_of_out_are_created(tmp_path: Path) -> None:
    convert(save_llama(tmp_path / "llama"), tmp_path / "a" / "b" / "gda")
    assert os.listdir(tmp_path / "a" / "b") == ["gda"]


# --------------------------------------------------------------------------------------------------------- verification


@pytest.mark.parametrize("method", ["full", "layers"])
@pytest.mark.parametrize("variant", ["gqa", "mlp_bias"])
def test_reported_numbers_match_their_definitions(variant: str, method: str, tmp_path: Path) -> None:
    """max, mean, KL and agreement, computed here from the logits of both models."""
    from gda.conversion.logits import PROMPTS

    source = save_llama(tmp_path / "llama", **VARIANTS[variant])
    convert(source, tmp_path / "gda", dtype="bfloat16")
    report = gda.verify(source, tmp_path / "gda", method=method)
    llama, converted, tokenizer = load(source), load(tmp_path / "gda"), AutoTokenizer.from_pretrained(source)
    read = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    if method == "layers":  # two rows of 16 tokens, of which 12 are read at once
        read = list(torch.cat(read, dim=1)[0, : 2 * 16].view(2, 16)[:, :12].split(1))
    pairs = [(logits(llama, ids)[0].double(), logits(converted, ids)[0].double()) for ids in read]
    expected, got = (torch.cat(side) for side in zip(*pairs, strict=True))
    assert (report.method, report.tokens) == (method, len(expected))
    assert report.max_abs == pytest.approx((got - expected).abs().max().item(), rel=1e-4)
    assert report.mean_abs == pytest.approx((got - expected).abs().mean().item(), rel=1e-4)
    assert report.relative == pytest.approx(((got - expected).abs().max() / expected.abs().max()).item(), rel=1e-4)
    kl = torch.nn.functional.kl_div(got.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="sum")
    assert report.kl == pytest.approx(kl.item() / len(expected), rel=1e-3)
    agreement = (got.argmax(-1) == expected.argmax(-1)).double().mean().item()
    assert report.top1_agreement == pytest.approx(agreement)


@pytest.mark.parametrize("method", ["full", "layers", "tensors"])
@pytest.mark.parametrize("tensor", ["model.layers.1.self_attn.o_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_every_method_detects_a_changed_weight(method: str, tensor: str, tmp_path: Path) -> None:
    """An unchanged result passes, and a change in any tensor that affects the output fails."""
    source = save_llama(tmp_path / "llama")
    convert(source, tmp_path / "gda")
    assert gda.verify(source, tmp_path / "gda", method=method).passed
    tensors = tensors_of(tmp_path / "gda")
    tensors[tensor].view(-1)[5] += 0.5
    save_file(tensors, tmp_path / "gda" / "model.safetensors", metadata={"format": "pt"})
    report = gda.verify(source, tmp_path / "gda", method=method)
    assert not report.passed
    if method == "tensors":
        assert report.different_tensors == [tensor]
    else:
        assert report.relative is not None
        assert report.relative > 1e-5


def swap_heads(rows: torch.Tensor) -> None:
    """Swap the first two heads, of width 8, in a projection."""
    rows[:16] = rows[:16].roll(8, 0)


LAST = "model.layers.1."
# By name, a change of one tensor of a GDA model: as small as the reduced number of tokens must show.
FAULTS: dict[str, tuple[str, Callable[[torch.Tensor], Any]]] = {
    "permuted query heads": (f"{LAST}self_attn.q_proj.weight", swap_heads),
    "permuted key heads": (f"{LAST}self_attn.k_proj.weight", swap_heads),
    "permuted value heads": (f"{LAST}self_attn.v_proj.weight", swap_heads),
    "permuted output columns": (f"{LAST}self_attn.o_proj.weight", lambda weight: swap_heads(weight.T)),
    "λ": (f"{LAST}self_attn.lambda_q1", lambda vector: vector.add_(0.01)),
    "a query row": (f"{LAST}self_attn.q_proj.weight", lambda weight: weight[3].mul_(1.02)),
    "a gate row": (f"{LAST}mlp.gate_proj.weight", lambda weight: weight[7].mul_(1.02)),
    "a down row": (f"{LAST}mlp.down_proj.weight", lambda weight: weight[30].mul_(1.02)),
    "a row of the head": ("lm_head.weight", lambda weight: weight[200].mul_(1.02)),
    "a norm": (f"{LAST}post_attention_layernorm.weight", lambda weight: weight[5].mul_(1.02)),
    "NaN": (f"{LAST}mlp.up_proj.weight", lambda weight: weight[7, 7].fill_(float("nan"))),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("variant", ["gqa", "bf16"])
def test_layers_method_detects_a_fault_of_the_last_layer(variant: str, fault: str, tmp_path: Path) -> None:
    source = save_llama(tmp_path / "llama", **VARIANTS[variant])
    convert(source, tmp_path / "gda")
    assert gda.verify(source, tmp_path / "gda", method="layers").passed
    tensors, (name, change) = tensors_of(tmp_path / "gda"), FAULTS[fault]
    change(tensors[name])
    save_file(tensors, tmp_path / "gda" / "model.safetensors", metadata={"format": "pt"})
    assert not gda.verify(source, tmp_path / "gda", method="layers").passed


@pytest.mark.parametrize("variant", ["gqa", "linear", "dynamic", "yarn", "longrope", "llama3"])
def test_layers_method_detects_another_rope(variant: str, tmp_path: Path) -> None:
    """A base that is 1 % larger."""
    source = save_llama(tmp_path / "llama", **VARIANTS[variant])
    convert(source, tmp_path / "gda")
    assert gda.verify(source, tmp_path / "gda", method="layers").passed
    rope = GDAConfig.from_pretrained(tmp_path / "gda").rope_parameters
    change_config(tmp_path / "gda", rope_parameters=rope | {"rope_theta": 101.0}, rope_theta=101.0)
    assert not gda.verify(source, tmp_path / "gda", method="layers").passed


def test_tensors_method_detects_changes_without_effect(tmp_path: Path) -> None:
    """While λ is 0, a changed noise row changes no logit: `full` passes, and `tensors` names it."""
    source = save_llama(tmp_path / "llama")
    convert(source, tmp_path / "gda")
    tensors = tensors_of(tmp_path / "gda")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name][-1, 0] += 1.0  # the last row is of the last noise head
    save_file(tensors, tmp_path / "gda" / "model.safetensors", metadata={"format": "pt"})
    assert gda.verify(source, tmp_path / "gda", method="full").passed
    assert gda.verify(source, tmp_path / "gda", method="tensors").different_tensors == [name]


def test_threshold(tmp_path: Path) -> None:
    """A difference passes a threshold above it and fails one below it."""
    source = save_llama(tmp_path / "llama")
    convert(source, tmp_path / "gda", dtype="bfloat16")
    relative = gda.verify(source, tmp_path / "gda", method="layers").relative
    assert relative is not None
    assert gda.verify(source, tmp_path / "gda", method="layers", threshold=1.01 * relative).passed
    assert not gda.verify(source, tmp_path / "gda", method="layers", threshold=0.99 * relative).passed


@pytest.mark.parametrize("method", ["full", "layers"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_logits_fail_a_lossy_conversion(method: str, value: float, tmp_path: Path) -> None:
    """Without any threshold."""
    source = save_llama(tmp_path / "llama")
    convert(source, tmp_path / "gda", dtype="bfloat16")
    tensors = tensors_of(tmp_path / "gda")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, tmp_path / "gda" / "model.safetensors", metadata={"format": "pt"})
    report = gda.verify(source, tmp_path / "gda", method=method)
    assert report.threshold is None
    assert not report.passed


def test_nonfinite_source_is_named_in_the_error(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "llama")
    tensors = tensors_of(source)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationFailed, match="finite"):
        gda.convert(source, tmp_path / "gda")
    assert os.listdir(tmp_path) == ["llama"]


def test_source_without_tokenizer_is_verified_on_random_ids(tmp_path: Path) -> None:
    """The ids are the same every time."""
    source = save_llama(tmp_path / "llama", tokenizer=False)
    report = gda.convert(source, tmp_path / "gda", dtype="bfloat16")
    assert report.verification is not None
    assert report.verification.tokens == 8 * 48
    assert not (tmp_path / "gda" / "tokenizer.json").exists()
    assert gda.verify(source, tmp_path / "gda") == report.verification


def test_failed_verification_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No OUT, nothing beside it, and no parents created for it."""
    from gda.conversion.modes import expand

    right = expand._with_noise_rows
    monkeypatch.setattr(expand, "_with_noise_rows", lambda *args, **options: right(*args, **options).flip(0))
    source = save_llama(tmp_path / "llama")
    with pytest.raises(VerificationFailed, match="verification failed: relative") as failed:
        gda.convert(source, tmp_path / "deep" / "gda")
    assert not failed.value.report.passed
    assert os.listdir(tmp_path) == ["llama"]


@pytest.mark.parametrize("moved", ["renamed source", "no conversion.json"])
def test_verify_needs_only_the_two_folders(moved: str, tmp_path: Path) -> None:
    """The source may have another name. Without conversion.json, the conversion is assumed to be lossless."""
    source = save_llama(tmp_path / "llama")
    convert(source, tmp_path / "gda")
    if moved == "renamed source":
        source = source.rename(tmp_path / "other")
        assert gda.verify(source, tmp_path / "gda", method="tensors").passed
    else:
        (tmp_path / "gda" / "conversion.json").unlink()
    report = gda.verify(source, tmp_path / "gda")
    assert report.passed
    assert report.threshold == 1e-5


# --------------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import re, sys
from pathlib import Path
import psutil
import gda, gda.conversion.convert, transformers.models.llama.modeling_llama, gda.modeling_gda.modeling_gda
source, out = sys.argv[1:]
gda.convert(source, out, dry_run=True)
before = psutil.Process().memory_info().rss
gda.convert(source, out, verify=False, max_shard_size="100MB")
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(int(peak[1]) * 1024 - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_bounded(tmp_path: Path) -> None:
    """A 300 MB checkpoint whose largest tensor has 8 MB converts within 150 MB beyond the imports."""
    config = llama_config(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=9,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=4096,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    values = torch.randn(4096 * 1024).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.copy_(values[: parameter.numel()].view(parameter.shape))
    model.save_pretrained(tmp_path / "llama", max_shard_size="100MB")
    size = sum(path.stat().st_size for path in (tmp_path / "llama").glob("*.safetensors"))
    assert size > 250e6
    del model
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "llama"), str(tmp_path / "gda")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(measured.stdout) < 150e6
    shutil.rmtree(tmp_path / "llama")
    shutil.rmtree(tmp_path / "gda")
