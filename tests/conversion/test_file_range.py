"""Tensors are read from their files byte for byte, in chunks or into memory, and errors name the file."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gda
from gda.common.files import stamp_of
from gda.conversion.tensors.file_range import CHUNK, FileRange
from gda.conversion.tensors.safetensors_io import LARGE, SafetensorsReader

from ..support.commands import Command
from ..support.llamas import files_of, save_llama

pytestmark = pytest.mark.slow

SIZE = 2 * CHUNK + 12_345


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """The bytes of the file `source`: more than two chunks."""
    content = os.urandom(SIZE + 100)
    (tmp_path / "source").write_bytes(content)
    return content


def file_range(tmp_path: Path, offset: int = 7, nbytes: int = SIZE) -> FileRange:
    return FileRange(tmp_path / "source", offset, nbytes, stamp_of(tmp_path / "source"))


@pytest.mark.parametrize("nbytes", [SIZE, CHUNK, 1, 0])
def test_every_byte_is_read(nbytes: int, content: bytes, tmp_path: Path) -> None:
    """In chunks, and into memory."""
    stored = file_range(tmp_path, nbytes=nbytes)
    assert b"".join(map(bytes, stored.chunks())) == content[7 : 7 + nbytes]
    memory = bytearray(nbytes)
    stored.read_into(memoryview(memory), "all of it")
    assert memory == content[7 : 7 + nbytes]


@pytest.mark.parametrize("cut", [0, SIZE // 2])
def test_changed_file_is_refused(cut: int, content: bytes, tmp_path: Path) -> None:
    """Truncated or rewritten after its header was read."""
    stored = file_range(tmp_path)
    (tmp_path / "source").write_bytes(content[:cut] if cut else bytes(len(content)))
    os.utime(tmp_path / "source", ns=(1, 1))
    with pytest.raises(ValueError, match="source has changed"):
        list(stored.chunks())


def test_truncated_file_is_named(content: bytes, tmp_path: Path) -> None:
    """Also if it is truncated between opening and reading."""
    with pytest.raises(ValueError, match="source ends before"):
        list(file_range(tmp_path, offset=200).chunks())


def test_system_errors_name_the_file(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad_sector(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", bad_sector)
    with pytest.raises(OSError, match="source"):
        list(file_range(tmp_path).chunks())


def test_reading_into_memory_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several files."""
    source = save_llama(tmp_path / "llama", dtype=torch.bfloat16, max_shard_size="20KB")
    gda.convert(source, tmp_path / "a" / "gda", max_shard_size="20KB")
    monkeypatch.setattr(SafetensorsReader, "stored", lambda self, name: None)
    gda.convert(source, tmp_path / "b" / "gda", max_shard_size="20KB")
    assert files_of(tmp_path / "b" / "gda") == files_of(tmp_path / "a" / "gda")


def test_tensor_ranges_match_safetensors(tmp_path: Path) -> None:
    """For any tensor names."""
    tensors = {"a": torch.randn(3, 5), "ü": torch.randn(4).bfloat16(), "empty": torch.empty(0, 2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"a": "text"})
    reader = SafetensorsReader(tmp_path)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        wanted = tensor.view(-1).view(torch.uint8).numpy().tobytes()
        assert b"".join(map(bytes, reader.stored(name).chunks())) == wanted


# ---------------------------------------------------------------------------------------------------- tensors in memory

COMPUTED = "model.layers.1.self_attn.q_proj.weight"

# The shard of a computed tensor is truncated when reading begins, or when its bytes are requested.
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
def test_file_truncated_during_a_conversion(moment: str, reason: str, tmp_path: Path) -> None:
    """Exit code 2 and one line with file and tensor. A mapped file would kill the process with SIGBUS."""
    source = save_llama(tmp_path / "llama", max_shard_size="20KB")
    shard = SafetensorsReader(source).stored(COMPUTED).path
    command = [sys.executable, "-c", CUT, moment, COMPUTED, source, tmp_path / "gda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done
    [line] = done.stderr.splitlines()
    assert f"{shard}: tensor {COMPUTED} cannot be read" in line
    assert reason in line
    assert not (tmp_path / "gda").exists()


def test_read_error_during_a_conversion(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2 and one line with file and tensor."""
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
def test_short_reads_are_continued(most: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every dtype, and for tensors without elements or dimensions."""
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


@pytest.mark.parametrize("length", [LARGE // 8 - 1, LARGE // 8, LARGE // 8 + 1])
def test_large_tensors_are_read(length: int, tmp_path: Path) -> None:
    """Around the size from which their memory asks for huge pages; the tensor is writable and owns its memory."""
    expected = torch.arange(2 * length, dtype=torch.float32).view(2, length)[:, ::2].contiguous()
    save_file({"a": expected}, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    first, second = reader.read("a"), reader.read("a")
    first.add_(1.0)
    assert torch.equal(second, expected)
    assert torch.equal(first, expected + 1.0)
