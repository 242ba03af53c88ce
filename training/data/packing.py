"""Documents packed into sequences of token ids."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gda.training.data.examples import Encoded, encodings, render, tokenize
from gda.training.data.rows import Example, Piece, Source
from gda.training.labels import NO_LABEL

T = TypeVar("T")

# Characters and documents that are tokenized at once, by all cores.
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**22, 1000
# Sequences that wait for examples that fit into the rest of them.
OPEN_SEQUENCES = 64

# The number of a source, and a position in it.
Place = tuple[int, Any]
# Columns (n, context): `input_ids`; with examples also `labels`, and the `position_ids` within each document.
Block = dict[str, NDArray[np.int32]]
COLUMNS = ("input_ids", "labels", "position_ids")


@dataclass
class Tally:
    """What happens to the documents while they are packed, counted."""

    sequences: int = 0
    tokens: int = 0  # in the sequences, without padding
    dropped: int = 0  # tokens of text at the end, which do not fill a sequence
    empty: int = 0  # rows without content
    examples: int = 0  # that are packed
    learned: int = 0  # tokens of the examples that are learned
    unanswered: int = 0  # examples that are skipped because no token of them is learned
    beyond: int = 0  # examples that are skipped because their answer begins after the length of a sequence
    shortened: int = 0  # examples whose end is cut to the length of a sequence
    split: int = 0  # chats that become several examples, see `render`

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


@dataclass
class OpenSequence:
    """A sequence with room for more examples."""

    columns: NDArray[np.int32]  # `COLUMNS` (3, context). Its rest is padding, which is one more document.
    used: int = 0  # number of tokens before the rest

    @classmethod
    def empty(cls, context: int) -> "OpenSequence":
        """A sequence of padding. Its token doesn't matter: nothing is learned of it, and nothing attends to it."""
        return cls(np.stack([np.zeros(context), np.full(context, NO_LABEL), np.arange(context)]).astype(np.int32))

    def add(self, example: Encoded) -> None:
        """Append an example, whose positions begin at 0."""
        end = self.used + len(example.ids)
        self.columns[0, self.used : end] = example.ids
        self.columns[1, self.used : end] = np.where(example.learned, example.ids, NO_LABEL)
        self.columns[2, end:] = np.arange(self.columns.shape[1] - end)
        self.used = end


@dataclass
class Progress:
    """How far documents are packed: what the next sequences depend on."""

    source: int = 0  # the number of the source of the next document
    position: Any = None  # in this source
    # Tokens of text that do not fill a sequence yet.
    rest: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    unfinished: list[OpenSequence] = field(default_factory=list)  # sequences that wait for examples
    tally: Tally = field(default_factory=Tally)  # of the documents before


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

    def blocks(self, sources: Sequence[Source], progress: Progress) -> Iterator[Block]:
        """Blocks of sequences: first of texts, then of examples, as `find_sources` orders their sources.

        They begin after `progress`, which at each block says how far it goes.

        Raises:
            ValueError: if the data has fewer tokens than one sequence, or no answer; what was skipped is counted.
        """
        tally = progress.tally
        texts = [each for each in sources if not each.has_examples]
        has_examples = len(texts) < len(sources)
        if progress.source < len(texts) or len(progress.rest):
            for ids in self._texts(texts, progress):
                tally.sequences += len(ids)
                tally.tokens += ids.size
                positions = np.broadcast_to(np.arange(self.context, dtype=np.int32), ids.shape)
                yield {"input_ids": ids} | ({"labels": ids, "position_ids": positions} if has_examples else {})
            tally.dropped, progress.rest = len(progress.rest), progress.rest[:0]
            progress.source, progress.position = len(texts), None
        for columns in self._examples(sources, progress):
            tally.sequences += len(columns)
            yield dict(zip(COLUMNS, columns.swapaxes(0, 1), strict=True))
        if not tally.sequences:
            found, remedy = "no answer to learn", "raise --context" if tally.beyond else "add rows"
            if texts:
                found = f"{tally.dropped} tokens, fewer than one sequence of {self.context}"
                remedy = "lower --context or add text"
            skipped = "".join(f" ({each})" for each in tally.skipped(self.context))
            raise ValueError(f"{self.data} has {found}{skipped}; {remedy}")

    # ----------------------------------------------------------------------------------------------------------- texts

    def _texts(self, sources: Sequence[Source], progress: Progress) -> Iterator[NDArray[np.int32]]:
        """Blocks (n, context) of the joined texts."""
        batches = _batches(sources, progress)
        tokenized = ((list(self._tokenize(pieces)), empty, place) for pieces, empty, place in batches)
        for documents, empty, place in ahead(tokenized):
            progress.tally.empty += empty
            ids = np.concatenate([progress.rest, *documents])
            self._check(int(ids.max(initial=0)))
            whole = len(ids) // self.context * self.context
            progress.rest = ids[whole:]
            progress.source, progress.position = place
            if whole:
                yield ids[:whole].reshape(-1, self.context)

    def _tokenize(self, pieces: list[Piece]) -> Iterator[NDArray[np.int32]]:
        if not pieces:
            return
        end = self.tokenizer.eos_token_id
        texts = [text + "\n\n" if ends and end is None else text for text, ends in pieces]
        for ids, (_, ends) in zip(_ids(self.tokenizer, texts), pieces, strict=True):
            yield np.array([*ids, end] if ends and end is not None else ids, dtype=np.int32)

    def _check(self, largest: int) -> None:
        if largest >= self.vocab_size:
            raise ValueError(
                f"the tokenizer gives ids up to {largest}, but the model has {self.vocab_size} embeddings; "
                "is it the model's tokenizer?"
            )

    # -------------------------------------------------------------------------------------------------------- examples

    def _examples(self, sources: Sequence[Source], progress: Progress) -> Iterator[NDArray[np.int32]]:
        """Blocks (n, 3, context) of sequences, each with as many examples as fit: one goes into the first with room."""
        batches = _batches(sources, progress)
        rendered = ((render(self.tokenizer, batch), empty, place) for batch, empty, place in batches)
        encoded = ((tokenize(self.tokenizer, texts), empty, place) for texts, empty, place in ahead(rendered))
        for examples, empty, place in ahead(encoded):
            progress.tally.empty += empty
            progress.tally.split += sum(len(documents) > 1 for documents in examples)
            finished: list[OpenSequence] = []
            for example in self._kept(itertools.chain.from_iterable(examples), progress.tally):
                finished += self._pack(example, progress)
            progress.source, progress.position = place
            if finished:
                yield np.stack([each.columns for each in finished])
        if unfinished := progress.unfinished:
            progress.unfinished = []
            yield np.stack([each.columns for each in unfinished])

    def _pack(self, example: Encoded, progress: Progress) -> list[OpenSequence]:
        """Add an example to the first sequence with room; return a sequence that gives way to a new one."""
        finished, unfinished, tally = [], progress.unfinished, progress.tally
        packed = next((each for each in unfinished if self.context - each.used >= len(example.ids)), None)
        if packed is None:
            if len(unfinished) == OPEN_SEQUENCES:
                fullest = max(range(OPEN_SEQUENCES), key=lambda index: unfinished[index].used)
                finished = [unfinished.pop(fullest)]
            unfinished.append(packed := OpenSequence.empty(self.context))
        packed.add(example)
        tally.examples += 1
        tally.tokens += len(example.ids)
        tally.learned += int(example.learned.sum())
        return finished

    def _kept(self, examples: Iterable[Encoded], tally: Tally) -> Iterator[Encoded]:
        """The examples that have anything to learn in the length of a sequence."""
        for whole in examples:
            self._check(int(whole.ids.max(initial=0)))
            encoded = Encoded(whole.ids[: self.context], whole.learned[: self.context])
            if encoded.learned.any():
                tally.shortened += len(whole.ids) > self.context
                yield encoded
            elif whole.learned.any():
                tally.beyond += 1
            else:
                tally.unanswered += 1


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if tokenizer.is_fast:
        return [each.ids for each in encodings(tokenizer, texts, add_special_tokens=False, offsets=False)]
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _batches(sources: Sequence[Source], progress: Progress) -> Iterator[tuple[list[Any], int, Place]]:
    """Documents that are tokenized at once, the number of rows without content, and the place of the next row."""
    batch: list[Any] = []
    characters, empty, start = 0, 0, progress.position
    for number in range(progress.source, len(sources)):
        for document, position in sources[number].documents(start):
            if document is None:
                empty += 1
            else:
                batch.append(document)
                characters += _characters(document)
            if characters >= BATCH_CHARACTERS or len(batch) + empty >= BATCH_DOCUMENTS:
                yield batch, empty, (number, position())
                batch, characters, empty = [], 0, 0
        start = None
    if batch or empty:
        yield batch, empty, (len(sources), None)


def _characters(document: Piece | Example) -> int:
    if isinstance(document, Example):
        return len(str(document.prompt)) + len(str(document.answer))
    return len(document[0])


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items. A thread computes the next one while the last one is used."""
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        item = thread.submit(next, items, end)
        while (found := item.result()) is not end:
            item = thread.submit(next, items, end)
            yield found
