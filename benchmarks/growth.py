"""Measure the time and the peak memory of growing a generated Llama, by operator, compared with `cp -r`.

The Llama is copied, and expanded and grown by each operator without verification. Start-up (imports, reading headers,
planning) is the time of a dry run.

    python benchmarks/growth.py --gigabytes 2.6 --shard-size 400MB
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from processes import in_child, run

from conversion import llama_config, write_llama


def times(scratch: Path, gigabytes: float, shard_size: str, repeat: int) -> dict[str, Any]:
    """Seconds and peak memory of a copy and of each operator."""
    source, out = scratch / "llama", scratch / "out"
    nbytes = in_child(write_llama, source, llama_config(gigabytes), shard_size)
    layers = llama_config(gigabytes).num_hidden_layers
    report: dict[str, Any] = {"gigabytes": nbytes / 1e9, "layers": layers, "grown": {}}
    copies = []
    for _ in range(repeat):
        copies.append(run("cp", "-r", str(source), str(out))[0])
        shutil.rmtree(out)
    report["copy"] = statistics.median(copies)
    for option in (("--signal", "2"), ("--depth", str(layers + (layers + 1) // 2)), ("--width", "2")):
        command = [sys.executable, "-m", "gda.cli", "grow", str(source), str(out), *option]
        command += ["--no-verify", "--max-shard-size", shard_size]
        startup, seconds, peaks, written = [], [], [], 0
        for _ in range(repeat):
            startup.append(run(*command, "--dry-run")[0])
            taken, peak = run(*command)
            seconds.append(taken)
            peaks.append(peak)
            written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
            shutil.rmtree(out)
        report["grown"][" ".join(option)] = {
            "gigabytes": written / 1e9,
            "startup": statistics.median(startup),
            "seconds": statistics.median(seconds),
            "peak_rss_mb": max(peaks),
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.6)
    parser.add_argument("--shard-size", default="400MB")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="Folder to work in. Default: the system's temporary folder.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        timed = times(Path(scratch), options.gigabytes, options.shard_size, options.repeat)
    if options.json:
        print(json.dumps(timed, indent=2))
        return
    print(f"{timed['gigabytes']:.2f} GB, {timed['layers']} layers, in {options.shard_size} shards")
    print(f"  cp -r         {timed['copy']:7.2f} s")
    for option, output in timed["grown"].items():
        print(
            f"  {option:12}  {output['seconds']:7.2f} s for {output['gigabytes']:.2f} GB, of it start-up "
            f"{output['startup']:.2f} s; peak memory {output['peak_rss_mb']:,.0f} MB"
        )


if __name__ == "__main__":
    main()
