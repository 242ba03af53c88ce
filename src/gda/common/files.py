"""Writing files and folders atomically: they appear complete or not at all, even after a power failure."""

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
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from gda.common.errors import errors_naming

T = TypeVar("T")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp_of(file: int | Path) -> tuple[int, int]:
    """Size and modification time of a file, given by path or descriptor."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def stamps(files: list[Path]) -> list[list[Any]]:
    """Name, size and modification time of each file, which a resumed run requires unchanged."""
    return [[file.name, *stamp_of(file)] for file in files]


def in_background(function: Callable[[], T]) -> "Future[T]":
    """Call `function` in a daemon thread, which does not keep an interrupted process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised by `Future.result`
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@contextlib.contextmanager
def written_beside(path: Path, *, alone: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file for writing; rename it to `path` when the block ends, or remove it if the block fails.

    Its bytes are on disk before it is renamed, and its name is on disk when the block has ended. With `alone`, a second
    process that writes the same file gets a BlockingIOError.
    """
    beside = path.with_name(f".{path.name}.tmp")
    opener = partial(_open_alone, out=path) if alone else _open_no_link
    with errors_naming(path), open(beside, "wb", opener=opener) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, path)
            sync(path.parent)
        except BaseException:
            beside.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # which would replace this error, since closing writes again
                file.close()
            raise


@contextlib.contextmanager
def created_parents(path: Path) -> Iterator[None]:
    """Create missing parents of `path`, and remove them again if the block fails."""
    created = _missing_parents(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        _remove_empty(created)
        raise


def _missing_parents(path: Path) -> list[Path]:
    return [parent for parent in path.parents if not parent.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _open_no_link(path: str, flags: int) -> int:
    """Don't follow a link that someone else put there: its target would be overwritten."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _open_alone(path: str, flags: int, *, out: Path) -> int:
    """Lock the file before it is emptied."""
    while True:
        descriptor = _open_no_link(path, flags & ~os.O_TRUNC)
        if _locked(descriptor, path, out):
            os.truncate(descriptor, 0)
            return descriptor


def _locked(descriptor: int, path: str | Path, out: Path) -> bool:
    """Lock an open file or folder, which becomes OUT. Close it and return False if another process has renamed it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise BlockingIOError(f"another process is writing {out}; wait for it to end") from None
        raise OSError(f"{out}: its file system can't lock it ({error.strerror}); choose another place") from None
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return True
    os.close(descriptor)
    return False


def sync(path: Path) -> None:
    """Write the bytes of a file, or the names in a folder, to disk. An OSError names it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP):
            return  # the file system can sync files only
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` a folder and everything in it."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (file := Path(place, name)).is_symlink():
                sync(file)
        sync(Path(place))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically. Half a surrogate pair, as JSON can have it, becomes an escape sequence."""
    with written_beside(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; ValueError naming the file if it is not valid."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def partial_of(out: Path) -> Path:
    """The folder that is renamed to `out` when it is complete."""
    return out.with_name(f".{out.name}.partial")


def obstacle(out: Path, *, resume: bool, overwrite: bool, foreign: tuple[str, str]) -> str | None:
    """What keeps a run from writing OUT: unfinished work, or None. The arguments are those of `StagedFolder`."""
    folder = partial_of(out)
    if overwrite:
        return None
    file, command = foreign
    if (folder / file).exists():
        return f"{out} was begun by {command}, which did not finish; continue that, or pass --overwrite to discard it"
    if resume or not folder.is_dir() or not any(folder.iterdir()):
        return None
    return f"{out} was begun by a run that did not finish; pass --resume to continue it, or --overwrite to start over"


class StagedFolder:
    """A folder that is filled under a temporary name and renamed when it is complete.

    `folder` is ``.OUT.partial`` beside OUT. `finish` syncs its contents to disk and renames it to OUT; `discard`
    removes it and the parents created for it. If the process is killed, the folder stays, and another can resume it.
    While it is open, a second process is refused.

    Args:
        out: The final place. Missing parents are created.
        overwrite: Whether `finish` may replace an existing OUT.
        resume: Whether to keep what a killed process left in the folder. Otherwise this is refused, or with `overwrite`
            removed.
        foreign: The file that marks another command's unfinished work, and the command. Such work is not continued,
            and only discarded if `overwrite` is set.

    Raises:
        FileExistsError: if `out`, or work that could be resumed, exists and may not be replaced, or if the folder is a
            link.
        BlockingIOError: if another process is filling the folder.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, resume: bool = False, foreign: tuple[str, str]):
        refuse_existing(out, overwrite)
        self.out = out
        self._overwrite = overwrite
        self.folder = partial_of(out)
        self._created_parents = _missing_parents(self.folder)
        try:
            self._lock: int | None = self._make_and_lock()
        except OSError:
            _remove_empty(self._created_parents)
            raise
        try:
            if (message := obstacle(out, resume=resume, overwrite=overwrite, foreign=foreign)) is not None:
                raise FileExistsError(message)
            for each in [] if resume else list(self.folder.iterdir()):
                remove(each)
        except BaseException:
            self.keep()
            raise

    def _make_and_lock(self) -> int:
        """Lock the folder itself: the lock moves with it, and needs no file in it."""
        while True:
            if self.folder.is_symlink():
                raise FileExistsError(f"{self.folder} is a link, but must be a folder; remove it")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise type(error)(
                    f"{self.out} cannot be created: {error.strerror}; choose a path that you can write to"
                ) from None
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            if _locked(descriptor, self.folder, self.out):
                return descriptor

    def finish(self, *, without: str | None = None) -> None:
        """Sync the folder to disk, remove the file `without` from it, and rename it to OUT.

        Raises:
            FileExistsError: if OUT has appeared meanwhile and may not be replaced.
            OSError: naming a file that cannot be written to disk.
        """
        sync_tree(self.folder)
        refuse_existing(self.out, self._overwrite)
        if without is not None:
            (self.folder / without).unlink()
            sync(self.folder)
        replaced = self.out.with_name(f".{self.out.name}.replaced")
        if os.path.lexists(self.out):
            remove(replaced)  # left by a process that was killed between the two renames below
            os.rename(self.out, replaced)
        try:
            os.rename(self.folder, self.out)
        except BaseException:
            if replaced.exists():
                os.rename(replaced, self.out)
            raise
        self._unlock()
        for holder in dict.fromkeys((self.out.parent, *(made.parent for made in self._created_parents))):
            sync(holder)
        with contextlib.suppress(OSError):  # the new folder is in place, whether or not the old one can be removed
            remove(replaced)

    def keep(self) -> None:
        """Keep the folder for a later process to resume. Nothing happens once it is OUT."""
        self._unlock()

    def discard(self) -> None:
        """Remove the folder and the parents created for it. Nothing happens once it is OUT."""
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._unlock()
            _remove_empty(self._created_parents)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None


class NoSpaceError(OSError):
    """The disk has too little room for what is to be written."""


def require_space(folder: Path, nbytes: int, *, reusable: int = 0, what: str = "the result") -> None:
    """Raise NoSpaceError unless the disk of a folder has room for the `nbytes` of `what`; `reusable` are there."""
    if (free := shutil.disk_usage(folder).free + reusable) < nbytes:
        raise NoSpaceError(f"{folder} has {free / 1e9:.1f} GB free, but {what} needs {nbytes / 1e9:.1f} GB; make room")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_overlap(source: str | Path, out: str | Path, what: str = "the source") -> None:
    """Raise ValueError if OUT is empty, or if OUT and `source` contain one another; the message names it `what`."""
    if not str(out):
        raise ValueError("OUT is empty; name a folder to create")
    if not str(source) or not Path(source).exists():
        return  # perhaps a Hub id
    read, written = Path(source).resolve(), Path(out).resolve()
    if _is_within(written, read) or _is_within(read, written):
        raise ValueError(f"{out} is {what}, is inside it or contains it; choose another folder")


def _is_within(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or below it, also where two spellings name one folder, as on macOS."""
    return folder.exists() and any(each.exists() and each.samefile(folder) for each in (path, *path.parents))


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and below it, in order; also behind links to folders, each of which is read once."""
    files: list[Path] = []
    read: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in read:
            folders.clear()
            continue
        read.add(real)
        folders.sort()
        files += [file for file in (Path(place) / name for name in names) if file.is_file()]
    return sorted(files)


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise FileExistsError if `out` exists and may not be replaced."""
    if os.path.lexists(out) and not overwrite:
        raise FileExistsError(f"{out} already exists; choose another path or pass --overwrite")
    if out.is_dir() and Path.cwd().is_relative_to(out.resolve()):
        raise FileExistsError(f"{out} is the working folder or contains it, and is not replaced; choose another path")
