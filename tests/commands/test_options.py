"""Options that are declared once: the arguments, checks and documentation of the Python function that takes them."""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from gda.common.options import Options, argument, option, takes
from gda.common.places import at_revision


@dataclass(frozen=True)
class GreetOptions(Options):
    name: str = argument("Whom to greet.")
    tone: Literal["warm", "cool"] | None = option(None, "Tone of the greeting.")
    times: int = option(1, "How often.", minimum=1, maximum=9)
    volume: float = option(0.5, "How loud.", above=0)


@takes(GreetOptions)
def greet(options: GreetOptions, *, console: Any = None) -> GreetOptions:
    """Greet somebody.

    Args:
        console: Console to print on.

    Raises:
        ValueError: for bad options.
    """
    return options


def test_options_become_arguments() -> None:
    assert greet("Ada", times=3, console=None) == GreetOptions("Ada", times=3)
    parameters = inspect.signature(greet).parameters
    assert [*parameters] == ["name", "tone", "times", "volume", "console"]
    kinds = {name: each.kind.name for name, each in parameters.items()}
    assert kinds.pop("name") == "POSITIONAL_OR_KEYWORD"
    assert set(kinds.values()) == {"KEYWORD_ONLY"}


def test_the_docstring_lists_every_argument() -> None:
    names = ("name", "tone", "times", "volume", "console", "ValueError")
    places = [greet.__doc__.index(f"\n    {name}: ") for name in names]
    assert places == sorted(places)


WRONG_CALLS = {
    "a wrong name": ((), {"name": "Ada", "time": 2}, r"greet\(\) has no argument `time`; did you mean `times`\?"),
    "no argument": ((), {}, r"greet\(\): missing a required argument: 'name'"),
    "too many arguments": (("Ada", "warm"), {}, r"greet\(\): too many positional arguments"),
}


@pytest.mark.parametrize(("args", "given", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_calls_name_the_function(args: tuple[Any, ...], given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        greet(*args, **given)


WRONG_VALUES = {
    "choice": ({"tone": "hot"}, "--tone hot is not one of warm, cool"),
    "empty choice": ({"tone": ""}, "--tone '' is not one of warm, cool"),
    "below": ({"times": 0}, "--times 0 is below 1"),
    "above": ({"times": 10}, "--times 10 is above 9"),
    "not whole": ({"times": 1.5}, "--times 1.5 is not a whole number"),
    "text": ({"times": "2"}, "--times '2' is not a number"),
    "not above": ({"volume": 0.0}, "--volume 0.0 is not above 0"),
    "not finite": ({"volume": float("nan")}, "--volume nan is not a finite number"),
}


@pytest.mark.parametrize(("given", "message"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_wrong_values_name_the_option(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        greet("Ada", **given)


def test_a_path_may_contain_an_at_sign(tmp_path: Path) -> None:
    """It is no revision there."""
    (tmp_path / "llama@v2").mkdir()
    assert at_revision(str(tmp_path / "llama@v2")) == (str(tmp_path / "llama@v2"), None)
    assert at_revision("me/llama@v2") == ("me/llama", "v2")
    assert at_revision("me/llama") == ("me/llama", None)
