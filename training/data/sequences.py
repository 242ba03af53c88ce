"""Text for training, as windows of token ids: files and datasets of the Hub, tokenized once or while training."""

import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gda.common.errors import first_line
from gda.common.files import read_json, remove, write_json, written_beside
from gda.common.screen import shows_progress
from gda.training.data.text import Pieces, TextSource, find_sources
from gda.training.runs.processes import Processes

# Characters and documents that are tokenized at once.
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**20, 1000
# Windows of a stream that are held in memory, of which one at random is read next.
SHUFFLED = 1000
# Seconds that another node may take to see a file that is there.
PATIENCE = 120.0


@dataclass(frozen=True)
class Windows:
    """Text as the Trainer reads it.

    Attributes:
        rows: With the column `input_ids`, ids (context,) int64. Of a `Dataset` the Trainer chooses the order; an
            `IterableDataset` is shuffled here, and goes through the data again and again.
        count: Windows; None if they are read while training.
        tokens: In these windows; likewise.
        notes: What else one should know, in whole clauses.
    """

    rows: Dataset | IterableDataset
    count: int | None
    tokens: int | None
    notes: tuple[str, ...] = ()


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of windows: `input_ids` and `labels` (B, T), which are the same; a causal model shifts them by itself."""
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def open_windows(
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
) -> Windows:
    """Tokenize documents, join them with the token that ends a text after each, and cut them into windows.

    The tokens at the end that fill no window are left out. The windows are the same for any number of processes: one
    tokenizes, and the others wait for the file that it writes in `scratch`, which a later run with the same data,
    tokenizer and context reads again. Neither the data nor the windows need fit into memory.

    Args:
        names: Files of text (`.txt` or any other), of rows (`.jsonl`, `.parquet`), folders of such files, and datasets
            of the Hub, NAME[:CONFIG[:SPLIT]], by default of the split `train`. A file of text is one document, and so
            is a row.
        tokenizer: The model's.
        context: Tokens a window.
        text_field: The field of a row that holds its text.
        streaming: Read while training: nothing is written, and only the beginning is looked at here. A seeded buffer
            of a thousand windows shuffles; going on after an interruption reads again what was read.
        seed: Of that buffer.
        vocab_size: Of the model.
        scratch: A folder that all processes see.
        option: By which the data was named, for errors.
        console: Where progress is shown; nowhere if None or no terminal.

    Raises:
        FileNotFoundError, ValueError, ConnectionError, PermissionError: naming the file or dataset, and the line or
            row where there is one.
    """
    cutter = _Cutter(tokenizer, context, vocab_size, ", ".join(map(str, names)))
    sources = partial(find_sources, names, text_field, streaming=streaming, option=option)
    if streaming:
        return _stream(cutter, sources(), seed)
    place = scratch / option.strip("-")
    _once_for_all(place, partial(_write, place, sources, cutter, text_field, console))
    return _read(place, cutter)


# ------------------------------------------------------------------------------------------------ documents to windows


@dataclass(frozen=True)
class _Cutter:
    """How documents become windows."""

    tokenizer: PreTrainedTokenizerBase
    context: int
    vocab_size: int
    data: str

    @property
    def notes(self) -> tuple[str, ...]:
        if self.tokenizer.eos_token_id is None:
            return ("the tokenizer has no token that ends a text, so blank lines part documents",)
        return ()

    def windows(self, sources: Iterable[TextSource]) -> Iterator[NDArray[np.int32]]:
        """Blocks of windows (n, context), and at last what fills none, (1, less than context).

        Raises:
            ValueError: if an id has no embedding in the model.
        """
        held: list[int] = []
        for pieces in _batches(piece for source in sources for piece in source.pieces()):
            for ids in self._tokenized(pieces):
                held += ids
            whole = len(held) // self.context * self.context
            if whole:
                yield np.array(held[:whole], dtype=np.int32).reshape(-1, self.context)
                held = held[whole:]
        yield np.array(held, dtype=np.int32).reshape(1, -1)

    def _tokenized(self, pieces: list[tuple[str, bool]]) -> Iterator[list[int]]:
        end = self.tokenizer.eos_token_id
        texts = [text + "\n\n" if ends and end is None else text for text, ends in pieces]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
        for ids, (_, ends) in zip(encoded, pieces, strict=True):
            if ends and end is not None:
                ids.append(end)
            if (largest := max(ids, default=0)) >= self.vocab_size:
                raise ValueError(
                    f"the tokenizer gives ids up to {largest}, and the model has {self.vocab_size} embeddings; "
                    "is it the model's tokenizer?"
                )
            yield ids

    def require_a_window(self, tokens: int) -> None:
        """
        Raises:
            ValueError: if all of the data is less than a window.
        """
        if tokens < self.context:
            raise ValueError(
                f"{self.data} has {tokens} tokens, less than a window of {self.context}; lower --context or add text"
            )


def _batches(pieces: Pieces) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of text in lists that a tokenizer gets at once."""
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


# ------------------------------------------------------------------------------------------------------- while training


def _stream(cutter: _Cutter, sources: list[TextSource], seed: int) -> Windows:
    tokens = 0
    for block in cutter.windows(sources):
        tokens += block.size
        if tokens >= cutter.context:
            break
    cutter.require_a_window(tokens)
    rows = IterableDataset.from_generator(_Passes(cutter, sources, seed), features=_features(cutter.context))
    return Windows(rows.with_format("torch"), None, None, cutter.notes)


def _features(context: int) -> Features:
    return Features({"input_ids": List(Value("int32"), length=context)})


@dataclass(frozen=True)
class _Passes:
    """Reads a stream again and again, shuffled anew each time.

    For the Trainer it is one endless epoch. It takes all streams for that, also where they end, when it skips what was
    read before an interruption.
    """

    cutter: _Cutter
    sources: list[TextSource]
    seed: int

    def __call__(self) -> Iterator[dict[str, list[int]]]:
        rows = IterableDataset.from_generator(self._once, features=_features(self.cutter.context))
        rows = rows.shuffle(seed=self.seed, buffer_size=SHUFFLED)
        for number in itertools.count():
            rows.set_epoch(number)
            yield from rows

    def _once(self) -> Iterator[dict[str, NDArray[np.int32]]]:
        for block in self.cutter.windows(self.sources):
            if block.shape[1] == self.cutter.context:
                for window in block:
                    yield {"input_ids": window}


# ------------------------------------------------------------------------------------------------------ before training


def _arrow(place: Path) -> Path:
    return place.with_suffix(".arrow")


def _index(place: Path) -> Path:
    return place.with_suffix(".json")


def _write(
    place: Path,
    sources: Callable[[], list[TextSource]],
    cutter: _Cutter,
    text_field: str,
    console: Console | None,
    known: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write all windows as an Arrow file, unless `known` tells that it is there; return what there is to know of it."""
    found = sources()
    identity = {
        "sources": [source.identity() for source in found],
        "text_field": text_field,
        "context": cutter.context,
        "vocab_size": cutter.vocab_size,
        "tokenizer": _digest(cutter.tokenizer),
    }
    if known is not None and known["identity"] == identity and _arrow(place).is_file():
        return known
    place.parent.mkdir(parents=True, exist_ok=True)
    tokens, left_over = 0, 0
    kind = pa.list_(pa.int32(), cutter.context)
    with _bar(console) as bar, written_beside(_arrow(place)) as file:
        task = bar.add_task(place.name, tokens=0)
        with pa.ipc.new_stream(file, pa.schema([("input_ids", kind)])) as writer:
            for block in cutter.windows(found):
                if block.shape[1] < cutter.context:
                    left_over = block.size
                    break
                ids = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), type=kind)
                writer.write_batch(pa.record_batch([ids], names=["input_ids"]))
                tokens += block.size
                bar.update(task, tokens=tokens)
        cutter.require_a_window(tokens + left_over)
    return {"identity": identity, "tokens": tokens, "left_over": left_over}


def _bar(console: Console | None) -> Progress:
    columns = (TextColumn("tokenizing {task.description}"), TextColumn("{task.fields[tokens]:,}"), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not shows_progress(console), transient=True)


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    held = repr(tokenizer) if backend is None else backend.to_str()
    return hashlib.sha256(f"{held} {tokenizer.eos_token_id}".encode()).hexdigest()


def _read(place: Path, cutter: _Cutter) -> Windows:
    told = read_json(_index(place))
    rows = Dataset.from_file(str(_arrow(place))).with_format("torch")
    notes = list(cutter.notes)
    if told["left_over"]:
        notes.append(f"{told['left_over']} tokens at the end of the data fill no window and are left out")
    return Windows(rows, told["tokens"] // cutter.context, told["tokens"], tuple(notes))


# --------------------------------------------------------------------------------------------------- several processes


def _once_for_all(place: Path, work: Callable[[dict[str, Any] | None], dict[str, Any]]) -> None:
    """Let the first process do `work`, and write what it returns beside `place`; the others wait for that file.

    They look for it instead of waiting at a barrier, which gives up after minutes: much text takes hours.
    """
    processes = Processes()
    done, failed, begun = _index(place), place.with_suffix(".failed"), place.with_suffix(".begun")
    known = None
    if processes.is_main:
        place.parent.mkdir(parents=True, exist_ok=True)
        known = read_json(done) if done.is_file() else None
        remove(done)
        remove(failed)
        begun.touch()
    processes.gather(None)  # what an earlier run left is gone now
    if not processes.is_main:
        _wait(done, failed, begun)
        return
    try:
        write_json(done, work(known))
    except BaseException as error:
        write_json(failed, first_line(error))
        raise


def _wait(done: Path, failed: Path, begun: Path) -> None:
    start = time.monotonic()
    while not done.is_file():
        if failed.is_file():
            raise ValueError(read_json(failed))
        if not begun.is_file() and time.monotonic() - start > PATIENCE:
            raise FileNotFoundError(f"{begun.parent} is not seen by all processes; name a place that all nodes share")
        time.sleep(0.05)
