"""Streamed data in runs that are resumed: the sequences of an uninterrupted run, and nothing is read twice."""

import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from datasets.packaged_modules.parquet.parquet import Parquet
from safetensors.numpy import load_file
from torch import Tensor
from transformers import Trainer

import gda
from gda.common import text
from gda.training.data import packing, rows, stream
from gda.training.data.sequences import open_sequences
from gda.training.data.stream import SequenceStream

from ..support.hub_server import Blob, Hub, Repo
from ..support.llamas import VOCAB_SIZE, byte_tokenizer, save_llama, tensors_of

pytestmark = pytest.mark.slow

CONTEXT = 16
TEXTS = [f"{i} times {i} is {i * i}.\n\u00c4nd the other way round?" for i in range(60)]
PAIRS = [{"prompt": f"{i}?", "completion": f" {'it is ' * (i % 2)}{i}"} for i in range(60)]
CHATS = [
    {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a" * (i % 5)}]}
    for i in range(60)
]
STATE = "stream.safetensors"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches, blocks and buffers, so that they end between any two sequences."""
    monkeypatch.setattr(packing, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(packing, "OPEN_SEQUENCES", 3)
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 20)
    monkeypatch.setattr(text, "BLOCK", 100)


def opened(*names: str | Path) -> SequenceStream:
    options: dict[str, Any] = {"text_field": "text", "vocab_size": VOCAB_SIZE, "seed": 3, "scratch": Path("none")}
    found = open_sequences(names, byte_tokenizer(), context=CONTEXT, streaming=True, **options).rows
    assert isinstance(found, SequenceStream)
    return found


def taken(sequences: Any, count: int) -> list[dict[str, list[int]]]:
    return [{name: ids.tolist() for name, ids in row.items()} for row in itertools.islice(sequences, count)]


# ------------------------------------------------------------------------------------------------------------ the state


def write(kind: str, folder: Path, times: int = 1) -> list[str | Path]:
    """The names of data of one kind, with every row so many times."""
    path = folder / f"a.{kind}"
    table = pa.table({"n": range(len(TEXTS) * times), "text": TEXTS * times})
    if kind == "txt":
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(TEXTS).encode() + b"\r\n" + b"x" * 999)
    elif kind == "jsonl":
        lines = [json.dumps({"text": each}, ensure_ascii=False) for each in (*TEXTS * times, "")]
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())
    elif kind == "json":
        path.write_text(json.dumps([{"text": each} for each in TEXTS]))
    elif kind == "csv":
        Dataset(table).to_csv(path)
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=9)
    elif kind == "saved":
        Dataset(table).save_to_disk(path)
    elif kind in ("pairs", "chats"):
        path = path.with_suffix(".jsonl")
        path.write_text("\n".join(map(json.dumps, (PAIRS if kind == "pairs" else CHATS) * times)))
    elif kind == "all":
        for each in ("txt", "jsonl", "parquet", "saved"):
            write(each, folder)
        (folder / "pairs").mkdir()
        return [
            folder / "a.saved",
            *write("pairs", folder / "pairs"),
            *(folder / f"a.{each}" for each in ("txt", "parquet")),
        ]
    return [path]


KINDS = ("txt", "jsonl", "json", "csv", "parquet", "saved", "pairs", "chats", "all")


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_stream_continues(kind: str, tmp_path: Path) -> None:
    """From any sequence, in the first pass and the second, with sequences handed out ahead of the saved position."""
    names = write(kind, tmp_path)
    length = len({str(row) for row in taken(opened(*names), 1000)})
    whole = taken(opened(*names), 2 * length + 50)
    for position in range(0, 2 * length, 19 if kind in ("txt", "jsonl", "pairs", "chats") else 61):
        interrupted = opened(*names)
        interrupted.remember(5)
        taken(interrupted, position + 5)
        interrupted.save(tmp_path / STATE, position)
        resumed = opened(*names)
        resumed.resume(tmp_path / STATE)
        assert taken(resumed, position + 50)[position:] == whole[position : position + 50]


def test_hub_dataset_continues(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A dataset that is read while it downloads."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files = {}
    for shard in range(2):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": TEXTS[30 * shard : 30 * shard + 30]}), path, row_group_size=9)
        files[f"data/train-{shard:05d}-of-00002.parquet"] = Blob(path.read_bytes(), True)
    hub.repos["me/words"] = Repo(False)
    hub.repos["me/words"].commit("main", "data", files)
    whole = taken(opened("me/words"), 400)
    for position in (0, 60, 150, 300):
        interrupted, resumed = opened("me/words"), opened("me/words")
        taken(interrupted, position)
        interrupted.save(tmp_path / STATE, position)
        resumed.resume(tmp_path / STATE)
        assert taken(resumed, 400)[position:] == whole[position:]


def test_saved_resumed_stream_continues(tmp_path: Path) -> None:
    """A run that is resumed more than once."""
    names = write("all", tmp_path)
    whole, position = taken(opened(*names), 300), 0
    for length in (40, 1, 0, 150, 60):
        current = opened(*names)
        if position:
            current.resume(tmp_path / STATE)
        assert taken(current, position + length)[position:] == whole[position : position + length]
        position += length
        current.save(tmp_path / STATE, position)


def test_state_of_a_distant_position(tmp_path: Path) -> None:
    """A stream that does not know it says so."""
    sequences = opened(*write("jsonl", tmp_path))
    sequences.remember(4)
    taken(sequences, 30)
    sequences.save(tmp_path / STATE, 26)
    for position in (25, 31):
        with pytest.raises(ValueError, match=f"is at sequence 30, too far from {position}"):
            sequences.save(tmp_path / STATE, position)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places of the rows that are read for their documents."""
    places: list[str] = []
    plain = rows._document

    def document(name: str, fields: Any, place: str, row: Any) -> Any:
        places.append(place)
        return plain(name, fields, place, row)

    monkeypatch.setattr(rows, "_document", document)
    return places


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "pairs"])
def test_nothing_is_read_again(kind: str, read: list[str], tmp_path: Path) -> None:
    """A resumed stream begins with the row after the last one that the interrupted stream has read."""
    names = write(kind, tmp_path, 9)
    interrupted, resumed = opened(*names), opened(*names)
    taken(interrupted, 25)
    interrupted.save(tmp_path / STATE, 25)
    known = interrupted._state.progress.position[-1 if kind in ("jsonl", "pairs") else 0]
    read.clear()
    resumed.resume(tmp_path / STATE)
    taken(resumed, 25)
    assert len(read) == 1  # the saved sequences last; the position was tried
    taken(resumed, 26 + len(load_file(tmp_path / STATE).get("ready", [])))
    assert int(read[0].split()[1]) > known > 14


def test_row_groups_are_not_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the row group of a Parquet file in which the stream stopped, and at most the one before."""
    (path,) = write("parquet", tmp_path, 9)
    interrupted, resumed = opened(path), opened(path)
    taken(interrupted, 200)
    interrupted.save(tmp_path / STATE, 200)
    number = interrupted._state.progress.position[0]
    assert number > 60
    groups: list[int] = []
    plain = Parquet._generate_tables

    def tables(self: Any, files: Any, row_groups_list: Any) -> Any:
        groups.extend(group for each in row_groups_list for group in each)
        return plain(self, files, row_groups_list)

    monkeypatch.setattr(Parquet, "_generate_tables", tables)
    resumed.resume(tmp_path / STATE)
    taken(resumed, 201 + len(load_file(tmp_path / STATE).get("ready", [])))
    assert number // 9 - 1 <= groups[0] <= number // 9


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    gda.convert(save_llama(folder / "llama"), folder / "gda", verify=False)
    return folder / "gda"


def train(model: Path, out: Path, data: list[str | Path], **options: Any) -> Any:
    fixed: dict[str, Any] = {"steps": 8, "batch_size": 3, "context": CONTEXT, "learning_rate": 1e-2, "save_every": 3}
    return gda.train(model, out, data=data, streaming=True, **(fixed | options))


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Interrupt the next run in a step."""
    plain = Trainer.training_step

    def at(step: int) -> None:
        def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == step - 1:
                monkeypatch.setattr(Trainer, "training_step", plain)
                signal.raise_signal(signal.SIGINT)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", training_step)

    return at


@pytest.mark.parametrize(("kind", "accumulation"), [("jsonl", 1), ("chats", 2)])
def test_resumed_run_equals_an_uninterrupted_one(
    kind: str,
    accumulation: int,
    model: Path,
    tmp_path: Path,
    interrupted_at: Callable[[int], None],
) -> None:
    """Bit for bit."""
    names = write(kind, tmp_path)
    options = {"accumulation": accumulation}
    train(model, tmp_path / "whole", names, **options)
    interrupted_at(5)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path / "out", names, **options)
    checkpoint = tmp_path / ".out.partial" / "checkpoint-5"
    assert (checkpoint / STATE).stat().st_size < 60_000
    report = train(model, tmp_path / "out", names, resume=True, **options)
    assert report.resumed_from == 5
    whole, found = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert [name for name in whole if not torch.equal(whole[name], found[name])] == []
    logs = [[json.loads(line) for line in (tmp_path / out / "training_log.jsonl").open()] for out in ("whole", "out")]
    assert [[(each["epoch"], each["loss"]) for each in log] for log in logs] == [
        [(each["epoch"], each["loss"]) for each in logs[0]]
    ] * 2


def test_damaged_state_is_named(model: Path, tmp_path: Path, interrupted_at: Callable[[int], None]) -> None:
    """One line with the checkpoint and the remedy."""
    names = write("jsonl", tmp_path)
    interrupted_at(5)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path / "out", names)
    path = tmp_path / ".out.partial" / "checkpoint-5" / STATE
    content = path.read_bytes()
    start = content.index(b"seed")
    place = content.index(b"position") + len(b'position\\": [')
    for damaged in (
        bytes(len(content)),
        content[:start] + b"sead" + content[start + 4 :],
        content[:place] + b"-" + content[place + 1 :],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"--resume: .*checkpoint-5 is damaged .*; remove it to resume"):
            train(model, tmp_path / "out", names, resume=True)
