"""Continue training a pretrained Llama, and GDA models expanded from it: what are the added heads good for?

    python benchmarks/continued.py run llama.gguf --text train.txt --held-out test.txt --dataset-root data --out DIR
    python benchmarks/continued.py report DIR

The source, and models that `gda convert` expands from it and that start with the same output, train on the same
sequences in the same order, attention only and at the same rates. The expanded models have more to train and compute:
a third more query heads in SmolLM2, and λ, which has a rate of its own (except in "one rate").
"plain heads" has as many more query heads, which start with the queries of the noise heads, but with an output of their
own, at first 0. So it shows what more heads do without a difference of maps; its new columns of `o_proj` make it the
largest, and they have the lower rate.
The models train on text, or on as many sequences of text as of key retrieval (`gda.eval.tasks`; loss on the answers).
Measured are the loss of held-out text and of Python's documentation, key retrieval by length and depth, and BLiMP.
Differences are between runs on the same data with the same seed, which determines the order of the sequences and the
new weights.

Rate and prompts were chosen with the source alone, in 120 steps of text and retrieval: at 8e-4, it became worse on
Python's documentation, and at 2e-4 it didn't; it learned to find one needle, of one per 32 tokens, in 97 % of prompts.

A run takes one thread, and its result is a line of DIR/runs.jsonl. The same command continues with the missing runs.
The first seeds are complete first, so that a report can be made at any time.
"""

import argparse
import json
import math
import sys
import time
from bisect import bisect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from equal_flops import interval
from paired_runs import cell, do_missing, keep_settings, runs_of, table
from split_domains import blimp, spread_ids
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModelForCausalLM, TrainingArguments

import gda
from gda.common.perplexity import perplexity
from gda.common.screen import quiet_transformers
from gda.common.text import python_documentation
from gda.conversion.sources.open import open_source
from gda.eval.attention.analysis import visit_attention
from gda.eval.tasks.needles import DEPTHS, NeedlePrompt, NeedleSettings, make_prompts
from gda.training.callbacks.fading import FadeCallback
from gda.training.data.sequences import collate, open_sequences
from gda.training.parameters import choose_what_learns, count_learning
from gda.training.trainer import GDATrainer

SOURCE, PLAIN_HEADS, ONE_RATE = "source", "plain heads", "scalar λ, one rate"
VARIANTS: dict[str, dict[str, Any] | None] = {  # options of gda.convert
    SOURCE: None,
    PLAIN_HEADS: {},  # the expanded model, made a Llama
    "scalar λ": {},
    ONE_RATE: {},
    "tanh λ": {"lambda_type": "tanh"},
    "head norm": {"head_norm": True},
    "head norm, 60 steps": {"head_norm": True},
    "head norm, at once": {"head_norm": True},
}
FADES = {"head norm, 60 steps": 60, "head norm, at once": 1}  # steps, instead of those of the settings
NOTHING, TEXT, MIXED = "nothing", "text", "text + retrieval"
DATA = {NOTHING: (), TEXT: ("text.jsonl",), MIXED: ("half.jsonl", "prompts.jsonl")}
LENGTHS = (128, 256, 512)  # tokens of the retrieval prompts; the last is beyond the training
TRAINING_SEED, TEST_SEED = 1, 0  # of the prompts


@dataclass(frozen=True)
class Settings:
    """Settings of a training, equal for all variants, and how much is measured."""

    steps: int = 60
    batch: int = 2
    context: int = 256
    fade_steps: int = 30  # of the head norm
    learning_rate: float = 2e-4
    lambda_learning_rate: float = 2e-3
    test_tokens: int = 4096  # of each text
    prompts: int = 30  # of each length
    pairs: int = 25  # of each paradigm of BLiMP


# ------------------------------------------------------------------------------------------------------------ one run


def run_one(options: dict[str, Any], settings: Settings, *, name: str, data: str, seed: int) -> dict[str, Any]:
    """Train one model, and measure it. Without data, it is only measured."""
    torch.set_num_threads(1)
    if name == ONE_RATE:
        settings = replace(settings, lambda_learning_rate=settings.learning_rate)
    settings = replace(settings, fade_steps=FADES.get(name, settings.fade_steps))
    files, losses = [Path(options["out"]) / file for file in DATA[data]], []
    begun = time.perf_counter()
    with TemporaryDirectory(dir=options["out"]) as scratch:
        model, tokenizer = load(name, options["source"], Path(scratch) / "model", seed)
        if files:
            losses = train(model, tokenizer, settings, files, seed, Path(scratch))
    model.eval()
    texts = {"held-out text": Path(options["held_out"]).read_text(), "Python": python_documentation()}
    return {
        "parameters": model.num_parameters(),
        "trained": count_learning(model),
        "losses": losses,
        "nats": {
            key: math.log(perplexity(model, spread_ids(tokenizer, text, settings.test_tokens)))
            for key, text in texts.items()
        },
        "retrieval": [found for length in LENGTHS for found in retrieval(model, tokenizer, length, settings.prompts)],
        "blimp": blimp(model, tokenizer, options["dataset_root"], settings.pairs),
        "lambda": lambdas(model, spread_ids(tokenizer, texts["held-out text"], 512)),
        "seconds": round(time.perf_counter() - begun),
    }


def load(name: str, source: str, folder: Path, seed: int) -> tuple[Any, Any]:
    """The untrained model of a variant, in float32, and the tokenizer."""
    opened = open_source(source)
    if (options := VARIANTS[name]) is None:
        return llama(opened.config, opened.load().state_dict()), opened.tokenizer()
    gda.convert(source, folder, verify=False, seed=seed, **options)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if name == PLAIN_HEADS:
        model = with_plain_heads(model, opened.config)
    return model, opened.tokenizer()


def llama(config: Any, weights: dict[str, Tensor]) -> Any:
    """A Llama in float32 with these weights; one loaded from a GGUF file counts as quantized, and cannot train."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights)
    return model


def with_plain_heads(model: Any, source: Any) -> Any:
    """The Llama with the config `source`, and with the noise heads of `model` as query heads whose output is 0."""
    config = deepcopy(source)
    config.num_attention_heads = model.config.num_attention_heads
    weights = {name: weight for name, weight in model.state_dict().items() if "lambda" not in name}
    # o_proj (hidden, S · d) → (hidden, (S + N) · d), with 0 after each group of signal heads
    for name in [name for name in weights if name.endswith("o_proj.weight")]:
        groups = weights[name].unflatten(1, (config.num_key_value_heads, -1))
        weights[name] = pad(groups, (0, model.config.head_dim)).flatten(1)
    return llama(config, weights)


def train(model: Any, tokenizer: Any, settings: Settings, files: list[Path], seed: int, scratch: Path) -> list[float]:
    """Train the attention of a model, and return its losses."""
    sequences = open_sequences(
        files, tokenizer, context=settings.context, text_field="text", streaming=False, seed=seed,
        vocab_size=model.config.vocab_size, scratch=scratch,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.0,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_steps=10,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    is_fading = getattr(model.config, "fade", None) is not None
    trainer = GDATrainer(
        choose_what_learns(model, "attention", scratch, 0),
        arguments,
        train_dataset=sequences.rows,
        data_collator=collate,
        lambda_learning_rate=settings.lambda_learning_rate,
        callbacks=[FadeCallback(settings.fade_steps)] if is_fading else [],
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def retrieval(model: Any, tokenizer: Any, length: int, count: int) -> list[dict[str, float]]:
    """For each depth, the share of prompts with both numbers right, and nats per token of the right answer."""
    found: dict[float, list[tuple[bool, float]]] = {depth: [] for depth in DEPTHS}
    for prompt in prompts_of(tokenizer, length, count, TEST_SEED):
        asked, whole = (tokenizer(text).input_ids for text in (prompt.text, prompt.text + prompt.target))
        ids, wanted = torch.tensor(whole), torch.tensor(whole[len(asked) :])
        logits = model(ids[None, :-1], logits_to_keep=len(wanted)).logits[0].float()
        is_right = bool((logits.argmax(-1) == wanted).all())
        found[prompt.depth].append((is_right, cross_entropy(logits, wanted).item()))
    return [
        {"length": length, "depth": depth, "right": fmean(right), "nats": fmean(nats)}
        for depth, (right, nats) in ((depth, tuple(zip(*each, strict=True))) for depth, each in found.items())
    ]


def lambdas(model: Any, ids: Tensor) -> list[float]:
    """λ of each layer, the mean over heads and tokens; nothing for a Llama."""
    found: list[float] = []
    visit_attention(
        model, ids, lambda maps: None if maps.lambda_ is None else found.append(round(maps.lambda_.mean().item(), 5))
    )
    return found


def prompts_of(tokenizer: Any, length: int, count: int, seed: int) -> list[NeedlePrompt]:
    """Key retrieval with two needles asked for, of one per 20 tokens, at all depths in turn."""
    settings = NeedleSettings(
        length=length, depth="all", needles=length // 20, queries=2, digits=5, samples=count, data_seed=seed
    )
    return make_prompts(settings, count=lambda text: len(tokenizer(text, verbose=False).input_ids))


# ---------------------------------------------------------------------------------------------------------- all runs


def prepare(options: dict[str, Any], settings: Settings) -> None:
    """Write paragraphs of the text, enough of them for half of a training, and prompts for the other half."""
    tokenizer, out = open_source(options["source"]).tokenizer(), Path(options["out"])
    half = settings.steps * settings.batch // 2 * settings.context  # tokens
    paragraphs = [line for line in Path(options["text"]).read_text().splitlines() if len(line) > 200]
    ends = list(accumulate(len(tokenizer(paragraph, verbose=False).input_ids) for paragraph in paragraphs))
    if not ends or ends[-1] < 2 * half:
        sys.exit(f"{options['text']} has fewer than {2 * half:,} tokens in lines of more than 200 characters")
    length = settings.context - 20  # with its answer, a prompt fits into a sequence
    prompts = prompts_of(tokenizer, length, half // settings.context, TRAINING_SEED)
    texts = [{"text": paragraph} for paragraph in paragraphs]
    rows = {"text": texts, "half": texts[: bisect(ends, half) + 1]}
    rows["prompts"] = [{"prompt": prompt.text, "completion": f"{prompt.target}."} for prompt in prompts]
    for name, each in rows.items():
        (out / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in each))


def run(options: dict[str, Any], settings: Settings) -> None:
    """Measure the untrained source, then do the missing runs, seed by seed."""
    out = Path(options["out"])
    digests = {key: sha256(Path(options[key]).read_bytes()).hexdigest() for key in ("text", "held_out")}
    known = {"source": Path(options["source"]).name, **digests, "variants": VARIANTS, **asdict(settings)}
    keep_settings(out, known)
    if not all((out / file).exists() for files in DATA.values() for file in files):
        prepare(options, settings)
    names, seeds = options["variants"], options["seeds"]
    texts = options["data"]
    wanted = [(SOURCE, NOTHING, 0), *((name, data, seed) for seed in seeds for data in texts for name in names)]
    runs = [dict(zip(("name", "data", "seed"), each, strict=True)) for each in wanted]
    do_missing(out, runs, partial(run_one, options, settings), options["jobs"])


# ------------------------------------------------------------------------------------------------------------- report


Measures = dict[str, Callable[[dict[str, Any]], float]]  # what a table or a plot shows of a run, by its heading
OF_TEXT: Measures = {
    "held-out text, nats": lambda run: run["nats"]["held-out text"],
    "Python, nats": lambda run: run["nats"]["Python"],
    "BLiMP, %": lambda run: 100 * run["blimp"],
}
COMPARED = [(SOURCE, None), *((name, SOURCE) for name in VARIANTS if name != SOURCE)]
COMPARED += [(name, PLAIN_HEADS) for name in VARIANTS if name not in (SOURCE, PLAIN_HEADS)]


def of_retrieval(kind: str, length: int, run: dict[str, Any]) -> float:
    """The mean over the depths."""
    return fmean(each[kind] for each in run["retrieval"] if each["length"] == length)


OF_RETRIEVAL: Measures = {
    f"{length} tokens, {kind}": partial(of_retrieval, kind, length) for length in LENGTHS for kind in ("right", "nats")
}


def pairs(runs: list[dict[str, Any]], data: str, name: str, peer: str | None) -> list[list[dict[str, Any]]]:
    """Runs of a variant and of its peer on the same data with the same seeds."""
    own, others = (
        {run["seed"]: run for run in runs if (run["name"], run["data"]) == (each, data)}
        for each in (name, peer or name)
    )
    return [[by_seed[seed] for seed in sorted(own.keys() & others.keys())] for by_seed in (own, others)]


def report(runs: list[dict[str, Any]], measures: Measures) -> str:
    """Means of the source, and differences by seed to it and to plain heads, with 95 % intervals."""
    rows = []
    for data in DATA:
        for name, peer in COMPARED:
            own, others = pairs(runs, data, name, peer)
            if own:
                values = [[list(map(measure, each)) for each in (own, others)] for measure in measures.values()]
                cells = [cell(each, theirs if peer else None) for each, theirs in values]
                trained = "" if data == NOTHING else f"{own[0]['trained']:,}"
                rows.append([f"{name}, {data}", peer or "", trained, str(len(own)), *cells])
    return table(["", "compared with", "trained", "seeds", *measures], rows)


def depth_table(runs: list[dict[str, Any]]) -> str:
    """Retrieval by length and depth after training with prompts: nats, means of the seeds."""
    rows = []
    for length in LENGTHS:
        for name in VARIANTS:
            found = [each for run in pairs(runs, MIXED, name, None)[0] for each in run["retrieval"]]
            here = [each for each in found if each["length"] == length]
            if here:
                cells = (cell((each["nats"] for each in here if each["depth"] == depth), None) for depth in DEPTHS)
                rows.append([name, str(length), *cells])
    return table(["", "tokens", *(f"depth {depth}" for depth in DEPTHS)], rows)


def lambda_table(runs: list[dict[str, Any]]) -> str:
    """What λ became: the smallest, the mean and the largest of the layers, each the mean of the seeds."""
    rows = []
    for data in DATA:
        for name in VARIANTS:
            found = [run["lambda"] for run in pairs(runs, data, name, None)[0] if run["lambda"]]
            if found:
                means = [cell(map(summary, found), None) for summary in (min, fmean, max)]
                rows.append([f"{name}, {data}", str(len(found)), *means])
    return table(["", "seeds", "smallest λ", "mean λ", "largest λ"], rows)


def plot(runs: list[dict[str, Any]], file: Path) -> None:
    """Differences to the source that was trained on the same data, with 95 % intervals, one panel per measure."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    measures = OF_TEXT | {name: measure for name, measure in OF_RETRIEVAL.items() if "nats" in name}
    figure, panels = pyplot.subplots(1, len(measures), figsize=(16, 3.5), layout="constrained", sharey=True)
    others = [name for name in VARIANTS if name != SOURCE]
    names = [name for name in others if all(pairs(runs, data, name, SOURCE)[0] for data in (TEXT, MIXED))]
    for axes, (title, measure) in zip(panels, measures.items(), strict=True):
        for shift, (data, color) in enumerate([(TEXT, "#4292c6"), (MIXED, "#d94801")]):
            compared = [pairs(runs, data, name, SOURCE) for name in names]
            found = [interval([measure(a) - measure(b) for a, b in zip(*each, strict=True)]) for each in compared]
            axes.errorbar(
                [each["mean"] for each in found],
                [row + 0.2 * shift for row in range(len(names))],
                xerr=[each["half_width"] or 0 for each in found],
                fmt="o",
                color=color,
                label=data,
            )
        axes.axvline(0, color="gray", linewidth=1)
        axes.set_title(title, fontsize="small")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[-1].legend(fontsize="x-small")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="Do the missing runs.")
    command.add_argument("source", help="Folder or GGUF file of a Llama.")
    command.add_argument("--text", required=True, help="Text to train on.")
    command.add_argument("--held-out", required=True, help="Text to measure.")
    command.add_argument("--dataset-root", required=True, help="Folder that contains nyu-mll/blimp.")
    command.add_argument("--out", default="continued")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="Default: all.")
    command.add_argument("--data", nargs="+", choices=(TEXT, MIXED), default=[TEXT, MIXED], help="Default: both.")
    command.add_argument("--jobs", type=int, default=2, help="Number of runs at a time, one thread each.")
    for name, value in asdict(Settings()).items():
        command.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    command = commands.add_parser("report", help="Print the tables.")
    command.add_argument("out", type=Path)
    command.add_argument("--plot", type=Path, help="SVG file to write. Default: none.")
    options = vars(parser.parse_args())
    if options["command"] == "run":
        run(options, Settings(**{name: options[name] for name in asdict(Settings())}))
    else:
        runs = runs_of(options["out"])
        print(report(runs, OF_TEXT), report(runs, OF_RETRIEVAL), depth_table(runs), lambda_table(runs), sep="\n\n")
        if options["plot"] is not None:
            plot(runs, options["plot"])


if __name__ == "__main__":
    main()
