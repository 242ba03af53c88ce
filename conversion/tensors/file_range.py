"""Reading a range of bytes from a file, never mapping it.

When a mapped file is truncated, or its disk fails, the process that touches it is killed; a read raises an error.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gda.common.errors import errors_naming
from gda.common.files import stamp_of

CHUNK = 1 << 18  # bytes; fits in the processor's cache between reading and writing or hashing
MAX_READ = 1 << 26  # bytes in one system call, which an interrupt has to wait for


@dataclass(frozen=True)
class FileRange:
    """`nbytes` of a file, starting at `offset`.

    `stamp` is `stamp_of` the file when this range was found; reading a file with another stamp is refused.
    """

    path: Path
    offset: int
    nbytes: int
    stamp: tuple[int, int]

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in pieces. Each piece is overwritten by the next one."""
        view, done = memoryview(bytearray(CHUNK)), 0
        with self._opened() as descriptor:
            while done < self.nbytes:
                size = self._read_at(descriptor, view[: min(CHUNK, self.nbytes - done)], done)
                yield view[:size]
                done += size

    def read_into(self, buffer: memoryview, name: str) -> None:
        """Fill `buffer`, of `nbytes` bytes, with the bytes; ValueError naming `name` if they cannot be read."""
        done = 0
        try:
            with self._opened() as descriptor:
                while done < self.nbytes:
                    done += self._read_at(descriptor, buffer[done : done + MAX_READ], done)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{self.path}: {name} cannot be read: {reason}") from None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            if stamp_of(descriptor) != self.stamp:
                raise ValueError(f"{self.path} has changed since it was opened; run again when nothing writes to it")
            yield descriptor
        finally:
            os.close(descriptor)

    def _read_at(self, descriptor: int, piece: memoryview, done: int) -> int:
        """Read what follows the first `done` bytes into `piece`; return how many bytes were read."""
        with errors_naming(self.path):
            size = os.preadv(descriptor, [piece], self.offset + done)
        if not size:
            raise ValueError(f"{self.path} ends before its header says; it was truncated while it was read")
        return size
