"""Verification also decodes: a lossless conversion must give the source's greedy text with a cache."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gda
from gda.conversion.sources.folder import FolderSource
from gda.conversion.tensors import layerwise
from gda.conversion.tensors.layerwise import CACHE_ARGUMENT, LayerwiseModel
from gda.conversion.verify import VerificationFailed
from gda.modeling_gda import attention_gda
from gda.modeling_gda.attention_gda import GDAAttention
from gda.modeling_gda.modeling_gda import GDADecoderLayer, GDAModel

from ..support.commands import Command
from ..support.llamas import VOCAB_SIZE, change_config, save_llama, tensors_of
from ..support.tiny import relative_error, tiny_model, token_ids

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("whole_verification")]

METHODS = ("full", "layers")
METHOD = pytest.mark.parametrize("method", METHODS)


def converted(tmp_path: Path, **options: Any) -> tuple[Path, Path]:
    """A Llama with a tokenizer, and its conversion without verification."""
    source = save_llama(tmp_path / "llama")
    gda.convert(source, tmp_path / "gda", verify=False, **options)
    return source, tmp_path / "gda"


def drop_cache(monkeypatch: pytest.MonkeyPatch, part: type) -> None:
    """Make a part of the model ignore its cache, like a model that expects it under another name."""
    forward: Callable[..., Any] = part.forward  # type: ignore[attr-defined]

    @functools.wraps(forward)
    def without(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **(kwargs | {name: None for name in (CACHE_ARGUMENT,) if name in kwargs}))

    monkeypatch.setattr(part, "forward", without)


@METHOD
@pytest.mark.parametrize("part", [GDAAttention, GDADecoderLayer, GDAModel])
def test_model_that_drops_its_cache_fails(
    part: type, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits without a cache are equal, but its greedy text is not."""
    source, out = converted(tmp_path)
    assert gda.verify(source, out, method=method).greedy_match == 1.0
    drop_cache(monkeypatch, part)
    report = gda.verify(source, out, method=method)
    assert report.relative is not None
    assert report.relative <= 1e-5
    assert report.greedy_match is not None
    assert report.greedy_match < 1
    assert not report.passed


@METHOD
def test_fault_shared_by_source_and_result_fails(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GDA source would drop its cache as well, so it decodes without one."""
    source = save_llama(tmp_path / "llama")
    gda.convert(source, tmp_path / "gda", verify=False)
    gda.grow(tmp_path / "gda", tmp_path / "grown", signal=2, verify=False)
    assert gda.verify(tmp_path / "gda", tmp_path / "grown", method=method).passed
    drop_cache(monkeypatch, GDAAttention)
    report = gda.verify(tmp_path / "gda", tmp_path / "grown", method=method)
    assert report.relative is not None
    assert report.relative <= 1e-5
    assert not report.passed


def test_convert_and_verify_exit_with_1(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the share of equal texts and the remedy, and no OUT."""
    source, out = converted(tmp_path)
    drop_cache(monkeypatch, GDAAttention)
    for arguments in (("convert", source, tmp_path / "again"), ("verify", source, out)):
        outcome = command(*arguments)
        assert outcome.code == 1
        [line] = outcome.error.splitlines()
        assert "greedy text with a cache equals the source's for only 0 % of the prompts" in line
        assert "use a release of transformers other than" in line
    assert not (tmp_path / "again").exists()


@METHOD
def test_model_that_refuses_the_cache_exits_with_1(
    method: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The TypeError about an unknown cache argument is printed in one line."""
    source, out = converted(tmp_path)
    monkeypatch.setattr(attention_gda, "CACHE_ARGUMENT", "renamed")
    outcome = command("verify", source, out, "--method", method)
    assert outcome.code == 1
    [line] = outcome.error.splitlines()
    assert line.startswith("gda: verification failed: GDAAttention got a DynamicCache")


def with_twin_tokens(tmp_path: Path, difference: float) -> tuple[Path, Path]:
    """Give each token of the source a twin whose logit in the result is larger by that share."""
    source, out = converted(tmp_path)
    for folder, factor in ((source, 1.0), (out, 1.0 + difference)):
        tensors = tensors_of(folder)
        half = tensors["lm_head.weight"][: VOCAB_SIZE // 2]
        tensors["lm_head.weight"][VOCAB_SIZE // 2 : 2 * (VOCAB_SIZE // 2)] = factor * half
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return source, out


@METHOD
def test_ties_pass(method: str, tmp_path: Path) -> None:
    """Texts may differ where rounding decides between two tokens; the report counts them."""
    source, out = with_twin_tokens(tmp_path, 2e-6)
    report = gda.verify(source, out, method=method)
    assert report.passed
    assert report.greedy_match is not None
    assert report.greedy_ties is not None
    assert report.greedy_ties > 0
    assert report.greedy_match + report.greedy_ties == 1


@METHOD
def test_larger_differences_are_not_ties(method: str, tmp_path: Path) -> None:
    """With a second token 1e-3 behind, another text fails at any threshold."""
    source, out = with_twin_tokens(tmp_path, 1e-3)
    tensors = tensors_of(source)
    tensors["lm_head.weight"][VOCAB_SIZE // 2 :] *= 1 - 1e-3
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = gda.verify(source, out, method=method, threshold=0.1)
    assert report.relative is not None
    assert report.relative < 0.1
    assert not report.passed
    with pytest.raises(VerificationFailed, match="greedy text"):
        raise VerificationFailed(report)


@METHOD
def test_greedy_text_of_a_lossy_conversion_may_differ(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = converted(tmp_path, dtype="bfloat16")
    drop_cache(monkeypatch, GDAAttention)
    report = gda.verify(source, out, method=method)
    assert report.passed
    assert report.greedy_match is not None
    assert report.greedy_match < 1


@METHOD
@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_verification_uses_sdpa(field: str, method: str, tmp_path: Path) -> None:
    """Also if config.json names flash attention, which is not installed."""
    source = save_llama(tmp_path / "llama")
    change_config(source, **{field: "flash_attention_2"})
    assert gda.convert(source, tmp_path / "gda").verification is not None
    change_config(tmp_path / "gda", attn_implementation="flash_attention_2")
    assert gda.verify(source, tmp_path / "gda", method=method).passed


def test_layers_run_in_evaluation_mode(tmp_path: Path) -> None:
    """A source may have dropout."""
    source = save_llama(tmp_path / "llama", attention_dropout=0.5)
    gda.convert(source, tmp_path / "gda", verify=False)
    assert gda.verify(source, tmp_path / "gda", method="layers").passed


@pytest.mark.parametrize("windows", [False, True])
def test_layerwise_decoding_equals_the_full_run(windows: bool, tmp_path: Path) -> None:
    """For each layer, also with a window shorter than the prefill."""
    kinds = ["sliding_attention", "full_attention"]
    tiny_model(**({"sliding_window": 4, "layer_types": kinds} if windows else {})).save_pretrained(tmp_path / "gda")
    source = FolderSource(tmp_path / "gda")
    model = LayerwiseModel(source.config, source.read)
    states = model.embed(token_ids(3, 12))
    with torch.inference_mode():
        for index in range(model.num_layers):
            tensors = model.tensors(index)
            expected = model.run(index, tensors, states)
            assert relative_error(model.decode(index, tensors, states, 7), expected) < 1e-5
            states = expected


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 7)])
def test_weights_are_cast_in_blocks(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two rows, the last with one; against a product in float64."""
    monkeypatch.setattr(layerwise, "BLOCK", 15)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=generator)
    weight = torch.randn(9, 7, generator=generator).bfloat16()
    bias = torch.randn(9, generator=generator)
    expected = (inputs.double() @ weight.double().T + bias.double()).float()
    with layerwise.CastingInBlocks():
        got = torch.nn.functional.linear(inputs, weight, bias)
    assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize(
    "growing", [{}, {"fade": 0.3, "masked_neurons": 8}, {"fade": 0.3, "masked_layers": [1], "blended_layers": True}]
)
def test_narrow_layers_compute_in_float32(growing: dict[str, Any], tmp_path: Path) -> None:
    """Matrices stay in bfloat16, and the results are those of their values in float32; also while layers fade in."""
    tiny_model(**growing).bfloat16().save_pretrained(tmp_path / "gda")
    source = FolderSource(tmp_path / "gda")
    narrow, wide = (LayerwiseModel(source.config, source.read, narrow=each) for each in (True, False))
    states = wide.embed(token_ids(3, 12))
    with torch.inference_mode():
        for index in range(wide.num_layers):
            tensors = narrow.tensors(index)
            assert tensors["mlp.up_proj.weight"].dtype == torch.bfloat16
            expected = wide.run(index, wide.tensors(index), states)
            assert relative_error(narrow.run(index, tensors, states), expected) < 1e-5
            assert relative_error(narrow.decode(index, tensors, states, 7), expected) < 1e-5
            states = expected
        assert relative_error(narrow.head()(states), wide.head()(states)) < 1e-5
