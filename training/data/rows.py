"""Rows of data, and the documents in them: texts, chats, and prompts with their completions."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from gda.common.text import require_characters

# Text, and whether a document ends with it: a large document comes in several pieces.
Piece = tuple[str, bool]
# Returns the position after a row or document, JSON-ready. It is valid until the next one is read.
Position = Callable[[], Any]
# The place of a row in its file, for errors; its fields; and the position after it.
Rows = Iterator[tuple[str, dict[str, Any], Position]]
Fields = tuple[str, ...]
Message = dict[str, Any]

MESSAGES, PAIR, TOOLS = ("messages",), ("prompt", "completion"), "tools"
SEARCHED = 1000  # rows at the beginning, one of which must have a field to train on


@dataclass(frozen=True)
class Example:
    """A document of which the model learns only the answer.

    Prompt and answer are both texts, or both messages. Of messages, only the turns of the assistant in the answer are
    learned.
    """

    place: str  # where it was found, for errors
    prompt: str | list[Message]
    answer: str | list[Message]
    tools: list[Any] | None = None  # for the chat template


@dataclass(frozen=True)
class Source:
    """A file or a dataset that holds documents.

    Attributes:
        identity: JSON-ready values that change when the content does.
        documents: Reads the documents in order, each with the position after it: from the beginning (None), or from
            such a position. A document that is None is a row without content.
        has_examples: Whether they are examples instead of text.
        note: What the user should know.
    """

    identity: list[Any]
    documents: Callable[[Any], Iterable[tuple[Piece | Example | None, Position]]]
    has_examples: bool
    note: str | None = None


def source_of_rows(
    name: str, identity: list[Any], open_rows: Callable[[Fields | None, Any], Rows], text_field: str
) -> Source:
    """The source of all rows of one file or dataset.

    Args:
        name: Its name, for errors.
        open_rows: Reads all fields of the rows, or those that are named, from the beginning (None) or from a position.
        text_field: Field that holds text or messages. The default `text` may be missing where others are known.

    Raises:
        ValueError: if there is no field to train on, naming those that were found.
    """
    rows = open_rows(None, None)
    first = list(itertools.islice(rows, SEARCHED))
    fields = next((found for _, row, _ in first if (found := _choose_fields(row, text_field))), None)
    if fields is None:
        there = ", ".join(dict.fromkeys(field for _, row, _ in first for field in row)) or "none"
        expected = f"`{text_field}`" if text_field != "text" else "`text`, `messages`, or `prompt` and `completion`"
        raise ValueError(
            f"{name} has no field {expected}; choose one of its fields {there} with --text-field, or rename them"
        )
    to_document = partial(_document, name, fields)
    known = filter(None, (to_document(place, row) for place, row, _ in itertools.chain(first, rows)))
    content = next(known, None)  # of the first row that has any
    has_examples = isinstance(content, Example)
    if content is not None and not has_examples and fields[:1] == MESSAGES and text_field == "text":
        raise ValueError(
            f"{name}: `messages` holds text, not a list of messages; make it a list, or pass --text-field messages to "
            "train on the text itself"
        )

    def documents(start: Any) -> Iterator[tuple[Piece | Example | None, Position]]:
        for place, row, position in open_rows(fields, start):
            document = to_document(place, row)
            if document is not None and isinstance(document, Example) is not has_examples:
                raise ValueError(f"{name}, {place}: `{fields[0]}` holds text in some rows and messages in others")
            yield document, position

    return Source([*identity, *fields], documents, has_examples)


def _choose_fields(row: dict[str, Any], text_field: str) -> Fields | None:
    """The fields of a row that are trained on, and the tools of a chat."""
    candidates = [(text_field,), *((MESSAGES, PAIR) if text_field == "text" else ())]
    fields = next((each for each in candidates if all(field in row for field in each)), None)
    if fields is None or TOOLS not in row or TOOLS in fields:
        return fields
    return (*fields, TOOLS)


def _document(name: str, fields: Fields, place: str, row: dict[str, Any]) -> Piece | Example | None:
    """The document in a row; None if it has no content."""
    at = f"{name}, {place}"
    fields = tuple(field for field in fields if field != TOOLS) or fields  # the text itself may have that name
    if missing := [field for field in fields if field not in row]:
        raise ValueError(f"{at} has no field `{missing[0]}`")
    values: list[Any] = [row[field] for field in fields]
    if values[-1] in (None, "", []) or values[0] is None:
        return None
    for field, value in zip(fields, values, strict=True):
        _check_value(at, field, value)
    if len(values) == 1 and isinstance(values[0], str):
        return values[0], True
    prompt, answer = values if len(values) == 2 else ([], values[0])
    if type(prompt) is not type(answer):
        raise ValueError(f"{at}: `prompt` and `completion` must both be text, or both messages")
    if isinstance(answer, str):
        return Example(at, prompt, answer)
    turns = [message for message in answer if message["role"] == "assistant"]
    if turns and not any(message.get("content") or message.get("tool_calls") for message in turns):
        return None
    return Example(at, _messages(prompt), _messages(answer), _tools(at, row.get(TOOLS)))


def _tools(at: str, tools: Any) -> list[Any] | None:
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"{at}: `{TOOLS}` is not JSON: {error}") from None
    if tools and not isinstance(tools, list):
        raise ValueError(f"{at}: `{TOOLS}` holds {type(tools).__name__}, not a list")
    return tools or None


def _check_value(at: str, field: str, value: Any) -> None:
    if isinstance(value, str):
        require_characters(value, at, f"`{field}`")
        return
    if not isinstance(value, list):
        raise ValueError(
            f"{at}: `{field}` holds {type(value).__name__}, not a string or messages; choose another with --text-field"
        )
    for message in value:
        is_message = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not is_message or not ("content" in message or message.get("tool_calls")):
            found = ", ".join(message) if isinstance(message, dict) else type(message).__name__
            raise ValueError(f"{at}: a message in `{field}` needs the fields role and content, and has {found}")


def _messages(messages: Iterable[Message]) -> list[Message]:
    """The messages without fields that are null, which tables add where only other rows have them."""
    return [{name: value for name, value in message.items() if value is not None} for message in messages]
