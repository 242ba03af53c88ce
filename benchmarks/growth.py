"""Measure how exact growth is, by operator and layout, and its time and peak memory on a generated Llama.

The first table gives |Δlogit| relative to the largest logit, in float32, for small random models whose λ is not 0. For
the second, the Llama is copied, and expanded and grown by each operator without verification. Start-up (imports,
reading headers, planning) is the time of a dry run.

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

import torch
from processes import in_child, run

import gda
from conversion import llama_config, write_llama

OPERATORS: dict[str, dict[str, int]] = {
    "--signal 2": {"signal": 2},
    "--signal 3": {"signal": 3},
    "--depth 6": {"depth": 6},
    "--width 2": {"width": 2},
    "--signal 2 --depth 6 --width 2": {"signal": 2, "depth": 6, "width": 2},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "shared, GQA": {"num_attention_heads": 16, "num_noise_heads": 4, "num_key_value_heads": 4},
    "shared, MHA": {"num_attention_heads": 16, "num_noise_heads": 4, "num_key_value_heads": 12},
    "shared, MQA": {"num_attention_heads": 16, "num_noise_heads": 4, "num_key_value_heads": 1},
    "shared, tanh λ": {
        "num_attention_heads": 16,
        "num_noise_heads": 4,
        "num_key_value_heads": 4,
        "lambda_type": "tanh",
    },
    "paired, head norm": {
        "num_attention_heads": 16,
        "num_noise_heads": 4,
        "num_key_value_heads": 8,
        "kv_layout": "paired",
        "head_norm": True,
    },
}
TIMED = (("--signal", "2"), ("--depth", "30"), ("--width", "2"))


def exactness(scratch: Path, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Relative |Δlogit| by layout and operator."""
    table: dict[str, dict[str, float]] = {}
    for layout, fields in LAYOUTS.items():
        torch.manual_seed(0)
        config = gda.GDAConfig(
            vocab_size=1000,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            head_dim=32,
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=None,
            **fields,
        )
        gda.GDAForCausalLM(config).to(dtype).save_pretrained(scratch / "small")
        table[layout] = {}
        for operator, growth in OPERATORS.items():
            report = gda.grow(scratch / "small", scratch / "grown", overwrite=True, **growth)
            assert report.verification is not None
            assert report.verification.relative is not None
            table[layout][operator] = report.verification.relative
    return table


def times(scratch: Path, gigabytes: float, shard_size: str, repeat: int) -> dict[str, Any]:
    """Seconds and peak memory of a copy and of each operator."""
    source, out = scratch / "llama", scratch / "out"
    nbytes = in_child(write_llama, source, llama_config(gigabytes), shard_size)
    report: dict[str, Any] = {"gigabytes": nbytes / 1e9, "layers": llama_config(gigabytes).num_hidden_layers}
    copies = []
    for _ in range(repeat):
        copies.append(run("cp", "-r", str(source), str(out))[0])
        shutil.rmtree(out)
    report["copy"] = statistics.median(copies)
    for option in TIMED:
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
        report[" ".join(option)] = {
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
    parser.add_argument("--skip-times", action="store_true", help="Print only the table of exactness.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        exact = {str(dtype): in_child(exactness, Path(scratch), dtype) for dtype in (torch.float32, torch.bfloat16)}
        timed = {}
        if not options.skip_times:
            timed = times(Path(scratch), options.gigabytes, options.shard_size, options.repeat)
    if options.json:
        print(json.dumps({"relative_error": exact, "times": timed}, indent=2))
        return
    for dtype, table in exact.items():
        print(f"relative |Δlogit|, weights in {dtype.removeprefix('torch.')}")
        for operator in OPERATORS:
            row = "  ".join(f"{layout} {errors[operator]:.1e}" for layout, errors in table.items())
            print(f"  {operator:32}{row}")
    if timed:
        print(f"{timed['gigabytes']:.2f} GB, {timed['layers']} layers, in {options.shard_size} shards")
        print(f"  cp -r         {timed['copy']:7.2f} s")
        for option in map(" ".join, TIMED):
            output = timed[option]
            print(
                f"  {option:12}  {output['seconds']:7.2f} s for {output['gigabytes']:.2f} GB, of it start-up "
                f"{output['startup']:.2f} s; peak memory {output['peak_rss_mb']:,.0f} MB"
            )


if __name__ == "__main__":
    main()
