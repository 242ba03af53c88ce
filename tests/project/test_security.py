"""Promises of SECURITY.md that no other test checks."""

import ast
import json
import os
import pickle
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import gda
from gda.common import files as _files
from gda.training.callbacks.checkpoints import CheckpointCallback
from gda.training.runs.checkpoints import CHECKPOINT_FILE

from ..fuzz.targets import STEPS, TEXT
from ..support.commands import Command
from ..support.hub_server import Hub
from ..support.llamas import files_of, save_llama

MARKER = "hf_" + "MaRkEr0123456789" * 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a Llama and a GDA model. Tests must not change it."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text(TEXT)
    gda.convert(save_llama(folder / "llama"), folder / "gda", verify=False)
    return folder


# --------------------------------------------------------------------------------------------------------------- tokens

FAILING: dict[str, tuple[object, ...]] = {
    "convert": ("convert", "me/none", "out"),
    "convert of what is no model": ("convert", "{models}", "out"),
    "convert and push": ("convert", "{models}/llama", "out", "--no-verify", "--push-to-hub", "me/pushed"),
    "verify": ("verify", "me/none", "{models}/gda"),
    "inspect": ("inspect", "me/none", "--revision", "v2"),
    "export": ("export", "me/none", "out"),
    "grow": ("grow", "me/none", "out", "--signal", "2"),
    "fold": ("fold", "me/none", "out"),
    "push": ("push", "{models}/gda", "me/pushed"),
    "train": ("train", "{models}/gda", "out", "--data", "me/none"),
    "train and push": ("train", "{models}/gda", "out", "--data", "{models}/text.txt", "--push-to-hub", "me/pushed"),
    "eval": ("eval", "me/none", "--tasks", "perplexity"),
    "attention": ("attention", "me/none", "--text", "a", "--out", "a.html"),
}


@pytest.mark.parametrize("name", FAILING)
def test_token_is_never_shown(
    name: str, models: Path, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An invalid token is in no message and in no file."""
    monkeypatch.setenv("HF_TOKEN", MARKER)
    monkeypatch.chdir(tmp_path)
    outcome = command(*(str(each).format(models=models) for each in FAILING[name]))
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.error
    assert MARKER not in outcome.out + outcome.error
    assert not [file for file, content in files_of(tmp_path).items() if MARKER.encode() in content]


def test_token_is_in_no_model_file(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor in the settings that conversion and training record."""
    monkeypatch.setenv("HF_TOKEN", MARKER)
    gda.convert(models / "llama", tmp_path / "gda", verify=False)
    gda.train(tmp_path / "gda", tmp_path / "trained", data=models / "text.txt", **STEPS)
    assert not [file for file, content in files_of(tmp_path).items() if MARKER.encode() in content]


# -------------------------------------------------------------------------------------------------------------- pickles


class Mark:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.fixture
def begun(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a run to `tmp_path`/out that was interrupted after its first step."""
    with monkeypatch.context() as patch:
        saved = CheckpointCallback.on_save

        def interrupt(*arguments: Any, **kwargs: Any) -> None:
            saved(*arguments, **kwargs)
            raise KeyboardInterrupt

        patch.setattr(CheckpointCallback, "on_save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            gda.train(models / "gda", tmp_path / "out", data=models / "text.txt", **STEPS)
    return tmp_path / ".out.partial" / "checkpoint-1"


@pytest.mark.sampled
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_checkpoint_cannot_run_code(
    file: str, form: str, begun: Path, models: Path, tmp_path: Path, command: Command
) -> None:
    """Checkpoints are loaded with `weights_only`: a malicious pickle has no effect."""
    mark = Mark(tmp_path / "mark")
    (begun / file).write_bytes(pickle.dumps(mark)) if form == "pickle" else torch.save(mark, begun / file)
    output = json.loads((begun / CHECKPOINT_FILE).read_text())
    output["files"][file] = (begun / file).stat().st_size  # as an attacker would
    (begun / CHECKPOINT_FILE).write_text(json.dumps(output))
    options = [each for name, value in STEPS.items() for each in (f"--{name.replace('_', '-')}", value)]
    outcome = command("train", models / "gda", tmp_path / "out", "--data", models / "text.txt", *options, "--resume")
    assert not (tmp_path / "mark").exists()
    if file == "training_args.bin":  # the Trainer writes it, and nothing reads it
        assert outcome.code == 0, outcome
        return
    assert outcome.code == 2, outcome
    assert len(outcome.error.splitlines()) == 1, outcome.error
    assert "checkpoint-1" in outcome.error


# ------------------------------------------------------------------------------------------------------ temporary files


def test_scratch_folders_are_private(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary folders of a dry run and of a push."""
    modes: list[int] = []
    made = tempfile.mkdtemp

    def seen(*arguments: Any, **kwargs: Any) -> str:
        folder = made(*arguments, **kwargs)
        modes.append(stat.S_IMODE(os.stat(folder).st_mode))
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", seen)
    gda.push(models / "gda", "me/tiny", dry_run=True)
    gda.train(models / "gda", models / "none", data=models / "text.txt", dry_run=True, **STEPS)
    assert len(modes) >= 2
    assert set(modes) == {0o700}


def test_created_files_follow_the_umask(models: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        gda.convert(models / "llama", tmp_path / "gda", verify=False)
    finally:
        os.umask(before)
    for path in (tmp_path / "gda", *(tmp_path / "gda").iterdir()):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


# ---------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("options", [(), ("--resume",), ("--overwrite",)], ids=str)
def test_link_as_partial_folder_is_not_followed(
    options: tuple[str, ...], models: Path, tmp_path: Path, command: Command
) -> None:
    """In a shared folder, a link named `.OUT.partial` could make us empty another folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("kept")
    (tmp_path / ".gda.partial").symlink_to(tmp_path / "mine")
    outcome = command("convert", models / "llama", tmp_path / "gda", "--no-verify", *options)
    assert outcome.code == 2
    assert ".gda.partial is a link" in outcome.error
    assert files_of(tmp_path / "mine") == {"letter": b"kept"}
    assert not (tmp_path / "gda").exists()


def test_link_as_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    (tmp_path / ".report.html.tmp").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="report"):
        _files.write_text(tmp_path / "report.html", "new")
    assert (tmp_path / "mine").read_text() == "kept"


def test_overwriting_a_link_replaces_the_link(models: Path, tmp_path: Path) -> None:
    """The linked folder does not change."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("kept")
    (tmp_path / "gda").symlink_to(tmp_path / "mine")
    gda.convert(models / "llama", tmp_path / "gda", verify=False, overwrite=True)
    assert not (tmp_path / "gda").is_symlink()
    assert files_of(tmp_path / "mine") == {"letter": b"kept"}


# ----------------------------------------------------------------------------------------------------------------- code


def test_no_remote_code_pickles_or_shells_in_the_source() -> None:
    """`trust_remote_code` is False wherever it is passed."""
    forbidden = {"pickle.load", "pickle.loads", "torch.load", "yaml.load", "eval", "exec", "os.system", "os.popen"}
    root = Path(__file__).parents[2]
    for folder in ("src/gda", "configuration", "modeling_gda", "conversion", "training", "eval"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    assert ast.unparse(node.func) not in forbidden, f"{path}, line {node.lineno}"
                elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    assert ast.unparse(node.value) == "False", f"{path}, line {node.value.lineno}"


def test_pickle_named_as_safetensors_is_refused(models: Path, tmp_path: Path, command: Command) -> None:
    """By its header, without loading it."""
    source = Path(shutil.copytree(models / "llama", tmp_path / "llama"))
    (source / "model.safetensors").write_bytes(pickle.dumps(Mark(tmp_path / "mark")))
    outcome = command("convert", source, tmp_path / "gda")
    assert outcome.code == 2
    assert "model.safetensors is damaged" in outcome.error
    assert sorted(os.listdir(tmp_path)) == ["llama"]
