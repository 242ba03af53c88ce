"""Files that appear whole or not at all, also after a power failure. A leaf: it imports nothing of the project."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_background(function: Callable[[], T]) -> "Future[T]":
    """Call `function` in a thread of its own, which does not keep an interrupted process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` for writing; rename it to `path` when the block ends, remove it if it fails.

    Its bytes are on the disk before it is renamed, and its name is when this returns.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb", opener=_open_no_link) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync(path.parent)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write does not say of what
        beside.unlink(missing_ok=True)
        raise


def _open_no_link(path: str, flags: int) -> int:
    """In a folder that others may write to, a link in that place would have its target overwritten."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync(path: Path) -> None:
    """Return when the bytes of a file, or the names in a folder, are on the disk.

    Raises:
        OSError: naming it, if they cannot be put there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP):
            return  # a file system that has this for files alone
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` for all files and folders in a folder, and for itself."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (file := Path(place, name)).is_symlink():
                sync(file)
        sync(Path(place))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with written_beside(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: naming the file, if it holds no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def partial_of(out: Path) -> Path:
    """The folder that is renamed to `out` when it is whole."""
    return out.with_name(f".{out.name}.partial")


class StagedFolder:
    """A folder that is filled beside its place and renamed into it, so that the place is empty or whole.

    `folder` is ``.OUT.partial`` beside OUT. `finish` puts all that it holds on the disk and renames it to OUT, so that
    this is true after a power failure as well; `discard` removes it and the parents made for it. A killed process
    leaves it behind, for another to go on from. While it is open, a second process is refused.

    Args:
        out: The place. Its missing parents are made.
        overwrite: Whether `finish` may replace what is there.
        resume: Whether to keep what a killed process left in the folder, instead of starting afresh.

    Raises:
        FileExistsError: if `out` exists and may not be replaced, or if the folder is a link, whose target would be
            emptied.
        BlockingIOError: if another process is filling the folder.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, resume: bool = False):
        refuse_existing(out, overwrite)
        self.out = out
        self._overwrite = overwrite
        self.folder = partial_of(out)
        self._made_parents = [parent for parent in self.folder.parents if not parent.exists()]
        try:
            self._lock = self._make_and_lock()
        except OSError:
            self._remove_made_parents()
            raise
        if not resume:
            for left_over in self.folder.iterdir():
                remove(left_over)

    def _make_and_lock(self) -> int:
        """Lock the folder itself: the lock goes with it to its place, and leaves no file there."""
        while True:
            if self.folder.is_symlink():
                raise FileExistsError(f"{self.folder} is a link, and it should be a folder of our own; remove it")
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise BlockingIOError(f"another process is writing {self.out}; wait for it to end") from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self.folder)):
                    return descriptor
            os.close(descriptor)  # another process finished between the opening and the lock: this is its OUT now

    def finish(self) -> None:
        """Put what the folder holds on the disk, and rename the folder to its place.

        Raises:
            FileExistsError: if something has appeared there meanwhile, and may not be replaced.
            OSError: naming a file that cannot be put on the disk.
        """
        sync_tree(self.folder)
        refuse_existing(self.out, self._overwrite)
        replaced = self.out.with_name(f".{self.out.name}.replaced")
        if os.path.lexists(self.out):
            remove(replaced)  # left by a process that was killed just below
            os.rename(self.out, replaced)
        try:
            os.rename(self.folder, self.out)
        except BaseException:
            if replaced.exists():
                os.rename(replaced, self.out)
            raise
        for holder in dict.fromkeys((self.out.parent, *(made.parent for made in self._made_parents))):
            sync(holder)
        os.close(self._lock)
        with contextlib.suppress(OSError):  # the new folder is in place; an old one that resists does not undo that
            remove(replaced)

    def keep(self) -> None:
        """Leave the folder for a later process to resume."""
        os.close(self._lock)

    def discard(self) -> None:
        """Remove the folder, and the parents that were made for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        self._remove_made_parents()

    def _remove_made_parents(self) -> None:
        for parent in self._made_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all it holds; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_places(source: str | Path, out: str | Path) -> None:
    """Refuse an OUT whose making would harm its source.

    Raises:
        ValueError: if either is empty, or one lies in the other.
    """
    for name, place in (("SOURCE", source), ("OUT", out)):
        if not str(place):
            raise ValueError(f"{name} is empty; name a folder")
    if not Path(source).exists():
        return  # perhaps a Hub id
    read, written = Path(source).resolve(), Path(out).resolve()
    if written.is_relative_to(read) or read.is_relative_to(written):
        raise ValueError(f"{out} is the source, lies in it or holds it; choose another place")


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise FileExistsError if `out` exists and may not be replaced."""
    if os.path.lexists(out) and not overwrite:
        raise FileExistsError(f"{out} exists; choose another place or pass --overwrite")
