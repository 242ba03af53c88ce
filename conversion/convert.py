"""From a checkpoint of a Llama, Mistral or Qwen, or of a relative, to a GDA checkpoint."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from gda.common.files import check_places, refuse_existing
from gda.common.screen import quiet_transformers
from gda.conversion.modes.choices import noise_heads_of, refuse_calibration, refuse_choices, require_type
from gda.conversion.modes.low_rank import factored_config, factored_recipes, is_exact
from gda.conversion.modes.notes import notes_on, rank_notes
from gda.conversion.modes.plan import mode_of, planned_config, planned_recipes
from gda.conversion.push import PushReport, push
from gda.conversion.sources.hub import check_name, require_token
from gda.conversion.sources.open import open_source
from gda.conversion.split.splitter import Splitter
from gda.conversion.tensors.new_parameters import new_by_conversion
from gda.conversion.tensors.recipes import is_lossless
from gda.conversion.writing.provenance import DTYPES, Settings
from gda.conversion.writing.write_model import ConvertReport, planned_report, write_model


def convert(
    source: str | Path,
    out: str | Path,
    *,
    mode: str | None = None,
    noise_heads: int | None = None,
    ratio: str | int | None = None,
    lambda_type: str | None = None,
    merge_kv: int | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None,
    effort: str | None = None,
    qk_rank: int | None = None,
    seed: int = 0,
    dtype: str = "keep",
    max_shard_size: str | int = "5GB",
    workers: int = 1,
    revision: str | None = None,
    verify: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    bundle_code: bool = True,
    push_to_hub: str | None = None,
    private: bool | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> ConvertReport:
    """Convert a Llama into a GDA model that computes the same and can learn to do better, or a relative into GDA.

    Of a Llama, Mistral, Qwen2 or Qwen3, every query head stays as a signal head; noise heads are added and λ starts at
    exactly 0, with a live gradient. A Motif or a DiffLlama has noise heads and λ already: its tensors are mapped, bit
    for bit. With `qk_rank` the queries, of a GDA model too, then become a shared base with low-rank updates.

    With mode "split" a Llama keeps its number of heads, and some of them become noise heads: the result is another
    model, fitted to the source by calibration text, and the report says what it costs.

    Tensors are streamed: memory is that of a few of them. Verification, after it, loads source and result if they take
    less than a quarter of the free memory, else a layer at a time. `out` appears only when it is whole and verified.

    Args:
        source: A folder of safetensors, a Hub id or a `.gguf` file.
        out: The folder to make.
        mode: "expand" or "split", for a Llama, Mistral or Qwen, or "map", for a relative; None takes the lossless one.
        noise_heads: Noise heads to add, or to split off; by default one for each KV head.
        ratio: Signal heads for each noise head, 4 or "4:1", instead of `noise_heads`.
        lambda_type: Of a Llama, Mistral or Qwen, "reparameterized" (the default) or "tanh"; for a split "sigmoid", too.
        merge_kv: For a split, merge the KV heads of each layer to that many first, a divisor of their number: query
            heads that have a KV head each come to share one. It is done in closed form, by calibration.
        calibration: For a split, the text that it is fitted to: a text file, or `.jsonl` with a field `text`. By
            default the documentation that comes with Python.
        calibration_tokens: For a split, how many tokens of it to read; 65,536 by default.
        effort: For a split, "fast": heads, λ and output projections in closed form, layer by layer; "default": then the
            attention is trained for 80 steps on the source's predictions; "best": for 320.
        qk_rank: Make queries, and paired keys, a base that the roles of a group share and an update of this rank for
            each, as in the Shared DIFF Transformer. Of full rank, the smaller of head_dim and hidden_size, this is
            exact; below it is an approximation. Then the source may be a GDA model as well.
        seed: Of the new weights.
        dtype: "keep", "float32", "bfloat16" or "float16"; λ is float32 always.
        max_shard_size: As in `save_pretrained`.
        workers: Files of weights that are written at once, by threads; each holds two tensors in memory. The bytes are
            the same.
        revision: Branch, tag or commit, for a Hub id.
        verify: Compare the result with the source before it appears.
        resume: Go on from the shards that a killed run finished.
        overwrite: Replace `out` if it exists.
        bundle_code: Put the code of the model beside the weights, so that `out` loads with `trust_remote_code=True`
            where this package is not installed.
        push_to_hub: A repository to push `out` to when it is there.
        private: Whether that repository is private if it is made.
        dry_run: Check everything, write nothing.
        console: Where progress is shown; nowhere if None.

    Returns:
        A report.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, OSError: for bad input, in one line that names the remedy.
        PermissionError, ConnectionError: if the Hub does not take or give a model; see `push`.
        VerificationFailed: if the result does not compute what the source computes; `out` is then not made.
    """
    check_places(source, out)
    out = Path(out)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    if type(workers) is not int or workers < 1:
        raise ValueError(f"--workers {workers!r} is not a number of files to write at once, which is 1 or more")
    if private is not None and push_to_hub is None:
        raise ValueError("--private and --public are about the repository of --push-to-hub, which is not given")
    if push_to_hub is not None:
        check_name(push_to_hub)
    refuse_existing(out, overwrite)
    with quiet_transformers():
        opened = open_source(source, revision)
        require_type(opened, qk_rank)
        mode = mode_of(opened.config, mode)
        if mode == "map":
            refuse_choices(opened, noise_heads=noise_heads, ratio=ratio, lambda_type=lambda_type)
        if mode != "split":
            refuse_calibration(
                merge_kv=merge_kv, calibration=calibration, calibration_tokens=calibration_tokens, effort=effort
            )
        elif qk_rank is not None:
            raise ValueError("--qk-rank goes with --mode split in two steps: split first, and then factor the result")
        noise = noise_heads_of(opened.config, noise_heads, ratio, mode=mode, merge_kv=merge_kv)
        lambda_type = lambda_type or "reparameterized"
        try:
            config = planned_config(
                opened, mode=mode, noise_heads=noise, lambda_type=lambda_type, dtype=dtype, merge_kv=merge_kv
            )
        except ValueError as error:
            raise ValueError(f"{opened.name}: {error}") from None
        dense = recipes = planned_recipes(opened, config, mode=mode, seed=seed, dtype=dtype)
        lossless = keeps_bits = is_lossless(dense, opened.specs)
        if qk_rank is not None:
            config = factored_config(config, qk_rank)
            recipes = factored_recipes(config, dense)
            lossless = is_exact(config, recipes, opened.specs)
        settings = Settings(
            mode,
            dtype,
            seed,
            max_shard_size,
            config.num_noise_heads,
            config.lambda_type,
            lossless and mode != "split",
            config.qk_rank,
        )
        splitter = None
        if mode == "split":
            splitter = Splitter(
                opened, config, calibration=calibration, tokens=calibration_tokens, effort=effort, seed=seed
            )
            settings = replace(settings, split=splitter.settings())
        notes = notes_on(opened.config, settings, keeps_bits) + rank_notes(config, settings)
        if splitter is not None and dry_run:
            notes.append(splitter.expected())
        report = planned_report(out, config, recipes, dense, settings=settings, notes=notes, dry_run=dry_run)
        if dry_run:
            return report
        if push_to_hub is not None:
            require_token(push_to_hub)
        report = write_model(
            report,
            opened,
            settings,
            recipes,
            dense=dense,
            verify=verify,
            resume=resume,
            overwrite=overwrite,
            bundle_code=bundle_code,
            workers=workers,
            console=console,
            trainable=new_by_conversion(config, mode=mode, merged=merge_kv is not None),
            divide=None if splitter is None else partial(splitter.run, dtype=DTYPES[dtype], console=console),
        )
    if push_to_hub is None:
        return report
    return replace(report, pushed=_push(out, push_to_hub, private, bundle_code, console))


def _push(out: Path, repo: str, private: bool | None, bundle_code: bool, console: Console | None) -> PushReport:
    try:
        return push(out, repo, private=private, bundle_code=bundle_code, console=console)
    except (ConnectionError, PermissionError, ValueError) as error:
        raise type(error)(f"{error}; {out} is whole: `gda push {out} {repo}` goes on") from None
