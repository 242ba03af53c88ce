"""Measure how fast `gda train` tokenizes, compared with `datasets.Dataset.map(batched=True)` in the same run.

    python benchmarks/data.py --tokenizer FOLDER

The data is Python's documentation, repeated: as text, one row per topic, and as chats of four paragraphs. `gda train`
reads the rows from a JSON Lines file, tokenizes and packs them and writes the sequences. `map` has the rows in memory
already and writes the token ids; of chats, it also writes the mask of the assistant's turns where the template marks
them, and otherwise in a contestant of its own. The contestants take turns; figures are medians. Without --tokenizer, a
byte-level BPE is trained on the text.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset, disable_caching, disable_progress_bars
from measuring import environment, interleaved, median_ratio, trained_tokenizer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gda.common.files import remove
from gda.training.data.sequences import open_sequences

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = TEMPLATE.replace(
    "'\n' + m.content + '<|im_end|>\n' }}",
    "'\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}",
)
CLOCK_NAMES = {"wall": "elapsed time", "all": "CPU time of all threads and processes"}
ROLES = ("user", "assistant") * 2


def texts() -> list[dict[str, Any]]:
    return [{"text": topics[name]} for name in sorted(topics)]


def chats() -> list[dict[str, Any]]:
    found = []
    for row in texts():
        parts = [part for part in row["text"].split("\n\n") if part.strip()]
        for start in range(0, len(parts) - 3, 4):
            turns = zip(ROLES, parts[start : start + 4], strict=True)
            found.append({"messages": [{"role": role, "content": part} for role, part in turns]})
    return found


def tokenizer_of_texts() -> PreTrainedTokenizerFast:
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = trained_tokenizer((row["text"] for row in texts()), 8192, special, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def measure(
    case: str, rows: list[dict[str, Any]], tokenizer: Any, options: argparse.Namespace, scratch: Path
) -> Iterator[dict[str, Any]]:
    """Tokens per second of each contestant, and the ratios of `gda train` to the others."""
    (kind,) = rows[0]
    data, table = scratch / f"{kind}.jsonl", Dataset.from_list(rows)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokens: dict[str, int] = {}

    def ours() -> None:
        remove(scratch / "sequences")
        sequences = open_sequences(
            [data],
            tokenizer,
            context=options.context,
            text_field="text",
            streaming=False,
            seed=0,
            vocab_size=len(tokenizer),
            scratch=scratch / "sequences",
        )
        tokens["gda train"] = int(sequences.tokens or 0)

    def tokenized(batch: dict[str, Any]) -> Any:
        if kind == "messages":
            return tokenizer.apply_chat_template(
                batch[kind], tokenize=True, return_dict=True, return_assistant_tokens_mask=case == "marked chats"
            )
        return tokenizer(batch[kind], add_special_tokens=False, return_attention_mask=False)

    def masked(batch: dict[str, Any]) -> Any:
        return answers_masked(tokenizer, batch[kind])

    def mapped(name: str, function: Callable[..., Any], processes: int | None) -> None:
        found = table.map(function, batched=True, num_proc=processes, remove_columns=[kind])
        if name not in tokens:
            tokens[name] = sum(len(ids) for batch in found.iter(1000) for ids in batch["input_ids"])

    cores = os.cpu_count() or 1
    maps: dict[str, tuple[Callable[..., Any], int | None]] = {
        "map": (tokenized, None),
        f"map, num_proc={cores}": (tokenized, cores),
    }
    if case == "chats":
        maps["map, with masks"] = (masked, None)
    runs = {"gda train": ours} | {name: (lambda name=name: mapped(name, *maps[name])) for name in maps}
    seconds = interleaved(runs, options)
    for name, taken in seconds.items():
        yield {
            "rows": case,
            "name": name,
            "tokens": tokens[name],
            "tokens_per_second": tokens[name] / statistics.median(taken),
            "gda_train_relative": median_ratio(taken, seconds["gda train"]) * tokens["gda train"] / tokens[name],
            "repetitions": len(taken),
        }


def answers_masked(tokenizer: Any, chats: list[list[dict[str, str]]]) -> dict[str, list[list[int]]]:
    """Ids of chats and masks of the answers: from the number of tokens before each answer and up to its end."""
    found: dict[str, list[list[int]]] = {"input_ids": [], "assistant_masks": []}
    for chat in chats:
        ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        mask = [0] * len(ids)
        for index, message in enumerate(chat):
            if message["role"] == "assistant":
                before, through = (
                    len(tokenizer.apply_chat_template(part, tokenize=True, return_dict=False, **prompt))
                    for part, prompt in ((chat[:index], {"add_generation_prompt": True}), (chat[: index + 1], {}))
                )
                mask[before:through] = [1] * (through - before)
        found["input_ids"].append(ids)
        found["assistant_masks"].append(mask)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="Folder of a model with a fast tokenizer and a chat template.")
    parser.add_argument("--megabytes", type=float, default=30, help="Size of the text.")
    parser.add_argument("--context", type=int, default=2048, help="Tokens per sequence.")
    parser.add_argument("--budget", type=float, default=120, help="Seconds that the repetitions of each case may take.")
    parser.add_argument(
        "--clock", choices=CLOCK_NAMES, default="wall", help="Elapsed time, or CPU time of all threads."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    options = parser.parse_args()
    disable_progress_bars()
    disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else tokenizer_of_texts()
    found: list[dict[str, Any]] = []
    for case, rows in (("text", texts()), ("chats", chats()), ("marked chats", chats())):
        if case == "marked chats":
            tokenizer.chat_template = MARKED
        rows *= max(1, round(options.megabytes * 1e6 / len(json.dumps(rows))))
        with tempfile.TemporaryDirectory() as scratch:
            found += measure(case, rows, tokenizer, options, Path(scratch))
    if options.json:
        print(json.dumps({**environment(options), "figures": found}, indent=2))
        return
    table = Table(title=f"{options.megabytes:g} MB; seconds are {CLOCK_NAMES[options.clock]}")
    for column in ("rows", "", "tokens", "tokens per second", "gda train ÷ this"):
        table.add_column(column, justify="left" if column in ("rows", "") else "right")
    for each in found:
        figures = (f"{each['tokens']:,}", f"{each['tokens_per_second']:,.0f}", f"{each['gda_train_relative']:.2f}")
        table.add_row(each["rows"], each["name"], *figures)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
