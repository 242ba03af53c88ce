"""Work in forked children, which can be killed at a chosen moment and are never waited for without a time limit."""

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
PATIENCE = 300.0  # seconds, after which a child hangs
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
NO_DESCRIPTOR = -1  # inside of rmtree, paths are relative to the descriptor of a folder


def in_child(work: Callable[[], object], *, seconds: float = PATIENCE, kill_after: float | None = None) -> int:
    """Do `work` in a forked child; return 0 or 3 for how it ended, or minus the signal that killed it.

    Args:
        work: What to do.
        seconds: After which it hangs: it shows where on standard error, and the test fails.
        kill_after: After which it is killed on purpose.
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
    """They are not here: nobody gives back what they held, nor does the work of a pool of them."""
    faulthandler.register(signal.SIGUSR1, file=os.dup(2), all_threads=True)
    # A pool of OpenMP that was made before the fork waits for ever. One made after it is well, whatever its size, which
    # is why no test of this process may use more than one thread.
    torch.set_num_threads(1)
    # The lock of the bars is a semaphore shared with the parent: who is killed while holding it holds it for ever.
    tqdm.set_lock(threading.RLock())


def wait_for(child: int, seconds: float = PATIENCE, kill_after: float | None = None) -> int:
    """How a child ended; one that does not, or is to be killed, is killed.

    Raises:
        AssertionError: if it hung.
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
            os.kill(child, signal.SIGUSR1)  # shows where
            time.sleep(1)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"a child has not ended after {seconds:.0f} s; standard error says where it was")
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
