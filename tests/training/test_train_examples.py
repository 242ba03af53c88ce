"""Chats and completions: which tokens are learned, sequences in which documents don't see each other, and the loss."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import processors
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import gda
from gda.training.data.examples import Encoded, render, tokenize
from gda.training.data.rows import Example
from gda.training.data.sequences import Sequences, collate, open_sequences

from ..support.commands import Command
from ..support.llamas import VOCAB_SIZE, byte_tokenizer, save_llama
from ..support.tiny import tiny_model

pytestmark = pytest.mark.sampled

CONTEXT, EOS, NO_LABEL = 48, 1, -100
PREFIX = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
# As templates of reasoning models: what an earlier turn thought is not repeated.
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last else m.content.split('=')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Begins the assistant's turn otherwise than the generation prompt does.
BLUNT = PREFIX.replace("<|assistant|>{% endif %}", "<|model|>{% endif %}")
PAIRS = [{"prompt": f"What is {n} + {n}?", "completion": f" {'It is ' * (n % 3)}{2 * n}"} for n in range(20)]
ROLES = ("user", "assistant") * 3
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "1=hello"},
    {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "2=the end"},
]


def tokenizer_with(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def ids_of(*parts: tuple[str, bool]) -> tuple[list[int], list[bool]]:
    """Ids and mask of texts that are tokenized one by one; whether each is learned."""
    tokenizer = byte_tokenizer()
    pieces = [(tokenizer(text, add_special_tokens=False).input_ids, learned) for text, learned in parts]
    return [id for ids, _ in pieces for id in ids], [learned for ids, learned in pieces for _ in ids]


def encode(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> list[list[Encoded]]:
    return tokenize(tokenizer, render(tokenizer, examples))


def encoded(template: str | None, prompt: Any, answer: Any) -> tuple[list[int], list[bool]]:
    [[found]] = encode(tokenizer_with(template), [Example("here", prompt, answer)])
    return found.ids.tolist(), found.learned.tolist()


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Sequences]:
    def open_(*names: Path, template: str = PREFIX, streaming: bool = False, **options: Any) -> Sequences:
        defaults = {"context": CONTEXT, "text_field": "text", "seed": 0, "vocab_size": VOCAB_SIZE}
        tokenizer = tokenizer_with(template)
        return open_sequences(
            names, tokenizer, streaming=streaming, scratch=tmp_path / "scratch", **(defaults | options)
        )

    return open_


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents(sequences: Sequences, count: int | None = None) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of all documents in the sequences (or in the first `count`), sorted, without padding."""
    found = []
    for number, row in enumerate(sequences.rows):
        if number == count:
            break
        starts = row["position_ids"].eq(0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], CONTEXT], strict=True):
            assert row["position_ids"][start:end].tolist() == list(range(end - start))
            labels = row["labels"][start:end]
            if labels.ne(NO_LABEL).any():
                found.append((row["input_ids"][start:end].tolist(), labels.tolist()))
    return sorted(found)


def expected_pairs(rows: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    found = []
    for row in rows:
        ids, learned = ids_of((row["prompt"], False), (row["completion"], True), ("</s>", True))
        found.append((ids, [id if is_learned else NO_LABEL for id, is_learned in zip(ids, learned, strict=True)]))
    return sorted(found)


# ------------------------------------------------------------------------------------------------ what is learned


def test_tokens_of_spaces_are_learned() -> None:
    """Also if the tokenizer trims their offsets, as a ByteLevel post-processor does by default."""
    trimming = tokenizer_with(PREFIX)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel()
    example = Example("here", "Write code.", "def f():\n    return   1")
    [[found]], [[expected]] = encode(trimming, [example]), encode(tokenizer_with(PREFIX), [example])
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.learned.tolist() == expected.learned.tolist()


def test_completion_is_learned_and_ends() -> None:
    """With its end-of-text token; a token that begins in the prompt is learned with the rest of it."""
    assert encoded(None, "Q: of", " big man") == ids_of(("Q: of", False), (" big man", True), ("</s>", True))
    ids, learned = encoded(None, "of th", "e")
    assert byte_tokenizer().convert_ids_to_tokens(ids) == ["of", "Ġthe", "</s>"]
    assert learned == [False, True, True]
    assert encoded(None, "", "ab")[1] == [False, True, True]  # nothing predicts the first token


@pytest.mark.parametrize("template", [PREFIX, MARKED])
def test_turns_of_the_assistant_are_learned(template: str) -> None:
    """All of them in `messages`; both ways to find them agree."""
    assert encoded(template, [], CHAT) == ids_of(
        ("<|system|>Be brief.</s><|user|>hi there</s><|assistant|>", False),
        ("1=hello</s>", True),
        ("<|user|>and then?</s><|assistant|>", False),
        ("2=the end</s>", True),
    )


@pytest.mark.parametrize("template", [PREFIX, FORGETFUL])
def test_only_the_completion_of_messages_is_learned(template: str) -> None:
    """The turns of the assistant in the prompt are only read, as the template renders them in the whole chat."""
    first = "1=hello" if template is PREFIX else "hello"
    assert encoded(template, CHAT[:4], CHAT[4:]) == ids_of(
        (
            f"<|system|>Be brief.</s><|user|>hi there</s><|assistant|>{first}</s><|user|>and then?</s><|assistant|>",
            False,
        ),
        ("2=the end</s>", True),
    )


HARD = ["  1=a", "\u20ac \U0001f600", "2\n\n", "x" * 50, "<|user|> </s> hi", "\u00e4=\U0001f468\u200d\U0001f469"]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("template", [PREFIX, MARKED, FORGETFUL])
def test_batch_equals_examples_one_by_one(template: str, tools: Any) -> None:
    """Ids and masks of chats and completions that are tokenized at once, and those of `apply_chat_template`."""
    tokenizer = tokenizer_with(template.replace("{%", "{% if tools %}{{ tools | tojson }}{% endif %}{%", 1))
    words = [[*HARD[n:], *HARD[:n]] for n in range(len(HARD))]
    chats = [[{"role": role, "content": word} for role, word in zip(ROLES, each, strict=True)] for each in words]
    for chat in chats:  # FORGETFUL changes what follows "=", which it should only do to the assistant
        chat[0]["content"] = chat[2]["content"] = chat[4]["content"] = chat[4]["content"].replace("=", "")
    examples = [Example(f"row {n}", [], chat, tools if n % 2 else None) for n, chat in enumerate(chats)]
    examples += [Example("completion", f"{word}?", word) for word in HARD]
    mixed = examples[::2] + examples[1::2]
    found = encode(tokenizer, mixed)
    for example, documents in zip(mixed, found, strict=True):
        (alone,) = encode(tokenizer, [example])
        assert len(alone) == len(documents)
        for one, other in zip(alone, documents, strict=True):
            assert (one.ids.tolist(), one.learned.tolist()) == (other.ids.tolist(), other.learned.tolist())
        if isinstance(example.answer, str):
            text = f"{example.prompt}{example.answer}"
            assert documents[0].ids.tolist() == [*tokenizer(text).input_ids, EOS]
            continue
        expected: Any = tokenizer.apply_chat_template(
            example.answer, tools=example.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        assert documents[-1].ids.tolist() == expected["input_ids"]
        if template is MARKED:
            assert documents[0].learned.tolist() == [bool(each) for each in expected["assistant_masks"]]


BAD_CHATS: dict[str, tuple[Any, str | None, tuple[str, ...]]] = {
    "no beginning": (CHAT, BLUNT, ("begins the assistant's turn 3 differently", "{% generation %}")),
    "no template": (CHAT, None, ("is a chat", "has no chat template", "chat_template.jinja")),
    "template": (CHAT, "{{ raise_exception('roles must alternate') }}", ("cannot render", "roles must alternate")),
    "ShareGPT": ([{"from": "human", "value": "a"}], PREFIX, ("fields role and content, and has from, value",)),
    "strings": (["a", "b"], PREFIX, ("fields role and content, and has str",)),
    "number": (7, PREFIX, ("`messages` holds int, not a string or messages",)),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_bad_chat_is_refused(case: str, opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """One line that names the row."""
    messages, template, words = BAD_CHATS[case]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1") as caught:
        opened(path, template=template)
    for word in words:
        assert word in str(caught.value)


# ------------------------------------------------------------------------------------------------------- sequences


def test_examples_are_packed_whole(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """Every example is there once, with its labels, and the counts are reported."""
    sequences = opened(write_jsonl(tmp_path / "a.jsonl", PAIRS))
    expected = expected_pairs(PAIRS)
    assert documents(sequences) == expected
    tokens = sum(len(ids) for ids, _ in expected)
    learned = sum(label != NO_LABEL for _, labels in expected for label in labels)
    assert sequences.tokens == tokens
    assert sequences.count is not None
    assert -(-tokens // CONTEXT) <= sequences.count < len(PAIRS)
    assert sequences.notes == (
        f"20 examples in {sequences.count} sequences; the loss is on {learned} of {tokens} tokens",
    )


def test_stream_has_the_same_examples(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    count = opened(path).count
    assert documents(opened(path, streaming=True), count) == expected_pairs(PAIRS)


def test_rows_that_are_skipped_or_cut(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """Null and empty fields, chats without an answer, and answers that do not fit."""
    empty = [{"messages": None}, {"messages": []}]
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 99}]
    longer = [{"role": "user", "content": "a" * 99}, {"role": "assistant", "content": "b"}]
    chats = [{"messages": each} for each in (CHAT[1:3], CHAT[:2], long, longer)]
    sequences = opened(write_jsonl(tmp_path / "a.jsonl", [*empty, *chats]))
    lengths = sorted(len(ids) for ids, _ in documents(sequences))
    assert lengths == [len(ids_of(("<|user|>hi there</s><|assistant|>1=hello</s>", True))[0]), CONTEXT]
    assert sequences.notes[:4] == (
        "rows without content, skipped: 2",
        "rows without an answer, skipped: 1",
        "answers that begin after 48 tokens, skipped (--context): 1",
        "examples longer than 48 tokens, whose end is cut (--context): 1",
    )


def test_text_beside_examples(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """Text is learned in full, and its sequences are the same as without examples."""
    (tmp_path / "a.txt").write_text("some words " * 30)
    alone = opened(tmp_path / "a.txt")
    both = opened(tmp_path / "a.txt", write_jsonl(tmp_path / "b.jsonl", PAIRS))
    assert alone.count is not None
    for one, other in zip(alone.rows, both.rows, strict=False):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(other["labels"], other["input_ids"])
        assert other["position_ids"].tolist() == list(range(CONTEXT))
    assert documents(Sequences(both.rows.select(range(alone.count, len(both.rows))), 0, 0)) == expected_pairs(PAIRS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", ["shared", "paired", "window"])
def test_documents_do_not_see_each_other(
    layout: str, attention: str, opened: Callable[..., Sequences], tmp_path: Path
) -> None:
    """The logits of a packed document are those of the document alone."""
    fields: dict[str, Any] = {
        "shared": {"lambda_type": "tanh"},
        "paired": {"kv_layout": "paired", "head_norm": True, "num_key_value_heads": 4},
        "window": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    }[layout]
    model = tiny_model(attention=attention, vocab_size=VOCAB_SIZE, **fields)
    sequences = opened(write_jsonl(tmp_path / "a.jsonl", PAIRS))
    batch = collate([sequences.rows[0], sequences.rows[1]])
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits
        for row, positions in enumerate(batch["position_ids"]):
            starts = positions.eq(0).nonzero().flatten().tolist()
            assert len(starts) > 2
            for start, end in zip(starts, [*starts[1:], CONTEXT], strict=True):
                alone = model(batch["input_ids"][row : row + 1, start:end]).logits[0]
                torch.testing.assert_close(packed[row, start:end], alone, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ kinds of files


def write_rows(kind: str, folder: Path) -> Path:
    """The pairs as one kind of data, with a row without content and, in folders, a split that is not read."""
    rows = [*PAIRS[:3], {"prompt": None, "completion": None}, *PAIRS[3:]]
    table, other = pa.Table.from_pylist(rows), pa.Table.from_pylist([{"prompt": "no", "completion": "never"}])
    folder.mkdir()
    if kind == "saved":
        DatasetDict({"test": Dataset(other), "train": Dataset(table)}).save_to_disk(folder)
    elif kind == "saved split":
        Dataset(table).save_to_disk(folder)
    elif kind == "downloaded":
        (folder / "data").mkdir()
        for shard, part in enumerate((table[:9], table[9:])):
            pq.write_table(part, folder / f"data/train-{shard:05d}-of-00002.parquet")
        pq.write_table(other, folder / "data/test-00000-of-00001.parquet")
        (folder / "dataset_infos.json").write_text("{}")
    else:
        path = folder / f"rows.{kind}"
        if kind == "parquet":
            pq.write_table(table, path)
        elif kind == "arrow":
            with pa.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table)
        elif kind == "json.gz":
            path.write_bytes(gzip.compress(json.dumps(rows).encode()))
        elif kind == "JSON":
            path.write_text(json.dumps(rows))
        elif kind in ("csv", "tsv"):
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="," if kind == "csv" else "\t")
                writer.writeheader()
                writer.writerows(rows)
        else:
            write_jsonl(path, rows)
        return path
    return folder


FILES = ("jsonl", "ndjson", "JSON", "json.gz", "csv", "tsv", "parquet", "arrow")
FOLDERS = ("saved", "saved split", "downloaded")


@pytest.mark.parametrize("kind", [*FILES, *FOLDERS])
def test_every_kind_of_data_gives_the_same_examples(
    kind: str, opened: Callable[..., Sequences], tmp_path: Path
) -> None:
    """Rows without content are counted, and a note names what is not read."""
    sequences = opened(write_rows(kind, tmp_path / "data"))
    assert documents(sequences) == expected_pairs(PAIRS)
    assert "rows without content, skipped: 1" in sequences.notes
    notes = [note for note in sequences.notes if "only the split train is read" in note]
    assert len(notes) == (kind in ("saved", "downloaded"))
    assert all("not test" in note for note in notes)
    if kind == "downloaded":
        assert "data/train-00000-of-00002.parquet, data/train-00001-of-00002.parquet" in notes[0]


def test_tools_of_a_json_array(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """They differ between rows, and have the same tokens as in JSON Lines."""
    template = "{{ tools | tojson if tools else '' }}" + PREFIX
    tools = [[{"type": "function", "function": {"name": name, "parameters": {name: 1}}}] for name in ("see", "hear")]
    rows = [{"messages": CHAT[1:3], "tools": each} for each in tools] + [{"messages": [*CHAT[1:3], *CHAT[1:3]]}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    names = ("a.jsonl", "a.json", "b.json.gz")
    lines, array, compressed = (documents(opened(tmp_path / name, template=template)) for name in names)
    assert lines == array == compressed


def test_messages_in_tables(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """Nulls that a table adds to messages do not reach the template; any field can hold the messages."""
    template = PREFIX.replace("</s>", "{% if 'name' in m %}{{ m.name }}{% endif %}</s>", 1)
    chats = [CHAT[1:3], [{**CHAT[1], "name": "me"}, CHAT[2]]]
    pq.write_table(pa.table({"chat": chats}), tmp_path / "a.parquet")
    found = documents(opened(tmp_path / "a.parquet", template=template, text_field="chat"))
    texts = [f"<|user|>hi there{name}</s><|assistant|>" for name in ("", "me")]
    expected = [ids_of((text, False), ("1=hello</s>", True)) for text in texts]
    assert [ids for ids, _ in found] == sorted(ids for ids, _ in expected)


def test_folder_without_the_split_train(opened: Callable[..., Sequences], tmp_path: Path) -> None:
    """Its splits are named, and what is to be done."""
    pq.write_table(pa.Table.from_pylist(PAIRS), tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"--data .* has no split train, only test; name its files"):
        opened(tmp_path)
    DatasetDict({split: Dataset.from_list(PAIRS) for split in ("dev", "test")}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"--data .* has no split train; name one of .*saved/dev, .*saved/test"):
        opened(tmp_path / "saved")


# ----------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    source = save_llama(folder / "llama")
    tokenizer_with(PREFIX).save_pretrained(source)
    gda.convert(source, folder / "gda", verify=False)
    return folder / "gda"


def mean_loss(folder: Path, rows: list[dict[str, str]]) -> float:
    """The loss on all learned tokens, each example alone."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    losses = []
    for ids, labels in expected_pairs(rows):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        losses.append(cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=NO_LABEL, reduction="none"))
        losses[-1] = losses[-1][torch.tensor(labels[1:]) != NO_LABEL]
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize(("batch_size", "accumulation"), [(64, 1), (2, 32)])
def test_loss_counts_each_learned_token_once(batch_size: int, accumulation: int, model: Path, tmp_path: Path) -> None:
    """In training, however the sequences are batched, and in evaluation."""
    train, held_out = (write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", PAIRS), ("b", PAIRS[3:])))
    report = gda.train(
        model,
        tmp_path / "out",
        data=train,
        eval_data=held_out,
        context=CONTEXT,
        steps=1,
        batch_size=batch_size,
        accumulation=accumulation,
    )
    assert report.first_loss == pytest.approx(mean_loss(model, PAIRS), rel=1e-5)
    assert report.first_eval_loss == pytest.approx(mean_loss(model, PAIRS[3:]), rel=1e-5)
    assert any(note.startswith("--eval-data: 17 examples in ") for note in report.notes)


def test_teacher_reads_the_same_documents(model: Path, tmp_path: Path) -> None:
    """A teacher that equals the student predicts the same: KL is 0."""
    data = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    gda.train(model, tmp_path / "out", data=data, context=CONTEXT, steps=1, teacher=model.parent / "llama")
    entry = json.loads((tmp_path / "out" / "training_log.jsonl").read_text().splitlines()[0])
    assert entry["kl"] == pytest.approx(0, abs=1e-6)
    assert entry["cross_entropy"] > 1


def test_first_sequence_is_shown(model: Path, tmp_path: Path, command: Command) -> None:
    """On standard error, with what is learned and what is only read."""
    data = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT[1:3]}])
    options = ("--data", data, "--context", 128, "--show-batch", "--dry-run", "--steps", 1)
    outcome = command("train", model, tmp_path / "out", *options)
    assert outcome.code == 0
    shown = [line for line in outcome.error.splitlines() if line.startswith(("first", "  "))]
    length = len(ids_of(("<|user|>hi there</s><|assistant|>1=hello</s>", True))[0])
    assert shown == [
        "first sequence: 128 tokens",
        "  document 1",
        "  read     '<|user|>hi there</s><|assistant|>'",
        "  learned  '1=hello</s>'",
        f"  padding  {128 - length} tokens",
    ]
    (tmp_path / "a.txt").write_text("some words\n" * 30)
    outcome = command("train", model, tmp_path / "out", "--data", tmp_path / "a.txt", *options[2:])
    assert f"  learned  {('some words' + chr(10)) * 11 + 'some wo'!r}" in outcome.error
