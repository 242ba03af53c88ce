"""Names of tasks in the text of lm-eval's task files: importing lm-eval takes seconds, and its index half a minute."""

import difflib
import functools
import os
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from gda.eval.tasks import TASKS_FOLDER

NOT_A_DEFINITION = {".py", ".pyc", ".md", ".json", ".jsonl", ".txt", ".csv", ".tsv", ".sh", ".ipynb"}
DEFINED_NAME = re.compile(rb"^(?:task|group):[ \t]*[\"']?([\w.:/+-]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)


@functools.cache
def definitions() -> dict[Path, bytes]:
    """For each folder of lm-eval, the text of all files that define tasks or are included by such files.

    Empty where lm-eval is not installed.
    """
    found = find_spec("lm_eval")
    if found is None or found.origin is None:
        return {}
    return {path: _text_of(path) for path in (Path(found.origin).parent / "tasks").iterdir() if path.is_dir()}


def _text_of(folder: Path) -> bytes:
    files = (os.path.join(place, file) for place, _, files in os.walk(folder) for file in files)
    return b"\n".join(Path(file).read_bytes() for file in files if os.path.splitext(file)[1] not in NOT_A_DEFINITION)


def pattern(name: str) -> re.Pattern[bytes]:
    """`name` as a whole word; `*`, `?` and `[…]` stand for parts of a word, as in fnmatch."""
    word = "".join(map(_part, re.findall(r"\[!?[^\]]+\]|.", name)))
    return re.compile(rf"(?<![\w.-]){word}(?![\w.-])".encode())


def _part(part: str) -> str:
    """The regular expression for a character of a pattern, or for characters in brackets."""
    if len(part) == 1:
        return {"*": r"[\w.:/+-]*", "?": r"[\w.:/+-]"}.get(part) or re.escape(part)
    inner = re.escape(part[1:-1].removeprefix("!")).replace(r"\-", "-")
    return f"[{'^' if part[1] == '!' else ''}{inner}]"


def is_file(name: str) -> bool:
    """Whether `name` is that of a YAML file."""
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def check_tasks(names: Iterable[str]) -> None:
    """Raise ValueError for a name that occurs in no task file of lm-eval or of this package."""
    if not (of_lm_eval := definitions()):
        return
    texts = [*of_lm_eval.values(), _text_of(TASKS_FOLDER)]
    for name in names:
        if not is_file(name) and not any(pattern(name).search(text) for text in texts):
            raise unknown_task(name, texts)


def unknown_task(name: str, texts: Iterable[bytes], others: Iterable[str] = ()) -> ValueError:
    """The error for a name that is unknown, with similar names that `texts` define or that are among `others`."""
    known = {found.decode() for text in texts for found in DEFINED_NAME.findall(text)} | set(others)
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(close)}?" if close else "`python -m gda.eval ls tasks` lists all tasks"
    return ValueError(f"unknown task {name!r}; {hint}")
