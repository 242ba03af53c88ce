"""Convert and verify models with the layers of a 70 B Llama, and add up what all of its layers would take.

    python benchmarks/large.py --folder FOLDER
    python benchmarks/large.py --quick

Two random models in bfloat16 are made, with one and with two layers of that shape. Each is converted, and verified
layer by layer as models that do not fit into memory are, each in its own process. What the second layer adds, times the
number of layers, and the rest of the first model make up the time for the whole model. One layer at a time is in
memory, so the peak does not grow with the number of layers.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from processes import in_child
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from conversion import write_llama
from gda.conversion.convert import convert
from gda.conversion.verify import verify

LAYERS = 80
SHAPE = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
QUICK = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 16, "num_key_value_heads": 4}
VOCABULARY = 128256


def llama_of(shape: dict[str, int], vocabulary: int, layers: int) -> LlamaConfig:
    """A Llama with that many layers."""
    return LlamaConfig(**shape, vocab_size=vocabulary, num_hidden_layers=layers, dtype="bfloat16")


def converted(source: Path, out: Path) -> tuple[float, float]:
    """Seconds of a conversion without verification, and peak resident gigabytes."""
    begun = time.perf_counter()
    convert(source, out, verify=False)
    return time.perf_counter() - begun, _peak()


def verified(source: Path, out: Path) -> tuple[float, float]:
    """Seconds of a verification layer by layer, and peak resident gigabytes."""
    begun = time.perf_counter()
    assert verify(source, out, method="layers").passed
    return time.perf_counter() - begun, _peak()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(layers: int, shape: dict[str, int], vocabulary: int, scratch: Path) -> dict[str, Any]:
    """Seconds and gigabytes of a model with that many layers."""
    source, out = scratch / "llama", scratch / "gda"
    nbytes = in_child(write_llama, source, llama_of(shape, vocabulary, layers), "5GB")
    found: dict[str, Any] = {"layers": layers, "gigabytes": nbytes / 1e9}
    found["convert_s"], found["convert_gb"] = in_child(converted, source, out)
    found["verify_s"], found["verify_gb"] = in_child(verified, source, out)
    for folder in (source, out):
        shutil.rmtree(folder)
    return found


def extrapolated(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """The figures of all layers: times and bytes grow with the layers, memory does not."""
    whole = {"layers": LAYERS, **{name: max(one[name], two[name]) for name in ("convert_gb", "verify_gb")}}
    for name in ("gigabytes", "convert_s", "verify_s"):
        whole[name] = one[name] + (LAYERS - 1) * (two[name] - one[name])
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Folder to work in. Default: the system's temporary folder.")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--quick", action="store_true", help="Run with a small shape, as a smoke test.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shape, vocabulary = (QUICK, 1024) if options.quick else (SHAPE, options.vocabulary)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        figures = [measure(layers, shape, vocabulary, Path(scratch)) for layers in (1, 2)]
    figures.append(extrapolated(*figures))
    print(json.dumps(figures, indent=2)) if options.json else show(figures)


def show(figures: list[dict[str, Any]]) -> None:
    table = Table(title="gda convert, then gda verify --method layers")
    for column in ("layers", "GB", "convert, s", "its peak, GB", "verify, s", "its peak, GB", "verify / convert"):
        table.add_column(column, justify="right")
    for each in figures:
        values = [each[name] for name in ("gigabytes", "convert_s", "convert_gb", "verify_s", "verify_gb")]
        row = [f"{value:,.1f}" for value in values]
        table.add_row(str(each["layers"]), *row, f"{each['verify_s'] / each['convert_s']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
