"""Options, each declared once: a dataclass gives a Python function its arguments and a command its command line.

@dataclass(frozen=True)
class GreetOptions(Options):
    name: str = argument("Whom to greet.")
    times: int = option(1, "How often.", panel="Output")

@takes(GreetOptions)
def greet(options: GreetOptions, *, console: Console | None = None) -> Report: ...

greet("Ada", times=3)        # and, by gda.commands.app.command, `gda greet Ada --times 3`
"""

import functools
import inspect
import math
import operator
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

P = ParamSpec("P")
R = TypeVar("R")
OUTPUT, HUB, PERPLEXITY = "Output", "Hub", "Perplexity and attention"  # panels of `--help`, which lists them last


def argument(help: str, *, default: Any = MISSING, check: Callable[[Any], None] | None = None) -> Any:
    """A field that is positional on the command line and in Python; `check` as of `option`."""
    return field(default=default, metadata={"help": help, "positional": True, "check": check})


def option(
    default: Any,
    help: str,
    *,
    panel: str | None = None,
    metavar: str | None = None,
    flag: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    check: Callable[[Any], None] | None = None,
) -> Any:
    """A field that is an option on the command line and a keyword argument in Python.

    Args:
        default: Its default value.
        help: One or two sentences for `--help` and for the docstring.
        panel: The panel of `--help` that lists it.
        metavar: What `--help` calls its value, if not the type's name.
        flag: How the command line spells it, if not as the field with dashes, such as "--private/--public".
        minimum, maximum: The smallest and the largest number allowed.
        above: The number must be greater than this one.
        check: Raises ValueError or OSError for a path or a name that can't be used; called by `check_places`, for an
            option that can be repeated with each value.
    """
    limits = {"minimum": minimum, "maximum": maximum, "above": above}
    return field(
        default=default,
        kw_only=True,
        metadata={"help": help, "positional": False, "panel": panel, "metavar": metavar, "flag": flag, "check": check}
        | limits,
    )


@dataclass(frozen=True)
class Options:
    """Base of the options of one command.

    Raises:
        ValueError: if a field with a fixed set of choices has another value, or a number is outside its limits or
            should be whole.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in fields(self):
            kinds, value = kinds_of(hints[each.name]), getattr(self, each.name)
            if value is None and type(None) in kinds:
                continue
            allowed = choices(hints[each.name])
            if allowed and value not in allowed:
                raise ValueError(f"{flag(each.name)} {value or repr(value)} is not one of {', '.join(allowed)}")
            if isinstance(value, float) and int in kinds and float not in kinds:
                raise ValueError(f"{flag(each.name)} {value} is not a whole number")
            _check_limits(each, value)

    def check_places(self) -> None:
        """Check the models and files that the options name; OSError or ValueError that names the option."""
        for each in fields(self):
            check, value = each.metadata.get("check"), getattr(self, each.name)
            for one in value if isinstance(value, tuple) else (value,):
                if check is None or not isinstance(one, str | Path):  # perhaps a model in memory
                    continue
                try:
                    check(one)
                except (OSError, ValueError) as error:
                    option = "" if each.metadata["positional"] else f"{flag(each.name)} "
                    raise type(error)(f"{option}{error}") from None


def _check_limits(each: Field[Any], value: Any) -> None:
    minimum, maximum, above = (each.metadata.get(name) for name in ("minimum", "maximum", "above"))
    if (minimum, maximum, above) == (None, None, None):
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{flag(each.name)} {value!r} is not a number")
    if not math.isfinite(value):
        raise ValueError(f"{flag(each.name)} {value} is not a finite number")
    if minimum is not None and value < minimum:
        raise ValueError(f"{flag(each.name)} {value} is below {minimum}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{flag(each.name)} {value} is above {maximum}")
    if above is not None and value <= above:
        raise ValueError(f"{flag(each.name)} {value} is not above {above}")


def flag(name: str) -> str:
    """How the command line spells the field `name`."""
    return f"--{name.replace('_', '-')}"


def as_names(given: Any) -> tuple[str, ...]:
    """The value of an option that can be repeated: None, one name or path, or several."""
    return (str(given),) if isinstance(given, str | Path) else tuple(map(str, given or ()))


def layer_list(layers: str | Iterable[int] | None) -> list[int] | None:
    """The value of --layers as numbers; None stays None. Text separates them with commas."""
    if layers is None:
        return None
    try:
        numbers = [*map(int, layers.split(","))] if isinstance(layers, str) else [*map(operator.index, layers)]
    except (TypeError, ValueError):
        raise ValueError(f"--layers {layers} is not a list of layers such as 3,7,11") from None
    if not numbers:
        raise ValueError("--layers names no layer")
    return numbers


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, written as `A | B` or as Optional; of any other type hint, the hint itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def choices(hint: Any) -> tuple[Any, ...]:
    """The values that a type hint such as `Literal["a", "b"] | None` allows; empty if it is no choice."""
    return next((get_args(kind) for kind in kinds_of(hint) if get_origin(kind) is Literal), ())


def declared(options: type[Options]) -> Iterator[tuple[Field[Any], Any]]:
    """The declared fields, each with its type hint: positional ones first, and a class's own before its bases'."""
    hints = get_type_hints(options)
    age = {name: age for age, base in enumerate(reversed(options.__mro__)) for name in inspect.get_annotations(base)}
    for each in sorted(fields(options), key=lambda each: (not each.metadata["positional"], -age[each.name])):
        yield each, hints[each.name]


def takes(
    options: type[Options],
) -> Callable[[Callable[Concatenate[Any, P], R]], Any]:
    """Decorate `function(options, …)` so that it is called with the fields of `options` as its arguments.

    The result has their signature, and its docstring explains them and `console`. Its attribute `run` is the function
    itself.
    """

    def decorate(function: Callable[Concatenate[Any, P], R]) -> Any:
        own = list(inspect.signature(function).parameters.values())[1:]
        parameters = [*(_parameter(each, hint) for each, hint in declared(options)), *own]
        public = inspect.Signature(
            sorted(parameters, key=lambda each: each.kind),
            return_annotation=inspect.signature(function).return_annotation,
        )
        known = set(public.parameters)
        rest = next((each.name for each in own if each.kind is inspect.Parameter.VAR_KEYWORD), None)

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> R:
            for name in set(given) - known if rest is None else ():
                near = get_close_matches(name, known, n=1)
                hint = f"; did you mean `{near[0]}`?" if near else ""
                raise TypeError(f"{function.__name__}() has no argument `{name}`{hint}")
            try:
                bound = public.bind(*args, **given).arguments
            except TypeError as error:
                raise TypeError(f"{function.__name__}(): {error}") from None
            passed_on = {each.name: bound.pop(each.name) for each in own if each.name in bound}
            if rest is not None:
                passed_on |= passed_on.pop(rest, {})
            given_options = options(**bound)
            given_options.check_places()
            return function(given_options, **passed_on)  # type: ignore[call-arg]

        call.run = function  # type: ignore[attr-defined]  # for a caller that has the options ready
        call.__signature__ = public  # type: ignore[attr-defined]
        call.__doc__ = _documented(function.__doc__ or "", options, own)
        return call

    return decorate


def _parameter(each: Field[Any], hint: Any) -> inspect.Parameter:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if each.metadata["positional"] else inspect.Parameter.KEYWORD_ONLY
    default = inspect.Parameter.empty if each.default is MISSING else each.default
    return inspect.Parameter(each.name, kind, default=default, annotation=hint)


def _documented(doc: str, options: type[Options], own: list[inspect.Parameter]) -> str:
    """The docstring with a line for each option, and for `console`, first in its section "Args:"."""
    help = {each.name: each.metadata["help"] for each, _ in declared(options)}
    if any(each.name == "console" for each in own):
        help["console"] = "Console that shows progress. Default: none."
    lines = [
        textwrap.fill(f"{name}: {text}", 116, initial_indent="    ", subsequent_indent=" " * 8)
        for name, text in help.items()
    ]
    before, found, after = inspect.cleandoc(doc).partition("\nArgs:\n")
    if not found:
        before, *rest = re.split(r"\n\n(?=(?:Returns|Raises):\n)", before, maxsplit=1)
        before, after = f"{before}\n", "\n".join(["", *rest])
    return f"{before}\nArgs:\n{chr(10).join(lines)}\n{after}"
