"""GGUF files as a source: results equal what transformers reads, and contents that it would drop are refused."""

import builtins
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import gda
from gda.conversion.sources.compare_tokenizers import difference
from gda.conversion.sources.gguf import GGUFSource

from ..support.checkpoints import logits, needs_smollm2
from ..support.gguf_files import SHAPE, write_gguf
from ..support.llamas import VOCAB_SIZE, byte_tokenizer, llama_model
from ..support.tiny import relative_error

pytestmark = pytest.mark.sampled

gguf = pytest.importorskip("gguf")


def some_ids() -> Tensor:
    return torch.randint(VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("quantization", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "tie_word_embeddings": True}],
    ids=["gqa", "mha", "mqa tied"],
)
def test_gguf_equals_transformers(changes: dict[str, Any], quantization: str, tmp_path: Path) -> None:
    """It equals transformers' own GGUF loading, and the original Llama up to quantization."""
    llama = llama_model(**SHAPE, **changes)
    kind = None if quantization == "F32" else gguf.GGMLQuantizationType[quantization]
    path = write_gguf(tmp_path / "tiny.gguf", llama, quantization=kind)
    report = gda.convert(path, tmp_path / "gda")
    assert report.verification is not None
    assert report.verification.passed
    assert report.verification.threshold == 1e-5

    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "gda")
    assert converted.dtype == torch.float32
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = some_ids()
    assert relative_error(logits(converted, ids), logits(read, ids)) <= 1e-5
    tolerance = {"F32": 1e-5, "F16": 1e-2, "Q8_0": 0.1, "Q4_0": 1.0}[quantization]
    assert relative_error(logits(converted, ids), logits(llama, ids)) <= tolerance


def test_config_tokenizer_and_licence_come_from_the_metadata(tmp_path: Path) -> None:
    """Ids, chat template, eps and theta equal the original's. The card has the licence and no path."""
    path = write_gguf(tmp_path / "tiny.gguf", llama_model(**SHAPE))
    gda.convert(path, tmp_path / "gda", verify=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gda")
    text = "The other of them ran."
    assert tokenizer(text, add_special_tokens=False).input_ids == byte_tokenizer()(text).input_ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
    config = json.loads((tmp_path / "gda" / "config.json").read_text())
    assert config["rms_norm_eps"] == pytest.approx(3e-6)
    assert config["rope_parameters"]["rope_theta"] == 100.0
    assert (config["head_dim"], config["hidden_size"], config["dtype"]) == (16, 64, "float32")
    assert "license: apache-2.0" in (tmp_path / "gda" / "README.md").read_text()
    output = json.loads((tmp_path / "gda" / "conversion.json").read_text())
    assert list(output["source"]["sha256"]) == ["tiny.gguf"]
    assert str(tmp_path) not in json.dumps(output) + json.dumps(config)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "layers", "tensors"])
def test_verify_gguf_conversions(method: str, tmp_path: Path) -> None:
    """Every method reads the GGUF file again and detects a changed result."""
    from safetensors.torch import load_file, save_file

    path = write_gguf(tmp_path / "tiny.gguf", llama_model(**SHAPE), quantization=gguf.GGMLQuantizationType.Q8_0)
    gda.convert(path, tmp_path / "gda", verify=False)
    assert gda.verify(path, tmp_path / "gda", method=method).passed
    weights = tmp_path / "gda" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1.0
    save_file(tensors, weights, metadata={"format": "pt"})
    assert not gda.verify(path, tmp_path / "gda", method=method).passed


def test_gguf_without_a_tokenizer(tmp_path: Path) -> None:
    """It is verified on random ids."""
    path = write_gguf(tmp_path / "tiny.gguf", llama_model(**SHAPE), tokenizer=False)
    report = gda.convert(path, tmp_path / "gda")
    assert report.verification is not None
    assert report.verification.passed
    assert report.verification.tokens == 8 * 48


@pytest.mark.parametrize(
    ("rule", "bos", "notes"),
    [("llama-bpe", True, 0), ("pixtral", True, 0), ("qwen2", False, 0), ("gpt-2", False, 0), ("mine", False, 1)],
)
def test_rules_of_splitting_text(rule: str, bos: bool, notes: int, tmp_path: Path) -> None:
    """That of Llama 3 adds BOS unless the file says otherwise; an unknown one is noted."""
    path = write_gguf(tmp_path / "tiny.gguf", llama_model(), metadata={"tokenizer.ggml.pre": rule})
    source = GGUFSource(path)
    assert (source.tokenizer()("a").input_ids[0] == 0) == bos
    assert len(source.notes) == notes
    told = {"tokenizer.ggml.pre": rule, "tokenizer.ggml.add_bos_token": False}
    path = write_gguf(tmp_path / "told.gguf", llama_model(), metadata=told)
    assert GGUFSource(path).tokenizer()("a").input_ids[0] != 0


def test_named_file_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not another one of its name in the working folder."""
    for folder, seed in (("named", 1), ("here", 2)):
        (tmp_path / folder).mkdir()
        write_gguf(tmp_path / folder / "tiny.gguf", llama_model(seed=seed))
    expected = GGUFSource(tmp_path / "named" / "tiny.gguf").load().state_dict()
    monkeypatch.chdir(tmp_path / "here")
    found = GGUFSource(Path("../named/tiny.gguf")).load().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    other = GGUFSource(Path("tiny.gguf")).load().state_dict()
    assert not torch.equal(other["lm_head.weight"], expected["lm_head.weight"])


def test_files_beside_it_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer of another model, its code, and an adapter. transformers prefers them to what the GGUF file holds."""
    write_gguf(tmp_path / "tiny.gguf", llama_model(**SHAPE))
    alone = GGUFSource(tmp_path / "tiny.gguf")
    expected, model = alone.tokenizer(), alone.load()
    assert {expected.name_or_path, model.name_or_path, model.config.name_or_path} == {str(tmp_path / "tiny.gguf")}
    state = model.state_dict()
    vocabulary = {token: VOCAB_SIZE - 1 - index for token, index in byte_tokenizer().get_vocab().items()}
    Tokenizer(models.BPE(vocabulary, [])).save(str(tmp_path / "tokenizer.json"))
    named = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "mine.py").write_text("raise SystemExit")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "them/base"}))
    source = GGUFSource(tmp_path / "tiny.gguf")
    assert difference(expected, source.tokenizer()) is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in source.load().state_dict().items())
    gda.convert(tmp_path / "tiny.gguf", tmp_path / "out" / "gda")
    assert difference(expected, AutoTokenizer.from_pretrained(tmp_path / "out" / "gda")) is None
    assert "code" not in capsys.readouterr().out  # transformers asks whether to run it


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"extra_tensors": {"blk.0.attn_q.bias": torch.ones(64)}}, "bias"),
        ({"extra_tensors": {"blk.0.ffn_norm.bias": torch.ones(64)}}, "blk.0.ffn_norm.bias"),
        ({"metadata": {"llama.expert_count": 4}}, "expert"),
        ({"metadata": {"llama.attention.value_length": 24}}, "value_length is 24, .* were 16"),
        ({"architecture": "mistral"}, "no table of GGUF tensors for a mistral"),
        ({"architecture": "gpt2"}, "gpt2"),
        ({"architecture": "no-such"}, "no-such"),
    ],
    ids=str,
)
def test_contents_that_transformers_drops_are_refused(extra: dict[str, Any], named: str, tmp_path: Path) -> None:
    """Biases, experts, values of another width and other architectures, without files left."""
    path = write_gguf(tmp_path / "tiny.gguf", llama_model(**SHAPE), **extra)
    with pytest.raises(ValueError, match=named):
        gda.convert(path, tmp_path / "gda", verify=False)
    assert os.listdir(tmp_path) == ["tiny.gguf"]


def test_head_dim_is_read(tmp_path: Path) -> None:
    """Heads wider than hidden / heads, from attention.key_length."""
    llama = llama_model(**{**SHAPE, "head_dim": 32})
    widths = {"llama.attention.key_length": 32, "llama.attention.value_length": 32}
    path = write_gguf(tmp_path / "tiny.gguf", llama, metadata=widths)
    gda.convert(path, tmp_path / "gda")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "gda")
    assert converted.config.head_dim == 32
    assert relative_error(logits(converted, some_ids()), logits(llama, some_ids())) <= 1e-5


def test_gguf_truncated_during_a_conversion(tmp_path: Path) -> None:
    """The error names file and tensor; a mapped file would kill the process."""
    path = write_gguf(tmp_path / "model.gguf", llama_model(**SHAPE))
    source = GGUFSource(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"model\.gguf: tensor token_embd\.weight cannot be read"):
        source.read("model.embed_tokens.weight")


def test_gguf_with_a_missing_or_wrong_tensor(tmp_path: Path) -> None:
    """The error names the tensor."""
    llama = llama_model(**SHAPE)
    other = llama_model(**{**SHAPE, "intermediate_size": 64})
    path = write_gguf(
        tmp_path / "tiny.gguf",
        llama,
        extra_tensors={"blk.1.ffn_up.weight": other.model.layers[1].mlp.up_proj.weight.detach()},
    )
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        gda.convert(path, tmp_path / "gda")
    assert os.listdir(tmp_path) == ["tiny.gguf"]


def test_missing_package_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only .gguf files need it, and the message says how to install it."""
    path = write_gguf(tmp_path / "tiny.gguf", llama_model(**SHAPE))
    import_ = builtins.__import__

    def without_gguf(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return import_(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(ImportError, match="pip install"):
        gda.convert(path, tmp_path / "gda")
    assert os.listdir(tmp_path) == ["tiny.gguf"]


def test_tensors_equal_transformers(tmp_path: Path) -> None:
    """Dequantized to float32, without aliasing the file."""
    from gda.conversion.sources.open import open_source

    path = write_gguf(tmp_path / "tiny.gguf", llama_model(**SHAPE), quantization=gguf.GGMLQuantizationType.Q8_0)
    source = open_source(path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).state_dict()
    for name, spec in source.specs.items():
        tensor = source.read(name)
        assert tensor.dtype == spec.dtype == torch.float32
        assert tuple(tensor.shape) == spec.shape
        assert torch.equal(tensor, read[name]), name
        tensor.zero_()
        assert not np.array_equal(source.read(name).numpy(), tensor.numpy())


@pytest.mark.parametrize("command", ["convert", "demo"])
def test_a_file_is_parsed_once_and_names_are_mapped_once(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers makes a reader for config, tokenizer and weights each, and a name map for each module."""
    made = {"readers": 0, "name maps": 0}
    reader_init, map_init = gguf.GGUFReader.__init__, gguf.TensorNameMap.__init__

    def count_reader(self: Any, *arguments: Any) -> None:
        made["readers"] += 1
        reader_init(self, *arguments)

    def count_map(self: Any, *arguments: Any) -> None:
        made["name maps"] += 1
        map_init(self, *arguments)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", count_reader)
    monkeypatch.setattr(gguf.TensorNameMap, "__init__", count_map)
    reader_class, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    path = write_gguf(tmp_path / "tiny.gguf", llama_model(**SHAPE))
    if command == "convert":
        assert gda.convert(path, tmp_path / "gda").verification is not None
    else:
        gda.demo(source=path)
    assert made == {"readers": 1, "name maps": 2}  # ours, and the one of transformers that verification relies on
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader_class, name_map)


# ------------------------------------------------------------------------------------------------ the model of the demo


@pytest.mark.slow
@needs_smollm2
def test_pretrained_llama_as_gda(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct as 3:1 GDA: equal logits, the same text, and the right capital of France."""
    from gda.conversion.demo import find_demo_model

    path = Path(find_demo_model())
    report = gda.convert(path, tmp_path / "gda", verify=False)
    assert (report.config.num_attention_heads, report.config.num_noise_heads) == (12, 3)
    assert report.config.num_key_value_heads == 3
    assert set(gda.inspect(tmp_path / "gda").lambdas) == {0.0}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gda")
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    llama = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "gda", dtype=torch.float32)
    assert relative_error(logits(converted, inputs.input_ids), logits(llama, inputs.input_ids)) <= 1e-5
    texts = [
        tokenizer.decode(model.generate(**inputs, do_sample=False, max_new_tokens=2)[0, inputs.input_ids.shape[1] :])
        for model in (llama, converted)
    ]
    assert texts[0] == texts[1]
    assert texts[0] == " Paris."
