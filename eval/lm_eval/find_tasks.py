"""Tasks by name, in a second instead of half a minute: lm-eval's index parses all of its 14,000 task files.

Only the folders of lm-eval whose files mention a wanted name are given to lm-eval's TaskManager to parse.
"""

import contextlib
import functools
import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import patch_environment
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from gda.common.errors import first_line
from gda.eval.lm_eval.local_data import data_from
from gda.eval.task_texts import definitions, is_file, matches, unknown_task, words
from gda.eval.tasks import TASKS_FOLDER

CODE_VARIABLE = "HF_ALLOW_CODE_EVAL"  # in which Hugging Face's metric code_eval wants to read "1"
RUNS_CODE = (
    "{} would run code that the model writes, with the rights of this process; pass --confirm-run-unsafe-code to "
    "allow it, best in a container"
)


class TaskManagerWithOurs(TaskManager):
    """lm-eval's TaskManager with the tasks of this package beside those of lm-eval and of `include_path`."""

    def __init__(self, *args: Any, include_path: str | Path | list[str | Path] | None = None, **kwargs: Any) -> None:
        given = include_path if isinstance(include_path, list) else [include_path] if include_path else []
        super().__init__(*args, include_path=[TASKS_FOLDER, *given], **kwargs)
        # lm-eval's index of several folders has, of a tag, only the tasks of the last folder with that tag.
        tags = set(self.all_tags)
        for task in self.all_subtasks:
            for tag in self.task_index[task].tags & tags:
                self.task_index[tag].tags.add(task)

    def load(self, *args: Any, **kwargs: Any) -> Any:
        return _processed_once(super().load(*args, **kwargs))


def load_tasks(
    names: Sequence[str],
    *,
    dataset_root: str | Path | None = None,
    metadata: dict[str, Any] | None = None,
    include_path: str | Path | None = None,
    run_code: bool = False,
) -> list[Task | Group]:
    """Load tasks, groups and tags of lm-eval or of this package, by names, patterns such as "blimp_*" or YAML files.

    Without `dataset_root`, each task reads its dataset from where its definition says, usually the Hub. `metadata`
    are settings of generated tasks, such as "tokenizer" and "length". Definitions in `include_path` precede those of
    lm-eval. `run_code` allows tasks that run what the model writes.

    Raises:
        ValueError: for an unknown name, with similar ones, for data that does not fit its task, for a task of two
            groups, and for a task that runs code without being allowed to.
        FileNotFoundError: for data that is missing or cannot be downloaded, naming the task.
    """
    with data_from(dataset_root) as folders_read, code_allowed(run_code):
        manager, found = find_tasks(names, metadata=metadata, include_path=include_path)
        loaded = [_load(manager, name, folders_read) for name in found]
    tasks = {name: task for each in loaded for name, task in each["tasks"].items()}
    if not run_code and (unsafe := [name for name, task in tasks.items() if task.config.unsafe_code]):
        raise ValueError(RUNS_CODE.format(", ".join(unsafe)))
    groups = {name: group for each in loaded for name, group in each["groups"].items()}
    members = {child for each in loaded for children in each["group_map"].values() for child in children}
    all_of_them = {**groups, **tasks}
    in_order = dict.fromkeys([*found, *all_of_them])
    chosen = [all_of_them[name] for name in in_order if name in all_of_them and name not in members]
    try:
        TaskManager.load(manager, chosen)  # as lm-eval does after the model is loaded
    except ValueError as error:  # groups that share a task
        raise ValueError(f"--tasks: {first_line(error)}; evaluate these groups in runs of their own") from None
    return chosen


def code_allowed(allowed: bool) -> contextlib.AbstractContextManager[None]:
    """Let Hugging Face's metric code_eval run within this context, if that is allowed."""
    return patch_environment(**{CODE_VARIABLE: "1"}) if allowed else contextlib.nullcontext()


def _load(manager: TaskManager, name: str, folders_read: list[Path]) -> Any:
    folders_read.clear()
    try:
        return manager.load([name])
    except Exception as error:  # a definition may do anything with data that it does not expect
        # While a task that is a class reads its data, it has no name yet, or no configuration, which `config` needs.
        task = getattr(getattr(task_under_way(error), "_config", None), "task", None) or name
        reason = first_line(error)
        if CODE_VARIABLE in str(error):  # the metric of humaneval asks for it when the task is loaded
            raise ValueError(RUNS_CODE.format(task)) from None
        last_read = f" from {folders_read[-1]}" if folders_read and str(folders_read[-1]) not in str(error) else ""
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"task {task}: {reason}") from None
        if not isinstance(error, ValueError):
            last_read, reason = last_read or " from its data", f"{type(error).__name__}: {reason}"
        raise ValueError(f"task {task} cannot be loaded{last_read}: {reason}") from None


def _processed_once(loaded: Any) -> Any:
    """Keep the documents that `process_docs` returns: lm-eval calls it for the prompts, and again for the answers.

    GPQA's shuffles the choices each time. Only the cache on the disk hides that, which datasets in memory don't have.
    """
    for task in loaded["tasks"].values():
        if not callable(process := task.config.process_docs):
            continue
        task.config.process_docs = once = functools.cache(process)
        if task.fewshot_cfg.process_docs is process:
            task.fewshot_cfg.process_docs = once
        if hasattr(task, "sampler") and (examples := task.fewshot_docs()) is task.eval_docs:
            task.sampler.replace_df(list(examples))  # so that it knows, and omits, the document that is asked about
    return loaded


def task_under_way(error: Exception) -> Any:
    """The task in which lm-eval raised the error, which does not say so itself; None if it was raised elsewhere."""
    found = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    return next((each for each in found if isinstance(each, Task)), None)


def find_tasks(
    names: Sequence[str], *, metadata: dict[str, Any] | None = None, include_path: str | Path | None = None
) -> tuple[TaskManager, list[str]]:
    """A task manager that knows `names`, and the names with each pattern replaced by what it matches."""
    wanted = [name for name in names if not is_file(name)]
    if any(is_file(name) and _defines_group(name) for name in names):
        manager = TaskManagerWithOurs(metadata=metadata, include_path=include_path)  # members may be defined anywhere
    else:
        manager = _manager_of(wanted, metadata, include_path)
    for name in wanted:
        if not matches(name, manager.task_index):
            raise unknown_task(name, manager.all_tasks)
    found = [match for name in names for match in ([name] if is_file(name) else matches(name, manager.task_index))]
    return manager, list(dict.fromkeys(found))


def _manager_of(wanted: list[str], metadata: dict[str, Any] | None, include_path: str | Path | None) -> TaskManager:
    """A task manager that knows the wanted names, the members of their groups, and all tasks of their tags."""
    folders: set[Path] = set()
    searched: set[str] = set()
    unsearched = set(wanted)
    while True:
        folders |= {folder for folder, known in words().items() if any(matches(name, known) for name in unsearched)}
        folders |= {folder for folder in words() if _included(folder) & folders}
        # If a name is defined twice, lm-eval takes the first definition in one folder, but the last of several folders.
        paths = [*sorted(folders, reverse=True), *([] if include_path is None else [include_path])]
        manager = TaskManagerWithOurs(include_path=paths, include_defaults=False, metadata=metadata)
        searched |= unsearched
        found = {match for name in searched for match in matches(name, manager.task_index)}
        unsearched = {member for name in found for member in _members(manager.task_index[name].cfg or {})} - searched
        if not unsearched:
            return manager


@functools.cache
def _included(folder: Path) -> set[Path]:
    """Folders of lm-eval whose files are included by files of `folder`, with their tags."""
    names = re.findall(rb"^include:[ \t]*(?:\.\./)+([^/\s]+)/", definitions()[folder], re.MULTILINE)
    return {folder.parent / name.decode() for name in names}


def _members(config: dict[str, Any]) -> Iterator[str]:
    """Names of the members of a group, nested groups included; none for a task."""
    members = config.get("task")
    for member in members if isinstance(members, list) else []:
        if isinstance(member, str):
            yield member
        else:
            yield from (member[kind] for kind in ("group", "task") if isinstance(member.get(kind), str))
            yield from _members(member)


def _defines_group(file: str) -> bool:
    return re.search(rb"^group:", Path(file).read_bytes(), re.MULTILINE) is not None
