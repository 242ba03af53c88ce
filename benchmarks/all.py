"""Run all benchmarks of speed and memory, and write one table and one JSON file.

    python benchmarks/all.py --quick                     # minutes: everything once, roughly
    python benchmarks/all.py --targets --out found.json  # half an hour: the targets in docs/performance.md
    python benchmarks/all.py --out found.json            # hours: every backend, dtype, length and batch
    python benchmarks/all.py --out found.json --resume   # continues an interrupted run

Each script runs in its own process and can also run on its own; benchmarks/README.md says what each measures.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from gda.common.files import read_json, write_json

HERE = Path(__file__).parent


class Line(NamedTuple):
    """One figure: the ratio of something in a case to a peer in the same run."""

    benchmark: str
    case: str
    name: str
    value: str
    ratio: float
    of: str  # what the ratio is of, and to which peer
    runs: tuple[float, ...] = ()  # the ratio in each run, lowest first, where there were several


class Target(NamedTuple):
    """The bound for the ratio of one line."""

    benchmark: str
    case: str
    name: str
    of: str
    bound: float
    at_least: bool = True


LLAMA, DIFFLLAMA, BEYOND = "speed × Llama", "speed × DiffLlama", "seconds beyond start-up × cp -r"
KEPT = ", memory kept"
SHARED, EXPANDED, PAIRED = "GDA 3:1", "GDA expanded 4:1", "GDA paired 4:1"
WHOLE = [
    f"{group}, {what}"
    for group in ("32/8", "16/4")
    for what in ("prefill of 2048, batch 1", "decode at 2048, batch 1", "training step of 2 × 512")
]
TARGETS = [
    *(Target("attention", f"32/8, prefill of {n}, batch 1", SHARED, LLAMA, 1.08) for n in (2048, 4096)),
    *(Target("attention", f"32/8, decode at {n}, dynamic cache, batch 1", SHARED, LLAMA, 1.0) for n in (2048, 8192)),
    Target("attention", "32/8, prefill of 2048, batch 1", EXPANDED, LLAMA, 0.90),
    Target("attention", "32/8, prefill of 4096, batch 1", EXPANDED, LLAMA, 0.86),
    *(Target("attention", f"32/8, decode at {n}, dynamic cache, batch 1", EXPANDED, LLAMA, 0.95) for n in (2048, 8192)),
    *(Target("attention", f"32/8, prefill of {n}, batch 1", SHARED, DIFFLLAMA, 1.6) for n in (2048, 4096)),
    Target("attention", "32/8, decode at 8192, dynamic cache, batch 1", SHARED, DIFFLLAMA, 1.7),
    *(Target("attention", f"40/8, prefill of {n}, batch 1", PAIRED, LLAMA, 0.54) for n in (2048, 4096)),
    Target("attention", "40/8, decode at 8192, dynamic cache, batch 1", PAIRED, LLAMA, 0.45),
    Target("attention", "40/8, decode at 8192, static cache, batch 1", PAIRED, LLAMA, 0.45),
    *(Target("models", case, SHARED, peer, 1.0) for case in WHOLE for peer in (LLAMA, DIFFLLAMA)),
    *(Target("models", case, SHARED, "step bytes × Llama", 1.05, at_least=False) for case in WHOLE),
    *(Target("models", case, SHARED, "cache bytes × Llama", 1.0, at_least=False) for case in (WHOLE[0], WHOLE[3])),
    *(Target("conversion", f"{size} GB", "convert --workers 1", BEYOND, 1.5, at_least=False) for size in (0.3, 2.6)),
]


def commands(mode: str) -> list[str]:
    """The scripts to run, with their arguments."""
    if mode == "quick":
        return [
            "attention.py --prefill 512 --decode 512 --batch 1 --padding none --budget 1",
            "models.py --groups 16/4 --prefill 128 --decode 512 --train 128 --budget 1",
            "conversion.py --quick",
            "startup.py --quick",
        ]
    if mode == "targets":
        return [
            "attention.py --targets --budget 10",
            # Where weights lie in memory is a matter of chance too, another in each process: so there are several.
            *["attention.py --targets --keep-memory --budget 10"] * 5,
            *["attention.py --targets --cache static --keep-memory"] * 5,
            "models.py --groups 32/8 16/4 --prefill 2048 --decode 2048 --keep-memory --budget 30",
            "conversion.py --gigabytes 0.3 2.6",
            "startup.py --repeat 3",
        ]
    found = []
    for backend in ("sdpa", "flex_attention", "compiled", "eager"):
        for dtype in ("float32", "bfloat16"):
            how = f"--backend {backend} --dtype {dtype} --keep-memory --budget 2"
            found.append(f"attention.py {how}")
            found.append(f"attention.py {how} --cache static --prefill")
            found.append(f"models.py {how} --batch 1 8 --padding none left")
    return [*found, "conversion.py --gigabytes 0.3 2.6 8", "startup.py"]


def benchmark_of(command: str) -> str:
    return command.split(".py")[0]


def run(command: str, console: Console) -> Any:
    """What a script prints as JSON; None if it fails."""
    console.print(f"[dim]{command}[/dim]")
    script, *arguments = command.split()
    line = [sys.executable, str(HERE / script), *arguments, "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def lines_of(benchmark: str, found: Any) -> Iterator[Line]:
    """The content of a script's JSON as lines."""
    if benchmark == "conversion":
        for each in found["figures"]:
            case, name = f"{each['asked']:g} GB", f"convert --workers {each['workers']}"
            yield Line(benchmark, case, name, f"{each['beyond_startup']:.2f} s", each["ratio"], BEYOND)
        return
    if benchmark == "startup":
        for part, case in (("commands", "start"), ("loading", "from_pretrained")):
            for name, each in found[part].items():
                seconds = f"{each['seconds']:.2f} s"
                yield Line(benchmark, case, name, seconds, each["ratio"]["seconds"], f"seconds × {each['peer']}")
        return
    options = found["options"]
    how = "" if options["backend"] == "sdpa" else f", {options['backend']}"
    how += "" if options["dtype"] == "float32" else f", {options['dtype']}"
    how += KEPT if options["keep_memory"] else ""
    for each in found["figures"]:
        case, name = each["case"] + how, each["name"]
        milliseconds = f"{1000 * each['seconds']:,.2f} ms"
        for peer, speed in each["speed"].items():
            if peer != name:
                yield Line(benchmark, case, name, milliseconds, speed, f"speed × {peer}")
        for kind, ratio in each["bytes_ratio"].items():
            megabytes = f"{each['bytes'][kind] / 1e6:,.1f} MB"
            if name != "Llama":
                yield Line(benchmark, case, name, megabytes, ratio, f"{kind} bytes × Llama")


def lines_of_all(runs: list[dict[str, Any]]) -> list[Line]:
    """The lines of all runs. For repeated runs, the one with the median ratio."""
    alike: dict[tuple[str, ...], list[Line]] = {}
    for each in runs:
        for line in lines_of(benchmark_of(each["command"]), each["found"]):
            alike.setdefault((line.benchmark, line.case, line.name, line.of), []).append(line)
    found = []
    for lines in alike.values():
        lines.sort(key=lambda line: line.ratio)
        ratios = tuple(line.ratio for line in lines) if len(lines) > 1 else ()
        found.append(lines[(len(lines) - 1) // 2]._replace(runs=ratios))
    return found


def save(runs: list[dict[str, Any]], path: Path) -> None:
    lines = lines_of_all(runs)
    figures = [line._asdict() for line in lines]
    write_json(path, {"targets": against_targets(lines), "figures": figures, "runs": runs})


def read(path: Path) -> list[dict[str, Any]]:
    """The runs in a file that `save` wrote."""
    try:
        return [{"command": each["command"], "found": each["found"]} for each in read_json(path)["runs"]]
    except (ValueError, LookupError, TypeError):
        sys.exit(f"{path}: not a file that --out wrote")


def show(lines: list[Line], console: Console) -> None:
    table = Table(title="speed is the peer's time over the own: above 1 is faster")
    for column in Line._fields:
        table.add_column(column, justify="right" if column in ("value", "ratio") else "left", no_wrap=True)
    before = None
    for line in lines:
        if before and line[:2] != before[:2]:
            table.add_section()
        shown = ("", "") if before and line[:2] == before[:2] else line[:2]
        table.add_row(*shown, line.name, line.value, f"{line.ratio:.3f}", line.of, spread(line.runs))
        before = line
    console.print(table)


def spread(ratios: Sequence[float]) -> str:
    return f"{len(ratios)}: {ratios[0]:.3f} to {ratios[-1]:.3f}" if ratios else ""


def against_targets(lines: list[Line]) -> list[dict[str, Any]]:
    """Each measured target, with its figure and whether it is met."""
    return [
        {
            **target._asdict(),
            "case": line.case,
            "found": line.ratio,
            "runs": line.runs,
            "met": round(line.ratio, 2) >= target.bound if target.at_least else round(line.ratio, 2) <= target.bound,
        }
        for target in TARGETS
        for line in lines
        if target[:4] == (line.benchmark, line.case.removesuffix(KEPT), line.name, line.of)
    ]


def show_targets(targets: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="targets")
    for column in ("benchmark", "case", "name", "of", "bound", "found", "met", "runs"):
        table.add_column(column, no_wrap=True)
    for each in targets:
        bound = f"{'≥' if each['at_least'] else '≤'} {each['bound']:.2f}"
        met = "yes" if each["met"] else "[bold]no[/bold]"
        named = (each[key] for key in ("benchmark", "case", "name", "of"))
        table.add_row(*named, bound, f"{each['found']:.3f}", met, spread(each["runs"]))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_const", dest="mode", const="quick", default="full")
    mode.add_argument("--targets", action="store_const", dest="mode", const="targets")
    parser.add_argument("--only", nargs="+", choices=("attention", "models", "conversion", "startup"))
    parser.add_argument("--out", type=Path, help="JSON file to write; it is updated after each script.")
    parser.add_argument("--resume", action="store_true", help="Keep the results in --out, and run the rest.")
    options = parser.parse_args()
    if options.resume and not options.out:
        parser.error("--resume goes on with the file of --out")
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out: {options.out.parent} is not a folder")
    console = Console()
    if not console.is_terminal:
        console.width = 200
    runs, failed = read(options.out) if options.resume and options.out.exists() else [], []
    kept = Counter(each["command"] for each in runs)
    for command in commands(options.mode):
        if options.only and benchmark_of(command) not in options.only:
            continue
        if kept[command]:
            kept[command] -= 1
            continue
        found = run(command, console)
        if found is None:
            failed.append(command)
            continue
        runs.append({"command": command, "found": found})
        if options.out:
            save(runs, options.out)
    lines = lines_of_all(runs)
    show(lines, console)
    if targets := against_targets(lines):
        show_targets(targets, console)
    if failed:
        sys.exit(f"failed, and are not in the table: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
