"""AutoTokenizer gives the same ids before and after: the source's tokenizer is the reference."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import create_repo
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import gda
from gda.common.errors import CheckFailed
from gda.conversion.sources.compare_tokenizers import difference

from ..support.commands import Command, assert_refused
from ..support.hub_server import Blob, Hub
from ..support.llama_like import save_source
from ..support.llamas import byte_tokenizer, change_config, files_of, save_llama
from ..support.tokenizer_kinds import sentencepiece_tokenizer

TEXTS = (
    "Hello</s>Paris</s> Hello",
    "</s>Hello <s>  there",
    "  two  leading spaces, 12345 and\ttabs \n\n new line ",
    "日本語 und Äpfel 🙂 \x00 \u200b",
    "",
)


def declare(folder: Path, tokenizer: PreTrainedTokenizerFast, tokenizer_class: str | None, **fields: Any) -> Path:
    """Write a tokenizer as most repositories hold it: tokenizer.json, and a class in tokenizer_config.json."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": tokenizer_class,
    } | fields
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def save_mistral(folder: Path, **changes: Any) -> Path:
    """A Mistral whose tokenizer names LlamaTokenizer, which transformers doesn't believe of a Mistral."""
    tokenizer = sentencepiece_tokenizer()
    save_source(folder, "mistral", tokenizer=False, vocab_size=len(tokenizer), **changes)
    return declare(folder, tokenizer, "LlamaTokenizer", add_bos_token=True, legacy=True)


def publish(hub: Hub, name: str, folder: Path) -> None:
    """Store a folder in `hub` as if it had been pushed."""
    create_repo(name)
    files = {path: Blob(data, path.endswith(".safetensors")) for path, data in files_of(folder).items()}
    hub.repos[name].commit("main", "all of it", files)


def assert_reads_alike(source: str | Path, result: Path) -> None:
    first, other = (AutoTokenizer.from_pretrained(folder) for folder in (source, result))
    for text in TEXTS:
        for special in (False, True):
            ids = first(text, add_special_tokens=special).input_ids
            assert other(text, add_special_tokens=special).input_ids == ids, text
            assert other.decode(ids) == first.decode(ids)
    assert (other.bos_token_id, other.padding_side) == (first.bos_token_id, first.padding_side)
    assert other(TEXTS[0]).keys() == first(TEXTS[0]).keys()


# ------------------------------------------------------------------------------------------------- kept by a conversion


def test_class_that_transformers_corrects(tmp_path: Path) -> None:
    """The result names the class that read the source. With the source's files alone the ids would differ."""
    source = save_mistral(tmp_path / "mistral")
    report = gda.convert(source, tmp_path / "gda")
    assert any("PreTrainedTokenizerFast" in note for note in report.notes)
    assert_reads_alike(source, tmp_path / "gda")
    (tmp_path / "gda/tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    with pytest.raises(AssertionError):
        assert_reads_alike(source, tmp_path / "gda")


@pytest.mark.slow
def test_way_there_and_back(tmp_path: Path) -> None:
    """Each command that writes a model keeps the ids: grow, fold, train, and export to other types."""
    source = save_mistral(tmp_path / "mistral", sliding_window=None)
    (tmp_path / "text.txt").write_text("A text of several words. " * 40)
    gda.convert(source, tmp_path / "gda", qk_rank=4)
    gda.fold(tmp_path / "gda", tmp_path / "folded")
    gda.grow(tmp_path / "folded", tmp_path / "grown", mlp=2)
    gda.train(tmp_path / "grown", tmp_path / "trained", data=tmp_path / "text.txt", steps=1, context=16, batch_size=1)
    for name in ("gda", "folded", "grown", "trained"):
        assert_reads_alike(source, tmp_path / name)
    for kind in ("llama", "mistral", "qwen3"):
        gda.export(tmp_path / "trained", tmp_path / f"as {kind}", format=kind)
        assert_reads_alike(source, tmp_path / f"as {kind}")


def test_tokenizer_of_an_adapter(tmp_path: Path) -> None:
    """Its files have no config.json beside them; they are read as those of its base."""
    base = save_mistral(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).write_bytes((base / name).read_bytes())
    gda.convert(tmp_path / "adapter", tmp_path / "gda", verify=False)
    assert_reads_alike(base, tmp_path / "gda")


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast"])
def test_files_stay_as_they_are(tmp_path: Path, tokenizer_class: str) -> None:
    """A Llama's tokenizer is read by the class that it names, and so is the result's."""
    tokenizer = sentencepiece_tokenizer("first")
    source = save_llama(tmp_path / "llama", tokenizer=False, vocab_size=len(tokenizer))
    declare(source, tokenizer, tokenizer_class)
    report = gda.convert(source, tmp_path / "gda", verify=False)
    assert not any("token" in note for note in report.notes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "gda" / name).read_bytes() == (source / name).read_bytes()
    assert_reads_alike(source, tmp_path / "gda")


@pytest.mark.parametrize("tokenizer_class", [None, "LlamaTokenizerFast"])
def test_class_is_missing_or_corrected_by_content(tmp_path: Path, tokenizer_class: str | None) -> None:
    """A byte-level tokenizer of a Llama that names LlamaTokenizerFast, as DeepSeek's do, or no class."""
    source = save_llama(tmp_path / "llama")
    declare(source, byte_tokenizer(), tokenizer_class)
    gda.convert(source, tmp_path / "gda", verify=False)
    config = json.loads((tmp_path / "gda/tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert_reads_alike(source, tmp_path / "gda")


def test_class_that_transformers_corrects_by_hub_id(tmp_path: Path, hub: Hub) -> None:
    """For some names on the Hub transformers runs tokenizer.json as it is, whatever class is named."""
    name, tokenizer = "deepseek-ai/deepseek-coder-tiny", sentencepiece_tokenizer()
    folder = save_llama(tmp_path / "llama", tokenizer=False, vocab_size=len(tokenizer))
    publish(hub, name, declare(folder, tokenizer, "LlamaTokenizer"))
    gda.convert(name, tmp_path / "gda", verify=False)
    assert_reads_alike(name, tmp_path / "gda")
    with pytest.raises(AssertionError):
        assert_reads_alike(folder, tmp_path / "gda")


@pytest.mark.slow
def test_corrected_pattern_goes_into_tokenizer_json(tmp_path: Path) -> None:
    """`fix_mistral_regex` works only in the folder of a Mistral of more than 100,000 tokens; the result needs none."""
    state = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    state["model"]["vocab"] |= {"12": 267} | {f"filler {number}": 268 + number for number in range(100_000)}
    state["model"]["merges"].append(["1", "2"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    source = save_source(tmp_path / "mistral", "mistral", vocab_size=len(tokenizer))
    declare(source, tokenizer, "PreTrainedTokenizerFast", fix_mistral_regex=True)
    change_config(source, transformers_version="4.44.0")
    assert AutoTokenizer.from_pretrained(source)("12").input_ids == [state["model"]["vocab"][digit] for digit in "12"]
    gda.convert(source, tmp_path / "gda", verify=False)
    assert_reads_alike(source, tmp_path / "gda")
    assert "fix_mistral_regex" not in (tmp_path / "gda/tokenizer_config.json").read_text()


def test_type_with_one_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers reads the tokenizer of every Qwen2 with Qwen2Tokenizer. Nothing is written."""
    tokenizer = sentencepiece_tokenizer()
    gda.convert(save_source(tmp_path / "source", "qwen2", vocab_size=len(tokenizer)), tmp_path / "gda", verify=False)
    declare(tmp_path / "gda", tokenizer, "PreTrainedTokenizerFast")
    with pytest.raises(CheckFailed, match=r" of a qwen2 .* has ids .* instead of .*; --no-verify writes") as refused:
        gda.export(tmp_path / "gda", tmp_path / "qwen2", format="qwen2")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "qwen2").exists()
    report = gda.export(tmp_path / "gda", tmp_path / "qwen2", format="qwen2", verify=False)
    assert any("differently" in note for note in report.notes)


# -------------------------------------------------------------------------------------------------------- what is found


def changed(**parts: Any) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def with_token(**flags: Any) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", **flags)])
    return tokenizer


def byte_level(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | options))


def with_merge() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"].sort(key=lambda pair: pair != ["e", "r"])  # "other": "th", "er" instead of "the", "r"
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


CHANGES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "normalizer": lambda: changed(normalizer=normalizers.NFC()),
    "lower case": lambda: changed(normalizer=normalizers.Lowercase()),
    "stripped": lambda: changed(normalizer=normalizers.Strip()),
    "prefix space": lambda: changed(pre_tokenizer=byte_level(add_prefix_space=True)),
    "decoder": lambda: changed(decoder=decoders.Fuse()),
    "bos": lambda: changed(
        post_processor=processors.TemplateProcessing(single="<s> $A", pair="$A $B", special_tokens=[("<s>", 0)])
    ),
    "order of merges": with_merge,
    "one more token": with_token,
    "nothing": byte_tokenizer,
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_found(change: str) -> None:
    found = difference(byte_tokenizer(), CHANGES[change]())
    assert (found is None) == (change == "nothing")
    assert "\n" not in str(found)
    assert len(str(found)) < 400


def test_properties_of_tokens_and_templates_are_found() -> None:
    for flag in ("lstrip", "rstrip", "single_word"):
        assert difference(with_token(), with_token(**{flag: True})) is not None, flag
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    assert "the chat template renders" in str(difference(byte_tokenizer(), tokenizer))
    tokenizer.chat_template = None
    assert "no chat template" in str(difference(byte_tokenizer(), tokenizer))


def test_verify_compares_tokenizers(tmp_path: Path, command: Command) -> None:
    source = save_llama(tmp_path / "llama")
    gda.convert(source, tmp_path / "gda")
    outcome = command("verify", source, tmp_path / "gda")
    assert outcome.code == 0
    assert "tokenizers alike" in outcome.out
    state = json.loads((tmp_path / "gda/tokenizer.json").read_text())
    state["normalizer"] = {"type": "NFC"}
    (tmp_path / "gda/tokenizer.json").write_text(json.dumps(state))
    outcome = command("verify", source, tmp_path / "gda")
    assert outcome.code == 1
    assert "the tokenizers differ" in outcome.error
    assert "instead of" in outcome.error
    report = gda.verify(source, tmp_path / "gda", method="tensors")
    assert report.different_tokenizer is not None
    assert not report.passed


def test_perplexities_of_different_tokenizers(tmp_path: Path, command: Command) -> None:
    """A note says that they differ, and the ratio is per word."""
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", verify=False)
    text = tmp_path / "text.txt"
    text.write_text("The capital of the other then. " * 8)
    arguments = ("eval", tmp_path / "gda", "--baseline", tmp_path / "llama", "--perplexity", text)
    assert "differently" not in command(*arguments).error
    state = json.loads((tmp_path / "gda/tokenizer.json").read_text())
    state["model"]["merges"] = []
    (tmp_path / "gda/tokenizer.json").write_text(json.dumps(state))
    outcome = command(*arguments)
    assert "reads the text differently than the baseline's, ids" in " ".join(outcome.error.split())
    report = json.loads(command(*arguments, "--json").out)["gda"]
    ours, theirs = report["perplexity"], report["baseline"]["gda"]["perplexity"]
    assert ours["tokens"] != theirs["tokens"]
    assert report["perplexity_ratio"] == pytest.approx(ours["word"] / theirs["word"])


# ------------------------------------------------------------------------------------------------------------- own code


def with_code(folder: Path, reference: str = "tokenization_mine.MineTokenizer") -> Path:
    """Give the tokenizer in `folder` code of its own, in two files, which must not run."""
    (folder / "tokenization_mine.py").write_text("from .helpers_mine import fail\nfail()\nclass MineTokenizer: ...\n")
    (folder / "helpers_mine.py").write_text("def fail():\n    raise SystemExit('the code was run')\n")
    (folder / "unrelated.py").write_text("raise SystemExit\n")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoTokenizer": [reference, None]}, "tokenizer_class": "MineTokenizer"}
    path.write_text(json.dumps(config))
    return folder


def test_own_code_is_copied_and_not_run(tmp_path: Path, command: Command) -> None:
    """A note says so, and verification says why its prompts are random ids."""
    source = with_code(save_llama(tmp_path / "llama"))
    outcome = command("convert", source, tmp_path / "gda")
    assert outcome.code == 0
    assert "note: the tokenizer has its own code, tokenization_mine.MineTokenizer" in outcome.out
    assert "random ids, since the tokenizer needs its own code" in outcome.out
    assert str(tmp_path) not in (tmp_path / "gda/conversion.json").read_text()
    copied = files_of(tmp_path / "gda")
    assert {name for name in copied if name.endswith("_mine.py")} == {"tokenization_mine.py", "helpers_mine.py"}
    assert "unrelated.py" not in copied
    assert copied["tokenizer_config.json"] == (source / "tokenizer_config.json").read_bytes()
    outside = with_code(save_llama(tmp_path / "outside"), "them/theirs--tokenization_mine.MineTokenizer")
    report = gda.convert(outside, tmp_path / "gda2")
    assert any("stays on the Hub" in note for note in report.notes)
    assert report.verification.random_because is not None
    assert not any(name.endswith("_mine.py") for name in files_of(tmp_path / "gda2"))
    for arguments in (
        ("convert", source, tmp_path / "split", "--mode", "split"),
        ("eval", source, "--perplexity", source / "config.json"),
        ("train", tmp_path / "gda", tmp_path / "out", "--data", source / "config.json", "--steps", 1),
    ):
        assert_refused(command(*arguments), "needs its own code (tokenization_mine.MineTokenizer), which is not run")


def test_own_code_where_transformers_needs_none(tmp_path: Path) -> None:
    """transformers reads a Qwen2 without its code. So does the result, which keeps the code."""
    source = with_code(save_source(tmp_path / "qwen2", "qwen2"))
    gda.convert(source, tmp_path / "gda", verify=False)
    assert_reads_alike(source, tmp_path / "gda")
    assert json.loads((tmp_path / "gda/tokenizer_config.json").read_text())["auto_map"]
    assert (tmp_path / "gda/tokenization_mine.py").exists()


def test_own_code_on_the_hub(tmp_path: Path, hub: Hub) -> None:
    """Code of a Hub id is named with the id. Code in a folder is pushed with it."""
    folder = with_code(save_llama(tmp_path / "llama"))
    publish(hub, "them/llama", folder)
    gda.convert("them/llama", tmp_path / "gda")
    config = json.loads((tmp_path / "gda/tokenizer_config.json").read_text())
    assert set(config["auto_map"]["AutoTokenizer"]) == {"them/llama--tokenization_mine.MineTokenizer"}
    gda.convert(folder, tmp_path / "local", verify=False)
    gda.push(tmp_path / "local", "me/local")
    assert {"tokenization_mine.py", "helpers_mine.py"} <= set(hub.files("me/local"))


# ------------------------------------------------------------------------------------------------------- SentencePiece


def save_sentencepiece(folder: Path, model_type: str) -> Path:
    """A Llama with `tokenizer.model` alone, as Llama 2 and Vicuna have it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    text = ["The capital of France is Paris.", "Once upon a time", "def f(n): return n", "123 456"] * 20
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    save_llama(folder, tokenizer=False, vocab_size=400)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_becomes_tokenizer_json(tmp_path: Path, model_type: str) -> None:
    """The result gives SentencePiece's own ids, and can be read without it."""
    source = save_sentencepiece(tmp_path / "llama", model_type)
    gda.convert(source, tmp_path / "gda")
    assert_reads_alike(source, tmp_path / "gda")
    (tmp_path / "gda/tokenizer.model").unlink()
    assert_reads_alike(source, tmp_path / "gda")
    import sentencepiece

    text = "The capital of France is  Paris, 123 Äpfel"
    expected = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model")).encode(text)
    assert AutoTokenizer.from_pretrained(tmp_path / "gda")(text, add_special_tokens=False).input_ids == expected


@pytest.mark.parametrize("first_byte", [b"\n", b"I"])
def test_missing_package_is_named(
    tmp_path: Path, first_byte: bytes, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every command that reads a tokenizer, in one line with the remedy."""
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", verify=False)
    for name in ("llama", "gda"):
        (tmp_path / name / "tokenizer.json").unlink()
        (tmp_path / name / "tokenizer.model").write_bytes(first_byte + b"Q== 0\n")
    (tmp_path / "text.txt").write_text("A text.")
    monkeypatch.chdir(tmp_path)
    for package in ("sentencepiece", "google.protobuf", "tiktoken"):
        monkeypatch.setitem(sys.modules, package, None)
    for words in (
        "convert llama out",
        "convert llama out --mode split",
        "eval gda --perplexity text.txt",
        "train gda out --data text.txt --steps 1",
        "serve gda",
    ):
        outcome = command(*words.split())
        assert_refused(outcome)
        assert outcome.error.endswith("pip install 'sentencepiece>=0.2' 'protobuf>=4' tiktoken\n")
        assert not (tmp_path / "out").exists()
