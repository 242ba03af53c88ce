"""`gda train`: the loss falls, old weights stay where only new ones learn, masks go, and bad input is one line."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import gda
from gda._trainable import Trainable
from gda.configuration.configuration_gda import GROWTH_FIELDS

from .commands import Command
from .llamas import byte_tokenizer, change_config, files_of, save_llama, tensors_of

TEXT = "".join(f"{i} times {i} is {i * i}, and the other way round it is the same. " for i in range(60))
FAST: dict[str, Any] = {"steps": 4, "batch_size": 4, "context": 32, "learning_rate": 1e-2}
OPTIONS = ("--steps", 4, "--batch-size", 4, "--context", 32, "--learning-rate", 1e-2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a GDA model, one grown by copies and one grown behind a mask; not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text(TEXT)
    gda.convert(save_llama(folder / "llama"), folder / "gda", verify=False)
    gda.grow(folder / "gda", folder / "grown", signal=2, depth=3, verify=False)
    gda.grow(folder / "gda", folder / "masked", masked=True, signal=2, mlp=1.5, depth=3, verify=False)
    return folder


def train(models: Path, name: str, out: Path, **options: Any) -> Any:
    return gda.train(models / name, out, **({"data": models / "text.txt"} | FAST | options))


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def loss_of(folder: Path) -> float:
    """Of the text, by the checkpoint as it is on disk."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(byte_tokenizer()(TEXT).input_ids[:1024]).view(-1, 32)
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


# --------------------------------------------------------------------------------------------------------- all of it


def test_the_loss_falls_and_out_is_a_model(models: Path, tmp_path: Path) -> None:
    """By the report and by the checkpoint; OUT holds what the source does, config and λ's dtype as they were."""
    report = train(models, "gda", tmp_path / "out", steps=20)
    assert report.steps == 20
    assert report.tokens == 20 * 4 * 32
    assert report.last_loss < report.first_loss - 0.2
    assert loss_of(tmp_path / "out") < loss_of(models / "gda") - 0.2
    assert report.num_trained == report.num_parameters == sum(t.numel() for t in tensors_of(tmp_path / "out").values())
    assert differing(tensors_of(models / "gda"), tensors_of(tmp_path / "out")) == set(tensors_of(models / "gda"))

    of_conversion = {"README.md", "conversion.json", "model.safetensors"}
    before, after = files_of(models / "gda"), files_of(tmp_path / "out")
    assert after.keys() == before.keys() - of_conversion | {"model.safetensors"}
    assert {name for name in after if after[name] != before[name]} == {"model.safetensors"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the").input_ids
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_seed_makes_the_same_bytes(models: Path, tmp_path: Path) -> None:
    """And another one others."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(models, "gda", tmp_path / name, seed=seed)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert differing(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "c"))


def test_once_through_the_data_by_default(models: Path, tmp_path: Path) -> None:
    """Every window is read once, the last batch being what is left; tokens that fill no window are not read."""
    ids = byte_tokenizer()(TEXT).input_ids
    report = train(models, "gda", tmp_path / "out", steps=None, batch_size=7, context=None)
    windows = len(ids) // 128  # what the model was made for
    assert report.steps == math.ceil(windows / 7)
    assert report.tokens == report.data_tokens == windows * 128 <= len(ids)


def test_rows_of_jsonl(models: Path, tmp_path: Path) -> None:
    """They are text with blank lines between them."""
    rows = TEXT.split(". ")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    (tmp_path / "rows.txt").write_text("\n\n".join(rows))
    for kind in ("jsonl", "txt"):
        train(models, "gda", tmp_path / kind, data=tmp_path / f"rows.{kind}")
    assert files_of(tmp_path / "jsonl") == files_of(tmp_path / "txt")


def test_bfloat16(models: Path, tmp_path: Path) -> None:
    """Dtypes stay, λ in float32; steps far below bfloat16's resolution add up, since weights are wide on the way."""
    gda.convert(models / "llama", tmp_path / "gda", dtype="bfloat16", verify=False)
    train(tmp_path, "gda", tmp_path / "out", data=models / "text.txt", steps=20, learning_rate=1e-3)
    before, after = tensors_of(tmp_path / "gda"), tensors_of(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in before.items()} == {name: t.dtype for name, t in after.items()}
    assert {tensor.dtype for name, tensor in after.items() if "lambda" in name} == {torch.float32}
    assert before["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert loss_of(tmp_path / "out") < loss_of(tmp_path / "gda")
    # A step of at most 1e-3 is less than half of the last bit of these, and they moved all the same.
    large = before["model.norm.weight"] >= 0.5
    assert bool((before["model.norm.weight"] != after["model.norm.weight"])[large].any())


def test_without_the_code(models: Path, tmp_path: Path, command: Command) -> None:
    """--no-bundle-code: no Python file, no auto_map, the same weights."""
    assert command("train", models / "gda", tmp_path / "with", "--data", models / "text.txt", *OPTIONS).code == 0
    train(models, "gda", tmp_path / "without", bundle_code=False)
    assert list((tmp_path / "with").glob("*.py"))
    assert list((tmp_path / "without").glob("*.py")) == []
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    assert differing(tensors_of(tmp_path / "with"), tensors_of(tmp_path / "without")) == set()


# ------------------------------------------------------------------------------------------------------- only the new


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_what_is_new_learns(dtype: str, models: Path, tmp_path: Path) -> None:
    """Old weights stay bit for bit, also beside new ones in one parameter; something of every new weight moves."""
    gda.grow(models / "gda", tmp_path / "grown", signal=2, depth=3, dtype=dtype, verify=False)
    report = train(tmp_path, "grown", tmp_path / "out", data=models / "text.txt", only_new=True)
    before, after = tensors_of(tmp_path / "grown"), tensors_of(tmp_path / "out")
    trainable = Trainable.read(tmp_path / "grown")
    count, in_part = 0, 0
    for name, tensor in before.items():
        new = trainable.new_entries(name, tensor)
        if new is None:
            assert torch.equal(tensor, after[name]), name
            continue
        count, in_part = count + int(new.sum()), in_part + (not bool(new.all()))
        assert torch.equal(tensor[~new], after[name][~new]), name
        assert bool((tensor != after[name])[new].any()), name
    assert in_part >= 4  # q_proj and o_proj of two old layers
    assert report.num_trained == count < report.num_parameters
    assert (tmp_path / "out" / "trainable.json").read_bytes() == (tmp_path / "grown" / "trainable.json").read_bytes()


def test_only_new_goes_on_from_its_result(models: Path, tmp_path: Path) -> None:
    """trainable.json is in OUT too: what is old stays in a second run."""
    train(models, "grown", tmp_path / "first", only_new=True)
    train(tmp_path, "first", tmp_path / "second", data=models / "text.txt", only_new=True)
    before, after = tensors_of(models / "grown"), tensors_of(tmp_path / "second")
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert differing(tensors_of(tmp_path / "first"), after)


@pytest.mark.parametrize("only_new", [True, False])
def test_masked_growth_ends_without_masks(only_new: bool, models: Path, tmp_path: Path, command: Command) -> None:
    """The mask rises over the steps by itself, which is said; a plain model computes what OUT computes."""
    assert json.loads((models / "masked" / "config.json").read_text())["growth_mask"] == 0
    outcome = command(
        *("train", models / "masked", tmp_path / "out", "--data", models / "text.txt", *OPTIONS),
        *["--only-new"] * only_new,
    )
    assert outcome.code == 0, outcome
    assert "growth mask rose from 0 to 1 over 4 steps" in outcome.out
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [written[name] for name in GROWTH_FIELDS] == [None] * len(GROWTH_FIELDS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not [name for name, _ in model.named_modules() if "growth_mask" in name]
    before, after = tensors_of(models / "masked"), tensors_of(tmp_path / "out")
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"]) == only_new


# -------------------------------------------------------------------------------------------------------- the command


def test_what_the_command_tells(models: Path, tmp_path: Path, command: Command) -> None:
    """Steps, tokens, losses, parameters; no bar and no losses where there is no terminal; JSON is the report."""
    arguments = ("--data", models / "text.txt", *OPTIONS, "--only-new")
    outcome = command("train", models / "grown", tmp_path / "out", *arguments)
    told = command("train", models / "grown", tmp_path / "out", *arguments, "--json", "--overwrite")
    assert (outcome.code, outcome.error) == (told.code, told.error) == (0, "")
    report = json.loads(told.out)
    expected = train(models, "grown", tmp_path / "again", only_new=True).to_dict()
    assert report == expected | {"out": str(tmp_path / "out")}
    assert f"loss {report['first_loss']:.4f} at first, {report['last_loss']:.4f} at last" in outcome.out
    assert f"{report['num_trained']:,} of {report['num_parameters']:,} parameters trained" in outcome.out
    assert len(outcome.out.splitlines()) == 2


BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "steps": (("--steps", 0), "--steps 0 is below 1"),
    "batch size": (("--batch-size", 0), "--batch-size 0 is below 1"),
    "context 1": (("--context", 1), "--context 1 is below 2"),
    "context": (("--context", 129), "max_position_embeddings"),
    "learning rate": (("--learning-rate", "nan"), "--learning-rate nan"),
    "no learning rate": (("--learning-rate", 0), "--learning-rate 0"),
    "seed": (("--seed", -1), "--seed -1"),
    "no trainable.json": (("--only-new",), "trainable.json is missing"),
}


@pytest.mark.parametrize(("options", "said"), BAD.values(), ids=BAD)
def test_bad_options(options: tuple[object, ...], said: str, models: Path, tmp_path: Path, command: Command) -> None:
    """One line, exit 2, no OUT."""
    refused(command("train", models / "gda", tmp_path / "out", "--data", models / "text.txt", *options), said, tmp_path)


def refused(outcome: Any, said: str, parent: Path, code: int = 2) -> None:
    assert outcome.code == code, outcome
    assert len(outcome.error.splitlines()) == 1, outcome.error
    assert said in outcome.error
    assert outcome.out == ""
    assert not [path for path in parent.iterdir() if "out" in path.name]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "--data"),
        ("short.txt", b"the end", "less than a window of 32"),
        ("empty.txt", b"", "0 tokens"),
        ("binary.txt", b"\xff\xfe\xfa", "UTF-8"),
        ("rows.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("rows.jsonl", b"text", "line 1 is not JSON"),
    ],
)
def test_bad_data(name: str, content: bytes | None, said: str, models: Path, tmp_path: Path, command: Command) -> None:
    """The file is named, and the line where there is one."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    outcome = command("train", models / "gda", tmp_path / "out", "--data", tmp_path / name, *OPTIONS)
    refused(outcome, said, tmp_path)
    assert name in outcome.error


def test_bad_models_and_places(models: Path, tmp_path: Path, command: Command) -> None:
    """No folder, a Llama, no tokenizer, a tensor missing, weights in the way."""

    def run(model: Path, out: Path = tmp_path / "out", data: Path = models / "text.txt") -> Any:
        return command("train", model, out, "--data", data, *OPTIONS)

    refused(run(tmp_path / "none"), "is not a folder", tmp_path)
    refused(run(models / "llama"), "gda convert", tmp_path)
    refused(run(models / "gda", models / "gda" / "inner"), "choose another place", tmp_path)
    refused(run(models / "gda", tmp_path), "exists", tmp_path)
    gda.convert(save_llama(tmp_path / "bare", tokenizer=False), tmp_path / "bare-gda", verify=False)
    refused(run(tmp_path / "bare-gda"), "no tokenizer", tmp_path)

    broken = tmp_path / "broken"
    gda.convert(models / "llama", broken, verify=False)
    tensors = load_file(broken / "model.safetensors")
    last = tensors.pop("model.norm.weight")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused(run(broken), "missing keys: model.norm.weight", tmp_path)
    save_file(tensors | {"model.norm.weight": last * math.nan}, broken / "model.safetensors", metadata={"format": "pt"})
    refused(run(broken), "the loss was nan by step 1", tmp_path, code=1)
    change_config(broken, vocab_size="many")
    refused(run(broken), "is not a valid configuration", tmp_path)


def test_a_learning_rate_that_is_far_too_high(models: Path, tmp_path: Path, command: Command) -> None:
    """The loss is finite at first, and then is not: exit 1, no OUT."""
    arguments = ("--data", models / "text.txt", "--steps", 8, "--context", 32, "--learning-rate", 1e38)
    refused(command("train", models / "gda", tmp_path / "out", *arguments), "lower --learning-rate", tmp_path, code=1)


def test_interrupted(models: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 130, no OUT; what --overwrite would have replaced is still there."""
    step = Trainer.training_step

    def interrupted(self: Trainer, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    arguments = ("train", models / "gda", tmp_path / "place", "--data", models / "text.txt", *OPTIONS)
    refused(command(*arguments), "interrupted", tmp_path, code=130)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "mine").write_text("mine")
    assert command(*arguments, "--overwrite").code == 130
    assert list(tmp_path.iterdir()) == [tmp_path / "place"]
    assert (tmp_path / "place" / "mine").read_text() == "mine"


def test_no_memory(models: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU that is too small makes torch raise becomes one line with the remedy."""

    def raises(self: Trainer, *args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr(Trainer, "training_step", raises)
    outcome = command("train", models / "gda", tmp_path / "out", "--data", models / "text.txt", *OPTIONS)
    refused(outcome, "lower --batch-size or --context", tmp_path)
