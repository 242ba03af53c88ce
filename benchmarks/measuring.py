"""Code that the benchmarks share: interleaved repetitions, ratios to a reference in the same run, memory, tables, JSON.

The speed of a shared machine changes from one minute to the next. The models therefore take turns: each repetition runs
all of them once, and the figure is the median of the ratios within a repetition.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from gda.common.errors import first_line

Run = Callable[[], Any]


@dataclass
class Figure:
    """The time of one contestant in one case. Its speed is a peer's time divided by its own, so above 1 is faster."""

    case: str
    name: str
    seconds: float
    speed: dict[str, float]  # by peer
    repetitions: int
    bytes: dict[str, int] = field(default_factory=dict)  # of memory, by kind
    bytes_ratio: dict[str, float] = field(default_factory=dict)  # over the first peer's


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait for the device: CUDA runs asynchronously."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# CPU time is that of one thread: on a machine where others run it says more than the clock on the wall.
CLOCKS: dict[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "cpu": time.thread_time,
    "all": lambda: sum(os.times()[:4]),  # CPU time of all threads, and of child processes that have ended
}


def interleaved(
    runs: Mapping[str, Run],
    options: argparse.Namespace,
    prepare: Callable[[str], Any] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each repetition: as many as fit the budget, at least five (three of long ones) and at most 300.

    `prepare` is called before each and is not timed. Two rounds warm up; contestants that fail in the first are left
    out with a message. Rounds start with different names, so that the order varies.
    """
    clock = CLOCKS[options.clock]

    def seconds_of(name: str) -> float:
        prepare(name)
        synchronize()
        begun = clock()
        runs[name]()
        synchronize()
        return clock() - begun

    def does_run(name: str) -> bool:
        try:
            seconds_of(name)
        except Exception as error:  # a backend or a compiler that cannot do it is no reason to lose all the others
            tell(f"{name} is left out, it fails: {first_line(error)}")
            return False
        return True

    names = [name for name in runs if does_run(name)]
    if not names:
        return {}
    round_seconds = sum(seconds_of(name) for name in names)
    least = 5 if round_seconds <= options.budget else 3
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(min(300, max(least, round(options.budget / round_seconds)))):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_of(name))
    return seconds


def figures(case: str, seconds: dict[str, list[float]], peers: Iterable[str]) -> list[Figure]:
    """A figure for each name, relative to the peers that ran."""
    return [
        Figure(
            case,
            name,
            statistics.median(taken),
            {peer: median_ratio(seconds[peer], taken) for peer in peers if peer in seconds},
            len(taken),
        )
        for name, taken in seconds.items()
    ]


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def trained_tokenizer(texts: Iterable[str], size: int, special: list[str], **roles: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` tokens, first the special ones; `roles` names some of them, such as `eos_token`."""
    model: Any = ByteLevelBPETokenizer()
    model.train_from_iterator(texts, size, min_frequency=0, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, **roles)


def tell(what: str) -> None:
    """Print the current activity."""
    Console(stderr=True).print(what, style="dim", highlight=False, markup=False)


def peak_allocated(run: Run) -> int:
    """Peak bytes that torch allocated during `run`, beyond those allocated before it."""
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The allocator of the CPU keeps no peak, but tells the profiler of each of its steps.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    steps = sorted((each["ts"], each["args"]["Bytes"]) for each in events if each.get("name") == "[memory]")
    held = peak = 0
    for _, step in steps:
        held += step
        peak = max(peak, held)
    return peak


@dataclass
class Machine:
    """The best performance of the machine in this run: the limits that times are compared with."""

    gemm_flops: float
    read_bytes: float
    copy_bytes: float

    @classmethod
    def measured(cls, dtype: torch.dtype, options: argparse.Namespace) -> "Machine":
        """Matrix multiplication at 2,048³ in FLOP/s; memory read, and read plus written, in bytes/s."""
        a, b = (torch.randn(2048, 2048, device=device()).to(dtype) for _ in range(2))
        rows = torch.randn(1 << 14, 1 << 12, device=device())  # 256 MiB: no cache holds it
        vector, target = torch.randn(1 << 12, device=device()), torch.empty_like(rows)
        runs: dict[str, Run] = {
            "gemm": lambda: torch.mm(a, b),
            "read": lambda: torch.mv(rows, vector),
            "copy": lambda: target.copy_(rows),
        }
        best = {name: min(taken) for name, taken in interleaved(runs, options).items()}
        nbytes = rows.numel() * rows.element_size()
        return cls(2 * 2048**3 / best["gemm"], nbytes / best["read"], 2 * nbytes / best["copy"])


# glibc gives large blocks back to the kernel, which clears them anew, page by page, in one repetition and not in the
# next. With these it keeps them, as CUDA's allocator does.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the options, and apply those about this process."""
    options = parser.parse_args()
    if options.keep_memory and any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)  # glibc reads it at the start
    torch.set_num_threads(options.threads)
    if not torch.cuda.is_available():
        limit_memory()
    return options


def limit_memory() -> None:
    """Make allocations beyond the memory fail, as on CUDA; otherwise the kernel kills the process."""
    limit = psutil.virtual_memory().available * 9 // 10
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def add_options(parser: argparse.ArgumentParser, budget: float) -> None:
    """The options of all of these scripts."""
    parser.add_argument("--keep-memory", action="store_true", help="Keep freed memory in the process (CPU).")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads.")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall: elapsed time. cpu: CPU time of one thread; needs --threads 1.",
    )
    parser.add_argument(
        "--budget", type=float, default=budget, help="Seconds that the repetitions of each case may take."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """The environment that figures depend on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
    }


def report(title: str, found: Sequence[Figure], options: argparse.Namespace) -> None:
    """Print the figures: a table with a line for each case and name, or JSON."""
    if options.json:
        print(json.dumps({**environment(options), "figures": [asdict(each) for each in found]}, indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console.width = 160  # lines that nobody's screen breaks
    console.print(table(title, found))


def table(title: str, found: Sequence[Figure]) -> Table:
    peers = list(dict.fromkeys(peer for each in found for peer in each.speed))
    kinds = list(dict.fromkeys(kind for each in found for kind in each.bytes))
    result = Table(title=title)
    for column in ("case", ""):
        result.add_column(column, no_wrap=True)
    for column in ("ms", *(f"× {peer}" for peer in peers)):
        result.add_column(column, justify="right")
    for kind in kinds:
        result.add_column(f"{kind} MB", justify="right")
        result.add_column(f"× {peers[0]}", justify="right")
    case = None
    for each in found:
        if case not in (None, each.case):
            result.add_section()
        speeds = (f"{each.speed[peer]:.3f}" if peer in each.speed else "" for peer in peers)
        memory = [
            text
            for kind in kinds
            for text in (f"{each.bytes[kind] / 1e6:,.1f}" if kind in each.bytes else "", _ratio(each, kind))
        ]
        shown = "" if each.case == case else each.case
        result.add_row(shown, each.name, f"{1000 * each.seconds:,.2f}", *speeds, *memory)
        case = each.case
    return result


def _ratio(figure: Figure, kind: str) -> str:
    return f"{figure.bytes_ratio[kind]:.3f}" if kind in figure.bytes_ratio else ""
