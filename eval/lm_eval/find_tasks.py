"""Tasks by name, without parsing all of lm-eval's 14,000 task files: only the folders that speak of them are read."""

import contextlib
import difflib
import fnmatch
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind

from gda.common.errors import first_line
from gda.eval.lm_eval.local_data import data_from
from gda.eval.tasks import TASKS_FOLDER

TASKS_OF_LM_EVAL = Path(lm_eval.tasks.__file__).parent
NOT_A_DEFINITION = {".py", ".pyc", ".md", ".json", ".jsonl", ".txt", ".csv", ".tsv", ".sh", ".ipynb"}
DEFINED_NAME = re.compile(rb"^(?:task|group):[ \t]*[\"']?([\w.:/+-]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)


class TaskManagerWithOurs(TaskManager):
    """lm-eval's, which knows our tasks beside those of `include_path`."""

    def __init__(self, *args: Any, include_path: str | Path | list[str | Path] | None = None, **kwargs: Any) -> None:
        given = include_path if isinstance(include_path, list) else [include_path] if include_path else []
        super().__init__(*args, include_path=[TASKS_FOLDER, *given], **kwargs)


def load_tasks(
    names: Sequence[str], *, dataset_root: str | Path | None = None, metadata: dict[str, Any] | None = None
) -> list[Task | Group]:
    """Build tasks and groups, with their data.

    Args:
        names: Names of tasks, groups or tags, of ours or of lm-eval; patterns such as "blimp_*"; paths of YAML files.
        dataset_root: Where their data lies; None for where the task says.
        metadata: What generated tasks are told: "tokenizer", "length", "data_seed", ….

    Raises:
        ValueError: for an unknown name, with those it may have meant, and for data that does not fit the task.
        FileNotFoundError: for data that is missing or cannot be downloaded, naming the task.
    """
    with data_from(dataset_root) as read:
        manager, found = find_tasks(names, metadata=metadata)
        loaded = [_load(manager, name, read) for name in found]
    tasks = {name: task for one in loaded for name, task in one["tasks"].items()}
    groups = {name: group for one in loaded for name, group in one.get("groups", {}).items()}
    members = {child for one in loaded for children in one.get("group_map", {}).values() for child in children}
    every = {**groups, **tasks}
    return [every[name] for name in dict.fromkeys([*found, *every]) if name in every and name not in members]


def _load(manager: TaskManager, name: str, read: list[Path]) -> Any:
    """`read` grows by the folders of data."""
    begun = [name]
    build = manager._factory._build_task

    def build_named(entry: Entry, *args: Any) -> Any:
        begun.append(entry.name)
        return build(entry, *args)

    manager._factory._build_task = build_named  # only there is it known which task of a group is built
    read.clear()
    try:
        return manager.load([name])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"task {begun[-1]}: {first_line(error)}") from None
    except ValueError as error:
        raise ValueError(f"task {begun[-1]} cannot be built{_from(read, error)}: {first_line(error)}") from None
    except Exception as error:  # whatever a definition makes of data that is not what it expects
        told = f"{_from(read, error) or ' from its data'}: {type(error).__name__}: {first_line(error)}"
        raise ValueError(f"task {begun[-1]} cannot be built{told}") from None
    finally:
        manager._factory._build_task = build


def _from(read: list[Path], error: Exception) -> str:
    """The data that was read last, unless the error names it."""
    return f" from {read[-1]}" if read and str(read[-1]) not in str(error) else ""


def find_tasks(names: Sequence[str], *, metadata: dict[str, Any] | None = None) -> tuple[TaskManager, list[str]]:
    """A task manager that knows `names`, and the names with patterns replaced by what they match.

    Raises:
        ValueError: for an unknown name, with those it may have meant.
    """
    wanted = [name for name in names if not _is_file(name)]
    definitions = _definitions()
    folders = {name: _folders_that_mention(name, definitions) for name in wanted}
    # Of a name that is defined twice lm-eval takes the first in one tree, and the last of several.
    paths = [*sorted(set().union(*folders.values()), reverse=True), TASKS_FOLDER]
    with _quiet_index():
        manager = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
        incomplete = any(folders[name] and not _is_complete(manager, name) for name in wanted)
        if incomplete or any(_is_group(name) for name in names if _is_file(name)):
            manager = TaskManagerWithOurs(metadata=metadata)
    for name in wanted:
        if not _matches(manager, name):
            raise ValueError(f"unknown task {name!r}{_did_you_mean(name, manager, definitions.values())}")
    found = [match for name in names for match in ([name] if _is_file(name) else _matches(manager, name))]
    return manager, list(dict.fromkeys(found))


@contextlib.contextmanager
def _quiet_index() -> Iterator[None]:
    """Silence what lm-eval says of names that its own folders define twice."""
    logger = logging.getLogger("lm_eval.tasks._index")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _is_group(file: str) -> bool:
    """Whether a YAML file defines a group, whose members may be tasks from anywhere."""
    return re.search(rb"^group:", Path(file).read_bytes(), re.MULTILINE) is not None


def _definitions() -> dict[str, bytes]:
    """The text of every file that defines tasks, or is included by one that does. It takes less than a second."""
    found = {}
    for folder, _, files in os.walk(TASKS_OF_LM_EVAL):
        for file in files:
            if os.path.splitext(file)[1] not in NOT_A_DEFINITION:
                path = os.path.join(folder, file)
                with open(path, "rb") as definition:
                    found[path] = definition.read()
    return found


def _folders_that_mention(name: str, definitions: dict[str, bytes]) -> set[Path]:
    pattern = _pattern(name)
    return {
        TASKS_OF_LM_EVAL / Path(path).relative_to(TASKS_OF_LM_EVAL).parts[0]
        for path, text in definitions.items()
        if pattern.search(text)
    }


def _pattern(name: str) -> re.Pattern[bytes]:
    """`name` as a whole word; `*` and `?` stand for parts of a word."""
    word = re.escape(name).replace(r"\*", r"[\w.:/+-]*").replace(r"\?", r"[\w.:/+-]")
    return re.compile(rf"(?<![\w.-]){word}(?![\w.-])".encode())


def _is_complete(manager: TaskManager, name: str) -> bool:
    """Whether `name` is known here with all that belongs to it."""
    matches = _matches(manager, name)
    return bool(matches) and all(_is_whole(manager, match) for match in matches)


def _is_whole(manager: TaskManager, name: str) -> bool:
    entry = manager.task_index[name]
    if entry.kind is Kind.TAG:  # any folder may hold tasks of a tag
        return False
    members = (entry.cfg or {}).get("task")
    for member in members if isinstance(members, list) else []:
        member = member if isinstance(member, str) else member.get("group") or member.get("task")
        # What is not in the index may as well be defined in place; the whole index knows.
        if not isinstance(member, str) or member not in manager.task_index or not _is_whole(manager, member):
            return False
    return True


def _matches(manager: TaskManager, name: str) -> list[str]:
    if name in manager.task_index:
        return [name]
    return sorted(fnmatch.filter(manager.all_tasks, name)) if set(name) & set("*?[") else []


def _did_you_mean(name: str, manager: TaskManager, definitions: Iterable[bytes]) -> str:
    known = {found.decode() for text in definitions for found in DEFINED_NAME.findall(text)} | set(manager.all_tasks)
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(close)}?" if close else "; `python -m gda.eval ls tasks` lists them"
