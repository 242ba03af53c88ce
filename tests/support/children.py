"""Forked children: what must be killed, limited or watched is done in one, and none of them is waited for in vain."""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

ENDED, FAILED = 0, 3
PATIENCE = 300.0  # seconds, after which a child hangs


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
