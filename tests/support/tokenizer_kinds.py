"""Tiny tokenizers of the kinds that llama.cpp supports, and texts that distinguish them."""

import json

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from gda.conversion.sources.gguf_splits import BYTE_LEVEL_SPLITS

SPECIAL_TOKENS = ("<s>", "</s>", "<unk>", "<|user|>")
CHAT_TEMPLATE = "{% for message in messages %}<|user|>{{ message.content }}</s>{% endfor %}\n"
HARD_TEXTS = [
    "I'm sure they'LL say we've 12345 apples, 3.14159 pears and 1,000,000 plums; isn't it 2026-11-28?",
    " leading space,  two spaces,   three\tand a tab \n\n new paragraphs \r\n  12 indented  ",
    "日本語のテキスト、한국어 텍스트 и русский текст; naïve café, ½ ¾ ² Ⅷ ٣٤٥",
    "🙂👩‍👩‍👧 emoji 🚀🚀 x̄ zero\u200bwidth",
    "def f(x):\n    return x**2  # a comment\n\n\n\tif (a!=b)&&(c<=d): print('%s' % \"q\")",
    "aaaaaaaaaaaaaaaa                                  bbbbbbbb\n\n\n\n\n",
    "<|user|>Hello</s> <|user|> World</s>\nend<think> of it</think>here <think>",
    "",
    " ",
    "▁under▁score",
]


def byte_level_tokenizer(way: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits text by one of the rules in `BYTE_LEVEL_SPLITS`."""
    split, ignores_merges = BYTE_LEVEL_SPLITS[way]
    bare = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": split, "added_tokens": []}
    bpe = Tokenizer.from_str(json.dumps(bare))
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=[*SPECIAL_TOKENS]
    )
    bpe.train_from_iterator(HARD_TEXTS, trainer)
    bpe.model.ignore_merges = ignores_merges
    if way == "qwen2":
        bpe.normalizer = normalizers.NFC()
    return _wrapped(bpe)


def sentencepiece_tokenizer(spaces: str = "prepend") -> PreTrainedTokenizerFast:
    """A BPE over characters, with bytes for unknown ones. `spaces` selects when a space is added before the text.

    "prepend" is the normalizer of Llama 1; other values are schemes of the pre-tokenizer Metaspace.
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(HARD_TEXTS[:2] + HARD_TEXTS[4:6], trainers.BpeTrainer(vocab_size=180))
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    runs = ["▁" * length for length in (2, 3, 4, 5, 8)]
    names = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys([*pieces, *runs])]
    vocabulary = {piece: index for index, piece in enumerate(names)}
    merges = generate_merges(vocabulary, skip_tokens=SPECIAL_TOKENS)
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if spaces == "prepend":
        bpe.normalizer = trained.normalizer
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces, split=False)
    return _wrapped(bpe)


def _wrapped(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    bpe.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )
