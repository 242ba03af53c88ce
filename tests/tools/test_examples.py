"""The scripts and the notebook in examples/ run, in small."""

import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import gda

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NEEDS = {
    "finetune_trl.py": ("trl", "peft", "datasets"),
    "evaluate.py": ("lm_eval",),
    "attention.ipynb": ("matplotlib",),
}
PRINTED = {
    "finetune_trl.py": "GDAForCausalLM: 4 tensors changed, such as model.layers.0.self_attn.q_proj.weight",
    "evaluate.py": "gda_copy_length_64",
}


def code_of(notebook: Path) -> str:
    """The code of all cells, as one program."""
    cells = json.loads(notebook.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_example_runs(name: str, tmp_path: Path) -> None:
    """In a process of its own, as a user starts it."""
    if missing := [package for package in NEEDS[name] if find_spec(package) is None]:
        pytest.skip(f"{', '.join(missing)} is not installed")
    script, arguments = EXAMPLES / name, ["--smoke"]
    if name.endswith(".ipynb"):
        script, arguments = tmp_path / "notebook.py", []
        script.write_text(code_of(EXAMPLES / name))
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path])}
    ran = subprocess.run(
        [sys.executable, script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert PRINTED.get(name, "") in ran.stdout


def test_scores_of_filters_and_without_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """lm-eval names a metric with its filter, and its standard error may be "N/A" or absent."""
    scores = {
        "alias": "t",
        "exact_match,strict-match": 0.5,
        "exact_match_stderr,strict-match": 0.125,
        "word_perplexity,none": 7.0,
        "word_perplexity_stderr,none": "N/A",
        "f1,none": 0.25,
    }
    monkeypatch.setattr(gda, "evaluate", lambda *_, **__: {"results": {"t": scores}})
    runpy.run_path(str(EXAMPLES / "evaluate.py"))["compare"](Path("a"), Path("b"), "t", 1)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [
        ["t", "exact_match", "strict-match", *["0.5000", "±", "0.1250"] * 2],
        ["t", "word_perplexity", "7.0000", "7.0000"],
        ["t", "f1", "0.2500", "0.2500"],
    ]


def test_notebook_has_no_outputs() -> None:
    """They would show whatever machine it was last run on."""
    cells = json.loads((EXAMPLES / "attention.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)
