"""Versions of the libraries that computed a result."""

import importlib.metadata
from contextlib import suppress

from gda._version import __version__


def versions(*packages: str) -> dict[str, str]:
    """The version of this package and those of the other `packages` that are installed."""
    found = {"gda": __version__}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
