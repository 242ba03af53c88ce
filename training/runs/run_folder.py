"""The folder of a training run until it is finished, and what identifies the run."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import index
from pathlib import Path
from typing import Any

from gda.common.files import (
    StagedFolder,
    obstacle,
    partial_of,
    read_json,
    refuse_overlap,
    remove,
    sync_tree,
    write_json,
)
from gda.common.options import flag
from gda.conversion.sources.source import TRAINING_FILE
from gda.conversion.writing.stream import MANIFEST_FILE
from gda.training.report import TrainReport
from gda.training.runs.checkpoints import checkpoints, last_checkpoint, read_or_empty, remove_incomplete, step_of
from gda.training.settings import TrainSettings

LOG_FILE = "training_log.jsonl"
DATA_FOLDER = "data"
NEW_DATA = "data.new"  # of a run that is to replace other work, which it leaves in place until it begins
REMOVED = "removed"
OF_CONVERSIONS = (MANIFEST_FILE, "a conversion")  # in the folder of an unfinished one
START_ANEW = "start over with --overwrite"
# What a resumed run must have in common with the interrupted one, besides settings and files, and the remedies.
STEP = "the number of sequences per step (--batch-size × --accumulation × processes)"
SHARDING, PRECISION = "the launcher's sharding", "the choice of --precision auto"
COMMIT = "the commit of the model"
REMEDIES = {
    STEP: "choose the same product",
    SHARDING: "launch it the same way",
    PRECISION: "launch it the same way",
    COMMIT: "pass the former as --revision of the same model",
}
WORTH_KEEPING = 60  # seconds of tokenizing whose result a failed run leaves for the next one


@dataclass(frozen=True)
class RunIdentity:
    """What a resumed run must have in common with the one that was interrupted, as training.json stores it."""

    settings: TrainSettings
    commit: str | None  # of a model on the Hub, since its cache may be another one when the run is resumed
    model: list[list[Any]]  # `stamps` of its files, if local; likewise for the teacher and the data
    teacher: list[list[Any]]
    data: list[list[Any]]
    processes: int  # they share each batch
    keeper: str  # of the optimizer, see `Processes.keeper`
    auto_precision: str | None  # what `--precision auto` computes in, if it was given

    def require_same(self, begun: Mapping[str, Any], folder: Path) -> None:
        """Raise ValueError, naming the first difference, unless training.json in `folder` has the same identity."""
        try:
            difference = _difference(begun, json.loads(json.dumps(asdict(self))))
        except (AttributeError, LookupError, TypeError, ValueError):
            raise ValueError(f"{folder / TRAINING_FILE} does not describe a run; {START_ANEW}") from None
        if difference is not None:
            raise ValueError(f"--resume: {difference}, or {START_ANEW}")


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first difference of two identities, as training.json stores them, and its remedy; None if there is none."""
    is_trained = before.get("report") is not None  # then nothing is read any more
    old, new = (_facts(each, is_trained=is_trained) for each in (before, now))
    for name in old | new:
        was, is_now = old.get(name), new.get(name)
        if was != is_now:
            remedy = REMEDIES.get(name, "pass the same value")
            return f"{name:.100} was {_shown(was)}, and is now {_shown(is_now)}; {remedy}"
    for kind in () if is_trained else ("model", "teacher", "data"):
        known, here = before[kind], now[kind]
        if known != here:
            differing = [each for each in (*here, *known) if each not in known or each not in here] or here
            return f"{differing[0][0]} of the {kind} was added, removed or changed since; undo that"
    return None


def _facts(identity: Mapping[str, Any], *, is_trained: bool) -> dict[str, Any]:
    """By name, what must be the same in a resumed run, besides files."""
    settings = {**identity["settings"]}
    # Which process reads which sequences of a step makes no difference.
    step = [settings.pop("batch_size"), settings.pop("accumulation"), identity["processes"]]
    facts = {
        STEP: math.prod(map(index, step)),
        SHARDING: identity["keeper"],
        **{flag(name): value for name, value in settings.items()},
    }
    return facts if is_trained else facts | {PRECISION: identity["auto_precision"], COMMIT: identity["commit"]}


def _shown(value: Any) -> str:
    """A value in a message: of a long one its end, in which paths differ."""
    if isinstance(value, list):
        value = ", ".join(map(str, value)) or None
    text = "not given" if value is None or value is False else str(value)
    return text if len(text) <= 200 else f"…{text[-200:]}"


@dataclass(frozen=True)
class RunState:
    """The state of a run when it is started, known to all processes."""

    path: Path  # the folder of the run
    data: Path  # the folder of tokenized data in it
    checkpoint: Path | None  # to continue from
    report: dict[str, Any] | None  # of a run that was trained, but not yet renamed to OUT


class RunFolder:
    """``.OUT.partial`` during a run: the Trainer writes its checkpoints there, and it becomes OUT in the end.

    With `resume`, the run continues from the last complete checkpoint, if there is one. With `overwrite`, `out` is
    replaced, and so is an unfinished run that is not resumed. The folder may not contain `source`, the model.

    Raises:
        FileExistsError: if `out` exists and `overwrite` is not given, or if an unfinished run exists and neither
            `resume` nor `overwrite` is given.
        ValueError: if the run to resume is another one.
        BlockingIOError: if another process is writing the folder.
    """

    def __init__(self, out: Path, identity: RunIdentity, source: Path, *, resume: bool, overwrite: bool):
        self.path, self._identity = partial_of(out), identity
        refuse_overlap(source, self.path)
        self._staged = StagedFolder(out, overwrite=overwrite, resume=True, foreign=OF_CONVERSIONS)
        self.replaces = False  # whether there is other work, which `begin` removes
        try:
            self.state = self._open(resume, overwrite)
        except BaseException:
            self.close()
            raise

    def _open(self, resume: bool, overwrite: bool) -> RunState:
        remove_incomplete(self.path)
        last, begun, data = last_checkpoint(self.path), self.path / TRAINING_FILE, self.path / DATA_FOLDER
        starts_over = overwrite and not resume
        known = read_json(begun) if begun.is_file() and not starts_over else read_or_empty(begun)
        if not isinstance(known, dict):
            raise ValueError(f"{begun} does not describe a run; {START_ANEW}")
        report = known.get("report")
        is_unfinished = last is not None or report is not None
        is_foreign = (self.path / OF_CONVERSIONS[0]).exists()
        self.replaces = is_foreign or (starts_over and is_unfinished)
        if self.replaces:
            if data.is_dir() and not (self.path / NEW_DATA).is_dir():  # it may be the same data
                with contextlib.suppress(OSError):  # without hard links, it is tokenized again
                    shutil.copytree(data, self.path / NEW_DATA, copy_function=os.link)
            return RunState(self.path, self.path / NEW_DATA, None, None)
        if not is_unfinished:
            for path in self.path.iterdir():
                if path != data:
                    remove(path)
        elif resume:
            self._identity.require_same(known, self.path)
        else:
            raise FileExistsError(_unfinished(self.path, last))
        if report is None:
            self._describe()
        return RunState(self.path, data, last, report)

    def begin(self) -> None:
        """Remove other work that this run replaces. Until then, an error or a kill leaves it as it is."""
        if not self.replaces:
            return
        removed = self.path / REMOVED
        removed.mkdir(exist_ok=True)
        # The description first: what a kill leaves can't be taken for a run.
        for path in sorted(self.path.iterdir(), key=lambda path: path.name != TRAINING_FILE):
            if path.name not in (NEW_DATA, REMOVED):
                path.rename(removed / path.name)
        self.replaces = False
        if (self.path / NEW_DATA).is_dir():  # files that are open stay so
            (self.path / NEW_DATA).rename(self.path / DATA_FOLDER)
        self._describe()
        remove(removed)

    def _describe(self) -> None:
        for code in self.path.glob("*.py"):  # of a model that a killed process has begun to save
            remove(code)
        write_json(self.path / TRAINING_FILE, asdict(self._identity))

    def finish(self, origin: Mapping[str, Any], report: TrainReport) -> None:
        """Add the report and `origin` to training.json, remove checkpoints and tokenized data, and rename the folder to
        OUT.

        Once the report is written the result is complete: after a kill, a resumed run only cleans up.
        """
        if self.state.report is None:
            sync_tree(self.path)  # the report implies that the model is on the disk
            begun = read_json(self.path / TRAINING_FILE)
            write_json(self.path / TRAINING_FILE, begun | {"report": report.stored()} | origin)
        for checkpoint in checkpoints(self.path, complete=False):
            remove(checkpoint)
        for leftover in (DATA_FOLDER, NEW_DATA, REMOVED):
            remove(self.path / leftover)
        self._staged.finish()

    def close(self) -> Path | None:
        """Close the folder of an unfinished run, keep it if it can be resumed, and return its last checkpoint.

        Other work that it was to replace is kept, and None is returned.
        """
        data = self.path / (NEW_DATA if self.replaces else DATA_FOLDER)
        seconds = max((read_or_empty(index).get("seconds", 0) for index in data.glob("*.json")), default=0)
        if self.replaces:
            if seconds < WORTH_KEEPING:
                shutil.rmtree(data, ignore_errors=True)
            self._staged.keep()
            return None
        remove_incomplete(self.path)
        last = last_checkpoint(self.path)
        is_trained = "report" in read_or_empty(self.path / TRAINING_FILE)
        if last is None and not is_trained and seconds < WORTH_KEEPING:
            self._staged.discard()
        else:
            self._staged.keep()
        return last


def unfinished_run(out: Path, *, resume: bool) -> str | None:
    """A note about what a run to `out` would neither continue (`resume`) nor replace; None if there is nothing."""
    folder = partial_of(out)
    if (message := obstacle(out, resume=True, overwrite=False, foreign=OF_CONVERSIONS)) is not None or resume:
        return message
    last = last_checkpoint(folder)
    is_trained = read_or_empty(folder / TRAINING_FILE).get("report") is not None
    return _unfinished(folder, last) if is_trained or last is not None else None


def _unfinished(folder: Path, last: Path | None) -> str:
    progress = "all steps" if last is None else f"step {step_of(last)}"
    return f"{folder} holds {progress} of an unfinished run; continue it with --resume, or {START_ANEW}"
