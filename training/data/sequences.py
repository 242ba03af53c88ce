"""Training text as sequences of token ids: tokenized once before training, or streamed while it runs."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gda.common.errors import first_line
from gda.common.files import read_json, remove, write_json, written_beside
from gda.common.screen import shows_progress
from gda.training.data.packing import SequencePacker
from gda.training.data.sources import DocumentSource, find_sources
from gda.training.runs.processes import Processes

# After sources, which says what to install if `datasets` is missing.
from datasets import Dataset, Features, IterableDataset, List, Value  # isort: skip

# Sequences of a stream that are held in memory; the next one is drawn from them at random.
SHUFFLE_BUFFER = 1000


@dataclass(frozen=True)
class Sequences:
    """Text as the Trainer reads it.

    Attributes:
        rows: Has the column `input_ids`, token ids (context,) int64. The Trainer shuffles a `Dataset`. An
            `IterableDataset` shuffles itself and repeats the data without end.
        count: Number of sequences; None for a stream.
        tokens: Tokens in these sequences; None for a stream.
        notes: What the user should know, in whole clauses.
    """

    rows: Dataset | IterableDataset
    count: int | None
    tokens: int | None
    notes: tuple[str, ...] = ()


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch: `input_ids` and `labels` (B, T), which are equal since a causal model shifts its labels itself."""
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def open_sequences(
    names: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    text_field: str,
    streaming: bool,
    seed: int,
    vocab_size: int,
    scratch: Path,
    option: str = "--data",
    console: Console | None = None,
) -> Sequences:
    """Tokenize documents, join them with an end-of-text token after each, and cut them into sequences.

    Tokens at the end that do not fill a sequence are dropped. The sequences do not depend on the number of processes:
    one process tokenizes and writes a file into `scratch`, for which the others wait. A later run with the same data,
    tokenizer and context reads this file again. Neither the data nor the sequences have to fit into memory.

    Args:
        names: Text files (one document each), .jsonl, .json, .csv and .parquet files (one document per row), folders
            of such files, and datasets on the Hub: NAME[:CONFIG[:SPLIT]], by default the split `train`.
        tokenizer: The model's.
        context: Tokens per sequence.
        text_field: The field of a row that holds its text.
        streaming: Read while training. Nothing is written, and only the beginning is read here. A buffer of a thousand
            sequences is shuffled with `seed`. A resumed run reads again what was read before.
        seed: Seed of the shuffle buffer.
        vocab_size: Embeddings of the model.
        scratch: A folder that all processes share.
        option: The option that named the data, for errors.
        console: Where progress is shown; nowhere if it is None or not a terminal.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: naming the file or dataset, and the line or row where there is
            one.
    """
    packer = SequencePacker(tokenizer, context, vocab_size)
    find = partial(find_sources, names, text_field, streaming=streaming, option=option)
    data = ", ".join(map(str, names))
    if streaming:
        return _stream(packer, find(), seed, data)
    cache = SequenceCache(scratch / option.strip("-"), packer, data, text_field, console)
    cache.fill_in_one_process(find)
    return cache.open()


def _require_a_sequence(tokens: int, context: int, data: str) -> None:
    if tokens < context:
        raise ValueError(
            f"{data} has {tokens} tokens, fewer than one sequence of {context}; lower --context or add text"
        )


# ------------------------------------------------------------------------------------------------------------ streaming


def _stream(packer: SequencePacker, sources: list[DocumentSource], seed: int, data: str) -> Sequences:
    tokens = 0
    for block in packer.blocks(sources):
        tokens += block.size
        if tokens >= packer.context:
            break
    _require_a_sequence(tokens, packer.context, data)
    rows = _stream_of(_EndlessPasses(packer, sources, seed), packer.context)
    return Sequences(rows.with_format("torch"), None, None, packer.notes)


def _stream_of(generator: Callable[[], Iterator[Any]], context: int) -> IterableDataset:
    features = Features({"input_ids": List(Value("int32"), length=context)})
    return IterableDataset.from_generator(generator, features=features)


@dataclass(frozen=True)
class _EndlessPasses:
    """Reads the data again and again, in a new order each time.

    The Trainer sees one endless epoch. When it skips what was read before an interruption, it expects a stream that
    does not end.
    """

    packer: SequencePacker
    sources: list[DocumentSource]
    seed: int

    def __call__(self) -> Iterator[dict[str, Any]]:
        rows = _stream_of(self._one_pass, self.packer.context).shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        for epoch in itertools.count():
            rows.set_epoch(epoch)
            yield from rows

    def _one_pass(self) -> Iterator[dict[str, Any]]:
        for block in self.packer.blocks(self.sources):
            if block.shape[1] == self.packer.context:
                for sequence in block:
                    yield {"input_ids": sequence}


# --------------------------------------------------------------------------------------------------------- tokenized once


@dataclass(frozen=True)
class SequenceCache:
    """All sequences of some data, in an Arrow file.

    They are written in blocks: `Dataset.from_generator` takes them one by one, which takes as long as tokenizing.

    Attributes:
        place: Path of the files, without an ending: `.arrow` holds the sequences, `.json` describes them.
        packer: Makes the sequences.
        data: The names of the data, for errors.
        text_field: The field of a row that holds its text.
        console: Where progress is shown.
    """

    place: Path
    packer: SequencePacker
    data: str
    text_field: str
    console: Console | None

    @property
    def sequences_file(self) -> Path:
        return self.place.with_suffix(".arrow")

    @property
    def index_file(self) -> Path:
        return self.place.with_suffix(".json")

    def fill_in_one_process(self, find: Callable[[], list[DocumentSource]]) -> None:
        """Write the files in the main process, unless they are there. The others wait for the index file.

        They do not wait at a barrier, which times out after minutes: a large dataset takes hours to tokenize.

        Raises:
            ValueError: in all processes, if one fails.
        """
        processes, known = Processes(), None
        if processes.is_main:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            known = read_json(self.index_file) if self.index_file.is_file() else None
            remove(self.index_file)
        processes.gather(None)  # from here on, an index file is a new one
        if processes.is_main:
            try:
                write_json(self.index_file, self._fill(find(), known))
            except BaseException as error:
                write_json(self.index_file, {"error": first_line(error)})
                raise
        while not self.index_file.is_file():
            time.sleep(0.05)
        if (message := read_json(self.index_file).get("error")) is not None:
            raise ValueError(message)

    def _fill(self, sources: list[DocumentSource], known: dict[str, Any] | None) -> dict[str, Any]:
        """Write the sequences, unless `known` describes the same ones; return what the index file says."""
        identity = self._identity(sources)
        if known is not None and known.get("identity") == identity and self.sequences_file.is_file():
            return known
        tokens, dropped = 0, 0
        kind = pa.list_(pa.int32(), self.packer.context)
        columns = (
            TextColumn("tokenizing {task.description}"),
            TextColumn("{task.completed:,} tokens"),
            TimeElapsedColumn(),
        )
        bar = Progress(*columns, console=self.console, disable=not shows_progress(self.console), transient=True)
        with bar, written_beside(self.sequences_file) as file:
            task = bar.add_task(self.place.name, total=None)
            with pa.ipc.new_stream(file, pa.schema([("input_ids", kind)])) as writer:
                for block in self.packer.blocks(sources):
                    if block.shape[1] < self.packer.context:
                        dropped = block.size
                        break
                    ids = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), type=kind)
                    writer.write_batch(pa.record_batch([ids], names=["input_ids"]))
                    tokens += block.size
                    bar.advance(task, block.size)
            _require_a_sequence(tokens + dropped, self.packer.context, self.data)
        return {"identity": identity, "tokens": tokens, "dropped": dropped}

    def _identity(self, sources: list[DocumentSource]) -> str:
        """A digest of all that the sequences depend on."""
        tokenizer = self.packer.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = [
            [source.identity for source in sources],
            [self.text_field, self.packer.context, self.packer.vocab_size],
            [repr(tokenizer) if backend is None else backend.to_str(), tokenizer.eos_token_id],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def open(self) -> Sequences:
        """The sequences, memory-mapped."""
        index = read_json(self.index_file)
        rows = Dataset.from_file(str(self.sequences_file)).with_format("torch")
        notes = list(self.packer.notes)
        if index["dropped"]:
            notes.append(f"{index['dropped']} tokens at the end of the data do not fill a sequence and are dropped")
        return Sequences(rows, index["tokens"] // self.packer.context, index["tokens"], tuple(notes))
