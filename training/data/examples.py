"""Examples as token ids, with a mask of the tokens that are learned."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from gda.common.errors import errors_as
from gda.common.text import require_characters
from gda.training.data.rows import Example, Message

# Templates with this tag mark the turns of the assistant themselves.
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """Token ids (T,) int32, and which of them are learned (T,) bool."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]


@dataclass(frozen=True)
class Document:
    """A whole example as text, and where its answers begin and end in it."""

    text: str
    answers: list[Span]
    is_chat: bool  # a chat ends as its template ends it, a completion with the end-of-text token


def render(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[list[Document]]:
    """The documents of each example.

    Some templates, such as Qwen3's, render a turn of the assistant differently once others follow it. Such a chat
    becomes several documents: for each turn of the assistant, the chat up to its end, as the model sees it in use.

    Raises:
        ValueError: naming the row, if its chat cannot be rendered, or if the turns of the assistant cannot be found.
    """
    if examples and not tokenizer.is_fast:
        raise ValueError(
            f"{examples[0].place}: prompts and chats need a fast tokenizer, which knows the place of each token"
        )
    special_tokens = tokenizer.special_tokens_map
    return [
        _completion(each) if isinstance(each.answer, str) else _chat(tokenizer, each, special_tokens)
        for each in examples
    ]


def _completion(example: Example) -> list[Document]:
    text = f"{example.prompt}{example.answer}"
    return [Document(text, [(len(example.prompt), len(text))], False)]


def tokenize(tokenizer: PreTrainedTokenizerBase, examples: Sequence[list[Document]]) -> list[list[Encoded]]:
    """The tokens of the documents of each example. A token is learned if any of its characters belongs to an answer.

    A completion ends with the end-of-text token, which is learned. The first token of a document is never learned,
    because nothing predicts it.
    """
    encoded = _encoded(tokenizer, [each for documents in examples for each in documents])
    return [[next(encoded) for _ in documents] for documents in examples]


def _encoded(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> Iterator[Encoded]:
    end = tokenizer.eos_token_id
    for is_chat, group in itertools.groupby(documents, key=lambda each: each.is_chat):
        found = list(group)
        batch = encodings(tokenizer, [each.text for each in found], add_special_tokens=not is_chat)
        for document, encoding in zip(found, batch, strict=True):
            ids, learned = np.array(encoding.ids, dtype=np.int32), _learned(encoding.offsets, document.answers)
            if not is_chat and end is not None:
                length = len(ids) - (encoding.ids[-1:] == [end])
                ids, learned = np.append(ids[:length], np.int32(end)), np.append(learned[:length], True)
            learned[:1] = False
            yield Encoded(ids, learned)


def encodings(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool, offsets: bool = True
) -> list[Encoding]:
    """What a fast tokenizer finds in texts; all cores work on them.

    It takes a fifth less without offsets, which transformers always asks for.
    """
    tokenizer("", add_special_tokens=add_special_tokens)  # sets the tokenizer's options, as any call does
    backend = tokenizer.backend_tokenizer
    encode_batch = backend.encode_batch if offsets else backend.encode_batch_fast
    return encode_batch(texts, add_special_tokens=add_special_tokens)


def _learned(offsets: list[Span], answers: list[Span]) -> NDArray[np.bool_]:
    """For each token, whether any of its characters is in one of the answers.

    A tokenizer that trims offsets gives a token of spaces none: it begins and ends where the spaces end.
    """
    places = np.fromiter(itertools.chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets))
    begin, end = places[::2], places[1::2]
    learned = np.zeros(len(offsets), dtype=np.bool_)
    for first, last in answers:
        at_end = (begin == end) & (end == last)
        learned |= ((begin < last) | at_end) & (end > first)
    return learned


# ---------------------------------------------------------------------------------------------------------------- chats


def _chat(tokenizer: PreTrainedTokenizerBase, chat: Example, special_tokens: dict[str, Any]) -> list[Document]:
    """The whole chat with the turns of the assistant in it, or the chat up to each turn."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{chat.place} is a chat, but the model's tokenizer has no chat template; "
            "add chat_template.jinja to the folder of MODEL"
        )
    messages: list[Any] = [*chat.prompt, *chat.answer]
    template = tokenizer.get_chat_template(tools=chat.tools)
    rendered = partial(_rendered, chat, {**special_tokens, "chat_template": template})
    if not chat.prompt and GENERATION.search(template):
        [text], [answers] = rendered([messages], return_assistant_tokens_mask=True)
        return [Document(text, answers, True)]
    turns = [index for index in range(len(chat.prompt), len(messages)) if messages[index]["role"] == "assistant"]
    ends = [*(index + 1 for index in turns if index + 1 < len(messages)), len(messages)]
    upto = dict(zip(ends, rendered([messages[:end] for end in ends])[0], strict=True))
    starts = [index for index in turns if index]
    before = rendered([messages[:start] for start in starts], add_generation_prompt=True)[0]
    prompts = dict(zip(starts, before, strict=True))
    if turns and not turns[0]:  # templates need not render a chat without messages
        beginning = messages[: turns[1] if len(turns) > 1 else len(messages)]
        [closed], [opened] = rendered([beginning])[0], rendered([beginning], add_generation_prompt=True)[0]
        tag = opened.removeprefix(closed)  # which begins a turn of the assistant
        prompts[0] = upto[1].partition(tag)[0] + tag if tag else ""
    for index in turns:
        if not upto[index + 1].startswith(prompts[index]):
            raise ValueError(
                f"{chat.place}: the chat template begins the assistant's turn {index + 1} differently than with "
                "add_generation_prompt, so its tokens are unknown; mark them in the template with {% generation %}"
            )
    whole, spans = upto[len(messages)], {index: (len(prompts[index]), len(upto[index + 1])) for index in turns}
    if all(whole.startswith(upto[index + 1]) for index in turns):
        return [Document(whole, list(spans.values()), True)]
    return [Document(upto[index + 1], [span], True) for index, span in spans.items()]


def _rendered(
    chat: Example, template: dict[str, Any], beginnings: list[list[Message]], **options: Any
) -> tuple[list[str], list[list[Span]]]:
    """Some beginnings of a chat as text; with `return_assistant_tokens_mask`, also the spans that the template marks.

    This is the part of `apply_chat_template` before it tokenizes. Only here are the spans to be had.
    """
    render: Any = render_jinja_template
    with errors_as(f"{chat.place}: the chat template cannot render this chat"):  # it may raise anything
        texts, spans = render(beginnings, chat.tools, **template, **options)
    require_characters("".join(texts), chat.place, "its chat")
    return texts, spans
