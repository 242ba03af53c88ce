"""`accelerate estimate-memory` of a pushed model."""

import subprocess
import sys
from pathlib import Path

import pytest

import gda

from ..support.hub_server import Hub
from ..support.llamas import save_llama

pytestmark = pytest.mark.slow


def test_size_of_a_pushed_model(tmp_path: Path, hub: Hub) -> None:
    """By the code in the repository, since accelerate does not import this package."""
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", verify=False)
    gda.push(tmp_path / "gda", "me/gda")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "estimate-memory", "me/gda"]
    command += ["--library_name", "transformers", "--trust_remote_code", "--dtypes", "float32"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    model = gda.GDAForCausalLM.from_pretrained(tmp_path / "gda")
    kilobytes = sum(4 * each.numel() for each in (*model.parameters(), *model.buffers())) / 1024
    assert f"{kilobytes:.2f} KB" in ran.stdout
