"""Training text: the sequences that it is packed into, the same at every start, and input that is refused."""

import csv
import gzip
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from gda.common import text as _text
from gda.training.data import packing
from gda.training.data.sequences import Sequences, collate, open_sequences

from ..support.hub_server import Blob, Fault, Hub, Refusal, Repo
from ..support.llamas import VOCAB_SIZE, byte_tokenizer
from ..support.tiny import tiny_model

pytestmark = pytest.mark.sampled

TEXTS = [f"{i} times {i} is {i * i}.\nAnd the other way round?" for i in range(40)]
CONTEXT = 16
EOS = 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture
def opened(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., Sequences]:
    """`open_sequences` with the arguments of most tests."""

    def open_(*names: str | Path, **options: Any) -> Sequences:
        defaults = {"context": CONTEXT, "text_field": "text", "streaming": False, "seed": 0, "vocab_size": VOCAB_SIZE}
        return open_sequences(
            names, options.pop("tokenizer", tokenizer), scratch=tmp_path / "scratch", **defaults | options
        )

    return open_


def joined(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The sequences of some documents, computed in the simplest way."""
    ids = [id for text in texts for id in [*tokenizer(text, add_special_tokens=False).input_ids, EOS]]
    return [ids[start : start + CONTEXT] for start in range(0, len(ids) - CONTEXT + 1, CONTEXT)]


def ids_of(sequences: Sequences, count: int | None = None) -> list[list[int]]:
    """All sequences, or the first `count`, because a stream has no end."""
    assert count is not None or sequences.count is not None
    return [row["input_ids"].tolist() for row in itertools.islice(sequences.rows, count)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("\n".join(json.dumps({"n": 1, field: text}) for text in texts) + "\n")
    return path


def write_parquet(path: Path, column: Any, field: str = "text", **options: Any) -> Path:
    pq.write_table(pa.table({"n": range(len(column)), field: column}), path, **options)
    return path


# -------------------------------------------------------------------------------------------------------- the sequences


def test_documents_are_joined_and_cut(
    opened: Callable[..., Sequences], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A text file is one document, and so is a row. Each ends with EOS, and the report counts the dropped tokens."""
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    (tmp_path / "b.md").write_text(TEXTS[0])
    c, d = write_jsonl(tmp_path / "c.jsonl", TEXTS), write_parquet(tmp_path / "d.parquet", TEXTS, row_group_size=7)
    sequences = opened(tmp_path / "a.txt", str(tmp_path / "b.md"), c, d)
    expected = joined(tokenizer, ["\n".join(TEXTS), TEXTS[0], *TEXTS, *TEXTS])
    assert ids_of(sequences) == expected
    assert (sequences.count, sequences.tokens) == (len(expected), len(expected) * CONTEXT)
    total = sum(len(tokenizer(text).input_ids) + 1 for text in ["\n".join(TEXTS), TEXTS[0], *TEXTS, *TEXTS])
    assert sequences.notes == (
        f"{total % CONTEXT} tokens at the end of the data do not fill a sequence and are dropped",
    )
    batch = collate([sequences.rows[0], sequences.rows[2]])
    assert torch.equal(batch["input_ids"], torch.tensor([expected[0], expected[2]]))
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_folder_of_files(opened: Callable[..., Sequences], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Files with a known ending, in subfolders too, ordered by path."""
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    write_jsonl(folder / "c.jsonl", TEXTS[:9])
    write_parquet(folder / "b" / "x.parquet", TEXTS[9:20])
    (folder / "a.txt").write_text(TEXTS[30])
    (folder / "readme.md").write_text("no text to learn")
    assert ids_of(opened(folder)) == joined(tokenizer, [TEXTS[30], *TEXTS[9:20], *TEXTS[:9]])


def test_links_to_folders_are_followed(
    opened: Callable[..., Sequences], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Each folder is read once, also where a link leads back."""
    folder, books = tmp_path / "corpus", tmp_path / "disk" / "books"
    folder.mkdir()
    books.mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", TEXTS[:9])
    write_jsonl(books / "x.jsonl", TEXTS[9:20])
    for link, target in ((folder / "books", books), (folder / "more", books), (books / "back", folder)):
        link.symlink_to(target)
    assert ids_of(opened(folder)) == joined(tokenizer, TEXTS[:20])


def test_spread_sequences_have_a_fingerprint(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """The same every time; otherwise `datasets` warns that it is random."""
    sequences = opened(write_jsonl(tmp_path / "rows.jsonl", TEXTS))
    first, second = (sequences.spread(5).rows for _ in range(2))
    assert first._fingerprint == second._fingerprint


def test_text_columns(opened: Callable[..., Sequences], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Any field and any of Arrow's string types; rows with empty text are skipped."""
    expected = joined(tokenizer, TEXTS)
    with_empty = [*TEXTS[:5], "", *TEXTS[5:]]
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        path = write_parquet(tmp_path / "rows.parquet", pa.array(with_empty, pa.string()).cast(kind), "body")
        assert ids_of(opened(path, text_field="body")) == expected
    for name in ("body", "tools"):  # beside messages, `tools` would be those of a chat
        assert ids_of(opened(write_jsonl(tmp_path / "rows.jsonl", with_empty, name), text_field=name)) == expected


@pytest.mark.parametrize("form", ["pandas", "columns"])
def test_saved_dataset_with_a_format(
    form: str, opened: Callable[..., Sequences], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """save_to_disk keeps what set_format has chosen for another use."""
    rows = Dataset.from_dict({"n": range(len(TEXTS)), "text": TEXTS})
    rows.set_format("torch", columns=["n"]) if form == "columns" else rows.set_format(form)
    rows.save_to_disk(tmp_path / "saved")
    assert ids_of(opened(tmp_path / "saved")) == joined(tokenizer, TEXTS)


def test_csv_and_json(opened: Callable[..., Sequences], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """One document per row, for any file name; "NA" is text, and a field may have several lines."""
    texts = ["007", *TEXTS, "NA", 'said "null"', "", "ä, b"]
    with open(tmp_path / "a[1]*.csv", "w", newline="") as file:
        csv.writer(file).writerows([("n", "text"), *enumerate(texts)])
    (tmp_path / "a?.json").write_text(json.dumps([{"text": text, "n": 1} for text in texts], indent=1))
    expected = joined(tokenizer, [text for text in texts if text])
    assert ids_of(opened(tmp_path / "a[1]*.csv")) == ids_of(opened(tmp_path / "a?.json")) == expected


def test_csv_with_row_numbers(
    opened: Callable[..., Sequences], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """R writes them without a name in the header."""
    path = tmp_path / "a.csv"
    path.write_text('"text"\n' + "".join(f'"{number}","{text}"\n' for number, text in enumerate(TEXTS, 1)))
    assert ids_of(opened(path)) == joined(tokenizer, TEXTS)


def test_csv_of_digits(opened: Callable[..., Sequences], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """They are text, with their zeros."""
    texts = ["007", "1.50", "2026-01-01", "true"] * 9
    (tmp_path / "a.csv").write_text("\n".join(["text", *texts]))
    assert ids_of(opened(tmp_path / "a.csv")) == joined(tokenizer, texts)


def test_line_ends_of_every_system(
    opened: Callable[..., Sequences], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Line ends become "\\n", a byte order mark is dropped, and U+2028 does not end a line."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(TEXTS).encode() + b"\rend")
    assert ids_of(opened(tmp_path / "a.txt")) == joined(tokenizer, ["\n".join(TEXTS) + "\nend"])
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "one\u2028two " * 9}, ensure_ascii=False))
    assert ids_of(opened(tmp_path / "b.jsonl")) == joined(tokenizer, ["one\u2028two " * 9])


def test_file_is_read_in_pieces(
    opened: Callable[..., Sequences],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a character, a line end, an empty line or a very long line on a boundary."""
    text = "ä€𝄞\r\n\r\nword " * 50 + "\n" + "x" * 300 + "\r\n" + "the end, or not. " * 20
    (tmp_path / "a.txt").write_bytes(text.encode())
    rows = write_jsonl(tmp_path / "b.jsonl", TEXTS)
    plain, plain_rows = ids_of(opened(tmp_path / "a.txt")), ids_of(opened(rows))
    unix = text.replace("\r\n", "\n")
    for block in (1, 2, 3, 7, 64):
        monkeypatch.setattr(_text, "BLOCK", block)
        pieces = list(_text.text_pieces(tmp_path / "a.txt"))
        assert "".join(pieces) == unix
        assert max(map(len, pieces)) <= 3 * block + 1
        assert ids_of(opened(rows, seed=block, text_field="text")) == plain_rows
    monkeypatch.setattr(_text, "BLOCK", 64)
    (tmp_path / "scratch" / "data.json").unlink()
    # No token of this tokenizer contains a line end and a letter, so boundaries make no difference here.
    assert ids_of(opened(tmp_path / "a.txt")) == plain


@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".ndjson"])
def test_rows_are_not_read_as_text(ending: str, tmp_path: Path) -> None:
    """Nor by the commands that need no more than a text."""
    path = write_jsonl(tmp_path / f"rows{ending}", ["one", "two"])
    assert _text.read_text(path) == (path.name, "one\n\ntwo")


def test_memory_stays_bounded(
    opened: Callable[..., Sequences], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one batch is tokenized at once, and sequences are written immediately."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS * 20)
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 200)
    sizes: list[int] = []
    plain = packing.SequencePacker._tokenize

    def tokenized(self: Any, pieces: list[tuple[str, bool]]) -> Iterator[list[int]]:
        sizes.append(sum(len(text) for text, _ in pieces))
        return plain(self, pieces)

    monkeypatch.setattr(packing.SequencePacker, "_tokenize", tokenized)
    sequences = opened(tmp_path / "a.jsonl")
    assert max(sizes) < 200 + max(map(len, TEXTS))
    assert sequences.rows.cache_files[0]["filename"].startswith(str(tmp_path))  # mapped, not in memory


def test_sequences_are_packed_once(
    opened: Callable[..., Sequences], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second start reads the file again; other data, another context or tokenizer packs again."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = opened(path)
    cut: list[int] = []
    plain = packing.SequencePacker.blocks
    monkeypatch.setattr(packing.SequencePacker, "blocks", lambda *args: cut.append(1) or plain(*args))
    again = opened(path)
    assert not cut
    assert (ids_of(again), again.count, again.notes) == (ids_of(first), first.count, first.notes)
    other = byte_tokenizer()
    other.add_tokens(["times"])
    for options in ({"context": 8}, {"tokenizer": other, "vocab_size": VOCAB_SIZE + 1}):
        opened(path, **options)
    write_jsonl(path, TEXTS[:20])
    assert len(ids_of(opened(path))) < len(ids_of(first))
    assert len(cut) == 3


def test_resumed_run_has_the_same_sequences(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """They decide, not the place or the time of a file. Other ones are refused again and again."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = ids_of(opened(path))
    for change in (lambda: os.utime(path, (1, 1)), lambda: (tmp_path / "scratch" / "data.arrow").unlink()):
        change()
        assert ids_of(opened(path, resumes=True)) == first
    write_jsonl(path, TEXTS[:20])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"--data, the tokenizer or its chat template has changed .*--overwrite"):
            opened(path, resumes=True)
    write_jsonl(path, TEXTS)
    assert ids_of(opened(path, resumes=True)) == first


def test_forms_of_json(opened: Callable[..., Sequences], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Arrays of objects or of strings, lines, and objects over several lines."""
    rows = [{"text": text} for text in TEXTS]
    forms = [json.dumps(rows), json.dumps(TEXTS), "\n".join(map(json.dumps, rows))]
    for form in [*forms, "\n".join(json.dumps(row, indent=1) for row in rows)]:
        (tmp_path / "a.json").write_text(form)
        assert ids_of(opened(tmp_path / "a.json")) == joined(tokenizer, TEXTS)


def test_tokenizer_without_eos(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """Blank lines separate documents, and a note says so."""
    bare = byte_tokenizer()
    bare.eos_token = None
    sequences = opened(write_jsonl(tmp_path / "a.jsonl", TEXTS), tokenizer=bare)
    ids = bare("".join(text + "\n\n" for text in TEXTS)).input_ids
    assert [id for sequence in ids_of(sequences) for id in sequence] == ids[: sequences.tokens]
    assert "no end-of-text token" in sequences.notes[0]


# ------------------------------------------------------------------------------------------------------------ streaming


def test_stream_has_the_same_sequences(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """In an order that depends on the seed and changes with each pass; nothing is written."""
    names = (write_jsonl(tmp_path / "a.jsonl", TEXTS), write_parquet(tmp_path / "b.parquet", TEXTS))
    stream = opened(*names, streaming=True)
    assert (stream.count, stream.tokens) == (None, None)
    assert not (tmp_path / "scratch").exists()
    expected = ids_of(opened(*names))
    count = len(expected)
    first, again, other = (ids_of(opened(*names, streaming=True, seed=seed), 2 * count) for seed in (0, 0, 1))
    assert first == again
    assert first[:count] != other[:count]
    assert first[:count] != first[count:]
    assert sorted(first[:count]) == sorted(first[count:]) == sorted(other[:count]) == sorted(expected)


class Recorder(TrainerCallback):
    """Stops at a step."""

    def __init__(self, stop_at: int | None):
        self.stop_at = stop_at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop_at:
            control.should_training_stop = control.should_save = True


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_resumed_trainer_continues_the_data(streaming: bool, opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """In the first epoch and in a later one, with the batches of an uninterrupted run."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:12])

    def read(out: str, stop_at: int | None = None, resume: str | None = None) -> list[list[int]]:
        sequences = opened(path, streaming=streaming)
        seen: list[list[int]] = []

        def record(rows: Any) -> dict[str, torch.Tensor]:
            batch = collate(rows)
            seen.extend(batch["input_ids"].tolist())
            return batch

        arguments = TrainingArguments(
            output_dir=str(tmp_path / out),
            max_steps=14,
            per_device_train_batch_size=4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        model = tiny_model(vocab_size=VOCAB_SIZE).train()
        trainer = Trainer(
            model, arguments, train_dataset=sequences.rows, data_collator=record, callbacks=[Recorder(stop_at)]
        )
        trainer.train(resume_from_checkpoint=resume)
        return seen

    whole = read("whole")
    sequences = ids_of(opened(path))
    assert len(whole) > len(sequences)
    assert sorted(whole[: len(sequences)]) == sorted(sequences)
    assert whole[: len(sequences)] != sequences
    for stop_at in (2, 11):
        out = f"stopped-{stop_at}"
        read(out, stop_at=stop_at)
        rest = read(out, resume=str(tmp_path / out / f"checkpoint-{stop_at}"))
        missing = len(whole) - (4 * stop_at if streaming else _rows_of(len(sequences), stop_at))
        assert rest[-missing:] == whole[-missing:]


def _rows_of(count: int, steps: int) -> int:
    """The number of sequences read in `steps` steps of four; the last step of an epoch reads the rest."""
    epoch = -(-count // 4)
    return steps // epoch * count + steps % epoch * 4


# -------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def words(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """A Hub with a dataset of two splits, and its own cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files = {}
    for split, texts in (("train", TEXTS), ("test", TEXTS[:15])):
        path = write_parquet(tmp_path / f"{split}.parquet", texts)
        files[f"data/{split}-00000-of-00001.parquet"] = Blob(path.read_bytes(), True)
    hub.repos["me/words"] = Repo(False)
    hub.repos["me/words"].commit("main", "data", files)
    return hub


@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_from_the_hub(
    streaming: bool, words: Hub, opened: Callable[..., Sequences], tokenizer: PreTrainedTokenizerBase
) -> None:
    """NAME is the split train; NAME::SPLIT and NAME:CONFIG:SPLIT name another."""
    for name, texts in (("me/words", TEXTS), ("me/words::test", TEXTS[:15]), ("me/words:default:test", TEXTS[:15])):
        expected = joined(tokenizer, texts)
        assert sorted(ids_of(opened(name, streaming=streaming), len(expected))) == sorted(expected)


HUB_BAD = {
    "none": ("me/none", FileNotFoundError, ("--data me/none", "neither a file nor a dataset on the Hub")),
    "config": ("me/words:large", ValueError, ("--data me/words:large", "'large' not found")),
    "split": ("me/words::dev", ValueError, ("--data me/words::dev", "dev")),
    "name": ("me/wo rds", (ValueError, FileNotFoundError), ("--data me/wo rds",)),
}


@pytest.mark.parametrize("case", HUB_BAD)
def test_missing_dataset(case: str, words: Hub, opened: Callable[..., Sequences]) -> None:
    """One line says which part of the name is unknown."""
    name, kind, printed = HUB_BAD[case]
    refused(lambda: opened(name), kind, *printed)


def test_dataset_without_the_column(words: Hub, opened: Callable[..., Sequences]) -> None:
    """Also a column of numbers."""
    refused(
        lambda: opened("me/words", text_field="body"), ValueError, "no field `body`", "fields n, text", "--text-field"
    )
    refused(lambda: opened("me/words", text_field="n"), ValueError, "me/words, row 1: `n` holds int, not a string")


def test_failing_hub(words: Hub, opened: Callable[..., Sequences], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, whether it refuses or cannot be reached."""
    monkeypatch.setattr(words, "fault_for", lambda request: Fault(request, refuse=Refusal(403, "no")))
    refused(lambda: opened("me/words"), (ConnectionError, FileNotFoundError), "--data me/words")

    def load_dataset(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach 'me/words' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    refused(lambda: opened("me/words"), ConnectionError, "--data me/words is not a file, and the Hub cannot be reached")


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(call: Callable[[], Any], kind: Any, *printed: str) -> None:
    """An error of one line with these words."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for each in printed:
        assert each in message


LONG = "words and words " * 40
ROW = json.dumps({"text": LONG})
FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty": ("a.txt", b"", ("a.txt is empty",)),
    "empty rows": ("a.jsonl", b"", ("a.jsonl is empty",)),
    "empty parquet": ("a.parquet", b"", ("a.parquet is empty",)),
    "binary": ("a.txt", b"\x80\x02}q\x00", ("a.txt is not text in UTF-8", "byte 0")),
    "zeros": ("a.txt", b"some words" + bytes(9), ("a.txt is not text", "zero byte")),
    "a later block": ("a.txt", b"word " * 300_000 + b"\xff", ("a.txt is not text in UTF-8", "byte 1500000")),
    "no JSON": ("a.jsonl", f"{ROW}\n{{text: no}}\n".encode(), ("a.jsonl, line 2 is not JSON",)),
    "other fields": (
        "a.jsonl",
        b'{"instruction": "a", "output": "b"}\n{"n": 1}',
        ("a.jsonl has no field `text`, `messages`, or `prompt` and `completion`", "instruction, output, n with --text"),
    ),
    "another field": ("a.jsonl", f"{ROW}\n\n{{}}".encode(), ("a.jsonl, line 3 has no field `text`",)),
    "no string": ("a.jsonl", b'{"text": 1}', ("a.jsonl, line 1: `text` holds int, not a string",)),
    "null": ("a.jsonl", b'{"text": null}', ("a.jsonl has 0 tokens",)),
    "a list": ("a.jsonl", b'["text"]', ("a.jsonl, line 1 is not a JSON object", "field `text`")),
    "no parquet": ("a.parquet", LONG.encode(), ("a.parquet cannot be read",)),
    "short": ("a.txt", b"a", ("a.txt has 2 tokens, fewer than one sequence of 16; lower --context or add text",)),
    "no CSV": ("a.csv", b"text,n\na,1\nb,2,3,4\n", ("a.csv cannot be read after row 0",)),
    "CSV of another encoding": ("a.csv", b"text\na\xff\n", ("a.csv cannot be read after row 0",)),
    "CSV without the column": ("a.csv", b"body,n\na,1\n", ("a.csv has no field `text`", "body, n", "--text-field")),
    "broken JSON": ("a.json", b'[{"text": "a"}', ("a.json cannot be read: Expecting",)),
    "JSON without the field": (
        "a.json",
        b'[{"n": 1}, {}]',
        ("a.json has no field `text`", "its fields n with --text-"),
    ),
    "unquoted commas": (
        "a.csv",
        b"text\n1984, a novel\nthe one, the other\n",
        ("a.csv has rows with more fields than its header", "quote text"),
    ),
    "no text in rows": ("a.jsonl", b'{"text": ""}\n' * 3, ("a.jsonl has 0 tokens",)),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_unreadable_file(name: str, streaming: bool, opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """File, line and field are named; a stream reads its beginning before training starts."""
    file, content, printed = FILES[name]
    (tmp_path / file).write_bytes(content)

    def read() -> None:
        list(opened(tmp_path / file, streaming=streaming).rows)

    refused(read, ValueError, *printed)


def test_unreadable_parquet(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """Another column, numbers, null, damaged bytes."""
    path = tmp_path / "a.parquet"
    write_parquet(path, TEXTS, "body")
    refused(
        lambda: opened(path),
        ValueError,
        "a.parquet has no field `text`",
        "choose one of its fields n, body with --text-field",
    )
    refused(lambda: opened(path, text_field="n"), ValueError, "a.parquet, row 1: `n` holds int")
    write_parquet(path, TEXTS, compression="none", use_dictionary=False, write_page_checksum=True)
    damaged = bytearray(path.read_bytes())
    damaged[300:700] = bytes(400)
    path.write_bytes(damaged)
    refused(lambda: opened(path), ValueError, "a.parquet")
    path.write_bytes(damaged[:-100])
    refused(lambda: opened(path), ValueError, "a.parquet cannot be read")


def test_compressed_text_is_refused(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(b"a text"))
    with pytest.raises(ValueError, match=r"text\.txt\.gz is compressed text; decompress it"):
        opened(path)


@pytest.mark.parametrize("name", ["none.txt", "./none", "/none/none", "none.parquet", "no/such/file", "no/file.csv"])
def test_missing_file(name: str, opened: Callable[..., Sequences]) -> None:
    """A name that looks like a path is not looked up on the Hub."""
    refused(lambda: opened(name), FileNotFoundError, f"--data {name} does not exist; name a file")


def test_folder_without_text(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """The message lists the file endings that are read."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.md").write_text(LONG)
    refused(lambda: opened(tmp_path / "folder"), FileNotFoundError, "folder", ".txt, .jsonl, .parquet")


@pytest.mark.parametrize("streaming", [False, True])
def test_ids_without_an_embedding(streaming: bool, opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """From the tokenizer of another model."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    printed = ("ids up to", "the model has 40 embeddings", "tokenizer")
    refused(lambda: opened(path, vocab_size=40, streaming=streaming), ValueError, *printed)


def test_errors_name_the_option(opened: Callable[..., Sequences]) -> None:
    refused(lambda: opened("none.txt", option="--eval-data"), FileNotFoundError, "--eval-data none.txt")


def test_failure_leaves_no_sequences(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """A repaired file is packed again."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    good = ids_of(opened(path))
    path.write_text(path.read_text() + "no JSON")
    refused(lambda: opened(path), ValueError, "line 41")
    write_jsonl(path, TEXTS)
    assert ids_of(opened(path)) == good
