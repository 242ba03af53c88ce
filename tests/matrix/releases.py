"""The transformers releases that are checked, and overlays: folders that hold one release for `PYTHONPATH`."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from pathlib import Path

from packaging.requirements import Requirement

LOWEST = "4.57.6"  # for the bundled code
LOWEST_INSTALLED = "5.16.1"  # for the installed package; setup.cfg says the same
SGLANG = "5.19.0"  # what SGLang 0.5.23 pins
NEWEST = "5.24.0"
RELEASES = (
    *(LOWEST, "5.0.0", "5.4.0", "5.7.0", "5.10.4", "5.13.1", LOWEST_INSTALLED, SGLANG),
    *("5.20.2", "5.21.1", "5.22.2", "5.23.0", NEWEST),
)
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


def default_cache() -> Path:
    """Where overlays are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gda-matrix"


def choose(text: str) -> list[str]:
    """Versions in `text`: numbers or names separated by commas, or "all". Each once, oldest first.

    Raises:
        ValueError: if a word is neither a version number nor a known name.
    """
    pinned = re.search(r"^transformers==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE)
    assert pinned is not None
    names = {"lowest": LOWEST, "package": LOWEST_INSTALLED, "sglang": SGLANG, "pinned": pinned[1], "newest": NEWEST}
    words = [*RELEASES] if text == "all" else [word.strip() for word in text.split(",")]
    chosen = {names.get(word, word) for word in words}
    for word in chosen:
        if not re.fullmatch(r"\d+\.\d+\.\d+\w*", word):
            raise ValueError(f"--releases: {word!r} is no version; give numbers, {', '.join(names)}, or all")
    return sorted(chosen, key=numbers)


def numbers(release: str) -> tuple[int, ...]:
    """5.16.1 → (5, 16, 1), to compare releases."""
    return tuple(int(part) for part in re.findall(r"\d+", release)[:3])


def overlay(release: str, cache: Path) -> Path | None:
    """The folder that holds this release and what it needs at other versions than the environment has.

    It is built by pip and kept in `cache`. None if the environment itself has this release.

    Raises:
        RuntimeError: if pip fails, or the requirements contradict one another.
    """
    if version("transformers") == release:
        return None
    folder = cache / release
    while missing := unmet(release, folder):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--upgrade"]
        print(f"{folder}: pip install {' '.join(missing)}", file=sys.stderr, flush=True)
        done = subprocess.run(
            [*command, "--target", str(folder), *missing], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"transformers {release}: pip failed: {done.stderr.strip().splitlines()[-1]}")
        if unmet(release, folder) == missing:
            raise RuntimeError(f"transformers {release}: nothing meets {', '.join(missing)} together")
    return folder


def unmet(release: str, folder: Path) -> list[str]:
    """What the packages of an overlay require that neither they nor the environment meet."""
    own = {_normal(found.name): found for found in distributions(path=[str(folder)])}
    required = {f"transformers=={release}", *_requirements(own.values())}
    return sorted(text for text in required if not _is_met(Requirement(text), own))


def _requirements(packages: Iterable[Distribution]) -> Iterable[str]:
    for package in packages:
        for text in package.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                yield f"{requirement.name}{requirement.specifier}"


def _is_met(requirement: Requirement, own: dict[str, Distribution]) -> bool:
    name = _normal(requirement.name)
    try:
        found = own[name].version if name in own else version(name)
    except PackageNotFoundError:
        return False
    return requirement.specifier.contains(found, prereleases=True)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
