"""README's first steps run as printed, with the pretrained model of the demo."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ..support.checkpoints import needs_smollm2
from ..support.repository import ROOT

SECTION = re.compile(r"^## First steps.*?\n(.*?)^## ", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMPT = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)  # a command, and what it prints
NOT_RUN = ("gda convert", "gda push", "gda serve")
PYTHON = re.compile(r"^```python\n(import gda .*?)^```$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+|query heads .*|\d+ signal \+ .*")  # what rounding does not change
# Replacements of these commands. The packages are already installed, and pip would use the network.
COMMANDS = {"pip": "exit 0", "python": f'exec {sys.executable} "$@"', "gda": f'exec {sys.executable} -m gda.cli "$@"'}


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], str]:
    """Runs commands in a folder, in one shell that stops at the first error, and returns what they print."""
    programs = tmp_path_factory.mktemp("bin")
    for name, code in COMMANDS.items():
        (programs / name).write_text(f"#!/bin/sh\n{code}\n")
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "COLUMNS": "160"}

    def run(commands: str, folder: Path) -> str:
        done = subprocess.run(
            ["bash", "-e", "-c", commands], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        return done.stdout

    return run


@pytest.fixture(scope="module")
def made(readme: str, shell: Callable[[str, Path], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the first steps leave."""
    found = SECTION.search(readme)
    assert found is not None
    blocks = BLOCK.findall(found[1])
    assert blocks
    folder = tmp_path_factory.mktemp("clone")
    shell("".join(blocks), folder)
    return folder / "first-steps"


@pytest.mark.long
@needs_smollm2
def test_first_steps_run_verbatim(made: Path) -> None:
    """One shell runs all blocks of the section and stops at the first error; each step leaves its result."""
    assert json.loads((made / "trained-llama" / "config.json").read_text())["model_type"] == "llama"
    ours = json.loads((made / "results" / "results.json").read_text())["gda"]
    assert ours["perplexity_ratio"] < 1  # ten steps on text of the same kind
    assert "4. Trained from converted" in (made / "trained" / "README.md").read_text()
    assert (made / "attention.html").stat().st_size > 10_000


@pytest.mark.long
@needs_smollm2
def test_later_commands_run_in_the_same_folder(made: Path, readme: str, shell: Callable[[str, Path], str]) -> None:
    """In order, with the figures that README prints, up to rounding. Splitting takes long, and the Hub is not here."""
    for block in CONSOLE.findall(readme):
        command, printed = PROMPT.findall(block)[-1]
        if command.startswith("gda") and not command.startswith(NOT_RUN):
            found = shell(command, made)
            for wanted in FIGURE.findall(printed):
                assert wanted in found, f"{command}: {wanted}"
    code = PYTHON.search(readme)
    assert code is not None
    (made / "snippet.py").write_text(code[1])
    assert float(shell("python snippet.py", made).split()[0]) < 1e-5
