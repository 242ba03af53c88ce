"""Measure how much of the loss of a split is recovered by training.

    python benchmarks/recovery.py ./llama ./llama-split --data valid.txt --test test.txt

The split model and its source are trained on the same sequences in the same order with the same settings, and measured
before and after on held-out text. The source is the control: what both learn from the text is not recovery. The gap is
the difference of the two losses, in nats per token; the ratio of the perplexities is its exponential.

With --teacher, the split learns from predictions: those of the source after its own training (`control`), or those of
the untrained source (`source`). In the latter case the untrained source is also the control, because it cannot learn
from itself.

Each training runs in its own process, so that its peak memory can be measured, and writes its result to a file in
--out. The same command continues with the missing runs.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from processes import in_child
from rich.console import Console
from rich.table import Table

from gda.common.files import read_json, write_json

MODELS = ("source", "split")


def train_one(name: str, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train the model in `folder`, measure it, and return the result."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

    import gda  # noqa: F401
    from gda.common.screen import quiet_transformers
    from gda.training.callbacks.layer_log import LayerLog
    from gda.training.data.sequences import collate, open_sequences
    from gda.training.distillation import Distillation
    from gda.training.parameters import choose_what_learns, count_learning
    from gda.training.report import peak_memory
    from gda.training.trainer import GDATrainer

    out, context = Path(options["out"]), options["context"]
    control = {"source": options["source"], "control": str(out / "control"), None: None}[options["teacher"]]
    teacher = control if name == "split" else None
    steps = 0 if name == "source" and options["teacher"] == "source" else options["steps"]
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        sequences = open_sequences(
            [options["data"]],
            tokenizer,
            context=context,
            text_field="text",
            streaming=False,
            seed=options["seed"],
            vocab_size=model.config.vocab_size,
            scratch=out,
        )
        test = tokenizer(Path(options["test"]).read_text(), add_special_tokens=False, verbose=False).input_ids
        ids = torch.tensor(test[: options["test_tokens"]])
        before = loss_of(model, ids, context)
        learner = choose_what_learns(model, options["train"], folder, 16)
        arguments = TrainingArguments(
            output_dir=str(out / "scratch"),
            max_steps=math.ceil(sequences.count / options["batch"]) if steps is None else steps,
            per_device_train_batch_size=options["batch"],
            learning_rate=options["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=options["warmup"],
            weight_decay=0.0,
            seed=options["seed"],
            bf16=options["bf16"],
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=5,
            include_num_input_tokens_seen="all",
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
        )
        trainer = GDATrainer(
            learner,
            arguments,
            train_dataset=sequences.rows,
            data_collator=collate,
            lambda_learning_rate=options["lambda_learning_rate"],
            layer_log=LayerLog(out / f"{name}.jsonl") if name == "split" else None,
            distillation=Distillation.load(teacher, model, weight=options["teacher_weight"]) if teacher else None,
        )
        begun = time.perf_counter()
        if steps != 0:
            trainer.train()
        seconds = time.perf_counter() - begun
        after = before if steps == 0 else loss_of(model, ids, context)
        if name == "source" and options["teacher"] == "control":
            model.save_pretrained(out / "control")
            tokenizer.save_pretrained(out / "control")
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "learning": count_learning(model),
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "test_tokens": len(ids),
        "minutes": seconds / 60,
        "tokens_per_second": trainer.throughput.tokens_per_second,
        "peak_memory": peak_memory(arguments.device),
        "before": before,
        "after": after,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def loss_of(model: Any, ids: Any, context: int) -> float:
    """Nats per token."""
    from gda.common.perplexity import perplexity

    model.eval()
    return math.log(perplexity(model, ids.to(model.device), context=context))


def report(results: dict[str, dict[str, Any]], as_json: bool) -> None:
    """Print what was found."""
    source, split = (results[name] for name in MODELS)
    gaps = {when: split[when] - source[when] for when in ("before", "after")}
    closed = 1 - gaps["after"] / gaps["before"]
    if as_json:
        print(json.dumps(results | {"gap": gaps, "closed": closed}, indent=2))
        return
    table = Table(title=f"perplexity on {split['test_tokens']:,} tokens; trained on {split['tokens']:,}")
    for column in ("", "before", "after", "learning, M", "minutes", "tokens/s", "peak MB"):
        table.add_column(column, justify="left" if not column else "right")
    for each in (source, split):
        perplexities = (f"{math.exp(each[when]):.3f}" for when in ("before", "after"))
        output = (f"{each['learning'] / 1e6:.1f}", f"{each['minutes']:.1f}", f"{each['tokens_per_second'] or 0:.0f}")
        table.add_row(each["name"], *perplexities, *output, f"{each['peak_memory'] / 1e6:,.0f}")
    table.add_row("split / source", *(f"{math.exp(gap):.4f}" for gap in gaps.values()))
    Console().print(table)
    print(f"of the gap in nats, {100 * closed:.0f} % is closed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Folder of the Llama.")
    parser.add_argument("split", help="Folder of its split, from `gda convert --mode split`.")
    parser.add_argument("--data", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", default="recovery")
    parser.add_argument("--train", default="all", choices=("all", "attention"))
    parser.add_argument("--steps", type=int, help="Training steps. Default: one pass over the data.")
    parser.add_argument(
        "--teacher", choices=("source", "control"), help="Model whose predictions the split learns from."
    )
    parser.add_argument(
        "--teacher-weight",
        type=float,
        default=1.0,
        help="Weight of these predictions, from 0 to 1; the text has the rest.",
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--lambda-learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=5, help="Warmup steps.")
    parser.add_argument("--test-tokens", type=int, default=30_720)
    parser.add_argument("--bf16", action="store_true", help="Multiply matrices in bfloat16.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    options = vars(arguments)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in options.items() if name not in ("out", "json")}
    results = {}
    for name in MODELS:
        file = out / f"{name}.json"
        held = read_json(file) if file.exists() else None
        if held is None or held["settings"] != settings:
            result = in_child(train_one, name, options[name], options)
            write_json(file, result | {"settings": settings})
            held = read_json(file)
        results[name] = held
    report(results, arguments.json)


if __name__ == "__main__":
    main()
