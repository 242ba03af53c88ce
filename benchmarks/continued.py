"""Continue training a pretrained Llama, and GDA models expanded from it: what are the added heads good for?

    python benchmarks/continued.py run llama.gguf --text train.txt --held-out test.txt --dataset-root data --out DIR
    python benchmarks/continued.py report DIR

The source, and three models that `gda convert` expands from it and that start with the same output, train on the same
sequences in the same order, attention only and at the same rates. The expanded models have more to train and compute:
a third more query heads in SmolLM2, and λ, which has a rate of its own. "plain heads" has as many more query heads,
which start with the queries of the noise heads, but with an output of their own, at first 0. So it shows what more
heads do without a difference of maps; its new columns of `o_proj` make it the largest, and they have the lower rate.
The models train on text, or on as many sequences of text as of key retrieval (`gda.eval.tasks`; loss on the answers).
Measured are the loss of held-out text and of Python's documentation, key retrieval by length and depth, and BLiMP.
Differences are between runs on the same data with the same seed, which determines the order of the sequences and the
new weights.

Each run is one process, and its result is a line of DIR/runs.jsonl. The same command continues with the missing runs.
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
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from paired_runs import add_run, cell, keep_settings, runs_of, table
from processes import in_child
from split_domains import blimp, spread_ids
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModelForCausalLM, TrainingArguments

import gda
from gda.common.perplexity import perplexity
from gda.common.screen import quiet_transformers
from gda.common.text import python_documentation
from gda.conversion.sources.open import open_source
from gda.eval.tasks.needles import DEPTHS, NeedlePrompt, NeedleSettings, make_prompts
from gda.training.callbacks.fading import FadeCallback
from gda.training.data.sequences import collate, open_sequences
from gda.training.parameters import choose_what_learns, count_learning
from gda.training.trainer import GDATrainer

SOURCE, PLAIN_HEADS = "source", "plain heads"
VARIANTS: dict[str, dict[str, Any] | None] = {  # options of gda.convert
    SOURCE: None,
    PLAIN_HEADS: {},  # the expanded model, made a Llama
    "scalar λ": {},
    "tanh λ": {"lambda_type": "tanh"},
    "head norm": {"head_norm": True},
}
NOTHING, TEXT, MIXED = "nothing", "text", "text + retrieval"
DATA = {NOTHING: (), TEXT: ("text.jsonl",), MIXED: ("half.jsonl", "prompts.jsonl")}
LENGTHS = (128, 256, 512)  # tokens of the retrieval prompts; the last is beyond the training
TRAINING_SEED, TEST_SEED = 1, 0  # of the prompts


@dataclass(frozen=True)
class Settings:
    """Settings of a training, equal for all variants, and how much is measured."""

    steps: int = 120
    batch: int = 2
    context: int = 256
    fade_steps: int = 60  # of the head norm
    learning_rate: float = 2e-4
    lambda_learning_rate: float = 2e-3
    test_tokens: int = 8192  # of each text
    prompts: int = 60  # of each length
    pairs: int = 50  # of each paradigm of BLiMP


# ------------------------------------------------------------------------------------------------------------ one run


def run_one(options: dict[str, Any], settings: Settings, name: str, data: str, seed: int) -> dict[str, Any]:
    """Train one model, and measure it. Without data, it is only measured."""
    torch.set_num_threads(options["threads"])
    scratch = Path(options["out"]) / "scratch"
    model, tokenizer = load(name, options["source"], scratch, seed)
    begun = time.perf_counter()
    files = [Path(options["out"]) / file for file in DATA[data]]
    losses = train(model, tokenizer, settings, files, seed, scratch) if files else []
    seconds = time.perf_counter() - begun
    model.eval()
    texts = {"held-out text": Path(options["held_out"]).read_text(), "Python": python_documentation()}
    return {
        "name": name,
        "data": data,
        "seed": seed,
        "seconds": round(seconds),
        "parameters": model.num_parameters(),
        "trained": count_learning(model),
        "losses": losses,
        "nats": {
            key: math.log(perplexity(model, spread_ids(tokenizer, text, settings.test_tokens)))
            for key, text in texts.items()
        },
        "retrieval": [found for length in LENGTHS for found in retrieval(model, tokenizer, length, settings.prompts)],
        "blimp": blimp(model, tokenizer, options["dataset_root"], settings.pairs),
    }


def load(name: str, source: str, scratch: Path, seed: int) -> tuple[Any, Any]:
    """The untrained model of a variant, in float32, and the tokenizer."""
    opened = open_source(source)
    if (options := VARIANTS[name]) is None:
        return llama(opened.config, opened.load().state_dict()), opened.tokenizer()
    folder = scratch / name
    gda.convert(source, folder, verify=False, overwrite=True, seed=seed, **options)
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
    """For each depth, the share of numbers that are right in whole, and nats per token of the right ones."""
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


def prompts_of(tokenizer: Any, length: int, count: int, seed: int) -> list[NeedlePrompt]:
    """Key retrieval with one needle asked for, of one per 32 tokens, at all depths in turn."""
    settings = NeedleSettings(
        length=length, depth="all", needles=length // 32, queries=1, digits=4, samples=count, data_seed=seed
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
    length = settings.context - 16  # with its answer, a prompt fits into a sequence
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
    wanted = [(SOURCE, NOTHING, 0)]
    wanted += [(name, data, seed) for seed in options["seeds"] for data in (TEXT, MIXED) for name in VARIANTS]
    finished = {(each["name"], each["data"], each["seed"]) for each in runs_of(out)}
    for number, each in enumerate(wanted, 1):
        if each in finished:
            continue
        name, data, seed = each
        print(f"{number} of {len(wanted)}: {name}, trained on {data}, seed {seed}", flush=True)
        try:
            add_run(out, in_child(run_one, options, settings, *each))
        except Exception as error:
            sys.exit(f"failed: {error!r}; the same command continues here")


# ------------------------------------------------------------------------------------------------------------- report


def measures() -> dict[str, Callable[[dict[str, Any]], float]]:
    """What the table shows of a run, by the head of its column."""
    found: dict[str, Callable[[dict[str, Any]], float]] = {
        "held-out text, nats": lambda run: run["nats"]["held-out text"],
        "Python, nats": lambda run: run["nats"]["Python"],
        "BLiMP, %": lambda run: 100 * run["blimp"],
    }
    for length in LENGTHS:
        found[f"{length} tokens, nats"] = partial(mean_over_depths, "nats", length)
        found[f"{length} tokens, right"] = partial(mean_over_depths, "right", length)
    return found


def mean_over_depths(kind: str, length: int, run: dict[str, Any]) -> float:
    return fmean(each[kind] for each in run["retrieval"] if each["length"] == length)


def report(folder: Path) -> str:
    """For each data set, means of the trained source, and differences by seed to it and to plain heads.

    With 95 % intervals.
    """
    runs, rows = runs_of(folder), []
    compared = [(SOURCE, None), *((name, SOURCE) for name in VARIANTS if name != SOURCE)]
    compared += [(name, PLAIN_HEADS) for name in VARIANTS if name not in (SOURCE, PLAIN_HEADS)]
    for data in DATA:
        own_data = [run for run in runs if run["data"] == data]
        by_name = {name: {run["seed"]: run for run in own_data if run["name"] == name} for name in VARIANTS}
        for name, peer in compared:
            own, others = by_name[name], by_name[peer or name]
            seeds = sorted(own.keys() & others.keys())
            if not seeds:
                continue
            row = [f"{name}, {data}", peer or "", f"{own[seeds[0]]['trained']:,}", str(len(seeds))]
            for measure in measures().values():
                values, theirs = ([measure(each[seed]) for seed in seeds] for each in (own, others))
                row.append(cell(values, theirs if peer else None))
            rows.append(row)
    return table(["", "compared with", "trained", "seeds", *measures()], rows)


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
    command.add_argument("--threads", type=int, default=torch.get_num_threads())
    for name, value in asdict(Settings()).items():
        command.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    command = commands.add_parser("report", help="Print the table.")
    command.add_argument("out", type=Path)
    options = vars(parser.parse_args())
    if options["command"] == "run":
        run(options, Settings(**{name: options[name] for name in asdict(Settings())}))
    else:
        print(report(options["out"]))


if __name__ == "__main__":
    main()
