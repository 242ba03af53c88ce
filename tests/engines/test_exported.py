"""On other engines, an exported model gives the greedy text and the logits of its GDA model.

Each engine is unpacked from its wheel into a cache folder and runs all models in one process.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .engines import ENGINES, Results, run_engine
from .kinds import KINDS, NUM_TOKENS, PROMPTS, config_of, difference, export_all, run_transformers

pytestmark = pytest.mark.engines


@dataclass
class Exported:
    """The exported folders by kind, and the results of their GDA models."""

    folders: dict[str, Path]
    expected: Results


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folders = export_all(tmp_path_factory.mktemp("engines"))
    expected = run_transformers(folder.with_name("gda") for folder in folders)
    return Exported({folder.parent.name: folder for folder in folders}, expected)


@pytest.fixture(scope="session", params=[*ENGINES])
def engine(request: pytest.FixtureRequest, exported: Exported) -> tuple[str, Results]:
    """The name of an engine and its results."""
    name = request.param
    limit = ENGINES[name].limit
    folders = [folder for folder in exported.folders.values() if limit(config_of(folder)) is None]
    try:
        return name, run_engine(name, folders, PROMPTS, NUM_TOKENS)
    except RuntimeError as error:
        pytest.skip(f"{name}: {error}")


def check(kind: str, got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert "error" not in got, got["error"]
    assert got["tokens"] == expected["tokens"]
    assert difference(got, expected) <= KINDS[kind].tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_transformers(kind: str, exported: Exported) -> None:
    """transformers loads the exported folder with its own class of the requested type."""
    folder = exported.folders[kind]
    assert config_of(folder)["model_type"] == KINDS[kind].written
    check(kind, run_transformers([folder])[kind], exported.expected[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_engines(kind: str, engine: tuple[str, Results], exported: Exported) -> None:
    """Each engine runs every model that it supports, with its own tokenizer."""
    name, results = engine
    if (reason := ENGINES[name].limit(config_of(exported.folders[kind]))) is not None:
        pytest.skip(f"{name} cannot run it: {reason}")
    check(kind, results[kind], exported.expected[kind])
