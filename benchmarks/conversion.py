"""Compare converting generated Llamas with copying them: time and peak memory, by size.

    python benchmarks/conversion.py --gigabytes 0.3 2.6 8
    python benchmarks/conversion.py --quick

Each repetition runs `cp -r` and then, in its own process, a conversion without verification. Figures are medians, also
those of the ratios to the copy of the same repetition. To exclude start-up, the process first converts a model of 2 MB,
which imports everything; the time of a second conversion of that model is subtracted. All runs start in the same state:
earlier results are removed, no writes are pending, and the source is in the page cache. Workers are files written at
once. A conversion waits for the disk and cp does not; "on disk" is the time until everything is on the disk, for both.
If cp shares blocks instead of copying them (reflinks of Btrfs or XFS), the comparison is meaningless.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from processes import in_child, peak_bytes, run
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from gda.common.files import sha256
from gda.conversion.convert import convert
from gda.conversion.tensors.recipes import Recipe, checkpoint_specs, generator_for
from gda.conversion.tensors.safetensors_io import TensorSpec
from gda.conversion.writing.stream import shards_of, write_weights


def llama_config(gigabytes: float = 0.0, hidden_size: int = 2048) -> LlamaConfig:
    """A Llama of about that size in bfloat16, with as many layers as needed."""
    config = LlamaConfig(
        vocab_size=32000 * hidden_size // 2048,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
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
            return torch.empty(shape).normal_(std=0.02, generator=generator_for(name, 0)).bfloat16()

        recipes[name] = Recipe(TensorSpec(spec.shape, torch.bfloat16), (), make, "random")
    write_weights(folder, recipes, shards_of(recipes, shard_size), lambda name: recipes[name].make())
    config.save_pretrained(folder)
    return sum(recipe.spec.nbytes for recipe in recipes.values())


def converted(source: Path, out: Path, tiny: Path, shard_size: str, workers: int) -> dict[str, float]:
    """Seconds of a conversion without start-up, and peak resident megabytes of this process at its end and before
    it.
    """

    def seconds(source: Path, out: Path) -> float:
        begun = time.perf_counter()
        convert(source, out, max_shard_size=shard_size, workers=workers, verify=False)
        return time.perf_counter() - begun

    with tempfile.TemporaryDirectory() as folder:
        seconds(tiny, Path(folder) / "first")
        startup = seconds(tiny, Path(folder) / "second")
    startup_peak = peak_bytes()
    beyond = seconds(source, out) - startup
    return {"beyond_startup": beyond, "peak_mb": peak_bytes() / 1e6, "startup_peak_mb": startup_peak / 1e6}


def settle(source: Path, *outs: Path) -> None:
    """Remove written files, wait for the disk, and read the source into the page cache."""
    for out in outs:
        shutil.rmtree(out, ignore_errors=True)
    os.sync()
    for path in source.iterdir():
        sha256(path)


def to_disk(folder: Path) -> float:
    """Seconds until the files of a folder are on disk."""
    begun = time.perf_counter()
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - begun


def measure(source: Path, scratch: Path, workers: list[int], shard_size: str, repeat: int) -> list[dict[str, float]]:
    """Seconds, ratios and megabytes of a source, by the number of workers."""
    copy, out, tiny = scratch / "copy", scratch / "gda", scratch / "tiny"
    in_child(write_llama, tiny, llama_config(hidden_size=64), shard_size)
    found: dict[int, dict[str, list[float]]] = {number: defaultdict(list) for number in workers}
    for _ in range(repeat):
        settle(source, copy, out)
        copied = {"copy": run("cp", "-r", str(source), str(copy))[0]}
        copied["copy_on_disk"] = copied["copy"] + to_disk(copy)
        for number in workers:
            settle(source, copy, out)
            values = copied | in_child(converted, source, out, tiny, shard_size, number)
            values["beyond_startup_on_disk"] = values["beyond_startup"] + to_disk(out)
            values["ratio"] = values["beyond_startup"] / values["copy"]
            values["ratio_on_disk"] = values["beyond_startup_on_disk"] / values["copy_on_disk"]
            for name, value in values.items():
                found[number][name].append(value)
    settle(source, copy, out)
    return [
        {"workers": number} | {name: statistics.median(values) for name, values in each.items()}
        for number, each in found.items()
    ]


def generated(gigabytes: float, shard_size: str, folder: Path) -> Path:
    """A Llama of that size in `folder`, reused from an earlier run if there is one."""
    source = folder / f"llama-{gigabytes:g}GB-{shard_size}"
    if not (source / "config.json").exists():  # which is written last
        shutil.rmtree(source, ignore_errors=True)
        in_child(write_llama, source, llama_config(gigabytes), shard_size)
    return source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.3, 2.6])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shard-size", default="400MB")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="Folder to work in. Default: the system's temporary folder.")
    parser.add_argument("--sources", type=Path, help="Folder that keeps generated models for the next run.")
    parser.add_argument("--quick", action="store_true", help="Run once with a small model, as a smoke test.")
    parser.add_argument("--json", action="store_true")
    options = vars(parser.parse_args())
    if options["quick"]:
        options |= {"gigabytes": [0.3], "repeat": 1}
    figures = []
    for gigabytes in options["gigabytes"]:
        with tempfile.TemporaryDirectory(dir=options["folder"]) as scratch:
            source = generated(gigabytes, options["shard_size"], options["sources"] or Path(scratch))
            nbytes = sum(path.stat().st_size for path in source.iterdir())
            found = measure(source, Path(scratch), options["workers"], options["shard_size"], options["repeat"])
        figures += [{"asked": gigabytes, "gigabytes": nbytes / 1e9, **each} for each in found]
    if options["json"]:
        print(json.dumps({"options": options, "figures": figures}, indent=2, default=str))
    else:
        show(figures, options)


def show(figures: list[dict[str, float]], options: dict[str, Any]) -> None:
    table = Table(title=f"gda convert --no-verify, files of {options['shard_size']}, medians of {options['repeat']}")
    columns = {
        "GB": ("gigabytes", ".2f"),
        "workers": ("workers", "d"),
        "cp -r, s": ("copy", ".2f"),
        "beyond it, s": ("beyond_startup", ".2f"),
        "× cp": ("ratio", ".2f"),
        "on disk, × cp": ("ratio_on_disk", ".2f"),
        "peak MB": ("peak_mb", ",.0f"),
        "of it start-up": ("startup_peak_mb", ",.0f"),
    }
    for column in columns:
        table.add_column(column, justify="right")
    for each in figures:
        table.add_row(*(format(each[name], form) for name, form in columns.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
