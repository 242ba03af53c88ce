"""Names of tensors as people's checkpoints have them: what transformers loads is converted, the rest is explained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification, LlamaModel
from transformers import LlamaForQuestionAnswering as LlamaForAnswers

import gda

from ..support.checkpoints import load, logits
from ..support.commands import Command, assert_refused
from ..support.llamas import byte_tokenizer, llama_config, save_llama, tensors_of
from ..support.splitting import split
from ..support.tiny import make_asymmetric, relative_error, tiny_model, token_ids

pytestmark = pytest.mark.sampled

INDEX = "model.safetensors.index.json"
Rename = Callable[[str], str | None]


def rename(folder: Path, new: Rename) -> Path:
    """Rename the tensors in all files of a folder and in its index; those whose new name is None are removed."""
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor for old, tensor in load_file(path).items() if (name := new(old))}
        save_file(tensors, path, metadata={"format": "pt"})
    if (index := folder / INDEX).exists():
        fields = json.loads(index.read_text())
        fields["weight_map"] = {name: file for old, file in fields["weight_map"].items() if (name := new(old))}
        index.write_text(json.dumps(fields))
    return folder


def without_prefix(name: str) -> str:
    return name.removeprefix("model.")


def only_head(name: str) -> str:
    return "lm_head.weight" if name == "model.embed_tokens.weight" else name


def loaded_by_transformers(folder: Path) -> torch.Tensor:
    """Logits of the source, none of whose weights transformers initialized."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    return logits(model.eval(), token_ids(2, 20))


TIED = {"tie_word_embeddings": True}
ACCEPTED: dict[str, tuple[Rename, dict[str, Any]]] = {
    "base model, tied": (without_prefix, TIED),
    "base model, tied, in shards": (without_prefix, TIED | {"max_shard_size": "20KB"}),
    "base model with a head": (without_prefix, {}),
    "some names with the prefix": (lambda name: name if "layers.0" in name else without_prefix(name), {}),
    "prefix twice, in shards": (lambda name: f"model.{name}", {"max_shard_size": "20KB"}),
    "only the head of tied tensors": (only_head, TIED),
    "only the head, in a base model": (lambda name: without_prefix(only_head(name)), TIED),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_transformers_loads_is_converted(kind: str, tmp_path: Path) -> None:
    """Logits equal those of transformers' own loading, and the tensors are those of the model with usual names."""
    new, fields = ACCEPTED[kind]
    source = rename(save_llama(tmp_path / "llama", **fields), new)
    expected = loaded_by_transformers(source)
    report = gda.convert(source, tmp_path / "gda")
    assert report.verification is not None
    assert report.verification.passed
    assert torch.equal(logits(tmp_path / "gda", token_ids(2, 20)), expected)
    assert gda.verify(source, tmp_path / "gda", method="tensors").passed
    assert gda.verify(source, tmp_path / "gda", method="layers").passed
    gda.convert(save_llama(tmp_path / "usual", **fields), tmp_path / "same", verify=False)
    ours, usual = tensors_of(tmp_path / "gda"), tensors_of(tmp_path / "same")
    assert ours.keys() == usual.keys()
    assert all(torch.equal(ours[name], usual[name]) for name in usual)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base model, tied, in shards", "only the head of tied tensors"])
def test_split_reads_such_names(kind: str, tmp_path: Path) -> None:
    """The same tensors as from the model with usual names."""
    new, fields = ACCEPTED[kind]
    split(rename(save_llama(tmp_path / "llama", **fields), new), tmp_path / "gda")
    split(save_llama(tmp_path / "usual", **fields), tmp_path / "same")
    ours, usual = tensors_of(tmp_path / "gda"), tensors_of(tmp_path / "same")
    assert all(torch.equal(ours[name], usual[name]) for name in usual)


@pytest.mark.parametrize("new", [without_prefix, only_head])
def test_gda_model_with_such_names(new: Rename, tmp_path: Path) -> None:
    """It is inspected, grown and exported."""
    tiny_model(**TIED).save_pretrained(tmp_path / "gda")
    usual = gda.inspect(tmp_path / "gda").parameters
    expected = loaded_by_transformers(rename(tmp_path / "gda", new))
    assert gda.inspect(tmp_path / "gda").parameters == usual
    gda.grow(tmp_path / "gda", tmp_path / "grown", signal=2)
    gda.export(tmp_path / "gda", tmp_path / "plain")
    for folder in ("grown", "plain"):
        assert relative_error(logits(tmp_path / folder, token_ids(2, 20)), expected) < 1e-5


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "language_model.", "a.model.b."])
@pytest.mark.parametrize("inner", [str, without_prefix], ids=["language model", "base model"])
def test_prefix_of_a_wrapper_is_named(prefix: str, inner: Rename, command: Command, tmp_path: Path) -> None:
    """transformers would initialize every weight. The remedy in the message makes a checkpoint that is converted."""
    source = save_llama(tmp_path / "llama", **TIED, max_shard_size="20KB")
    expected = loaded_by_transformers(source)
    rename(source, lambda name: f"{prefix}{inner(name)}")
    outcome = command("convert", source, tmp_path / "gda")
    assert_refused(outcome, f"begin with '{prefix.removesuffix('model.')}", "save_original_format=False")
    remedy = outcome.error.split("remove it: ")[1].replace("FOLDER", "source").replace("NEW", "renamed")
    exec(remedy, {"AutoModelForCausalLM": AutoModelForCausalLM, "source": source, "renamed": tmp_path / "renamed"})
    gda.convert(tmp_path / "renamed", tmp_path / "gda")
    assert torch.equal(logits(tmp_path / "gda", token_ids(2, 20)), expected)


@pytest.mark.parametrize(
    ("architecture", "fields", "named"),
    [
        (LlamaModel, {}, "lm_head.weight"),
        (LlamaForSequenceClassification, {"num_labels": 1}, "lm_head.weight"),
        (LlamaForTokenClassification, {}, "lm_head.weight"),
        (LlamaForAnswers, {}, "lm_head.weight"),  # whose names begin with "transformer."
        (LlamaForSequenceClassification, TIED, "score.weight"),
        (LlamaForTokenClassification, TIED, "score."),
    ],
)
def test_other_architecture_is_named(
    architecture: Any, fields: dict[str, Any], named: str, command: Command, tmp_path: Path
) -> None:
    """transformers would initialize the head of a language model at random, or drop the head that was trained."""
    make_asymmetric(architecture(llama_config(**fields))).save_pretrained(tmp_path / "other")
    assert_refused(command("convert", tmp_path / "other", tmp_path / "gda"), architecture.__name__, named)


def test_headless_tied_model_is_converted(tmp_path: Path) -> None:
    """As `LlamaModel.save_pretrained` writes it."""
    make_asymmetric(LlamaModel(llama_config(**TIED))).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    gda.convert(tmp_path / "base", tmp_path / "gda")
    expected = loaded_by_transformers(tmp_path / "base")
    assert torch.equal(logits(tmp_path / "gda", token_ids(2, 20)), expected)
    assert load(tmp_path / "gda").config.architectures == ["GDAForCausalLM"]


def test_names_that_contradict_each_other(command: Command, tmp_path: Path) -> None:
    """transformers loads either of two tensors with the same name, and unties tensors that differ."""
    source = save_llama(tmp_path / "llama", **TIED)
    tensors = load_file(source / "model.safetensors")
    norm = {"norm.weight": tensors["model.norm.weight"] + 1}
    save_file(tensors | norm, source / "model.safetensors", metadata={"format": "pt"})
    assert_refused(command("convert", source, tmp_path / "gda"), "both model.norm.weight and norm.weight")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    save_file(tensors | head, source / "model.safetensors", metadata={"format": "pt"})
    assert_refused(command("convert", source, tmp_path / "gda"), "lm_head.weight differs", "tie_word_embeddings")


def test_unmerged_layers_of_an_adapter(command: Command, tmp_path: Path) -> None:
    source = save_llama(tmp_path / "llama")
    tensors = load_file(source / "model.safetensors")
    wrapped = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    wrapped["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(2, 32)
    save_file(wrapped, source / "model.safetensors", metadata={"format": "pt"})
    assert_refused(command("convert", source, tmp_path / "gda"), "lora_A", "merge_and_unload")
