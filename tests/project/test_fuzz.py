"""Damaged files: for any content, a call succeeds or raises one error of one line.

Each case runs in a forked child with limited memory and time. The child may write only to its workspace and scratch
folders, start no process and open no pickle. A crash of the child fails its case.

    python -m pytest -m long tests/project/test_fuzz.py          thousands of cases
    GDA_FUZZ_SEED=7 GDA_FUZZ_CASES=50 python -m pytest …         another seed and number of cases per file
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from gda.common.errors import CheckFailed

from ..fuzz.mutations import Edit, apply, mutate
from ..fuzz.targets import TARGETS, make_workspace
from ..support.children import PATIENCE, in_child

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("GDA_FUZZ_SEED", "0"))
CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus.jsonl"
SHORT, LONG = int(os.environ.get("GDA_FUZZ_CASES", "4")), int(os.environ.get("GDA_FUZZ_CASES", "150"))
SECONDS = 20
MEMORY = 2 << 30
CLEAN = (ValueError, OSError, ImportError, CheckFailed)
FORBIDDEN = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "socket.connect"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}


class Broken(BaseException):
    """A violation in a case. It is no Exception, so that the tested code cannot catch it."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file, undamaged. Tests must not change it."""
    return make_workspace(tmp_path_factory.mktemp("fuzz"))


def cases_of(name: str, content: bytes, count: int) -> Iterable[list[Edit]]:
    """The requested number of damages, by the seed."""
    chance = random.Random(f"{SEED} {name}")
    for _ in range(count):
        yield mutate(content, TARGETS[name].kind, chance)


def failures(name: str, cases: list[list[Edit]], workspace: Path, scratch: Path) -> list[tuple[list[Edit], str]]:
    """The failed cases with reasons. Each batch runs in a child, with a new one after a crash."""
    found: list[tuple[list[Edit], str]] = []
    at = 0
    while at < len(cases):
        place = Path(shutil.copytree(workspace, scratch / f"{at}"))
        output = scratch / "output"
        output.write_text("")
        status = _in_child(name, cases, at, place, output)
        shutil.rmtree(place)
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        found += [(cases[line["case"]], line["wrong"]) for line in lines if line.get("wrong")]
        done = 1 + max((line["case"] for line in lines if "wrong" in line), default=at - 1)
        if status == 0:
            assert done == len(cases)
        else:
            found.append((cases[done], f"the process ended with {status}"))
            done += 1
        at = done
    return found


def _in_child(name: str, cases: list[list[Edit]], begin: int, place: Path, output: Path) -> int:
    def work() -> None:
        try:
            huggingface_hub.constants.HF_HUB_OFFLINE = True
            warnings.simplefilter("ignore")
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            watched = _watch(place)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            with open(output, "a") as report:
                for number in range(begin, len(cases)):
                    wrong = _try(name, cases[number], place, watched)
                    report.write(json.dumps({"case": number, "wrong": wrong}) + "\n")
                    report.flush()
        except BaseException:
            output.with_name("child").write_text(traceback.format_exc())
            raise

    return in_child(work, seconds=PATIENCE + 5 * (len(cases) - begin))


def _watch(place: Path) -> dict[str, str]:
    """Record forbidden actions of this process. This cannot be undone, so it runs in a child."""
    allowed = (str(place), os.path.join(tempfile.gettempdir(), "gda-"), "/dev/null", os.environ["HF_HOME"])
    seen: dict[str, str] = {}

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            seen.setdefault(event, f"{event} {arguments!r:.200}")
        writes = event in CHANGES or (event == "open" and len(arguments) > 2 and (arguments[2] or 0) & WRITES)
        paths = [os.fspath(each) for each in arguments[:2] if isinstance(each, str | os.PathLike)]
        if event == "open":
            paths = paths[:1]
        for path in paths if writes else []:
            # Within rmtree, names are relative to an open folder, which was checked when it was opened.
            if (os.path.isabs(path) or event == "open") and not os.path.realpath(path).startswith(allowed):
                seen.setdefault(path, f"{event} of {path}")
        if event == "open" and isinstance(arguments[0], str) and "/secret" in arguments[0]:
            seen.setdefault(event, f"reads {arguments[0]}")

    sys.addaudithook(watch)
    return seen


def _try(name: str, edits: list[Edit], place: Path, watched: dict[str, str]) -> str | None:
    """The violation of a case; None if there is none."""
    target = TARGETS[name]
    file = place / target.file
    whole = file.read_bytes()
    damaged = apply(whole, target.kind, edits)
    file.write_bytes(damaged)
    before = _names(place)
    watched.clear()

    def too_long(*_: Any) -> None:
        raise Broken(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    wrong = None
    began = time.monotonic()
    try:
        target.call(place)
    except CLEAN as error:
        message = " ".join(str(error).split())
        if not 10 < len(message) < 1000:
            wrong = f"{type(error).__name__} says {len(message)} characters: {message[:300]}"
    except BaseException:
        wrong = traceback.format_exc()[-1500:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if time.monotonic() - began > SECONDS:
        wrong = wrong or "took too long"
    if watched:
        wrong = f"{wrong or ''} does what it may not: {'; '.join(watched.values())}"
    for made in (place / "out", place / ".out.partial"):
        shutil.rmtree(made, ignore_errors=True)
    if (changed := _names(place) ^ before) and wrong is None:
        wrong = f"leaves {sorted(changed)}"
    file.write_bytes(whole)
    return wrong


def _names(place: Path) -> set[str]:
    held = {str(path.relative_to(place)) for path in place.rglob("*")}
    return {name for name in held if name.split("/")[0] not in ("out", ".out.partial")}


def described(found: list[tuple[list[Edit], str]], name: str) -> str:
    """What failed, and the lines that add the cases to the corpus."""
    return "\n\n".join(
        f"{wrong}\n  corpus: {json.dumps({'target': name, 'edits': edits})[:2000]}" for edits, wrong in found
    )


def check(name: str, count: int, workspace: Path, tmp_path: Path) -> None:
    """Run that many cases of that file."""
    print(f"seed {SEED}, {count} cases of {name}")  # pytest shows it where a test fails
    content = (workspace / TARGETS[name].file).read_bytes()
    found = failures(name, list(cases_of(name, content, count)), workspace, tmp_path)
    assert not found, f"seed {SEED}: {len(found)} of {count} cases\n{described(found, name)}"


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if not target.slow])
def test_damaged_files(name: str, workspace: Path, tmp_path: Path) -> None:
    """A few cases of each file."""
    check(name, SHORT, workspace, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_many_damaged_files(name: str, workspace: Path, tmp_path: Path) -> None:
    """Thousands of cases over all files."""
    check(name, LONG // 5 if TARGETS[name].slow else LONG, workspace, tmp_path)


def corpus() -> dict[str, list[list[Edit]]]:
    """Earlier failures that were fixed, by file."""
    kept: dict[str, list[list[Edit]]] = {}
    for line in CORPUS.read_text().splitlines():
        row = json.loads(line)
        kept.setdefault(row["target"], []).append(row["edits"])
    return kept


@pytest.mark.parametrize("name", corpus())
def test_corpus_of_earlier_failures(name: str, workspace: Path, tmp_path: Path) -> None:
    found = failures(name, corpus()[name], workspace, tmp_path)
    assert not found, described(found, name)


@pytest.mark.parametrize("name", TARGETS)
def test_undamaged_files_are_read(name: str, workspace: Path, tmp_path: Path) -> None:
    """So that the cases test the file that they name."""
    place = Path(shutil.copytree(workspace, tmp_path / "place"))
    TARGETS[name].call(place)
