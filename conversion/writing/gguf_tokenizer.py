"""A tokenizer as GGUF metadata, with which llama.cpp gives the token ids of transformers.

llama.cpp does not read tokenizer.json. A GGUF file names one of llama.cpp's built-in rules for splitting text, and a
wrong name gives wrong ids without an error. The name is therefore derived from what the tokenizer does, and a tokenizer
without an exact counterpart is refused.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gda.common.errors import errors_as
from gda.conversion.sources.gguf_splits import BYTE_LEVEL_SPLITS
from gda.conversion.sources.source import Source
from gda.conversion.sources.tokenizers import NoTokenizerError

if TYPE_CHECKING:  # an extra
    from gguf import GGUFWriter

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, NORMAL, BYTE = 2, 3, 4, 5, 1, 6  # llama.cpp's types of tokens
SPACE = "▁"
BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}
REMEDY = "pass --tokenizer FILE.gguf, a GGUF file with this tokenizer that llama.cpp's own converter wrote"


def add_tokenizer(
    writer: "GGUFWriter", source: Source, config: PreTrainedConfig, copied_from: Path | None
) -> list[str]:
    """Add the metadata of the source's tokenizer and its chat template; return notes on where llama.cpp differs.

    If the source has no tokenizer, the file takes token ids only. `copied_from` is a GGUF file with the metadata to
    copy instead.

    Raises:
        ValueError: if llama.cpp has no tokenizer that is known to give the same ids.
    """
    try:
        tokenizer = source.tokenizer()
    except NoTokenizerError as error:
        if copied_from is not None:
            raise ValueError(f"--tokenizer needs the model's own tokenizer to compare with: {error}") from None
        writer.add_tokenizer_model("none")
        return [f"the file has no tokenizer, since {error.reason}; programs that use llama.cpp may refuse it"]
    tokens, beyond = _tokens(tokenizer, config.vocab_size)
    if copied_from is not None:
        _copy(writer, copied_from, tokens)
        return []
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json; {REMEDY}")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    added, model = _added_tokens(parts), parts["model"]
    if unusable := [token for token in beyond if token not in added]:
        raise ValueError(f"the tokenizer has more tokens than the model, such as {unusable[0]!r}; {REMEDY}")
    if model["type"] != "BPE":
        raise ValueError(f"a {model['type']} tokenizer is not translated; {REMEDY}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[name]:
            raise ValueError(f"the tokenizer's {name}={model[name]!r} has no counterpart in llama.cpp; {REMEDY}")
    if model["byte_fallback"]:
        scores = _scores(model, added, tokenizer.backend_tokenizer.model)
        notes = _add_sentencepiece(writer, parts, [scores.get(token, 0.0) for token in tokens])
    else:
        notes = _add_byte_level(writer, parts)
    spaced = {token: _in_text(token, parts) for token in added if SPACE in token}
    writer.add_token_list([spaced.get(token, token) for token in tokens])
    writer.add_token_types(_types(tokens, tokenizer, added, model["byte_fallback"]))
    _add_special_ids(writer, tokenizer, config)
    if template := tokenizer.chat_template:
        several = isinstance(template, dict)
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in template.items()] if several else template
        )
    notes += [f"token {token!r} is omitted, since the model has no such id" for token in beyond]
    return notes


def _tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[list[str], list[str]]:
    """The token of each id of the model, and the tokens beyond.

    llama.cpp needs a token for each row of the embeddings, so unused ids get names. Tokens beyond exist if transformers
    read the tokenizer from a GGUF file, because it adds a special token.
    """
    tokens, beyond = [f"[PAD{index}]" for index in range(size)], []
    for token, index in tokenizer.get_vocab().items():
        if index < size:
            tokens[index] = token
        else:
            beyond.append(token)
    return tokens, beyond


def _added_tokens(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The added tokens, which are found in the text before it is split."""
    added = {each["content"]: each for each in parts["added_tokens"]}
    # Where the normalizer prepends a space, one stands after each token, unless the token is found after normalization.
    prepends = "Prepend" in json.dumps(parts["normalizer"])
    for token, each in added.items():
        for flag in ("lstrip", "rstrip", "single_word", *(("normalized",) if prepends else ())):
            if each[flag]:
                raise ValueError(f"token {token!r} has {flag}, which llama.cpp doesn't know; {REMEDY}")
    return added


def _in_text(token: str, parts: dict[str, Any]) -> str:
    """An added token with a "▁" as llama.cpp, which looks for it in the text itself, must find it."""
    if not parts["model"]["byte_fallback"]:
        return token  # an ordinary character
    normalized = next(each["normalized"] for each in parts["added_tokens"] if each["content"] == token)
    if normalized and "Replace" in json.dumps(parts["normalizer"]):
        return token.replace(SPACE, " ")
    raise ValueError(f"token {token!r} stands for other text than llama.cpp would look for; {REMEDY}")


def _types(tokens: list[str], tokenizer: PreTrainedTokenizerBase, added: dict[str, Any], falls_back: bool) -> list[int]:
    vocabulary = tokenizer.get_vocab()

    def kind(token: str) -> int:
        if falls_back and token in BYTE_TOKENS:
            return BYTE
        if falls_back and token == tokenizer.unk_token:
            return UNKNOWN
        if token in added:
            return CONTROL if added[token]["special"] else USER_DEFINED
        return NORMAL if token in vocabulary else UNUSED

    return [kind(token) for token in tokens]


def _add_byte_level(writer: "GGUFWriter", parts: dict[str, Any]) -> list[str]:
    """A byte-level BPE: GPT-2's, Llama 3's, SmolLM2's, Qwen2's."""
    model, normalizer = parts["model"], parts["normalizer"]
    normalizes = normalizer == {"type": "NFC"}
    if normalizer is not None and not normalizes:
        raise ValueError(f"the tokenizer's normalizer has no counterpart in llama.cpp; {REMEDY}")
    way = (_canonical(parts["pre_tokenizer"]), model["ignore_merges"])
    names = [name for name, (split, ignores) in BYTE_LEVEL_SPLITS.items() if way == (_canonical(split), ignores)]
    if not names:
        raise ValueError(f"the tokenizer splits text in a way that no known tokenizer of llama.cpp does; {REMEDY}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(names[0])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_add_space_prefix(False)
    if normalizes:
        return ["llama.cpp doesn't normalize text to Unicode's NFC; letters with separate accents get other token ids"]
    return []


def _canonical(part: Any) -> Any:
    """A pre-tokenizer without `trim_offsets`, which does not change ids."""
    if isinstance(part, dict):
        return {key: _canonical(value) for key, value in part.items() if key != "trim_offsets"}
    return [_canonical(each) for each in part] if isinstance(part, list) else part


def _add_sentencepiece(writer: "GGUFWriter", parts: dict[str, Any], scores: list[float]) -> list[str]:
    """A BPE over characters, with bytes for unknown characters: Llama 2's, Mistral's."""
    model = parts["model"]
    if missing := BYTE_TOKENS - set(model["vocab"]):
        raise ValueError(f"the tokenizer falls back to bytes but has no token {min(missing)}; {REMEDY}")
    prefix, notes = _space_prefix(parts)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)
    writer.add_add_space_prefix(prefix)
    return notes


def _space_prefix(parts: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a space is added before the text, and a note if llama.cpp also adds it before other texts."""
    normalizer, split = parts["normalizer"], _canonical(parts["pre_tokenizer"])
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if split is None and steps in ([prepend, replace], [replace]):
        return prepend in steps, []
    for scheme in ("never", "always", "first"):
        spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
        if normalizer is None and split == spaces:
            after = " or after special tokens" if scheme == "first" else ""
            note = (
                "llama.cpp adds a space at the start and after each special token; transformers' tokenizer adds none "
                f"before text that begins with a space{after}, so some token ids differ"
            )
            return scheme != "never", [] if scheme == "never" else [note]
    raise ValueError(f"the tokenizer treats spaces in a way that llama.cpp doesn't know; {REMEDY}")


def _scores(model: dict[str, Any], added: dict[str, Any], bpe: Any) -> dict[str, float]:
    """The score of each token. llama.cpp joins the pair with the best score, and so follows the merges.

    The package gguf gives all tokens the same score (`LlamaHfVocab`), which joins other pairs. `bpe` is the BPE model.
    """
    vocabulary, merges, scores = model["vocab"], [tuple(pair) for pair in model["merges"]], dict[str, float]()
    joined = [left + right for left, right in merges]
    spaces = {token for token in joined if not token.strip(SPACE)}
    are_last = spaces.issuperset(joined[-sum(token in spaces for token in joined) :])
    tied = spaces if are_last and _joins_from_the_left(bpe, spaces) else set()
    for place, token in enumerate(joined):
        if token in scores and token != joined[place - 1] and token not in tied:
            raise ValueError(f"the merges that give {token!r} do not follow each other; {REMEDY}")
        scores.setdefault(token, -float(len(joined) if token in tied else len(scores)))
    known = set(merges)
    for token in vocabulary.keys() - BYTE_TOKENS - added.keys():
        for place in range(1, len(token)):
            pair = (token[:place], token[place:])
            if pair not in known and all(part in vocabulary for part in pair):
                raise ValueError(f"the merges lack {pair}, which llama.cpp would join; {REMEDY}")
    return scores


def _joins_from_the_left(bpe: Any, spaces: set[str]) -> bool:
    """Whether a run of spaces becomes the longest tokens from left to right, as in llama.cpp if scores are equal."""
    longest = max(map(len, spaces), default=0)
    for length in range(1, 3 * longest):
        expected = [SPACE]
        for _ in range(length - 1):
            if expected[-1] + SPACE in spaces:
                expected[-1] += SPACE
            else:
                expected.append(SPACE)
        if [token.value for token in bpe.tokenize(SPACE * length)] != expected:
            return False
    return True


def _add_special_ids(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    eos = config.eos_token_id if eos is None else eos
    if not isinstance(eos, int) or eos >= config.vocab_size:
        raise ValueError("the tokenizer has no eos_token, and llama.cpp would take another token for it; set eos_token")
    prefix = tokenizer("").input_ids
    if prefix not in ([], [bos]):
        raise ValueError(f"the tokenizer adds the ids {prefix} to each text, but llama.cpp adds at most bos; {REMEDY}")
    writer.add_bos_token_id(eos if bos is None else bos)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(bool(prefix))
    writer.add_add_eos_token(False)
    for index, add in (
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if index is not None and index < config.vocab_size:
            add(index)


def _copy(writer: "GGUFWriter", path: Path, tokens: list[str]) -> None:
    """Copy the tokenizer's metadata from a GGUF file; ValueError unless its tokens are the model's."""
    from gguf import GGUFReader

    with errors_as(f"--tokenizer {path} is not a GGUF file with a tokenizer"):
        fields = GGUFReader(path).fields
        theirs = fields["tokenizer.ggml.tokens"].contents()
    if len(theirs) != len(tokens):
        raise ValueError(f"--tokenizer {path} has {len(theirs)} tokens, but the model has {len(tokens)}")
    for index, (our, their) in enumerate(zip(tokens, theirs, strict=True)):
        if our not in (their, f"[PAD{index}]") and our.replace(SPACE, " ") != their:
            raise ValueError(f"--tokenizer {path} has token {their!r} with id {index}, but the model has {our!r}")
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
