"""The release matrix on the installed transformers, which is one of the releases that `.ci/run` checks."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from ..matrix.releases import LOWEST_INSTALLED, NEWEST, RELEASES, choose, numbers
from ..support.repository import setup_cfg

MATRIX = Path(__file__).parents[1] / "matrix" / "run.py"


@pytest.mark.long
@pytest.mark.parametrize("part", ["bundled", "installed"])
def test_installed_release(part: str) -> None:
    command = [sys.executable, str(MATRIX), "--releases", version("transformers"), "--parts", part, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    (checks,) = json.loads(done.stdout)[part].values()
    failed = {name: check["traceback"] for name, check in checks.items() if check["state"] == "failed"}
    assert not failed, "\n".join(failed.values())


def test_choosing_releases() -> None:
    """By number and name, each once, oldest first; other words are an error."""
    assert choose("all") == list(RELEASES)
    assert choose("newest, 5.4.0,lowest,5.4.0") == ["4.57.6", "5.4.0", NEWEST]
    with pytest.raises(ValueError, match="'latest' is no version"):
        choose("latest")


def test_setup_cfg_matches_the_matrix() -> None:
    """Its lower bound is the lowest checked release, and the pin is the newest."""
    requirements = setup_cfg()["options"]["install_requires"].split()
    assert f"transformers>={LOWEST_INSTALLED},<6" in requirements
    assert choose("pinned") == [NEWEST]
    assert sorted(RELEASES, key=numbers) == list(RELEASES)
