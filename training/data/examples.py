"""Examples as token ids, with a mask of the tokens that are learned."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gda.common.errors import first_line
from gda.training.data.rows import Example, Message

# Templates with this tag mark the turns of the assistant themselves.
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """Token ids (T,) int32, and which of them are learned (T,) bool."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]

    def cut(self, length: int) -> "Encoded":
        """Its first `length` tokens."""
        return Encoded(self.ids[:length], self.learned[:length])


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[Encoded]:
    """The tokens of a whole example. A token is learned if any of its characters belongs to the answer.

    A completion ends with the end-of-text token, which is learned. A chat ends as its template ends it. The first token
    of a document is never learned, because nothing predicts it.

    Some templates, such as Qwen3's, render a turn of the assistant differently once others follow it. Such a chat
    becomes several documents: for each turn of the assistant, the chat up to its end, as the model sees it in use.

    Raises:
        ValueError: naming the row, if its chat cannot be rendered, or if the turns of the assistant cannot be found.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{example.place}: prompts and chats need a fast tokenizer, which knows the place of each token"
        )
    if isinstance(example.prompt, str) and isinstance(example.answer, str):
        start = len(example.prompt)
        text = example.prompt + example.answer
        ids, learned = _tokenize(tokenizer, text, [(start, len(text))], add_special_tokens=True)
        if (end := tokenizer.eos_token_id) is not None:
            ids, learned = (ids[:-1], learned[:-1]) if ids[-1] == end else (ids, learned)
            ids, learned = [*ids, end], [*learned, True]
        found = [(ids, learned)]
    else:
        found = _Chat(tokenizer, example).encode()
    return [_encoded(ids, learned) for ids, learned in found]


def _encoded(ids: list[int], learned: list[bool]) -> Encoded:
    learned[:1] = [False]
    return Encoded(np.array(ids, dtype=np.int32), np.array(learned, dtype=np.bool_))


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[Span], *, add_special_tokens: bool
) -> tuple[list[int], list[bool]]:
    """Token ids, and whether each token has characters in one of the spans."""
    encoded: Any = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    learned = [
        any(begin < end and begin < last and end > first for first, last in spans)
        for begin, end in encoded.offset_mapping
    ]
    return encoded.input_ids, learned


class _Chat:
    """Renders a chat with the tokenizer's template, and finds the turns of the assistant in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, example: Example):
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{example.place} is a chat, but the model's tokenizer has no chat template; "
                "add chat_template.jinja to the folder of MODEL"
            )
        self.tokenizer = tokenizer
        self.place = example.place
        self.tools = example.tools
        self.messages: list[Any] = [*example.prompt, *example.answer]
        self.start = len(example.prompt)

    def encode(self) -> list[tuple[list[int], list[bool]]]:
        """Ids of the whole chat and which are learned, or of the chat up to each turn of the assistant."""
        if self.start == 0 and GENERATION.search(self.tokenizer.get_chat_template(tools=self.tools)):
            encoded = self._apply(self.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return [(encoded["input_ids"], [bool(each) for each in encoded["assistant_masks"]])]
        text = self._apply(self.messages)
        turns = [
            self._turn(index)
            for index in range(self.start, len(self.messages))
            if self.messages[index]["role"] == "assistant"
        ]
        if all(text.startswith(upto) for upto, _ in turns):
            documents = [(text, [span for _, span in turns])]
        else:
            documents = [(upto, [span]) for upto, span in turns]
        return [_tokenize(self.tokenizer, text, spans, add_special_tokens=False) for text, spans in documents]

    def _turn(self, index: int) -> tuple[str, Span]:
        """The chat up to the end of a turn, and where the turn begins and ends in it."""
        upto = self._apply(self.messages[: index + 1])
        if index:
            before = self._apply(self.messages[:index], add_generation_prompt=True)
        else:  # templates need not render a chat without messages
            content = str(self.messages[0].get("content") or upto).strip()
            before = upto[: max(0, upto.rfind(content))]
        if not upto.startswith(before):
            raise ValueError(
                f"{self.place}: the chat template begins the assistant's turn {index + 1} differently than with "
                "add_generation_prompt, so its tokens are unknown; mark them in the template with {% generation %}"
            )
        return upto, (len(before), len(upto))

    def _apply(self, messages: list[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=self.tools, **{"tokenize": False, **options})
        except Exception as error:  # a template may raise anything
            reason = first_line(error)
            raise ValueError(f"{self.place}: the chat template cannot render this chat: {reason}") from None
