"""Bytes that are copied from file to file without being held in memory."""

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
            piece = view[: min(CHUNK, self.nbytes - done)]
            try:
                size = os.preadv(descriptor, [piece], self.offset + done)
            except OSError as error:
                error.filename = str(self.path)
                raise
            if not size:
                raise ValueError(f"{self.path} ends before its header says; it has been cut while it was read")
            yield piece[:size]
            done += size


def stamp_of(file: int | Path) -> tuple[int, int]:
    """Size and time of change of a file, or of what a descriptor has open."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns
