"""The command `gda`. Nothing heavy is imported before a command runs."""

import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

import gda.commands.train  # noqa: F401  # registers the command
from gda.commands.app import app, is_main_process, print_json, progress_console
from gda.common.errors import CheckFailed

INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit, for a Hub id.")]
BundleCode = Annotated[
    bool, typer.Option(help="Put the model's code beside it: it then loads with trust_remote_code where gda is absent.")
]
Private = Annotated[bool | None, typer.Option("--private/--public", help="What the repository must be.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")]
Dtype = Annotated[str, typer.Option(help="keep, float32, bfloat16 or float16.")]
Verify = Annotated[bool, typer.Option(help="Compare the result with the source before it appears.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from what a killed run finished.")]
ShardSize = Annotated[str, typer.Option(help="Largest file of weights, such as 5GB or 400MB.")]


@app.command(
    epilog="Examples:  gda convert meta-llama/Llama-3.2-1B llama-gda  ·  "
    "gda convert ./llama ./llama-gda --ratio 4:1 --max-shard-size 2GB  ·  gda convert model.gguf model-gda --dry-run"
    "  ·  gda convert Qwen/Qwen3-0.6B qwen-gda  ·  gda convert Motif-Technologies/Motif-2.6B motif-gda"
    "  ·  gda convert ./llama-gda ./llama-shared --qk-rank 32"
    "  ·  gda convert ./llama ./llama-split --mode split --calibration text.txt"
    "  ·  gda convert ./llama-mha ./llama-split --mode split --merge-kv 8"
)
def convert(
    source: Annotated[str, typer.Argument(help="A folder of safetensors, a Hub id or a .gguf file.")],
    out: Annotated[str, typer.Argument(help="The folder to make.")],
    mode: Annotated[
        str | None,
        typer.Option(
            help="expand: add noise heads to a Llama, Mistral or Qwen, lose nothing; split: make noise heads of some "
            "that are there, which loses a little; map: a Motif or DiffLlama, as it is."
        ),
    ] = None,
    noise_heads: Annotated[
        int | None, typer.Option(help="Noise heads to add, or to split off; by default one a KV head.")
    ] = None,
    ratio: Annotated[str | None, typer.Option(help="Signal heads for each noise head, 4 or 4:1.")] = None,
    lambda_type: Annotated[
        str | None,
        typer.Option(help="Of new noise heads: reparameterized, the default, or tanh; for split sigmoid, too."),
    ] = None,
    merge_kv: Annotated[
        int | None,
        typer.Option(metavar="G", help="For split: merge KV heads to that many first, so that query heads share one."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="For split: text, or .jsonl with a field text; else Python's documentation."),
    ] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="For split: tokens to read, 65536 by default.")] = None,
    effort: Annotated[
        str | None,
        typer.Option(help="For split: fast, closed form alone; default, then trained a little; best, four times that."),
    ] = None,
    qk_rank: Annotated[
        int | None,
        typer.Option(
            help="Make queries, and paired keys, a shared base and updates of that rank; SOURCE may be a GDA."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new weights.")] = 0,
    dtype: Dtype = "keep",
    max_shard_size: ShardSize = "5GB",
    workers: Annotated[int, typer.Option(metavar="N", help="Files of weights that are written at once.")] = 1,
    revision: Revision = None,
    verify: Verify = True,
    resume: Resume = False,
    overwrite: Overwrite = False,
    bundle_code: BundleCode = True,
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="Push OUT there when it is made.")] = None,
    private: Private = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Convert a Llama, Mistral, Qwen2 or Qwen3 into a GDA model that computes exactly the same and can learn.

    Every query head stays, as a signal head; noise heads are added, and λ starts at 0 with a live gradient.
    A Motif or a DiffLlama is differential already: its tensors are mapped as they are.
    With --mode split the heads of a Llama, Mistral or Qwen are divided, and fitted to its source: that loses a little.
    OUT appears only when it is whole and verified.
    """
    from gda.conversion.convert import convert as run

    report = run(
        source,
        out,
        mode=mode,
        noise_heads=noise_heads,
        ratio=ratio,
        lambda_type=lambda_type,
        merge_kv=merge_kv,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        effort=effort,
        qk_rank=qk_rank,
        seed=seed,
        dtype=dtype,
        max_shard_size=max_shard_size,
        workers=workers,
        revision=revision,
        verify=verify,
        resume=resume,
        overwrite=overwrite,
        bundle_code=bundle_code,
        push_to_hub=push_to_hub,
        private=private,
        dry_run=dry_run,
        console=progress_console,
    )
    if as_json:
        print_json(report.to_dict())
        return
    typer.echo(report.to_dict()["head_map"])
    _print_made(report, out)
    if report.pushed is not None:
        typer.echo(f"{report.pushed.url}: commit {report.pushed.commit}")


@app.command(
    epilog="Examples:  gda push ./llama-gda me/llama-gda  ·  "
    "gda push ./llama-gda me/llama-gda --private --revision v2  ·  gda push ./llama-gda me/llama-gda --dry-run"
)
def push(
    folder: Annotated[str, typer.Argument(help="A folder with a GDA model.")],
    repo: Annotated[str, typer.Argument(help="The repository on the Hub, owner/name; made if it is not there.")],
    private: Private = None,
    revision: Annotated[str, typer.Option(help="Branch to push to; made if it is not there.")] = "main",
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    bundle_code: BundleCode = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the folder, send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Push a GDA model to the Hub, in one commit, with a model card and the model's own code.

    An interrupted push is taken up by the same command: weights that are there are not sent again.
    """
    from gda.conversion.push import push as run

    report = run(
        folder,
        repo,
        private=private,
        revision=revision,
        message=message,
        bundle_code=bundle_code,
        dry_run=dry_run,
        console=progress_console,
    )
    if as_json:
        print_json(report.to_dict())
        return
    for name in report.left_out:
        typer.echo(f"note: {name} is no part of a model and is left out")
    for note in report.notes:
        typer.echo(f"note: {note}")
    for name in report.removed:
        typer.echo(f"note: {name} was of an earlier model there and is removed")
    size = f"{len(report.files)} files, {report.nbytes / 1e6:,.1f} MB"
    if dry_run:
        typer.echo("\n".join(report.files))
        typer.echo(f"{size}: would be pushed to {repo}; nothing was (--dry-run)")
    else:
        done = f"commit {report.commit}, {size}" if report.changed else f"it has all of this already, {size}"
        typer.echo(f"{report.url}: {done}")


@app.command(
    epilog="Examples:  gda verify ./llama ./llama-gda  ·  gda verify ./llama ./llama-gda --method tensors --json"
)
def verify(
    source: Annotated[str, typer.Argument(help="What it was made of: a folder, a Hub id or a .gguf file.")],
    out: Annotated[str, typer.Argument(help="The converted model's folder.")],
    method: Annotated[
        str,
        typer.Option(help="full: run both models; layers: run both, one layer in memory; tensors: compare bits; auto."),
    ] = "auto",
    threshold: Annotated[
        float | None, typer.Option(help="Largest relative |Δlogit| that passes; 1e-5 where nothing was lossy.")
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Compare a converted model with its source; exit 1 if logits or greedy text with a cache are not the same."""
    from gda.conversion.verify import VerificationFailed
    from gda.conversion.verify import verify as run

    report = run(source, out, method=method, threshold=threshold, revision=revision, console=progress_console)
    if as_json:
        print_json(report.to_dict())
    else:
        _print_verification(report)
    if not report.passed:
        raise VerificationFailed(report)


@app.command(epilog="Examples:  gda inspect ./llama-gda  ·  gda inspect me/llama-gda --json")
def inspect(
    model: Annotated[str, typer.Argument(help="A GDA model: a folder or a Hub id.")],
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show a model's heads, parameters by part, cache and λ, from its config and headers."""
    from gda.conversion.inspect import inspect as run

    report = run(model, revision=revision)
    if as_json:
        print_json(report.to_dict())
        return
    typer.echo(f"{report.name}  {report.kv_layout} keys and values, head_dim {report.head_dim}, {report.dtype}\n")
    typer.echo(report.head_map)
    table = Table("part", "parameters", "share")
    for part, number in report.parameters.items():
        if number:
            table.add_row(part, f"{number:,}", f"{100 * number / report.num_parameters:.2f} %")
    table.add_row("all", f"{report.num_parameters:,}", "")
    Console().print(table)
    if report.qk_rank is not None:
        typer.echo(_rank_summary(report.qk_rank, report.num_parameters, report.num_dense_parameters))
    of_source = report.source_kv_cache_bytes_per_token
    compared = "" if of_source is None else f" (its source: {of_source:,})"
    typer.echo(f"KV cache: {report.kv_cache_bytes_per_token:,} bytes a token{compared}")
    typer.echo(f"λ ({report.lambda_type}): {_lambda_summary(report.lambdas)}")


@app.command(
    epilog="Examples:  gda export ./llama-gda ./llama-again --format llama  ·  "
    "gda export ./qwen-gda ./qwen-again --format qwen3  ·  gda export ./motif-gda ./motif-again --format motif"
)
def export(
    model: Annotated[str, typer.Argument(help="A GDA model: a folder or a Hub id.")],
    out: Annotated[str, typer.Argument(help="The folder to make.")],
    format: Annotated[str, typer.Option(help="llama, mistral, qwen2, qwen3, motif or diffllama.")] = "llama",
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a GDA model as the model it was, bit for bit.

    A Motif or a DiffLlama takes λ along; a Llama, a Mistral or a Qwen is what the model is while its λ is 0.
    """
    from gda.conversion.export import export as run

    report = run(
        model, out, format=format, max_shard_size=max_shard_size, overwrite=overwrite, console=progress_console
    )
    if as_json:
        print_json(report.to_dict())
        return
    for note in report.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"{out}: {report.num_parameters / 1e6:,.1f} M parameters, {report.num_tensors} tensors")


@app.command(
    epilog="Examples:  gda fold ./llama-shared ./llama-gda  ·  gda fold ./llama-shared ./llama-gda --dtype float32"
)
def fold(
    model: Annotated[str, typer.Argument(help="A GDA model with qk_rank: a folder or a Hub id.")],
    out: Annotated[str, typer.Argument(help="The folder to make.")],
    dtype: Dtype = "keep",
    max_shard_size: ShardSize = "5GB",
    revision: Revision = None,
    verify: Annotated[bool, typer.Option(help="Compare the result with the model before it appears.")] = True,
    resume: Resume = False,
    overwrite: Overwrite = False,
    bundle_code: BundleCode = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Multiply the shared bases and low-rank updates of a model out: a dense GDA model with equal logits."""
    from gda.conversion.fold import fold as run

    report = run(
        model,
        out,
        dtype=dtype,
        max_shard_size=max_shard_size,
        revision=revision,
        verify=verify,
        resume=resume,
        overwrite=overwrite,
        bundle_code=bundle_code,
        dry_run=dry_run,
        console=progress_console,
    )
    if as_json:
        print_json(report.to_dict())
    else:
        _print_made(report, out)


@app.command(
    epilog="Examples:  gda grow ./llama-gda ./bigger --signal 2  ·  gda grow ./llama-gda ./bigger --depth 40  ·  "
    "gda grow ./llama-gda ./bigger --signal 2 --layers 9,14,19,24,28,29  ·  gda grow ./llama ./bigger --width 2"
    "  ·  gda grow ./llama-gda ./bigger --masked --signal 2 --mlp 1.5 --depth 36"
)
def grow(
    model: Annotated[
        str, typer.Argument(help="A GDA model, or one to convert on the way: a folder, a Hub id or a .gguf file.")
    ],
    out: Annotated[str, typer.Argument(help="The folder to make.")],
    signal: Annotated[
        float | None, typer.Option(metavar="M", help="Replicas of each signal head: r:1 becomes M·r:1.")
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(metavar="LAYERS", help="Layers of the result; the new ones are copies that add nothing."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers to copy, from 0, parted by commas; by default spread evenly. Says the depth as well."
        ),
    ] = None,
    width: Annotated[
        float | None, typer.Option(metavar="M", help="Times the hidden size, the MLP's and the heads.")
    ] = None,
    masked: Annotated[
        bool,
        typer.Option("--masked", help="New heads, neurons and layers begin as in a new model, behind a mask of 0."),
    ] = False,
    mlp: Annotated[
        float | None, typer.Option(metavar="M", help="With --masked: times the number of neurons, such as 1.5.")
    ] = None,
    noise_std: Annotated[
        float, typer.Option(help="Noise that tells replicas apart and sums to zero, relative to the weight's.")
    ] = 0.01,
    noise_heads: Annotated[int | None, typer.Option(help="For a Llama: noise heads, as in gda convert.")] = None,
    ratio: Annotated[str | None, typer.Option(help="For a Llama: the ratio before growth, as in gda convert.")] = None,
    lambda_type: Annotated[str | None, typer.Option(help="For a Llama: reparameterized or tanh.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    dtype: Dtype = "keep",
    max_shard_size: ShardSize = "5GB",
    revision: Revision = None,
    verify: Verify = True,
    resume: Resume = False,
    overwrite: Overwrite = False,
    bundle_code: BundleCode = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Grow a model: more signal heads, more layers, or wider; it computes what it did, and has more to learn with.

    With --masked, what is new is no copy and hides behind a mask, which training raises from 0 to 1.

    Operators may be combined. OUT holds trainable.json, which says what is new, for training that alone.
    """
    from gda.conversion.grow import grow as run

    report = run(
        model,
        out,
        signal=signal,
        depth=depth,
        layers=_layer_list(layers),
        width=width,
        masked=masked,
        mlp=mlp,
        noise_std=noise_std,
        noise_heads=noise_heads,
        ratio=ratio,
        lambda_type=lambda_type,
        seed=seed,
        dtype=dtype,
        max_shard_size=max_shard_size,
        revision=revision,
        verify=verify,
        resume=resume,
        overwrite=overwrite,
        bundle_code=bundle_code,
        dry_run=dry_run,
        console=progress_console,
    )
    if as_json:
        print_json(report.to_dict())
        return
    told = report.to_dict()
    for when in ("before", "after"):
        suffix = "_before" if when == "before" else ""
        size = f"hidden size {told[f'hidden_size{suffix}']:,}, {told[f'num_parameters{suffix}']:,} parameters"
        typer.echo(f"{when}\n{told[f'head_map{suffix}']}, {size}\n")
    if report.copied_layers:
        made = "after layers" if masked else "layers copied:"
        new = "new ones" if masked else "copies"
        typer.echo(f"{made} {_listed(report.copied_layers)}; the {new} are {_listed(report.new_layers)}")
    _print_made(report, out)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Examples:  gda serve ./llama-gda  ·  gda serve me/llama-gda --port 8001 --dtype bfloat16  ·  "
    "gda serve ./llama-gda --continuous-batching --attn-implementation sdpa",
)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A GDA model: a folder or a Hub id.")],
) -> None:
    """Serve a model over HTTP as OpenAI does: `transformers serve`, with its options, knowing GDA models.

    That command by itself finds model classes in transformers only, whatever code lies beside the weights.
    Its options follow MODEL; `transformers serve --help` lists them.
    """
    import transformers
    from transformers.cli.transformers import app as transformers_app

    from gda.configuration.configuration_gda import GDAConfig
    from gda.conversion.sources.open import resolve_folder
    from gda.conversion.sources.readers import read_config
    from gda.modeling_gda.modeling_gda import GDAForCausalLM

    name, _, revision = model.partition("@")
    config = read_config(resolve_folder(name, revision or None))
    if not isinstance(config, GDAConfig) or config.architectures not in (None, ["GDAForCausalLM"]):
        raise ValueError(f"{model} holds a {(config.architectures or [config.model_type])[0]}, no GDA language model")
    transformers.GDAForCausalLM = GDAForCausalLM  # type: ignore[attr-defined]
    transformers_app(["serve", model, *context.args])


@app.command(
    name="eval",
    epilog="Examples:  gda eval ./llama-gda --baseline ./llama --tasks hellaswag,arc_easy --batch-size 16  ·  "
    "gda eval ./llama-gda --tasks gda_tasks --limit 48 --output results --html  ·  "
    "gda eval ./llama-gda --tasks gsm8k --dataset-root ./data --apply-chat-template  ·  "
    "gda eval ./llama-gda --perplexity text.txt --json",
)
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder, a Hub id or a .gguf file.")],
    tasks: Annotated[
        str, typer.Option(help="Tasks, groups, tags or patterns of lm-eval or ours (gda_tasks), parted by commas.")
    ] = "",
    baseline: Annotated[str | None, typer.Option(help="Another model, to run under the same setting.")] = None,
    dataset_root: Annotated[
        str | None, typer.Option(help="Read data from DIR/dataset_path/dataset_name/split.jsonl or .parquet.")
    ] = None,
    perplexity: Annotated[str | None, typer.Option(help="A text file to measure the perplexity of.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens that the model reads at a time, for --perplexity; by default 512.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between its windows; by default the context.")] = None,
    diagnostics: Annotated[bool, typer.Option("--diagnostics", help="Look into the attention maps.")] = False,
    limit: Annotated[float | None, typer.Option(help="Documents of each task; below 1, their share.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Solved examples in front, instead of the task's number.")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Requests at a time, or auto.")] = "1",
    device: Annotated[str | None, typer.Option(help="By default a GPU if there is one, else cpu.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put prompts into the tokenizer's chat template.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of lm-eval's generators, which draw solved examples; by default its own seeds.")
    ] = None,
    metadata: Annotated[
        str | None,
        typer.Option(
            help="JSON for generated tasks, --diagnostics too: length, depth, needles, samples, data_seed, …."
        ),
    ] = None,
    show_prompts: Annotated[int, typer.Option(help="Print text and token ids of N requests of each task.")] = 0,
    output: Annotated[str | None, typer.Option(help="A folder for results.json and results.md.")] = None,
    html: Annotated[bool, typer.Option("--html", help="Write report.html there as well.")] = False,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="Write the scores into the model folder's README.md.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a model and, under the same setting, on its baseline.

    Tasks may be official ones, on data of the Hub or of local files, or ours, which make their own data: gda_tasks
    holds gda_retrieval, gda_mqar_by_pairs, gda_copy_by_length and gda_fewshot_by_arrangement.
    """
    from gda.eval.command import evaluate_command

    evaluate_command(
        model,
        baseline,
        tasks=tasks,
        dataset_root=dataset_root,
        perplexity=perplexity,
        context=context,
        stride=stride,
        diagnostics=diagnostics,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        apply_chat_template=apply_chat_template,
        seed=seed,
        metadata=metadata,
        show_prompts=show_prompts,
        output=output,
        html=html,
        update_card=update_card,
        as_json=as_json,
        console=progress_console,
    )


@app.command(
    epilog="Examples:  gda attention ./llama-gda --text 'The cat sat on the mat.' --out report.html  ·  "
    "gda attention ./llama-gda --baseline ./llama --file text.txt --out report.html --png report.png  ·  "
    "gda attention me/llama-gda --file text.txt --layers 11,12 --out layers.html --overwrite  ·  "
    "gda attention ./llama-gda --text 'The cat sat.' --json"
)
def attention(
    model: Annotated[str, typer.Argument(help="A folder, a Hub id or a .gguf file.")],
    text: Annotated[str | None, typer.Option(help="The text to read.")] = None,
    file: Annotated[str | None, typer.Option(help="Text, or .jsonl with a field text in each line.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="The page to write, HTML in one file.")] = None,
    png: Annotated[str | None, typer.Option(metavar="FILE", help="A picture to write; needs matplotlib.")] = None,
    baseline: Annotated[str | None, typer.Option(metavar="SOURCE", help="Another model, to set beside it.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to read of the text.")] = 512,
    layers: Annotated[
        str | None, typer.Option(help="Keep the maps of these layers only, parted by commas: they are finer then.")
    ] = None,
    map_megabytes: Annotated[float, typer.Option(help="Largest size of all maps, before compression.")] = 36.0,
    device: Annotated[str | None, typer.Option(help="By default a GPU if there is one, else cpu.")] = None,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Look at a model's attention in one text: signal, noise and their difference, by layer, group and token.

    The page needs no network. Maps that are too many are averaged, and the page says how; numbers never are.
    """
    from gda.eval.attention.report import attention as run
    from gda.eval.attention.report import check_outs

    check_outs(out, png, as_json=as_json, file=file, overwrite=overwrite)
    report = run(
        model,
        text=text,
        file=file,
        baseline=baseline,
        max_tokens=max_tokens,
        layers=_layer_list(layers),
        map_megabytes=map_megabytes,
        device=device,
        revision=revision,
        console=progress_console,
    )
    wrote = [report.write_html(out, overwrite=overwrite)] if out is not None else []
    wrote += [report.write_png(png, overwrite=overwrite)] if png is not None else []
    for note in report.notes:
        typer.echo(f"note: {note}", err=as_json)
    for path in wrote:
        typer.echo(f"wrote {path} ({path.stat().st_size / 1e6:,.1f} MB)", err=as_json)
    if as_json:
        print_json(report.to_dict())


@app.command(epilog="Examples:  gda demo  ·  gda demo --out smollm2-gda")
def demo(
    out: Annotated[str | None, typer.Option(help="Keep the converted model there.")] = None,
    source: Annotated[str | None, typer.Option(help="Another Llama to demonstrate on.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert SmolLM2-135M-Instruct to 3:1 GDA, verify it, and let both generate."""
    from gda.commands.demo import demo as run

    report = run(out, source=source, overwrite=overwrite, console=progress_console if as_json else Console())
    if as_json:
        print_json(report.to_dict())


def _print_made(report: Any, out: str) -> None:
    for note in report.notes:
        typer.echo(f"note: {note}")
    size = f"{report.num_parameters / 1e6:,.1f} M parameters, {report.nbytes / 1e6:,.0f} MB, {report.num_files} file(s)"
    if report.config.qk_rank is not None:
        typer.echo(_rank_summary(report.config.qk_rank, report.num_parameters, report.num_dense_parameters))
    if report.dry_run:
        typer.echo(f"{size}: would be written to {out}; nothing was (--dry-run)")
        return
    if report.split is not None:
        _print_split(report.split)
    for projection, errors in report.projection_errors.items():
        by_layer = "  ".join(f"{error:.2g}" for error in errors)
        typer.echo(f"relative error of the {projection} weights, layer by layer: {by_layer}")
    if report.verification is not None:
        _print_verification(report.verification)
    typer.echo(f"{out}: {size}")


def _print_split(split: Any) -> None:
    lambdas = [layer.lambda_ for layer in split.layers]
    shares = [layer.subtracted for layer in split.layers]
    typer.echo(
        f"lossy: perplexity on {split.held_out_tokens:,} tokens of {split.calibration} that nothing was fitted to: "
        f"{split.perplexity_source:.3f} of the source, {split.perplexity_closed_form:.3f} in closed form, "
        f"{split.perplexity:.3f} of the result ({split.perplexity / split.perplexity_source:.3f} times the source's)"
    )
    if merged := [layer.merge.error for layer in split.layers if layer.merge is not None]:
        typer.echo(
            f"merged KV heads, before heads were divided: relative error of an attention's output "
            f"{min(merged):.3f} to {max(merged):.3f}"
        )
    typer.echo(
        f"λ from {min(lambdas):.3f} to {max(lambdas):.3f}; what is subtracted has {min(shares):.3f} to "
        f"{max(shares):.3f} of the energy of an attention's output; layer by layer in conversion.json"
    )


def _layer_list(layers: str | None) -> list[int] | None:
    if layers is None:
        return None
    try:
        return [int(layer) for layer in layers.split(",")]
    except ValueError:
        raise ValueError(f"--layers {layers} is not a list of layers such as 3,7,11") from None


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _rank_summary(rank: int, parameters: int, dense: int) -> str:
    change = 100 * (parameters / dense - 1)
    return f"qk_rank {rank}: {parameters:,} parameters, {change:+.2f} % of the {dense:,} with dense projections"


def _print_verification(report: Any) -> None:
    done = "verified" if report.passed else "compared"
    if report.method == "tensors":
        typer.echo(f"{done} tensor by tensor, nothing was run: {len(report.different_tensors)} differ")
        return
    greedy = f", same greedy text {100 * report.greedy_match:.0f} %"
    if report.greedy_ties:
        greedy += f" and {100 * report.greedy_ties:.0f} % up to a tie"
    limit = "no limit" if report.threshold is None else f"limit {report.threshold:.0e}"
    typer.echo(
        f"{done} ({report.method}, {report.tokens} tokens of {report.prompts}): |Δlogit| max {report.max_abs:.2e}, "
        f"mean {report.mean_abs:.2e}, relative {report.relative:.2e} ({limit}); KL {report.kl:.2e}; "
        f"same top token {100 * report.top1_agreement:.1f} %{greedy}"
    )


def _lambda_summary(lambdas: list[float | None]) -> str:
    known = [value for value in lambdas if value is not None]
    if not known:
        return "depends on the token in every layer"
    if len(known) == len(lambdas) and len(set(known)) == 1:
        return f"{known[0]:.4g} in every layer"
    return "  ".join("token" if value is None else f"{value:.4g}" for value in lambdas)


def main() -> None:
    """Run the command; exit 0 if done, 1 if a check failed, 2 for bad input, 130 if interrupted."""
    try:
        code = app(standalone_mode=False)
    except CheckFailed as error:
        _fail(error, 1)
    except (typer.TyperException, ValueError, OSError, ImportError) as error:
        _fail(error, 2)
    if code == INTERRUPTED:
        goes_on = {"convert": "; the same command with --resume goes on", "push": "; the same command goes on"}
        goes_on["fold"] = goes_on["grow"] = goes_on["train"] = goes_on["convert"]
        if is_main_process():
            typer.echo(f"gda: interrupted{goes_on.get(sys.argv[1], '')}", err=True)
    sys.exit(code or 0)


def _fail(error: Exception, code: int) -> NoReturn:
    if getattr(error, "reported_elsewhere", False):
        sys.exit(code)  # another process of the same run says it
    message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    typer.echo(f"gda: {' '.join(message.split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
