"""Damage to files, as lists of edits that can be stored as JSON and repeated."""

import contextlib
import json
import random
import struct
from typing import Any

Edit = list[Any]

HUGE = (2**31, 2**63, 2**64 - 1, -(2**63), 10**30, 10**400, -1, 0, 1)
HOSTILE: tuple[Any, ...] = (
    *HUGE,
    *(None, True, False, "", "a", "0", " ", "\0", "\ud800", "é" * 300, "a" * 70_000),
    *(0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
    *([], {}, [[]], [None], ["a"], [1, 2], {"a": 1}, {"": None}, [0] * 5000),
    *("..", "../../secret", "/etc/passwd", "~/.ssh", "a/b", "a\\b", ".", "model.safetensors", "config.json"),
    *("float32", "load", "__class__", "{{ 7 * 7 }}", "<script>alert(1)</script>", "(a+)+$", "(", "*"),
)
BYTES = (b"\0", b"\xff", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\n", b'"', b"{", b"}", b"\xef\xbb\xbf")
DEEP = 100_000
MARK = "@deep@"


def mutate(content: bytes, kind: str, chance: random.Random) -> list[Edit]:
    """One to three edits of a file of that kind: json, jsonl, safetensors or bytes."""
    edits = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        structured = kind in ("json", "jsonl", "safetensors") and chance.random() < 0.75
        edits.append(_edit_of_json(content, kind, chance) if structured else _edit_of_bytes(content, kind, chance))
    # Byte edits come last, because the result is not JSON any more.
    return sorted(edits, key=lambda edit: edit[0] in ("cut", "put", "drop", "again"))


def apply(content: bytes, kind: str, edits: list[Edit]) -> bytes:
    """The content with the edits made."""
    for edit in edits:
        with contextlib.suppress(ValueError, RecursionError):  # an earlier edit made it invalid JSON
            content = _APPLY[edit[0]](content, kind, *edit[1:])
    return content


# ---------------------------------------------------------------------------------------------------------------- bytes


def _edit_of_bytes(content: bytes, kind: str, chance: random.Random) -> Edit:
    length = len(content)
    # The important bytes are at the beginning and, in some files, at the end.
    span = min(length, 600) if kind == "bytes" else min(length, 2500)
    at = chance.randrange(span + 1)
    if kind == "bytes" and chance.random() < 0.3:
        at = max(0, length - chance.randrange(300) - 1)
    return chance.choice(
        (
            ["cut", at],
            ["cut", chance.randrange(length + 1)],
            ["put", at, (content[at : at + 1] or b"\0")[0] ^ 1 << chance.randrange(8)],
            ["put", at, *chance.choice(BYTES)],
            ["put", at, *struct.pack("<Q", chance.choice(HUGE[:3]) % 2**64)],
            ["put", at, *struct.pack("<I", chance.choice((2**31, 2**32 - 1, 0, 10**6)))],
            ["drop", at, chance.randrange(1, 50)],
            ["again", at, chance.randrange(1, 50)],
        )
    )


def _cut(content: bytes, kind: str, at: int) -> bytes:
    return content[:at]


def _put(content: bytes, kind: str, at: int, *new: int) -> bytes:
    return content[:at] + bytes(new) + content[at + len(new) :]


def _drop(content: bytes, kind: str, at: int, count: int) -> bytes:
    return content[:at] + content[at + count :]


def _again(content: bytes, kind: str, at: int, count: int) -> bytes:
    return content[: at + count] + content[at:]


# ----------------------------------------------------------------------------------------------------------------- JSON


def _edit_of_json(content: bytes, kind: str, chance: random.Random) -> Edit:
    path = _some_path(_parsed(content, kind), chance)
    value = chance.choice(HOSTILE)
    return chance.choice(
        (
            ["set", path, value],
            ["set", path, value],
            ["set", path, value],
            ["remove", path],
            ["deep", path, chance.choice(("[", '{"a":'))],
            ["twice", path, value],
            ["add", path[:-1], chance.choice(("a", "", "../../x", "auto_map", "__class__", "\0")), value],
        )
    )


def _some_path(value: Any, chance: random.Random) -> list[str | int]:
    path: list[str | int] = []
    while isinstance(value, dict | list) and value and (not path or chance.random() < 0.8):
        step = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
        path.append(step)
        value = value[step]
    return path


def _parsed(content: bytes, kind: str) -> Any:
    if kind == "safetensors":
        return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    if kind == "jsonl":
        return [json.loads(line) for line in content.decode().splitlines()]
    return json.loads(content)


def _written(value: Any, content: bytes, kind: str, deep: tuple[str, str] = (MARK, "")) -> bytes:
    lines = value if kind == "jsonl" and isinstance(value, list) else [value]
    text = "\n".join(json.dumps(line) for line in lines).replace(json.dumps(deep[0]), deep[1])
    if kind != "safetensors":
        return text.encode()
    tensors = content[8 + struct.unpack("<Q", content[:8])[0] :]
    return struct.pack("<Q", len(text)) + text.encode() + tensors


def _at(value: Any, path: list[str | int]) -> Any:
    for step in path:
        value = value[step]
    return value


def _edited(content: bytes, kind: str, path: list[str | int], new: Any, **how: Any) -> bytes:
    value = _parsed(content, kind)
    if not path:
        return _written(new, content, kind, **how)
    try:
        _at(value, path[:-1])[path[-1]] = new
    except (KeyError, IndexError, TypeError):
        return content  # an earlier edit removed it
    return _written(value, content, kind, **how)


def _set(content: bytes, kind: str, path: list[str | int], new: Any) -> bytes:
    return _edited(content, kind, path, new)


def _deep(content: bytes, kind: str, path: list[str | int], opening: str) -> bytes:
    return _edited(content, kind, path, MARK, deep=(MARK, opening * DEEP))


def _remove(content: bytes, kind: str, path: list[str | int]) -> bytes:
    value = _parsed(content, kind)
    try:
        del _at(value, path[:-1])[path[-1]]
    except (KeyError, IndexError, TypeError):
        return content
    return _written(value, content, kind)


def _twice(content: bytes, kind: str, path: list[str | int], new: Any) -> bytes:
    """The key a second time with another value: readers differ in which one counts."""
    value = _parsed(content, kind)
    try:
        holder, name = _at(value, path[:-1]), path[-1]
        first = holder[name]
    except (KeyError, IndexError, TypeError):
        return content
    if not isinstance(holder, dict):
        return content
    holder[name] = MARK
    return _written(value, content, kind, deep=(MARK, f"{json.dumps(first)}, {json.dumps(name)}: {json.dumps(new)}"))


def _add(content: bytes, kind: str, path: list[str | int], name: str, new: Any) -> bytes:
    value = _parsed(content, kind)
    try:
        holder = _at(value, path)
    except (KeyError, IndexError, TypeError):
        return content
    if not isinstance(holder, dict):
        return content
    holder[name] = new
    return _written(value, content, kind)


_APPLY: dict[str, Any] = {
    "cut": _cut,
    "put": _put,
    "drop": _drop,
    "again": _again,
    "set": _set,
    "deep": _deep,
    "remove": _remove,
    "twice": _twice,
    "add": _add,
}
