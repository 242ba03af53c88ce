"""The GPU kit runs on a CPU with tiny sizes, so that a machine with a GPU is not lost to a renamed function."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.repository import ROOT


@pytest.mark.long
def test_smoke_run(tmp_path: Path) -> None:
    """Each part ends by itself, no case fails, and the report has a table of each."""
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", "--smoke", "--out", tmp_path, "--python", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("correctness", "speed", "sweep"):
        content = json.loads((tmp_path / f"gpu_{part}.json").read_text())
        assert [row for row in content["rows"] if "error" in row] == []
        assert "running" not in content
        assert f"== {part} (" in done.stdout
