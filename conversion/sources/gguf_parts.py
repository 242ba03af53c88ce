"""Opening a GGUF file, or all files of a model that llama.cpp has split."""

from pathlib import Path
from typing import Any

from gda.common.errors import errors_as
from gda.common.places import GGUF_PART


def parts_of(path: Path) -> list[Path]:
    """The files of a model of which `path` is one. FileNotFoundError if a part is missing."""
    if (match := GGUF_PART.fullmatch(path.name)) is None or int(match[3]) == 0:
        return [path]
    parts = [path.with_name(f"{match[1]}-{part:05}-of-{match[3]}.gguf") for part in range(1, int(match[3]) + 1)]
    for part in parts:
        if not part.is_file():
            raise FileNotFoundError(f"{part} is missing; the model is split into {len(parts)} files: download all")
    return parts


def read_parts(parts: list[Path]) -> tuple[Any, dict[str, Path]]:
    """A `GGUFReader` with the metadata of the first part and the tensors of all, and each tensor's file by its name.

    Raises:
        ValueError: for a file that is cut off or damaged, and for parts that do not belong together.
    """
    readers = [_read(part) for part in parts]
    for number, (part, reader) in enumerate(zip(parts, readers, strict=True)):
        found, count = _entry(reader, "split.no", 0), _entry(reader, "split.count", 1)
        if (found, max(count, 1)) != (number, len(parts)):
            raise ValueError(
                f"{part} is part {found + 1} of {count} by its metadata; keep all parts together, under the names that "
                f"llama.cpp gives them: NAME-{found + 1:05}-of-{count:05}.gguf"
            )
    whole = readers[0]
    files = {tensor.name: part for part, reader in zip(parts, readers, strict=True) for tensor in reader.tensors}
    whole.tensors = [tensor for reader in readers for tensor in reader.tensors]
    if not len(whole.tensors) == len(files) == _entry(whole, "split.tensors.count", len(files)):
        raise ValueError(f"{parts[0]}: its parts do not hold each tensor once; download all parts again")
    return whole, files


def _entry(reader: Any, key: str, default: int) -> int:
    field = reader.fields.get(key)
    value = default if field is None else field.contents()
    return value if isinstance(value, int) else -1


def _read(path: Path) -> Any:
    from gguf import GGUFReader

    with errors_as(f"{path} cannot be read as a GGUF file (if it is cut off, download it again)"):
        return GGUFReader(path)
