"""The rules by which byte-level tokenizers split text, by their names in GGUF files (`tokenizer.ggml.pre`).

llama.cpp (src/llama-vocab.cpp) names the rules after models; the patterns are those of the models' tokenizer.json.
"""

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers
from transformers import PreTrainedTokenizerBase

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + (r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(**options: Any) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, **options}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _pattern(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return _sequence(split, _byte_level(use_regex=False))


# The pre-tokenizer of tokenizer.json, and whether a word that is a token is taken as it is, whatever the merges say.
BYTE_LEVEL_SPLITS: dict[str, tuple[dict[str, Any], bool]] = {
    "gpt-2": (_byte_level(use_regex=True), False),
    "smollm": (_sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)), False),
    "llama-bpe": (_pattern(LLAMA3), True),
    "smaug-bpe": (_pattern(LLAMA3), False),
    "qwen2": (_pattern(QWEN2), False),
}
# Other names that llama.cpp has for them.
ALIASES = dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), "llama-bpe")
ALIASES |= dict.fromkeys(("deepseek-r1-qwen", "kormo", "megrez"), "qwen2")


def correct_tokenizer(tokenizer: PreTrainedTokenizerBase, metadata: Callable[[str], Any]) -> None:
    """Make a tokenizer that transformers read from a GGUF file split words and spaces as llama.cpp does.

    transformers does not support all names, nor words that are tokens as a whole (`ignore_merges`), nor the BOS that
    Llama 3 has without being told. It adds no space before a text that begins with one, or that follows a special
    token. `metadata` gives an entry of the file, or None.
    """
    backend, name = tokenizer.backend_tokenizer, rule_of(metadata)
    if metadata("tokenizer.ggml.model") == "llama":
        adds_space = metadata("tokenizer.ggml.add_space_prefix") is not False
        steps = [normalizers.Prepend("▁")] if adds_space else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
        strip = [decoders.Strip(" ", left=1)] if adds_space else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
    elif name is not None:
        split, ignores_merges = BYTE_LEVEL_SPLITS[name]
        bare = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": split, "added_tokens": []}
        backend.pre_tokenizer = Tokenizer.from_str(json.dumps(bare)).pre_tokenizer
        backend.model.ignore_merges = ignores_merges
        if name == "llama-bpe" and metadata("tokenizer.ggml.add_bos_token") is None:
            tokenizer.add_bos_token = True  # llama.cpp's default for this rule


def rule_of(metadata: Callable[[str], Any]) -> str | None:
    """The rule by which a byte-level tokenizer splits text; None if it is not known here, or of another kind."""
    name = metadata("tokenizer.ggml.pre")
    name = ALIASES.get(name, name)
    return name if metadata("tokenizer.ggml.model") == "gpt2" and name in BYTE_LEVEL_SPLITS else None
