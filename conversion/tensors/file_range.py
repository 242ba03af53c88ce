"""Bytes of a file: copied to another without being held in memory, or read into memory, never mapped.

A mapped file that is cut short, or whose disk fails, kills the process that looks at it; a read fails with an error.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 18  # stays in the processor's cache between reading and writing or hashing
MOST_AT_ONCE = 1 << 26  # of one system call, which no interrupt ends


@dataclass(frozen=True)
class FileRange:
    """`nbytes` of a file from `offset` on. `stamp` is size and time of change of the file for which this was found."""

    path: Path
    offset: int
    nbytes: int
    stamp: tuple[int, int]

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, in pieces; each is overwritten by the next.

        Raises:
            OSError, ValueError: naming the file, if it cannot be read or has changed.
        """
        with self._opened() as descriptor:
            yield from self._chunks(descriptor, 0)

    def read_into(self, buffer: memoryview, name: str) -> None:
        """Fill `buffer`, of `nbytes` bytes, with the bytes of what is called `name`.

        Raises:
            ValueError: naming the file and `name`, if it cannot be read or has changed.
        """
        done = 0
        try:
            with self._opened() as descriptor:
                while done < self.nbytes:
                    done += self._read_at(descriptor, buffer[done : done + MOST_AT_ONCE], done)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{self.path}: {name} cannot be read: {reason}") from None

    def append_to(self, file: BinaryIO) -> None:
        """Write the bytes at the end of a file that is open for buffered writing.

        Raises:
            OSError: if that fails; it names the file of this range if that one is to blame, else none.
            ValueError: if that one has changed.
        """
        with self._opened() as descriptor:
            done = self._copied_by_kernel(descriptor, file)
            for chunk in self._chunks(descriptor, done):
                file.write(chunk)

    def _copied_by_kernel(self, descriptor: int, file: BinaryIO) -> int:
        """How many bytes the kernel has copied by itself: all, or less on file systems that it cannot do it on."""
        done, place = 0, file.seek(0, os.SEEK_END)
        copy = getattr(os, "copy_file_range", None)  # Linux has it
        with contextlib.suppress(OSError):  # what is a fault of the disk comes again with a plain read or write
            while copy is not None and done < self.nbytes:
                size = min(self.nbytes - done, MOST_AT_ONCE)
                copied = copy(descriptor, file.fileno(), size, self.offset + done, place + done)
                if not copied:
                    break
                done += copied
        file.seek(place + done)
        return done

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            if stamp_of(descriptor) != self.stamp:
                raise ValueError(f"{self.path} has changed since it was opened; run again when nothing writes it")
            yield descriptor
        finally:
            os.close(descriptor)

    def _chunks(self, descriptor: int, done: int) -> Iterator[memoryview]:
        view = memoryview(bytearray(CHUNK))
        while done < self.nbytes:
            size = self._read_at(descriptor, view[: min(CHUNK, self.nbytes - done)], done)
            yield view[:size]
            done += size

    def _read_at(self, descriptor: int, piece: memoryview, done: int) -> int:
        """Fill `piece`, or its beginning, with what follows the first `done` bytes; return how many bytes it was."""
        try:
            size = os.preadv(descriptor, [piece], self.offset + done)
        except OSError as error:
            error.filename = str(self.path)
            raise
        if not size:
            raise ValueError(f"{self.path} ends before its header says; it has been cut while it was read")
        return size


def stamp_of(file: int | Path) -> tuple[int, int]:
    """Size and time of change of a file, or of what a descriptor has open."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns
