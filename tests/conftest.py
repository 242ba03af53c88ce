"""One thread a process: workers that share cores would otherwise wait for one another's threads."""

import os
import sys

import pytest

from .commands import Command, Outcome

os.environ.setdefault("OMP_NUM_THREADS", "1")


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
