"""Training text as sequences of token ids: tokenized once before training, or streamed while it runs."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gda._version import __version__
from gda.common.errors import first_line
from gda.common.files import read_json, remove, write_json, written_beside
from gda.common.screen import progress_bars
from gda.training.data.packing import COLUMNS, Progress, SequencePacker, Tally
from gda.training.data.rows import Source
from gda.training.data.sources import find_sources
from gda.training.data.stream import SequenceStream
from gda.training.labels import NO_LABEL, num_predicted
from gda.training.runs.processes import Processes

ROWS_AT_ONCE = 1000  # of an Arrow file


@dataclass(frozen=True)
class Sequences:
    """Text as the Trainer reads it.

    Attributes:
        rows: Has the column `input_ids`, token ids (context,) int64; if the data has examples, also `labels` and
            `position_ids`. The Trainer shuffles a `Dataset`. A stream shuffles itself and repeats the data without end.
        count: Number of sequences; None for a stream.
        tokens: Tokens in these sequences, without padding; None for a stream.
        notes: What the user should know.
    """

    rows: Dataset | SequenceStream
    count: int | None
    tokens: int | None
    notes: tuple[str, ...] = ()

    def spread(self, number: int) -> "Sequences":
        """At most `number` of the sequences, evenly spread over the text, for evaluation."""
        if self.count is None or self.tokens is None or not isinstance(self.rows, Dataset) or self.count <= number:
            return self
        note = f"--eval-data: {number:,} of {self.count:,} sequences are measured; --eval-tokens sets how many"
        rows = self.rows.select([index * self.count // number for index in range(number)])
        return Sequences(rows, number, self.tokens * number // self.count, (*self.notes, note))

    def predicted_per_sequence(self) -> float | None:
        """Mean number of tokens in a sequence that are predicted; None if it is the same in all."""
        if not isinstance(self.rows, Dataset) or "labels" not in self.rows.column_names:
            return None
        return float(sum(num_predicted(batch["labels"]) for batch in self.rows.iter(ROWS_AT_ONCE)) / len(self.rows))


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of `input_ids`, `labels` and, with examples, `position_ids`, all (B, T).

    The labels of text are its ids, since a causal model shifts its labels itself.
    """
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {"labels": batch["input_ids"], **batch}


def describe_sequence(row: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Lines that show one row of `Sequences`: the texts are Python literals, which makes line ends visible."""
    ids = row["input_ids"].tolist()
    labels = row.get("labels", row["input_ids"]).tolist()
    starts = [0]  # of documents
    if "position_ids" in row:
        starts = row["position_ids"].eq(0).nonzero().flatten().tolist()
    yield f"first sequence: {len(ids)} tokens"
    for number, (start, end) in enumerate(itertools.pairwise([*starts, len(ids)]), 1):
        learned = [label != NO_LABEL for label in labels[start:end]]
        if not any(learned):
            yield f"  padding  {end - start} tokens"
            continue
        if len(starts) > 1:
            yield f"  document {number}"
        for is_learned, part in itertools.groupby(zip(ids[start:end], learned, strict=True), key=lambda each: each[1]):
            text = tokenizer.decode([token for token, _ in part], clean_up_tokenization_spaces=False)
            yield f"  {'learned' if is_learned else 'read   '}  {text!r}"


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
    resumes: bool = False,
    option: str = "--data",
    console: Console | None = None,
) -> Sequences:
    """Tokenize documents and pack them into sequences, as `SequencePacker` does.

    The sequences do not depend on the number of processes: one process tokenizes and writes a file into `scratch`,
    which all share, and the others wait for it. A later run with the same data, tokenizer and context reads this file
    again; one that `resumes` from a checkpoint must have the same sequences. Neither the data, except a JSON array, nor
    the sequences have to fit into memory.

    With `streaming`, nothing is written, and only the beginning is read here; see `SequenceStream`.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: naming the file or dataset, and the line or row.
    """
    packer = SequencePacker(tokenizer, context, vocab_size, ", ".join(map(str, names)))
    find = partial(find_sources, names, text_field, streaming=streaming, option=option)
    if streaming:
        sources = find()
        next(packer.blocks(sources, Progress()))  # raises an error if there is no sequence
        notes = (*packer.notes, *_notes_of(sources))
        return Sequences(SequenceStream(packer, sources, seed), None, None, notes)
    path, index = (scratch / f"{option.strip('-')}{ending}" for ending in (".arrow", ".json"))

    def write(known: dict[str, Any]) -> dict[str, Any]:
        sources = find()
        identity = _identity(packer, sources)
        if known.get("identity") == identity and path.is_file():
            return known
        known.pop("identity", None)  # from here on, the file may be another
        written = _write(path, packer, sources, console)
        if resumes and known.get("sha256", written["sha256"]) != written["sha256"]:
            remove(path)
            raise ValueError(
                f"{option}, the tokenizer or its chat template has changed since the run began; change it back, or "
                "start over with --overwrite"
            )
        return {"identity": identity, **written}

    _tokenize_in_one_process(index, write)
    return _read(path, index, packer, option)


def _notes_of(sources: list[Source]) -> list[str]:
    return [source.note for source in sources if source.note is not None]


def _tokenize_in_one_process(index: Path, write: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Call `write` in the main process with the content of the index file, and save what it returns there.

    The other processes wait for the new index file, not at a barrier, which times out after minutes: a large dataset
    takes hours to tokenize.

    Raises:
        ValueError: in the others, if the main process fails.
    """
    processes = Processes()
    known: dict[str, Any] = {}
    if processes.is_main:
        index.parent.mkdir(parents=True, exist_ok=True)
        known = read_json(index) if index.is_file() else {}
        known.pop("error", None)
        remove(index)
    processes.gather(None)  # from here on, an index file is a new one
    if processes.is_main:
        try:
            write_json(index, write(known))
        except BaseException as error:
            write_json(index, known | {"error": first_line(error)})
            raise
    while not index.is_file():
        time.sleep(0.05)
    if (message := read_json(index).get("error")) is not None:
        raise ValueError(message)


def _write(path: Path, packer: SequencePacker, sources: list[Source], console: Console | None) -> dict[str, Any]:
    """Write all sequences to an Arrow file; return what the index says of them.

    They are written in blocks. `Dataset.from_generator` takes them one by one, which takes as long as tokenizing.
    """
    progress, begun, digest = Progress(), time.monotonic(), hashlib.sha256()
    kind = pa.list_(pa.int32(), packer.context)
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed:,}"), TimeElapsedColumn())
    bar = progress_bars(console, *columns)
    names = COLUMNS if any(each.has_examples for each in sources) else COLUMNS[:1]
    schema = pa.schema([(name, kind) for name in names])
    with bar, written_beside(path) as file, pa.ipc.new_stream(file, schema) as writer:
        task = bar.add_task("tokens", total=None)
        for block in packer.blocks(sources, progress):
            for each in names:
                digest.update(block[each].tobytes())
            values = [pa.FixedSizeListArray.from_arrays(pa.array(block[each].reshape(-1)), type=kind) for each in names]
            writer.write_batch(pa.record_batch(values, names=list(names)))
            bar.update(task, completed=progress.tally.tokens)
    about = {"tally": asdict(progress.tally), "notes": _notes_of(sources), "sha256": digest.hexdigest()}
    return about | {"seconds": time.monotonic() - begun}


def _identity(packer: SequencePacker, sources: list[Source]) -> str:
    """A digest of all that the sequences depend on."""
    tokenizer = packer.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        __version__,
        *([source.identity for source in sources], packer.context, packer.vocab_size),
        *(repr(tokenizer) if backend is None else backend.to_str(), tokenizer.eos_token_id, tokenizer.chat_template),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read(path: Path, index: Path, packer: SequencePacker, option: str) -> Sequences:
    described = read_json(index)
    rows = Dataset.from_file(str(path)).with_format("torch")  # memory-mapped
    tally = Tally(**described["tally"])
    notes = (*packer.notes, *described["notes"], *tally.notes(packer.context))
    if option != "--data":  # what is true of both was said for --data
        notes = tuple(
            f"{option}: {note}" for note in [*described["notes"], *replace(tally, dropped=0).notes(packer.context)]
        )
    return Sequences(rows, tally.sequences, tally.tokens, notes)
