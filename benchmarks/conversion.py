"""Converting a generated Llama against copying it: time and peak memory.

Each repetition runs a copy, a dry run and a conversion in turn; medians are printed, and ratios to the copy of the same
run. Start-up (imports, reading headers, planning) is what the dry run takes.

    python benchmarks/conversion.py --gigabytes 2.6 --shard-size 400MB
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from transformers import LlamaConfig

from gda.conversion.recipes import Recipe, checkpoint_specs, generator_for
from gda.conversion.safetensors_io import TensorSpec
from gda.conversion.stream import shards_of, write_weights

T = TypeVar("T")


def llama_config(gigabytes: float) -> LlamaConfig:
    """A Llama of about that size in bfloat16: hidden size 2,048, as many layers as it takes."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        dtype="bfloat16",
    )
    specs = checkpoint_specs(config)
    layer = sum(spec.numel for name, spec in specs.items() if ".layers.0." in name)
    rest = sum(spec.numel for spec in specs.values()) - layer
    config.num_hidden_layers = max(1, round((gigabytes * 1e9 / 2 - rest) / layer))
    return config


def write_llama(folder: Path, config: LlamaConfig, shard_size: str) -> int:
    """Write random weights, shard by shard; return the bytes written."""
    folder.mkdir()
    recipes = {}
    for name, spec in checkpoint_specs(config).items():

        def make(name: str = name, shape: tuple[int, ...] = spec.shape) -> torch.Tensor:
            return torch.empty(shape).normal_(std=0.02, generator=generator_for(name, 0))

        recipes[name] = Recipe(TensorSpec(spec.shape, torch.bfloat16), (), make, "random")
    write_weights(folder, recipes, shards_of(recipes, shard_size), read=_nothing)
    config.save_pretrained(folder)
    return sum(recipe.spec.nbytes for recipe in recipes.values())


def _nothing(name: str) -> torch.Tensor:
    raise KeyError(name)


def in_child(function: Callable[..., T], *arguments: object) -> T:
    """Call `function` in a process of its own, since the memory of this one would count as that of `run`'s commands."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run(*command: str) -> tuple[float, float]:
    """Seconds and peak resident megabytes of a command; at least those of this process."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - begun, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.6)
    parser.add_argument("--shard-size", default="400MB")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="Where to work; by default the system's temporary folder.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        source, copy, out = (Path(scratch) / name for name in ("llama", "copy", "gda"))
        nbytes = in_child(write_llama, source, llama_config(options.gigabytes), options.shard_size)
        gda = [sys.executable, "-m", "gda.cli", "convert", str(source), str(out), "--no-verify"]
        gda += ["--max-shard-size", options.shard_size]
        times: dict[str, list[float]] = {"copy": [], "startup": [], "convert": []}
        peak = 0.0
        for _ in range(options.repeat):
            times["copy"].append(run("cp", "-r", str(source), str(copy))[0])
            shutil.rmtree(copy)
            times["startup"].append(run(*gda, "--dry-run")[0])
            seconds, megabytes = run(*gda)
            times["convert"].append(seconds)
            peak = max(peak, megabytes)
            shutil.rmtree(out)
    medians = {name: statistics.median(values) for name, values in times.items()}
    beyond = [c - s for c, s in zip(times["convert"], times["startup"], strict=True)]
    ratio = statistics.median(b / c for b, c in zip(beyond, times["copy"], strict=True))
    report = {"gigabytes": nbytes / 1e9, **medians, "ratio_beyond_startup": ratio, "peak_rss_mb": peak}
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{nbytes / 1e9:.2f} GB in {options.shard_size} shards, medians of {options.repeat}")
    print(f"cp -r                  {medians['copy']:7.2f} s")
    print(f"gda convert, start-up  {medians['startup']:7.2f} s")
    print(f"gda convert            {medians['convert']:7.2f} s   beyond start-up: {ratio:.2f} × the copy")
    print(f"peak memory            {peak:7.0f} MB")


if __name__ == "__main__":
    main()
