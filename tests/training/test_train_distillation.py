"""Distillation: the loss against a loop over tokens, accumulation, evaluation, and teachers that do not fit."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, TrainingArguments

import gda
from gda.training import distillation
from gda.training.distillation import Distillation, divergence
from gda.training.trainer import GDATrainer

from ..support.llamas import byte_tokenizer, save_llama
from ..support.tiny import VOCAB_SIZE, tiny_model, token_ids

pytestmark = pytest.mark.sampled

W, T, H = 0.3, 2.5, 0.2
WINDOWS = token_ids(8, 9)
LABELS = WINDOWS.clone()
LABELS[0, :5] = -100  # so that a mean of means is not the mean
LABELS[3, 2:8] = -100
DATA = [{"input_ids": ids, "labels": labels} for ids, labels in zip(WINDOWS, LABELS, strict=True)]


def student() -> Any:
    return tiny_model(use_cache=False)


def teacher(**fields: Any) -> Any:
    return tiny_model(seed=7, lambda_type="tanh", **fields)


def naive_parts(ours: Any, theirs: Any, labels: Tensor) -> dict[str, Tensor]:
    """Means over the predicted tokens, in loops."""
    sums: dict[str, Any] = {"cross_entropy": 0.0, "kl": 0.0, "hidden": 0.0}
    count = 0
    for b, row in enumerate(labels.tolist()):
        for t, token in enumerate(row[1:]):
            if token == -100:
                continue
            count += 1
            sums["cross_entropy"] -= ours.logits[b, t].double().softmax(-1)[token].log()
            p = (theirs.logits[b, t].double() / T).softmax(-1)
            q = (ours.logits[b, t].double() / T).softmax(-1)
            sums["kl"] += sum(p[v] * (p[v].log() - q[v].log()) for v in range(VOCAB_SIZE))
            layers = list(zip(ours.hidden_states, theirs.hidden_states, strict=True))[1:]
            for x, y in layers:
                error = ((x[b, t] - y[b, t]).double() ** 2).mean() / (y[b, t].double() ** 2).mean()
                sums["hidden"] += error / len(layers)
    return {name: each / count for name, each in sums.items()}


def naive_loss(parts: dict[str, Tensor]) -> Tensor:
    return (1 - W) * parts["cross_entropy"] + W * T**2 * parts["kl"] + H * parts["hidden"]


def trainer(model: Any, taught: Distillation | None, folder: Path, **options: Any) -> GDATrainer:
    plain: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
    }
    arguments = TrainingArguments(output_dir=str(folder), **plain | options)
    return GDATrainer(model, arguments, train_dataset=DATA, eval_dataset=DATA, distillation=taught)


class Gradients(GDATrainer):
    """Keeps the gradients of the last step."""

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        loss = super().training_step(*arguments, **options)
        self.kept = {name: each.grad.clone() for name, each in self.model.named_parameters()}
        return loss


@pytest.mark.parametrize("chunk", [3, 256])
def test_kl_in_chunks_equals_the_whole(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, over the predicted tokens only, also for bfloat16 logits."""
    monkeypatch.setattr(distillation, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (3 * torch.randn(2, 7, 11, generator=generator) for _ in range(2))
    predicted = torch.rand(14, generator=generator) > 0.4
    for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        a, b = (ours.clone().to(dtype).requires_grad_() for _ in range(2))
        found = divergence(a, theirs.to(dtype), predicted, T)
        p, q = ((each.flatten(0, 1).double() / T).softmax(-1) for each in (theirs.to(dtype), b))
        wanted = (p * (p.log() - q.log())).sum(-1)[predicted].sum()
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        torch.autograd.backward([found, wanted])
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad - b.grad).abs().max() <= error * b.grad.abs().max()
        assert not a.grad.flatten(0, 1)[~predicted].any()


def test_only_probabilities_of_a_chunk_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No float32 tensor with a row for every token is kept for the backward pass."""
    monkeypatch.setattr(distillation, "CHUNK", 4)
    ours = torch.randn(1, 64, 32, requires_grad=True)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: kept.append(tuple(each.shape)) or each, lambda each: each
    ):
        divergence(ours * 1, torch.randn(1, 64, 32), torch.ones(64, dtype=torch.bool), 1.0).backward()
    assert all(math.prod(shape) <= 4 * 32 for shape in kept)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_loops(accumulation: int, checkpointing: bool, tmp_path: Path) -> None:
    """In one pass and in four with different numbers of tokens; the log has the same losses."""
    model = student()
    theirs = teacher()
    reference = copy.deepcopy(model)
    ours = reference(WINDOWS, output_hidden_states=True)
    with torch.no_grad():
        wanted = naive_parts(ours, theirs(WINDOWS, output_hidden_states=True), LABELS)
    wanted = naive_parts(ours, theirs(WINDOWS, output_hidden_states=True), LABELS)
    naive_loss(wanted).backward()

    taught = Distillation(theirs, weight=W, temperature=T, hidden_weight=H)
    made = trainer(
        model,
        taught,
        tmp_path,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
    )
    made.__class__ = Gradients
    made.train()
    logged = made.state.log_history[0]
    for name in ("cross_entropy", "kl", "hidden"):
        assert logged[name] == pytest.approx(float(wanted[name]), rel=1e-4), name
    assert logged["loss"] == pytest.approx(float(naive_loss(wanted)), rel=1e-4)
    for name, parameter in reference.named_parameters():
        difference = (made.kept[name] - parameter.grad).abs().max()  # type: ignore[attr-defined]
        assert difference <= 1e-4 * parameter.grad.abs().max(), name


def test_logged_parts_are_means_since_the_last_entry(tmp_path: Path) -> None:
    lines = {}
    for every in (1, 3):
        taught = Distillation(teacher(), weight=W, temperature=T, hidden_weight=H)
        made = trainer(student(), taught, tmp_path, max_steps=6, per_device_train_batch_size=4, logging_steps=every)
        made.train()
        lines[every] = [line for line in made.state.log_history if "kl" in line]
    for name in ("loss", "cross_entropy", "kl", "hidden"):
        by_one = [line[name] for line in lines[1]]
        assert [line[name] for line in lines[3]] == pytest.approx([sum(by_one[:3]) / 3, sum(by_one[3:]) / 3], rel=1e-4)


def test_student_equal_to_its_teacher(tmp_path: Path) -> None:
    """KL and hidden are 0 and have no gradients."""
    model = student()
    before = copy.deepcopy(model.state_dict())
    taught = Distillation(copy.deepcopy(model), weight=1.0, hidden_weight=1.0)
    made = trainer(model, taught, tmp_path, optim="sgd")
    made.train()
    logged = made.state.log_history[0]
    assert logged["kl"] == pytest.approx(0, abs=1e-6)
    assert logged["hidden"] == pytest.approx(0, abs=1e-9)
    assert all(torch.allclose(each, before[name], atol=1e-7) for name, each in model.state_dict().items())


def test_teacher_is_frozen_and_not_saved(tmp_path: Path) -> None:
    """It is in evaluation mode and not optimized; evaluation uses the text only."""
    model, theirs = student(), teacher()
    theirs.train()
    before = copy.deepcopy(theirs.state_dict())
    made = trainer(model, Distillation(theirs, weight=W, hidden_weight=H), tmp_path, max_steps=2)
    made.train()
    assert not theirs.training
    assert all(each.grad is None and not each.requires_grad for each in theirs.parameters())
    assert all(torch.equal(each, before[name]) for name, each in theirs.state_dict().items())
    assert made.optimizer is not None
    own = {id(each) for each in model.parameters()}
    assert {id(each) for group in made.optimizer.param_groups for each in group["params"]} == own
    made.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size < 1.2 * 4 * sum(
        each.numel() for each in model.parameters()
    )
    measured = made.evaluate()
    with torch.no_grad():
        wanted = model.eval()(WINDOWS, labels=LABELS).loss.item()
    assert measured["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    assert measured["eval_perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)
    assert "kl" not in measured


# ------------------------------------------------------------------------------------------------------------- teachers


def test_teacher_is_loaded_in_float32(tmp_path: Path) -> None:
    """The source of a conversion can teach its result, and their predictions are equal at first."""
    llama = save_llama(tmp_path / "llama", dtype=torch.bfloat16)
    gda.convert(llama, tmp_path / "gda", verify=False)
    model = gda.GDAForCausalLM.from_pretrained(tmp_path / "gda", dtype=torch.float32)
    taught = Distillation.load(str(llama), model, weight=W, hidden_weight=H, tokenizer=byte_tokenizer())
    assert isinstance(taught.teacher, LlamaForCausalLM)
    assert {each.dtype for each in taught.teacher.parameters()} == {torch.float32}
    ids = token_ids(2, 9)
    parts = taught.compare(model(ids, output_hidden_states=True), taught.ask({"input_ids": ids}), ids, 16)
    assert parts["kl"].item() == pytest.approx(0, abs=1e-6)
    assert parts["hidden"].item() == pytest.approx(0, abs=1e-6)


def test_teacher_with_more_tokens(tmp_path: Path) -> None:
    """A GGUF file names the rows of the embeddings that no token uses."""
    llama = save_llama(tmp_path / "llama")
    gda.convert(llama, tmp_path / "gda", verify=False)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["[PAD267]"])
    tokenizer.save_pretrained(llama)
    model = gda.GDAForCausalLM.from_pretrained(tmp_path / "gda")
    Distillation.load(str(llama), model, weight=W, tokenizer=byte_tokenizer())


def test_teachers_that_do_not_fit(tmp_path: Path) -> None:
    """No model, another vocabulary, another depth or width with --hidden-weight, another tokenizer."""
    llama = str(save_llama(tmp_path / "llama", num_hidden_layers=3))
    gda.convert(llama, tmp_path / "gda", verify=False)
    model = gda.GDAForCausalLM.from_pretrained(tmp_path / "gda")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Distillation.load(str(tmp_path / "nowhere"), model, weight=W)
    cases = [
        ("vocab_size", model.config.vocab_size + 1, 0.0, ""),
        ("num_hidden_layers", 2, 0.1, "; omit --hidden-weight"),
        ("hidden_size", 7, 0.1, "; omit --hidden-weight"),
    ]
    for name, value, hidden_weight, remedy in cases:
        other = copy.deepcopy(model)
        setattr(other.config, name, value)
        with pytest.raises(ValueError, match=rf"has {name}=\d+, but the model has {value}{remedy}$"):
            Distillation.load(llama, other, weight=W, hidden_weight=hidden_weight)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<one more>"])
    with pytest.raises(ValueError, match="different tokenizer"):
        Distillation.load(llama, model, weight=W, tokenizer=tokenizer)
    longest = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"--context {longest + 1} is above {longest}, max_position_embeddings"):
        Distillation.load(llama, model, weight=W, context=longest + 1)
