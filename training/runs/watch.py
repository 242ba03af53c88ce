"""Processes of a run watch each other: when one is killed or its machine is lost, the others name it and end.

Collectives do not show that: with NCCL, and with any backend when a machine loses its power or network, they hang. So a
thread of each process exchanges a byte with the main process every two seconds.
"""

import contextlib
import hmac
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator

import torch

from gda.common.errors import Interrupted, first_line
from gda.common.progress import logger
from gda.training.runs.processes import Processes, reported_elsewhere

BEAT = 2.0  # seconds between two heartbeats
MISSED = 20  # heartbeats that a process may miss before it counts as lost
GRACE = 5.0  # seconds in which the main thread can end by itself; it may hang in a collective

# The last words of a process, and what the others say of it.
LEFT, FAILED, STOPPED, NONE = "left", "failed", "stopped", ""
FATES = {FAILED: "ended with an error", STOPPED: "was stopped", NONE: "was killed or crashed"}

# Messages of gloo and NCCL when a process at the other end is gone.
PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Socket Timeout", "remote process exited")


@contextlib.contextmanager
def watched(processes: Processes) -> Iterator[None]:
    """End the block when another process is lost, and print one line that names it.

    The error is a ConnectionError that is marked as reported. If the main thread hangs, the process exits with code 2.
    """
    if processes.count == 1:
        yield
        return
    watch, last_word = _Watch(processes), FAILED
    try:
        yield
        last_word = LEFT
    except Interrupted:  # all processes have agreed to stop
        last_word = LEFT
        raise
    except KeyboardInterrupt:
        last_word = STOPPED
        raise
    except RuntimeError as error:
        if not peer_is_gone(error):
            raise
        if not watch.decided.wait(GRACE):
            raise ConnectionError(f"{first_line(error)}; continue with --resume") from None
        raise reported_elsewhere(ConnectionError(watch.verdict)) from None
    finally:
        watch.leave(last_word)


def peer_is_gone(error: Exception) -> bool:
    """Whether a collective failed because the process at the other end is gone."""
    return isinstance(error, torch.distributed.DistError) or any(each in str(error) for each in PEER_IS_GONE)


class _Watch:
    """Connections to the other processes in the main process, and to the main process in the others."""

    def __init__(self, processes: Processes):
        self.decided = threading.Event()  # a process is lost or has ended with an error
        self.verdict = ""  # which one, and the remedy
        self._left, self._is_main = threading.Event(), processes.is_main
        self._peers: dict[int, socket.socket] = {}
        listener = _listen(processes.count) if self._is_main else None
        port = listener.getsockname()[1] if listener else 0
        everyone = processes.gather((socket.gethostname(), port, secrets.token_hex()))
        self._names = [f"process {index} on {host}" for index, (host, _, _) in enumerate(everyone)]
        host, port, token = everyone[0]
        if not self._is_main:
            self._connect(processes.index, os.environ.get("MASTER_ADDR", host), port, token)
        connected = sum(processes.gather(len(self._peers)))
        if listener is not None:
            with listener:
                self._peers = _accept(listener, connected, token)
        for peer in self._peers.values():
            peer.setblocking(False)
        self._woken, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="gda-watch", daemon=True)
        self._thread.start()

    def _connect(self, index: int, address: str, port: int, token: str) -> None:
        try:
            self._peers[0] = socket.create_connection((address, port), timeout=GRACE)
        except OSError as error:
            problem = f"{self._names[index]} cannot reach process 0 at {address}, port {port} ({error})"
            logger.warning("%s: if it is lost, the others do not notice", problem)
        else:
            self._peers[0].sendall(_hello(token, index))

    def leave(self, last_word: str) -> None:
        """Stop watching, and say how this process ends."""
        self._left.set()
        self._send(f"{last_word}\n")
        self._waker.send(b".")
        self._thread.join(GRACE)  # a thread that runs while Python shuts down can abort the process
        for end in (self._waker, self._woken):
            end.close()

    def _send(self, text: str) -> None:
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):  # if the other end is gone, reading shows it
                peer.send(text.encode())

    def _run(self) -> None:
        lost = self._first_lost()
        if lost is None or self._left.is_set():
            return
        index, last_word = lost
        fate = f"has not answered for {MISSED * BEAT:.0f} s" if last_word is None else FATES.get(last_word)
        # Another text is a line of the main process, which has printed it.
        self.verdict = f"{self._names[index]} {fate}; continue with --resume" if fate else str(last_word)
        if self._is_main:
            self._send(f"{self.verdict}\n")
        speaks = self._is_main or os.environ.get("LOCAL_RANK", "0") == "0"
        if speaks and last_word in (None, NONE, STOPPED):
            print(f"gda: {self.verdict}", file=sys.stderr, flush=True)
        self.decided.set()
        if not self._left.wait(GRACE):
            os._exit(2)

    def _first_lost(self) -> tuple[int, str | None] | None:
        """The first process that is lost, and its last word: None if it is silent. Returns when this process leaves."""
        missed = dict.fromkeys(self._peers, 0)  # beats instead of seconds, since a whole run may be suspended
        due = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for index, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, index)
            while self._peers and not self._left.is_set():
                for key, _ in selector.select(max(0.0, due - time.monotonic())):
                    if key.data is None:  # this process leaves
                        return None
                    missed[key.data] = 0
                    last_word = _last_word(self._peers[key.data])
                    if last_word == LEFT:
                        selector.unregister(self._peers.pop(key.data))
                    elif last_word is not None:
                        return key.data, last_word
                if time.monotonic() >= due:
                    due = time.monotonic() + BEAT
                    self._send(".")
                    missed = {index: missed[index] + 1 for index in self._peers}
                    if (silent := next((each for each in missed if missed[each] > MISSED), None)) is not None:
                        return silent, None
        return None


def _listen(count: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=count)
    return socket.create_server(("", 0), backlog=count)


def _hello(token: str, index: int) -> bytes:
    return f"{token}{index:08}".encode()


def _accept(listener: socket.socket, count: int, token: str) -> dict[int, socket.socket]:
    """By index, the connections of the other processes, which know the token."""
    peers: dict[int, socket.socket] = {}
    listener.settimeout(GRACE)
    while len(peers) < count:
        peer, _ = listener.accept()
        peer.settimeout(GRACE)
        with contextlib.suppress(OSError, ValueError):
            hello = peer.recv(len(_hello(token, 0)))  # not more: heartbeats follow
            if hmac.compare_digest(hello[: len(token)], token.encode()):
                peers[int(hello[len(token) :])] = peer
    return peers


def _last_word(peer: socket.socket) -> str | None:
    """What a process said before it left, NONE if it left without a word, None if it is alive."""
    try:
        received = peer.recv(4096).decode()
    except BlockingIOError:
        return None
    except OSError:
        return NONE
    said = received.lstrip(".")
    return said.partition("\n")[0] if said or not received else None
