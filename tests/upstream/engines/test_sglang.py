"""SGLang serves GDA models: its own transformers backend, scheduler, paged cache and weight loader, on a CPU.

Run by `run.py`, which fetches SGLang and saves the models. Each model has a server of its own, in processes of its own.
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
    # In a session of its own: a server that cannot load its model ends all processes of its group.
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, start_new_session=True, check=False
    )


@pytest.mark.parametrize("name", [*STOCK, *GDA])
def test_serves_as_transformers_generates(name: str, record_property: Record) -> None:
    """Three prompts of different lengths in one batch: the tokens of transformers' greedy `generate`."""
    outcome = generate(MODELS / name)
    tokens = [json.loads(line[7:]) for line in outcome.stdout.splitlines() if line.startswith("TOKENS ")]
    assert tokens, outcome.stderr[-4000:]
    assert tokens[0] == json.loads((MODELS / name / "expected.json").read_text())["tokens"]
    record_property("row", f"{name} | loads; generates transformers' tokens")


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_when_loading_what_it_cannot_run(name: str, record_property: Record) -> None:
    outcome = generate(MODELS / name)
    assert "TOKENS" not in outcome.stdout
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("ValueError: sglang ")]
    assert errors, outcome.stderr[-4000:]
    assert "serve it with transformers (`gda serve`)" in errors[-1]
    record_property("row", f"{name} | refused: {errors[-1].removeprefix('ValueError: ')}")
