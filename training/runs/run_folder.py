"""The folder that a training run lives in until it is done: whole checkpoints, torn ones, and what the run was."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gda.common.files import (
    StagedFolder,
    check_places,
    partial_of,
    read_json,
    refuse_existing,
    remove,
    sync,
    sync_tree,
    write_json,
)
from gda.training.settings import TrainSettings, option

# In a checkpoint, written when all else of it is on the disk: a checkpoint without it is torn.
CHECKPOINT_FILE = "checkpoint.json"
# In the folder of a run and in what it makes: the settings, and what came of them.
TRAINING_FILE = "training.json"
LOG_FILE = "training_log.jsonl"
DATA_FOLDER = "data"
NAME = re.compile(r"checkpoint-(\d+)")
# What a model is stored in, by torch's names.
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Identity:
    """What a run that goes on must have in common with the one that was begun.

    Attributes:
        settings: All of them.
        model: Name, size and time of each file of the model.
        teacher: The same of the teacher, if it is here.
        data: The same of local data files.
        processes: How many there are, for they share each batch.
    """

    settings: TrainSettings
    model: list[list[Any]]
    teacher: list[list[Any]]
    data: list[list[Any]]
    processes: int

    def to_dict(self) -> dict[str, Any]:
        """What training.json says of it."""
        return vars(self) | {"settings": self.settings.to_dict()}

    def require(self, begun: Mapping[str, Any], where: Path) -> None:
        """
        Raises:
            ValueError: naming what differs from `begun`.
        """
        remedy = "--overwrite begins anew"
        settings = begun.get("settings")
        if not isinstance(settings, dict):
            raise ValueError(f"{where} does not say what run it is of; {remedy}")
        if (name := self.settings.differing(settings)) is not None:
            raise ValueError(
                f"--resume: the run was begun with {_spelled(name, settings.get(name))}, and not with "
                f"{_spelled(name, getattr(self.settings, name))}; pass the same, or {remedy}"
            )
        if (processes := begun.get("processes")) != self.processes:
            raise ValueError(
                f"--resume: the run was begun by {processes!r:.100} process(es), and this is {self.processes}; "
                f"start as many, or {remedy}"
            )
        if begun.get("report") is not None:
            return  # nothing is read any more
        for kind in ("model", "teacher", "data"):
            known = begun.get(kind)
            if not isinstance(known, list):
                raise ValueError(f"{where} does not say what {kind} the run reads; {remedy}")
            for here, there in zip(getattr(self, kind), known, strict=False):
                if here != there:
                    raise ValueError(f"--resume: {here[0]} of the {kind} has changed since; {remedy}")
            if len(getattr(self, kind)) != len(known):
                raise ValueError(f"--resume: the files of the {kind} are others than they were; {remedy}")


def _spelled(name: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value)) or None
    return f"no {option(name)}" if value in (None, False) else f"{option(name)} {value!s:.100}"


def stamps(files: list[Path]) -> list[list[Any]]:
    """Name, size and time of change of each file."""
    return [[file.name, (held := file.stat()).st_size, held.st_mtime_ns] for file in files]


class RunFolder:
    """``.OUT.partial`` while a run is under way: the Trainer writes its checkpoints there, and OUT is made of it.

    Args:
        out: The place of the result.
        identity: What the run is.
        source: The model that is trained, which may not lie in the folder.
        resume: Go on from the last whole checkpoint, if there is one.
        overwrite: Replace `out`, and a run that was begun and is not to be resumed.

    Attributes:
        path: The folder.
        checkpoint: The checkpoint to go on from; None to begin.
        report: What the run came to, if it had come to its end and only the renaming is left.

    Raises:
        FileExistsError: if `out` exists, or a run that was begun, and neither `resume` nor `overwrite` is given.
        ValueError: if the run to resume is another one.
        BlockingIOError: if another process is at it.
    """

    def __init__(self, out: Path, identity: Identity, source: Path, *, resume: bool, overwrite: bool):
        refuse_existing(out, overwrite)
        self.path = partial_of(out)
        check_places(source, self.path)
        self._staged = StagedFolder(out, overwrite=overwrite, resume=True)
        try:
            self.checkpoint, self.report = self._take_up(out, identity, resume, overwrite)
        except BaseException:
            self.leave()
            raise

    def _take_up(
        self, out: Path, identity: Identity, resume: bool, overwrite: bool
    ) -> tuple[Path | None, dict[str, Any] | None]:
        remove_torn(self.path)
        last, begun = last_checkpoint(self.path), self.path / TRAINING_FILE
        known = read_json(begun) if begun.is_file() else {}
        if not isinstance(known, dict):
            raise ValueError(f"{begun} does not say what run it is of; --overwrite begins anew")
        report = known.get("report")
        if last is None and report is None:
            self._clear()
        elif resume:
            identity.require(known, self.path)
        elif overwrite:
            self._clear()
            last = report = None
        else:
            raise FileExistsError(_held(self.path, last))
        if report is None:
            write_json(begun, identity.to_dict())
        return last, report

    def _clear(self) -> None:
        for left_over in self.path.iterdir():
            remove(left_over)

    def finish(self, made: Mapping[str, Any], report: dict[str, Any]) -> None:
        """Keep what is no part of a run under way, with `made` and the report beside it, and rename it to OUT.

        From the moment that the report is written the result is whole: killed later, a run that resumes only tidies up.
        """
        if self.report is None:
            sync_tree(self.path)  # the report says that the model is there
            write_json(self.path / TRAINING_FILE, read_json(self.path / TRAINING_FILE) | {"report": report} | made)
        for checkpoint in checkpoints(self.path, whole=False):
            remove(checkpoint)
        remove(self.path / DATA_FOLDER)
        self._staged.finish()

    def leave(self) -> Path | None:
        """Let go of the folder: keep it if there is something to go on from, and return the last whole checkpoint."""
        remove_torn(self.path)
        last = last_checkpoint(self.path)
        if last is None and "report" not in _read(self.path / TRAINING_FILE):
            self._staged.discard()
        else:
            self._staged.keep()
        return last


def begun_run(out: Path) -> str | None:
    """What is to be said of a run into `out` that was begun and did not end; None if there is none."""
    folder = partial_of(out)
    last = last_checkpoint(folder) if folder.is_dir() else None
    ended = _read(folder / TRAINING_FILE).get("report") is not None
    return _held(folder, last) if ended or last is not None else None


def _held(folder: Path, last: Path | None) -> str:
    held = "the whole of a run" if last is None else f"step {step_of(last)} of a run"
    return f"{folder} holds {held} that did not end; --resume goes on with it, --overwrite begins anew"


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError):
        return {}


def checkpoints(folder: Path, *, whole: bool = True) -> list[Path]:
    """The checkpoints in `folder`, the oldest first: whole ones, or all."""
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted((path for path in found if not whole or is_whole(path)), key=step_of)


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole one, if there is one."""
    found = checkpoints(folder)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """The optimizer step that it was made after."""
    return int(checkpoint.name.rpartition("-")[2])


def mark_whole(checkpoint: Path, dtypes: Mapping[str, str]) -> None:
    """Write `checkpoint`/checkpoint.json: its files are on the disk, and have these sizes.

    Args:
        checkpoint: The folder, with all that belongs in it.
        dtypes: By parameter, the dtype that the model had before it was trained in float32.
    """
    sync_tree(checkpoint)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_json(checkpoint / CHECKPOINT_FILE, {"files": sizes, "dtypes": dict(dtypes)})
    sync(checkpoint.parent)


def is_whole(checkpoint: Path) -> bool:
    """Whether all of its files are there, as long as they were when it was finished."""
    sizes = _read(checkpoint / CHECKPOINT_FILE).get("files")
    if not isinstance(sizes, dict):
        return False
    return all((file := checkpoint / name).is_file() and file.stat().st_size == size for name, size in sizes.items())


def dtypes_before(folder: Path) -> dict[str, str] | None:
    """By parameter, the dtype before training, if `folder` is a checkpoint of ours.

    Raises:
        ValueError: naming the file, if one is no dtype that a model is stored in.
    """
    dtypes = _read(folder / CHECKPOINT_FILE).get("dtypes")
    if not isinstance(dtypes, dict):
        return None
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise ValueError(f"{folder / CHECKPOINT_FILE}: {name} was {dtype!r:.100}, none of {', '.join(DTYPES)}")
    return dtypes


def remove_torn(folder: Path) -> None:
    """Remove checkpoints that were not finished: they take room, and nothing may go on from them."""
    for checkpoint in checkpoints(folder, whole=False):
        if not is_whole(checkpoint):
            remove(checkpoint)


def keep_last(folder: Path, number: int) -> None:
    """Remove all whole checkpoints but the last `number`; first what calls them whole."""
    for checkpoint in checkpoints(folder)[:-number]:
        (checkpoint / CHECKPOINT_FILE).unlink()
        remove(checkpoint)
