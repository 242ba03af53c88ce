"""Measure start-up: imports, `--help`, and loading a GDA model compared with the Llama that it was converted from.

    python benchmarks/startup.py --repeat 7

Each figure is a median over separate processes, with files in the page cache. The cases take turns, and the first
process of each is not counted. Ratios are relative to the reference named; for `gda --help` it is the command of
huggingface_hub. Models have random weights in bfloat16. Loading is `from_pretrained`, after all imports.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from processes import in_child, peak_bytes, run
from rich.console import Console
from rich.table import Table

import gda
from conversion import llama_config, write_llama

Figure = dict[str, Any]
GDA = [sys.executable, "-m", "gda.cli"]
HF = [sys.executable, "-m", "huggingface_hub.cli.hf"]


def python(statement: str) -> list[str]:
    return [sys.executable, "-c", statement]


# What is timed: a command, and the name of its peer.
COMMANDS: dict[str, tuple[list[str], str]] = {
    "LlamaForCausalLM": (python("from transformers import LlamaForCausalLM"), "LlamaForCausalLM"),
    "import gda": (python("import gda"), "LlamaForCausalLM"),
    "hf --help": ([*HF, "--help"], "hf --help"),
    "gda --help": ([*GDA, "--help"], "hf --help"),
    "gda convert --help": ([*GDA, "convert", "--help"], "hf --help"),
}


def load(folder: Path) -> Figure:
    """Load a model and run it for a token, in this process."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401 - imported before the clock runs
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    gda.GDAForCausalLM  # noqa: B018 - likewise
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    seconds = time.perf_counter() - begun
    with torch.inference_mode():
        model(torch.tensor([[1]]))
    return {"seconds": seconds, "with_first_token": time.perf_counter() - begun, "peak_mb": peak_bytes() / 1e6}


def compared(found: dict[str, list[Figure]], peers: dict[str, str]) -> dict[str, Figure]:
    """Medians of each, and of the ratios to its peer of the same repetition; the first repetition is not counted."""
    return {
        name: {
            **{key: statistics.median(each[key] for each in repetitions[1:]) for key in repetitions[0]},
            "peer": peers[name],
            "ratio": {
                key: statistics.median(
                    each[key] / peer[key] for each, peer in zip(repetitions[1:], found[peers[name]][1:], strict=True)
                )
                for key in repetitions[0]
            },
        }
        for name, repetitions in found.items()
    }


def measure_commands(repeat: int) -> dict[str, Figure]:
    found: dict[str, list[Figure]] = {name: [] for name in COMMANDS}
    for _ in range(repeat + 1):
        for name, (command, _) in COMMANDS.items():
            found[name].append({"seconds": run(*command)[0]})
    return compared(found, {name: peer for name, (_, peer) in COMMANDS.items()})


def measure_loading(gigabytes: float, repeat: int, scratch: Path) -> dict[str, Figure]:
    folders = {"Llama": scratch / "llama", "GDA": scratch / "gda"}
    in_child(write_llama, folders["Llama"], llama_config(gigabytes), "5GB")
    run(*GDA, "convert", str(folders["Llama"]), str(folders["GDA"]), "--no-verify")
    found: dict[str, list[Figure]] = {name: [] for name in folders}
    for _ in range(repeat + 1):
        for name, folder in folders.items():
            size = (folder / "model.safetensors").stat().st_size
            found[name].append(in_child(load, folder) | {"bytes": size})
    return compared(found, dict.fromkeys(folders, "Llama"))


def show(commands: dict[str, Figure], loading: dict[str, Figure], options: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"start-up, medians of {options['repeat']}")
    for column in ("", "s", "peer", "× peer"):
        table.add_column(column, justify="left" if column in ("", "peer") else "right")
    for name, each in commands.items():
        table.add_row(name, f"{each['seconds']:.2f}", each["peer"], f"{each['ratio']['seconds']:.2f}")
    console.print(table)
    table = Table(title=f"loading {loading['Llama']['bytes'] / 1e9:.2f} GB, medians of {options['repeat']}")
    for column in ("", "load, s", "and a token, s", "peak MB", "load, × Llama", "and a token", "peak", "bytes"):
        table.add_column(column, justify="right" if column else "left")
    for name, each in loading.items():
        seconds = (f"{each[key]:.2f}" for key in ("seconds", "with_first_token"))
        ratios = (f"{each['ratio'][key]:.3f}" for key in ("seconds", "with_first_token", "peak_mb", "bytes"))
        table.add_row(name, *seconds, f"{each['peak_mb']:,.0f}", *ratios)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5, help="Size of the model that is loaded.")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="Folder to work in. Default: the system's temporary folder.")
    parser.add_argument("--quick", action="store_true", help="Run each case once with a small model, as a smoke test.")
    parser.add_argument("--json", action="store_true")
    options = vars(parser.parse_args())
    if options["quick"]:
        options |= {"gigabytes": 0.2, "repeat": 1}
    commands = measure_commands(options["repeat"])
    with tempfile.TemporaryDirectory(dir=options["folder"]) as scratch:
        loading = measure_loading(options["gigabytes"], options["repeat"], Path(scratch))
    if options["json"]:
        print(json.dumps({"options": options, "commands": commands, "loading": loading}, indent=2, default=str))
    else:
        show(commands, loading, options)


if __name__ == "__main__":
    main()
