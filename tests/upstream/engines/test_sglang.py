"""SGLang serves GDA models on a CPU, with its own transformers backend, scheduler, paged cache and weight loader.

`run.py` unpacks SGLang, saves the models and runs this file. Each model has its own server process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from models import GDA, REFUSED, STOCK

MODELS = Path(os.environ["GDA_ENGINE_MODELS"])
Record = Callable[[str, object], None]


def generate(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `sglang_generate.py` on a model."""
    command = [sys.executable, str(Path(__file__).with_name("sglang_generate.py")), str(folder)]
    environment = os.environ | {"SGLANG_USE_CPU_ENGINE": "1"}
    # In a new session, because a server that cannot load its model ends all processes of its group.
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, start_new_session=True, check=False
    )


@pytest.mark.parametrize("name", [*STOCK, *GDA])
def test_tokens_are_those_of_transformers(name: str, record_property: Record) -> None:
    """A batch of three prompts of different lengths gives the tokens of transformers' greedy `generate`.

    SGLang's transformers backend extends a sliding window of W to W + 1 tokens: its attention counts the window without
    the last token, and only its own models pass `sliding_window - 1`. The expected tokens are those of the wider
    window.
    """
    outcome = generate(MODELS / name)
    tokens = [json.loads(line[7:]) for line in outcome.stdout.splitlines() if line.startswith("TOKENS ")]
    assert tokens, outcome.stderr[-4000:]
    expected = json.loads((MODELS / name / "expected.json").read_text())
    wider = expected.get("tokens_of_wider_window")
    assert tokens[0] == (wider or expected["tokens"])
    record_property("row", f"{name} | loads; generates transformers' tokens{' of a window one wider' * bool(wider)}")


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_models_are_refused_when_they_load(name: str, record_property: Record) -> None:
    outcome = generate(MODELS / name)
    assert "TOKENS" not in outcome.stdout
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("ValueError: sglang ")]
    assert errors, outcome.stderr[-4000:]
    assert "serve it with transformers (`gda serve`)" in errors[-1]
    record_property("row", f"{name} | refused: {errors[-1].removeprefix('ValueError: ')}")
