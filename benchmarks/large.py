"""Convert and verify a model of 3 GB, and models with the layers of a 70 B Llama, and add up what all of these take.

    python benchmarks/large.py --folder FOLDER
    python benchmarks/large.py --quick

All models are random, in bfloat16. Each is converted and verified layer by layer, as models that do not fit into memory
are; then `gda convert` runs as it is by default, with the verification in it. Each of the three is a process that has
first done the same with a model of 2 MB, which imports everything. The source is in the page cache.

Of the 70 B Llama, models with one and with two layers are made. What the second layer adds, times the number of layers,
and the rest of the first model make up the time for the whole model. One layer at a time is in memory, so the peak does
not grow with the number of layers.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from processes import in_child, peak_bytes
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from conversion import llama_config, settle, write_llama
from gda.conversion.convert import convert
from gda.conversion.verify import verify

PARTS = ("convert", "verify", "whole")  # whole: a conversion with its verification
LAYERS = 80
SHAPE = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
QUICK = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 16, "num_key_value_heads": 4}
VOCABULARY = 128256


def llama_of(shape: dict[str, int], vocabulary: int, layers: int) -> LlamaConfig:
    """A Llama with that many layers."""
    return LlamaConfig(**shape, vocab_size=vocabulary, num_hidden_layers=layers, dtype="bfloat16")


def work(part: str, source: Path, out: Path) -> str:
    """Do one part, and return the method of verification, if it is one."""
    if part == "convert":
        convert(source, out, verify=False)
        return ""
    checked = verify(source, out, method="layers") if part == "verify" else convert(source, out).verification
    assert checked.passed
    return checked.method


def measured(part: str, source: Path, out: Path, tiny: Path) -> tuple[float, float, str]:
    """Seconds of one part, peak resident gigabytes, and the method of verification."""
    with tempfile.TemporaryDirectory() as folder:
        if part == "verify":
            work("convert", tiny, Path(folder) / "gda")
        work(part, tiny, Path(folder) / "gda")
    begun = time.perf_counter()
    method = work(part, source, out)
    return time.perf_counter() - begun, peak_bytes() / 1e9, method


def measure(name: str, config: LlamaConfig, scratch: Path, tiny: Path) -> dict[str, Any]:
    """Seconds and gigabytes of a model."""
    source, out = scratch / "llama", scratch / "gda"
    found: dict[str, Any] = {"model": name, "layers": config.num_hidden_layers}
    found["gigabytes"] = in_child(write_llama, source, config, "5GB") / 1e9
    for part in PARTS:
        settle(source, *[out] * (part != "verify"))
        found[f"{part}_s"], found[f"{part}_gb"], found["method"] = in_child(measured, part, source, out, tiny)
    for folder in (source, out):
        shutil.rmtree(folder)
    return found


def extrapolated(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """The figures of all layers: times and bytes grow with the layers, memory does not."""
    added = one | {"model": "70 B, added up", "layers": LAYERS}
    added |= {name: max(one[name], two[name]) for name in one if name.endswith("_gb")}
    for name in ("gigabytes", "convert_s", "verify_s", "whole_s"):
        added[name] = one[name] + (LAYERS - 1) * (two[name] - one[name])
    return added


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Folder to work in. Default: the system's temporary folder.")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--quick", action="store_true", help="Run with small models, as a smoke test.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shape, vocabulary = (QUICK, 1024) if options.quick else (SHAPE, options.vocabulary)
    gigabytes = 0.02 if options.quick else 3.0
    models = {"3 GB": llama_config(gigabytes)} | {
        f"70 B, layers: {layers}": llama_of(shape, vocabulary, layers) for layers in (1, 2)
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        tiny = Path(scratch) / "tiny"
        in_child(write_llama, tiny, llama_config(hidden_size=64), "5GB")
        figures = [measure(name, config, Path(scratch), tiny) for name, config in models.items()]
    figures.append(extrapolated(*figures[1:]))
    print(json.dumps(figures, indent=2)) if options.json else show(figures)


def show(figures: list[dict[str, Any]]) -> None:
    table = Table(title="gda convert --no-verify, gda verify --method layers, and gda convert")
    columns = ("model", "GB", *(f"{part}, {unit}" for part in PARTS for unit in ("s", "GB")), "whole / convert − 1")
    for column in (*columns, "method of the whole"):
        table.add_column(column, justify="right")
    for each in figures:
        names = ("gigabytes", *(f"{part}_{unit}" for part in PARTS for unit in ("s", "gb")))
        ratio = f"{each['whole_s'] / each['convert_s'] - 1:.2f}"
        table.add_row(each["model"], *(f"{each[name]:,.1f}" for name in names), ratio, each["method"])
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
