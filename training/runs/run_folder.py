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
START_ANEW = "start over with --overwrite"
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
        here, is_trained = json.loads(json.dumps(asdict(self))), begun.get("report") is not None
        try:
            before, now = (_facts(each, is_trained=is_trained) for each in (begun, here))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{folder / TRAINING_FILE} does not describe a run; {START_ANEW}") from None
        for name in before | now:
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"--resume: {name:.100} was {_shown(before.get(name))}, and is now {_shown(now.get(name))}; change "
                    f"it back, or {START_ANEW}"
                )


def _facts(identity: Mapping[str, Any], *, is_trained: bool) -> dict[str, Any]:
    """By name, what must be the same in a resumed run; of an identity as training.json stores it."""
    settings = dict(identity["settings"])
    # Which process reads which sequences of a step makes no difference.
    step = [settings.pop("batch_size"), settings.pop("accumulation"), identity["processes"]]
    facts = {
        "the number of sequences per step (--batch-size × --accumulation × processes)": math.prod(map(index, step)),
        "the launcher's sharding": identity["keeper"],
        **{flag(name): value for name, value in settings.items()},
    }
    if is_trained:
        return facts  # nothing is read any more
    facts["the choice of --precision auto"] = identity["auto_precision"]
    facts["the commit of the model (--revision)"] = identity["commit"]
    for kind in ("model", "teacher", "data"):
        for number, stamp in enumerate(identity[kind], 1):
            facts[f"file {number} of the {kind} (name, size, time)"] = stamp
    return facts


def _shown(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value)) or None
    return "not given" if value is None or value is False else f"{value!s:.100}"


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
        self._staged = StagedFolder(out, overwrite=overwrite, resume=True, foreign=MANIFEST_FILE)
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
        is_foreign = (self.path / MANIFEST_FILE).exists()
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
    if (message := obstacle(out, resume=True, overwrite=False, foreign=MANIFEST_FILE)) is not None or resume:
        return message
    last = last_checkpoint(folder)
    is_trained = read_or_empty(folder / TRAINING_FILE).get("report") is not None
    return _unfinished(folder, last) if is_trained or last is not None else None


def _unfinished(folder: Path, last: Path | None) -> str:
    progress = "all steps" if last is None else f"step {step_of(last)}"
    return f"{folder} holds {progress} of an unfinished run; continue it with --resume, or {START_ANEW}"
