"""Chats as they are found: messages without content, other templates, and rows or folders that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gda.training.data.sequences import Sequences, open_sequences

from ..support.llamas import VOCAB_SIZE, byte_tokenizer

pytestmark = pytest.mark.sampled

CONTEXT, NO_LABEL = 64, -100
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTION, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Sequences]:
    def open_(
        rows: list[dict[str, Any]] | Path, template: str = PLAIN, context: int = CONTEXT, text_field: str = "text"
    ) -> Sequences:
        path = rows if isinstance(rows, Path) else tmp_path / "a.jsonl"
        if not isinstance(rows, Path):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        options: dict[str, Any] = {"text_field": text_field, "streaming": False, "seed": 0, "vocab_size": VOCAB_SIZE}
        return open_sequences([path], tokenizer, context=context, scratch=tmp_path / "scratch", **options)

    return open_


def learned(sequences: Sequences) -> list[tuple[str, str]]:
    """The text of each document, and what is learned of it."""
    tokenizer, found = byte_tokenizer(), []
    for row in sequences.rows:
        starts = row["position_ids"].eq(0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            ids, labels = row["input_ids"][start:end], row["labels"][start:end]
            if labels.ne(NO_LABEL).any():
                found.append((tokenizer.decode(ids), tokenizer.decode(labels[labels.ne(NO_LABEL)])))
    return sorted(found)


def test_message_without_content_is_refused(opened: Callable[..., Sequences]) -> None:
    """Unless it calls tools; its fields are named."""
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 2: .* needs the fields role and content, and has role, value"
    ):
        opened([{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, {"role": "assistant", "value": "hello"}]}])
    assert opened([{"messages": [QUESTION, called]}]).count == 1


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("table", [False, True])
def test_chat_with_empty_answers_is_skipped(
    table: bool, content: str | None, opened: Callable[..., Sequences], tmp_path: Path
) -> None:
    empty = {"role": "assistant", "content": content}
    chats = [[QUESTION, empty], [QUESTION, empty, QUESTION, empty], [QUESTION, ANSWER]]
    rows = [{"messages": chat} for chat in chats]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    sequences = opened(tmp_path / "a.parquet" if table else rows)
    assert learned(sequences) == [("<|user|>hi</s><|assistant|>hello</s>", "hello</s>")]
    assert "rows without content, skipped: 2" in sequences.notes


@pytest.mark.parametrize("place", ["{}/train-00000-of-00001", "data/{}/train", "{}/train/0000"])
def test_configurations_are_not_mixed(place: str, opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """A folder with several is refused; one of them, or one with several shards, is read."""
    for name in ("de", "en"):
        path = tmp_path / "set" / f"{place.format(name)}.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"messages": [[QUESTION, ANSWER]]}), path)
    homes = [tmp_path / "set" / place.format(name).split(name)[0] / name for name in ("de", "en")]
    with pytest.raises(ValueError, match=f"several configurations, .* in {homes[0]}, {homes[1]}; name the folders"):
        opened(tmp_path / "set")
    assert len(learned(opened(homes[1]))) == 1


def test_chat_that_begins_with_the_assistant(opened: Callable[..., Sequences]) -> None:
    """The template need not render a chat without messages."""
    strict = "{{ raise_exception('no messages') if not messages }}" + PLAIN
    sequences = opened([{"messages": [ANSWER, QUESTION, {"role": "assistant", "content": "yes"}]}], strict)
    assert learned(sequences) == [("<|assistant|>hello</s><|user|>hi</s><|assistant|>yes</s>", "hello</s>yes</s>")]


@pytest.mark.parametrize(
    ("message", "shown", "text"),
    [
        ({"content": "s"}, "m.content", "s"),
        ({"content": [{"text": "hello"}]}, "m.content if m.content is string else m.content[0].text", "hello"),
        ({"content": "", "tool_calls": ["call"]}, "m.tool_calls[0] if m.tool_calls else m.content", "call"),
    ],
    ids=["also in its end", "in parts", "a call"],
)
def test_start_of_a_first_answer(
    message: dict[str, Any], shown: str, text: str, opened: Callable[..., Sequences]
) -> None:
    """What begins the turn is not learned, and all of the answer is."""
    chat = [{"role": "assistant", **message}, QUESTION]
    sequences = opened([{"messages": chat}], PLAIN.replace("m.content", shown))
    assert learned(sequences) == [(f"<|assistant|>{text}</s><|user|>hi</s>", f"{text}</s>")]


def test_answers_that_change_in_the_chat_are_examples_of_their_own(opened: Callable[..., Sequences]) -> None:
    """Each after the chat before it, as the model will see it; of a prompt, no answer is learned."""
    thinking = PLAIN.replace("m.content", "m.content if loop.last else m.content.split('=')[-1]")
    chat = [QUESTION, {"role": "assistant", "content": "1=a"}, QUESTION, {"role": "assistant", "content": "2=b"}]
    first = ("<|user|>hi</s><|assistant|>1=a</s>", "1=a</s>")
    second = ("<|user|>hi</s><|assistant|>a</s><|user|>hi</s><|assistant|>2=b</s>", "2=b</s>")
    sequences = opened([{"messages": chat}], thinking)
    assert learned(sequences) == sorted([first, second])
    note = "chats whose earlier turns the template changes, split into an example per answer: 1"
    assert note in sequences.notes
    sequences = opened([{"prompt": chat[:1], "completion": chat[1:]}], thinking)
    assert learned(sequences) == sorted([first, second])
    assert learned(opened([{"prompt": chat[:3], "completion": chat[3:]}], thinking)) == [second]


def test_answers_beyond_the_context_are_named(opened: Callable[..., Sequences]) -> None:
    """The error says what was skipped."""
    rows = [{"messages": None}, {"messages": [{"role": "user", "content": "a" * 99}, ANSWER]}]
    with pytest.raises(
        ValueError, match=r"has no answer to learn .*content, skipped: 1.* after 16 tokens.*: 1.; raise --c"
    ):
        opened(rows, context=16)


def test_tables_add_no_null_arguments(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """A table has the arguments of all calls in each of them."""

    def chat(**arguments: str) -> list[dict[str, Any]]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]

    chats = [{"messages": chat(city="Paris")}, {"messages": chat(query="x")}]
    template = "{% for m in messages %}{{ m.role }} {{ (m.tool_calls or [])|tojson }}</s>{% endfor %}"
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "a.parquet")
    from_table, from_lines = (learned(opened(each, template, 256)) for each in (tmp_path / "a.parquet", chats))
    assert len(from_table) == 2
    assert not any("null" in text for text, _ in from_table)
    assert [text for _, text in from_table] == [text for _, text in from_lines]


def test_tools_that_are_not_json(opened: Callable[..., Sequences]) -> None:
    chat = [QUESTION, ANSWER]
    for tools, words in (("{", "is not JSON"), ('{"name": "f"}', "holds dict, not a list")):
        with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: `tools` {words}"):
            opened([{"messages": chat, "tools": "[]"}, {"messages": chat, "tools": tools}])


def test_chat_after_many_rows_without_content(opened: Callable[..., Sequences]) -> None:
    sequences = opened([*[{"text": None}] * 1001, {"text": [QUESTION, ANSWER]}])
    assert learned(sequences) == [("<|user|>hi</s><|assistant|>hello</s>", "hello</s>")]


def test_messages_that_are_text_are_refused(opened: Callable[..., Sequences]) -> None:
    """Without --text-field, chats that are stored as JSON in a string would be learned as they are spelled."""
    rows = [{"messages": None}, {"messages": json.dumps([QUESTION, ANSWER])}]
    with pytest.raises(ValueError, match=r"a\.jsonl: `messages` holds text, not a list of messages"):
        opened(rows)
    assert opened([{"messages": "the end" * 9}], text_field="messages", context=8).tokens == 40


def test_half_a_surrogate_pair_is_refused(opened: Callable[..., Sequences]) -> None:
    """JSON can have it in a message, and a tokenizer cannot read it."""
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 has half a surrogate pair in its chat"):
        opened([{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, {"role": "assistant", "content": "\ud83d"}]}])


def test_mixed_rows_are_refused(opened: Callable[..., Sequences]) -> None:
    for rows, word in (
        ([{"prompt": "a", "completion": [QUESTION, ANSWER]}], "line 1: `prompt` and `completion` must both be text"),
        (
            [{"text": "a"}, {"text": [QUESTION, ANSWER]}],
            "line 2: `text` holds text in some rows and messages in others",
        ),
    ):
        with pytest.raises(ValueError, match=word):
            opened(rows)
