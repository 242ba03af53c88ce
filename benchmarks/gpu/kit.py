"""Code that the parts of the GPU run share: options, a JSON file that is complete after every row, a budget, timing.

A part adds each row as soon as it is known, so an interrupted run loses at most the current row. A case that fails
becomes a row with its error, and the part continues.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from measuring import peak_allocated, synchronize

from gda.common.errors import first_line
from gda.common.files import write_text

Row = dict[str, Any]


class OutOfTime(Exception):
    """The part's budget is used up, and the rest is skipped."""


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options of every part."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Folder of the JSON file.")
    parser.add_argument("--budget", type=float, default=120.0, help="Seconds until further cases are skipped.")
    parser.add_argument("--smoke", action="store_true", help="Use tiny sizes, as a smoke test.")
    return parser


def one_line(error: BaseException) -> str:
    """The kind of an error and the beginning of its message, at most 200 characters."""
    return f"{type(error).__name__}: {first_line(error)}"[:200]


class Part:
    """The rows of one part, its file and its budget."""

    def __init__(self, name: str, options: argparse.Namespace):
        if not options.smoke and not torch.cuda.is_available():
            sys.exit("torch sees no GPU; --smoke runs on a CPU")
        # The imports, which take up to a minute, are part of the budget.
        self.started = time.monotonic() - (time.time() - psutil.Process().create_time())
        self.budget = float(options.budget)
        self.path: Path = options.out / f"gpu_{name}.json"
        self.content: Row = {"environment": environment(), "smoke": options.smoke, "seconds": 0.0, "rows": []}
        options.out.mkdir(parents=True, exist_ok=True)
        self.write()

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.started)

    def write(self) -> None:
        """Replace the file with all rows so far."""
        self.content["seconds"] = round(time.monotonic() - self.started, 1)
        write_text(self.path, json.dumps(self.content, indent=1, default=str) + "\n")

    def add(self, row: Row) -> None:
        """Add a row, save the file, print one line."""
        self.rows.append(row)
        self.write()
        values = " ".join(f"{key}={_short(value)}" for key, value in row.items() if value is not None)
        print(f"[{self.budget - self.left():6.1f}s] {values}", flush=True)

    def attempt(self, labels: Row, run: Callable[[], Row | None], needs: float = 1.0) -> None:
        """Add the row that `run` returns, or the reason why there is none. `needs`: its minimum duration in seconds."""
        begun = time.monotonic()
        failed = True
        try:
            if self.left() < needs:
                raise OutOfTime
            self.content["running"] = " ".join(str(value) for value in labels.values())  # if the process is ended here
            self.write()
            if (values := run()) is not None:
                self.add({**labels, **values, "seconds": round(time.monotonic() - begun, 2)})
            failed = False
        except OutOfTime:
            self.add({**labels, "skipped": "out of time"})
        except Exception as error:  # whatever a backend or a compiler raises, the other cases are still worth a run
            self.add({**labels, "error": one_line(error)})
        self.content.pop("running", None)
        self.write()
        if failed:
            free_memory()  # only here, where no error holds what its frames held any more

    def finish(self) -> None:
        """End the process with exit code 1 if a case failed."""
        if failed := sum("error" in row or row.get("ok") is False for row in self.rows):
            sys.exit(f"{failed} of {len(self.rows)} cases failed")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def environment() -> Row:
    """The environment that figures depend on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.processor() or platform.machine()})",
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def free_memory() -> None:
    """Free the memory of the last case."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------- timing


def milliseconds(run: Callable[[], Any]) -> Callable[[], float]:
    """Start timing a run; the returned function gives the time once the device is synchronized."""
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        run()
        taken = 1000 * (time.perf_counter() - begun)
        return lambda: taken
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    return lambda: start.elapsed_time(end)


class Contest:
    """The contestants of one case take turns: A B C, B C A, … Failing ones drop out with their error.

    `runs` maps names to the timed functions; `prepare` is called before each run and is not timed. `has_peaks`: whether
    a run allocates its memory; the replay of a graph has it from before.
    """

    def __init__(
        self, runs: Mapping[str, Callable[[], Any]], prepare: Callable[[], Any] = lambda: None, has_peaks: bool = True
    ):
        self.runs, self.prepare, self.has_peaks = dict(runs), prepare, has_peaks
        self.errors: dict[str, str] = {}
        self.peak: dict[str, int] = {}
        self.times: dict[str, list[float]] = {}

    def measure(self, seconds: float, most: int = 50) -> None:
        """Warm up, then run as many rounds as fit into `seconds`, from 5 to `most`."""
        round_seconds = 0.0
        for name, run in list(self.runs.items()):
            try:
                self.prepare()
                run()
                self.prepare()
                self.peak[name] = peak_allocated(run)  # not of the first run, which may allocate workspaces
                self.prepare()
                begun = time.perf_counter()
                run()
                synchronize()
                round_seconds += time.perf_counter() - begun
            except Exception as error:  # out of memory, or a kernel that is not there
                self.errors[name] = one_line(error)
            self._drop_failed()
        self.times = {name: [] for name in self.runs}
        for repetition in range(max(5, min(most, round(seconds / max(round_seconds, 1e-4))))):
            self._round(repetition)
            self._drop_failed()

    def _round(self, number: int) -> None:
        names, taken = list(self.runs), {}
        first = number % max(len(names), 1)
        for name in names[first:] + names[:first]:
            try:
                self.prepare()
                synchronize()  # otherwise work of the one before would hide what it takes to launch this one
                taken[name] = milliseconds(self.runs[name])
            except Exception as error:
                self.errors[name] = one_line(error)
        synchronize()
        for name, read in taken.items():
            self.times[name].append(read())

    def _drop_failed(self) -> None:
        for name in self.errors.keys() & self.runs.keys():
            del self.runs[name]
            self.times.pop(name, None)
            free_memory()  # only here, where the error no longer holds what its frames held

    def rows(self, labels: Row, peer: str, limits: Mapping[str, float]) -> Iterable[Row]:
        """A row for each contestant: median, spread, speed relative to the peer (above 1 is faster), peak memory."""
        for name, times in self.times.items():
            ordered = sorted(times)
            row = {
                **labels,
                "name": name,
                "ms": statistics.median(times),
                "low": ordered[len(times) // 10],
                "high": ordered[-1 - len(times) // 10],
                "rounds": len(times),
                "peak_mb": self.peak[name] / 1e6 if self.has_peaks else None,
                "limit": limits.get(name),
            }
            if peer in self.times:
                row["speed"] = statistics.median(a / b for a, b in zip(self.times[peer], times, strict=True))
            yield row
        for name, error in self.errors.items():
            yield {**labels, "name": name, "error": error}


def capture(step: Callable[[], Any], warm_ups: int = 3, pool: Any = None, stream: Any = None) -> Callable[[], Any]:
    """Run `step` `warm_ups` times, then capture it in a CUDA graph and return its replay. On a CPU: the step itself.

    `step` must read its inputs from, and write its results to, persistent tensors. Graphs of one `pool` and `stream`
    share memory, so their steps must never run at the same time.
    """
    if not torch.cuda.is_available():
        for _ in range(warm_ups):
            step()
        return step
    stream = torch.cuda.Stream() if stream is None else stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        step()
    return graph.replay
