"""Text for training: the windows that are cut of it, the same at every start; and what is refused."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from gda.common import text as _text
from gda.training.data import sequences as data_module
from gda.training.data.sequences import Windows, collate, open_windows

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
def opened(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., Windows]:
    """`open_windows` with what most tests want."""

    def open_(*names: str | Path, **options: Any) -> Windows:
        defaults = {"context": CONTEXT, "text_field": "text", "streaming": False, "seed": 0, "vocab_size": VOCAB_SIZE}
        return open_windows(
            names, options.pop("tokenizer", tokenizer), scratch=tmp_path / "scratch", **defaults | options
        )

    return open_


def joined(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The windows that documents fill, cut in the plainest way."""
    ids = [id for text in texts for id in [*tokenizer(text, add_special_tokens=False).input_ids, EOS]]
    return [ids[start : start + CONTEXT] for start in range(0, len(ids) - CONTEXT + 1, CONTEXT)]


def ids_of(windows: Windows, count: int | None = None) -> list[list[int]]:
    """All windows, or as many as are told: a stream has no end."""
    assert count is not None or windows.count is not None
    return [row["input_ids"].tolist() for row in itertools.islice(windows.rows, count)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("\n".join(json.dumps({"n": 1, field: text}) for text in texts) + "\n")
    return path


def write_parquet(path: Path, column: Any, field: str = "text", **options: Any) -> Path:
    pq.write_table(pa.table({"n": range(len(column)), field: column}), path, **options)
    return path


# ---------------------------------------------------------------------------------------------------------- the windows


def test_documents_are_joined_and_cut(
    opened: Callable[..., Windows], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A file of text is one document, a row is one; each ends with EOS; what fills no window is told of."""
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    (tmp_path / "b.md").write_text(TEXTS[0])
    c, d = write_jsonl(tmp_path / "c.jsonl", TEXTS), write_parquet(tmp_path / "d.parquet", TEXTS, row_group_size=7)
    windows = opened(tmp_path / "a.txt", str(tmp_path / "b.md"), c, d)
    expected = joined(tokenizer, ["\n".join(TEXTS), TEXTS[0], *TEXTS, *TEXTS])
    assert ids_of(windows) == expected
    assert (windows.count, windows.tokens) == (len(expected), len(expected) * CONTEXT)
    total = sum(len(tokenizer(text).input_ids) + 1 for text in ["\n".join(TEXTS), TEXTS[0], *TEXTS, *TEXTS])
    assert windows.notes == (f"{total % CONTEXT} tokens at the end of the data fill no window and are left out",)
    batch = collate([windows.rows[0], windows.rows[2]])
    assert torch.equal(batch["input_ids"], torch.tensor([expected[0], expected[2]]))
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_a_folder_is_its_files(
    opened: Callable[..., Windows], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Those with an ending that is known, below it too, in the order of their paths."""
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    write_jsonl(folder / "c.jsonl", TEXTS[:9])
    write_parquet(folder / "b" / "x.parquet", TEXTS[9:20])
    (folder / "a.txt").write_text(TEXTS[30])
    (folder / "readme.md").write_text("no text to learn")
    assert ids_of(opened(folder)) == joined(tokenizer, [TEXTS[30], *TEXTS[9:20], *TEXTS[:9]])


def test_columns_of_text(opened: Callable[..., Windows], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Any field, whatever Arrow's way of holding strings; rows without text are no documents."""
    expected = joined(tokenizer, TEXTS)
    with_empty = [*TEXTS[:5], "", *TEXTS[5:]]
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        path = write_parquet(tmp_path / "rows.parquet", pa.array(with_empty, pa.string()).cast(kind), "body")
        assert ids_of(opened(path, text_field="body")) == expected
    assert ids_of(opened(write_jsonl(tmp_path / "rows.jsonl", with_empty, "body"), text_field="body")) == expected


def test_lines_of_every_system(
    opened: Callable[..., Windows], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Line ends are those of Unix, and a byte order mark is not text; U+2028 in a row ends no line."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(TEXTS).encode() + b"\rend")
    assert ids_of(opened(tmp_path / "a.txt")) == joined(tokenizer, ["\n".join(TEXTS) + "\nend"])
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "one\u2028two " * 9}, ensure_ascii=False))
    assert ids_of(opened(tmp_path / "b.jsonl")) == joined(tokenizer, ["one\u2028two " * 9])


def test_a_file_is_read_in_pieces(
    opened: Callable[..., Windows],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever falls on the border of two: a character, a line end, an empty line, a line longer than both."""
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
    # The tokenizer has no token that holds a line end and a letter, so that pieces make no difference here.
    assert ids_of(opened(tmp_path / "a.txt")) == plain


def test_memory_stays_bounded(opened: Callable[..., Windows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is tokenized at once than a batch, and windows are written as they come."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS * 20)
    monkeypatch.setattr(data_module, "BATCH_CHARACTERS", 200)
    sizes: list[int] = []
    plain = data_module._Cutter._tokenized

    def tokenized(self: Any, pieces: list[tuple[str, bool]]) -> Iterator[list[int]]:
        sizes.append(sum(len(text) for text, _ in pieces))
        return plain(self, pieces)

    monkeypatch.setattr(data_module._Cutter, "_tokenized", tokenized)
    windows = opened(tmp_path / "a.jsonl")
    assert max(sizes) < 200 + max(map(len, TEXTS))
    assert windows.rows.cache_files[0]["filename"].startswith(str(tmp_path))  # mapped, not in memory


def test_windows_are_cut_once(opened: Callable[..., Windows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start reads the file again; other data, another context or tokenizer cuts anew."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = opened(path)
    cut: list[int] = []
    plain = data_module._Cutter.windows
    monkeypatch.setattr(data_module._Cutter, "windows", lambda self, sources: cut.append(1) or plain(self, sources))
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


def test_without_a_token_that_ends_a_text(opened: Callable[..., Windows], tmp_path: Path) -> None:
    """Blank lines part documents, and that is said."""
    bare = byte_tokenizer()
    bare.eos_token = None
    windows = opened(write_jsonl(tmp_path / "a.jsonl", TEXTS), tokenizer=bare)
    ids = bare("".join(text + "\n\n" for text in TEXTS)).input_ids
    assert [id for window in ids_of(windows) for id in window] == ids[: windows.tokens]
    assert "no token that ends a text" in windows.notes[0]


# ------------------------------------------------------------------------------------------------------------ streaming


def test_a_stream_has_the_same_windows(opened: Callable[..., Windows], tmp_path: Path) -> None:
    """In an order of its seed, again and again and each time in another; nothing is written."""
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


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_trainer_reads_on(streaming: bool, opened: Callable[..., Windows], tmp_path: Path) -> None:
    """In the first epoch and in a later one: the batches of an unbroken run, in its order."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:12])

    def read(out: str, stop_at: int | None = None, resume: str | None = None) -> list[list[int]]:
        windows = opened(path, streaming=streaming)
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
            model, arguments, train_dataset=windows.rows, data_collator=record, callbacks=[Recorder(stop_at)]
        )
        trainer.train(resume_from_checkpoint=resume)
        return seen

    whole = read("whole")
    windows = ids_of(opened(path))
    assert len(whole) > len(windows)
    assert sorted(whole[: len(windows)]) == sorted(windows)
    assert whole[: len(windows)] != windows
    for stop_at in (2, 11):
        out = f"stopped-{stop_at}"
        read(out, stop_at=stop_at)
        rest = read(out, resume=str(tmp_path / out / f"checkpoint-{stop_at}"))
        missing = len(whole) - (4 * stop_at if streaming else _rows_of(len(windows), stop_at))
        assert rest[-missing:] == whole[-missing:]


def _rows_of(count: int, steps: int) -> int:
    """How many windows are read in so many steps of four, the last of an epoch being what is left."""
    epoch = -(-count // 4)
    return steps // epoch * count + steps % epoch * 4


# -------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def words(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """A Hub with a dataset of two splits; datasets' cache is the test's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files = {}
    for split, texts in (("train", TEXTS), ("test", TEXTS[:15])):
        path = write_parquet(tmp_path / f"{split}.parquet", texts)
        files[f"data/{split}-00000-of-00001.parquet"] = Blob(path.read_bytes(), True)
    hub.repos["me/words"] = Repo(False)
    hub.repos["me/words"].commit("main", "data", files)
    return hub


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub(
    streaming: bool, words: Hub, opened: Callable[..., Windows], tokenizer: PreTrainedTokenizerBase
) -> None:
    """NAME is the split train; NAME::SPLIT and NAME:CONFIG:SPLIT another."""
    for name, texts in (("me/words", TEXTS), ("me/words::test", TEXTS[:15]), ("me/words:default:test", TEXTS[:15])):
        expected = joined(tokenizer, texts)
        assert sorted(ids_of(opened(name, streaming=streaming), len(expected))) == sorted(expected)


HUB_BAD = {
    "none": ("me/none", FileNotFoundError, ("--data me/none", "neither a file nor a dataset")),
    "config": ("me/words:large", ValueError, ("--data me/words:large", "'large' not found")),
    "split": ("me/words::dev", ValueError, ("--data me/words::dev", "dev")),
    "name": ("me/wo rds", (ValueError, FileNotFoundError), ("--data me/wo rds",)),
}


@pytest.mark.parametrize("case", HUB_BAD)
def test_a_dataset_that_is_not_there(case: str, words: Hub, opened: Callable[..., Windows]) -> None:
    """Which part of the name is unknown, in one line."""
    name, kind, said = HUB_BAD[case]
    refused(lambda: opened(name), kind, *said)


def test_a_dataset_without_the_column(words: Hub, opened: Callable[..., Windows]) -> None:
    """Or with numbers in it."""
    refused(lambda: opened("me/words", text_field="body"), ValueError, "no column `body`", "n, text", "--text-field")
    refused(lambda: opened("me/words", text_field="n"), ValueError, "me/words, row 1", "`n`", "string")


def test_a_hub_that_fails(words: Hub, opened: Callable[..., Windows], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says so, whether it refuses or is not reached."""
    monkeypatch.setattr(words, "fault_for", lambda request: Fault(request, refuse=Refusal(403, "no")))
    refused(lambda: opened("me/words"), (ConnectionError, FileNotFoundError), "--data me/words")

    def load_dataset(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach 'me/words' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    refused(lambda: opened("me/words"), ConnectionError, "--data me/words is no file, and the Hub cannot be reached")


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(call: Callable[[], Any], kind: Any, *said: str) -> None:
    """An error of one line with these words."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for each in said:
        assert each in message


LONG = "words and words " * 40
ROW = json.dumps({"text": LONG})
FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty": ("a.txt", b"", ("a.txt is empty",)),
    "empty rows": ("a.jsonl", b"", ("a.jsonl is empty",)),
    "empty parquet": ("a.parquet", b"", ("a.parquet is empty",)),
    "binary": ("a.txt", b"\x80\x02}q\x00", ("a.txt is not text in UTF-8", "byte 0")),
    "zeros": ("a.txt", b"some words" + bytes(9), ("a.txt is not text", "byte 10")),
    "a later block": ("a.txt", b"word " * 300_000 + b"\xff", ("a.txt is not text in UTF-8", "byte 1500000")),
    "no JSON": ("a.jsonl", f"{ROW}\n{{text: no}}\n".encode(), ("a.jsonl, line 2 is not JSON",)),
    "another field": ("a.jsonl", f"{ROW}\n\n{{}}".encode(), ("a.jsonl, line 3 has no field `text`",)),
    "no string": ("a.jsonl", b'{"text": 1}', ("a.jsonl, line 1 has no field `text` that holds a string",)),
    "null": ("a.jsonl", b'{"text": null}', ("a.jsonl, line 1 has no field `text` that holds a string",)),
    "a list": ("a.jsonl", b'["text"]', ("a.jsonl, line 1 has no field `text`",)),
    "no parquet": ("a.parquet", LONG.encode(), ("a.parquet is no parquet file that can be read",)),
    "short": ("a.txt", b"a", ("a.txt has 2 tokens, less than a window of 16; lower --context or add text",)),
    "no text in rows": ("a.jsonl", b'{"text": ""}\n' * 3, ("a.jsonl has 0 tokens",)),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read(name: str, streaming: bool, opened: Callable[..., Windows], tmp_path: Path) -> None:
    """The file, the line, the field; a stream looks at its beginning before training does."""
    file, content, said = FILES[name]
    (tmp_path / file).write_bytes(content)

    def read() -> None:
        list(opened(tmp_path / file, streaming=streaming).rows)

    refused(read, ValueError, *said)


def test_parquet_that_cannot_be_read(opened: Callable[..., Windows], tmp_path: Path) -> None:
    """Another column, numbers, null, bytes that were changed."""
    path = tmp_path / "a.parquet"
    write_parquet(path, TEXTS, "body")
    refused(lambda: opened(path), ValueError, "a.parquet has no column `text`, but n, body", "--text-field")
    refused(lambda: opened(path, text_field="n"), ValueError, "a.parquet", "column `n` holds int64")
    write_parquet(path, [*TEXTS[:4], None, *TEXTS])
    refused(lambda: opened(path), ValueError, "a.parquet, row 5", "null")
    write_parquet(path, TEXTS, compression="none", use_dictionary=False, write_page_checksum=True)
    damaged = bytearray(path.read_bytes())
    damaged[300:700] = bytes(400)
    path.write_bytes(damaged)
    refused(lambda: opened(path), ValueError, "a.parquet")
    path.write_bytes(damaged[:-100])
    refused(lambda: opened(path), ValueError, "a.parquet is no parquet file that can be read")


@pytest.mark.parametrize("name", ["none.txt", "./none", "/none/none", "none.parquet", "no/such/file", "no/file.csv"])
def test_a_file_that_is_not_there(name: str, opened: Callable[..., Windows]) -> None:
    """What looks like a path is not asked of the Hub."""
    refused(lambda: opened(name), FileNotFoundError, f"--data {name} is not a file")


def test_a_folder_without_text(opened: Callable[..., Windows], tmp_path: Path) -> None:
    """What would be read is told."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.md").write_text(LONG)
    refused(lambda: opened(tmp_path / "folder"), FileNotFoundError, "folder", ".txt, .jsonl, .parquet")


@pytest.mark.parametrize("streaming", [False, True])
def test_ids_without_an_embedding(streaming: bool, opened: Callable[..., Windows], tmp_path: Path) -> None:
    """A tokenizer of another model."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    said = ("ids up to", "the model has 40 embeddings", "tokenizer")
    refused(lambda: opened(path, vocab_size=40, streaming=streaming), ValueError, *said)


def test_the_option_is_named(opened: Callable[..., Windows]) -> None:
    """As it was given."""
    refused(lambda: opened("none.txt", option="--eval-data"), FileNotFoundError, "--eval-data none.txt")


def test_a_failure_leaves_nothing_to_read(opened: Callable[..., Windows], tmp_path: Path) -> None:
    """A file that was mended is cut; what was cut before it broke is not taken for it."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    good = ids_of(opened(path))
    path.write_text(path.read_text() + "no JSON")
    refused(lambda: opened(path), ValueError, "line 41")
    write_jsonl(path, TEXTS)
    assert ids_of(opened(path)) == good
