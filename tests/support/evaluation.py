"""Helpers for tests of evaluation: tiny models, and tiny data in the places of official tasks."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import gda

from .llamas import byte_tokenizer, save_llama
from .tiny import tiny_config, tiny_model

ROOT = Path(__file__).resolve().parents[2]
SHARED_DATA = Path(os.environ.get("GDA_TEST_DATA", ROOT / ".." / "shared" / "data"))

NOUNS = ("cat", "other man", "hen", "ant", "official", "weather", "theatre", "mother", "brother", "panther")
SUMS_TASK = """
task: toy_sums
dataset_path: toy/sums
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
doc_to_choice: ["one", "two", "three and more"]
num_fewshot: 2
metric_list:
  - metric: acc
"""


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write `rows` as JSON Lines, and create the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(number: int = 10) -> list[dict[str, str]]:
    """Sentences in BLiMP's form, of different lengths."""
    return [
        {
            "sentence_good": f"The {noun} thanked {'the ' * (index % 3)}{NOUNS[-index]}.",
            "sentence_bad": f"The {noun} thanked {'the ' * (index % 3)}of {NOUNS[-index]} there.",
        }
        for index, noun in ((index, NOUNS[index % len(NOUNS)]) for index in range(number))
    ]


def write_models(folder: Path, name: str) -> Path:
    """Create in `folder` a Llama, `llama`, its expansion, `gda`, a GDA model with non-zero λ, `name`, and `data`."""
    gda.convert(save_llama(folder / "llama", max_position_embeddings=512), folder / "gda", verify=False)
    tokenizer = byte_tokenizer()
    config = tiny_config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, max_position_embeddings=512)
    tiny_model(config).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    write_data(folder / "data")
    return folder


def write_data(root: Path) -> Path:
    """A few rows each of BLiMP's passive_1, GSM8K and a task of our own, `root`/toy_sums.yaml."""
    import datasets

    write_jsonl(root / "nyu-mll/blimp/passive_1/train.jsonl", pairs())
    sums = [{"question": f"{n} and {n + 1}", "answer": f"They are {2 * n + 1}.\n#### {2 * n + 1}"} for n in range(7)]
    write_jsonl(root / "openai/gsm8k/main/train.jsonl", sums)
    datasets.Dataset.from_list(sums[:2]).to_parquet(root / "openai/gsm8k/main/test.parquet")
    toys = [{"question": f"{noun} {index}", "answer": index % 3} for index, noun in enumerate(NOUNS)]
    for split in ("train", "test"):
        write_jsonl(root / f"toy/sums/{split}.jsonl", toys)
    (root / "toy_sums.yaml").write_text(SUMS_TASK)
    return root


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str) -> float:
    """log p(continuation | prompt), one token at a time, from logits; after BOS if the prompt is empty."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    ids = encode(prompt + continuation)
    known = len(encode(prompt))
    if not prompt:
        ids, known = [tokenizer.bos_token_id, *ids], 1
    total = 0.0
    for position in range(known, len(ids)):
        logits = model(torch.tensor([ids[:position]])).logits[0, -1].double()
        total += (logits[ids[position]] - logits.logsumexp(0)).item()
    return total
