"""One thread a process, since workers that share cores would wait for one another's; and a Hub of the tests' own."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub, and a token that may write there; nothing of it is cached here."""
    HUB.clear()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield HUB
    shutil.rmtree(Path(HF_HOME.name) / "hub", ignore_errors=True)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `gda` with arguments, here."""

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
