"""`gda train`: the loss falls, old weights stay where only new ones learn, masks go, and bad input is one line."""

import errno
import json
import math
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import gda
from gda.common.trainable import Trainable
from gda.configuration.configuration_gda import GROWTH_FIELDS
from gda.training.report import TrainReport

from ..conversion.test_convert_crash_safety import killed_at
from ..support.children import in_child
from ..support.commands import Command
from ..support.llamas import byte_tokenizer, change_config, files_of, save_llama, tensors_of

TEXT = "".join(f"{i} times {i} is {i * i}, and the other way round it is the same. " for i in range(60))
FAST: dict[str, Any] = {"steps": 4, "batch_size": 4, "context": 32, "learning_rate": 1e-2, "save_every": 4}
OPTIONS = ("--steps", 4, "--batch-size", 4, "--context", 32, "--learning-rate", 1e-2, "--save-every", 4)
OF_TRAINING = {"training.json", "training_log.jsonl"}


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
    """Of the text in windows of 32 tokens, by the checkpoint as it is on disk."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(byte_tokenizer()(TEXT).input_ids)
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


# --------------------------------------------------------------------------------------------------------- all of it


def test_the_loss_falls_and_out_is_a_model(models: Path, tmp_path: Path) -> None:
    """By the report and by the checkpoint; OUT holds what the source does, config and λ's dtype as they were."""
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


def test_a_seed_makes_the_same_bytes(models: Path, tmp_path: Path) -> None:
    """And another one others."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(models, "gda", tmp_path / name, seed=seed)
    a, b = (
        {name: held for name, held in files_of(tmp_path / each).items() if name not in OF_TRAINING} for each in "ab"
    )
    assert a == b
    assert differing(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "c"))


def test_once_through_the_data_by_default(models: Path, tmp_path: Path) -> None:
    """Every window is read once, the last batch being what is left; tokens that fill no window are not read."""
    ids = byte_tokenizer()(TEXT).input_ids
    report = train(models, "gda", tmp_path / "out", steps=None, batch_size=7, context=None)
    windows = len(ids) // 128  # what the model was made for
    assert report.steps == math.ceil(windows / 7)
    assert report.tokens == report.data_tokens == windows * 128 <= len(ids)


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


def test_only_new_goes_on_from_its_result(models: Path, tmp_path: Path) -> None:
    """trainable.json is in OUT too: what is old stays in a second run."""
    train(models, "grown", tmp_path / "first", train="new")
    train(tmp_path, "first", tmp_path / "second", data=models / "text.txt", train="new")
    before, after = tensors_of(models / "grown"), tensors_of(tmp_path / "second")
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert differing(tensors_of(tmp_path / "first"), after)


@pytest.mark.parametrize("learner", ["new", "all"])
def test_masked_growth_ends_without_masks(learner: str, models: Path, tmp_path: Path, command: Command) -> None:
    """The mask rises over the steps by itself, which is said; a plain model computes what OUT computes."""
    assert json.loads((models / "masked" / "config.json").read_text())["growth_mask"] == 0
    outcome = command(
        *("train", models / "masked", tmp_path / "out", "--data", models / "text.txt", *OPTIONS),
        *("--train", learner),
    )
    assert outcome.code == 0, outcome
    assert "growth mask rises from 0 to 1 over 4 steps" in outcome.out
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [written[name] for name in GROWTH_FIELDS] == [None] * len(GROWTH_FIELDS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not [name for name, _ in model.named_modules() if "growth_mask" in name]
    before, after = tensors_of(models / "masked"), tensors_of(tmp_path / "out")
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"]) == (learner == "new")


# -------------------------------------------------------------------------------------------------------- the command


def test_what_the_command_tells(models: Path, tmp_path: Path, command: Command) -> None:
    """Steps, tokens, losses, parameters; no bar and no losses where there is no terminal; JSON is the report."""
    arguments = ("--data", models / "text.txt", *OPTIONS, "--train", "new")
    outcome = command("train", models / "grown", tmp_path / "out", *arguments)
    told = command("train", models / "grown", tmp_path / "out", *arguments, "--json", "--overwrite")
    assert (outcome.code, outcome.error) == (told.code, told.error) == (0, "")
    report = json.loads(told.out)
    expected = train(models, "grown", tmp_path / "again", train="new").to_dict()
    measured = {name: report[name] for name in ("tokens_per_second", "peak_memory")}
    assert report == expected | measured | {"out": str(tmp_path / "out")}
    assert all(value > 0 for value in measured.values())
    assert json.loads((tmp_path / "out" / "training.json").read_text())["report"].items() <= report.items()
    assert f"loss {report['first_loss']:.4f} at first, {report['last_loss']:.4f} at last" in outcome.out
    assert f"{report['num_trained']:,} of {report['num_parameters']:,} parameters trained" in outcome.out
    assert "tokens a second, at most" in outcome.out
    assert len([line for line in outcome.out.splitlines() if not line.startswith("note: ")]) == 3


BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "steps": (("--steps", 0), "--steps 0 is below 1"),
    "batch size": (("--batch-size", 0), "--batch-size 0 is below 1"),
    "context 1": (("--context", 1), "--context 1 is below 2"),
    "context": (("--context", 129), "max_position_embeddings"),
    "learning rate": (("--learning-rate", "nan"), "--learning-rate nan"),
    "no learning rate": (("--learning-rate", 0), "--learning-rate 0"),
    "seed": (("--seed", -1), "--seed -1"),
    "temperature of nobody": (("--temperature", 2), "--temperature 2.0 needs a --teacher"),
    "rank of nothing": (("--lora-rank", 4), "--lora-rank 4 needs --train lora"),
    "two lengths": (("--epochs", 2, "--steps", 3), "--epochs 2.0 needs no --steps"),
    "empty data": (("--data", ""), "--data is empty"),
    "empty eval data": (("--eval-data", ""), "--eval-data is empty"),
    "no reporter": (("--report-to", "json"), "--report-to 'json' is no reporter"),
    "a reporter's module": (("--report-to", "a.b"), "--report-to 'a.b' is no reporter"),
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
        ("empty.txt", b"", "empty.txt"),
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

    refused(run(tmp_path / "none"), "does not exist", tmp_path)
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
    refused(run(broken), "the loss was nan at step 1: nothing was kept", tmp_path, code=1)
    change_config(broken, vocab_size="many")
    refused(run(broken), "is not a valid configuration", tmp_path)


def test_nothing_tells_what_is_new(models: Path, tmp_path: Path, command: Command) -> None:
    """--train new of a model without trainable.json."""
    gda.convert(models / "llama", tmp_path / "bare", verify=False)
    (tmp_path / "bare" / "trainable.json").unlink()
    arguments = ("train", tmp_path / "bare", tmp_path / "out", "--data", models / "text.txt", *OPTIONS)
    refused(command(*arguments, "--train", "new"), "trainable.json is missing", tmp_path)


def test_annealing_goes_on(models: Path, tmp_path: Path) -> None:
    """A model that an earlier run left on the way ends as a plain one, without being asked to; that is said."""
    on_the_way = tmp_path / "on-the-way"
    shutil.copytree(models / "gda", on_the_way)
    change_config(on_the_way, lambda_anneal=0.5, lambda_target=0.2)
    report = train(tmp_path, "on-the-way", tmp_path / "out", data=models / "text.txt")
    assert any("goes on from 0.5" in note for note in report.notes)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["lambda_anneal"], written["lambda_target"]) == (None, None)


def test_another_target_than_the_model_is_on_its_way_over(models: Path, tmp_path: Path, command: Command) -> None:
    """In terms of the command, and before anything is done: --dry-run says it as well."""
    shutil.copytree(models / "gda", tmp_path / "on-the-way")
    change_config(tmp_path / "on-the-way", lambda_anneal=0.5, lambda_target=0.2)
    arguments = ("train", tmp_path / "on-the-way", tmp_path / "out", "--data", models / "text.txt", *OPTIONS)
    options = ("--lambda-anneal-steps", 4, "--lambda-target")
    for more in ((), ("--dry-run",)):
        refused(command(*arguments, *options, 0.3, *more), "--lambda-target 0.3", tmp_path)
    assert command(*arguments, *options, 0.2, "--dry-run").code == 0


def test_a_model_is_refused_before_its_data_is_tokenized(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Much text takes hours, for a teacher that is none."""
    monkeypatch.setattr("gda.training.plan.open_windows", lambda *_, **__: pytest.fail("the data was read"))
    with pytest.raises(ValueError, match="--teacher"):
        train(models, "grown", tmp_path / "out", teacher=models / "llama", hidden_weight=0.1)


def test_paths_and_none_in_python(models: Path, tmp_path: Path) -> None:
    """A teacher may be a Path, and None is nothing, as for other options."""
    report = train(models, "gda", tmp_path / "out", steps=1, teacher=models / "llama", eval_data=None, report_to=None)
    assert report.first_eval_loss is None
    told = json.loads((tmp_path / "out" / "training.json").read_text())
    assert told["settings"]["teacher"] == str(models / "llama")


def test_a_dry_run_counts_what_a_run_reads(models: Path, tmp_path: Path) -> None:
    """Also where a pass over the data ends in the middle of a step, and the run in the middle of a pass."""
    options = {"steps": None, "epochs": 1.5, "accumulation": 5}
    dry, run = (train(models, "gda", tmp_path / "out", dry_run=dry, **options) for dry in (True, False))
    assert (dry.steps, dry.tokens) == (run.steps, run.tokens)


def test_a_vocabulary_of_another_size(models: Path, tmp_path: Path, command: Command) -> None:
    """In config.json than in the weights: the tensor is named."""
    shutil.copytree(models / "gda", tmp_path / "gda")
    change_config(tmp_path / "gda", vocab_size=250)
    outcome = command("train", tmp_path / "gda", tmp_path / "out", "--data", models / "text.txt", *OPTIONS)
    refused(outcome, "do not fit, mismatched keys: ", tmp_path)
    assert "weight" in outcome.error


def test_lora_warns_of_nothing(models: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Nor of names that PEFT uses."""
    train(models, "gda", tmp_path / "out", steps=1, train="lora", lora_rank=2)
    assert [str(each.message) for each in recwarn if each.category is FutureWarning] == []


def test_a_report_is_json_whatever_was_measured(tmp_path: Path) -> None:
    """No NaN and no Infinity, which JSON does not know."""
    report = TrainReport(
        tmp_path, 1, 2, None, 3, 3, first_loss=math.inf, first_eval_loss=800.0, last_eval_loss=math.nan
    )
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [told[name] for name in ("first_loss", "first_perplexity", "last_eval_loss", "last_perplexity")] == [
        None
    ] * 4
    assert told["first_eval_loss"] == 800.0


def test_a_learning_rate_that_is_far_too_high(models: Path, tmp_path: Path, command: Command) -> None:
    """The loss is finite at first, and then is not: exit 1, no OUT."""
    arguments = ("--data", models / "text.txt", "--steps", 8, "--context", 32, "--learning-rate", 1e38)
    refused(command("train", models / "gda", tmp_path / "out", *arguments), "lower --learning-rate", tmp_path, code=1)


def test_no_memory(models: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU that is too small makes torch raise becomes one line with the remedy."""

    def raises(self: Trainer, *args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr(Trainer, "training_step", raises)
    outcome = command("train", models / "gda", tmp_path / "out", "--data", models / "text.txt", *OPTIONS)
    refused(outcome, "lower --batch-size or --context", tmp_path)


# ----------------------------------------------------------------------------------------- stopped, and taken up again

# Six steps of two windows, a checkpoint after the second and the fourth.
SHORT: dict[str, Any] = {"steps": 6, "batch_size": 2, "context": 16, "learning_rate": 1e-2, "save_every": 2}
# By name, the model and what differs from it.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("gda", {}),
    "epochs": ("gda", {"steps": None, "epochs": 3.0, "batch_size": 100}),
    "accumulation": ("gda", {"accumulation": 3}),
    "measured": ("gda", {"eval_data": "text.txt", "eval_every": 1}),
    "growth mask": ("masked", {}),
    "only new": ("grown", {"train": "new"}),
    "lora": ("gda", {"train": "lora", "lora_rank": 2}),
    "annealed": ("gda", {"lambda_target": 0.3, "lambda_anneal_steps": 5}),
    "wsd, λ's own rate": ("gda", {"schedule": "wsd", "warmup": 0.4, "lambda_learning_rate": 0.1, "weight_decay": 0.1}),
    "bfloat16": ("gda", {"precision": "bfloat16"}),
    "taught": ("gda", {"teacher": "llama", "hidden_weight": 0.1}),
}


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Have a signal raised in the forward pass of a step, that many times; the first time that it comes."""

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
    """The log, without what the clock says."""
    lines = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.mark.parametrize(("model", "options"), RUNS.values(), ids=RUNS)
def test_a_resumed_run_ends_in_the_weights_of_an_unbroken_one(
    model: str,
    options: dict[str, Any],
    models: Path,
    tmp_path: Path,
    interrupt: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped after step 3, where no checkpoint was due: weights bit for bit, the log line by line, the report."""
    whole = short(models, model, tmp_path / "whole", **options)
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        short(models, model, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == [".out.partial"]
    monkeypatch.undo()
    report = short(models, model, tmp_path / "out", resume=True, **options)
    assert differing(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")) == set()
    assert history(tmp_path / "whole") == history(tmp_path / "out")
    assert report.resumed_from == 3
    measured = {name: getattr(report, name) for name in ("out", "resumed_from", "tokens_per_second", "peak_memory")}
    assert vars(report) == vars(whole) | measured
    assert sorted(files_of(tmp_path / "out")) == sorted(files_of(tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_the_same_windows_in_the_same_order(
    models: Path, tmp_path: Path, interrupt: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over three passes through the data, stopped in the second: none is read twice or left out."""
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c(
    number: int,
    models: Path,
    tmp_path: Path,
    command: Command,
    interrupt: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit 130 and one line that names --resume; what --overwrite will replace is still there, and then is not."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    arguments = ("train", models / "gda", tmp_path / "out", "--data", models / "text.txt", *OPTIONS, "--overwrite")
    interrupt(2, number=number)
    outcome = command(*arguments)
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.error == "gda: interrupted; the same command with --resume goes on\n"
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    monkeypatch.undo()
    resumed = command(*arguments, "--resume")
    assert resumed.code == 0
    assert "from step 2 on" in resumed.out
    assert not (tmp_path / "out" / "mine").exists()


def test_ctrl_c_twice_is_at_once(models: Path, tmp_path: Path, interrupt: Callable[..., None]) -> None:
    """Without a checkpoint of that step; an earlier one stays, and without one nothing does."""
    interrupt(4, times=2)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "out")
    assert [path.name for path in (tmp_path / ".out.partial").glob("checkpoint-*")] == ["checkpoint-2"]
    interrupt(1, times=2)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "none")
    assert os.listdir(tmp_path) == [".out.partial"]


def test_another_teacher(models: Path, tmp_path: Path, interrupt: Callable[..., None]) -> None:
    """A teacher that has changed meanwhile would end in other weights, and is told."""
    shutil.copytree(models / "llama", tmp_path / "teacher")
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        train(models, "gda", tmp_path / "out", teacher=tmp_path / "teacher")
    os.utime(tmp_path / "teacher" / "model.safetensors", (1, 1))
    with pytest.raises(ValueError, match=r"model\.safetensors of the teacher has changed since"):
        train(models, "gda", tmp_path / "out", teacher=tmp_path / "teacher", resume=True)


def test_killed_at_a_step(models: Path, tmp_path: Path, interrupt: Callable[..., None]) -> None:
    """SIGKILL in step 4: the checkpoint of step 2 is there, and the weights are those of an unbroken run."""
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
    """Between any two changes of the disk, checkpoints, their removal and the result among them: never a torn one."""
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


def test_torn_checkpoints_are_recognised(models: Path, tmp_path: Path, interrupt: Callable[..., None]) -> None:
    """A file that is short or absent, or no word that it is whole: what is before it is taken, and the torn removed."""
    partial = tmp_path / ".out.partial"
    interrupt(5, times=2)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "out", keep=2)
    with open(partial / "checkpoint-4" / "optimizer.pt", "r+b") as file:
        file.truncate(100)
    interrupt(5, times=2)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "out", keep=2, resume=True, save_every=2)
    assert sorted(path.name for path in partial.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    (partial / "checkpoint-4" / "checkpoint.json").unlink()
    (partial / "checkpoint-2" / "model.safetensors").unlink()
    interrupt(1, times=2)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "out", keep=2, resume=True)
    assert os.listdir(tmp_path) == []


def test_only_the_same_run_is_resumed(
    models: Path, tmp_path: Path, command: Command, interrupt: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting that differs is named, or the file; without --resume what was begun is not lost by mistake."""
    (tmp_path / "text.txt").write_text(TEXT)
    gda.convert(models / "llama", tmp_path / "gda", verify=False)
    arguments = ("train", tmp_path / "gda", tmp_path / "out", "--data", tmp_path / "text.txt", *OPTIONS)
    interrupt(2)
    assert command(*arguments).code == 130
    monkeypatch.undo()
    kept = files_of(tmp_path / ".out.partial")

    def said(*more: object) -> str:
        outcome = command(*arguments, *more)
        assert outcome.code == 2
        assert len(outcome.error.splitlines()) == 1
        assert files_of(tmp_path / ".out.partial") == kept
        return outcome.error

    assert "holds step 2 of a run that did not end; --resume goes on with it, --overwrite begins anew" in said()
    told = said("--resume", "--learning-rate", 1e-3)
    assert "begun with --learning-rate 0.01, and not with --learning-rate 0.001" in told
    assert "begun with no --eval-data, and not with --eval-data" in said("--resume", "--eval-data", models / "text.txt")
    os.utime(tmp_path / "text.txt", (1, 1))
    assert "text.txt of the data has changed" in said("--resume")
    os.utime(tmp_path / "gda" / "model.safetensors", (1, 1))
    assert "model.safetensors of the model has changed" in said("--resume")
    assert command(*arguments, "--overwrite").code == 0


def test_a_dry_run_tells_of_what_is_in_the_way(
    models: Path, tmp_path: Path, interrupt: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that did not end, and a disk without room; neither ends the rehearsal, and nothing of either changes."""
    quiet = short(models, "gda", tmp_path / "new" / "out", dry_run=True).notes
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        short(models, "gda", tmp_path / "out")
    before = files_of(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    begun, full = (note for note in short(models, "gda", tmp_path / "out", dry_run=True).notes if note not in quiet)
    assert "holds step 3 of a run that did not end; --resume goes on with it" in begun
    assert "make room" in full
    assert files_of(tmp_path) == before


def test_a_report_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON knows no infinity: it is None there, and told as what it is."""
    from gda.cli import _print_trained
    from gda.training.report import TrainReport

    numbers = {"steps": 1, "tokens": 8, "data_tokens": 8, "num_parameters": 3, "num_trained": 3}
    report = TrainReport(out=tmp_path, first_loss=1.0, last_loss=1.0, first_eval_loss=2.0, **numbers)
    _print_trained(report)
    assert "loss 2.0000 before, not finite after; perplexity 7.39 before, not finite after" in capsys.readouterr().out
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["last_perplexity"] is None


def test_resume_begins_where_nothing_was_begun(models: Path, tmp_path: Path) -> None:
    """So that a job may always pass it."""
    assert short(models, "gda", tmp_path / "out", resume=True).resumed_from is None


def test_killed_before_the_renaming(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is whole is only put in its place, by --resume; nothing is trained again."""
    from gda.common.files import StagedFolder

    with monkeypatch.context() as patch:
        patch.setattr(StagedFolder, "finish", lambda self: os.kill(os.getpid(), signal.SIGKILL))
        assert in_child(lambda: short(models, "gda", tmp_path / "out")) == -signal.SIGKILL
        patch.undo()
        patch.setattr(Trainer, "train", None)
        assert short(models, "gda", tmp_path / "out", resume=True).steps == 6
    assert os.listdir(tmp_path) == ["out"]


def test_a_checkpoint_is_a_model(models: Path, tmp_path: Path, interrupt: Callable[..., None]) -> None:
    """It can be trained, to the dtypes that the model had, but not into the place that it lies in."""
    gda.convert(models / "llama", tmp_path / "gda", dtype="bfloat16", verify=False)
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "gda", tmp_path / "out", data=models / "text.txt", **SHORT)
    checkpoint = tmp_path / ".out.partial" / "checkpoint-3"
    assert AutoTokenizer.from_pretrained(checkpoint)("the").input_ids
    assert tensors_of(checkpoint)["lm_head.weight"].dtype == torch.float32
    with pytest.raises(ValueError, match="choose another place"):
        gda.train(checkpoint, tmp_path / "out", data=models / "text.txt", overwrite=True, **SHORT)
    gda.train(checkpoint, tmp_path / "next", data=models / "text.txt", **(SHORT | {"steps": 2}))
    dtypes = {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "gda").items()}
    assert {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "next").items()} == dtypes


# ------------------------------------------------------------------------------------------------------------- failures


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, what: str) -> None:
    """Have the loss, a gradient or a weight be no number at a step."""
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
    ("what", "step", "said"),
    [
        ("loss", 5, "the loss was nan at step 5"),
        ("gradient", 5, "the norm of the gradient was inf at step 5"),
        ("weight", 4, "model.norm.weight is not finite after step 4"),
    ],
)
def test_what_is_not_finite_ends_a_run(
    what: str, step: int, said: str, models: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 1 and one line: what, where, and the last good checkpoint, which can be trained with a lower rate."""
    spoil(monkeypatch, step, what)
    options = [str(each) for name, value in SHORT.items() for each in (f"--{name.replace('_', '-')}", value)]
    outcome = command("train", models / "gda", tmp_path / "out", "--data", models / "text.txt", *options, "--keep", 2)
    last = tmp_path / ".out.partial" / f"checkpoint-{2 if what == 'weight' else 4}"
    assert (outcome.code, outcome.out, len(outcome.error.splitlines())) == (1, "", 1), outcome
    assert f"{said}: {last} holds step" in outcome.error
    assert "lower --learning-rate 0.01" in outcome.error
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert all(bool(tensor.isfinite().all()) for tensor in tensors_of(last).values())
    gda.train(last, tmp_path / "next", data=models / "text.txt", **(SHORT | {"steps": 1, "learning_rate": 1e-4}))


@pytest.mark.parametrize("after", [0, 2])
def test_a_full_disk(after: int, models: Path, tmp_path: Path, interrupt: Callable[..., None]) -> None:
    """The kernel refuses larger files, as a quota would: an error in one line; the last whole checkpoint stays."""
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
            told = str(error)
            kept = "nothing was kept" if not after else "checkpoint-2 holds step 2, the last good one; make room"
            os._exit(errno.EFBIG if kept in told and len(told.splitlines()) == 1 else 99)

    assert in_child(limited) == errno.EFBIG
    left = [path.name for path in tmp_path.glob(".out.partial/checkpoint-*")]
    assert left == (["checkpoint-2"] if after else [])
    assert short(models, "gda", tmp_path / "out", resume=True).steps == 6


# ---------------------------------------------------------------------------------------------- rates and measurements


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
    """Of both rates, by the log."""
    short(models, "gda", tmp_path / "out", log_every=1, lambda_learning_rate=1e-3, **options)
    logged = history(tmp_path / "out")
    assert [line["learning_rate"] / 1e-2 for line in logged] == pytest.approx(rates, abs=1e-6)
    assert [line["lambda_learning_rate"] / 1e-3 for line in logged] == pytest.approx(rates, abs=1e-6)


def test_measured_on_other_text(models: Path, tmp_path: Path, command: Command) -> None:
    """Before the first step, on the way and after the last: what the models themselves have, read from disk."""
    arguments = ("--data", models / "text.txt", "--eval-data", models / "text.txt", *OPTIONS, "--eval-every", 3)
    outcome = command("train", models / "gda", tmp_path / "out", *arguments)
    report = train(models, "gda", tmp_path / "again", eval_data=models / "text.txt", eval_every=3)
    measured = [line for line in history(tmp_path / "out") if "eval_loss" in line]
    assert [line["step"] for line in measured] == [0, 3, 4]
    assert report.first_eval_loss == measured[0]["eval_loss"] == pytest.approx(loss_of(models / "gda"), rel=1e-5)
    assert report.last_eval_loss == measured[-1]["eval_loss"] == pytest.approx(loss_of(tmp_path / "out"), rel=1e-5)
    assert measured[-1]["perplexity"] == pytest.approx(math.exp(report.last_eval_loss)) == report.last_perplexity
    assert f"perplexity {report.first_perplexity:.2f} before, {report.last_perplexity:.2f} after" in outcome.out


def test_bfloat16_is_for_multiplying(models: Path, tmp_path: Path) -> None:
    """Other losses, nearly the same, and float32 weights; auto is float32 here, on a CPU."""
    gda.convert(models / "llama", tmp_path / "narrow", dtype="bfloat16", verify=False)
    options = SHORT | {"data": models / "text.txt", "steps": 2}
    losses = {
        precision: gda.train(tmp_path / "narrow", tmp_path / precision, precision=precision, **options).last_loss
        for precision in ("auto", "float32", "bfloat16")
    }
    assert losses["auto"] == losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_gradient_checkpointing(models: Path, tmp_path: Path) -> None:
    """The same weights by less memory."""
    for name in (True, False):
        short(models, "gda", tmp_path / str(name), gradient_checkpointing=name, steps=2)
    again, kept = tensors_of(tmp_path / "True"), tensors_of(tmp_path / "False")
    assert all(torch.allclose(again[name], kept[name], rtol=1e-4, atol=1e-6) for name in kept)


# ---------------------------------------------------------------------------------------------------- the command line


def test_a_rehearsal_writes_nothing(models: Path, tmp_path: Path, command: Command) -> None:
    """--dry-run counts what a run then has; bad input is found."""
    arguments = ("train", models / "grown", tmp_path / "out", "--data", models / "text.txt", "--context", 32)
    told = command(*arguments, "--train", "new", "--epochs", 2, "--dry-run", "--json")
    assert (told.code, os.listdir(tmp_path)) == (0, [])
    report = train(models, "grown", tmp_path / "out", train="new", epochs=2.0, steps=None, batch_size=8)
    rehearsed = json.loads(told.out)
    for name in ("steps", "tokens", "data_tokens", "num_parameters", "num_trained"):
        assert rehearsed[name] == getattr(report, name), name
    assert "nothing was (--dry-run)" in command(*arguments, "--dry-run", "--overwrite").out
    assert (
        command(
            *arguments[:2], tmp_path / "other", *arguments[3:], "--train", "new", "--context", 500, "--dry-run"
        ).code
        == 2
    )


def test_the_command_has_every_setting() -> None:
    """With the defaults of `TrainSettings`, each in a panel of --help."""
    import dataclasses
    import inspect

    from gda import cli
    from gda.training.settings import TrainSettings

    parameters = inspect.signature(cli.train).parameters
    for each in dataclasses.fields(TrainSettings):
        default = parameters[each.name].default
        expected = None if each.default in ((), dataclasses.MISSING) else each.default
        assert default == expected, each.name
        assert parameters[each.name].annotation.__metadata__[0].rich_help_panel, each.name


def test_what_is_missing(models: Path, tmp_path: Path, command: Command) -> None:
    """OUT, data, a reporter that is not installed, a repository."""
    refused(command("train", models / "gda"), "OUT is missing", tmp_path)
    refused(command("train", models / "gda", tmp_path / "out"), "--data is missing", tmp_path)
    arguments = ("train", models / "gda", tmp_path / "out", "--data", models / "text.txt")
    refused(command(*arguments, "--private"), "--push-to-hub", tmp_path)
    refused(command(*arguments, "--push-to-hub", "a b"), "not a valid repository name", tmp_path)
    refused(command(*arguments, "--revision", "main"), "--revision is for a Hub id", tmp_path)
    refused(command(*arguments, "--lambda-target", 0.1), "go together", tmp_path)
    refused(command(*arguments, "--lambda-target", 0.1, "--lambda-anneal-steps", 10**6), "above the", tmp_path)
    refused(command(*arguments, "--report-to", "wandb"), "pip install wandb", tmp_path)


def test_from_the_hub_and_to_it(models: Path, tmp_path: Path, hub: Any, command: Command) -> None:
    """MODEL may be a Hub id; --push-to-hub makes a private repository of OUT."""
    gda.push(models / "gda", "me/gda")
    outcome = command(
        *("train", "me/gda", tmp_path / "out", "--data", models / "text.txt", *OPTIONS),
        *("--push-to-hub", "me/trained", "--private"),
    )
    assert outcome.code == 0, outcome
    assert "me/trained: commit" in outcome.out
    train(models, "gda", tmp_path / "local")
    assert differing(tensors_of(tmp_path / "local"), tensors_of(tmp_path / "out")) == set()
    model = AutoModelForCausalLM.from_pretrained("me/trained")
    assert torch.equal(model.lm_head.weight, tensors_of(tmp_path / "out")["lm_head.weight"])
