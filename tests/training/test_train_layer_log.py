"""The layer log: measurements, gradients, and no effect on training."""

import contextlib
import copy
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK

from gda import training
from gda.training import FadeCallback
from gda.training.callbacks.layer_log import LayerLog, for_reporters
from gda.training.distillation import Distillation
from gda.training.parameters import choose_what_learns
from gda.training.trainer import GDATrainer

from ..support.llamas import llama_model
from ..support.tiny import VOCAB_SIZE, tiny_model, token_ids

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "fewer noise than KV": {"num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 4},
    "paired": {"kv_layout": "paired", "num_key_value_heads": 4},
}
EXTRAS: dict[str, Any] = {"head_norm": True, "attention_bias": True, "hidden_act": "poly_norm"}
WINDOWS = token_ids(8, 9)
DATA = [{"input_ids": ids, "labels": ids} for ids in WINDOWS]


def model_of(layout: str = "gqa", **fields: Any) -> Any:
    return tiny_model(**LAYOUTS[layout] | EXTRAS | {"use_cache": False} | fields)


def trainer(model: Any, folder: Path, log: LayerLog | None, kind: Any = GDATrainer, **options: Any) -> GDATrainer:
    plain: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "include_num_input_tokens_seen": "all",
    }
    named = {name: options.pop(name) for name in ("distillation", "lambda_learning_rate") if name in options}
    callbacks = options.pop("callbacks", [])
    arguments = TrainingArguments(output_dir=str(folder), **plain | options)
    return kind(model, arguments, train_dataset=DATA, eval_dataset=DATA, layer_log=log, callbacks=callbacks, **named)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def by_hand(model: Any, ids: Tensor) -> list[dict[str, float]]:
    """λ, norms and shares of each layer, head by head, from outputs of the attention's modules."""
    calls: list[list[Any]] = []
    with contextlib.ExitStack() as stack:
        for layer in model.model.layers:
            attention = layer.self_attn
            heard: list[Any] = []

            def attend(*args: Any, attention: Any = attention, heard: list[Any] = heard, **kwargs: Any) -> Any:
                heard.append(type(attention).attend(attention, *args, **kwargs)[0])
                return heard[-1], None

            attention.attend = attend
            stack.callback(delattr, attention, "attend")
            hook = attention.register_forward_pre_hook(
                lambda module, _, kwargs, heard=heard: heard.append(module.compute_lambda(kwargs["hidden_states"])),
                with_kwargs=True,
            )
            stack.callback(hook.remove)
            calls.append(heard)
        model(ids)
    found = []
    for index, (lambda_, (signal, noise)) in enumerate(calls):
        attention = model.model.layers[index].self_attn
        batch, length, copies, size, width = signal.shape
        whole = torch.zeros(batch, length, copies * size, width, dtype=torch.float64)
        removed = torch.zeros_like(whole)
        total = 0.0
        for head in range(copies * size):
            of_head = lambda_[..., head, None] if lambda_.dim() > 1 else lambda_.expand(batch, length).unsqueeze(-1)
            total += of_head.mean().item()
            removed[:, :, head] = (of_head * noise[:, :, head // size, 0]).double()
            whole[:, :, head] = signal[:, :, head // size, head % size].double() - removed[:, :, head]
        weight = attention.o_proj.weight.double()
        energy = [((each.flatten(2) @ weight.T) ** 2).sum().item() for each in (removed, whole)]
        found.append(
            {
                "layer": index,
                "lambda": total / (copies * size),
                "signal_norm": signal.double().square().mean().sqrt().item(),
                "noise_norm": noise.double().square().mean().sqrt().item(),
                "subtracted": energy[0] / energy[1],
            }
        )
    return found


def gradients_by_hand(model: Any) -> list[dict[str, float]]:
    """Norms of p.grad by layer."""
    sums = [[0.0, 0.0] for _ in model.model.layers]
    for index, layer in enumerate(model.model.layers):
        for name, parameter in layer.named_parameters():
            square = (parameter.grad.double() ** 2).sum().item()
            sums[index][0] += square
            sums[index][1] += square if "lambda_" in name else 0.0
    return [{"gradient_norm": math.sqrt(a), "lambda_gradient_norm": math.sqrt(b)} for a, b in sums]


PASSES = [(1, False), (4, False), (1, True), (2, True)]  # accumulation, gradient checkpointing
KINDS = itertools.product(LAYOUTS, ["reparameterized", "sigmoid", "tanh"])


@pytest.mark.parametrize(
    ("layout", "lambda_type", "accumulation", "checkpointing"),
    [(*kind, *passes) for kind, passes in zip(KINDS, itertools.cycle(PASSES), strict=False)],
)
def test_measurements_match_the_modules(
    layout: str, lambda_type: str, accumulation: int, checkpointing: bool, tmp_path: Path
) -> None:
    """In one pass or several, with and without gradient checkpointing; gradients are measured before clipping."""
    model = model_of(layout, lambda_type=lambda_type)
    reference = copy.deepcopy(model)
    wanted = by_hand(reference, WINDOWS)
    reference(WINDOWS, labels=WINDOWS).loss.backward()
    options = {"gradient_accumulation_steps": accumulation, "gradient_checkpointing": checkpointing}
    options |= {"per_device_train_batch_size": 8 // accumulation, "max_grad_norm": 0.01}
    trainer(model, tmp_path, LayerLog(tmp_path / "log.jsonl"), **options).train()
    (line,) = lines(tmp_path / "log.jsonl")
    for got, at_forward, at_backward in zip(line["layers"], wanted, gradients_by_hand(reference), strict=True):
        assert got == pytest.approx(at_forward | at_backward, rel=2e-4)


def test_log_entries(tmp_path: Path) -> None:
    """Metrics, the λ learning rate, the teacher, the fade and evaluation, if they exist."""
    log = tmp_path / "plain.jsonl"
    trainer(model_of(), tmp_path, LayerLog(log)).train()
    (line,) = lines(log)
    assert list(line) == [
        *("step", "epoch", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second", "layers")
    ]
    assert (line["step"], line["epoch"], line["tokens"]) == (1, 1.0, 72)

    taught = Distillation(tiny_model(seed=4), weight=0.5, hidden_weight=0.1)
    log = tmp_path / "full.jsonl"
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    options |= {"distillation": taught, "lambda_learning_rate": 0.1, "callbacks": [FadeCallback(4, 0.2)]}
    made = trainer(model_of(), tmp_path, LayerLog(log), **options)
    made.train()
    first, second, evaluation = lines(log)
    assert first["fade"] == 0.25
    assert first["lambda_learning_rate"] == 10 * first["learning_rate"]
    assert second["loss"] == pytest.approx(0.5 * second["cross_entropy"] + 0.5 * second["kl"] + 0.1 * second["hidden"])
    assert evaluation == {
        "step": 2,
        "eval_loss": evaluation["eval_loss"],
        "perplexity": pytest.approx(math.exp(evaluation["eval_loss"])),
    }
    assert second["layers"][0]["lambda"] != first["layers"][0]["lambda"]
    assert not [key for entry in made.state.log_history for key in entry if key.startswith("layers/")]


class Counter(LayerLog):
    """Counts the steps in which layers are measured."""

    measured = 0

    def measuring(self, *args: Any) -> Any:
        self.measured += 1
        return super().measuring(*args)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_log_does_not_affect_training(precision: dict[str, Any], tmp_path: Path) -> None:
    """Also under autocast; 3 of 6 steps are measured."""
    models = []
    for log in (None, Counter(tmp_path / "log.jsonl")):
        model = model_of()
        options: dict[str, Any] = {"max_steps": 6, "logging_steps": 4, "logging_first_step": True}
        made: Any = trainer(model, tmp_path, log, per_device_train_batch_size=4, **options | precision)
        made.train()
        measured = 0 if made.layer_log is None else made.layer_log.measured
        assert measured == (0 if log is None else 3)
        models.append(model)
        assert not [layer for layer in model.model.layers if layer.self_attn.subtract._forward_hooks]
    assert [line["step"] for line in lines(tmp_path / "log.jsonl")] == [1, 4]
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, models[1].get_parameter(name)), name


def test_gradients_of_a_scaled_loss(tmp_path: Path) -> None:
    """Training in float16 multiplies the loss, and the gradients before they are clipped."""
    norms = []
    for scale in (1.0, 1024.0):
        made = trainer(model_of(), tmp_path, LayerLog(tmp_path / "log.jsonl"))
        made.accelerator.scaler = None if scale == 1 else SimpleNamespace(get_scale=lambda: 1024.0)
        for parameter in made.model.parameters():
            parameter.grad = torch.full_like(parameter, scale)
        made.accelerator.gradient_state._set_sync_gradients(True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "training_step", lambda *args: torch.zeros(()))
            made.state.max_steps = 1
            made.training_step(made.model, {})
        norms.append(made.layer_log.gradients)
    assert norms[0] == norms[1] != []


def test_maps_and_a_layer_log_exclude_each_other(tmp_path: Path) -> None:
    """The subtraction is of maps then, not of outputs."""
    model = model_of(attn_implementation="eager", output_attentions=True)
    with pytest.raises(ValueError, match="a layer log cannot be written where the model returns its attention maps"):
        trainer(model, tmp_path, LayerLog(None)).train()


def test_second_training_counts_from_zero(tmp_path: Path) -> None:
    made = trainer(model_of(), tmp_path, None, max_steps=2)
    for _ in range(2):
        made.train()
        assert (made.throughput.steps, made.throughput.tokens) == (2, 2 * WINDOWS.numel())
    assert all(entry.get("tokens_per_second", 1) > 0 for entry in made.state.log_history)


def test_frozen_parameters_have_no_gradient_norm(tmp_path: Path) -> None:
    """It is absent, not 0: one model has a frozen λ, and the other has frozen layers."""
    model = model_of()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lambda_" not in name)
    trainer(model, tmp_path, LayerLog(tmp_path / "log.jsonl")).train()
    (line,) = lines(tmp_path / "log.jsonl")
    assert {"gradient_norm", "lambda_gradient_norm"} & line["layers"][0].keys() == {"gradient_norm"}
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    trainer(model, tmp_path, LayerLog(tmp_path / "head.jsonl")).train()
    assert "gradient_norm" not in lines(tmp_path / "head.jsonl")[0]["layers"][1]


def test_masks_and_lora_are_included(tmp_path: Path) -> None:
    """The output of masked heads is multiplied by the fade, and LoRA's update is part of the projection."""
    growing = model_of(fade=0.3, masked_signal_heads=1)
    expected = copy.deepcopy(growing)
    trainer(growing, tmp_path, LayerLog(tmp_path / "masked.jsonl")).train()
    (line,) = lines(tmp_path / "masked.jsonl")
    assert line["fade"] == 0.3
    with torch.no_grad():  # a mask on what o_proj reads is one on its columns
        for layer in expected.model.layers:
            columns = torch.tensor([1.0, 1.0, 0.3]).repeat(2).repeat_interleave(8)
            layer.self_attn.o_proj.weight.mul_(columns)
            layer.self_attn.num_masked_heads = 0
    assert line["layers"][0]["subtracted"] == pytest.approx(by_hand(expected, WINDOWS)[0]["subtracted"], rel=1e-4)

    pytest.importorskip("peft")
    adapted = choose_what_learns(model_of(), "lora", tmp_path, 2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    merged = copy.deepcopy(adapted).merge_and_unload()
    trainer(adapted, tmp_path, LayerLog(tmp_path / "lora.jsonl")).train()
    (line,) = lines(tmp_path / "lora.jsonl")
    for got, wanted in zip(line["layers"], by_hand(merged, WINDOWS), strict=True):
        assert {name: got[name] for name in wanted} == pytest.approx(wanted, rel=2e-4)


def test_resumed_log_has_every_step_once(tmp_path: Path) -> None:
    """Lines after the checkpoint and an incomplete last line are replaced."""
    path = tmp_path / "log.jsonl"
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    trainer(model_of(), tmp_path / "run", LayerLog(path), **options).train()
    whole = lines(path)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    trainer(model_of(), tmp_path / "run", LayerLog(path), **options).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")
    )
    again = lines(path)
    assert [line["step"] for line in again] == [1, 2, 3, 4, 5, 6]
    for line in (*whole, *again):
        line.pop("tokens_per_second")
    assert again == whole


def test_nonfinite_numbers_are_null(tmp_path: Path) -> None:
    log = LayerLog(tmp_path / "log.jsonl")
    log.write({"step": 1, "loss": math.nan, "layers": [{"lambda": math.inf}]})
    assert lines(tmp_path / "log.jsonl") == [{"step": 1, "loss": None, "layers": [{"lambda": None}]}]
    LayerLog(None).write({"step": 1})


class Reporter(TrainerCallback):
    """Replaces tensorboard."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(logs)


def test_reporters_get_the_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other callbacks, which write to a terminal, do not."""
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "ours", Reporter)
    reporter = Reporter()
    trainer(model_of(), tmp_path, LayerLog(None), callbacks=[reporter]).train()
    assert [key for entry in reporter.seen for key in entry if key == "layers/01/signal_norm"] == [
        "layers/01/signal_norm"
    ]
    names = for_reporters([{"layer": 0, "lambda": 0.1}] * 101)
    assert list(names)[1] == "layers/001/lambda"


def test_public_names_are_enough_for_a_script(tmp_path: Path) -> None:
    """The log may be named by a string, in a folder that does not exist yet."""
    log = training.LayerLog(str(tmp_path / "logs" / "log.jsonl"))
    taught = training.Distillation(tiny_model(seed=4), weight=0.5)
    made = trainer(model_of(), tmp_path, log, training.GDATrainer, distillation=taught, lambda_learning_rate=0.1)
    made.train()
    (line,) = lines(tmp_path / "logs" / "log.jsonl")
    assert len(line["layers"]) == 2
    made.log({"loss": 1.0})  # by the script itself, without a learning rate
    assert set(training.__all__) <= set(dir(training))
    assert all(hasattr(training, name) for name in training.__all__)


def test_evaluation_before_training(tmp_path: Path) -> None:
    """Its line is in the log until a training begins, in a folder that does not exist yet."""
    trainer(model_of(), tmp_path, LayerLog(tmp_path / "logs" / "log.jsonl")).evaluate()
    (line,) = lines(tmp_path / "logs" / "log.jsonl")
    assert line["perplexity"] == pytest.approx(math.exp(line["eval_loss"]))


def test_llama_with_the_same_script(tmp_path: Path) -> None:
    """A baseline without differential attention can be trained too; its log has no layers."""
    trainer(llama_model(vocab_size=VOCAB_SIZE), tmp_path, LayerLog(tmp_path / "log.jsonl")).train()
    (line,) = lines(tmp_path / "log.jsonl")
    assert "loss" in line
    assert "layers" not in line
