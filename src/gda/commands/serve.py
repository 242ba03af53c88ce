"""The command `gda serve`."""

import difflib
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import typer

from gda.commands.app import Group, command
from gda.common.extras import needed_by
from gda.common.places import at_revision
from gda.conversion.options import ServeOptions


@command(
    ServeOptions,
    Group.SHARE,
    examples=(
        "gda serve ./llama-gda",
        "gda serve me/llama-gda --port 8001 --dtype bfloat16",
        "gda serve ./llama-gda --continuous-batching --attn-implementation sdpa",
    ),
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(options: ServeOptions, context: typer.Context) -> None:
    """Serve a GDA model over an OpenAI-compatible HTTP API, with `transformers serve`.

    `transformers serve` alone finds only the models that are part of transformers. Pass its options after MODEL;
    `transformers serve --help` lists them.
    """
    _refuse_unknown(context.args)
    with needed_by("serving", "serve"):
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import uvicorn  # noqa: F401
    import transformers
    from transformers.cli.transformers import app as transformers_app

    from gda.conversion.sources.config_file import read_gda_config
    from gda.conversion.sources.open import resolve_folder
    from gda.conversion.sources.tokenizers import require_packages
    from gda.modeling_gda.modeling_gda import GDAForCausalLM

    folder = resolve_folder(*at_revision(options.model))
    read_gda_config(folder)
    require_packages(folder)
    transformers.GDAForCausalLM = GDAForCausalLM  # type: ignore[attr-defined]
    transformers_app(["serve", options.model, *context.args])


def _refuse_unknown(arguments: Iterable[str]) -> None:
    """Raise ValueError for an option that `transformers serve` does not have.

    They are read from its source, since importing it takes seconds. Where none is found in it, `transformers serve`
    itself refuses what it does not know.
    """
    known = options_of_transformers()
    for argument in arguments:
        given = argument.partition("=")[0]
        if known and given.startswith("--") and re.sub("^--no-", "--", given) not in known:
            near = difflib.get_close_matches(given, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "`transformers serve --help` lists the options"
            raise ValueError(f"there is no option {given}; {hint}")


def options_of_transformers() -> list[str]:
    """Names such as "--port"; empty if its source is written in another way."""
    found = find_spec("transformers")
    path = Path(found.origin).parent / "cli/serve.py" if found and found.origin else Path()
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    parameters = re.findall(r"(\w+): Annotated\[[^()]*typer\.Option\(", source)
    return [f"--{each.replace('_', '-')}" for each in parameters]
