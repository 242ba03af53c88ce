"""Names of tasks in the text of lm-eval's task files: importing lm-eval takes seconds, and its index half a minute."""

import difflib
import fnmatch
import functools
import os
import re
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path

from gda.eval.tasks import TASKS_FOLDER

NOT_A_DEFINITION = {".py", ".pyc", ".md", ".json", ".jsonl", ".txt", ".csv", ".tsv", ".sh", ".ipynb"}
WORD = rb"[\w.:/+()-]+"
DEFINED_NAME = re.compile(rb"^(?:task|group):[ \t]*[\"']?(" + WORD + rb")[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)


@functools.cache
def definitions() -> dict[Path, bytes]:
    """For each folder of lm-eval, the text of all files that define tasks or are included by such files.

    Empty where lm-eval is not installed.
    """
    found = find_spec("lm_eval")
    if found is None or found.origin is None:
        return {}
    return {path: _text_of(path) for path in (Path(found.origin).parent / "tasks").iterdir() if path.is_dir()}


@functools.cache
def words() -> dict[Path, set[str]]:
    """For each folder of lm-eval, the words of its definitions: each name that one of them mentions is a word."""
    return {folder: _words_of(text) for folder, text in definitions().items()}


def _text_of(folder: Path) -> bytes:
    files = (os.path.join(place, file) for place, _, files in os.walk(folder) for file in files)
    return b"\n".join(Path(file).read_bytes() for file in files if os.path.splitext(file)[1] not in NOT_A_DEFINITION)


def _words_of(text: bytes) -> set[str]:
    return {word.decode() for word in re.findall(WORD, text)}


def matches(name: str, known: Collection[str]) -> list[str]:
    """`name` itself if it is among the `known`; those that it matches if it is a pattern, as fnmatch reads it."""
    if name in known:
        return [name]
    return sorted(fnmatch.filter(known, name)) if set(name) & set("*?[") else []


def is_file(name: str) -> bool:
    """Whether `name` is that of a YAML file."""
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def check_tasks(names: Iterable[str]) -> None:
    """Raise ValueError for a name that occurs in no task file of lm-eval or of this package."""
    if not definitions():
        return
    known = _words_of(_text_of(TASKS_FOLDER)).union(*words().values())
    for name in names:
        if not is_file(name) and not matches(name, known):
            raise unknown_task(name)


def unknown_task(name: str, others: Iterable[str] = ()) -> ValueError:
    """The error for a name that is unknown, with similar names that are defined or among `others`."""
    texts = [*definitions().values(), _text_of(TASKS_FOLDER)]
    known = {found.decode() for text in texts for found in DEFINED_NAME.findall(text)} | set(others)
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(close)}?" if close else "`python -m gda.eval ls tasks` lists all tasks"
    return ValueError(f"unknown task {name!r}; {hint}")
