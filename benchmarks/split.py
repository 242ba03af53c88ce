"""Measure what is lost by splitting the heads of a Llama, by method.

    python benchmarks/split.py strategies ./llama --calibration valid.txt --test test.txt --dataset-root data
    python benchmarks/split.py tokens ./llama --calibration valid.txt --test test.txt
    python benchmarks/split.py shape
    python benchmarks/split.py sizes

`strategies` splits the heads in several ways and compares perplexity and, with --dataset-root, BLiMP with the source:

    naive      the last head of each group becomes its noise head, λ = 0.1, the output projection keeps its columns
    energy     the same with the head of least output energy
    greedy     the heads and λ that `gda convert` chooses; the output projection keeps its columns
    + refit    the output projection is fitted to that choice
    default    what `gda convert` does: greedy + refit, also on short sequences, and training

`tokens` compares several lengths of calibration text. `shape` generates a small Llama with 8 query heads per KV head,
trains it for some minutes on the documentation of Python, and splits it 7:1, 3:1 and 1:1, as a second model. `sizes`
measures one layer of Llamas with 1 and 8 billion parameters, and estimates the cost of splitting them.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import device, trained_tokenizer
from rich.console import Console
from rich.table import Table
from split_domains import blimp, converted
from transformers import LlamaConfig, LlamaForCausalLM

from gda import GDAConfig, GDAForCausalLM
from gda.common.perplexity import perplexity
from gda.common.text import python_documentation
from gda.conversion.sources.open import open_source
from gda.conversion.sources.source import Source
from gda.conversion.split.calibration import (
    CONTEXT,
    HELD_OUT_TOKENS,
    Text,
    read_calibration,
    shares,
    text_beginnings,
)
from gda.conversion.split.cost import Amount, estimated_minutes, work_bytes
from gda.conversion.split.fit import token_weights
from gda.conversion.split.heads import Moments, Split, fitted, split_layer
from gda.conversion.split.recipes import LAMBDAS, split_config, split_recipes
from gda.conversion.split.splitter import EFFORTS, TOKENS
from gda.conversion.tensors.layerwise import LayerwiseModel
from gda.conversion.tensors.recipes import checkpoint_specs

NAIVE_LAMBDA = 0.1
CONSOLE = Console(width=150)


@torch.no_grad()
def moments_of(
    source: Source, windows: torch.Tensor, cuts: list[int]
) -> Iterator[dict[int, tuple[Moments, torch.Tensor]]]:
    """Moments of each layer over the first `cut` sequences, for each cut, and its output projection."""
    model = LayerwiseModel(source.config, source.read)
    states = [model.embed(ids) for ids in windows.split(1)]
    for index in range(model.num_layers):
        tensors = model.tensors(index)
        output = tensors["self_attn.o_proj.weight"]
        moments, found = Moments(output.shape[1], output.shape[0]), {}

        def count(_module: torch.nn.Module, inputs: tuple[torch.Tensor], outputs: torch.Tensor) -> None:
            root = token_weights(each + outputs, source.config.rms_norm_eps).sqrt()  # noqa: B023
            moments.add(inputs[0] * root, outputs * root)  # noqa: B023 - the hook lives as long as the loop's turn

        hook = model.layer(index).self_attn.o_proj.register_forward_hook(count)
        for number, each in enumerate(states, 1):
            states[number - 1] = model.run(index, tensors, each)
            if number in cuts:
                found[number] = (copy.deepcopy(moments), output)
        hook.remove()
        yield found


def orders(config: Any, moments: Moments) -> dict[str, list[int]]:
    """The naive order of heads, and that by energy."""
    heads, groups, d = config.num_attention_heads, config.num_noise_heads, config.head_dim
    energy = moments.heads.diagonal().view(heads, d).sum(1)
    by_energy: list[int] = []
    for group in torch.arange(heads).view(groups, -1).tolist():
        least = min(group, key=lambda head: energy[head].item())
        by_energy += [head for head in group if head != least] + [least]
    return {"naive": list(range(heads)), "energy": by_energy}


def divided(config: Any, found: tuple[Moments, torch.Tensor]) -> dict[str, Split]:
    """The splits of one layer, by strategy."""
    moments, output = found
    noise, d = config.num_noise_heads, config.head_dim
    chosen = split_layer(
        moments,
        output,
        num_noise_heads=noise,
        num_kv_heads=config.num_key_value_heads,
        head_dim=d,
        lambdas=LAMBDAS["reparameterized"],
    )
    splits = {
        name: fitted(moments, output, order, noise, d, NAIVE_LAMBDA) for name, order in orders(config, moments).items()
    }
    splits["greedy"] = chosen
    kept = {name: replace(split, output=columns(output, split, noise, d)) for name, split in splits.items()}
    return kept | {f"{name} + refit": split for name, split in splits.items()}


def columns(output: torch.Tensor, split: Split, noise: int, d: int) -> torch.Tensor:
    signal = torch.tensor(split.order).view(noise, -1)[:, :-1].flatten()
    return output.unflatten(1, (-1, d))[:, signal].flatten(1)


def one_noise_head_each(source: Source, dtype: torch.dtype | None) -> GDAConfig:
    """The split of a source with one noise head for each KV head."""
    noise_heads = source.config.num_key_value_heads
    return split_config(source.config, noise_heads=noise_heads, lambda_type="reparameterized", dtype=dtype)


def model_of(source: Source, splits: list[Split]) -> GDAForCausalLM:
    config = one_noise_head_each(source, torch.float32)
    config.lambda_init = [split.lambda_ for split in splits]
    recipes = split_recipes(config, source.specs, splits, trained=None, seed=0, dtype=torch.float32)
    model = GDAForCausalLM(config)
    model.load_state_dict({name: recipe(source.read) for name, recipe in recipes.items()}, strict=False)
    return model.eval()


def test_ids(tokenizer: Any, path: str, tokens: int) -> torch.Tensor:
    ids = tokenizer(Path(path).read_text(), add_special_tokens=False, verbose=False, return_tensors="pt").input_ids[0]
    return ids[:tokens]


class Rows:
    """A growing table: each row is a model with its figures relative to the source."""

    def __init__(self, title: str, source: Any, tokenizer: Any, ids: torch.Tensor, arguments: argparse.Namespace):
        self.tokenizer, self.ids, self.arguments = tokenizer, ids, arguments
        self.rows: list[dict[str, Any]] = []
        self.table = Table("", "tokens", "minutes", "perplexity", "ratio", "BLiMP", "points", title=title)
        self.base: dict[str, Any] | None = None
        self.add("source", source, 0, 0.0)

    def add(self, name: str, model: Any, tokens: int, minutes: float) -> None:
        """Measure `model`, which took that many tokens and minutes."""
        row = {"name": name, "tokens": tokens, "minutes": minutes}
        row |= {
            "perplexity": perplexity(model, self.ids),
            "blimp": blimp(model, self.tokenizer, self.arguments.dataset_root, self.arguments.limit),
        }
        self.base = self.base or row
        row["ratio"] = row["perplexity"] / self.base["perplexity"]
        accuracy = ["", ""]
        if row["blimp"] is not None:
            row["points"] = 100 * (row["blimp"] - self.base["blimp"])
            accuracy = [f"{100 * row['blimp']:.2f}", f"{row['points']:+.2f}"]
        figures = [f"{tokens:,}", f"{minutes:.1f}", f"{row['perplexity']:.2f}", f"{row['ratio']:.3f}"]
        self.table.add_row(name, *figures, *accuracy)
        self.rows.append(row)
        print(name, *figures, *accuracy, flush=True)

    def show(self) -> None:
        CONSOLE.print(self.table)
        if self.arguments.json is not None:
            Path(self.arguments.json).write_text(json.dumps(self.rows, indent=2) + "\n")


def strategies(arguments: argparse.Namespace) -> None:
    source = open_source(arguments.source)
    tokenizer = source.tokenizer()
    calibration = calibrated(source, arguments.calibration, arguments.tokens)
    config = one_noise_head_each(source, None)
    ids = test_ids(tokenizer, arguments.test, arguments.test_tokens)
    rows = Rows(f"{source.name}, {len(ids):,} tokens of test", source.load(), tokenizer, ids, arguments)
    begun = time.monotonic()
    cut = min(len(calibration.sequences), 64)
    by_layer = [divided(config, found[cut]) for found in moments_of(source, calibration.sequences[:cut], [cut])]
    minutes = (time.monotonic() - begun) / 60
    tokens = cut * calibration.sequences.shape[1]
    for name in by_layer[0]:
        needs = (0, 0.0) if name == "naive" else (tokens, minutes)
        rows.add(name, model_of(source, [layer[name] for layer in by_layer]), *needs)
    for effort in arguments.efforts.split(","):
        add_converted(rows, effort, arguments, arguments.tokens)
    rows.show()


def calibrated(source: Source, path: str, tokens: int) -> Text:
    tokenizer, config = source.tokenizer(), source.config
    beginnings = text_beginnings(tokenizer, config.vocab_size)
    longest = config.max_position_embeddings
    alone = shares({path: 1.0}, sampled=0.0, tokens=tokens, longest=longest, beginnings=beginnings)
    return read_calibration(Path(path), tokenizer, alone)


def add_converted(rows: Rows, effort: str, arguments: argparse.Namespace, tokens: int, **settings: Any) -> None:
    """Split with `gda convert`, and add the result."""
    settings |= {"calibration": (arguments.calibration, "sampled:0"), "calibration_tokens": tokens, "effort": effort}
    report, model, minutes = converted(arguments.source, **settings)
    assert report.split is not None
    rows.add(f"{effort}, {report.config.signal_noise_ratio}:1", model, report.split.tokens, minutes)


def tokens(arguments: argparse.Namespace) -> None:
    source = open_source(arguments.source)
    tokenizer = source.tokenizer()
    ids = test_ids(tokenizer, arguments.test, arguments.test_tokens)
    lengths = [int(each) for each in arguments.lengths.split(",")]
    calibration = calibrated(source, arguments.calibration, max(lengths))
    config = one_noise_head_each(source, None)
    rows = Rows(f"{source.name}, closed form, by calibration", source.load(), tokenizer, ids, arguments)
    begun = time.monotonic()
    cuts = [length // 512 for length in lengths]
    by_layer = [
        {cut: divided(config, found[cut])["greedy + refit"] for cut in cuts}
        for found in moments_of(source, calibration.sequences, cuts)
    ]
    minutes = (time.monotonic() - begun) / 60
    for cut in cuts:
        rows.add(f"{cut * 512:,} tokens", model_of(source, [layer[cut] for layer in by_layer]), cut * 512, minutes)
    rows.show()


def shape(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder, train, test = Path(scratch) / "llama", Path(scratch) / "train.txt", Path(scratch) / "test.txt"
        whole = python_documentation()
        text = whole[: len(whole) * 9 // 10]
        train.write_text(text)
        test.write_text(whole[len(text) :])
        tokenizer = trained_tokenizer([text], 2048, ["<s>"], bos_token="<s>")
        model = trained_llama(tokenizer, text, arguments.steps)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        ids = test_ids(tokenizer, str(test), arguments.test_tokens)
        arguments.source, arguments.calibration = str(folder), str(train)
        rows = Rows("a Llama with 8 query heads a KV head", model, tokenizer, ids, arguments)
        for ratio in ("7:1", "3:1", "1:1"):
            for effort in ("fast", "default"):
                add_converted(rows, effort, arguments, arguments.tokens, ratio=ratio)
        rows.show()


def trained_llama(tokenizer: Any, text: str, steps: int) -> LlamaForCausalLM:
    """16 query heads over 2 KV heads, 4 layers, trained on sequences of `text`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        starts = torch.randint(len(ids) - 256, (8,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([ids[start : start + 256] for start in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


SHAPES: dict[str, dict[str, int]] = {
    "1 B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "8 B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
}


def sizes(arguments: argparse.Namespace) -> None:
    table = Table("", *(f"{effort}: minutes, GB of disk" for effort in EFFORTS), title=f"on {device()}")
    for name, shape in SHAPES.items():
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
        config = LlamaConfig(**shape, **heads, max_position_embeddings=CONTEXT)
        specs = checkpoint_specs(config)
        model = LayerwiseModel(config, lambda name: 0.02 * torch.randn(specs[name].shape), device())  # noqa: B023
        held_out, amounts = HELD_OUT_TOKENS // CONTEXT, []
        for effort, steps in EFFORTS.items():
            written = TOKENS[effort] // CONTEXT + held_out
            amounts.append(Amount(CONTEXT, written, written + held_out, steps))
        costs = [(estimated_minutes(model, each), work_bytes(config, each) / 1e9) for each in amounts]
        table.add_row(name, *(f"{minutes:,.0f}, {size:.1f}" for minutes, size in costs))
    CONSOLE.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (strategies, tokens, shape, sizes):
        command = commands.add_parser(function.__name__)
        command.set_defaults(run=function)
        if function in (strategies, tokens):
            command.add_argument("source")
            command.add_argument("--calibration", required=True, help="Calibration text.")
            command.add_argument("--test", required=True, help="Text to measure the perplexity of.")
        if function is sizes:  # which measures a layer, and reads no text
            continue
        command.add_argument("--test-tokens", type=int, default=10240)
        command.add_argument("--dataset-root", help="Folder that contains nyu-mll/blimp.")
        command.add_argument("--limit", type=int, help="Number of pairs of each paradigm.")
        command.add_argument("--json", help="JSON file to write the rows to.")
        command.add_argument("--tokens", type=int, default=65536, help="Number of calibration tokens.")
    commands.choices["strategies"].add_argument("--efforts", default="fast,default")
    commands.choices["tokens"].add_argument("--lengths", default="2048,4096,8192,16384,32768,65536")
    commands.choices["shape"].add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
