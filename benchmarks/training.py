"""Training steps of GDA models against Llama's: tokens a second, and peak memory.

    python benchmarks/training.py --repeat 5

Models of the same width and depth with random weights: a Llama; a GDA with as many query heads, of which some are noise
heads (a split); one with noise heads added (an expansion); and transformers' DiffLlama. A step is forward, backward and
AdamW over all weights, in float32 or, with --bf16, with matrices multiplied in bfloat16. Steps alternate between the
models, and figures are medians; what counts is the ratio to Llama in the same run. Peak memory is that of a process
of its own.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, LlamaConfig, LlamaForCausalLM

from conversion import in_child
from gda import GDAConfig, GDAForCausalLM

NAMES = ("Llama", "GDA, split", "GDA, expanded", "DiffLlama")


def build(name: str, options: dict[str, Any]) -> Any:
    """A model with random weights; `options` has the shape."""
    heads, key_value = options["heads"], options["kv_heads"]
    fields: dict[str, Any] = {
        "vocab_size": options["vocabulary"],
        "hidden_size": heads * options["head_dim"],
        "intermediate_size": options["mlp"],
        "num_hidden_layers": options["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": key_value,
        "head_dim": options["head_dim"],
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    if name == "Llama":
        return LlamaForCausalLM(LlamaConfig(**fields))
    if name == "DiffLlama":
        return DiffLlamaForCausalLM(DiffLlamaConfig(**fields))
    if name == "GDA, expanded":
        fields["num_attention_heads"] = heads + key_value
    return GDAForCausalLM(GDAConfig(**fields, num_noise_heads=key_value, lambda_init=0.1))


def stepper(name: str, options: dict[str, Any]) -> Callable[[], float]:
    """A function that trains one step of a new model and returns its seconds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(name, options).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=True)
    ids = torch.randint(options["vocabulary"], (options["batch"], options["context"]), device=device)

    def step() -> float:
        begun = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=options["bf16"]):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    return step


def peak_memory(name: str, options: dict[str, Any]) -> int:
    """Bytes at most in three steps of a process of its own."""
    step = stepper(name, options)
    for _ in range(3):
        step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(options: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds of a step and peak memory of each model that can be built."""
    names = [name for name in NAMES if name != "DiffLlama" or options["heads"] % 2 == options["kv_heads"] % 2 == 0]
    memory = {name: in_child(peak_memory, name, options) for name in names}
    steps = {name: stepper(name, options) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(options["repeat"] + 1):
        for name, step in steps.items():
            taken = step()
            if repetition:  # the first is a warm-up
                seconds[name].append(taken)
    return {name: {"seconds": statistics.median(seconds[name]), "memory": memory[name]} for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--mlp", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = vars(parser.parse_args())
    found = measure(options)
    if options["json"]:
        print(json.dumps({"options": options, "models": found}, indent=2))
        return
    llama, tokens = found["Llama"], options["batch"] * options["context"]
    table = Table(
        title=f"training steps of {options['batch']} × {options['context']} tokens, medians of {options['repeat']}"
    )
    for column in ("", "tokens/s", "× Llama's", "peak MB", "× Llama's"):
        table.add_column(column, justify="left" if not column else "right")
    for name, each in found.items():
        speed = (f"{tokens / each['seconds']:.0f}", f"{llama['seconds'] / each['seconds']:.3f}")
        table.add_row(name, *speed, f"{each['memory'] / 1e6:,.0f}", f"{each['memory'] / llama['memory']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
