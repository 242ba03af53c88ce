"""Bad input to `gda convert --mode split`: exit code 2, one line with file, field and remedy, and no files left."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..support.commands import Command, Outcome, assert_refused
from ..support.llamas import VARIANTS, save_llama
from ..support.splitting import save_text

pytestmark = pytest.mark.sampled


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 query heads over 2 KV heads, beside a text. Tests must not change it."""
    folder = tmp_path_factory.mktemp("sources")
    save_text(folder / "text.txt")
    return save_llama(folder / "llama")


@pytest.fixture
def refused(command: Command, llama: Path, tmp_path: Path) -> Callable[..., None]:
    """A split with these options is refused in one line that contains all of `named`, and OUT is not started."""

    def check(*options: object, named: tuple[str, ...], source: Path = llama, mode: str = "split") -> None:
        (tmp_path / "place").mkdir(exist_ok=True)
        outcome: Outcome = command("convert", source, tmp_path / "place" / "gda", "--mode", mode, *options)
        assert_refused(outcome, *named)
        assert os.listdir(tmp_path / "place") == []

    return check


# ------------------------------------------------------------------------------------------------------ the calibration

LONG = "words and words " * 400
CALIBRATIONS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty": ("a.txt", b"", ("a.txt", "0 tokens")),
    "too short": ("a.txt", b"a few words", ("a.txt", "tokens", "256")),
    "not UTF-8": ("a.txt", b"caf\xe9 " * 100, ("a.txt", "UTF-8", "byte 3")),
    "UTF-16": ("a.txt", LONG.encode("utf-16"), ("a.txt", "UTF-8")),
    "binary": ("a.txt", bytes(range(256)) * 30, ("a.txt", "UTF-8")),
    "no JSON": (
        "a.jsonl",
        (json.dumps({"text": LONG}) + "\n{text: no}\n").encode(),
        ("a.jsonl", "line 2", "not JSON"),
    ),
    "text in a .jsonl": ("a.jsonl", LONG.encode(), ("a.jsonl", "line 1", "not JSON")),
    "lines that are counted though empty": (
        "a.jsonl",
        ("\n\n" + json.dumps({"text": LONG}) + "\n\n[]\n").encode(),
        ("a.jsonl", "line 5", "`text`"),
    ),
    "no field": ("a.jsonl", json.dumps({"content": LONG}).encode(), ("a.jsonl", "line 1", "`text`")),
    "a field that is no string": ("a.jsonl", json.dumps({"text": [LONG]}).encode(), ("a.jsonl", "line 1", "`text`")),
    "a list": ("a.jsonl", json.dumps([LONG]).encode(), ("a.jsonl", "line 1", "`text`")),
    "null": ("a.jsonl", b"null\n", ("a.jsonl", "line 1", "`text`")),
    "half a surrogate pair": (
        "a.jsonl",
        (json.dumps({"text": LONG}) + '\n{"text": "\\ud83d and on"}').encode(),
        ("a.jsonl", "line 2", "surrogate"),
    ),
    "very deep JSON": ("a.jsonl", b"[" * 100_000, ("a.jsonl", "line 1", "not JSON")),
    "no text in any line": ("a.jsonl", b'{"text": ""}\n' * 5, ("a.jsonl", "tokens")),
}


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_unreadable_text(name: str, refused: Callable[..., None], tmp_path: Path) -> None:
    """The message names the file, the line if there is one, and the problem; a dry run says the same."""
    file, content, named = CALIBRATIONS[name]
    (tmp_path / file).write_bytes(content)
    refused("--calibration", tmp_path / file, named=named)
    refused("--calibration", tmp_path / file, "--dry-run", named=named)


def test_missing_text(refused: Callable[..., None], tmp_path: Path) -> None:
    refused("--calibration", tmp_path / "none.txt", named=("--calibration", "none.txt"))
    refused("--calibration", tmp_path, named=("--calibration", str(tmp_path)))


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        (("TEXT:0",), ("TEXT:0", "not a positive number")),
        (("TEXT:-1",), ("TEXT:-1", "not a positive number")),
        (("TEXT:nan",), ("TEXT:nan", "not a positive number")),
        (("TEXT:much",), ("TEXT:much", "not a file")),
        (("TEXT", "TEXT:2"), ("TEXT", "twice")),
        (("sampled", "sampled:2"), ("sampled", "twice")),
        (("sampled:0",), ("sampled:0", "no text")),
    ],
)
def test_weights(texts: tuple[str, ...], named: tuple[str, ...], llama: Path, refused: Callable[..., None]) -> None:
    """They are positive numbers, one for each text; only `sampled` can be left out with 0."""
    text = str(llama.parent / "text.txt")
    options = [part for each in texts for part in ("--calibration", each.replace("TEXT", text))]
    refused(*options, named=tuple(each.replace("TEXT", text) for each in named))


@pytest.mark.parametrize("tokens", ["0", "-5", "255"])
def test_too_few_tokens(tokens: str, llama: Path, refused: Callable[..., None]) -> None:
    """At least one sequence to fit to and one to hold out."""
    text = llama.parent / "text.txt"
    refused("--calibration", text, "--calibration-tokens", tokens, named=("--calibration-tokens", tokens, "256"))


def test_tokens_must_be_a_number(llama: Path, refused: Callable[..., None]) -> None:
    refused("--calibration-tokens", "many", named=("--calibration-tokens", "integer"))


# ----------------------------------------------------------------------------------------------------------- the source


def test_source_without_a_tokenizer(refused: Callable[..., None], tmp_path: Path) -> None:
    """It cannot read a text; --mode expand needs none."""
    source = save_llama(tmp_path / "llama", tokenizer=False)
    refused(named=("no tokenizer", "--mode expand"), source=source)


def test_tokenizer_of_another_model(llama: Path, refused: Callable[..., None], tmp_path: Path) -> None:
    """Its ids have no embedding."""
    source = save_llama(tmp_path / "llama", vocab_size=100)
    refused("--calibration", llama.parent / "text.txt", named=("tokenizer", "100"), source=source)


def test_tokenizer_without_matching_words(llama: Path, refused: Callable[..., None], tmp_path: Path) -> None:
    """A word-level vocabulary without the words of the text and without an unknown token."""
    source = save_llama(tmp_path / "llama", tokenizer=False)
    words = Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(source)
    (tmp_path / "a.txt").write_text("one two three " * 20)
    refused("--calibration", tmp_path / "a.txt", named=("a.txt", "60 tokens"), source=source)


NAMES = {
    "model.embed_tokens.weight": "model.layers.0",
    "model.layers.0.self_attn.v_proj.weight": "model.layers.0.self_attn",
    "model.layers.1.self_attn.q_proj.weight": "model.layers.1.self_attn",
    "model.layers.1.self_attn.o_proj.weight": "model.layers.1.self_attn",
    "model.layers.1.mlp.down_proj.weight": "model.layers.1.mlp",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", NAMES)
def test_nonfinite_source(tensor: str, value: float, llama: Path, refused: Callable[..., None], tmp_path: Path) -> None:
    """NaN is reported for the module where it appears first, without verification too; resumable work is kept."""
    source = save_llama(tmp_path / "llama")
    tensors = load_file(source / "model.safetensors")
    tensors[tensor][:] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    options = ("--calibration", llama.parent / "text.txt", "--calibration-tokens", 512, "--effort", "fast")
    refused(*options, "--no-verify", named=(NAMES[tensor], "not finite"), source=source)


# ---------------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        (VARIANTS["mha"], (), ("4 KV heads has only one of the 4 query heads", "--mode expand")),
        (VARIANTS["mha"], ("--ratio", "1:1"), ("4 query heads", "--mode expand")),
        ({}, ("--ratio", "4:1"), ("--ratio 4:1", "2 (1:1)")),
        ({}, ("--ratio", "3:1"), ("--mode split", "2 (1:1)")),
        ({}, ("--noise-heads", 1), ("1 of 4", "2 (1:1)")),
        ({}, ("--noise-heads", 0), ("0 of 4", "2 (1:1)")),
        ({}, ("--noise-heads", 4), ("4 of 4", "2 (1:1)")),
        ({}, ("--noise-heads", -2), ("-2 of 4", "2 (1:1)")),
        ({}, ("--ratio", "x"), ("--ratio x",)),
        ({}, ("--ratio", "0"), ("--ratio 0",)),
        ({}, ("--ratio", "1:1", "--noise-heads", 2), ("--ratio", "--noise-heads")),
        (VARIANTS["mqa"], ("--noise-heads", 3), ("3 of 4", "1 (3:1)", "2 (1:1)")),
        (VARIANTS["odd heads 9/3"], ("--ratio", "1:1"), ("--ratio 1:1", "3 (2:1)")),
    ],
)
def test_heads_that_cannot_be_split(
    changes: dict[str, Any], options: tuple[object, ...], named: tuple[str, ...], refused: Any, tmp_path: Path
) -> None:
    """The message lists the possible numbers, or names an alternative."""
    refused(*options, named=named, source=save_llama(tmp_path / "llama", **changes))


@pytest.mark.parametrize("effort", ["foo", "", "Fast"])
def test_unknown_effort(effort: str, llama: Path, refused: Callable[..., None]) -> None:
    refused("--effort", effort, named=("--effort", "fast, default"))


def test_conflicting_options(llama: Path, refused: Callable[..., None]) -> None:
    """An unknown λ type, and --qk-rank, which needs a second step."""
    refused("--lambda-type", "foo", named=("--lambda-type foo", "reparameterized, tanh, sigmoid"))
    refused("--qk-rank", 4, named=("--qk-rank", "--mode split", "split first"))


@pytest.mark.parametrize("option", [("--calibration", __file__), ("--calibration-tokens", 4096), ("--effort", "fast")])
def test_split_options_are_refused_in_other_modes(option: tuple[object, ...], refused: Callable[..., None]) -> None:
    refused(*option, mode="expand", named=(str(option[0]), "--mode split"))


def test_motif_cannot_be_split(refused: Callable[..., None], tmp_path: Path) -> None:
    from ..support.relatives import save_motif

    refused(named=("--mode split", "--mode map"), source=save_motif(tmp_path / "motif"))


def test_gda_model_cannot_be_split(llama: Path, refused: Callable[..., None], tmp_path: Path) -> None:
    import gda

    gda.convert(llama, tmp_path / "expanded", verify=False)
    refused(named=("already a GDA model",), source=tmp_path / "expanded")


def test_existing_out_is_refused_first(llama: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "gda").mkdir()
    outcome = command("convert", llama, tmp_path / "gda", "--mode", "split")
    assert_refused(outcome, "--overwrite")
    assert os.listdir(tmp_path) == ["gda"]
