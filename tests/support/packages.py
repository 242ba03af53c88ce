"""Packages that tests run but that are not installed: each set in a folder of its own, for `PYTHONPATH`."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock


def cache_folder(name: str) -> Path:
    """A folder that is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name


def pip(*arguments: str) -> None:
    """Run pip without dependencies.

    Raises:
        RuntimeError: with the last line of its output, if it fails.
    """
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")


def install(folder: Path, *requirements: str) -> Path:
    """Packages in `folder`, from an earlier run or else by pip; only one process installs.

    Raises:
        RuntimeError: if pip fails.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            print(f"Installing {folder.name} to {folder}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as name:
                pip("install", "--no-compile", "--target", f"{name}/packages", *requirements)
                Path(name, "packages").rename(folder)
    return folder
