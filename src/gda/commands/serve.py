"""The command `gda serve`."""

import typer

from gda.commands.app import Group, command
from gda.common.extras import needed_by
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
    with needed_by("serving", "serve"):
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import uvicorn  # noqa: F401
    import transformers
    from transformers.cli.transformers import app as transformers_app

    from gda.conversion.sources.open import resolve_folder
    from gda.conversion.sources.readers import read_gda_config
    from gda.conversion.sources.tokenizers import require_packages
    from gda.modeling_gda.modeling_gda import GDAForCausalLM

    name, _, revision = options.model.partition("@")
    folder = resolve_folder(name, revision or None)
    read_gda_config(folder)
    require_packages(folder)
    transformers.GDAForCausalLM = GDAForCausalLM  # type: ignore[attr-defined]
    transformers_app(["serve", options.model, *context.args])
