"""Whether two tokenizers read and write alike: compared on strings that tokenizers of different classes split apart."""

import random
import reprlib
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 64  # added tokens that are tried inside a text
RANDOM_IDS = 256
SHOWN_IDS, SHOWN_LETTERS = 8, 40
PROPERTIES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "padding_side", "model_input_names")
TEXTS = (
    *("", " ", "  ", "\n", "\n\n\n", "\t", "\r\n", "a", "▁", "▁under▁score ▁"),
    "There are many other words that a longer text brings together, rather than these; the capital of France is",
    " leading space,  two  spaces,   three \n\n new paragraph\n \n\tand tabs\t\t. trailing  ",
    "I'm sure they'LL say we've 0 12 345 6789 01234567890 apples; 3.14159, 1,000,000, 2026-11-28?!... №5 x²",
    "def f(n: int) -> int:\n    if n < 2:\n\t\treturn n  # comment\n\n\n    return f(n - 1)**2 != {'a': [\"b\"]}\\n",
    "https://example.org/a_b-c?d=e&f=%20#g camelCaseWORDSnake_case aaaaaaaaaaaaaaaaaaaaaaaaa" + " " * 25 + "b",
    "Der schnelle Fuchs überspringt Çà, naïve ÅNGSTRÖM ﬁ Straße İstanbul; и русский текст Ελληνικά",
    "日本語のテキスト。한국어 텍스트 中文，汉字 ไทย हिन्दी বাংলা العربية עברית ٣٤٥ Ⅷ ½ ¾",
    "🙂👩‍👩‍👧‍👦 emoji🚀🚀 flags🇫🇷 x̄ ﷺ e\u0301 A\u030a \u212b \uac00 \u1100\u1161",
    "zero\u200bwidth\u200d joiner\ufeff nbsp\xa0 thin\u2009 ideographic\u3000 line\u2028 soft\xad rtl\u202e",
    "\x00 \x01\x07\x1b\x7f \x85 \ufffd \ue000 \U0001f9ff \U000e0041 \U0010ffff",
    "<0x0A> <0xE2> [INST] Hello [/INST] <s> </s> <unk> <|im_start|>user\nHi<|im_end|> <|endoftext|>",
)
CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "  Hello </s> there\n"}],
    [{"role": role, "content": f"{role} 123 "} for role in ("user", "assistant", "user")],
    [{"role": role, "content": f" {role}\n"} for role in ("system", "user", "assistant", "user")],
)


def difference(first: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """The first thing that two tokenizers do differently, as part of a sentence; None if there is none.

    Compared are the ids of hard strings, with and without special tokens added, the special tokens, the vocabulary,
    decoding, and what the chat template renders.
    """
    for text in (*TEXTS, *_with_added_tokens(first)):
        for special in (False, True):
            expected, got = (_outcome(each.encode, text, add_special_tokens=special) for each in (first, other))
            if expected != got:
                return f"{text!r} has {first_difference(got, expected)}"
    for name in PROPERTIES:
        if (expected := getattr(first, name)) != (got := getattr(other, name)):
            return f"{name} is {got} instead of {expected}"
    if (expected := first.get_vocab()) != (got := other.get_vocab()):
        token = min(
            {token for token, _ in expected.items() ^ got.items()}, key=lambda token: expected.get(token, len(expected))
        )
        return f"token {token!r} has id {got.get(token)} instead of {expected.get(token)}"
    return _difference_in_writing(first, other)


def _difference_in_writing(first: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    texts = [first.encode(text) for text in TEXTS if isinstance(_outcome(first.encode, text), list)]
    alone = [[index] for index in random.Random(0).sample(range(len(first)), min(RANDOM_IDS, len(first)))]
    for ids in (*texts, *alone):
        for skip in (False, True):
            expected, got = (_outcome(each.decode, ids, skip_special_tokens=skip) for each in (first, other))
            if expected != got:
                return f"ids {ids[:SHOWN_IDS]} are decoded as {first_difference(got, expected)}"
    if (first.chat_template is None) != (other.chat_template is None):
        return f"it has {'no' if other.chat_template is None else 'a'} chat template"
    for chat in CHATS if first.chat_template is not None else ():
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": chat[-1]["role"] == "user"}
        expected, got = (_outcome(each.apply_chat_template, chat, **options) for each in (first, other))
        if expected != got:
            return f"the chat template renders {first_difference(got, expected)}"
    return None


def _with_added_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts with special and other added tokens inside; of many, a part from all over the list."""
    tokens = list(dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]))
    step = max(1, len(tokens) // MAX_TOKENS)
    return [f"Hello{token}Paris {token} {token}\n{token}  it's 12" for token in tokens[::step]]


def _outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function returns, or the class of its error: a chat template may refuse a chat."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error)


def first_difference(got: Any, expected: Any) -> str:
    """The ids or the letters around the first that differs."""
    if {type(got), type(expected)} not in ({list}, {str}):  # one raised an error
        names = (each.__name__ if isinstance(each, type) else reprlib.repr(each) for each in (got, expected))
        return " instead of ".join(names)
    differing = (place for place, (one, two) in enumerate(zip(got, expected, strict=False)) if one != two)
    first = next(differing, min(len(got), len(expected)))
    if isinstance(got, str):
        begin = max(0, first - 10)
        return " instead of ".join(repr(text[begin : begin + SHOWN_LETTERS]) for text in (got, expected))
    begin = max(0, first - 2)
    shown = [", ".join(map(str, ids[begin : begin + SHOWN_IDS])) for ids in (got, expected)]
    return f"ids {shown[0]} instead of {shown[1]} (from id {begin} on)"
