"""What SECURITY.md promises and no other test holds."""

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
    """A text, a Llama and a GDA model; not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text(TEXT)
    gda.convert(save_llama(folder / "llama"), folder / "gda", verify=False)
    return folder


# -------------------------------------------------------------------------------------------------------------- tokens

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
def test_a_token_is_never_shown(
    name: str, models: Path, hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A token that the Hub does not take: in no message, nor in any file that is left."""
    monkeypatch.setenv("HF_TOKEN", MARKER)
    monkeypatch.chdir(tmp_path)
    outcome = command(*(str(each).format(models=models) for each in FAILING[name]))
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.error
    assert MARKER not in outcome.out + outcome.error
    assert not [file for file, content in files_of(tmp_path).items() if MARKER.encode() in content]


def test_a_token_is_in_no_file_of_a_model(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor in what conversion and training write of their settings."""
    monkeypatch.setenv("HF_TOKEN", MARKER)
    gda.convert(models / "llama", tmp_path / "gda", verify=False)
    gda.train(tmp_path / "gda", tmp_path / "trained", data=models / "text.txt", **STEPS)
    assert not [file for file, content in files_of(tmp_path).items() if MARKER.encode() in content]


# ------------------------------------------------------------------------------------------------------------- pickles


class Mark:
    """A pickle that makes a folder when it is read."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.fixture
def begun(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run to `tmp_path`/out that was interrupted after its first step: its checkpoint."""
    with monkeypatch.context() as patch:
        saved = CheckpointCallback.on_save

        def interrupt(*arguments: Any, **kwargs: Any) -> None:
            saved(*arguments, **kwargs)
            raise KeyboardInterrupt

        patch.setattr(CheckpointCallback, "on_save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            gda.train(models / "gda", tmp_path / "out", data=models / "text.txt", **STEPS)
    return tmp_path / ".out.partial" / "checkpoint-1"


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_a_checkpoint_cannot_run_code(
    file: str, form: str, begun: Path, models: Path, tmp_path: Path, command: Command
) -> None:
    """What is resumed is read with `weights_only`, or not at all: a pickle in its place leaves no mark."""
    mark = Mark(tmp_path / "mark")
    (begun / file).write_bytes(pickle.dumps(mark)) if form == "pickle" else torch.save(mark, begun / file)
    told = json.loads((begun / CHECKPOINT_FILE).read_text())
    told["files"][file] = (begun / file).stat().st_size  # as one who plants it would
    (begun / CHECKPOINT_FILE).write_text(json.dumps(told))
    options = [each for name, value in STEPS.items() for each in (f"--{name.replace('_', '-')}", value)]
    outcome = command("train", models / "gda", tmp_path / "out", "--data", models / "text.txt", *options, "--resume")
    assert not (tmp_path / "mark").exists()
    if file == "training_args.bin":  # the Trainer writes it and nobody reads it
        assert outcome.code == 0, outcome
        return
    assert outcome.code == 2, outcome
    assert len(outcome.error.splitlines()) == 1, outcome.error
    assert "checkpoint-1" in outcome.error


# ------------------------------------------------------------------------------------------------------ temporary files


def test_scratch_folders_are_private(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rehearsal and a push put aside can be read by nobody else."""
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


def test_what_is_made_has_the_rights_that_the_user_wants(models: Path, tmp_path: Path) -> None:
    """OUT, and what it is made in, follow the umask: with 077 nobody else reads them."""
    before = os.umask(0o077)
    try:
        gda.convert(models / "llama", tmp_path / "gda", verify=False)
    finally:
        os.umask(before)
    for path in (tmp_path / "gda", *(tmp_path / "gda").iterdir()):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


# --------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("options", [(), ("--resume",), ("--overwrite",)], ids=str)
def test_a_link_in_the_place_of_the_work_is_not_followed(
    options: tuple[str, ...], models: Path, tmp_path: Path, command: Command
) -> None:
    """Where others may write, a link laid as `.OUT.partial` would have a folder of ours emptied."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("kept")
    (tmp_path / ".gda.partial").symlink_to(tmp_path / "mine")
    outcome = command("convert", models / "llama", tmp_path / "gda", "--no-verify", *options)
    assert outcome.code == 2
    assert ".gda.partial is a link" in outcome.error
    assert files_of(tmp_path / "mine") == {"letter": b"kept"}
    assert not (tmp_path / "gda").exists()


def test_a_link_beside_a_file_is_not_followed(tmp_path: Path) -> None:
    """Nor one in the place of the file that is renamed into its own."""
    (tmp_path / "mine").write_text("kept")
    (tmp_path / ".report.html.tmp").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="report"):
        _files.write_text(tmp_path / "report.html", "new")
    assert (tmp_path / "mine").read_text() == "kept"


def test_overwriting_a_link_replaces_the_link(models: Path, tmp_path: Path) -> None:
    """`--overwrite` of a link to a folder leaves that folder as it is."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("kept")
    (tmp_path / "gda").symlink_to(tmp_path / "mine")
    gda.convert(models / "llama", tmp_path / "gda", verify=False, overwrite=True)
    assert not (tmp_path / "gda").is_symlink()
    assert files_of(tmp_path / "mine") == {"letter": b"kept"}


# ---------------------------------------------------------------------------------------------------------------- code


def test_nothing_in_the_package_asks_for_remote_code_or_pickles() -> None:
    """`trust_remote_code` is False wherever it is passed, and nothing of ours reads a pickle or starts a shell."""
    forbidden = {"pickle.load", "pickle.loads", "torch.load", "yaml.load", "eval", "exec", "os.system", "os.popen"}
    root = Path(__file__).parents[2]
    for folder in ("src/gda", "configuration", "modeling_gda", "conversion", "training", "eval"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    assert ast.unparse(node.func) not in forbidden, f"{path}, line {node.lineno}"
                elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    assert ast.unparse(node.value) == "False", f"{path}, line {node.value.lineno}"


def test_a_pickle_named_as_weights_is_no_weights(models: Path, tmp_path: Path, command: Command) -> None:
    """A file that is called model.safetensors and is a pickle: refused by its header, and not run."""
    source = Path(shutil.copytree(models / "llama", tmp_path / "llama"))
    (source / "model.safetensors").write_bytes(pickle.dumps(Mark(tmp_path / "mark")))
    outcome = command("convert", source, tmp_path / "gda")
    assert outcome.code == 2
    assert "model.safetensors is damaged" in outcome.error
    assert sorted(os.listdir(tmp_path)) == ["llama"]
