"""`gda train`: the loss falls, frozen weights do not change, runs resume, and bad input is reported in one line."""

import dataclasses
import errno
import json
import math
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from huggingface_hub import ModelCard
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import gda
from gda.common.errors import Interrupted
from gda.common.options import flag
from gda.common.trainable import Trainable
from gda.configuration.configuration_gda import MASKED
from gda.conversion.writing.provenance import history_of
from gda.training.callbacks.checkpoints import CheckpointCallback
from gda.training.plan import eval_batch_size
from gda.training.report import TrainReport
from gda.training.runs import run_folder
from gda.training.runs.model_folder import model_stamps
from gda.training.runs.processes import Processes
from gda.training.settings import TrainOptions, TrainSettings

from ..support.children import ENDED, in_child, killed_at
from ..support.commands import Command, Outcome
from ..support.hub_server import Hub
from ..support.llamas import byte_tokenizer, change_config, files_of, save_llama, tensors_of
from ..support.training import save_inputs, sentences

pytestmark = pytest.mark.slow

TEXT = sentences(60)
FAST: dict[str, Any] = {"steps": 4, "batch_size": 4, "context": 32, "learning_rate": 1e-2, "save_every": 4}
OPTIONS = ("--steps", 4, "--batch-size", 4, "--context", 32, "--learning-rate", 1e-2, "--save-every", 4)
OF_TRAINING = {"README.md", "training.json", "training_log.jsonl"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a GDA model, one grown by copies and one in masked growth. Tests must not change it."""
    folder = tmp_path_factory.mktemp("models")
    save_inputs(folder, 60)
    gda.grow(folder / "gda", folder / "grown", signal=2, depth=3, verify=False)
    gda.grow(folder / "gda", folder / "masked", masked=True, signal=2, mlp=1.5, depth=3, verify=False)
    return folder


def train(models: Path, name: str, out: Path, **options: Any) -> Any:
    return gda.train(models / name, out, **({"data": models / "text.txt"} | FAST | options))


def without_progress(outcome: Outcome) -> list[str]:
    """The lines on standard error, except those of the log."""
    return [line for line in outcome.error.splitlines() if not line.startswith("step ")]


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def loss_of(folder: Path) -> float:
    """The loss of the model on disk on the text, in sequences of 32 tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(byte_tokenizer()(TEXT).input_ids)
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


# ------------------------------------------------------------------------------------------------------------ all of it


def test_eval_tokens_limits_what_is_measured(models: Path, tmp_path: Path) -> None:
    """The sequences are spread over the text, and a note says how many are measured."""
    report = train(models, "gda", tmp_path / "out", eval_data=models / "text.txt", eval_tokens=100)
    ids = torch.tensor(byte_tokenizer()(TEXT).input_ids)
    sequences = ids[: len(ids) // 32 * 32].view(-1, 32)
    (note,) = (note for note in report.notes if "--eval-tokens" in note)
    assert note.startswith(f"--eval-data: 3 of {len(sequences)} sequences are measured")
    measured = sequences[[index * len(sequences) // 3 for index in range(3)]]
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(models / "gda").eval()(measured, labels=measured).loss
    assert report.first_eval_loss == pytest.approx(float(loss), rel=1e-4)


def test_batches_of_an_evaluation_are_full() -> None:
    """With several processes."""
    found = [eval_batch_size(8, count, processes=2) for count in (12, 64, 13, 3, 0)]
    assert found == [6, 8, 1, 3, 8]
    assert eval_batch_size(8, 13, processes=1) == 8


def test_data_of_a_killed_process_is_used_again(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was tokenized before the first checkpoint."""
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        assert in_child(lambda: short(models, "gda", tmp_path / "out")) == -signal.SIGKILL
    (data,) = (tmp_path / ".out.partial" / "data").glob("*.arrow")
    inode = data.stat().st_ino
    inodes = []
    with monkeypatch.context() as patch:
        train_it = Trainer.train
        patch.setattr(Trainer, "train", lambda *a, **k: inodes.append(data.stat().st_ino) or train_it(*a, **k))
        short(models, "gda", tmp_path / "out", resume=True)
    assert inodes == [inode]


def test_data_of_a_failed_run_is_used_again(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If tokenizing took long; the error says so."""
    monkeypatch.setattr(run_folder, "WORTH_KEEPING", 0)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", fail)
        with pytest.raises(OSError, match=r"there is no checkpoint; .*\.out\.partial is kept"):
            short(models, "gda", tmp_path / "out")
    (data,) = (tmp_path / ".out.partial" / "data").glob("*.arrow")
    inode = data.stat().st_ino
    inodes = []
    train_it = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda *a, **k: inodes.append(data.stat().st_ino) or train_it(*a, **k))
    short(models, "gda", tmp_path / "out")
    assert inodes == [inode]


def test_weights_wider_than_the_config_says(models: Path, tmp_path: Path) -> None:
    """They are read and written in their own dtype: config.json only names one for a new model."""
    folder = shutil.copytree(models / "gda", tmp_path / "gda")
    change_config(folder, dtype="bfloat16", torch_dtype="bfloat16")
    short(tmp_path, "gda", tmp_path / "out", data=models / "text.txt", learning_rate=1e-30)
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_mixed_precision_that_is_not_supported(
    models: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    outcome = command("train", models / "gda", tmp_path / "out", "--data", models / "text.txt", *OPTIONS)
    refused(
        outcome,
        "--mixed_precision fp16 is not supported; launch with no or bf16, or pass --precision",
        tmp_path,
    )


def test_rate_of_lambda_without_one_that_is_trained(models: Path, tmp_path: Path, command: Command) -> None:
    gda.grow(models / "gda", tmp_path / "grown", mlp=2, verify=False)
    options = ("--train", "new", "--lambda-learning-rate", 0.1, *OPTIONS)
    outcome = command("train", tmp_path / "grown", tmp_path / "out", "--data", models / "text.txt", *options)
    refused(outcome, "--lambda-learning-rate 0.1 has no effect: no λ is trained", tmp_path)


def test_plot_alone_takes_no_options_of_a_training(models: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("train", models / "gda", "--plot", "--steps", 3)
    refused(outcome, "--steps has no effect without OUT", tmp_path)


def test_card_has_the_whole_history(models: Path, tmp_path: Path) -> None:
    """Conversion, training and growth, in this order, with numbers; licence and base model stay in the metadata."""
    shutil.copytree(models / "llama", tmp_path / "llama")
    (tmp_path / "llama" / "README.md").write_text("---\nlicense: mit\nbase_model: me/first\n---\n")
    gda.convert(tmp_path / "llama", tmp_path / "gda")
    report = gda.train(tmp_path / "gda", tmp_path / "trained", data=models / "text.txt", **FAST)
    card = ModelCard.load(tmp_path / "trained" / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "me/first")
    losses = f"training loss {report.first_loss:.4f} before, {report.last_loss:.4f} after"
    trained = (
        f"Trained from gda (`--train all`) for 4 steps on 512 tokens, any padding included, of text.txt; {losses}."
    )
    assert re.search(r"1\. `expand` of llama; largest difference of a logit \d\.\de[+-]\d\d, relative to", card.text)
    assert f"2. {trained}\n\n## Use" in card.text
    gda.grow(tmp_path / "trained", tmp_path / "grown", depth=3)
    steps = json.loads((tmp_path / "grown" / "conversion.json").read_text())["history"]
    assert steps[1] == trained
    assert steps[2].startswith("`grow` (depth 3) of trained; largest difference")
    assert "3. `grow`" in (tmp_path / "grown" / "README.md").read_text()


def test_checkpoint_has_the_history_too(
    models: Path, tmp_path: Path, interrupt: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is trained from it keeps the licence, the base model and the steps before."""
    shutil.copytree(models / "gda", tmp_path / "gda")
    (tmp_path / "gda" / "README.md").write_text("---\nlicense: mit\nbase_model: me/first\n---\n")
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        gda.train(tmp_path / "gda", tmp_path / "first", data=models / "text.txt", **SHORT)
    monkeypatch.undo()
    checkpoint = tmp_path / ".first.partial" / "checkpoint-3"
    (checkpoint / "README.md").write_text((checkpoint / "README.md").read_text() + "Edited.\n")
    gda.train(checkpoint, tmp_path / "second", data=models / "text.txt", **FAST)
    card = ModelCard.load(tmp_path / "second" / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "me/first")
    *_, before, last = history_of(tmp_path / "second")
    assert before == "Trained (`--train all`) for 3 steps so far on text.txt."
    assert last.startswith("Trained from checkpoint-3 ")
    again = gda.train(tmp_path / "gda", tmp_path / "first", data=models / "text.txt", resume=True, **SHORT)
    assert again.resumed_from == 3  # an edited card is no damage


@pytest.mark.parametrize("has_code", [True, False])
def test_pushed_card_says_whether_there_is_code(has_code: bool, models: Path, tmp_path: Path, hub: Hub) -> None:
    """Whatever the folder has."""
    gda.train(models / "gda", tmp_path / "out", data=models / "text.txt", bundle_code=not has_code, **FAST)
    gda.push(tmp_path / "out", "me/trained", bundle_code=has_code)
    held = hub.files("me/trained")
    assert ("modeling_gda.py" in held) == has_code == (b"trust_remote_code" in held["README.md"])


def test_pushed_model_keeps_its_history(models: Path, tmp_path: Path, hub: Hub) -> None:
    """A model that was trained, pushed and pulled knows all its steps; paths of this machine stay here."""
    gda.convert(models / "llama", tmp_path / "gda")
    gda.train(tmp_path / "gda", tmp_path / "trained", data=models / "text.txt", **FAST)
    steps = history_of(tmp_path / "trained")
    assert len(steps) == 2
    gda.push(tmp_path / "trained", "me/trained")
    assert json.loads(hub.files("me/trained")["training.json"]) == {"history": steps}
    gda.grow("me/trained", tmp_path / "grown", depth=3)
    assert history_of(tmp_path / "grown")[:-1] == steps


def test_written_files_follow_the_umask(models: Path, tmp_path: Path) -> None:
    """The weights are as readable as the config."""
    train(models, "gda", tmp_path / "out", steps=1, save_every=1)
    mode = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert mode["model.safetensors"] == mode["config.json"]


def test_loss_falls_and_out_is_a_model(models: Path, tmp_path: Path) -> None:
    """In the report and for the saved model. OUT has the files of the source, and the same config."""
    report = train(models, "gda", tmp_path / "out", steps=20, save_every=20)
    assert report.steps == 20
    assert report.tokens == 20 * 4 * 32
    assert report.last_loss < report.first_loss - 0.2
    assert loss_of(tmp_path / "out") < loss_of(models / "gda") - 0.2
    assert report.num_trained == report.num_parameters == sum(t.numel() for t in tensors_of(tmp_path / "out").values())
    assert differing(tensors_of(models / "gda"), tensors_of(tmp_path / "out")) == set(tensors_of(models / "gda"))

    of_conversion = {"README.md", "conversion.json", "model.safetensors"}
    before, after = files_of(models / "gda"), files_of(tmp_path / "out")
    assert after.keys() == before.keys() - of_conversion | {"model.safetensors"} | OF_TRAINING
    assert {name for name in after if after[name] != before.get(name)} == {"model.safetensors"} | OF_TRAINING
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the").input_ids
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_seed_determines_the_bytes(models: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(models, "gda", tmp_path / name, seed=seed)
    a, b = (
        {name: held for name, held in files_of(tmp_path / each).items() if name not in OF_TRAINING} for each in "ab"
    )
    assert a == b
    assert differing(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "c"))


def test_one_epoch_by_default(models: Path, tmp_path: Path) -> None:
    """Every sequence is read once, the last batch may be smaller, and tokens that do not fill a sequence are not
    read.
    """
    ids = byte_tokenizer()(TEXT).input_ids
    report = train(models, "gda", tmp_path / "out", steps=None, batch_size=7, context=None)
    sequences = len(ids) // 128  # the model's max_position_embeddings
    assert report.steps == math.ceil(sequences / 7)
    assert report.tokens == report.data_tokens == sequences * 128 <= len(ids)


@pytest.mark.slow
def test_bfloat16(models: Path, tmp_path: Path) -> None:
    """Data types are kept, with λ in float32. Steps below bfloat16's resolution add up in float32."""
    gda.convert(models / "llama", tmp_path / "gda", dtype="bfloat16", verify=False)
    train(tmp_path, "gda", tmp_path / "out", data=models / "text.txt", steps=20, learning_rate=1e-3)
    before, after = tensors_of(tmp_path / "gda"), tensors_of(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in before.items()} == {name: t.dtype for name, t in after.items()}
    assert {tensor.dtype for name, tensor in after.items() if "lambda" in name} == {torch.float32}
    assert before["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert loss_of(tmp_path / "out") < loss_of(tmp_path / "gda")
    # A step of at most 1e-3 is less than half of the last bit of these weights, and they changed nevertheless.
    large = before["model.norm.weight"] >= 0.5
    assert bool((before["model.norm.weight"] != after["model.norm.weight"])[large].any())


@pytest.mark.slow
def test_no_bundle_code(models: Path, tmp_path: Path, command: Command) -> None:
    """No Python file, no auto_map, and the same weights."""
    assert command("train", models / "gda", tmp_path / "with", "--data", models / "text.txt", *OPTIONS).code == 0
    train(models, "gda", tmp_path / "without", bundle_code=False)
    assert list((tmp_path / "with").glob("*.py"))
    assert list((tmp_path / "without").glob("*.py")) == []
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    assert differing(tensors_of(tmp_path / "with"), tensors_of(tmp_path / "without")) == set()


# --------------------------------------------------------------------------------------------------------- only the new


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_new(dtype: str, models: Path, tmp_path: Path) -> None:
    """Old weights keep every bit, also beside new ones in one parameter; every new parameter changes."""
    gda.grow(models / "gda", tmp_path / "grown", signal=2, depth=3, dtype=dtype, verify=False)
    report = train(tmp_path, "grown", tmp_path / "out", data=models / "text.txt", train="new")
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


def test_train_new_continues_from_its_result(models: Path, tmp_path: Path) -> None:
    """trainable.json is in OUT too, so a second run freezes the same weights."""
    train(models, "grown", tmp_path / "first", train="new")
    train(tmp_path, "first", tmp_path / "second", data=models / "text.txt", train="new")
    before, after = tensors_of(models / "grown"), tensors_of(tmp_path / "second")
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert differing(tensors_of(tmp_path / "first"), after)


@pytest.mark.parametrize("learner", ["new", "all"])
def test_masked_growth_ends_as_an_ordinary_model(learner: str, models: Path, tmp_path: Path, command: Command) -> None:
    """The fade rises to 1 over the steps, as a note says."""
    assert json.loads((models / "masked" / "config.json").read_text())["fade"] == 0
    outcome = command(
        *("train", models / "masked", tmp_path / "out", "--data", models / "text.txt", *OPTIONS),
        *("--train", learner),
    )
    assert outcome.code == 0, outcome
    assert "fade of the model rises from 0 to 1 over 4 steps" in outcome.out
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"fade", *MASKED} & written.keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not [name for name, _ in model.named_modules() if "fade" in name]
    before, after = tensors_of(models / "masked"), tensors_of(tmp_path / "out")
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"]) == (learner == "new")


@pytest.mark.parametrize("learner", ["attention", "lora"])
def test_new_parts_that_would_stay_random(learner: str, models: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("train", models / "masked", tmp_path / "out", "--data", models / "text.txt", "--train", learner)
    refused(outcome, f"--train {learner} would not train new parts that fade in (masked_", tmp_path)


# ---------------------------------------------------------------------------------------------------------- the command


def test_output_of_the_command(models: Path, tmp_path: Path, command: Command) -> None:
    """Steps, tokens, losses and parameters; lines instead of a bar without a terminal; --json prints the report."""
    arguments = ("--data", models / "text.txt", *OPTIONS, "--train", "new")
    outcome = command("train", models / "grown", tmp_path / "out", *arguments)
    output = command("train", models / "grown", tmp_path / "out", *arguments, "--json", "--overwrite")
    assert outcome.code == output.code == 0
    assert without_progress(outcome) == without_progress(output) == []
    assert outcome.error.startswith("step 1 of 4: loss ")
    report = json.loads(output.out)
    expected = train(models, "grown", tmp_path / "again", train="new").to_dict()
    measured = {name: report[name] for name in ("tokens_per_second", "peak_memory")}
    assert report == expected | measured | {"out": str(tmp_path / "out")}
    assert all(value > 0 for value in measured.values())
    assert json.loads((tmp_path / "out" / "training.json").read_text())["report"].items() <= report.items()
    assert f"first loss {report['first_loss']:.4f}, last loss {report['last_loss']:.4f}" in outcome.out
    assert f"{report['num_trained']:,} of {report['num_parameters']:,} parameters trained" in outcome.out
    assert "tokens per second, at most" in outcome.out
    assert len([line for line in outcome.out.splitlines() if not line.startswith("note: ")]) == 3


BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "steps": (("--steps", 0), "--steps 0 is below 1"),
    "batch size": (("--batch-size", 0), "--batch-size 0 is below 1"),
    "context 1": (("--context", 1), "--context 1 is below 2"),
    "context": (("--context", 129), "max_position_embeddings"),
    "learning rate": (("--learning-rate", "nan"), "--learning-rate nan"),
    "no learning rate": (("--learning-rate", 0), "--learning-rate 0"),
    "seed": (("--seed", -1), "--seed -1"),
    "temperature of nobody": (("--temperature", 2), "--temperature 2.0 has no effect without --teacher"),
    "rank of nothing": (("--lora-rank", 4), "--lora-rank 4 has no effect without --train lora"),
    "two lengths": (("--epochs", 2, "--steps", 3), "--epochs 2.0 and --steps 3 both set the length"),
    "empty data": (("--data", ""), "--data is empty"),
    "empty eval data": (("--eval-data", ""), "--eval-data is empty"),
    "no reporter": (("--report-to", "json"), "--report-to 'json' is not a reporter"),
    "a reporter's module": (("--report-to", "a.b"), "--report-to a.b is not installed"),
}


@pytest.mark.parametrize(("options", "text"), BAD.values(), ids=BAD)
def test_bad_options(options: tuple[object, ...], text: str, models: Path, tmp_path: Path, command: Command) -> None:
    """One line, exit code 2, and no OUT."""
    refused(command("train", models / "gda", tmp_path / "out", "--data", models / "text.txt", *options), text, tmp_path)


def refused(outcome: Any, text: str, parent: Path, code: int = 2) -> None:
    assert outcome.code == code, outcome
    assert len(outcome.error.splitlines()) == 1, outcome.error
    assert text in outcome.error
    assert outcome.out == ""
    assert not [path for path in parent.iterdir() if "out" in path.name]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("none.txt", None, "--data"),
        ("short.txt", b"the end", "fewer than one sequence of 32"),
        ("empty.txt", b"", "empty.txt"),
        ("binary.txt", b"\xff\xfe\xfa", "UTF-8"),
        ("rows.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("rows.jsonl", b"text", "line 1 is not JSON"),
    ],
)
def test_bad_data(name: str, content: bytes | None, text: str, models: Path, tmp_path: Path, command: Command) -> None:
    """The error names the file, and the line where there is one."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    outcome = command("train", models / "gda", tmp_path / "out", "--data", tmp_path / name, *OPTIONS)
    refused(outcome, text, tmp_path)
    assert name in outcome.error


def test_bad_models_and_places(models: Path, tmp_path: Path, command: Command) -> None:
    """A missing folder, a Llama, no tokenizer, a missing tensor, an existing OUT."""

    def run(model: Path, out: Path = tmp_path / "out", data: Path = models / "text.txt") -> Any:
        return command("train", model, out, "--data", data, *OPTIONS)

    refused(run(tmp_path / "none"), "does not exist", tmp_path)
    refused(run(models / "llama"), "gda convert", tmp_path)
    refused(run(models / "gda", models / "gda" / "inner"), "choose another folder", tmp_path)
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
    refused(run(broken), "the loss was nan at step 1: there is no checkpoint", tmp_path, code=1)
    change_config(broken, vocab_size="many")
    refused(run(broken), "is not a valid configuration", tmp_path)


def test_train_new_without_trainable_json(models: Path, tmp_path: Path, command: Command) -> None:
    gda.convert(models / "llama", tmp_path / "bare", verify=False)
    (tmp_path / "bare" / "trainable.json").unlink()
    arguments = ("train", tmp_path / "bare", tmp_path / "out", "--data", models / "text.txt", *OPTIONS)
    refused(command(*arguments, "--train", "new"), "trainable.json is missing", tmp_path)


def test_fading_continues(models: Path, tmp_path: Path) -> None:
    """A partly faded model becomes an ordinary one without further options, and a note says so."""
    on_the_way = tmp_path / "on-the-way"
    shutil.copytree(models / "gda", on_the_way)
    change_config(on_the_way, fade=0.5, lambda_target=0.2)
    report = train(tmp_path, "on-the-way", tmp_path / "out", data=models / "text.txt")
    assert any("fade of the model rises from 0.5" in note for note in report.notes)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"fade", "lambda_target"} & written.keys()


def test_other_lambda_target_is_refused(models: Path, tmp_path: Path, command: Command) -> None:
    """The error names the option, with --dry-run too."""
    shutil.copytree(models / "gda", tmp_path / "on-the-way")
    change_config(tmp_path / "on-the-way", fade=0.5, lambda_target=0.2)
    arguments = ("train", tmp_path / "on-the-way", tmp_path / "out", "--data", models / "text.txt", *OPTIONS)
    options = ("--fade-steps", 4, "--lambda-target")
    for more in ((), ("--dry-run",)):
        refused(command(*arguments, *options, 0.3, *more), "--lambda-target 0.3", tmp_path)
    assert command(*arguments, *options, 0.2, "--dry-run").code == 0


def test_models_are_checked_before_tokenizing(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizing can take hours."""
    monkeypatch.setattr("gda.training.plan.open_sequences", lambda *_, **__: pytest.fail("the data was read"))
    shutil.copytree(models / "gda", tmp_path / "gda")
    (tmp_path / "gda" / "conversion.json").write_text("{")
    with pytest.raises(ValueError, match=r"conversion\.json is not valid JSON"):
        train(tmp_path, "gda", tmp_path / "out", data=models / "text.txt")
    with pytest.raises(ValueError, match="--teacher"):
        train(models, "grown", tmp_path / "out", teacher=models / "llama", hidden_weight=0.1)


def test_paths_and_none_in_python(models: Path, tmp_path: Path) -> None:
    """A teacher may be a Path, and None means no value."""
    report = train(models, "gda", tmp_path / "out", steps=1, teacher=models / "llama", eval_data=None, report_to=None)
    assert report.first_eval_loss is None
    output = json.loads((tmp_path / "out" / "training.json").read_text())
    assert output["settings"]["teacher"] == str(models / "llama")


def test_dry_run_counts_what_a_run_reads(models: Path, tmp_path: Path) -> None:
    """Also if an epoch ends within a step, and the run within an epoch."""
    options = {"steps": None, "epochs": 1.5, "accumulation": 5}
    dry, run = (train(models, "gda", tmp_path / "out", dry_run=dry, **options) for dry in (True, False))
    assert (dry.steps, dry.tokens) == (run.steps, run.tokens)


def test_vocabulary_size_mismatch(models: Path, tmp_path: Path, command: Command) -> None:
    """Between config.json and the weights: the error names the tensor."""
    shutil.copytree(models / "gda", tmp_path / "gda")
    change_config(tmp_path / "gda", vocab_size=250)
    outcome = command("train", tmp_path / "gda", tmp_path / "out", "--data", models / "text.txt", *OPTIONS)
    refused(outcome, "do not match, mismatched keys: ", tmp_path)
    assert "weight" in outcome.error


def test_lora_gives_no_warnings(models: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """No FutureWarnings from PEFT either."""
    train(models, "gda", tmp_path / "out", steps=1, train="lora", lora_rank=2)
    assert [str(each.message) for each in recwarn if each.category is FutureWarning] == []


def test_report_is_valid_json(tmp_path: Path) -> None:
    """Without NaN and Infinity."""
    report = TrainReport(
        tmp_path, 1, 2, None, 3, 3, first_loss=math.inf, first_eval_loss=800.0, last_eval_loss=math.nan
    )
    output = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [output[name] for name in ("first_loss", "first_perplexity", "last_eval_loss", "last_perplexity")] == [
        None
    ] * 4
    assert output["first_eval_loss"] == 800.0


def test_learning_rate_that_is_too_high(models: Path, tmp_path: Path, command: Command) -> None:
    """The loss becomes infinite or NaN: exit code 1 and no OUT."""
    arguments = ("--data", models / "text.txt", "--steps", 8, "--context", 32, "--learning-rate", 1e38)
    refused(command("train", models / "gda", tmp_path / "out", *arguments), "lower --learning-rate", tmp_path, code=1)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: more"),
    ],
    ids=["GPU", "CPU"],
)
def test_out_of_memory(
    error: Exception, models: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's error becomes one line with the remedy."""

    def raises(self: Trainer, *args: Any, **kwargs: Any) -> Tensor:
        raise error

    monkeypatch.setattr(Trainer, "training_step", raises)
    outcome = command("train", models / "gda", tmp_path / "out", "--data", models / "text.txt", *OPTIONS)
    refused(outcome, "lower --batch-size or --context", tmp_path)


# -------------------------------------------------------------------------------------------------- stopped and resumed

# Six steps of two sequences, a checkpoint after the second and the fourth.
SHORT: dict[str, Any] = {"steps": 6, "batch_size": 2, "context": 16, "learning_rate": 1e-2, "save_every": 2}
# By name: the model, and options that differ.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("gda", {}),
    "epochs": ("gda", {"steps": None, "epochs": 3.0, "batch_size": 100}),
    "accumulation": ("gda", {"accumulation": 3}),
    "measured": ("gda", {"eval_data": "text.txt", "eval_every": 1}),
    "growth mask": ("masked", {}),
    "only new": ("grown", {"train": "new"}),
    "lora": ("gda", {"train": "lora", "lora_rank": 2}),
    "annealed": ("gda", {"lambda_target": 0.3, "fade_steps": 5}),
    "wsd, λ's own rate": ("gda", {"schedule": "wsd", "warmup": 0.4, "lambda_learning_rate": 0.1, "weight_decay": 0.1}),
    "bfloat16": ("gda", {"precision": "bfloat16"}),
    "taught": ("gda", {"teacher": "llama", "hidden_weight": 0.1}),
}


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Raise a signal in the forward pass of a step, `times` times."""

    def at(step: int, times: int = 1, number: int = signal.SIGINT) -> None:
        original, left = Trainer.training_step, times

        def interrupted(self: Trainer, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal left
            while left and self.state.global_step == step - 1:
                left -= 1
                signal.raise_signal(number)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", interrupted)

    yield at
    monkeypatch.undo()


def short(models: Path, name: str, out: Path, **options: Any) -> Any:
    for option in ("eval_data", "teacher"):
        if option in options:
            options[option] = str(models / options[option])
    return train(models, name, out, **(SHORT | options))


def history(out: Path) -> list[dict[str, Any]]:
    """The log without time measurements."""
    lines = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "options"), RUNS.values(), ids=RUNS)
def test_resumed_run_equals_an_uninterrupted_one(
    model: str,
    options: dict[str, Any],
    models: Path,
    tmp_path: Path,
    interrupt: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Stopped after step 3, where no checkpoint was due: equal weights, log lines and report, and no warnings."""
    whole = short(models, model, tmp_path / "whole", **options)
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        short(models, model, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == [".out.partial"]
    monkeypatch.undo()
    recwarn.clear()
    report = short(models, model, tmp_path / "out", resume=True, **options)
    assert [str(each.message) for each in recwarn if each.category is FutureWarning] == []
    assert differing(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")) == set()
    assert history(tmp_path / "whole") == history(tmp_path / "out")
    assert report.resumed_from == 3
    measured = {name: getattr(report, name) for name in ("out", "resumed_from", "tokens_per_second", "peak_memory")}
    assert vars(report) == vars(whole) | measured
    assert sorted(files_of(tmp_path / "out")) == sorted(files_of(tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.slow
def test_resumed_run_reads_the_same_sequences(
    models: Path, tmp_path: Path, interrupt: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over three epochs, stopped in the second: no sequence is repeated or skipped."""
    original = Trainer.training_step

    def seen(out: Path, stop: int | None = None, **more: Any) -> list[list[list[int]]]:
        batches = []

        def watched(self: Trainer, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
            batches.append(inputs["input_ids"].tolist())
            if self.state.global_step == stop:
                signal.raise_signal(signal.SIGINT)
            return original(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", watched)
        try:
            short(models, "gda", out, steps=None, epochs=3.0, batch_size=50, **more)
        except KeyboardInterrupt:
            assert stop is not None
        return batches

    whole = seen(tmp_path / "whole")
    passes = len(whole) // 3
    assert passes >= 2
    assert sorted(chain(*whole[:passes])) == sorted(chain(*whole[passes : 2 * passes]))
    assert whole[:passes] != whole[passes : 2 * passes]
    assert seen(tmp_path / "out", stop=passes) + seen(tmp_path / "out", resume=True) == whole


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c(
    number: int,
    models: Path,
    tmp_path: Path,
    command: Command,
    interrupt: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 130 and one line that names --resume; --overwrite replaces OUT only when the run is finished."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    arguments = ("train", models / "gda", tmp_path / "out", "--data", models / "text.txt", *OPTIONS, "--overwrite")
    interrupt(2, number=number)
    outcome = command(*arguments)
    assert (outcome.code, outcome.out) == (130, "")
    assert without_progress(outcome) == ["gda: interrupted; run the same command with --resume to continue"]
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    monkeypatch.undo()
    resumed = command(*arguments, "--resume")
    assert resumed.code == 0
    assert "resumed from step 2" in resumed.out
    assert not (tmp_path / "out" / "mine").exists()


def test_second_ctrl_c_stops_at_once(models: Path, tmp_path: Path, interrupt: Callable[..., None]) -> None:
    """Without a checkpoint of that step; an earlier one is kept."""
    interrupt(4, times=2)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "out")
    assert [path.name for path in (tmp_path / ".out.partial").glob("checkpoint-*")] == ["checkpoint-2"]
    interrupt(1, times=2)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "none")
    assert os.listdir(tmp_path) == [".out.partial"]


def test_changed_teacher_is_refused(models: Path, tmp_path: Path, interrupt: Callable[..., None]) -> None:
    """It would lead to other weights."""
    shutil.copytree(models / "llama", tmp_path / "teacher")
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        train(models, "gda", tmp_path / "out", teacher=tmp_path / "teacher")
    os.utime(tmp_path / "teacher" / "model.safetensors", (1, 1))
    with pytest.raises(ValueError, match=r"model\.safetensors of the teacher was added, removed or changed"):
        train(models, "gda", tmp_path / "out", teacher=tmp_path / "teacher", resume=True)


def test_other_files_in_a_folder_of_data_may_change(
    models: Path, tmp_path: Path, interrupt: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not read: those of a file manager, notes, or another split."""
    (tmp_path / "data").mkdir()
    shutil.copyfile(models / "text.txt", tmp_path / "data" / "text.txt")
    (tmp_path / "data" / ".DS_Store").write_text("before")
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "out", data=tmp_path / "data")
    monkeypatch.undo()
    for name in (".DS_Store", "notes.md", "test.txt"):
        (tmp_path / "data" / name).write_text("afterwards")
    assert short(models, "gda", tmp_path / "out", data=tmp_path / "data", resume=True).resumed_from == 3


def test_model_on_the_hub_is_known_by_its_commit(
    models: Path, tmp_path: Path, hub: Hub, interrupt: Callable[..., None]
) -> None:
    """A run can be resumed on a machine that has to download it again, also after the model has changed there."""
    options: dict[str, Any] = {"data": models / "text.txt", **SHORT}
    commit = gda.push(models / "gda", "me/gda").commit
    for name in ("out", "other"):
        interrupt(3)
        with pytest.raises(KeyboardInterrupt):
            gda.train("me/gda", tmp_path / name, **options)
    shutil.rmtree(HF_HUB_CACHE)
    assert gda.train("me/gda", tmp_path / "out", resume=True, **options).resumed_from == 3
    gda.push(models / "grown", "me/gda")
    with pytest.raises(ValueError, match=f"was {commit}, and is now .*; pass the former as --revision"):
        gda.train("me/gda", tmp_path / "other", resume=True, **options)
    assert gda.train("me/gda", tmp_path / "other", resume=True, revision=commit, **options).resumed_from == 3


def test_teacher_in_a_folder_of_gguf_files(tmp_path: Path) -> None:
    """A resumed run requires the file unchanged."""
    (tmp_path / "teacher.gguf").write_bytes(b"GGUF")
    assert [name for name, *_ in model_stamps(tmp_path)] == ["teacher.gguf"]


@pytest.mark.slow
def test_killed_at_a_step(models: Path, tmp_path: Path, interrupt: Callable[..., None]) -> None:
    """After SIGKILL in step 4, the run resumes from step 2 and gives the weights of an uninterrupted one."""
    short(models, "gda", tmp_path / "whole")

    def killed() -> None:
        interrupt(4, number=signal.SIGKILL)
        short(models, "gda", tmp_path / "out")

    assert in_child(killed) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert short(models, "gda", tmp_path / "out", resume=True).resumed_from == 2
    assert differing(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")) == set()


@pytest.mark.slow
def test_killed_at_any_moment(models: Path, tmp_path: Path) -> None:
    """Killed between any two changes of the file system, a run never resumes from an incomplete checkpoint."""
    expected = short(models, "gda", tmp_path / "whole") and tensors_of(tmp_path / "whole")
    place, resumed = tmp_path / "place", set()
    for moment in range(1, 1000, 11):
        place.mkdir()
        if not killed_at(moment, place, lambda: short(models, "gda", place / "out")):
            break
        if not (place / "out").exists():
            report = short(models, "gda", place / "out", resume=True)
            resumed.add(report.resumed_from)
        assert differing(expected, tensors_of(place / "out")) == set(), moment
        assert os.listdir(place) == ["out"], moment
        for path in sorted(place.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        place.rmdir()
    assert resumed == {None, 2, 4}


def test_code_of_a_killed_process_is_not_kept(
    models: Path, tmp_path: Path, interrupt: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is resumed without --bundle-code, after its model was saved with code, but not marked as complete."""
    from gda.training import train as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "add_companions", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            short(models, "gda", tmp_path / "out")
    assert list((tmp_path / ".out.partial").glob("*.py"))
    short(models, "gda", tmp_path / "out", resume=True, bundle_code=False)
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.slow
def test_incomplete_checkpoints_are_not_used(
    models: Path, tmp_path: Path, interrupt: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """With a short or missing file, or without checkpoint.json, the previous one is used, and the damaged one is
    removed, which the log says.
    """
    partial = tmp_path / ".out.partial"
    interrupt(5, times=2)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "out", keep=2)
    with open(partial / "checkpoint-4" / "optimizer.pt", "r+b") as file:
        file.truncate(100)
    interrupt(5, times=2)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "out", keep=2, resume=True, save_every=2)
    assert caplog.messages == [f"{partial}/checkpoint-4/optimizer.pt is missing or cut, so its checkpoint is removed"]
    assert sorted(path.name for path in partial.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    (partial / "checkpoint-4" / "checkpoint.json").unlink()
    (partial / "checkpoint-2" / "model.safetensors").unlink()
    interrupt(1, times=2)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "out", keep=2, resume=True)
    assert os.listdir(tmp_path) == []


def test_damaged_file_is_named(models: Path, tmp_path: Path, interrupt: Callable[..., None]) -> None:
    """Before it is loaded, although its size is right."""
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "out")
    damaged = tmp_path / ".out.partial" / "checkpoint-3" / "optimizer.pt"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    kept = files_of(tmp_path)
    with pytest.raises(
        ValueError, match=r"checkpoint-3 is damaged \(optimizer\.pt is cut or was overwritten\); remove it to"
    ):
        short(models, "gda", tmp_path / "out", resume=True)
    assert files_of(tmp_path) == kept


def test_only_the_same_run_is_resumed(
    models: Path, tmp_path: Path, command: Command, interrupt: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the setting or file that differs; without --resume, an unfinished run is not overwritten."""
    (tmp_path / "text.txt").write_text(TEXT)
    gda.convert(models / "llama", tmp_path / "gda", verify=False)
    arguments = ("train", tmp_path / "gda", tmp_path / "out", "--data", tmp_path / "text.txt", *OPTIONS)
    interrupt(2)
    assert command(*arguments).code == 130
    monkeypatch.undo()
    kept = files_of(tmp_path / ".out.partial")

    def text(*more: object) -> str:
        outcome = command(*arguments, *more)
        assert outcome.code == 2
        assert len(outcome.error.splitlines()) == 1
        assert files_of(tmp_path / ".out.partial") == kept
        return outcome.error

    assert "holds step 2 of an unfinished run; continue it with --resume, or start over with --overwrite" in text()
    output = text("--resume", "--learning-rate", 1e-3)
    assert "--learning-rate was 0.01, and is now 0.001; pass the same value, or start over with --overwrite" in output
    assert "--eval-data was not given, and is now " in text("--resume", "--eval-data", models / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        assert "--precision auto was float32, and is now bfloat16; launch it the same way" in text("--resume")
    os.utime(tmp_path / "text.txt", (1, 1))
    assert "text.txt of the data was added, removed or changed since; undo that, or start" in text("--resume")
    os.utime(tmp_path / "gda" / "model.safetensors", (1, 1))
    assert "model.safetensors of the model was added, removed or changed" in text("--resume")
    (tmp_path / "gda" / "trainable.json").unlink()
    assert "trainable.json is missing" in text("--overwrite", "--train", "new")  # found before the run is given up
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"other": "bad"}\n')
    assert "line 2" in text("--overwrite", "--eval-data", tmp_path / "bad.jsonl")  # and after tokenizing --data
    (tmp_path / ".out.partial" / "training.json").write_text("[]")
    output = command(*arguments, "--overwrite", "--json")
    assert output.code == 0
    assert json.loads(output.out)["resumed_from"] is None
    assert not {"data", "data.new", "removed"} & set(os.listdir(tmp_path / "out"))


@pytest.mark.parametrize("end", ["killed", "interrupted"])
def test_replaced_run_is_kept_until_the_other_begins(
    end: str, models: Path, tmp_path: Path, interrupt: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other has tokenized its data; afterwards the first one is resumed."""
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "out")
    monkeypatch.undo()

    def stopped(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGKILL if end == "killed" else signal.SIGINT)

    def replaced() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("gda.training.train._make_trainer", stopped)
            with pytest.raises(Interrupted, match="stopped before the first step; what was to be replaced is kept"):
                short(models, "gda", tmp_path / "out", overwrite=True, learning_rate=1e-3, context=8)

    assert in_child(replaced) == (-signal.SIGKILL if end == "killed" else ENDED)
    report = short(models, "gda", tmp_path / "out", resume=True)
    assert report.resumed_from == 3
    assert not {"data", "data.new", "removed"} & set(os.listdir(tmp_path / "out"))


@pytest.mark.parametrize("resume", [False, True])
def test_unfinished_conversion_is_not_discarded(resume: bool, models: Path, tmp_path: Path) -> None:
    """Only with --overwrite."""
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text("{}")
    with pytest.raises(FileExistsError, match="out was begun by a conversion, which did not finish; continue that"):
        short(models, "gda", tmp_path / "out", resume=resume)
    assert any("continue that" in note for note in short(models, "gda", tmp_path / "out", dry_run=True).notes)
    assert os.listdir(partial) == ["manifest.json"]
    short(models, "gda", tmp_path / "out", resume=resume, overwrite=True)
    assert "manifest.json" not in os.listdir(tmp_path / "out")


def test_file_system_without_hard_links(
    models: Path, tmp_path: Path, interrupt: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run replaces an unfinished one there as well, and tokenizes its data again."""
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "out")
    monkeypatch.undo()

    def link(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", link)
    assert short(models, "gda", tmp_path / "out", overwrite=True).resumed_from is None


def test_dry_run_notes_obstacles(
    models: Path, tmp_path: Path, interrupt: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished run and a full disk are noted, and nothing changes on disk."""
    quiet = short(models, "gda", tmp_path / "new" / "out", dry_run=True).notes
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "out")
    before = files_of(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    begun, full = (note for note in short(models, "gda", tmp_path / "out", dry_run=True).notes if note not in quiet)
    assert "holds step 3 of an unfinished run; continue it with --resume" in begun
    assert "make room" in full
    for allowed in ("resume", "overwrite"):
        assert begun not in short(models, "gda", tmp_path / "out", dry_run=True, **{allowed: True}).notes
    assert files_of(tmp_path) == before


def test_space_for_the_checkpoints_that_are_written(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run keeps no more of them than it writes, however large --keep is."""
    options: dict[str, Any] = {"dry_run": True, "keep": 1000, "save_every": 2}
    weights = sum(tensor.numel() for tensor in tensors_of(models / "gda").values())
    needed = 4 * 3 * weights * 3  # 2 checkpoints and OUT
    for free, is_enough in ((needed, True), (needed - 1, False)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        notes = short(models, "gda", tmp_path / "out", **options).notes
        assert is_enough != any("make room" in note for note in notes), notes


def test_report_with_nonfinite_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are null in JSON and printed as not finite."""
    from gda.commands.train import print_report

    numbers = {"steps": 1, "tokens": 8, "data_tokens": 8, "num_parameters": 3, "num_trained": 3}
    report = TrainReport(out=tmp_path, first_loss=1.0, last_loss=1.0, first_eval_loss=2.0, **numbers)
    print_report(report)
    assert "loss 2.0000 before, not finite after; perplexity 7.39 before, not finite after" in capsys.readouterr().out
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["last_perplexity"] is None


def test_resume_without_an_earlier_run_starts_one(models: Path, tmp_path: Path) -> None:
    """So that a job can always pass --resume."""
    assert short(models, "gda", tmp_path / "out", resume=True).resumed_from is None


def test_killed_before_out_is_renamed(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume only renames the finished folder."""
    from gda.common.files import StagedFolder

    with monkeypatch.context() as patch:
        patch.setattr(StagedFolder, "finish", lambda self: os.kill(os.getpid(), signal.SIGKILL))
        assert in_child(lambda: short(models, "gda", tmp_path / "out")) == -signal.SIGKILL
        patch.undo()
        patch.setattr(Trainer, "train", None)
        assert short(models, "gda", tmp_path / "out", resume=True).steps == 6
    assert os.listdir(tmp_path) == ["out"]


def test_checkpoint_is_a_model(models: Path, tmp_path: Path, interrupt: Callable[..., None]) -> None:
    """It can be trained, and the result has the model's data types; OUT must not be the folder that contains it."""
    gda.convert(models / "llama", tmp_path / "gda", dtype="bfloat16", verify=False)
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "gda", tmp_path / "out", data=models / "text.txt", **SHORT)
    checkpoint = tmp_path / ".out.partial" / "checkpoint-3"
    assert AutoTokenizer.from_pretrained(checkpoint)("the").input_ids
    assert tensors_of(checkpoint)["lm_head.weight"].dtype == torch.float32
    assert json.loads((checkpoint / "config.json").read_text())["use_cache"] is True
    with pytest.raises(ValueError, match="choose another folder"):
        gda.train(checkpoint, tmp_path / "out", data=models / "text.txt", overwrite=True, **SHORT)
    gda.train(checkpoint, tmp_path / "next", data=models / "text.txt", **(SHORT | {"steps": 2}))
    dtypes = {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "gda").items()}
    assert {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "next").items()} == dtypes


# ------------------------------------------------------------------------------------------------------------- failures


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, what: str) -> None:
    """Make the loss, a gradient or a weight NaN or infinite at a step."""
    original = Trainer.training_step

    def spoilt(self: Trainer, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = original(self, model, *args, **kwargs)
        if self.state.global_step == step - 1:
            norm = self.model.model.norm.weight
            if what == "gradient":
                norm.grad[3] = math.inf
            if what == "weight":
                norm.data[3] = math.nan
        return loss * math.nan if what == "loss" and self.state.global_step == step - 1 else loss

    monkeypatch.setattr(Trainer, "training_step", spoilt)


@pytest.mark.parametrize(
    ("what", "step", "text"),
    [
        ("loss", 5, "the loss was nan at step 5"),
        ("gradient", 5, "the norm of the gradient was inf at step 5"),
        ("weight", 4, "model.norm.weight is not finite after step 4"),
    ],
)
def test_nonfinite_values_end_the_run(
    what: str, step: int, text: str, models: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, and one line with value, step and the last good checkpoint, which can be trained further."""
    spoil(monkeypatch, step, what)
    options = [str(each) for name, value in SHORT.items() for each in (f"--{name.replace('_', '-')}", value)]
    outcome = command("train", models / "gda", tmp_path / "out", "--data", models / "text.txt", *options, "--keep", 2)
    last = tmp_path / ".out.partial" / f"checkpoint-{2 if what == 'weight' else 4}"
    assert (outcome.code, outcome.out, len(without_progress(outcome))) == (1, "", 1), outcome
    assert f"{text}: {last} holds step" in outcome.error
    assert "lower --learning-rate 0.01" in outcome.error
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert all(bool(tensor.isfinite().all()) for tensor in tensors_of(last).values())
    gda.train(last, tmp_path / "next", data=models / "text.txt", **(SHORT | {"steps": 1, "learning_rate": 1e-4}))


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 2])
def test_full_disk(after: int, models: Path, tmp_path: Path, interrupt: Callable[..., None]) -> None:
    """The kernel refuses larger files: one line, and the last complete checkpoint is kept."""
    options: dict[str, Any] = {"save_every": 2}
    if after:
        interrupt(3, times=2)
        with pytest.raises(KeyboardInterrupt):
            short(models, "gda", tmp_path / "out", **options)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        try:
            short(models, "gda", tmp_path / "out", resume=True, **options)
        except OSError as error:
            output = str(error)
            kept = "there is no checkpoint" if not after else "checkpoint-2 holds step 2, the last good one; make room"
            os._exit(errno.EFBIG if kept in output and len(output.splitlines()) == 1 else 99)

    assert in_child(limited) == errno.EFBIG
    left = [path.name for path in tmp_path.glob(".out.partial/checkpoint-*")]
    assert left == (["checkpoint-2"] if after else [])
    assert short(models, "gda", tmp_path / "out", resume=True).steps == 6


# ----------------------------------------------------------------------------------------------- rates and measurements


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"schedule": "cosine"}, [0.5 + 0.5 * math.cos(math.pi * step / 6) for step in range(6)]),
        ({"schedule": "constant", "warmup": 0.5}, [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ({"schedule": "wsd", "warmup": 1 / 3, "decay": 1 / 3}, [0, 0.5, 1, 1, 1, 0.5]),
    ],
)
def test_schedules(options: dict[str, Any], rates: list[float], models: Path, tmp_path: Path) -> None:
    """Both learning rates follow the schedule, according to the log."""
    short(models, "gda", tmp_path / "out", log_every=1, lambda_learning_rate=1e-3, **options)
    logged = history(tmp_path / "out")
    assert [line["learning_rate"] / 1e-2 for line in logged] == pytest.approx(rates, abs=1e-6)
    assert [line["lambda_learning_rate"] / 1e-3 for line in logged] == pytest.approx(rates, abs=1e-6)


@pytest.mark.slow
def test_eval_data(models: Path, tmp_path: Path, command: Command) -> None:
    """Losses before, during and after training equal those of the models on disk."""
    arguments = ("--data", models / "text.txt", "--eval-data", models / "text.txt", *OPTIONS, "--eval-every", 3)
    outcome = command("train", models / "gda", tmp_path / "out", *arguments)
    report = train(models, "gda", tmp_path / "again", eval_data=models / "text.txt", eval_every=3)
    measured = [line for line in history(tmp_path / "out") if "eval_loss" in line]
    assert [line["step"] for line in measured] == [0, 3, 4]
    assert report.first_eval_loss == measured[0]["eval_loss"] == pytest.approx(loss_of(models / "gda"), rel=1e-5)
    assert report.last_eval_loss == measured[-1]["eval_loss"] == pytest.approx(loss_of(tmp_path / "out"), rel=1e-5)
    assert measured[-1]["perplexity"] == pytest.approx(math.exp(report.last_eval_loss)) == report.last_perplexity
    assert f"perplexity {report.first_perplexity:.2f} before, {report.last_perplexity:.2f} after" in outcome.out


@pytest.mark.slow
def test_precision(models: Path, tmp_path: Path) -> None:
    """bfloat16 changes the losses slightly; auto is float32 on a CPU."""
    gda.convert(models / "llama", tmp_path / "narrow", dtype="bfloat16", verify=False)
    options = SHORT | {"data": models / "text.txt", "steps": 2}
    losses = {
        precision: gda.train(tmp_path / "narrow", tmp_path / precision, precision=precision, **options).last_loss
        for precision in ("auto", "float32", "bfloat16")
    }
    assert losses["auto"] == losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_gradient_checkpointing(models: Path, tmp_path: Path) -> None:
    """The weights are the same."""
    for name in (True, False):
        short(models, "gda", tmp_path / str(name), gradient_checkpointing=name, steps=2)
    again, kept = tensors_of(tmp_path / "True"), tensors_of(tmp_path / "False")
    assert all(torch.allclose(again[name], kept[name], rtol=1e-4, atol=1e-6) for name in kept)


# ----------------------------------------------------------------------------------------------------- the command line


def test_dry_run_writes_nothing(models: Path, tmp_path: Path, command: Command) -> None:
    """It counts like a run, and reports bad input."""
    arguments = ("train", models / "grown", tmp_path / "out", "--data", models / "text.txt", "--context", 32)
    output = command(*arguments, "--train", "new", "--epochs", 2, "--dry-run", "--json")
    assert (output.code, os.listdir(tmp_path)) == (0, [])
    report = train(models, "grown", tmp_path / "out", train="new", epochs=2.0, steps=None, batch_size=8)
    rehearsed = json.loads(output.out)
    for name in ("steps", "tokens", "data_tokens", "num_parameters", "num_trained"):
        assert rehearsed[name] == getattr(report, name), name
    assert "nothing was written (--dry-run)" in command(*arguments, "--dry-run", "--overwrite").out
    assert (
        command(
            *arguments[:2], tmp_path / "other", *arguments[3:], "--train", "new", "--context", 500, "--dry-run"
        ).code
        == 2
    )


def test_help_has_every_option_in_a_panel(command: Command) -> None:
    """With its default as a value or in words."""
    shown = " ".join(command("train", "--help").out.replace("│", " ").split())
    for each in dataclasses.fields(TrainOptions):
        if each.metadata["positional"]:
            continue
        assert each.metadata["panel"], each.name
        assert flag(each.name) in shown, each.name
        assert each.metadata["help"].split(".")[0].split("`")[0].rstrip() in shown, each.name
        if each.default in (None, ()) and each.name != "data":
            assert "Default: " in each.metadata["help"], each.name


def test_missing_arguments_and_packages(models: Path, tmp_path: Path, command: Command) -> None:
    """OUT, data, a reporter's package, a repository."""
    refused(command("train", models / "gda"), "OUT is missing", tmp_path)
    refused(command("train", models / "gda", tmp_path / "out"), "--data is missing", tmp_path)
    arguments = ("train", models / "gda", tmp_path / "out", "--data", models / "text.txt")
    refused(command(*arguments, "--private"), "--push-to-hub", tmp_path)
    refused(command(*arguments, "--push-to-hub", "a b"), "not a valid repository name", tmp_path)
    refused(command(*arguments, "--revision", "main"), "--revision is for a Hub id", tmp_path)
    refused(command(*arguments, "--lambda-target", 0.1, "--fade-steps", 10**6), "above the", tmp_path)
    refused(command(*arguments, "--report-to", "wandb"), "pip install wandb", tmp_path)


@pytest.mark.slow
def test_from_and_to_the_hub(models: Path, tmp_path: Path, hub: Any, command: Command) -> None:
    """MODEL may be a Hub id; --push-to-hub creates a private repository with OUT."""
    gda.push(models / "gda", "me/gda")
    outcome = command(
        *("train", "me/gda", tmp_path / "out", "--data", models / "text.txt", *OPTIONS),
        *("--push-to-hub", "me/trained", "--private"),
    )
    assert outcome.code == 0, outcome
    assert "me/trained: commit" in outcome.out
    train(models, "gda", tmp_path / "local")
    assert differing(tensors_of(tmp_path / "local"), tensors_of(tmp_path / "out")) == set()
    assert history_of(tmp_path / "out")[-1].startswith("Trained from me/gda at commit ")
    model = AutoModelForCausalLM.from_pretrained("me/trained")
    assert torch.equal(model.lm_head.weight, tensors_of(tmp_path / "out")["lm_head.weight"])


def test_checkpoint_holds_what_the_other_processes_write(models: Path, tmp_path: Path) -> None:
    """It is marked as complete only after they have written their part."""
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    shutil.copyfile(models / "gda" / "config.json", checkpoint / "config.json")

    class SlowNeighbour(Processes):
        def gather(self, value: Any) -> Any:
            (checkpoint / "rng_state_1.pth").write_bytes(b"its state")
            return super().gather(value)

    callback = CheckpointCallback(models / "gda", {}, TrainSettings(data=("text.txt",)), SlowNeighbour())
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    callback.on_save(arguments, TrainerState(global_step=5), TrainerControl())
    assert "rng_state_1.pth" in json.loads((checkpoint / "checkpoint.json").read_text())["files"]
