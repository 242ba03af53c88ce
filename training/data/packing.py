"""Documents packed into sequences of token ids."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gda.training.data.examples import Encoded, encode
from gda.training.data.rows import Example, Piece, Source
from gda.training.labels import NO_LABEL

# Characters and documents that are tokenized at once.
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**20, 1000
# Sequences that wait for examples that fit into the rest of them, and full ones that are written at once.
OPEN_SEQUENCES, WRITTEN_SEQUENCES = 64, 256

# Columns (n, context): `input_ids`; with examples also `labels`, and the `position_ids` within each document.
Block = dict[str, NDArray[np.int32]]


@dataclass
class Tally:
    """What happens to the documents while they are packed.

    Attributes:
        sequences, tokens: Those that are packed; padding does not count.
        dropped: Tokens of text at the end, which do not fill a sequence.
        empty: Rows without content.
        examples, learned: Examples that are packed, and their tokens that are learned.
        unanswered: Examples that are skipped because no token of them is learned.
        beyond: Examples that are skipped because their answer begins after the length of a sequence.
        shortened: Examples whose end is cut to the length of a sequence.
        split: Chats that become several examples, see `encode`.
    """

    sequences: int = 0
    tokens: int = 0
    dropped: int = 0
    empty: int = 0
    examples: int = 0
    learned: int = 0
    unanswered: int = 0
    beyond: int = 0
    shortened: int = 0
    split: int = 0

    def to_dict(self) -> dict[str, int]:
        """The counts as JSON-ready values."""
        return asdict(self)

    def skipped(self, context: int) -> list[str]:
        """The rows and examples that are skipped, counted."""
        counts = (
            (self.empty, "rows without content, skipped: {:,}"),
            (self.unanswered, "rows without an answer, skipped: {:,}"),
            (self.beyond, f"answers that begin after {context} tokens, skipped (--context): {{:,}}"),
        )
        return [text.format(count) for count, text in counts if count]

    def notes(self, context: int) -> list[str]:
        """What the user should know."""
        counts = (
            (self.shortened, f"examples longer than {context} tokens, whose end is cut (--context): {{:,}}"),
            (self.split, "chats whose earlier turns the template changes, split into an example per answer: {:,}"),
        )
        dropped = f"{self.dropped} tokens at the end of the data do not fill a sequence and are dropped"
        notes = [*([dropped] if self.dropped else []), *self.skipped(context)]
        notes += [text.format(count) for count, text in counts if count]
        if self.examples:
            notes.append(
                f"{self.examples:,} examples in {self.sequences:,} sequences; "
                f"the loss is on {self.learned:,} of {self.tokens:,} tokens"
            )
        return notes


@dataclass(frozen=True)
class SequencePacker:
    """Packs documents into sequences of one length.

    Texts are joined, with the tokenizer's end-of-text token after each, and cut into sequences. Examples stay whole:
    several share a sequence, whose rest is padding. Each has positions from 0, by which transformers recognizes packed
    documents and keeps them from attending to each other.
    """

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

    def blocks(self, sources: Sequence[Source], tally: Tally) -> Iterator[Block]:
        """Blocks of sequences: first of texts, then of examples. `tally` is complete after the last one.

        Raises:
            ValueError: if the data has fewer tokens than one sequence, or no answer; what was skipped is counted.
        """
        texts, examples = ([each for each in sources if each.has_examples is kind] for kind in (False, True))
        for ids in self._texts(texts, tally):
            tally.sequences += len(ids)
            tally.tokens += ids.size
            positions = np.broadcast_to(np.arange(self.context, dtype=np.int32), ids.shape)
            yield {"input_ids": ids} | ({"labels": ids, "position_ids": positions} if examples else {})
        yield from self._examples(examples, tally)
        if not tally.sequences:
            found, remedy = "no answer to learn", "raise --context" if tally.beyond else "add rows"
            if texts:
                found = f"{tally.dropped} tokens, fewer than one sequence of {self.context}"
                remedy = "lower --context or add text"
            skipped = "".join(f" ({each})" for each in tally.skipped(self.context))
            raise ValueError(f"{self.data} has {found}{skipped}; {remedy}")

    # ----------------------------------------------------------------------------------------------------------- texts

    def _texts(self, sources: Sequence[Source], tally: Tally) -> Iterator[NDArray[np.int32]]:
        """Blocks (n, context) of the joined texts."""
        ids: list[int] = []
        for pieces in _batches(piece for source in sources for piece in source.documents()):
            tally.empty += pieces.count(None)
            for tokenized in self._tokenize([piece for piece in pieces if piece is not None]):
                ids += tokenized
            whole = len(ids) // self.context * self.context
            if whole:
                yield np.array(ids[:whole], dtype=np.int32).reshape(-1, self.context)
                ids = ids[whole:]
        tally.dropped = len(ids)

    def _tokenize(self, pieces: list[Piece]) -> Iterator[list[int]]:
        if not pieces:
            return
        end = self.tokenizer.eos_token_id
        texts = [text + "\n\n" if ends and end is None else text for text, ends in pieces]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids, (_, ends) in zip(encoded["input_ids"], pieces, strict=True):
            if ends and end is not None:
                ids.append(end)
            self._check(max(ids, default=0))
            yield ids

    def _check(self, largest: int) -> None:
        if largest >= self.vocab_size:
            raise ValueError(
                f"the tokenizer gives ids up to {largest}, but the model has {self.vocab_size} embeddings; "
                "is it the model's tokenizer?"
            )

    # -------------------------------------------------------------------------------------------------------- examples

    def _examples(self, sources: Sequence[Source], tally: Tally) -> Iterator[Block]:
        """Blocks of sequences, each with as many examples as fit. An example goes into the first one with room."""
        unfinished: list[list[Encoded]] = []
        finished: list[list[Encoded]] = []
        for encoded in self._encoded(sources, tally):
            room = self.context - len(encoded.ids)
            packed = next((each for each in unfinished if _length(each) <= room), None)
            if packed is None:
                if len(unfinished) == OPEN_SEQUENCES:
                    fullest = max(range(OPEN_SEQUENCES), key=lambda index: _length(unfinished[index]))
                    finished.append(unfinished.pop(fullest))
                unfinished.append(packed := [])
            packed.append(encoded)
            if len(finished) == WRITTEN_SEQUENCES:
                yield self._block(finished, tally)
                finished = []
        if finished or unfinished:
            yield self._block([*finished, *unfinished], tally)

    def _encoded(self, sources: Sequence[Source], tally: Tally) -> Iterator[Encoded]:
        for example in (document for source in sources for document in source.documents()):
            if not isinstance(example, Example):
                tally.empty += 1
                continue
            documents = encode(self.tokenizer, example)
            tally.split += len(documents) > 1
            for whole in documents:
                self._check(int(whole.ids.max(initial=0)))
                encoded = whole.cut(self.context)
                if encoded.learned.any():
                    tally.shortened += len(whole.ids) > self.context
                    yield encoded
                elif whole.learned.any():
                    tally.beyond += 1
                else:
                    tally.unanswered += 1

    def _block(self, sequences: list[list[Encoded]], tally: Tally) -> Block:
        pad = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
        shape = (len(sequences), self.context)
        block = {"input_ids": np.full(shape, pad), "labels": np.full(shape, NO_LABEL), "position_ids": np.zeros(shape)}
        for row, sequence in enumerate(sequences):
            start = 0
            for each in sequence:
                end = start + len(each.ids)
                block["input_ids"][row, start:end] = each.ids
                block["labels"][row, start:end] = np.where(each.learned, each.ids, NO_LABEL)
                block["position_ids"][row, start:end] = np.arange(end - start)
                tally.learned += int(each.learned.sum())
                start = end
            block["position_ids"][row, start:] = np.arange(self.context - start)  # the padding is one more document
            tally.tokens += start
        tally.sequences += len(sequences)
        tally.examples += sum(map(len, sequences))
        return {name: values.astype(np.int32) for name, values in block.items()}


def _length(sequence: list[Encoded]) -> int:
    return sum(len(each.ids) for each in sequence)


def _batches(pieces: Iterable[Any]) -> Iterator[list[Piece | None]]:
    """Group pieces of text into lists that are tokenized at once."""
    batch: list[Piece | None] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0]) if piece else 0
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
