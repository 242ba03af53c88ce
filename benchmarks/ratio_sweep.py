"""Measure the loss by ratio of signal to noise heads: tiny models from scratch, with equal FLOPs and equal data.

    python benchmarks/ratio_sweep.py sweep --text wikitext2_valid.txt --held-out wikitext2_test.txt

For every seed, transformers' Trainer trains a Transformer (transformers' Llama) and GDA 1:1 to 7:1. All models have the
same width, depth and KV heads, and 24 query heads or the nearest number that the ratio allows. FLOPs differ (4:1 has 25
query heads, and fewer signal heads make a smaller output projection); the width of the MLP makes up for this, so that
all models are within 0.5 %. All models of one seed read the same rows in the same order: text, and as many rows of the
retrieval tasks of `gda eval`, with a loss on the answers only. The results are the loss on held-out text and the share
of correct answer tokens in held-out rows.

Each finished run is a file in the folder. The same command continues with the missing runs; table and plot show the
finished runs and say how many there are. A run uses one thread: --jobs 2 uses two cores.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gda.common.files import read_json, write_json

RATIOS: dict[str, tuple[int, int]] = {  # signal and noise heads
    "Transformer": (24, 0),
    "GDA 1:1": (12, 12),
    "GDA 2:1": (16, 8),
    "GDA 3:1": (18, 6),
    "GDA 4:1": (20, 5),
    "GDA 5:1": (20, 4),
    "GDA 7:1": (21, 3),
}
VOCABULARY, HIDDEN, LAYERS, HEAD_DIM, CONTEXT = 2048, 96, 4, 16, 128
BASELINE_MLP = 256
# What is to be found in a row, beside text: the value of a key in a list of so many pairs (associative recall), and how
# a sequence of made-up words goes on, of which a part is given again (copying).
TASKS = ("4 pairs", "8 pairs", "copying")
TESTS = 64  # rows of each task


def flops(signal: int, noise: int, mlp: int) -> int:
    """FLOPs per token of the matrix products of a forward pass: the mean over a sequence, half of whose scores are
    masked.
    """
    heads = signal + noise
    projections = HIDDEN * HEAD_DIM * (heads + 2 + signal)  # queries, one KV head, output
    attention = 2 * heads * HEAD_DIM * CONTEXT // 2
    return 2 * (LAYERS * (projections + attention + 3 * HIDDEN * mlp) + HIDDEN * VOCABULARY)


def mlp_of(signal: int, noise: int) -> int:
    """The width of the MLP, a multiple of 4, that gives the FLOPs of the Transformer."""
    wanted = flops(*RATIOS["Transformer"], BASELINE_MLP)
    return min(range(4, 4 * BASELINE_MLP, 4), key=lambda mlp: abs(flops(signal, noise, mlp) - wanted))


def build(name: str, seed: int) -> Any:
    """An untrained model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gda import GDAConfig, GDAForCausalLM

    signal, noise = RATIOS[name]
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": mlp_of(signal, noise),
        "num_hidden_layers": LAYERS,
        "num_attention_heads": signal + noise,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    if not noise:
        return LlamaForCausalLM(LlamaConfig(**fields))
    # As in the Differential Transformer: a norm of each head's output, λ by layer from the depth schedule.
    return GDAForCausalLM(GDAConfig(**fields, num_noise_heads=noise, head_norm=True))


# ------------------------------------------------------------------------------------------------------------- data


def prepare(text: Path | None, held_out: Path | None, folder: Path) -> None:
    """Write a tokenizer of the text and the tasks, and both texts as sequences of ids, to `folder`/data.pt."""
    import torch
    from ratio_tasks import both_texts, byte_pair_encoding
    from safetensors.torch import save_file

    read, kept = both_texts(text, held_out)
    lists = [document["text"] + document["prefix"] for document in documents("8 pairs", 200, seed=0)]
    tokenizer = byte_pair_encoding([read, *lists], VOCABULARY)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    windows = {}
    for name, each in (("text", read), ("held_out", kept)):
        ids = tokenizer.encode(each).ids
        windows[name] = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    save_file(windows, folder / "data.safetensors")


def documents(task: str, samples: int, seed: int) -> list[dict[str, Any]]:
    """Documents of a task of `gda eval`: `text` and `prefix`, followed by `target`."""
    from gda.eval.tasks import copying, mqar

    if task == "copying":
        return copying.make_documents(
            copying.CopySettings(length=24, copied=16, samples=samples, data_seed=seed), count=lambda _: 1
        )
    pairs = int(task.split()[0])
    return mqar.make_documents(mqar.MQARSettings(pairs=pairs, queries=pairs, samples=samples, data_seed=seed))


def task_rows(tokenizer: Any, task: str, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Ids and labels (−100 except for answers) of rows of CONTEXT tokens, filled with complete examples."""
    rows: list[tuple[list[int], list[int]]] = []
    ids: list[int] = []
    labels: list[int] = []
    for more_ids, more_labels in _examples(tokenizer, documents(task, 4 * count, seed)):
        if len(ids) + len(more_ids) > CONTEXT:
            room = CONTEXT - len(ids)
            rows.append((ids + [0] * room, labels + [-100] * room))
            ids, labels = [], []
        ids, labels = ids + more_ids[:CONTEXT], labels + more_labels[:CONTEXT]
    return rows[:count]


def _examples(tokenizer: Any, documents: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each text with all of its questions."""
    examples: dict[str, tuple[list[int], list[int]]] = {}
    for document in documents:
        is_first = document["text"] not in examples
        ids, labels = examples.setdefault(document["text"], ([], []))
        key = document["prefix"].rsplit(", ", 1)[-1]
        for part, is_asked in ((document["text"] + key if is_first else f", {key}", False), (document["target"], True)):
            added = tokenizer.encode(part).ids
            ids.extend(added)
            labels.extend(added if is_asked else [-100] * len(added))
    return [(ids + tokenizer.encode("\n").ids, [*labels, -100]) for ids, labels in examples.values()]


# -------------------------------------------------------------------------------------------------------- one run


def run_one(name: str, seed: int, steps: int, batch: int, learning_rate: float, folder: Path) -> None:
    """Train and measure one model, and write its file."""
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import Trainer, TrainingArguments
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    windows = load_file(folder / "data.safetensors")
    rows = _training_rows(tokenizer, windows["text"], steps * batch, seed)
    model = build(name, seed)
    arguments = TrainingArguments(
        output_dir=str(folder / "scratch"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.1,
        adam_beta2=0.95,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=max(1, steps // 50),
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.log = lambda logs, *_: trainer.state.log_history.append({**logs, "step": trainer.state.global_step})
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    signal, noise = RATIOS[name]
    result = {
        "name": name,
        "seed": seed,
        "steps": steps,
        "tokens": steps * batch * CONTEXT,
        "learning_rate": learning_rate,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "intermediate_size": mlp_of(signal, noise),
        "flops": flops(signal, noise, mlp_of(signal, noise)),
        "seconds": seconds,
        "loss": text_loss(model, windows["held_out"]),
        "right": {task: share_right(model, tokenizer, task) for task in TASKS},
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    file = folder / "runs" / f"{_slug(name)}-{seed}.json"
    file.parent.mkdir(exist_ok=True)
    write_json(file, result)


def _training_rows(tokenizer: Any, text: Any, count: int, seed: int) -> list[dict[str, Any]]:
    """Text, repeated as often as needed, and as many rows of the tasks."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    passes = -(-count // 2 // len(text))
    order = torch.cat([torch.randperm(len(text), generator=generator) for _ in range(passes)])[: count // 2]
    rows = [{"input_ids": text[i], "labels": text[i]} for i in order]
    each = -(-(count - len(rows)) // len(TASKS))
    for task in TASKS:
        for ids, labels in task_rows(tokenizer, task, each, 1000 + seed)[: count - len(rows)]:
            rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    return rows  # the Trainer shuffles them, by the same seed


def text_loss(model: Any, windows: Any, limit: int = 512) -> float:
    """Mean over the tokens of the first sequences, in nats."""
    import torch

    model.eval()
    with torch.no_grad():
        losses = [model(ids, labels=ids).loss.item() for ids in windows[:limit].split(16)]
    return statistics.fmean(losses)


def share_right(model: Any, tokenizer: Any, task: str) -> float:
    """Share of the requested tokens that the model ranks first."""
    import torch

    ids, labels = (torch.tensor(each) for each in zip(*task_rows(tokenizer, task, TESTS, seed=1), strict=True))
    with torch.no_grad():
        chosen = torch.cat([model(each).logits[:, :-1].argmax(-1) for each in ids.split(16)])
    asked = labels[:, 1:] != -100
    return (chosen == labels[:, 1:])[asked].float().mean().item()


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-").replace(":", "-")


# ---------------------------------------------------------------------------------------------------------- the sweep


def sweep(arguments: argparse.Namespace) -> None:
    """Run the missing trainings, `jobs` at a time, seed by seed, so that finished ones can be compared."""
    folder = arguments.out
    settings = {key: str(getattr(arguments, key)) for key in ("text", "held_out", "steps", "batch", "learning_rate")}
    output = folder / "settings.json"
    if output.exists() and (before := read_json(output)) != settings:
        sys.exit(f"{output} has {before}, not {settings}; choose another --out")
    if not output.exists():
        prepare(arguments.text, arguments.held_out, folder)
        write_json(output, settings)
    wanted = [(name, seed) for seed in range(arguments.seeds) for name in RATIOS]
    missing = [each for each in wanted if not (folder / "runs" / f"{_slug(each[0])}-{each[1]}.json").exists()]
    running: list[subprocess.Popen[bytes]] = []
    failed = 0
    for number, (name, seed) in enumerate(missing, 1):
        while len(running) >= arguments.jobs:
            time.sleep(0.5)
            failed += sum(process.poll() not in (None, 0) for process in running)
            running = [process for process in running if process.poll() is None]
        print(f"{len(wanted) - len(missing) + number} of {len(wanted)}: {name}, seed {seed}", flush=True)
        command = [sys.executable, __file__, "one", "--name", name, "--seed", str(seed), "--out", str(folder)]
        command += ["--steps", str(arguments.steps), "--batch", str(arguments.batch)]
        command += ["--learning-rate", str(arguments.learning_rate)]
        running.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL))
    failed += sum(process.wait() != 0 for process in running)
    report(folder, arguments.seeds)
    if failed:
        sys.exit(f"{failed} runs failed; the same command tries them again")


def report(folder: Path, seeds: int) -> None:
    """The table, printed and in ratio_sweep.md, and the plot ratio_sweep.svg, of the runs that have finished."""
    results = [read_json(file) for file in sorted((folder / "runs").glob("*.json"))]
    by_name = {name: [each for each in results if each["name"] == name] for name in RATIOS}
    baseline = {each["seed"]: each["loss"] for each in by_name["Transformer"]}
    lines = [
        f"{len(results)} of {len(RATIOS) * seeds} runs have finished.",
        "",
        "| | MLP | parameters | FLOPs | runs | loss | ± | difference by seed | right: " + ", ".join(TASKS) + " |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    reference = flops(*RATIOS["Transformer"], BASELINE_MLP)
    for name, runs in by_name.items():
        if not runs:
            continue
        losses = [run["loss"] for run in runs]
        paired = [run["loss"] - baseline[run["seed"]] for run in runs if run["seed"] in baseline]
        right = [f"{statistics.fmean(run['right'][task] for run in runs):.3f}" for task in TASKS]
        lines.append(
            f"| {name} | {runs[0]['intermediate_size']} | {runs[0]['parameters']:,} | "
            f"{runs[0]['flops'] / reference:.3f} | {len(runs)} | {statistics.fmean(losses):.4f} | "
            f"{statistics.stdev(losses) if len(losses) > 1 else 0:.4f} | "
            f"{', '.join(f'{each:+.4f}' for each in paired)} | {', '.join(right)} |"
        )
    table = "\n".join(lines)
    (folder / "ratio_sweep.md").write_text(table + "\n")
    print(table)
    plot(by_name, folder / "ratio_sweep.svg")


def plot(by_name: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Loss and recall against the ratio: a dot per run, and the Transformer as a band."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    names = [name for name in RATIOS if name != "Transformer" and by_name[name]]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = ((left, "loss on unread text, nats a token", lambda run: run["loss"]),)
    panels += ((right, "copied tokens right", lambda run: run["right"]["copying"]),)
    for axes, label, value in panels:
        for place, name in enumerate(names):
            values = [value(run) for run in by_name[name]]
            axes.plot([place] * len(values), values, "o", color="#1f77b4", alpha=0.5)
            axes.plot([place - 0.2, place + 0.2], [statistics.fmean(values)] * 2, color="#1f77b4", linewidth=2)
        if values := [value(run) for run in by_name["Transformer"]]:
            axes.axhspan(min(values), max(values), color="#ff7f0e", alpha=0.2)
            axes.axhline(statistics.fmean(values), color="#ff7f0e", label="Transformer")
            axes.legend()
        axes.set_xticks(range(len(names)), [name.removeprefix("GDA ") for name in names])
        axes.set_xlabel("signal : noise heads")
        axes.set_ylabel(label)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("sweep", "one", "report"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, default=Path("ratio-sweep"))
        command.add_argument("--steps", type=int, default=600)
        command.add_argument("--batch", type=int, default=16)
        command.add_argument("--learning-rate", type=float, default=3e-3)
        command.add_argument("--seeds", type=int, default=3)
        if name == "sweep":
            command.add_argument("--text", type=Path, help="Training text. Default: Python's documentation.")
            command.add_argument(
                "--held-out", type=Path, help="Text to measure the loss on. Default: the last tenth of --text."
            )
            command.add_argument("--jobs", type=int, default=2, help="Number of runs at a time, one thread each.")
        elif name == "one":
            command.add_argument("--name", choices=RATIOS, required=True)
            command.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.command == "sweep":
        sweep(arguments)
    elif arguments.command == "report":
        report(arguments.out, arguments.seeds)
    else:
        of_run = (arguments.name, arguments.seed, arguments.steps, arguments.batch, arguments.learning_rate)
        run_one(*of_run, arguments.out)


if __name__ == "__main__":
    main()
