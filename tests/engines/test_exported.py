"""An exported model gives the GDA model's greedy text on engines of others, and the same logits.

Each engine comes from its wheel, into a cache folder, and runs all models in one process.
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
    """The exported folders by kind, and what the GDA models compute."""

    folders: dict[str, Path]
    expected: Results


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folders = export_all(tmp_path_factory.mktemp("engines"))
    expected = run_transformers(folder.with_name("gda") for folder in folders)
    return Exported({folder.parent.name: folder for folder in folders}, expected)


@pytest.fixture(scope="session", params=[*ENGINES])
def engine(request: pytest.FixtureRequest, exported: Exported) -> tuple[str, Results]:
    """The name of an engine and what it computes."""
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
    """Its own class, of the type that was to be written."""
    folder = exported.folders[kind]
    assert config_of(folder)["model_type"] == KINDS[kind].written
    check(kind, run_transformers([folder])[kind], exported.expected[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_engines(kind: str, engine: tuple[str, Results], exported: Exported) -> None:
    """The engine of someone else, with its own tokenizer: each model that it can run at all."""
    name, results = engine
    if (reason := ENGINES[name].limit(config_of(exported.folders[kind]))) is not None:
        pytest.skip(f"{name} cannot run it: {reason}")
    check(kind, results[kind], exported.expected[kind])
