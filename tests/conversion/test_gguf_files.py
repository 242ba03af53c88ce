"""GGUF files as people have them: scaled RoPE, split models, blobs without a suffix, folders, and files cut off."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import gda
from gda.conversion.sources.gguf_rope import scaling_in_tensor

from ..support.checkpoints import load, logits
from ..support.commands import Command, assert_refused
from ..support.gguf_files import SHAPE, llama3_factors, write_gguf
from ..support.llama_like import source_model
from ..support.llamas import llama_config, llama_model, save_llama, tensors_of
from ..support.tiny import relative_error, token_ids

pytestmark = pytest.mark.sampled

gguf = pytest.importorskip("gguf")

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}


def require_equal(path: Path, out: Path, expected: PreTrainedModel) -> None:
    """Convert a GGUF file and compare its logits with those of the model that was written."""
    report = gda.convert(path, out)
    assert report.verification is not None
    assert report.verification.passed
    ids = token_ids(2, 100)
    assert relative_error(logits(out, ids), logits(expected, ids)) < 1e-5


# ---------------------------------------------------------------------------------------------------------------- RoPE


@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
def test_rope_freqs_are_llama3s_scaling(factor: float, tmp_path: Path) -> None:
    """Logits equal those of transformers' Llama with the parameters that the converter computed the tensor from."""
    rope = {"rope_type": "llama3", "rope_theta": 100.0, "factor": factor, **LLAMA3}
    llama = llama_model(**SHAPE, rope_parameters=rope)
    factors = {"rope_freqs.weight": llama3_factors(100.0, 16, rope)}
    path = write_gguf(tmp_path / "tiny.gguf", llama, extra_tensors=factors)
    require_equal(path, tmp_path / "gda", llama)
    config = load(tmp_path / "gda").config
    default = {"rope_type": "default", "rope_theta": 100.0}
    assert config.rope_parameters == (default if factor == 1 else rope)
    assert gda.verify(path, tmp_path / "gda", method="layers").passed
    assert gda.verify(path, tmp_path / "gda", method="tensors").passed


@pytest.mark.parametrize("factor", [8.0, 32.0, 16.0])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("length", [8192, 5000])
def test_parameters_of_llama3_are_found_exactly(factor: float, width: int, length: int) -> None:
    """Of Llama 3.1, 3.2 and 3.3, and others. Only ratios of low and high factors and the length matter."""
    config = llama_config(head_dim=width, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    usual = LLAMA3 | {"factor": factor, "original_max_position_embeddings": length}
    doubled = usual | {name: 2 * usual[name] for name in LLAMA3}
    for scaling in (usual, doubled):
        factors = llama3_factors(500000.0, width, scaling)
        assert scaling_in_tensor(config, factors) == {"rope_type": "llama3", **usual}
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}


@pytest.mark.parametrize(
    "factors",
    [
        torch.linspace(1, 8, 8),
        torch.full((8,), 4.0),
        torch.full((8,), torch.nan),
        torch.zeros(8),
        torch.tensor([0.0, 1e-30, 1e30, 2.0, torch.inf, 3.0, 4.0, torch.inf]),
        torch.ones(4).mul(2),
    ],
    ids=["not linear", "one factor", "nan", "zero", "infinite", "too few"],
)
def test_other_factors_are_refused(factors: torch.Tensor, command: Command, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama_model(**SHAPE), extra_tensors={"rope_freqs.weight": factors})
    assert_refused(command("convert", path, tmp_path / "gda"), "tiny.gguf", "rope_freqs.weight", "safetensors")
    assert os.listdir(tmp_path) == ["tiny.gguf"]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}),
        (
            YARN | {"rope.scaling.original_context_length": 64, "rope.scaling.finetuned": True},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        (
            YARN | {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        ),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0}, {"rope_type": "default"}),
        ({"rope.scaling.attn_factor": 1.0}, {"rope_type": "default"}),
    ],
    ids=[
        "linear",
        "no type",
        "old key",
        "yarn",
        "yarn, length",
        "yarn, betas",
        "none",
        "factor 1",
        "factor of attention",
    ],
)
def test_scaling_in_the_metadata(
    metadata: dict[str, Any], scaling: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    """Logits equal those of transformers' model with the same scaling."""
    width = 128 if architecture == "qwen3" else 16  # transformers reads no other width of a Qwen3
    fields: dict[str, Any] = {"max_position_embeddings": 512, "rope_parameters": {"rope_theta": 500.0, **scaling}}
    if architecture == "llama":
        model: PreTrainedModel = llama_model(**SHAPE, **fields)
    else:
        model = source_model(architecture, hidden_size=64, intermediate_size=96, head_dim=width, **fields)
    widths = {"attention.key_length": width, "attention.value_length": width}
    entries = {f"{architecture}.{key}": value for key, value in (metadata | widths).items()}
    path = write_gguf(tmp_path / "tiny.gguf", model, architecture=architecture, metadata=entries)
    require_equal(path, tmp_path / "gda", model)
    assert load(tmp_path / "gda").config.rope_parameters == {"rope_theta": 500.0, **scaling}


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, "rope.scaling.type is 'longrope'"),
        ({"llama.rope.scaling.attn_factor": 1.2}, "rope.scaling.attn_factor is 1.2"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, "rope.scaling.yarn_log_multiplier"),
        ({"llama.rope.scaling.yarn_beta_fast": 16.0}, "rope.scaling.yarn_beta_fast is 16"),
        ({"llama.rope.scaling.factor": -2.0}, "rope.scaling.factor is -2.0"),
        ({"llama.rope.scaling.factor": "four"}, "four"),
        ({"llama.rope.scaling.factor": 2.0, "rope_freqs": True}, "both rope_freqs.weight and rope.scaling"),
        ({"rope_freqs": True}, "rope_freqs.weight has no counterpart"),
    ],
    ids=[
        "type",
        "factor of attention",
        "log multiplier",
        "beta",
        "negative",
        "text",
        "both",
        "tensor of another architecture",
    ],
)
def test_scaling_that_transformers_lacks(
    metadata: dict[str, Any], named: str, command: Command, tmp_path: Path
) -> None:
    model: PreTrainedModel = llama_model(**SHAPE)
    architecture = "llama" if any(key.startswith("llama.") for key in metadata) else "qwen2"
    if architecture == "qwen2":
        model = source_model("qwen2", hidden_size=64, intermediate_size=96)
    extra = {"rope_freqs.weight": llama3_factors(100.0, 16, LLAMA3 | {"factor": 8.0})}
    extra = extra if metadata.pop("rope_freqs", False) else {}
    path = write_gguf(tmp_path / "tiny.gguf", model, architecture=architecture, metadata=metadata, extra_tensors=extra)
    assert_refused(command("convert", path, tmp_path / "gda"), "tiny.gguf", named, "safetensors")


@pytest.mark.parametrize("variant", ["llama3", "linear", "yarn"])
def test_exported_scaling_is_read_back(variant: str, tmp_path: Path) -> None:
    """Source, its GGUF file and the GDA model of that have the same parameters of RoPE."""
    llama = save_llama(tmp_path / "llama", **(SHAPE | {"rope_parameters": _scaled(variant)}))
    gda.convert(llama, tmp_path / "gda", verify=False)
    gda.export(tmp_path / "gda", tmp_path / "tiny.gguf", format="gguf")
    gda.convert(tmp_path / "tiny.gguf", tmp_path / "back")
    assert load(tmp_path / "back").config.rope_parameters == load(llama).config.rope_parameters
    ids = token_ids(2, 100)
    assert relative_error(logits(tmp_path / "back", ids), logits(llama, ids)) < 1e-5


def _scaled(variant: str) -> dict[str, Any]:
    length = {"original_max_position_embeddings": 32}
    extra = {"llama3": LLAMA3, "linear": {}, "yarn": length}[variant]
    return {"rope_type": variant, "rope_theta": 100.0, "factor": 4.0, **extra}


# --------------------------------------------------------------------------------------------------------------- files


def test_split_model(tmp_path: Path) -> None:
    """It equals the model in one file, whichever part is named. The report has the hash of each part."""
    llama = llama_model(**SHAPE)
    whole = write_gguf(tmp_path / "whole.gguf", llama, quantization=gguf.GGMLQuantizationType.Q8_0)
    first = write_gguf(tmp_path / "parts.gguf", llama, quantization=gguf.GGMLQuantizationType.Q8_0, max_tensors=8)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert [path.name for path in parts] == [f"parts-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    gda.convert(whole, tmp_path / "expected", verify=False)
    report = gda.convert(first, tmp_path / "gda")
    assert report.verification is not None
    assert report.verification.passed
    gda.convert(parts[1], tmp_path / "by second", verify=False)
    expected = tensors_of(tmp_path / "expected")
    for folder in ("gda", "by second"):
        tensors = tensors_of(tmp_path / folder)
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert gda.verify(first, tmp_path / "gda", method="tensors").passed
    source = (tmp_path / "gda" / "conversion.json").read_text()
    assert all(path.name in source for path in parts)


def remove_part(parts: list[Path]) -> None:
    parts[1].unlink()


def exchange_parts(parts: list[Path]) -> None:
    data = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    parts[2].write_bytes(data)


def rename_part(parts: list[Path]) -> None:
    parts[1].rename(parts[0].with_name("alone.gguf"))


def cut_part(parts: list[Path]) -> None:
    os.truncate(parts[2], parts[2].stat().st_size - 100)


def part_of_another_model(parts: list[Path]) -> None:
    other = parts[0].parent / "other"
    other.mkdir()
    write_gguf(other / "parts.gguf", llama_model(**SHAPE, num_hidden_layers=1), max_tensors=4)
    shutil.copy(sorted(other.glob("*.gguf"))[1], parts[1])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (remove_part, "parts-00002-of-00003.gguf is missing"),
        (exchange_parts, "parts-00002-of-00003.gguf is part 3 of 3"),
        (rename_part, "alone.gguf is part 2 of 3"),
        (cut_part, "parts-00003-of-00003.gguf cannot be read as a GGUF file (if it is cut off"),
        (part_of_another_model, "do not hold each tensor once"),
    ],
)
def test_incomplete_split_model(change: Any, named: str, command: Command, tmp_path: Path) -> None:
    """The message names the part."""
    write_gguf(tmp_path / "parts.gguf", llama_model(**SHAPE), max_tensors=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    change(parts)
    alone = parts[0].with_name("alone.gguf")
    assert_refused(command("convert", alone if alone.exists() else parts[0], tmp_path / "gda"), named)


@pytest.mark.slow
def test_blob_without_a_suffix(tmp_path: Path) -> None:
    """As Ollama stores models: known by its first bytes, for conversion, verification and evaluation."""
    llama = llama_model(**SHAPE)
    blob = tmp_path / f"sha256-{'0' * 64}"
    write_gguf(tmp_path / "tiny.gguf", llama).rename(blob)
    require_equal(blob, tmp_path / "gda", llama)
    assert gda.verify(blob, tmp_path / "gda").passed
    assert gda.evaluate(blob, tasks="gda_copy_length_64", limit=2)["results"]


def test_folder_of_one_model(tmp_path: Path) -> None:
    """It is read, in one file or in parts, with a note, also beside config.json or a vision projector."""
    llama = llama_model(**SHAPE)
    for name, parts in (("one", 0), ("split", 8)):
        folder = tmp_path / name
        folder.mkdir()
        file = write_gguf(folder / "tiny.gguf", llama, max_tensors=parts)
        llama.config.save_pretrained(folder)
        (folder / "mmproj-tiny.gguf").write_bytes(b"GGUF")
        report = gda.convert(folder, tmp_path / f"{name}-gda")
        assert f"{file.name}, the only GGUF model in {name}, is read" in report.notes
        assert (
            relative_error(logits(tmp_path / f"{name}-gda", token_ids(1, 50)), logits(llama, token_ids(1, 50))) < 1e-5
        )


def test_folder_of_several_models(command: Command, tmp_path: Path) -> None:
    """The message names them and shows how to name one."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("x-Q4_K_M", "x-Q8_0"):
        write_gguf(folder / f"{name}.gguf", llama_model(**SHAPE))
    write_gguf(folder / "x-F16.gguf", llama_model(**SHAPE), max_tensors=8)
    named = (f"such as {folder / 'x-F16-00001-of-00003.gguf'}", "x-Q4_K_M.gguf, x-Q8_0.gguf", "3 GGUF models")
    assert_refused(command("convert", folder, tmp_path / "gda"), *named)
    assert_refused(command("eval", folder, "--tasks", "gda_copy_length_64"), *named)
    shutil.copytree(save_llama(tmp_path / "llama"), folder, dirs_exist_ok=True)  # a model in safetensors comes first
    assert gda.convert(folder, tmp_path / "gda", dry_run=True).notes == []


@pytest.mark.parametrize("kept", [0, 3, 4, 24, 200, 2000, 5000, 9000, 200_000, -1], ids=str)
def test_truncated_file(kept: int, command: Command, tmp_path: Path) -> None:
    """Cut off anywhere, the message says so, and no files are left."""
    path = write_gguf(tmp_path / "tiny.gguf", llama_model(**SHAPE))
    path.write_bytes(path.read_bytes()[:kept])
    named = (
        "does not begin with the letters GGUF"
        if kept in (0, 3)
        else "cannot be read as a GGUF file (if it is cut off, download it again)"
    )
    assert_refused(command("convert", path, tmp_path / "gda"), str(path), named)
    assert os.listdir(tmp_path) == ["tiny.gguf"]
