"""Settings of every run: one thread per process, the tests' own Hub, no flushing, several processes, fast cases.

One thread per process, because threads of several processes would wait for each other on shared cores.
"""

import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings

from .support.commands import Command, Outcome
from .support.hub_server import TOKEN, Hub

HUB = Hub()
HF_HOME = tempfile.TemporaryDirectory(prefix="gda-tests-hf-")

# huggingface_hub reads them when it is imported, so they are set here, before any test is.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": HF_HOME.name,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "0",
}
os.environ.pop("HF_TOKEN", None)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it

# To explain a failure hypothesis traces each line of torch and transformers, over and over: it seems to hang.
settings.register_profile("gda", phases=[phase for phase in Phase if phase is not Phase.explain])
settings.load_profile("gda")


MOST_PROCESSES = 4  # each takes about 1 GB


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Use several processes for a run of the whole suite, like `-n`, if pytest-xdist is installed.

    `-n` in addopts would fail without pytest-xdist and slow down a run of one file, because each process imports torch
    and transformers again. A debugger and `-s` need the tests in this process.
    """
    whole_suite = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    interactive = config.option.usepdb or config.option.trace or config.option.capture == "no"
    may_choose = getattr(config.option, "numprocesses", 0) is None and not hasattr(config, "workerinput")
    processes = min(os.cpu_count() or 1, MOST_PROCESSES)
    if whole_suite and may_choose and not interactive and not config.option.collectonly and processes > 1:
        config.option.numprocesses = processes
    if getattr(config.option, "dist", None) in ("no", "load") and config.option.numprocesses:
        config.option.dist = "loadfile"  # what the tests of a file share is made in one process, not in each
    if getattr(config.option, "dist", None) == "loadfile":
        config.option.loadscopereorder = False  # `start_early` orders the files


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Mark long tests as slow, and all cases but the first of sampled ones; order the files."""
    cases_of: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            cases_of.setdefault(item.nodeid.partition("[")[0], []).append(item)
        if item.get_closest_marker("long") or item.get_closest_marker("engines"):
            item.add_marker("slow")
    for cases in cases_of.values():
        for item in cases[1:]:
            item.add_marker("slow")
    yield  # -m and -k take away the tests that don't run
    if hasattr(config, "workerinput"):
        start_early(items)


def start_early(items: list[pytest.Item]) -> None:
    """Order files for several processes: those with a test that is marked `early`, then those with many tests.

    Otherwise a process would start with a long test when the others have nothing left to do.
    """
    tests = Counter(item.path for item in items)
    early = {item.path for item in items if item.get_closest_marker("early")}
    items.sort(key=lambda item: (item.path not in early, -tests[item.path], item.path))


@pytest.fixture(scope="session", autouse=True)
def quick_disks() -> Iterator[None]:
    """Files are not flushed to the disk, which takes a third of a small conversion's time.

    What a killed process has written is there without it; only a power cut would tell. Where and when files are
    flushed is tested by the calls.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def brief_verification() -> Iterator[dict[str, Any]]:
    """Verification reads two prompts and continues each by four tokens, since most tests are not about it."""
    from gda.conversion import logits  # takes seconds to import

    whole = {"PROMPTS": logits.PROMPTS, "GREEDY_TOKENS": logits.GREEDY_TOKENS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits, "PROMPTS", logits.PROMPTS[:2])
        patch.setattr(logits, "GREEDY_TOKENS", 4)
        yield whole


@pytest.fixture
def whole_verification(brief_verification: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification as users have it."""
    from gda.conversion import logits

    for name, value in brief_verification.items():
        monkeypatch.setattr(logits, name, value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub with a token that may write; nothing of it is cached here."""
    HUB.clear()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield HUB
    shutil.rmtree(Path(HF_HOME.name) / "hub", ignore_errors=True)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `gda` with arguments in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["gda", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        from gda.cli import main

        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run
