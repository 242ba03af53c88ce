"""Export of GDA models as GGUF files: what transformers reads back, and which models are refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import gda
from gda.common.files import written_beside
from gda.conversion.sources.gguf import GGUFSource
from gda.conversion.sources.gguf_splits import BYTE_LEVEL_SPLITS
from gda.conversion.sources.tokenizers import NoTokenizerError
from gda.conversion.verify import VerificationFailed

from ..support.commands import Command, assert_refused
from ..support.gguf_files import write_gguf
from ..support.llamas import VOCAB_SIZE, byte_tokenizer, files_of, llama_model, tensors_of
from ..support.tiny import tiny_model
from ..support.tokenizer_kinds import HARD_TEXTS, byte_level_tokenizer, sentencepiece_tokenizer

gguf = pytest.importorskip("gguf")

# Rows of 32 values, which Q8_0 packs.
SHAPE = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "eos_token_id": 1}
QKV_BIASES = {"attention_bias": True, "attention_out_bias": False}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
SQUARE = {"num_attention_heads": 4, "num_noise_heads": 2}
# By name: fields of the GDA model, and llama.cpp's architecture.
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "N = G": ({}, "llama"),
    "N > G": ({"num_attention_heads": 12, "num_noise_heads": 4}, "llama"),
    "a Mistral": ({"num_attention_heads": 9, "num_noise_heads": 1}, "llama"),
    "paired keys": ({"kv_layout": "paired", "num_key_value_heads": 4}, "llama"),
    "tied": ({"tie_word_embeddings": True}, "llama"),
    "all biases": ({"attention_bias": True, "mlp_bias": True}, "llama"),
    "biases of q, k, v": (QKV_BIASES, "llama"),
    "biases of q, k, v, as wide as the model": (QKV_BIASES | SQUARE, "qwen2"),
    "norm of q and k": ({"qk_norm": True}, "qwen3"),
    "llama3": ({"rope_parameters": LLAMA3}, "llama"),
    "yarn": ({"rope_parameters": YARN}, "llama"),
    "linear": ({"rope_parameters": LINEAR}, "llama"),
    "linear, by the older key": ({"rope_parameters": LINEAR | {"type": "linear"}}, "llama"),
}


def saved(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **changes: Any) -> Path:
    """A tiny GDA model with λ of 0.3 and 0.4, and a tokenizer."""
    tiny_model(**(SHAPE | changes)).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def metadata_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_file_equals_model(kind: str, tmp_path: Path) -> None:
    """Logits within 1e-5 and the same text. The file has every tensor that its architecture needs."""
    changes, architecture = KINDS[kind]
    report = gda.export(saved(tmp_path / "gda", **changes), tmp_path / "tiny.gguf", format="gguf")
    assert report.verification is not None
    assert report.verification.relative is not None
    assert report.verification.relative <= 1e-5
    assert report.verification.greedy_match == 1.0
    metadata = metadata_of(tmp_path / "tiny.gguf")
    assert metadata["general.architecture"] == architecture
    assert metadata[f"{architecture}.attention.head_count"] == report.num_attention_heads
    assert metadata[f"{architecture}.attention.key_length"] == 16
    assert (report.format, report.file_type) == ("gguf", "F32")
    assert report.nbytes == os.path.getsize(tmp_path / "tiny.gguf")
    assert sorted(os.listdir(tmp_path)) == ["gda", "tiny.gguf"]


@pytest.mark.parametrize("kind", ["N = G", "tied", "biases of q, k, v, as wide as the model"])
def test_transformers_reads_the_file(kind: str, tmp_path: Path) -> None:
    """It reads the tensors of the plain model bit for bit, and the config fields that its reader supports."""
    model = saved(tmp_path / "gda", **KINDS[kind][0])
    gda.export(model, tmp_path / "tiny.gguf", format="gguf", verify=False)
    gda.export(model, tmp_path / "plain", verify=False, format="qwen2" if "biases" in kind else "llama")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    expected, got = tensors_of(tmp_path / "plain"), read.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert set(got) - set(expected) <= {"lm_head.weight"}
    plain = AutoConfig.from_pretrained(tmp_path / "plain")
    for name in (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "tie_word_embeddings",
        "rope_parameters",
    ):
        assert getattr(read.config, name) == getattr(plain, name), name
    assert read.config.rms_norm_eps == pytest.approx(plain.rms_norm_eps)


def test_rope_scaling(tmp_path: Path) -> None:
    """llama3 is computed by hand: slow frequencies are divided by the factor. Other types are metadata."""
    gda.export(saved(tmp_path / "llama3", rope_parameters=LLAMA3), tmp_path / "llama3.gguf", format="gguf")
    (factors,) = (
        each for each in gguf.GGUFReader(tmp_path / "llama3.gguf").tensors if each.name == "rope_freqs.weight"
    )
    waves = 2 * np.pi * 100.0 ** (np.arange(0, 16, 2) / 16)
    smooth = (32 / waves - 1.0) / 3.0
    between = 1 / ((1 - smooth) / 4.0 + smooth)
    expected = np.where(waves < 32 / 4.0, 1.0, np.where(waves > 32 / 1.0, 4.0, between))
    assert factors.data == pytest.approx(expected, rel=1e-6)
    gda.export(saved(tmp_path / "yarn", rope_parameters=YARN), tmp_path / "yarn.gguf", format="gguf", verify=False)
    metadata = metadata_of(tmp_path / "yarn.gguf")
    scaling = {name.removeprefix("llama.rope.scaling."): value for name, value in metadata.items() if "scaling" in name}
    assert scaling == {"type": "yarn", "factor": 4.0, "original_context_length": 32}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_narrow_types(dtype: str, tmp_path: Path) -> None:
    """Matrices are those of the plain model, rounded; vectors stay float32, and the loss is reported."""
    model = saved(tmp_path / "gda")
    report = gda.export(model, tmp_path / "tiny.gguf", format="gguf", dtype=dtype)
    kind = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert report.file_type == kind
    assert report.verification is not None
    assert report.verification.threshold is None
    assert report.verification.kl is not None
    assert 0 < report.verification.kl < 0.1
    assert any("not lossless" in note for note in report.notes)
    gda.export(model, tmp_path / "plain", verify=False)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert {tensor.tensor_type.name for name, tensor in tensors.items() if "norm" in name} == {"F32"}
    output = tensors_of(tmp_path / "plain")["model.layers.1.self_attn.o_proj.weight"].numpy()
    stored = tensors["blk.1.attn_output.weight"]
    assert stored.tensor_type.name == kind
    quantized = gguf.quantize(output, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(
        gguf.dequantize(stored.data, stored.tensor_type), gguf.dequantize(quantized, stored.tensor_type)
    )


def test_bfloat16_model_stays_bfloat16(tmp_path: Path) -> None:
    tiny_model(**SHAPE).to(torch.bfloat16).save_pretrained(tmp_path / "gda")
    reports = {}
    for dtype in ("keep", "bfloat16"):
        out = tmp_path / dtype / "tiny.gguf"
        report = reports[dtype] = gda.export(tmp_path / "gda", out, format="gguf", dtype=dtype)
        assert report.file_type == "BF16"
        assert any("no tokenizer" in note for note in report.notes)
    assert reports["keep"].verification == reports["bfloat16"].verification
    assert files_of(tmp_path / "keep") == files_of(tmp_path / "bfloat16")


def test_float64_model_is_rounded_with_a_note(tmp_path: Path) -> None:
    """GGUF files of llama.cpp have no float64."""
    tiny_model(**SHAPE).double().save_pretrained(tmp_path / "gda")
    byte_tokenizer().save_pretrained(tmp_path / "gda")
    report = gda.export(tmp_path / "gda", tmp_path / "tiny.gguf", format="gguf")
    assert report.file_type == "F32"
    assert "the matrices are rounded to F32, which is not lossless" in report.notes


def test_second_process_is_refused(tmp_path: Path) -> None:
    with written_beside(tmp_path / "tiny.gguf", alone=True) as file:
        file.write(b"of the first")
        with pytest.raises(BlockingIOError, match="another process is writing"):
            gda.export(saved(tmp_path / "gda"), tmp_path / "tiny.gguf", format="gguf")
    assert (tmp_path / "tiny.gguf").read_bytes() == b"of the first"


def test_q8_0_of_odd_rows_is_float16(tmp_path: Path) -> None:
    """As in llama.cpp, rows whose length is not a multiple of 32 (here 40) are float16."""
    report = gda.export(
        saved(tmp_path / "gda", intermediate_size=40), tmp_path / "tiny.gguf", format="gguf", dtype="q8_0"
    )
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    assert any("F16 and Q8_0" in note for note in report.notes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": 5}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast=16"),
        ({"qk_norm": True, "attention_bias": True}, "attention_bias"),
        ({"qk_norm": True, "rope_parameters": LLAMA3}, "llama3"),
    ],
    ids=str,
)
def test_unsupported_models_are_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    """One line, before anything is written."""
    model = saved(tmp_path / "gda", **changes)
    with pytest.raises(ValueError, match=rf"^gda: .*{named}") as refused:
        gda.export(model, tmp_path / "tiny.gguf", format="gguf")
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == ["gda"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"format": "gguf", "out": "folder"}, r"end in \.gguf"),
        ({"format": "gguf", "resume": True}, "--resume has no effect with --format gguf"),
        ({"format": "gguf", "workers": 2}, "--workers"),
        ({"format": "gguf", "max_shard_size": "1GB"}, "--max-shard-size"),
        ({"dtype": "q8_0"}, "--dtype q8_0 is for --format gguf"),
        ({"tokenizer": "other.gguf"}, "--tokenizer has no effect with --format llama"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "gda")
    with pytest.raises(ValueError, match=named):
        gda.export(model, tmp_path / options.pop("out", "tiny.gguf"), **options)
    assert os.listdir(tmp_path) == ["gda"]


def test_failed_export_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value 70000 overflows float16, or the file fails its verification. An older file stays."""
    model = tiny_model(**SHAPE)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 70000.0
    model.save_pretrained(tmp_path / "gda")
    with pytest.raises(ValueError, match=r"mlp\.down_proj\.weight has values that F16 cannot hold"):
        gda.export(tmp_path / "gda", tmp_path / "tiny.gguf", format="gguf", dtype="float16")
    assert os.listdir(tmp_path) == ["gda"]

    tiny_model(**SHAPE).save_pretrained(tmp_path / "gda")
    gda.export(tmp_path / "gda", tmp_path / "tiny.gguf", format="gguf")
    before = (tmp_path / "tiny.gguf").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        gda.export(tmp_path / "gda", tmp_path / "tiny.gguf", format="gguf")
    monkeypatch.setattr("gda.conversion.writing.gguf_file._interleaved", lambda make, heads: make)
    with pytest.raises(VerificationFailed):
        gda.export(tmp_path / "gda", tmp_path / "tiny.gguf", format="gguf", overwrite=True)
    assert (tmp_path / "tiny.gguf").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["gda", "tiny.gguf"]


def test_missing_disk_space_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    """One line with the free and the required space; no file or folder is left."""
    folder = saved(tmp_path / "gda")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    outcome = command("export", folder, tmp_path / "deep" / "tiny.gguf", "--format", "gguf")
    assert_refused(outcome, f"{tmp_path / 'deep'} has 0.0 GB free, but the result needs")
    assert os.listdir(tmp_path) == ["gda"]


def test_command_reports_type_and_size(tmp_path: Path, command: Command) -> None:
    saved(tmp_path / "gda")
    arguments = ["export", str(tmp_path / "gda"), str(tmp_path / "tiny.gguf"), "--format", "gguf", "--dtype", "q8_0"]
    report = json.loads(command(*arguments, "--json").out)
    assert (report["format"], report["file_type"]) == ("gguf", "Q8_0")
    assert report["nbytes"] == os.path.getsize(tmp_path / "tiny.gguf")
    assert "Q8_0, 0 MB" in command(*arguments, "--overwrite").out


# ----------------------------------------------------------------------------------------------------- tokenizers


def exported(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[str]:
    """Export a model with this tokenizer to tiny.gguf, and return the notes."""
    size = len(tokenizer) + 5  # as in many models, more rows than the tokenizer has tokens
    model = saved(tmp_path / "gda", tokenizer, vocab_size=size)
    return gda.export(model, tmp_path / "tiny.gguf", format="gguf", verify=False, **options).notes


@pytest.mark.parametrize("way", [*BYTE_LEVEL_SPLITS, "sentencepiece"])
def test_tokenizer_is_equal_after_export(way: str, tmp_path: Path) -> None:
    """Ids of difficult texts, chat template and special tokens are the same. Unused ids are marked."""
    tokenizer = sentencepiece_tokenizer() if way == "sentencepiece" else byte_level_tokenizer(way)
    exported(tmp_path, tokenizer)
    read = GGUFSource(tmp_path / "tiny.gguf").tokenizer()
    assert read is not None
    texts = [text for text in HARD_TEXTS if way != "qwen2" or "x̄" not in text]  # the reader knows no NFC, either
    assert [read(text).input_ids for text in texts] == [tokenizer(text).input_ids for text in texts]
    assert (read.bos_token, read.eos_token, read.unk_token) == ("<s>", "</s>", "<unk>")
    messages = [{"role": "user", "content": "Hi"}]
    assert read.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    metadata = metadata_of(tmp_path / "tiny.gguf")
    assert metadata["tokenizer.ggml.pre"] == ("default" if way == "sentencepiece" else way)
    assert metadata["tokenizer.ggml.token_type"][-5:] == [5] * 5
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def test_token_of_a_byte_level_tokenizer_keeps_its_characters(tmp_path: Path) -> None:
    """There "▁" is an ordinary character, which llama.cpp has to find in the text."""
    tokenizer = _with_token(byte_level_tokenizer("llama-bpe"), AddedToken("<|begin▁of▁text|>", special=True))
    exported(tmp_path, tokenizer)
    assert "<|begin▁of▁text|>" in metadata_of(tmp_path / "tiny.gguf")["tokenizer.ggml.tokens"]


def test_token_that_transformers_reads_as_bytes(tmp_path: Path) -> None:
    """As BOS it would get a new id, which has no embedding: the tokenizer is refused, and a conversion says so."""
    tokenizer = _with_token(byte_level_tokenizer("llama-bpe"), AddedToken("<|begin▁of▁text|>", special=True))
    tokenizer.bos_token = "<|begin▁of▁text|>"
    exported(tmp_path, tokenizer)
    with pytest.raises(NoTokenizerError, match="id beyond the embeddings; convert from the safetensors model"):
        GGUFSource(tmp_path / "tiny.gguf").tokenizer()
    report = gda.convert(tmp_path / "tiny.gguf", tmp_path / "again")
    assert any("misreads the tokenizer" in note for note in report.notes)
    assert not (tmp_path / "again" / "tokenizer.json").exists()


def test_notes_say_where_llama_cpp_differs(tmp_path: Path) -> None:
    """Unicode normalization, and spaces where transformers 5 adds none."""
    assert "NFC" in exported(tmp_path / "1", byte_level_tokenizer("qwen2"))[0]
    assert "or after special tokens" in exported(tmp_path / "2", sentencepiece_tokenizer("first"))[0]
    assert exported(tmp_path / "3", sentencepiece_tokenizer("never")) == []


def _without_a_merge(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    del parts["model"]["merges"][-1]
    return _changed(tokenizer, parts)


def _with(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PreTrainedTokenizerFast:
    return _changed(tokenizer, json.loads(tokenizer.backend_tokenizer.to_str()) | changes)


def _with_token(tokenizer: PreTrainedTokenizerFast, token: AddedToken) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([token])
    return tokenizer


def _changed(tokenizer: PreTrainedTokenizerFast, parts: dict[str, Any]) -> PreTrainedTokenizerFast:
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: _with(byte_level_tokenizer("gpt-2"), pre_tokenizer={"type": "Whitespace"}), "splits text in a way"),
        (lambda: _with(byte_level_tokenizer("gpt-2"), normalizer={"type": "Lowercase"}), "normalizer"),
        (lambda: _with(sentencepiece_tokenizer(), normalizer={"type": "NFKC"}), "treats spaces"),
        (lambda: _without_a_merge(sentencepiece_tokenizer()), "merges lack"),
        (lambda: _with_token(sentencepiece_tokenizer(), AddedToken("<a>")), "'<a>' has normalized"),
        (lambda: _with_token(byte_level_tokenizer("gpt-2"), AddedToken("<a>", lstrip=True)), "'<a>' has lstrip"),
        (
            lambda: _with_token(sentencepiece_tokenizer("first"), AddedToken("a▁b", normalized=False)),
            "'a▁b' stands for other text",
        ),
    ],
    ids=["split", "normalizer", "spaces", "merges", "normalized", "lstrip", "space"],
)
def test_unsupported_tokenizer_is_refused(make: Any, named: str, tmp_path: Path) -> None:
    """One line names the remedy, the tokenizer of a GGUF file, and the remedy works."""
    tokenizer = make()
    with pytest.raises(ValueError, match=rf"{named}.*--tokenizer FILE\.gguf"):
        exported(tmp_path, tokenizer)
    assert os.listdir(tmp_path) == ["gda"]


def test_tokenizer_is_copied_from_a_gguf_file(tmp_path: Path) -> None:
    """Every entry is copied unchanged, if the tokens are the model's."""
    other = write_gguf(tmp_path / "other.gguf", llama_model(), metadata={"tokenizer.ggml.pre": "smollm"})
    gda.export(saved(tmp_path / "gda"), tmp_path / "tiny.gguf", format="gguf", verify=False, tokenizer=other)
    copied, original = metadata_of(tmp_path / "tiny.gguf"), metadata_of(other)
    assert {name: copied[name] for name in original if name.startswith("tokenizer.")} == {
        name: value for name, value in original.items() if name.startswith("tokenizer.")
    }
    larger = saved(tmp_path / "larger", vocab_size=272)
    with pytest.raises(ValueError, match=r"other\.gguf has 267 tokens, but the model has 272"):
        gda.export(larger, tmp_path / "larger.gguf", format="gguf", tokenizer=other)


def test_tokenizer_from_gguf_to_gda_and_back(tmp_path: Path) -> None:
    """transformers' reader does not support "smollm" and would merge two spaces before a number differently."""
    source = write_gguf(tmp_path / "tiny.gguf", llama_model(), metadata={"tokenizer.ggml.pre": "smollm"})
    gda.convert(source, tmp_path / "gda", verify=False)
    parts = json.loads((tmp_path / "gda" / "tokenizer.json").read_text())
    assert parts["pre_tokenizer"] == BYTE_LEVEL_SPLITS["smollm"][0]
    gda.export(tmp_path / "gda", tmp_path / "back.gguf", format="gguf", verify=False)
    before, after = metadata_of(source), metadata_of(tmp_path / "back.gguf")
    for name in before:
        if name.startswith("tokenizer."):
            assert after[name] == before[name], name
