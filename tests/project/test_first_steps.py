"""README's first steps run as printed, with the pretrained model of the demo."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.checkpoints import needs_smollm2
from ..support.repository import ROOT

SECTION = re.compile(r"^## First steps.*?\n(.*?)^## ", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Replacements of these commands. The packages are already installed, and pip would use the network.
COMMANDS = {"pip": "exit 0", "python": f'exec {sys.executable} "$@"', "gda": f'exec {sys.executable} -m gda.cli "$@"'}


@pytest.mark.long
@needs_smollm2
def test_first_steps_run_verbatim(tmp_path: Path) -> None:
    """One shell runs all blocks of the section and stops at the first error; each step leaves its result."""
    found = SECTION.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found is not None
    blocks = BLOCK.findall(found[1])
    assert blocks
    (tmp_path / "bin").mkdir()
    for name, code in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-e", "-c", "".join(blocks)], cwd=tmp_path, env=environment, check=True)
    made = tmp_path / "first-steps"
    assert json.loads((made / "trained-llama" / "config.json").read_text())["model_type"] == "llama"
    ours = json.loads((made / "results" / "results.json").read_text())["gda"]
    assert ours["perplexity_ratio"] < 1  # ten steps on text of the same kind
    assert "4. Trained from converted" in (made / "trained" / "README.md").read_text()
    assert (made / "attention.html").stat().st_size > 10_000
