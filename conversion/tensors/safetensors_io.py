"""Reading and writing safetensors checkpoints tensor by tensor: no shard has to fit in memory."""

import contextlib
import hashlib
import json
import mmap
import struct
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gda.common.errors import errors_as
from gda.common.files import read_json, stamp_of, written_beside
from gda.conversion.tensors.file_range import FileRange

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# In the order in which safetensors stores tensors: widest dtype first, bfloat16 before float16.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGE = 1 << 23  # bytes; a few huge pages


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, which need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class SafetensorsReader:
    """The tensors of a folder of safetensors files, by name.

    The files are those that transformers reads: `model.safetensors`, else the shards that
    `model.safetensors.index.json` names. Opening reads and checks every header; tensors are read on request.

    Raises:
        FileNotFoundError: if there are no weights, or a shard is missing.
        ValueError: for pickled weights, a malformed index or one that points out of the folder, a truncated or
            contradictory file, and a tensor whose dtype is not a float.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.specs: dict[str, TensorSpec] = {}
        self._ranges: dict[str, FileRange] = {}
        indexed = self._indexed_names()
        for file in sorted(set(indexed.values())) if indexed else [WEIGHTS_FILE]:
            self._read_header(file)
        files = {name: stored.path.name for name, stored in self._ranges.items()}
        for name, file in (indexed or {}).items():
            if files.get(name) != file:
                raise ValueError(f"{folder / INDEX_FILE} places tensor {name} in {file}, which does not hold it")
        if indexed and (unlisted := sorted(files.keys() - indexed)):
            raise ValueError(f"{folder / files[unlisted[0]]} holds {unlisted[0]}, which {INDEX_FILE} does not list")
        self.files = sorted(set(files.values()))

    def _indexed_names(self) -> dict[str, str] | None:
        if (self.folder / WEIGHTS_FILE).is_file():
            return None
        index_path = self.folder / INDEX_FILE
        if not index_path.is_file():
            if pickles := [*sorted(self.folder.glob("*.bin")), *sorted(self.folder.glob("*.pt*"))]:
                raise ValueError(
                    f"{pickles[0]} is a pickle, which can run code when read; save the model as safetensors first"
                )
            raise FileNotFoundError(f"{self.folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")
        index = read_json(index_path)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names or not isinstance(index.get("metadata"), dict):
            raise ValueError(f"{index_path} lacks metadata or a weight_map of tensor names to files")
        for name, file in names.items():
            if not isinstance(file, str) or file != Path(file).name or "\\" in file or file in ("", ".", ".."):
                raise ValueError(f"{index_path} places tensor {name} in {file!r}, which is not a file of this folder")
        return names

    def _read_header(self, file: str) -> None:
        path = self.folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {INDEX_FILE} names it")
        stamp = stamp_of(path)
        with errors_as(f"{path} is damaged", caught=SafetensorError), safe_open(path, framework="pt"):
            start, header = _parsed_header(path)  # which safetensors has checked
        for name, entry in sorted(header.items()):
            if (dtype := DTYPES.get(entry["dtype"])) is None:
                raise ValueError(f"{path}: tensor {name} is {entry['dtype']}, not one of {list(DTYPES)}")
            begin, end = entry["data_offsets"]
            self.specs[name] = TensorSpec(tuple(entry["shape"]), dtype)
            self._ranges[name] = FileRange(path, start + begin, end - begin, stamp)

    def read(self, name: str) -> torch.Tensor:
        """Read the tensor `name` into new memory; ValueError if the file can no longer be read or has changed."""
        tensor = _new_tensor(self.specs[name])
        self._ranges[name].read_into(_memory_of(tensor), f"tensor {name}")
        return tensor

    def stored(self, name: str) -> FileRange:
        """The bytes of the tensor `name` in its file."""
        return self._ranges[name]


def _new_tensor(spec: TensorSpec) -> torch.Tensor:
    """A tensor for any content. If it is large, it asks for huge pages.

    To supply small pages takes the kernel twice as long as to copy the page cache into them.
    """
    if spec.nbytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(spec.shape, dtype=spec.dtype)
    memory = mmap.mmap(-1, spec.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # from a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=spec.dtype).view(spec.shape)


def _parsed_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file starts, and the entry of each tensor in its header."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


def write_safetensors(
    path: Path, specs: dict[str, TensorSpec], tensors: Iterable[tuple[str, torch.Tensor | FileRange]]
) -> str:
    """Write a safetensors file tensor by tensor, with the bytes of `safetensors.torch.save_file`; return its SHA-256.

    `tensors` gives tensors, or their bytes in another safetensors file, in the order of `file_order(specs)`. The file
    appears when it is complete.

    Raises:
        ValueError: if a tensor has another shape or dtype than its spec.
    """
    header = _header(specs)
    digest = hashlib.sha256(header)
    hashed: Future[None] | None = None
    with ThreadPoolExecutor(max_workers=1) as hasher, written_beside(path) as file:
        file.write(header)
        for name, tensor in tensors:
            data = _bytes_of(tensor, specs[name], f"{path}: {name}")
            if hashed is not None:
                hashed.result()  # one tensor is hashed while the next is written, so two are in memory
            hashed = hasher.submit(_hash, digest, data)
            for chunk in _chunks(data):
                file.write(chunk)
        if hashed is not None:
            hashed.result()
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor | FileRange, spec: TensorSpec, name: str) -> memoryview | FileRange:
    if isinstance(tensor, FileRange):
        if tensor.nbytes != spec.nbytes:
            raise ValueError(f"{name} is {tensor.nbytes} bytes, not {spec}")
        return tensor
    if TensorSpec(tuple(tensor.shape), tensor.dtype) != spec:
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {spec}")
    return _memory_of(tensor.contiguous())


def _memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _hash(digest: "hashlib._Hash", data: memoryview | FileRange) -> None:
    for chunk in _chunks(data):
        digest.update(chunk)


def _chunks(data: memoryview | FileRange) -> Iterable[memoryview]:
    return data.chunks() if isinstance(data, FileRange) else (data,)


def file_order(specs: dict[str, TensorSpec]) -> list[str]:
    """The names in the order in which safetensors stores them in one file."""
    widths = list(DTYPES.values())
    return sorted(specs, key=lambda name: (widths.index(specs[name].dtype), name))


def _header(specs: dict[str, TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in file_order(specs):
        spec = specs[name]
        end = offset + spec.nbytes
        header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
