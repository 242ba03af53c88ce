"""Push and pull over HTTP with the real clients and a local Hub, including everything that can fail."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gda

from ..conftest import HF_HOME
from ..support.commands import Command, assert_refused
from ..support.hub_server import READER, Fault, Hub, Refusal, put
from ..support.llamas import CHAT_TEMPLATE, files_of, save_llama, tensors_of
from ..support.tiny import tiny_config, tiny_model, token_ids

pytestmark = pytest.mark.sampled

CODE = {"configuration_gda.py", "modeling_gda.py", "attention_gda.py"}
SHARDS = "20KB"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A converted Llama in several shards, with tokenizer and chat template."""
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "llama-gda", max_shard_size=SHARDS, verify=False)
    return tmp_path / "llama-gda"


def as_pushed(folder: Path, repo: str = "me/x") -> dict[str, bytes]:
    """The files of a folder as a push sends them: the card names the repository."""
    files = files_of(folder)
    assert b"path/or/id" in files["README.md"]
    return files | {"README.md": files["README.md"].replace(b"path/or/id", repo.encode())}


# -------------------------------------------------------------------------------------------------------- push and pull


@torch.no_grad()
def test_push_to_hub_and_from_pretrained(hub: Hub) -> None:
    """Logits are equal, with shards, and the repository contains the code."""
    model = tiny_model(head_norm=True, lambda_type="sigmoid")
    model.push_to_hub("me/tiny", max_shard_size=SHARDS)
    held = hub.files("me/tiny")
    assert set(held) >= CODE | {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert sum(path.endswith(".safetensors") for path in held) > 1
    assert "gda" in huggingface_hub.ModelCard(held["README.md"].decode()).data.tags
    pulled = AutoModelForCausalLM.from_pretrained("me/tiny").eval()
    assert type(pulled) is gda.GDAForCausalLM
    ids = token_ids(2, 9)
    assert torch.equal(pulled(ids).logits, model(ids).logits)


@torch.no_grad()
def test_revisions_hold_different_models(hub: Hub) -> None:
    """A model pushed to a branch is loaded from it and from its commit."""
    first, second = tiny_model(seed=1), tiny_model(seed=2)
    first.push_to_hub("me/tiny")
    huggingface_hub.create_branch("me/tiny", branch="v2")
    second.push_to_hub("me/tiny", revision="v2")
    ids = token_ids(1, 7)
    for revision, model in {"main": first, "v2": second, hub.repos["me/tiny"].branches["v2"]: second}.items():
        pulled = AutoModelForCausalLM.from_pretrained("me/tiny", revision=revision).eval()
        assert torch.equal(pulled(ids).logits, model(ids).logits), revision


def test_gda_push_sends_the_folder(folder: Path, hub: Hub, command: Command) -> None:
    """The repository equals the folder, but the card names the repository. Tokenizer and chat template load from it."""
    outcome = command("push", folder, "me/llama-gda", "--json")
    assert outcome.code == 0, outcome.error
    output = json.loads(outcome.out)
    held = hub.files("me/llama-gda")
    del held[".gitattributes"]
    assert held == as_pushed(folder, "me/llama-gda")
    assert output["files"] == sorted(held)
    assert output["nbytes"] == sum(map(len, held.values()))
    assert output["commit"] == hub.repos["me/llama-gda"].branches["main"]
    assert output["url"] == f"{hub.url}/me/llama-gda"
    tokenizer = AutoTokenizer.from_pretrained("me/llama-gda")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = "the chat, ünd anderes"
    assert tokenizer(text) == AutoTokenizer.from_pretrained(folder)(text)


def test_second_push_sends_no_weights(folder: Path, hub: Hub, command: Command) -> None:
    """The Hub has them already, by their hashes."""
    assert command("push", folder, "me/x").code == 0
    puts = hub.asked("^PUT")
    assert puts == len(list(folder.glob("*.safetensors")))
    again = command("push", folder, "me/x")
    assert again.code == 0
    assert hub.asked("^PUT") == puts
    assert "already up to date" in again.out


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("converts", [True, False])
def test_upload_shows_its_progress_on_a_terminal(
    converts: bool, is_terminal: bool, folder: Path, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the progress bars of the Hub's client. A log file gets none."""
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(is_terminal)))
    if converts:
        outcome = command("convert", folder.parent / "llama", folder.parent / "new", "--push-to-hub", "me/x")
    else:
        outcome = command("push", folder, "me/x")
    assert outcome.code == 0
    assert ("model" in outcome.error and ".safetensors: " in outcome.error) is is_terminal
    assert is_terminal or converts or outcome.error == ""


@pytest.mark.slow
@torch.no_grad()
def test_files_of_an_earlier_model_are_removed(folder: Path, tmp_path: Path, hub: Hub, command: Command) -> None:
    """A single weight file or a chat template would be loaded with the new shards. Other files are kept."""
    gda.convert(save_llama(tmp_path / "other", seed=5), tmp_path / "single", verify=False)
    assert command("push", tmp_path / "single", "me/x").code == 0
    theirs = {"NOTES.md": b"notes", "LICENSE": b"a licence", "adapter_model.safetensors": b"an adapter"}
    theirs |= {"model-first-of-three.safetensors": b"no shard", "old/model.safetensors": b"a copy"}
    stale = {"chat_template.json": b"{}", "additional_chat_templates/old.jinja": b"old"}
    stale |= {"model-00001-of-00099.safetensors": b"a shard", "training.json": b"{}"}
    for path, content in (theirs | stale).items():
        huggingface_hub.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="me/x")
    outcome = command("push", folder, "me/x", "--json")
    assert outcome.code == 0, outcome.error
    assert json.loads(outcome.out)["removed"] == sorted([*stale, "model.safetensors"])
    held = hub.files("me/x")
    assert not {"model.safetensors", *stale} & set(held)
    assert theirs.items() <= held.items()
    pulled, pushed = (AutoModelForCausalLM.from_pretrained(place).eval() for place in ("me/x", folder))
    ids = token_ids(1, 5)
    assert torch.equal(pulled(ids).logits, pushed(ids).logits)


def test_branch_is_created_and_main_is_unchanged(folder: Path, hub: Hub, command: Command) -> None:
    outcome = command("push", folder, "me/x", "--revision", "v2", "--message", "the second")
    assert outcome.code == 0, outcome.error
    assert f"{hub.url}/me/x/tree/v2" in outcome.out
    assert set(hub.files("me/x")) == {".gitattributes"}
    assert "config.json" in hub.files("me/x", "v2")


@pytest.mark.parametrize(("option", "private"), [("--private", True), ("--public", False)])
def test_repository_is_created_private_or_public(
    option: str, private: bool, folder: Path, hub: Hub, command: Command
) -> None:
    assert command("push", folder, "me/x", option).code == 0
    assert hub.repos["me/x"].private is private


def test_convert_and_push(tmp_path: Path, hub: Hub, command: Command) -> None:
    """From a Llama on the Hub; the card names it and its licence."""
    llama = save_llama(tmp_path / "llama", max_shard_size=SHARDS)
    (llama / "README.md").write_text("---\nlicense: llama3.2\nlanguage: [en, de]\nbase_model: a/b\n---\nA Llama.\n")
    (llama / "pytorch_model.bin").write_bytes(b"a pickle")
    (llama / "modeling_llama.py").write_text("raise SystemExit")
    shutil.copytree(llama, llama / "checkpoint-9")  # as a training pushes them
    commit = put(hub, "some-one/llama", llama)
    out = tmp_path / "gda"
    outcome = command("convert", "some-one/llama", out, "--push-to-hub", "me/llama-gda", "--private")
    assert outcome.code == 0, outcome.error
    assert outcome.out.splitlines()[-1].startswith(f"{hub.url}/me/llama-gda: commit ")
    assert not hub.asked(r"resolve/.*(\.bin|\.py|checkpoint-9/.*safetensors)$")
    held = hub.files("me/llama-gda")
    del held[".gitattributes"]
    assert held == as_pushed(out, "me/llama-gda")
    assert hub.repos["me/llama-gda"].private
    source = json.loads(held["conversion.json"])["source"]
    assert (source["name"], source["revision"]) == ("some-one/llama", commit)
    data = huggingface_hub.ModelCard.load("me/llama-gda").data.to_dict()
    assert data["base_model"] == "some-one/llama"
    assert data["base_model_relation"] == "finetune"
    assert (data["license"], data["language"]) == ("llama3.2", ["en", "de"])
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert gda.verify("some-one/llama", "me/llama-gda").relative <= 1e-5


def test_missing_card_and_code_are_added_to_the_commit(tmp_path: Path, hub: Hub, command: Command) -> None:
    """The folder itself does not change."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "trained")
    for name in CODE:
        (tmp_path / "trained" / name).unlink()
    before = files_of(tmp_path / "trained")
    assert command("push", tmp_path / "trained", "me/trained").code == 0
    assert files_of(tmp_path / "trained") == before
    held = hub.files("me/trained")
    assert set(held) >= CODE | {"README.md"}
    card = huggingface_hub.ModelCard(held["README.md"].decode())
    assert card.text.strip().startswith("# trained with Grouped Differential Attention")
    assert "query heads  s s s n  s s s n" in card.text
    assert "trust_remote_code=True" in card.text


def test_push_without_code(folder: Path, hub: Hub, command: Command) -> None:
    """After a push with code: the files, auto_map and the card's section are gone. A later push restores them."""
    assert command("push", folder, "me/x").code == 0
    outcome = command("push", folder, "me/x", "--no-bundle-code")
    assert outcome.code == 0
    assert "is not part of a model" not in outcome.out
    assert "note: modeling_gda.py belongs to an earlier model" in outcome.out
    held = hub.files("me/x")
    assert b"trust_remote_code" not in held["README.md"]
    assert not [path for path in held if path.endswith(".py")]
    pushed, kept = json.loads(held["config.json"]), json.loads((folder / "config.json").read_text())
    del kept["auto_map"]
    assert pushed == kept
    assert command("push", folder, "me/x").code == 0
    assert {path: hub.files("me/x")[path] for path in files_of(folder)} == as_pushed(folder)


def test_other_files_are_left_out_and_named(folder: Path, hub: Hub, command: Command) -> None:
    """Pickles, checkpoints of a trainer and scripts."""
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    (folder / "train.py").write_text("print('mine')")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"old")
    outcome = command("push", folder, "me/x")
    assert outcome.code == 0, outcome.error
    notes = [line for line in outcome.out.splitlines() if line.startswith("note:")]
    assert [note.split()[1] for note in notes] == ["checkpoint-5", "optimizer.pt", "train.py"]
    assert not {"optimizer.pt", "train.py", "checkpoint-5/model.safetensors"} & set(hub.files("me/x"))


def test_conversion_json_of_other_weights_is_not_sent(folder: Path, hub: Hub, command: Command) -> None:
    """After training, its hashes and verification no longer apply."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(folder, max_shard_size=SHARDS)
    assert "Verification" in (folder / "README.md").read_text()
    outcome = command("push", folder, "me/x")
    assert outcome.code == 0, outcome.error
    assert "note: conversion.json describes different weights" in outcome.out
    held = hub.files("me/x")
    assert "conversion.json" not in held
    assert b"Verification" not in held["README.md"]


def test_licence_is_kept_after_training(tmp_path: Path, hub: Hub, command: Command) -> None:
    """In the card that replaces one which described other weights."""
    (save_llama(tmp_path / "llama") / "README.md").write_text("---\nlicense: mit\n---\nA Llama.\n")
    gda.convert(tmp_path / "llama", tmp_path / "gda", verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gda")
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(tmp_path / "gda")
    assert command("push", tmp_path / "gda", "me/x").code == 0
    assert b"license: mit" in hub.files("me/x")["README.md"]


def test_existing_card_is_kept(folder: Path, hub: Hub, command: Command) -> None:
    """A folder without a card does not replace an edited card in the repository."""
    huggingface_hub.create_repo("me/x")
    theirs = b"---\nlicense: mit\n---\nMine.\n"
    huggingface_hub.upload_file(path_or_fileobj=theirs, path_in_repo="README.md", repo_id="me/x")
    (folder / "README.md").unlink()
    outcome = command("push", folder, "me/x")
    assert outcome.code == 0
    assert "note: README.md of the repository is kept" in outcome.out
    assert f"{len(hub.files('me/x')) - 2} files," in outcome.out  # without the card and .gitattributes
    assert hub.files("me/x")["README.md"] == theirs


def test_language_that_yaml_reads_as_false(tmp_path: Path, hub: Hub) -> None:
    """Norwegian's `no`."""
    llama = save_llama(tmp_path / "llama")
    (llama / "README.md").write_text("---\nlanguage: [no, en]\n---\n")
    gda.convert(llama, tmp_path / "gda", verify=False)
    assert huggingface_hub.ModelCard.load(tmp_path / "gda" / "README.md").data.language == ["no", "en"]


@pytest.mark.parametrize(("noise_heads", "runs"), [(1, False), (2, True)])
def test_card_names_only_engines_that_can_run_the_model(noise_heads: int, runs: bool, tmp_path: Path) -> None:
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", noise_heads=noise_heads, verify=False)
    card = (tmp_path / "gda" / "README.md").read_text()
    assert ("vllm serve" in card) is runs
    assert "gda serve" in card
    assert "transformers serve" not in card


def test_dry_run_makes_no_requests(folder: Path, hub: Hub, command: Command) -> None:
    """It lists the files and needs no token."""
    outcome = command("push", folder, "me/x", "--dry-run")
    assert outcome.code == 0, outcome.error
    assert "model.safetensors.index.json" in outcome.out.splitlines()
    assert "nothing was" in outcome.out
    assert hub.log == []


# ------------------------------------------------------------------------------------------------------------- failures


def refused(command: Command, *arguments: object) -> str:
    """The one line that a refused command prints."""
    outcome = command(*arguments)
    assert_refused(outcome)
    return outcome.error


def test_push_without_a_token(folder: Path, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says how to log in."""
    monkeypatch.delenv("HF_TOKEN")
    error = refused(command, "push", folder, "me/x")
    assert "hf auth login" in error
    assert hub.repos == {}


@pytest.mark.parametrize("token", [READER, "hf_nonsense"])
def test_push_with_a_read_only_token(
    token: str, folder: Path, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the remedy and does not contain the token."""
    monkeypatch.setenv("HF_TOKEN", token)
    error = refused(command, "push", folder, "me/x")
    assert "me/x" in error
    assert "hf auth login" in error
    assert token not in error


@pytest.mark.parametrize("token", ["", READER])
def test_convert_checks_the_token_first(
    token: str, tmp_path: Path, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing or read-only token is reported before the conversion."""
    monkeypatch.setenv("HF_TOKEN", token)
    source = save_llama(tmp_path / "llama")
    error = refused(command, "convert", source, tmp_path / "gda", "--push-to-hub", "me/x")
    assert "hf auth login" in error
    assert not (tmp_path / "gda").exists()


def test_private_without_push_is_refused(tmp_path: Path, hub: Hub, command: Command) -> None:
    assert "--push-to-hub" in refused(command, "convert", save_llama(tmp_path / "llama"), tmp_path / "gda", "--private")


def test_failed_push_after_a_conversion(tmp_path: Path, hub: Hub, command: Command) -> None:
    """The model is kept, and the message says how to push it."""
    hub.faults.append(Fault("POST .*/commit/main", refuse=Refusal(400, "not today")))
    out = tmp_path / "gda"
    options = ("--push-to-hub", "me/x", "--private", "--no-bundle-code")
    error = refused(command, "convert", save_llama(tmp_path / "llama"), out, *options)
    assert "not today" in error
    again = ("push", out, "me/x", "--private", "--no-bundle-code")
    assert f"`gda {' '.join(map(str, again))}`" in error
    assert command(*again).code == 0


def test_interrupted_push_after_a_conversion(
    tmp_path: Path, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OUT is complete, so --resume is not the remedy."""
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", raising(KeyboardInterrupt()))
    out = tmp_path / "gda"
    outcome = command("convert", save_llama(tmp_path / "llama"), out, "--push-to-hub", "me/x")
    assert outcome.code == 130
    assert outcome.error.splitlines() == [f"gda: interrupted; {out} is complete: push it with `gda push {out} me/x`"]


def raising(error: BaseException) -> Callable[..., None]:
    def work(*_: object, **__: object) -> None:
        raise error

    return work


@pytest.mark.parametrize("error", [RuntimeError("Task error"), ConnectionError("429"), TimeoutError("10 s")])
def test_errors_of_xet(
    error: Exception, folder: Path, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It uploads and downloads beside the Hub's client, and raises Python's own errors."""
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", raising(error))
    message = refused(command, "push", folder, "me/x")
    assert message.startswith("gda: me/x: ")
    assert str(error) in message
    assert message.endswith("; run the same command again to continue\n")


def test_permissions_of_xet(folder: Path, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its errors are those of a file, but have no number."""
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", raising(PermissionError("token refresh failed")))
    message = refused(command, "push", folder, "me/x")
    assert message.startswith("gda: me/x: token refresh failed; log in with")


def test_owner_is_that_of_the_token(folder: Path, hub: Hub, command: Command) -> None:
    """The card names the whole id."""
    assert command("push", folder, "x").code == 0
    assert as_pushed(folder)["README.md"] == hub.files("me/x")["README.md"]


def test_single_shard_has_its_index(folder: Path, tmp_path: Path, hub: Hub, command: Command) -> None:
    gda.convert(save_llama(tmp_path / "l"), tmp_path / "m", verify=False)
    name = "model-00001-of-00001.safetensors"
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors_of(tmp_path / "m"), name)}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert command("push", tmp_path / "m", "me/x").code == 0
    assert {name, "model.safetensors.index.json"} <= set(hub.files("me/x"))
    ids = token_ids(1, 8)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained("me/x").eval()(ids).logits, expected)


@pytest.mark.parametrize("name", ["a/b/c", "me/x y", "me/..", "-x"])
@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_invalid_repository_name(
    name: str, option: list[str], folder: Path, hub: Hub, command: Command, tmp_path: Path
) -> None:
    """It is refused before any request, and before a conversion starts."""
    assert name in refused(command, "push", *option, "--", folder, name)
    out = tmp_path / "out"
    assert name in refused(command, "convert", tmp_path / "llama", out, f"--push-to-hub={name}", *option)
    assert not out.exists()
    assert hub.log == []


@pytest.mark.parametrize("revision", ["", "a b", "/x"])
def test_invalid_branch_name(revision: str, folder: Path, hub: Hub, command: Command) -> None:
    assert "--revision" in refused(command, "push", folder, "me/x", "--revision", revision)
    assert hub.log == []


@pytest.mark.parametrize(("there", "asked"), [("--public", "--private"), ("--private", "--public")])
def test_push_private_to_a_public_repository_is_refused(
    there: str, asked: str, folder: Path, hub: Hub, command: Command
) -> None:
    """And the other way round."""
    assert command("push", folder, "me/x", there).code == 0
    (folder / "generation_config.json").write_text("{}")
    assert f"is {there[2:]}" in refused(command, "push", folder, "me/x", asked, "--revision", "v2")
    assert "v2" not in hub.repos["me/x"].branches
    assert hub.files("me/x")["generation_config.json"] != b"{}"


def test_interrupted_upload_resumes(folder: Path, hub: Hub, command: Command) -> None:
    """Files that were sent are not sent again, and the model is complete in the end."""
    hub.faults.append(Fault("PUT /lfs/", refuse=Refusal(413, "the line is bad")))
    error = refused(command, "push", folder, "me/x")
    assert "the line is bad" in error
    assert "run the same command again" in error
    assert "config.json" not in hub.files("me/x")  # no partial push is visible
    sent = len(hub.lfs)
    assert command("push", folder, "me/x").code == 0
    shards = len(list(folder.glob("*.safetensors")))
    assert hub.asked("^PUT") == shards + 1
    assert sent < shards == len(hub.lfs)
    assert {path: hub.files("me/x")[path] for path in files_of(folder)} == as_pushed(folder)


@pytest.mark.slow
def test_killed_push_resumes(folder: Path, hub: Hub, command: Command) -> None:
    """After SIGKILL during the upload, the repository has no model until the next push."""
    process = subprocess.Popen([sys.executable, "-m", "gda.cli", "push", folder, "me/x"])
    hub.faults.append(Fault("PUT /lfs/", kill=process))
    assert process.wait(timeout=120) == -signal.SIGKILL
    assert set(hub.files("me/x")) == {".gitattributes"}
    assert command("push", folder, "me/x").code == 0
    assert {path: hub.files("me/x")[path] for path in files_of(folder)} == as_pushed(folder)


def test_damaged_upload_is_refused(folder: Path, hub: Hub, command: Command) -> None:
    """The Hub finds another hash than announced: the push fails, and nothing is committed."""
    hub.faults.append(Fault("PUT /lfs/", damage=0))
    assert "SHA-256" in refused(command, "push", folder, "me/x")
    assert set(hub.files("me/x")) == {".gitattributes"}


def test_interrupted_download_resumes(tmp_path: Path, hub: Hub) -> None:
    """The rest is requested by range, and the result is correct."""
    llama = save_llama(tmp_path / "llama")
    put(hub, "some-one/llama", llama)
    hub.faults.append(Fault(r"GET .*/model\.safetensors", cut_after=5000))
    gda.convert("some-one/llama", tmp_path / "gda", verify=False)
    assert hub.asked(r"GET .*/model\.safetensors") == 2
    gda.convert(llama, tmp_path / "directly", verify=False)
    for name, tensor in tensors_of(tmp_path / "directly").items():
        assert torch.equal(tensors_of(tmp_path / "gda")[name], tensor), name


def test_stopped_download_is_resumed_by_the_next_run(
    tmp_path: Path, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    put(hub, "some-one/llama", save_llama(tmp_path / "llama"))
    hub.faults += [Fault(r"GET .*/model\.safetensors", cut_after=cut) for cut in (5000, *[0] * 9)]
    error = refused(command, "convert", "some-one/llama", tmp_path / "gda")
    assert "some-one/llama" in error
    hub.faults.clear()
    assert command("convert", "some-one/llama", tmp_path / "gda").code == 0


def test_download_with_a_wrong_hash_is_refused(tmp_path: Path, hub: Hub, command: Command) -> None:
    """One flipped bit: no model, and the message names the file to remove."""
    put(hub, "some-one/llama", save_llama(tmp_path / "llama"))
    hub.faults.append(Fault(r"GET .*/model\.safetensors", damage=-1))
    error = refused(command, "convert", "some-one/llama", tmp_path / "gda", "--no-verify")
    assert "SHA-256" in error
    assert not (tmp_path / "gda").exists()
    damaged = error.split("remove ")[1].strip()
    assert HF_HOME.name in damaged
    Path(damaged).unlink()
    assert command("convert", "some-one/llama", tmp_path / "gda").code == 0


def test_damaged_download_is_not_exported_as_gguf(tmp_path: Path, hub: Hub, command: Command) -> None:
    """Verification compares with the same damaged source."""
    pytest.importorskip("gguf")
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", verify=False)
    put(hub, "some-one/gda", tmp_path / "gda")
    hub.faults.append(Fault(r"GET .*/model\.safetensors", damage=-1))
    out = tmp_path / "out.gguf"
    assert "SHA-256" in refused(command, "export", "some-one/gda", out, "--format", "gguf", "--no-verify")
    assert not out.exists()


def test_missing_revision(tmp_path: Path, hub: Hub, command: Command) -> None:
    put(hub, "some-one/llama", save_llama(tmp_path / "llama"))
    error = refused(command, "convert", "some-one/llama", tmp_path / "gda", "--revision", "v9")
    assert "some-one/llama@v9" in error
    tiny_model().push_to_hub("me/tiny")
    with pytest.raises(OSError, match="v9"):
        AutoModelForCausalLM.from_pretrained("me/tiny", revision="v9")


def test_missing_repository(tmp_path: Path, hub: Hub, command: Command) -> None:
    """It may be private, so the message says how to log in."""
    error = refused(command, "convert", "some-one/nothing", tmp_path / "gda")
    assert "some-one/nothing is not on the Hub" in error
    assert "hf auth login" in error


def test_mistyped_folder(tmp_path: Path, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path such as models/llama may be a Hub id as well, so the message names both, online and offline."""
    monkeypatch.chdir(tmp_path)
    error = refused(command, "convert", "models/llama", tmp_path / "gda")
    assert "there is no folder models/llama here, and models/llama is not on the Hub" in error
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = refused(command, "convert", "models/llama", tmp_path / "gda")
    assert "there is no folder models/llama here, and " in error
    assert "HF_HUB_OFFLINE" in error


def test_cache_without_card_and_licence(
    folder: Path, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers fills it; offline, what is missing is logged, unless the model needs it."""
    (folder / "LICENSE").write_text("free")
    assert command("push", folder, "me/x").code == 0
    huggingface_hub.snapshot_download("me/x", ignore_patterns=["README.md", "LICENSE", "conversion.json"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert command("inspect", "me/x").code == 0
    assert "3 file(s) are missing" in caplog.text
    (shard, *_) = Path(huggingface_hub.snapshot_download("me/x", allow_patterns="config.json")).glob("*.safetensors")
    shard.unlink()
    assert "me/x is not cached and could not be downloaded" in refused(command, "inspect", "me/x")


def test_private_repository_without_a_token(
    folder: Path, tmp_path: Path, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like a missing repository; with a token, it is downloaded."""
    assert command("push", folder, "me/x", "--private").code == 0
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(command, "inspect", "me/x")
    monkeypatch.undo()


def test_unreachable_hub(folder: Path, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line and no traceback."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    error = refused(command, "push", folder, "me/x")
    assert "connection" in error.lower()
    assert "run the same command again" in error


@pytest.mark.parametrize(
    "what",
    ["nothing", "a llama", "a shard is missing", "a file", "an adapter", "a classifier", "a broken conversion.json"],
)
def test_incomplete_model_is_not_pushed(what: str, folder: Path, tmp_path: Path, hub: Hub, command: Command) -> None:
    """It is refused before any request."""
    place = {"nothing": tmp_path / "none", "a llama": tmp_path / "llama", "a file": folder / "config.json"}
    if what == "a shard is missing":
        next(folder.glob("*.safetensors")).unlink()
    elif what == "an adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif what == "a classifier":
        gda.GDAForSequenceClassification(tiny_config()).save_pretrained(folder)
    elif what == "a broken conversion.json":
        (folder / "conversion.json").write_text("[]")
    error = refused(command, "push", place.get(what, folder), "me/x")
    assert ("conversion.json" if "broken" in what else str(place.get(what, folder))) in error
    assert hub.log == []
