"""Signal : noise ratios against a Transformer: small models from scratch, equal FLOPs and data, paired by seed.

    python benchmarks/ratios.py run --text wikitext2_valid.txt --held-out wikitext2_test.txt --out DIR
    python benchmarks/ratios.py report DIR

A run trains four models of a variant: on associative recall, copying, key retrieval (ratio_tasks.py) and text. They
read the same rows in the same order as the other variants of the seed. The variants have the same hidden size, layers,
head_dim and learning rate; the width of the MLP makes up for the FLOPs of their heads.
"paired" is the layout of the GDA paper: separate keys for the noise, values twice as wide, and a norm of each head.
"shared" and "sigmoid" are the shared layout, with one λ per layer and with one λ per token and signal head.
Each is compared with a Transformer whose KV cache is as large. A paired model without the norm shows what it does.

Steps, learning rate and initialization were chosen with the Transformer alone, with seeds -1 and -2, so that it learns
the tasks but not perfectly: recall 0.65 and 0.66, copying 0.88 and 0.95, retrieval 0.62 and 0.70, text 4.00 and 3.96
nats. Who knows the values of the right list, but not their keys, reaches 0.29 in recall and 0.42 in retrieval. Models
learn where things are in rows of this length; rows of twice the length show that.

A run takes one thread, and its result is a line of DIR/runs.jsonl. The same command continues with the missing runs.
The first seeds are complete first, so that a report can be made at any time.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from equal_flops import Heads, Shape, build, flops, mlp_width
from paired_runs import cell, do_missing, keep_settings, runs_of, table
from ratio_tasks import (
    DRAWN,
    IGNORED,
    TEXT_VOCABULARY,
    Copying,
    Needles,
    Recall,
    Rows,
    Task,
    both_texts,
    english,
    prepare_text,
    task_rows,
    text_rows,
)
from torch import Tensor
from torch.nn.functional import cross_entropy

from gda.eval.attention.analysis import LayerAttention, visit_attention

TRANSFORMER, TRANSFORMER_2, NO_NORM = "Transformer", "Transformer 2 KV", "paired 3:1, no norm"
PAIRED = {"kv_layout": "paired", "head_norm": True, "num_key_value_heads": 2}
SIGMOID = {"lambda_type": "sigmoid"}
HEADS = {"1:1": (4, 4), "3:1": (6, 2), "4:1": (8, 2), "7:1": (7, 1)}
VARIANTS = {TRANSFORMER: Heads(8, 0, {}), TRANSFORMER_2: Heads(8, 0, {"num_key_value_heads": 2})} | {
    f"{kind} {ratio}": Heads(*heads, fields)
    for kind, fields in (("paired", PAIRED), ("shared", {}), ("sigmoid", SIGMOID))
    for ratio, heads in HEADS.items()
}
VARIANTS[NO_NORM] = Heads(*HEADS["3:1"], PAIRED | {"head_norm": False})
RATIOS_COMPARED = [
    (f"{kind} {ratio}", f"{kind} {other}")
    for ratio, other in (("3:1", "1:1"), ("4:1", "3:1"))
    for kind in ("paired", "shared", "sigmoid")
]
SHAPE = Shape(hidden=64, layers=2, head_dim=32, kv_heads=1, length=64)
MLP = 256  # of the Transformer

# Rows as long as those of the training, and rows of twice the length, which training does not have.
TASKS: dict[str, Task] = {"recall": Recall(4, 2, 3), "copying": Copying(32, 24, 1), "retrieval": Needles(32, 3, 2, 2)}
LONGER: dict[str, Task] = {"recall": Recall(8, 4, 3), "copying": Copying(64, 48, 1), "retrieval": Needles(64, 6, 3, 2)}
TEXT = "text"
TESTS, TESTS_BETWEEN = 512, 128  # rows of each task after the training, and during it
SEED_OF_TESTS = 1
TEXT_FILE = "text.safetensors"
Results = dict[str, dict[int, dict[str, Any]]]  # runs by variant and seed


@dataclass(frozen=True)
class Training:
    """Settings of a training, equal for all variants."""

    steps: int = 500  # of each of the four models
    batch: int = 24
    learning_rate: float = 6e-3
    warm_up: float = 0.05  # share of the steps
    initializer_range: float = 0.08  # 1/√hidden is 0.125
    reports: int = 10  # measurements during the training


def untrained(name: str, training: Training, seed: int) -> Any:
    """An untrained model."""
    return build(
        SHAPE,
        VARIANTS[name],
        mlp_of(name),
        seed,
        vocab_size=DRAWN + len(english()) + TEXT_VOCABULARY,
        max_position_embeddings=2 * SHAPE.length,
        initializer_range=training.initializer_range,
    )


def mlp_of(name: str) -> int:
    """The width of the MLP that gives the FLOPs of the Transformer."""
    return mlp_width(SHAPE, VARIANTS[name], flops(SHAPE, VARIANTS[TRANSFORMER], MLP))


# ------------------------------------------------------------------------------------------------------------ one run


def run_one(training: Training, folder: Path, *, name: str, seed: int) -> dict[str, Any]:
    """Train and measure a model for each task."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "mlp": mlp_of(name),
        "flops": flops(SHAPE, VARIANTS[name], mlp_of(name)) / flops(SHAPE, VARIANTS[TRANSFORMER], MLP),
    }
    begun = time.perf_counter()
    for task in (*TASKS, TEXT):
        model, history = untrained(name, training, seed), []
        result["parameters"] = model.num_parameters()
        tests, longer = tests_of(folder, task)
        some = Rows(*(part[:TESTS_BETWEEN] for part in tests))
        for step in train(model, rows_of(folder, task, training.steps * training.batch, "text", 1000 + seed), training):
            if step % max(1, training.steps // training.reports) == 0:
                history.append({"step": step, **measured(model, some)})
        result[task] = {"test": measured(model, tests), "longer": measured(model, longer), "history": history}
        if task == "recall":
            result["attention"] = attention_of(model, tests)
    return result | {"seconds": round(time.perf_counter() - begun)}


@cache
def tests_of(folder: Path, task: str) -> tuple[Rows, Rows]:
    """Rows to measure a task on: as long as those of the training, and twice as long."""
    shorter = rows_of(folder, task, TESTS, "held_out", SEED_OF_TESTS)
    return shorter, rows_of(folder, task, TESTS, "held_out", SEED_OF_TESTS, times=2)


def rows_of(folder: Path, task: str, count: int, text: str, seed: int, times: int = 1) -> Rows:
    """`count` rows of a task, `times` as long as those of the training; the text is that named `text` in its file."""
    length = times * SHAPE.length
    if task == TEXT:
        return text_rows(folder / TEXT_FILE, text, length, count, seed)
    return task_rows((TASKS if times == 1 else LONGER)[task], length, count, seed)


def train(model: Any, rows: Rows, training: Training) -> Iterator[int]:
    """Train on `batch` rows per step; yield the number of steps done after each."""
    optimizer = torch.optim.AdamW(model.parameters(), training.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        batch = Rows(*(part[step * training.batch : (step + 1) * training.batch] for part in rows))
        loss = cross_entropy(*answers_of(model, batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step + 1


def learning_rate(training: Training, step: int) -> float:
    """Linear warm-up, then half a cosine down to a tenth of the peak."""
    rising = min(1.0, (step + 1) / (training.warm_up * training.steps))
    return training.learning_rate * rising * (0.55 + 0.45 * math.cos(math.pi * step / training.steps))


def answers_of(model: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    """Logits (N, vocabulary) and ids (N) of what is asked for."""
    states = model.model(rows.ids.long(), use_cache=False).last_hidden_state[:, :-1]
    labels = rows.labels[:, 1:].long()
    is_asked = labels != IGNORED
    return model.lm_head(states[is_asked]), labels[is_asked]


@torch.no_grad()
def measured(model: Any, rows: Rows) -> dict[str, float]:
    """Loss in nats, and share of the answers that the model ranks first."""
    parts = [answers_of(model, Rows(*part)) for part in zip(rows.ids.split(128), rows.labels.split(128), strict=True)]
    logits, wanted = (torch.cat(each) for each in zip(*parts, strict=True))
    right = (logits.argmax(-1) == wanted).float().mean()
    return {"loss": round(cross_entropy(logits, wanted).item(), 5), "accuracy": round(right.item(), 5)}


def attention_of(model: Any, recall: Rows, count: int = 32) -> list[dict[str, float]]:
    """For each layer, the share of attention on the answer, the value after the first of two equal keys, at the second.

    The share in the signal maps, in the noise maps, and in the differences that the layer attends by, whose rows have
    negative entries: the entry of the answer relative to the magnitude of its row. And λ, which is negative where the
    layer adds the noise map. Means over the heads and the questions of `count` rows.
    """
    found: dict[int, list[dict[str, float]]] = {layer: [] for layer in range(SHAPE.layers)}
    for ids, labels in zip(recall.ids[:count].long(), recall.labels[:count].long(), strict=True):
        asking = (labels[1:] != IGNORED).nonzero()[:, 0]
        # Another example of the row can have the same key; so the answer follows the last one before the question.
        answers = torch.stack([(ids[:at] == ids[at]).nonzero()[-1, 0] + 1 for at in asking])

        def share(maps: Tensor, asking: Tensor = asking, answers: Tensor = answers) -> float:
            rows = maps[:, asking]  # (H, Q, T)
            return (rows[:, range(len(asking)), answers] / rows.abs().sum(-1)).mean().item()

        def read(maps: LayerAttention, asking: Tensor = asking) -> None:
            shares = {"signal": share(maps.signal), "difference": share(maps.difference)}
            if maps.noise is not None and maps.lambda_ is not None:
                lambdas = maps.lambda_.expand(len(maps.signal), len(maps.signal[0]))  # (H, T)
                shares |= {"noise": share(maps.noise), "lambda": lambdas[:, asking].mean().item()}
            found[maps.layer].append(shares)

        visit_attention(model, ids, read)
    return [{key: round(fmean(each[key] for each in rows), 5) for key in rows[0]} for rows in found.values()]


# ---------------------------------------------------------------------------------------------------------- all runs


def run(options: argparse.Namespace, training: Training) -> None:
    """Do the missing runs, `jobs` at a time, seed by seed."""
    folder: Path = options.out
    texts = both_texts(options.text, options.held_out)
    settings: dict[str, Any] = {"texts": [sha256(text.encode()).hexdigest() for text in texts], **asdict(training)}
    settings |= {"shape": asdict(SHAPE), "mlp": MLP, "variants": str(VARIANTS), "tasks": f"{TASKS}, {LONGER}"}
    settings["tests"] = [TESTS, TESTS_BETWEEN, SEED_OF_TESTS]
    keep_settings(folder, settings)
    if not (folder / TEXT_FILE).exists():
        prepare_text(*texts, folder / TEXT_FILE)
    wanted = [{"name": name, "seed": seed} for seed in options.seeds for name in options.variants or VARIANTS]
    do_missing(folder, wanted, partial(run_one, training, folder), options.jobs)


# ------------------------------------------------------------------------------------------------------------- report


def results_of(folder: Path) -> Results:
    """The finished runs by variant and seed, of the seeds that all of these variants have finished."""
    runs = runs_of(folder)
    by_name = {name: {each["seed"]: each for each in runs if each["name"] == name} for name in VARIANTS}
    found = {name: by_seed for name, by_seed in by_name.items() if by_seed}
    complete = sorted(set.intersection(*map(set, found.values()))) if found else []
    if not complete:
        sys.exit(f"{folder}: no seed is complete; `ratios.py run` continues")
    return {name: {seed: by_seed[seed] for seed in complete} for name, by_seed in found.items()}


def peer_of(name: str) -> str:
    """The Transformer with as many KV heads."""
    return TRANSFORMER if VARIANTS[name].fields.get("num_key_value_heads", SHAPE.kv_heads) == 1 else TRANSFORMER_2


def report(results: Results, part: str) -> str:
    """Means of the Transformers, and mean differences between runs of the same seed, with 95 % intervals.

    `part`: test or longer.
    """
    kinds, rows = dict.fromkeys(TASKS, "accuracy") | {TEXT: "loss"}, []
    compared = [(name, peer_of(name) if VARIANTS[name].noise else None) for name in results]
    for name, peer in [*compared, ("paired 3:1", NO_NORM), *RATIOS_COMPARED]:
        if name not in results or (peer is not None and peer not in results):
            continue
        row = [name, peer or "", str(mlp_of(name)), str(len(results[name]))]
        for task, kind in kinds.items():
            values = {each: [run[task][part][kind] for run in results[each].values()] for each in (name, peer) if each}
            row.append(cell(values[name], values.get(peer)))
        rows.append(row)
    return table(["", "compared with", "MLP", "seeds", *(f"{task}, {kind}" for task, kind in kinds.items())], rows)


def attention_table(results: Results) -> str:
    """What the heads of each layer attend to: means over seeds."""
    kinds, rows = ("signal", "noise", "difference", "lambda"), []
    for name, runs in results.items():
        for layer in range(SHAPE.layers):
            found = [each["attention"][layer] for each in runs.values()]
            means = [cell((each[kind] for each in found), None) if kind in found[0] else "" for kind in kinds]
            rows.append([name, str(layer), *means])
    return table(["", "layer", *kinds], rows)


def plot(results: Results, file: Path) -> None:
    """Accuracy against steps, one panel per task, one line per variant (mean over seeds)."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    colors = {"": "#d94801", "2 KV": "#fdae6b", "1:1": "#9ecae1", "3:1": "#4292c6", "4:1": "#08519c", "7:1": "#08306b"}
    colors["3:1, no norm"] = "#238b45"
    styles = {"Transformer": "-", "paired": "-", "shared": "--", "sigmoid": ":"}
    figure, panels = pyplot.subplots(1, len(TASKS) + 1, figsize=(16, 4), layout="constrained")
    for axes, task in zip(panels, [*TASKS, TEXT], strict=True):
        kind = "loss" if task == TEXT else "accuracy"
        for name, runs in results.items():
            curves = [[point[kind] for point in each[task]["history"]] for each in runs.values()]
            steps = [point["step"] for point in next(iter(runs.values()))[task]["history"]]
            means = [fmean(values) for values in zip(*curves, strict=True)]
            layout, _, ratio = name.partition(" ")
            width = 1 if VARIANTS[name].noise else 2
            axes.plot(steps, means, styles[layout], color=colors[ratio], label=name, linewidth=width)
        axes.set_title(task)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token" if kind == "loss" else kind)
    panels[-1].legend(fontsize="x-small", ncols=2)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="Train the missing models.")
    command.add_argument("--out", type=Path, default=Path("ratios"))
    command.add_argument("--text", type=Path, help="Training text. Default: Python's documentation.")
    command.add_argument("--held-out", type=Path, help="Text for the loss. Default: the last tenth of --text.")
    command.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    command.add_argument("--variants", nargs="+", choices=VARIANTS, help="Default: all.")
    command.add_argument("--steps", type=int, default=Training.steps)
    command.add_argument("--jobs", type=int, default=2, help="Number of runs at a time, one thread each.")
    command = commands.add_parser("report", help="Print the tables.")
    command.add_argument("out", type=Path)
    command.add_argument("--plot", type=Path, help="SVG file to write. Default: none.")
    options = parser.parse_args()
    if options.command == "run":
        run(options, replace(Training(), steps=options.steps))
    else:
        results = results_of(options.out)
        print(report(results, "test"), report(results, "longer"), attention_table(results), sep="\n\n")
        if options.plot is not None:
            plot(results, options.plot)


if __name__ == "__main__":
    main()
