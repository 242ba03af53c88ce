"""Everything that a command writes is synced to disk before it is renamed into place."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gda
from gda.common.files import sync, write_text
from gda.training.runs.checkpoints import CHECKPOINT_FILE, mark_complete

from ..support.commands import Command, assert_refused
from ..support.llamas import save_llama
from ..support.splitting import save_text

pytestmark = pytest.mark.slow


class Disk:
    """Records calls to the file system in order: ("sync", inode, size, change time), ("rename", from, to)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._synced)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._renamed(getattr(os, name)))

    def _synced(self, descriptor: int) -> None:
        self._fsync(descriptor)
        self.calls.append(("sync", *state(os.fstat(descriptor))))

    def _renamed(self, rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: Any, target: Any, **options: Any) -> None:
            rename(source, target, **options)
            self.calls.append(("rename", Path(source).name, Path(target).name))

        return renamed

    def place_of(self, call: tuple[Any, ...]) -> int:
        """Index of the last such call."""
        return max(number for number, made in enumerate(self.calls) if made == call)


def state(status: os.stat_result) -> tuple[int, int, int]:
    """Type and change time of a file; for a folder, only its type."""
    if stat.S_ISDIR(status.st_mode):
        return status.st_ino, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A Llama in shards, GDA models with dense and factored projections, and a text."""
    save_llama(tmp_path / "llama", max_shard_size="20KB")
    gda.convert(tmp_path / "llama", tmp_path / "gda", verify=False, max_shard_size="20KB")
    gda.convert(tmp_path / "llama", tmp_path / "factored", verify=False, qk_rank=2)
    save_text(tmp_path / "text.txt", 3000)
    return tmp_path


TRAINED: dict[str, Any] = {"steps": 2, "batch_size": 1, "context": 16, "save_every": 1}
MAKERS: dict[str, Callable[[Path, Path], object]] = {
    "convert": lambda sources, out: gda.convert(sources / "llama", out, verify=False, max_shard_size="20KB"),
    "grow": lambda sources, out: gda.grow(sources / "gda", out, signal=2, verify=False),
    "fold": lambda sources, out: gda.fold(sources / "factored", out, verify=False),
    "export": lambda sources, out: gda.export(sources / "gda", out, format="llama"),
    "train": lambda sources, out: gda.train(sources / "gda", out, data=sources / "text.txt", **TRAINED),
}


@pytest.mark.parametrize("name", MAKERS)
def test_out_is_synced_before_it_is_renamed(name: str, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder. The names of OUT and of its created parents are synced afterwards."""
    out = sources / "made" / "deep" / "out"
    disk = Disk(monkeypatch)
    MAKERS[name](sources, out)
    renamed = disk.place_of(("rename", ".out.partial", "out"))
    held = [out, *out.rglob("*")]
    assert len(held) > 3
    for path in held:
        assert disk.calls.index(("sync", *state(path.stat()))) < renamed, path
    for parent in (out.parent, out.parent.parent, sources):
        assert disk.place_of(("sync", *state(parent.stat()))) > renamed, parent


def test_file_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    write_text(tmp_path / "file", "text")
    file, folder = state((tmp_path / "file").stat()), state(tmp_path.stat())
    assert disk.calls == [("sync", *file), ("rename", ".file.tmp", "file"), ("sync", *folder)]


def test_checkpoint_is_synced_before_it_is_marked_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "inner").mkdir(parents=True)
    for file in (checkpoint / "a", checkpoint / "inner" / "b"):
        file.write_text("text")
    disk = Disk(monkeypatch)
    mark_complete(checkpoint, {})
    marked = disk.place_of(("rename", f".{CHECKPOINT_FILE}.tmp", CHECKPOINT_FILE))
    for path in (checkpoint, checkpoint / "a", checkpoint / "inner", checkpoint / "inner" / "b"):
        assert disk.calls.index(("sync", *state(path.stat()))) < marked, path
    assert disk.place_of(("sync", *state(tmp_path.stat()))) > marked


@pytest.mark.parametrize("moment", [1, 5, 12])
def test_failed_sync_is_reported(moment: int, sources: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2, one line that names the file, and no OUT."""
    real, left = os.fsync, moment

    def fails(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    outcome = command("convert", sources / "llama", sources / "out", "--no-verify")
    assert left <= 0
    assert_refused(outcome, "Input/output error", ".out.partial")
    assert not (sources / "out").exists()


def test_file_system_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EINVAL is ignored for a folder and is an error for a file."""

    def refuses(_: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", refuses)
    sync(tmp_path)
    with pytest.raises(OSError, match="file"):
        sync(tmp_path / "file")
