"""If a package of an extra is missing, one line says what needs it and how to install it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gda.common.extras import EXTRAS

from ..support.evaluation import write_models
from ..support.repository import setup_cfg

HIDDEN = {
    "eval": ("lm_eval", "datasets", "pyarrow"),
    "train": ("datasets", "pyarrow", "peft"),
    "gguf": ("gguf",),
    "tokenizers": ("sentencepiece", "google", "tiktoken"),
    "serve": ("fastapi", "openai", "uvicorn"),
    "png": ("matplotlib",),
}
# Without the packages of all extras, it runs commands one after another and prints the exit code and errors of each.
IN_CHILD = """
import contextlib, io, json, sys
sys.modules |= dict.fromkeys({hidden!r})
from gda.cli import main
outcomes = {{}}
for command in {commands!r}:
    sys.argv, code, errors = ["gda", *command.split()], 0, io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as exit_:
        code = exit_.code
    outcomes[command] = code or 0, errors.getvalue()
print(json.dumps(outcomes))
"""
# What a user types, by the extra that it needs. MODEL is a GDA model.
COMMANDS = {
    "eval": "eval MODEL --tasks gda_tasks",
    "train": "train MODEL OUT --data FILE --steps 1",
    "gguf": "convert FILE.gguf OUT",
    "tokenizers": "convert SENTENCEPIECE OUT",
    "serve": "serve MODEL",
    "png": "attention MODEL --text text --png OUT.png",
}
NEED_NONE = (
    "eval MODEL --perplexity FILE --json",
    "eval MODEL --diagnostics",
    "attention MODEL --text text --json",
    "--help",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, "MODEL")
    for name in ("FILE", "FILE.gguf"):
        (folder / name).write_text("GGUF" + "A text of several words. " * 40)
    shutil.copytree(folder / "llama", folder / "SENTENCEPIECE")
    (folder / "SENTENCEPIECE/tokenizer.json").rename(folder / "SENTENCEPIECE/tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, tuple[int, str]]:
    """How each command ended: exit code and standard error."""
    hidden = tuple(name for names in HIDDEN.values() for name in names)
    code = IN_CHILD.format(hidden=hidden, commands=(*COMMANDS.values(), *NEED_NONE))
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, str]] = json.loads(done.stdout)
    return found


def test_extras_match_setup_cfg() -> None:
    """Messages name the requirements that pip reads."""
    declared = setup_cfg()["options.extras_require"]
    assert {name: tuple(declared[name].split()) for name in EXTRAS} == EXTRAS


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_missing_packages_are_named(extra: str, outcomes: dict[str, tuple[int, str]]) -> None:
    """Exit code 2 and one line that ends with a pip command for all requirements of the extra."""
    code, errors = outcomes[COMMANDS[extra]]
    assert code == 2, errors
    (line,) = errors.splitlines()
    assert re.search(r"needs a package that cannot be imported \(\w+\): pip install ", line)
    assert all(requirement in line for requirement in EXTRAS[extra])


@pytest.mark.slow
def test_lm_eval_command_line_names_what_is_missing(tmp_path: Path) -> None:
    hide = f"sys.modules |= dict.fromkeys({HIDDEN['eval']!r})"
    code = f"import runpy, sys; {hide}; runpy.run_module('gda.eval', None, '__main__')"
    outcome = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert outcome.returncode == 2
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("gda.eval: ")
    assert all(requirement in line for requirement in EXTRAS["eval"])


@pytest.mark.slow
@pytest.mark.parametrize("command", NEED_NONE)
def test_other_commands_need_no_extra(command: str, outcomes: dict[str, tuple[int, str]]) -> None:
    """Perplexity and diagnostics run without lm-eval."""
    code, errors = outcomes[command]
    assert code == 0, errors


@pytest.mark.slow
def test_training_classes_need_no_extra() -> None:
    """All public names of gda.training can be imported with transformers' Trainer alone."""
    code = "import sys; sys.modules |= dict.fromkeys(('datasets', 'pyarrow', 'peft')); from gda.training import *"
    subprocess.run([sys.executable, "-c", code], check=True)
