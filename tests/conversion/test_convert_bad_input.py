"""Bad input to `gda convert`: exit code 2, one line that names the file or field, and no files left behind."""

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import gda

from ..support.commands import Command, assert_refused
from ..support.fuzzing import FUZZ, SECONDS, VALUES, converts_or_says_why
from ..support.llamas import VARIANTS, change_config, files_of, save_llama

pytestmark = pytest.mark.sampled

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_2 = "model-00002-of-00004.safetensors"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make no requests to the Hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama in one file, `one`, and one in four shards, `shards`. Tests must not change it."""
    folder = tmp_path_factory.mktemp("llamas")
    save_llama(folder / "one")
    save_llama(folder / "shards", **VARIANTS["shards"])
    return folder


@pytest.fixture
def one(llamas: Path, tmp_path: Path) -> Path:
    """A copy of the Llama in one file."""
    return Path(shutil.copytree(llamas / "one", tmp_path / "llama"))


@pytest.fixture
def shards(llamas: Path, tmp_path: Path) -> Path:
    """A copy of the Llama in four shards."""
    return Path(shutil.copytree(llamas / "shards", tmp_path / "llama"))


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Load a safetensors file, call `change` on its tensors, and write it back."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------- broken sources


def remove_shard(folder: Path) -> None:
    (folder / SHARD_2).unlink()


def truncate_shard(folder: Path) -> None:
    with open(folder / SHARD_2, "r+b") as file:
        file.truncate(5000)


def empty_shard(folder: Path) -> None:
    (folder / SHARD_2).write_bytes(b"")


def garbage_shard(folder: Path) -> None:
    (folder / SHARD_2).write_bytes(b"\xff" * 4096)


def huge_header(folder: Path) -> None:
    (folder / SHARD_2).write_bytes(struct.pack("<Q", 2**62) + b"{}")


def header_that_is_no_json(folder: Path) -> None:
    (folder / SHARD_2).write_bytes(struct.pack("<Q", 16) + b"{not json at all" + bytes(64))


def deep_header(folder: Path) -> None:
    (folder / SHARD_2).write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)


def absent_from_index(folder: Path) -> None:
    names = weight_map(folder)
    del names["model.layers.1.mlp.up_proj.weight"]
    write_index(folder, names)


def absent_from_shard(folder: Path) -> None:
    file = weight_map(folder)["model.layers.1.mlp.up_proj.weight"]
    rewrite(folder / file, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def absent_altogether(folder: Path) -> None:
    absent_from_shard(folder)
    absent_from_index(folder)


def in_the_wrong_shard(folder: Path) -> None:
    names = weight_map(folder)
    names["model.layers.1.mlp.up_proj.weight"] = names["model.embed_tokens.weight"]
    write_index(folder, names)


def extra_tensor(folder: Path) -> None:
    rewrite(folder / SHARD_2, lambda tensors: tensors.update({"model.vision.weight": torch.zeros(2)}))
    write_index(folder, weight_map(folder) | {"model.vision.weight": SHARD_2})


def integer_tensor(folder: Path) -> None:
    file = weight_map(folder)["model.norm.weight"]
    rewrite(folder / file, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))


def float8_tensor(folder: Path) -> None:
    file = weight_map(folder)["model.norm.weight"]
    rewrite(
        folder / file, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)})
    )


def transposed_tensor(folder: Path) -> None:
    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].T.contiguous()

    rewrite(folder / weight_map(folder)["model.layers.1.mlp.up_proj.weight"], transpose)


def pickles_only(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\nq\x00.")


def no_weights(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()


def index_is(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(text)


def file_in_index(file: object) -> Callable[[Path], object]:
    return lambda folder: write_index(folder, weight_map(folder) | {"model.norm.weight": file})


def config_is(text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def config_field(**changes: object) -> Callable[[Path], object]:
    return lambda folder: change_config(folder, **changes)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config.json is a folder": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
        "config.json",
    ),
    "config.json is empty": (config_is(""), "config.json"),
    "config.json is no JSON": (config_is("{model_type: llama"), "config.json"),
    "config.json is no text": (config_is(b"\xff\xfe\x00\x80"), "config.json"),
    "config.json is a list": (config_is('["model_type", "llama"]'), "config.json"),
    "config.json is nested deep": (config_is("[" * 100_000 + "]" * 100_000), "config.json"),
    "no model_type": (config_field(model_type=...), "model_type"),
    "model_type is a number": (config_field(model_type=7), "model_type"),
    "unknown model_type": (config_field(model_type="no-such-model"), "no-such-model"),
    "model_type is a path": (config_field(model_type="../../etc"), "../../etc"),
    "mixtral": (config_field(model_type="mixtral"), "mixtral"),
    "gpt2": (config_field(model_type="gpt2"), "gpt2"),
    "bert": (config_field(model_type="bert"), "bert"),
    "t5": (config_field(model_type="t5"), "t5"),
    "quantized": (
        config_field(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantization_config",
    ),
    "remote code": (
        config_field(model_type="mine", auto_map={"AutoConfig": "evil.Config"}),
        "mine",
    ),
    "heads contradict the weights": (config_field(num_attention_heads=8), "q_proj"),
    "KV heads contradict the weights": (config_field(num_key_value_heads=4), "k_proj"),
    "hidden size contradicts the weights": (config_field(hidden_size=64), "shape"),
    "more layers than weights": (config_field(num_hidden_layers=3), "layers"),
    "fewer layers than weights": (config_field(num_hidden_layers=1), "layers"),
    "a vocabulary of another size": (config_field(vocab_size=77), "embed_tokens"),
    "biases that are not there": (config_field(attention_bias=True), "bias"),
    "a billion layers": (config_field(num_hidden_layers=10**9), "layers"),
    "a vocabulary of 10^18": (config_field(vocab_size=10**18), "config"),
    "a hidden size of 10^30": (config_field(hidden_size=10**30), "config"),
    "no layers": (config_field(num_hidden_layers=0), "layers"),
    "negative heads": (config_field(num_attention_heads=-4), "config"),
    "no KV heads": (config_field(num_key_value_heads=0), "config"),
    "odd head_dim": (config_field(head_dim=7), ""),
    "hidden_act unknown": (config_field(hidden_act="nonsense"), "nonsense"),
    "rope type unknown": (config_field(rope_parameters={"rope_type": "spiral", "rope_theta": 1.0}), "spiral"),
    "rope without a factor": (config_field(rope_parameters={"rope_type": "linear", "rope_theta": 1.0}), "rope"),
    "partial rotary": (
        config_field(rope_parameters={"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.5}),
        "partial_rotary_factor",
    ),
    "pad token past the vocabulary": (config_field(pad_token_id=10**6), "config"),
    "a list for a number": (config_field(hidden_size=[32]), "hidden_size"),
    "no weights": (no_weights, "model.safetensors"),
    "pickles only": (pickles_only, "pytorch_model.bin"),
    "a shard is missing": (remove_shard, SHARD_2),
    "a shard is truncated": (truncate_shard, SHARD_2),
    "a shard is empty": (empty_shard, SHARD_2),
    "a shard is garbage": (garbage_shard, SHARD_2),
    "a shard's header is huge": (huge_header, SHARD_2),
    "a shard's header is no JSON": (header_that_is_no_json, SHARD_2),
    "a shard's header is nested deep": (deep_header, SHARD_2),
    "a tensor is absent from the index": (absent_from_index, "model.layers.1.mlp.up_proj.weight"),
    "a tensor is absent from its shard": (absent_from_shard, "model.layers.1.mlp.up_proj.weight"),
    "a tensor is absent altogether": (absent_altogether, "model.layers.1.mlp.up_proj.weight"),
    "a tensor is in another shard": (in_the_wrong_shard, "model.layers.1.mlp.up_proj.weight"),
    "a tensor of no Llama": (extra_tensor, "model.vision.weight"),
    "an integer tensor": (integer_tensor, "model.norm.weight"),
    "an 8-bit float tensor": (float8_tensor, "model.norm.weight"),
    "a transposed tensor": (transposed_tensor, "model.layers.1.mlp.up_proj.weight"),
    "index is empty": (index_is(""), INDEX),
    "index is no JSON": (index_is("{weight_map:"), INDEX),
    "index is a list": (index_is("[1, 2]"), INDEX),
    "index is nested deep": (index_is('{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}"), INDEX),
    "index without weight_map": (index_is("{}"), INDEX),
    "weight_map is empty": (index_is('{"weight_map": {}}'), INDEX),
    "weight_map is a list": (index_is('{"weight_map": [1]}'), INDEX),
    "index points above": (file_in_index("../secret.safetensors"), "../secret.safetensors"),
    "index points to the root": (file_in_index("/etc/passwd"), "/etc/passwd"),
    "index points below": (file_in_index("sub/model.safetensors"), "sub/model.safetensors"),
    "index with a backslash": (file_in_index("..\\secret.safetensors"), "secret.safetensors"),
    "index names the folder": (file_in_index(".."), INDEX),
    "index names nothing": (file_in_index(""), INDEX),
    "index names a number": (file_in_index(3), INDEX),
    "index names a NUL": (file_in_index("a\0.safetensors"), INDEX),
    "index names a very long file": (file_in_index("a" * 300), ""),
    "index names config.json": (file_in_index("config.json"), "config.json"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_source_is_refused(what: str, shards: Path, tmp_path: Path, command: Command) -> None:
    """One line names the file, tensor or field. The source is unchanged, and there is no OUT."""
    breaking, named = BROKEN[what]
    breaking(shards)
    before = files_of(shards)
    begun = time.monotonic()
    outcome = command("convert", shards, tmp_path / "deep" / "gda", "--no-verify")
    assert time.monotonic() - begun < SECONDS
    assert_refused(outcome, named)
    assert os.listdir(tmp_path) == ["llama"]
    assert files_of(shards) == before


@pytest.mark.parametrize("what", ["a shard is truncated", "index points above", "mixtral", "pickles only"])
@pytest.mark.parametrize("name", ["verify", "inspect", "export"])
def test_other_commands_refuse_a_broken_model(
    name: str, what: str, llamas: Path, tmp_path: Path, command: Command
) -> None:
    """verify, inspect and export check converted folders in the same way."""
    gda.convert(llamas / "shards", tmp_path / "gda", verify=False, max_shard_size="20KB")
    breaking, named = BROKEN[what]
    breaking(tmp_path / "gda")
    arguments = {
        "verify": ("verify", llamas / "shards", tmp_path / "gda"),
        "inspect": ("inspect", tmp_path / "gda"),
        "export": ("export", tmp_path / "gda", tmp_path / "llama"),
    }[name]
    assert_refused(command(*arguments), named)
    assert os.listdir(tmp_path) == ["gda"]


def test_truncated_single_file(one: Path, tmp_path: Path, command: Command) -> None:
    """The message names the file."""
    with open(one / WEIGHTS, "r+b") as file:
        file.truncate((one / WEIGHTS).stat().st_size - 1)
    assert_refused(command("convert", one, tmp_path / "gda"), WEIGHTS)
    assert os.listdir(tmp_path) == ["llama"]


def test_pickle_is_never_loaded(one: Path, tmp_path: Path, command: Command) -> None:
    """A pickle with a visible side effect is refused, and the side effect does not occur."""
    import pickle

    class Mark:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "mark"),)

    (one / WEIGHTS).unlink()
    (one / "pytorch_model.bin").write_bytes(pickle.dumps(Mark()))
    assert_refused(command("convert", one, tmp_path / "gda"), "pytorch_model.bin", "pickle")
    assert os.listdir(tmp_path) == ["llama"]


def test_code_in_the_source_is_never_run(one: Path, tmp_path: Path, command: Command) -> None:
    """auto_map and Python files beside a Llama are neither run nor copied."""
    change_config(one, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (one / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'mark')!r})")
    outcome = command("convert", one, tmp_path / "gda")
    assert outcome.code == 0, outcome
    assert sorted(os.listdir(tmp_path)) == ["gda", "llama"]
    assert not (tmp_path / "gda" / "evil.py").exists()
    assert "evil" not in (tmp_path / "gda" / "config.json").read_text()


@pytest.mark.parametrize("content", [b"", b"{", b'{"model": 1}', b"\xff\xfe"], ids=repr)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_damaged_files_beside_the_weights(
    file: str, content: bytes, one: Path, tmp_path: Path, command: Command
) -> None:
    """A damaged tokenizer or generation config is refused in one line or copied as it is, without a traceback.

    A tokenizer config without a class is not damaged: it gets the class that reads the tokenizer, with a note.
    """
    (one / file).write_bytes(content)
    outcome = command("convert", one, tmp_path / "gda")
    if f"{file} names PreTrainedTokenizerFast" in outcome.out:
        assert json.loads(content).items() <= json.loads((tmp_path / "gda" / file).read_text()).items()
    elif outcome.code == 0:
        assert (tmp_path / "gda" / file).read_bytes() == content
    else:
        assert_refused(outcome, file)
        assert os.listdir(tmp_path) == ["llama"]


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--ratio", "3"], "1 (4:1), 2 (2:1), 4 (1:1)"),
        (["--ratio", "0"], "--ratio"),
        (["--ratio", "-1"], "--ratio"),
        (["--ratio", "4:2"], "--ratio"),
        (["--ratio", "1.5"], "--ratio"),
        (["--ratio", "a"], "--ratio"),
        (["--ratio", ""], "--ratio"),
        (["--ratio", "9" * 5000], ""),
        (["--noise-heads", "3"], "--noise-heads"),
        (["--noise-heads", "0"], "--noise-heads"),
        (["--noise-heads", "-2"], "--noise-heads"),
        (["--noise-heads", "99999999999999999999"], "--noise-heads"),
        (["--ratio", "2", "--noise-heads", "2"], "--ratio and --noise-heads"),
        (["--dtype", "int8"], "--dtype"),
        (["--dtype", ""], "--dtype"),
        (["--mode", "explode"], "--mode"),
        (["--lambda-type", "cosine"], "lambda"),
        (["--workers", "0"], "--workers"),
        (["--workers", "-2"], "--workers"),
        (["--workers", "two"], "--workers"),
        (["--max-shard-size", "abc"], "--max-shard-size"),
        (["--max-shard-size", ""], "--max-shard-size"),
        (["--max-shard-size", "0"], "--max-shard-size"),
        (["--max-shard-size", "0GB"], "--max-shard-size"),
        (["--max-shard-size", "-5GB"], "--max-shard-size"),
        (["--max-shard-size", "nanGB"], "--max-shard-size"),
        (["--max-shard-size", "infGB"], "--max-shard-size"),
        (["--max-shard-size", "5"], "--max-shard-size"),
        # Refused by the command-line parser, also in one line.
        (["--noise-heads", "two"], "--noise-heads"),
        (["--seed", "x"], "--seed"),
        (["--no-such-option"], "--no-such-option"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("dry_run", [False, True], ids=["", "dry run"])
def test_bad_option_is_refused(
    options: list[str], named: str, dry_run: bool, one: Path, tmp_path: Path, command: Command
) -> None:
    """One line names the option, with --dry-run too."""
    dry = ["--dry-run"] if dry_run else []
    assert_refused(command("convert", one, tmp_path / "gda", "--no-verify", *dry, *options), named)
    assert os.listdir(tmp_path) == ["llama"]


@pytest.mark.parametrize("size", [0, -1, 1.5, None, True])
def test_bad_shard_size_from_python(size: Any, one: Path, tmp_path: Path) -> None:
    """ValueError for a size that is neither text nor a positive number."""
    with pytest.raises(ValueError, match="max-shard-size"):
        gda.convert(one, tmp_path / "gda", verify=False, max_shard_size=size)
    assert os.listdir(tmp_path) == ["llama"]


@pytest.mark.parametrize("workers", [0, -1, 1.5, None, True, "2"])
def test_bad_number_of_workers_from_python(workers: Any, one: Path, tmp_path: Path) -> None:
    """ValueError for anything but a positive integer."""
    with pytest.raises(ValueError, match="workers"):
        gda.convert(one, tmp_path / "gda", verify=False, workers=workers)
    assert os.listdir(tmp_path) == ["llama"]


@pytest.mark.parametrize(
    "arguments", [[], ["SOURCE"], ["SOURCE", "OUT", "more"]], ids=["none", "no OUT", "one too many"]
)
def test_wrong_number_of_arguments(arguments: list[str], command: Command) -> None:
    """Exit code 2 and one line."""
    assert_refused(command("convert", *arguments))


# --------------------------------------------------------------------------------------------------------------- places


def test_missing_source(tmp_path: Path, command: Command) -> None:
    assert_refused(command("convert", tmp_path / "nowhere", tmp_path / "gda"), str(tmp_path / "nowhere"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("source", ["", ".", "/", " "])
def test_source_without_a_model(source: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty string is not the current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    outcome = command("convert", source, tmp_path / "gda")
    assert_refused(outcome)
    if source == "":
        assert "is the source" not in outcome.error
        assert "is empty" in outcome.error
    assert os.listdir(tmp_path) == ["here"]
    assert os.listdir(tmp_path / "here") == []


def test_empty_out_is_refused(one: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With --overwrite too: it is not the current folder."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "precious").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    for options in ([], ["--overwrite"]):
        assert_refused(command("convert", one, "", "--no-verify", *options), "OUT")
    assert files_of(tmp_path / "here") == {"precious": b"mine"}


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_working_folder_and_its_parents_are_not_overwritten(
    out: str, one: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a" / "here").mkdir(parents=True)
    (tmp_path / "a" / "here" / "precious").write_text("mine")
    monkeypatch.chdir(tmp_path / "a" / "here")
    before = set(os.listdir("/"))
    assert_refused(command("convert", one, out, "--no-verify", "--overwrite"))
    assert files_of(tmp_path / "a") == {"here/precious": b"mine"}
    assert sorted(os.listdir(tmp_path)) == ["a", "llama"]
    assert set(os.listdir("/")) == before


@pytest.mark.parametrize(
    "name", ["no such id", "a/b/c", "a//b", "-", "..", "a..b/c", "no-such-org/no-such-model", "x" * 500, "日本", "a\0b"]
)
def test_bad_hub_id(name: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for a name that is neither a folder nor a valid Hub id."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert_refused(command("convert", name, tmp_path / "gda"))
    assert os.listdir(tmp_path) == ["here"]


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling link"])
def test_existing_out_is_refused(
    kind: str, one: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, command: Command
) -> None:
    """OUT is unchanged, and the message names the remedy."""
    out = tmp_path / "gda"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
    else:
        out.symlink_to(tmp_path_factory.mktemp("elsewhere") if kind == "link" else tmp_path / "nowhere")
    assert_refused(command("convert", one, out), str(out), "--overwrite")
    assert_refused(command("convert", one, out, "--dry-run"), str(out), "--overwrite")
    assert sorted(os.listdir(tmp_path)) == ["gda", "llama"]
    assert out.is_symlink() == kind.endswith("link")


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("inside", ["", "sub", "sub/sub", "../llama"])
def test_out_inside_the_source_is_refused(
    inside: str, options: list[str], one: Path, tmp_path: Path, command: Command
) -> None:
    """With --overwrite too, and with any spelling of the path."""
    before = files_of(one)
    assert_refused(command("convert", one, one / inside, *options), "source")
    assert files_of(one) == before
    assert os.listdir(tmp_path) == ["llama"]


def test_out_that_contains_the_source_is_refused(tmp_path: Path, llamas: Path, command: Command) -> None:
    """Overwriting it would delete the source."""
    shutil.copytree(llamas / "one", tmp_path / "models" / "llama")
    before = files_of(tmp_path / "models")
    assert_refused(command("convert", tmp_path / "models" / "llama", tmp_path / "models", "--overwrite"), "source")
    assert files_of(tmp_path / "models") == before


def test_out_that_links_to_the_source_is_refused(one: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "link").symlink_to(one)
    before = files_of(one)
    assert_refused(command("convert", one, tmp_path / "link", "--overwrite"), "source")
    assert files_of(one) == before


def test_export_into_its_own_model_is_refused(llamas: Path, tmp_path: Path, command: Command) -> None:
    """Overwriting it would delete the model."""
    gda.convert(llamas / "one", tmp_path / "gda", verify=False)
    before = files_of(tmp_path / "gda")
    for out in (tmp_path / "gda", tmp_path / "gda" / "llama", tmp_path):
        outcome = command("export", tmp_path / "gda", out, "--overwrite")
        assert outcome.code == 2, out
        assert files_of(tmp_path / "gda") == before, out


def test_parent_of_out_is_a_file(one: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "gda", tmp_path / "file" / "deep" / "gda"):
        assert_refused(command("convert", one, out, "--no-verify"), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "llama"]


def test_name_too_long_for_the_file_system(one: Path, tmp_path: Path, command: Command) -> None:
    """The system's error is printed in one line, and created parents are removed."""
    assert_refused(command("convert", one, tmp_path / "deep" / ("x" * 250), "--no-verify"), "too long")
    assert os.listdir(tmp_path) == ["llama"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
def test_file_without_read_permission(file: str, one: Path, tmp_path: Path, command: Command) -> None:
    (one / file).chmod(0)
    assert_refused(command("convert", one, tmp_path / "gda"), file)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_permission_error_from_the_system(
    file: str, one: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, so that it also occurs when root runs the tests."""
    read_text, copyfile = Path.read_text, shutil.copyfile

    def refuse(path: Any) -> None:
        if Path(path) == one / file:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: refuse(path) or read_text(path, *a, **k))
    monkeypatch.setattr(shutil, "copyfile", lambda path, *a, **k: refuse(path) or copyfile(path, *a, **k))
    assert_refused(command("convert", one, tmp_path / "gda", "--no-verify"), file, "Permission denied")
    assert os.listdir(tmp_path) == ["llama"]


def test_missing_or_invalid_gguf(tmp_path: Path, command: Command) -> None:
    assert_refused(command("convert", tmp_path / "no.gguf", tmp_path / "gda"), "no.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    assert_refused(command("convert", tmp_path / "bad.gguf", tmp_path / "gda"), "bad.gguf")
    (tmp_path / "notes.txt").write_text("hello")
    assert_refused(command("convert", tmp_path / "notes.txt", tmp_path / "gda"), "notes.txt")
    assert sorted(os.listdir(tmp_path)) == ["bad.gguf", "notes.txt"]


def test_verify_of_unrelated_models(llamas: Path, tmp_path: Path, command: Command) -> None:
    """Another vocabulary, another depth or no GDA model: exit code 2 or a failed check, without a traceback."""
    gda.convert(llamas / "one", tmp_path / "gda", verify=False)
    other = save_llama(tmp_path / "other", vocab_size=300, tokenizer=False)
    assert_refused(command("verify", other, tmp_path / "gda"), "vocabulary")
    deeper = save_llama(tmp_path / "deeper", num_hidden_layers=3)
    for method in ("full", "layers", "tensors"):
        outcome = command("verify", deeper, tmp_path / "gda", "--method", method)
        assert outcome.code in (1, 2), (method, outcome)
        assert len(outcome.error.splitlines()) == 1, (method, outcome)
    assert_refused(command("verify", llamas / "one", tmp_path / "gda", "--method", "guess"), "--method")
    assert_refused(command("verify", llamas / "one", tmp_path / "nowhere"), "nowhere")
    assert_refused(command("inspect", llamas / "one"), "not a GDA model")
    assert_refused(command("export", llamas / "one", tmp_path / "out"), "not a GDA model")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"settings": 3}', '{"settings": {"dtype": "no"}}', '{"settings": {}}']
)
def test_foreign_conversion_json(content: str, llamas: Path, tmp_path: Path, command: Command) -> None:
    gda.convert(llamas / "one", tmp_path / "gda", verify=False)
    (tmp_path / "gda" / "conversion.json").write_text(content)
    assert_refused(command("verify", llamas / "one", tmp_path / "gda"), "conversion.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "int3"),
        ("dtype", 7),
        ("lambda_type", "sigmoid"),
        ("num_noise_heads", 3),
        ("num_noise_heads", "x"),
        ("seed", None),
    ],
)
def test_invalid_settings_in_conversion_json(
    field: str, value: Any, llamas: Path, tmp_path: Path, command: Command
) -> None:
    """verify refuses them in one line, or reports different tensors."""
    gda.convert(llamas / "one", tmp_path / "gda", verify=False)
    path = tmp_path / "gda" / "conversion.json"
    output = json.loads(path.read_text())
    output["settings"][field] = value
    path.write_text(json.dumps(output))
    outcome = command("verify", llamas / "one", tmp_path / "gda", "--method", "tensors")
    assert outcome.code in (1, 2), outcome
    assert len(outcome.error.splitlines()) == 1


@pytest.mark.parametrize(
    "changes", [{"return_dict": False}, {"output_hidden_states": "0"}, {"output_attentions": True}], ids=str
)
def test_output_options_in_the_config_do_not_affect_verification(
    changes: dict[str, Any], one: Path, tmp_path: Path, command: Command
) -> None:
    """The model converts and verifies, or is refused in one line."""
    change_config(one, **changes)
    outcome = command("convert", one, tmp_path / "gda")
    if outcome.code:
        assert_refused(outcome)
    else:
        assert "verified (full" in outcome.out


def test_index_without_metadata(shards: Path, tmp_path: Path, command: Command) -> None:
    """transformers cannot load it. It converts, or one line names the index."""
    (shards / INDEX).write_text(json.dumps({"weight_map": weight_map(shards)}))
    outcome = command("convert", shards, tmp_path / "gda")
    if outcome.code:
        assert_refused(outcome, INDEX)
    else:
        assert gda.verify(shards, tmp_path / "gda", method="layers").passed


# ----------------------------------------------------------------------------------------------------------------- fuzz

FIELDS = sorted(set(AutoConfig.for_model("llama").to_dict()) | {"model_type", "dtype", "torch_dtype", "rope_scaling"})


@pytest.mark.slow
@FUZZ
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=2))
def test_any_config_converts_or_is_refused(changes: dict[str, Any], llamas: Path, tmp_path: Path) -> None:
    """Wrong types, negative, huge and missing values of every field: success or one error, in bounded time."""
    source = Path(shutil.copytree(llamas / "one", tmp_path / "llama", dirs_exist_ok=True))
    change_config(source, **changes)
    converts_or_says_why(source, tmp_path)


@pytest.mark.slow
@FUZZ
@given(
    file=st.sampled_from([INDEX, SHARD_2, "config.json"]),
    position=st.floats(0, 1, exclude_max=True),
    bits=st.integers(0, 255),
    data=st.data(),
)
def test_any_damaged_file_converts_or_is_refused(
    file: str, position: float, bits: int, data: st.DataObject, llamas: Path, tmp_path: Path
) -> None:
    """A flipped byte in the index, a header or the config, or a truncated file."""
    source = Path(shutil.copytree(llamas / "shards", tmp_path / "llama", dirs_exist_ok=True))
    content = bytearray((source / file).read_bytes())
    end = 8 + struct.unpack("<Q", content[:8])[0] if file == SHARD_2 else len(content)
    at = int(position * end)
    if data.draw(st.booleans(), label="cut off"):
        content = content[:at]
    else:
        content[at] ^= bits
    (source / file).write_bytes(content)
    converts_or_says_why(source, tmp_path)
