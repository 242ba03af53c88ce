"""Show where the time of one attention layer goes, by operation, compared with the limit of the machine.

    python benchmarks/profile_layer.py --names Llama "GDA 3:1" --prefill 2048 --decode 8192

The limit is measured in the same run: matrix products of size 2,048³ for FLOPs, reading 256 MiB for bytes. A layer's
FLOPs are those of its projections and of the causal half of QKᵀ and AV; its bytes in a decode step are its weights and
the cached keys and values, read once, and with a dynamic cache read and written once more.
"""

import argparse
import json
import statistics
from dataclasses import asdict
from typing import Any

import torch
from attention import GROUPS, Case
from filled_cache import CACHES
from layers import build_layer
from measuring import Machine, add_options, device, environment, parse
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType

Profile = dict[str, Any]


def flops(layer: Any, tokens: int) -> float:
    """FLOPs of a prefill: 2 for each weight and token, and causal attention."""
    config = layer.config
    weights = sum(each.weight.numel() for each in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj))
    maps = config.num_attention_heads * tokens * tokens / 2
    if config.model_type == "diffllama" or getattr(config, "kv_layout", None) == "paired":
        maps *= 2  # each map is computed for two slabs of values
    return 2 * tokens * weights + 4 * maps * config.head_dim


def nbytes(layer: Any, context: int, cache: str) -> float:
    """Bytes of a decode step."""
    config, size = layer.config, layer.o_proj.weight.element_size()
    weights = sum(each.numel() for each in layer.parameters())
    cached = 2 * config.num_key_value_heads * context * config.head_dim
    return size * (weights + cached * (3 if cache == "dynamic" else 1))


def limit(layer: Any, tokens: int, context: int, machine: Machine, cache: str) -> float:
    """Seconds at the machine's best performance: computing in a prefill, reading in a decode step."""
    return nbytes(layer, context, cache) / machine.read_bytes if context else flops(layer, tokens) / machine.gemm_flops


def operations(case: Case, runs: int) -> dict[str, float]:
    """Seconds of each operation per run."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(runs):
            case.prepare()
            case.run()
    return {
        each.key: (each.self_device_time_total if torch.cuda.is_available() else each.self_cpu_time_total) / 1e6 / runs
        for each in profiled.key_averages()
        if each.device_type == DeviceType.CPU  # a kernel's time is that of the operation that starts it
    }


@torch.inference_mode()
def profiles(tokens: int, context: int, machine: Machine, options: argparse.Namespace) -> list[Profile]:
    """Medians for each layer in one situation, over rounds in which the layers take turns."""
    layers = {
        name: build_layer(name, GROUPS[options.group][0], "sdpa").to(device(), getattr(torch, options.dtype))
        for name in options.names
    }
    cases = {name: Case(layer, layer, tokens, context, 1, "none", options.cache) for name, layer in layers.items()}
    runs = 20 if context else 1
    rounds = [{name: operations(case, runs) for name, case in cases.items()} for _ in range(options.rounds + 1)]
    what = f"decode at {context}, {options.cache} cache" if context else f"prefill of {tokens}"
    return [
        {
            "name": name,
            "case": f"{options.group}, {what}",
            "limit": limit(layer, tokens, context, machine, options.cache),
            "operations": {
                key: statistics.median(each[name].get(key, 0.0) for each in rounds[1:])  # the first warms up
                for key in rounds[0][name]
            },
        }
        for name, layer in layers.items()
    ]


def show(found: list[Profile], machine: Machine, most: int = 9) -> None:
    console = Console()
    console.print(
        f"the machine: {machine.gemm_flops / 1e9:.0f} GFLOP/s, {machine.read_bytes / 1e9:.1f} GB/s read, "
        f"{machine.copy_bytes / 1e9:.1f} GB/s read and written"
    )
    for each in found:
        whole = sum(each["operations"].values())
        table = Table(title=f"{each['name']}, {each['case']}")
        for column in ("operation", "ms", "share"):
            table.add_column(column, justify="left" if column == "operation" else "right")
        largest = sorted(each["operations"].items(), key=lambda pair: -pair[1])[:most]
        others = whole - sum(seconds for _, seconds in largest)
        for operation, seconds in [*largest, ("others", others)]:
            table.add_row(operation.removeprefix("aten::"), f"{1000 * seconds:.3f}", f"{seconds / whole:.1%}")
        table.add_section()
        table.add_row("together", f"{1000 * whole:.3f}", "")
        table.add_row("the machine's limit", f"{1000 * each['limit']:.3f}", f"{each['limit'] / whole:.1%}")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=GROUPS, default="32/8")
    parser.add_argument("--names", nargs="+", default=["Llama", "GDA 3:1"])
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048], metavar="TOKENS")
    parser.add_argument("--decode", type=int, nargs="*", default=[8192], metavar="CONTEXT")
    parser.add_argument("--cache", choices=CACHES, default="dynamic")
    parser.add_argument("--rounds", type=int, default=9)
    add_options(parser, budget=3.0)
    options = parse(parser)
    machine = Machine.measured(getattr(torch, options.dtype), options)
    situations = [(tokens, 0) for tokens in options.prefill] + [(1, context) for context in options.decode]
    found = [each for situation in situations for each in profiles(*situation, machine, options)]
    if options.json:
        print(json.dumps({**environment(options), "machine": asdict(machine), "profiles": found}, indent=2))
    else:
        show(found, machine)


if __name__ == "__main__":
    main()
