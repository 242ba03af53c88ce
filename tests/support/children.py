"""Work in forked children, which can be killed at a given moment and are always waited for with a time limit."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ENDED, FAILED = 0, 3
PATIENCE = 300.0  # seconds, after which a child counts as hung
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
NO_DESCRIPTOR = -1  # rmtree passes paths relative to the descriptor of a folder instead


def in_child(work: Callable[[], object], *, seconds: float = PATIENCE, kill_after: float | None = None) -> int:
    """Do `work` in a forked child; return ENDED, FAILED, or minus the number of the signal that killed it.

    Args:
        work: What to do.
        seconds: Time limit. A child that exceeds it prints its stack on standard error, and the test fails.
        kill_after: Seconds after which the child is killed on purpose.
    """
    child = os.fork()
    if child == 0:
        try:
            _forget_other_threads()
            work()
        except BaseException:
            os._exit(FAILED)
        os._exit(ENDED)
    return wait_for(child, seconds, kill_after)


def _forget_other_threads() -> None:
    """Disable the parent's other threads: a fork has none of them, but has their locks and pools."""
    faulthandler.register(signal.SIGUSR1, file=os.dup(2), all_threads=True)
    # An OpenMP pool from before the fork waits for ever. One made after the fork works, whatever its size, so no test
    # in the parent may use more than one thread.
    torch.set_num_threads(1)
    # tqdm's lock is a semaphore shared with the parent: a child that is killed while it holds it never releases it.
    tqdm.set_lock(threading.RLock())


def wait_for(child: int, seconds: float = PATIENCE, kill_after: float | None = None) -> int:
    """Wait for a child and return how it ended; kill it after `kill_after` seconds, or when it hangs.

    Raises:
        AssertionError: If the child exceeded `seconds`.
    """
    began = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - began
        if kill_after is not None and passed > kill_after:
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if passed > seconds:
            os.kill(child, signal.SIGUSR1)  # prints its stack
            time.sleep(1)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"a child has not ended after {seconds:.0f} s; its stack is on standard error")
        time.sleep(min(0.02, 0.001 + passed / 50))


def kill_me_at(moment: int, within: tuple[Path, ...]) -> None:
    """Make this process kill itself just before its `moment`-th change of a file under one of the paths `within`."""
    left = moment
    beginnings = tuple(map(str, within))

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        changes = event in CHANGES or (event == "open" and len(arguments) > 2 and (arguments[2] or 0) & WRITING)
        paths = [str(each) for each in arguments[:2] if isinstance(each, str | os.PathLike)]
        in_rmtree = event in ("os.remove", "os.rmdir") and arguments[-1] != NO_DESCRIPTOR
        if changes and (in_rmtree or any(path.startswith(beginnings) for path in paths)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def killed_at(moment: int, place: Path | tuple[Path, ...], work: Callable[[], object]) -> bool:
    """Do `work` in a child that kills itself at that moment; return False if the work ended before.

    Args:
        moment: The number of the change of the file system, counted from 1, before which the child dies.
        place: Only changes under this path, or these paths, are counted.
        work: What to do.
    """

    def killed() -> None:
        kill_me_at(moment, place if isinstance(place, tuple) else (place,))
        work()

    status = in_child(killed)
    assert status in (ENDED, -signal.SIGKILL)
    return status != ENDED
