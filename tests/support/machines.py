"""Launches of `gda train` on "machines", which are launchers on this one, with faults in the middle."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

PATIENCE = 120.0  # seconds, after which a launcher counts as hung
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no")


class Fault(NamedTuple):
    """A signal to a process, its launcher, or both (its machine), before a step."""

    signal: str
    process: int
    step: int
    whom: Literal["process", "launcher", "machine"] = "machine"


@dataclass(frozen=True)
class Ended:
    """How a launcher ended: its exit code, the lines of gda on standard error, and all lines."""

    code: int
    lines: list[str]
    error: str


def on_two_machines(arguments: list[str], *faults: Fault) -> dict[int, Ended]:
    """Run `gda` with a process on each machine; return by rank how the machines ended that are not lost."""
    lost = [fault.process for fault in faults if fault.whom == "machine"]
    places = [("--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1") for rank in (0, 1)]
    port = ("--num_processes", "2", "--main_process_port", str(free_port()))
    launchers = [_start([*ACCELERATE, *place, *port], arguments, faults) for place in places]
    return _ended({rank: each for rank, each in enumerate(launchers) if rank not in lost}, launchers)


def with_torchrun(arguments: list[str], *faults: Fault) -> Ended:
    """Run `gda` in two processes, which torchrun starts again after each fault."""
    launch = ["torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(len(faults))]
    launcher = _start([*launch, "--master-port", str(free_port())], arguments, faults)
    return _ended({0: launcher}, [launcher])[0]


def _start(launch: list[str], arguments: list[str], faults: tuple[Fault, ...]) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("in_machine.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return subprocess.Popen(
        [sys.executable, "-m", *launch, str(script), json.dumps(faults), *arguments],
        env=environment | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _ended(survivors: dict[int, subprocess.Popen[str]], launchers: list[subprocess.Popen[str]]) -> dict[int, Ended]:
    ended, until = {}, time.monotonic() + PATIENCE
    try:
        for rank, launcher in survivors.items():
            _, error = launcher.communicate(timeout=until - time.monotonic())
            lines = [line for line in error.splitlines() if line.startswith("gda: ")]
            ended[rank] = Ended(launcher.returncode, lines, error)
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                for child in psutil.Process(launcher.pid).children(recursive=True):
                    child.kill()
                launcher.kill()
                launcher.communicate()
    return ended


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
