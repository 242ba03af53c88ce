"""Measure what splitting the heads of a Llama costs in four domains, by calibration text, effort and seed.

    python benchmarks/split_domains.py ./llama --calibration valid.txt --test test.txt --dataset-root data --out rows

The domains are the text of --test, Python's documentation, and the problems of GSM8K as text and in the chat template.
Perplexities are relative to the source's, BLiMP is the difference in points, and KL and the share of equal top tokens
are those of `gda verify`. Finished rows are kept in --out, so the command can be stopped and repeated.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gda import __version__, convert
from gda.common.perplexity import perplexity
from gda.common.screen import quiet_transformers
from gda.common.text import python_documentation
from gda.conversion.sources.open import open_source
from gda.conversion.split.fit import FIRST_TOKEN_WEIGHT
from gda.conversion.split.rows import EVERY, SHORT
from gda.conversion.split.sampling import AT_ONCE
from gda.conversion.split.splitter import EFFORTS, TOKENS

COMPARED = ("efforts", "calibrations", "seeds", "out")
CALIBRATIONS = {  # name: values of --calibration, given the user's text
    "text": lambda text: (text, "sampled:0"),
    "sampled": lambda text: ("sampled",),
    "text + sampled": lambda text: (text,),
}


def blimp(model: Any, tokenizer: Any, dataset_root: str | None, limit: int | None) -> float | None:
    """Mean accuracy over the paradigms that are in `dataset_root`; None without it."""
    if dataset_root is None:
        return None
    from gda import evaluate

    folder = Path(dataset_root) / "nyu-mll" / "blimp"
    tasks = sorted(f"blimp_{each.name}" for each in folder.iterdir() if each.is_dir())
    results = evaluate(model, tokenizer, tasks=tasks, dataset_root=dataset_root, limit=limit, batch_size=32)["results"]
    return sum(results[task]["acc,none"] for task in tasks) / len(tasks)


def compare(arguments: argparse.Namespace) -> None:
    source = open_source(arguments.source)
    texts = texts_of(source.tokenizer(), arguments)
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    require_same_arguments(folder / "arguments.json", arguments)
    of_source = folder / "source.json"
    if not of_source.exists():
        of_source.write_text(json.dumps(measured(source.load().eval(), source.tokenizer(), texts, arguments)))
    base = json.loads(of_source.read_text())
    print("source", base, flush=True)
    for effort in arguments.efforts.split(","):
        for name in arguments.calibrations.split(","):
            for seed in map(int, arguments.seeds.split(",")):
                row = folder / f"{effort}, {name}, seed {seed}.json"
                if not row.exists():
                    figures = domain_row(arguments, effort, CALIBRATIONS[name](arguments.calibration), seed, texts)
                    row.write_text(json.dumps(figures))
                print(row.stem, relative(json.loads(row.read_text()), base), flush=True)


def require_same_arguments(kept: Path, arguments: argparse.Namespace) -> None:
    """Keep what all rows of a folder have in common, and refuse other rows."""
    common = {name: value for name, value in vars(arguments).items() if name not in COMPARED}
    common |= {"defaults": [__version__, EFFORTS, TOKENS, SHORT, EVERY, FIRST_TOKEN_WEIGHT, AT_ONCE]}
    if not kept.exists():
        kept.write_text(json.dumps(common))
    elif json.loads(kept.read_text()) != common:
        raise SystemExit(f"{kept} holds other arguments; name another --out")


def converted(source: str, **settings: Any) -> tuple[Any, Any, float]:
    """Split with `gda convert`: its report, the model, and the minutes that the command took."""
    with tempfile.TemporaryDirectory() as scratch:
        begun = time.monotonic()
        report = convert(source, Path(scratch) / "split", mode="split", **settings)
        minutes = (time.monotonic() - begun) / 60
        with quiet_transformers():
            return report, AutoModelForCausalLM.from_pretrained(report.out, dtype=torch.float32).eval(), minutes


def domain_row(
    arguments: argparse.Namespace,
    effort: str,
    calibration: tuple[str, ...],
    seed: int,
    texts: dict[str, torch.Tensor],
) -> dict[str, float | None]:
    """Split once, and measure the result."""
    settings = {"calibration": calibration, "calibration_tokens": arguments.tokens, "effort": effort, "seed": seed}
    report, model, minutes = converted(arguments.source, **settings)
    figures = measured(model, open_source(arguments.source).tokenizer(), texts, arguments)
    checked = report.verification
    return figures | {"KL": checked.kl, "same top token": checked.top1_agreement, "minutes": minutes}


def texts_of(tokenizer: Any, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Token ids (T,) of texts in four domains: encyclopedia, documentation, and problems as text and as chat."""
    problems = Path(arguments.dataset_root) / "openai" / "gsm8k" / "main" / "test.jsonl"
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    chats = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]
    documents = {
        "text": Path(arguments.test).read_text(),
        "Python": python_documentation(),
        "GSM8K": "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows),
        "GSM8K chat": "".join(tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats),
    }
    return {name: spread_ids(tokenizer, text, arguments.test_tokens) for name, text in documents.items()}


def spread_ids(tokenizer: Any, text: str, tokens: int) -> torch.Tensor:
    """About so many token ids, in sequences of 512 from all over a text."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    sequences = ids[: len(ids) // 512 * 512].view(-1, 512)
    return sequences[torch.linspace(0, len(sequences) - 1, min(len(sequences), tokens // 512)).long()].flatten()


def measured(
    model: Any, tokenizer: Any, texts: dict[str, torch.Tensor], arguments: argparse.Namespace
) -> dict[str, float | None]:
    return {name: perplexity(model, ids) for name, ids in texts.items()} | {
        "BLiMP": blimp(model, tokenizer, arguments.dataset_root, arguments.limit)
    }


def relative(row: dict[str, Any], base: dict[str, Any]) -> dict[str, str]:
    """Perplexities as ratios, and BLiMP as a difference in points."""
    shown = {}
    for name, value in row.items():
        if name == "BLiMP":
            shown[name] = f"{100 * (value - base[name]):+.2f}"
        elif name in base:
            shown[name] = f"{value / base[name]:.3f}"
        else:
            shown[name] = f"{value:.3f}"
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--calibration", required=True, help="Text to fit to.")
    parser.add_argument("--test", required=True, help="Text of the same domain to measure.")
    parser.add_argument("--dataset-root", required=True, help="Folder that contains nyu-mll/blimp and openai/gsm8k.")
    parser.add_argument("--out", required=True, help="Folder for the rows.")
    parser.add_argument("--efforts", default="fast,default")
    parser.add_argument("--calibrations", default=",".join(CALIBRATIONS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--tokens", type=int, help="Number of calibration tokens. Default: that of gda convert.")
    parser.add_argument("--test-tokens", type=int, default=10240, help="Number of tokens of each domain.")
    parser.add_argument("--limit", type=int, help="Number of pairs of each paradigm of BLiMP.")
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
