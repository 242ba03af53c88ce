"""Documents packed into sequences of token ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gda.training.data.sources import DocumentSource, Pieces

# Characters and documents that are tokenized at once.
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**20, 1000


@dataclass(frozen=True)
class SequencePacker:
    """Joins documents with the tokenizer's end-of-text token after each, and cuts the result into sequences."""

    tokenizer: PreTrainedTokenizerBase
    context: int  # tokens per sequence
    vocab_size: int  # of the model
    data: str  # its names, for errors

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        if self.tokenizer.eos_token_id is None:
            return ("the tokenizer has no end-of-text token, so blank lines separate documents",)
        return ()

    def blocks(self, sources: Sequence[DocumentSource]) -> Iterator[NDArray[np.int32]]:
        """Blocks of sequences (n, context), and finally the remainder (1, fewer than context)."""
        ids: list[int] = []
        for pieces in _batches(piece for source in sources for piece in source.pieces()):
            for tokenized in self._tokenize(pieces):
                ids += tokenized
            whole = len(ids) // self.context * self.context
            if whole:
                yield np.array(ids[:whole], dtype=np.int32).reshape(-1, self.context)
                ids = ids[whole:]
        yield np.array(ids, dtype=np.int32).reshape(1, -1)

    def require_a_sequence(self, tokens: int) -> None:
        """Raise ValueError if the data has fewer tokens than one sequence."""
        if tokens < self.context:
            raise ValueError(
                f"{self.data} has {tokens} tokens, fewer than one sequence of {self.context}; "
                "lower --context or add text"
            )

    def _tokenize(self, pieces: list[tuple[str, bool]]) -> Iterator[list[int]]:
        end = self.tokenizer.eos_token_id
        texts = [text + "\n\n" if ends and end is None else text for text, ends in pieces]
        encoded: Any = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids, (_, ends) in zip(encoded.input_ids, pieces, strict=True):
            if ends and end is not None:
                ids.append(end)
            if (largest := max(ids, default=0)) >= self.vocab_size:
                raise ValueError(
                    f"the tokenizer gives ids up to {largest}, but the model has {self.vocab_size} embeddings; "
                    "is it the model's tokenizer?"
                )
            yield ids


def _batches(pieces: Pieces) -> Iterator[list[tuple[str, bool]]]:
    """Group pieces of text into lists that are tokenized at once."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0])
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
