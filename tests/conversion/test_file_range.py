"""Tensors that pass unchanged are copied from file to file, others are read into memory: every byte, wherever they lie;
errors name the file."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gda
from gda.conversion.tensors.file_range import CHUNK, FileRange, stamp_of
from gda.conversion.tensors.safetensors_io import SafetensorsReader

from ..support.commands import Command
from ..support.llamas import files_of, save_llama

pytestmark = pytest.mark.slow

SIZE = 2 * CHUNK + 12_345
Copy = Callable[..., int]


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """What is in the file `source`: more than two chunks, of no round size."""
    content = os.urandom(SIZE + 100)
    (tmp_path / "source").write_bytes(content)
    return content


def file_range(tmp_path: Path, offset: int = 7, nbytes: int = SIZE) -> FileRange:
    return FileRange(tmp_path / "source", offset, nbytes, stamp_of(tmp_path / "source"))


def unable(*_: Any) -> int:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def nothing(*_: Any) -> int:
    return 0


def in_small_pieces(source: int, to: int, size: int, *offsets: int) -> int:
    return os.pwrite(to, os.pread(source, min(size, 1000), offsets[0]), offsets[1])


def failing_half_way(source: int, to: int, size: int, *offsets: int) -> int:
    if offsets[0] > SIZE // 2:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return in_small_pieces(source, to, size, *offsets)


def named(copy: object) -> str:
    return getattr(copy, "__name__", "as it is")


@pytest.mark.parametrize("copy", [None, unable, nothing, in_small_pieces, failing_half_way], ids=named)
@pytest.mark.parametrize("nbytes", [SIZE, CHUNK, 1, 0])
def test_every_byte_is_copied(
    copy: Copy | None, nbytes: int, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After what was written before it, by the kernel or without it; and what follows comes after it."""
    if copy is not None:
        monkeypatch.setattr(os, "copy_file_range", copy)
    copied = file_range(tmp_path, nbytes=nbytes)
    with open(tmp_path / "out", "wb") as file:
        file.write(b"before")
        copied.append_to(file)
        file.write(b"between")
        copied.append_to(file)
        file.write(b"after")
    wanted = content[7 : 7 + nbytes]
    assert (tmp_path / "out").read_bytes() == b"before" + wanted + b"between" + wanted + b"after"
    assert b"".join(map(bytes, copied.chunks())) == wanted


def test_where_the_system_has_no_such_call(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has it on Linux only."""
    monkeypatch.delattr(os, "copy_file_range")
    with open(tmp_path / "out", "wb") as file:
        file_range(tmp_path).append_to(file)
    assert (tmp_path / "out").read_bytes() == content[7 : 7 + SIZE]


@pytest.mark.parametrize("cut", [0, SIZE // 2])
def test_a_file_that_changed_is_refused_by_name(cut: int, content: bytes, tmp_path: Path) -> None:
    """Whether it was cut or written anew since its header was read."""
    copied = file_range(tmp_path)
    (tmp_path / "source").write_bytes(content[:cut] if cut else bytes(len(content)))
    os.utime(tmp_path / "source", ns=(1, 1))
    with open(tmp_path / "out", "wb") as file, pytest.raises(ValueError, match="source has changed"):
        copied.append_to(file)
    with pytest.raises(ValueError, match="source has changed"):
        list(copied.chunks())


def test_a_file_that_ends_too_early_is_named(content: bytes, tmp_path: Path) -> None:
    """Also if it is cut between the opening and the reading, which no stamp tells."""
    beyond = file_range(tmp_path, offset=200)
    with open(tmp_path / "out", "wb") as file, pytest.raises(ValueError, match="source ends before"):
        beyond.append_to(file)


def test_an_error_names_the_file_that_is_to_blame(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own error, which does not say which of two files it was, is found again by reading and writing."""

    def bad_sector(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "copy_file_range", bad_sector)
    monkeypatch.setattr(os, "preadv", bad_sector)
    with open(tmp_path / "out", "wb") as file, pytest.raises(OSError, match="source"):
        file_range(tmp_path).append_to(file)


@pytest.mark.parametrize("copy", [unable, nothing, in_small_pieces], ids=named)
def test_a_conversion_has_the_same_bytes_without_the_kernels_help(
    copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any file system, in several files, and when every tensor is read into memory."""
    source = save_llama(tmp_path / "llama", dtype=torch.bfloat16, max_shard_size="20KB")
    gda.convert(source, tmp_path / "a" / "gda", max_shard_size="20KB")
    expected = files_of(tmp_path / "a" / "gda")
    monkeypatch.setattr(os, "copy_file_range", copy)
    gda.convert(source, tmp_path / "b" / "gda", max_shard_size="20KB")
    assert files_of(tmp_path / "b" / "gda") == expected
    monkeypatch.setattr(SafetensorsReader, "stored", lambda self, name: None)
    gda.convert(source, tmp_path / "c" / "gda", max_shard_size="20KB")
    assert files_of(tmp_path / "c" / "gda") == expected


def test_where_tensors_lie(tmp_path: Path) -> None:
    """As the library reads them, whatever their names are."""
    tensors = {"a": torch.randn(3, 5), "ü": torch.randn(4).bfloat16(), "empty": torch.empty(0, 2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"a": "text"})
    reader = SafetensorsReader(tmp_path)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        wanted = tensor.view(-1).view(torch.uint8).numpy().tobytes()
        assert b"".join(map(bytes, reader.stored(name).chunks())) == wanted


# ------------------------------------------------------------------------------------------------ tensors in memory

COMPUTED = "model.layers.1.self_attn.q_proj.weight"

# The shard of a tensor that is computed is cut when its reading begins, or when its bytes are asked for.
CUT = """
import os, sys
from pathlib import Path
moment, tensor, source, out = sys.argv[1:]
from gda.cli import main
from gda.conversion.tensors.file_range import FileRange
from gda.conversion.tensors.safetensors_io import SafetensorsReader
stored = SafetensorsReader(Path(source)).stored(tensor)
read, preadv = FileRange.read_into, os.preadv

def read_and_cut(self, buffer, name):
    if name == f"tensor {tensor}" and moment == "before":
        os.truncate(stored.path, stored.offset + 8)
    read(self, buffer, name)

def cut(descriptor, buffers, offset):
    if offset == stored.offset and moment == "while":
        os.truncate(stored.path, stored.offset + 8)
    return preadv(descriptor, buffers, offset)

FileRange.read_into, os.preadv = read_and_cut, cut
sys.argv = ["gda", "convert", source, out, "--no-verify"]
main()
"""


@pytest.mark.parametrize(("moment", "reason"), [("before", "has changed"), ("while", "ends before its header says")])
def test_a_file_that_is_cut_while_a_tensor_is_computed_is_one_line(moment: str, reason: str, tmp_path: Path) -> None:
    """Exit code 2, naming file and tensor, in a process that a mapped file would kill with SIGBUS."""
    source = save_llama(tmp_path / "llama", max_shard_size="20KB")
    shard = SafetensorsReader(source).stored(COMPUTED).path
    command = [sys.executable, "-c", CUT, moment, COMPUTED, source, tmp_path / "gda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done
    [line] = done.stderr.splitlines()
    assert f"{shard}: tensor {COMPUTED} cannot be read" in line
    assert reason in line
    assert not (tmp_path / "gda").exists()


def test_a_bad_sector_under_a_tensor_is_one_line(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, naming file and tensor."""
    source = save_llama(tmp_path / "llama", max_shard_size="20KB")
    stored, preadv = SafetensorsReader(source).stored(COMPUTED), os.preadv

    def bad_sector(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if os.path.samestat(os.fstat(descriptor), stored.path.stat()) and offset == stored.offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", bad_sector)
    outcome = command("convert", source, tmp_path / "gda", "--no-verify")
    assert (outcome.code, outcome.error) == (
        2,
        f"gda: {stored.path}: tensor {COMPUTED} cannot be read: Input/output error\n",
    )
    assert not (tmp_path / "gda").exists()


@pytest.mark.parametrize("most", [1, 1000, None])
def test_tensors_are_read_whole_however_little_comes_at_once(
    most: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what the library reads: every dtype, no elements and no dimensions included."""
    tensors = {
        "a": torch.randn(30, 50).bfloat16(),
        "b": torch.randn(7, dtype=torch.float64),
        "c": torch.randn(3, 2, 2).half(),
        "empty": torch.empty(0, 2),
        "scalar": torch.tensor(3.5),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    preadv = os.preadv
    if most is not None:
        monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:most]], at))
    reader = SafetensorsReader(tmp_path)
    for name, tensor in tensors.items():
        read = reader.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name
