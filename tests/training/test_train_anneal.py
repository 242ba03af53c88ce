"""Fading λ in: the equations, files, compilation, and the callback under a Trainer."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer

import gda
from gda import GDAForCausalLM, GDAForSequenceClassification
from gda.training import FadeCallback

from ..support import naive
from ..support.fading import Recorder, StopAt, check_bundled_code_fades, trainer_arguments
from ..support.tiny import make_asymmetric, relative_error, tiny_config, tiny_model, token_ids

pytestmark = pytest.mark.slow

TARGET = 0.7
LAYOUTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "fewer noise than KV": {"num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 4},
    "paired": {"kv_layout": "paired", "num_key_value_heads": 4},
}
EXTRAS: dict[str, Any] = {"head_norm": True, "qk_norm": True, "attention_bias": True}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_lambda_type = pytest.mark.parametrize("lambda_type", ["reparameterized", "sigmoid", "tanh"])
DATA = [{"input_ids": ids, "labels": ids} for ids in token_ids(32, 8)]


def model_of(layout: str = "gqa", **fields: Any) -> GDAForCausalLM:
    return tiny_model(**LAYOUTS[layout] | {"use_cache": False} | fields)


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    return model(token_ids(2, 11) if ids is None else ids).logits


# -------------------------------------------------------------------------------------------------------- the equations


@each_layout
@each_lambda_type
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_fade_in_between_matches_the_equations(layout: str, lambda_type: str, attention: str) -> None:
    """Logits and maps equal the loops; at 0 nothing is subtracted."""
    model = model_of(layout, lambda_type=lambda_type, **EXTRAS)
    model.set_attn_implementation(attention)
    ids = token_ids(2, 7)
    before = logits(model, ids)
    model.set_fade(0.4, lambda_target=TARGET)
    wanted = naive.run(model.state_dict(), model.config, ids)
    assert relative_error(logits(model, ids), wanted.logits) <= 1e-5
    assert relative_error(logits(model, ids), before) > 1e-3
    if attention == "eager":
        with torch.no_grad():
            maps = model(ids, output_attentions=True).attentions
        assert relative_error(maps[1], wanted.maps[1]) <= 1e-5
        model.set_fade(0.0)
        with torch.no_grad():
            maps = model(ids, output_attentions=True).attentions
        torch.testing.assert_close(maps[0].sum(-1), torch.ones_like(maps[0].sum(-1)))


@each_layout
@each_lambda_type
def test_fade_1_equals_the_ordinary_model(layout: str, lambda_type: str, tmp_path: Path) -> None:
    """Bit for bit, and its saved config has no fade."""
    plain = model_of(layout, lambda_type=lambda_type)
    model = copy.deepcopy(plain)
    model.set_fade(0.3, lambda_target=TARGET)
    model.set_fade(1)
    assert torch.equal(logits(model), logits(plain))
    for each, name in ((model, "annealed"), (plain, "plain")):
        each.save_pretrained(tmp_path / name)
    assert (tmp_path / "annealed" / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "annealed")
    assert not [name for name, _ in again.named_modules() if "fade" in name]


@each_lambda_type
def test_gradient_of_lambda_is_scaled_by_the_fade(lambda_type: str) -> None:
    """At 0 it has none."""
    ids = token_ids(2, 9)
    for value in (0.0, 0.01):
        model = model_of(lambda_type=lambda_type)
        model.set_fade(value, lambda_target=TARGET)
        model(ids, labels=ids).loss.backward()
        gradients = [each.grad for name, each in model.named_parameters() if "lambda_" in name]
        assert all(bool(each.any()) == (value > 0) for each in gradients)


@each_layout
def test_fade_is_saved_and_loaded(layout: str, tmp_path: Path) -> None:
    """config.json has both fields with all digits, in narrow dtypes too; the weights do not depend on them."""
    model = model_of(layout)
    model.set_fade(1 / 3, lambda_target=TARGET)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["fade"], written["lambda_target"]) == (1 / 3, TARGET)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(again), logits(model))
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert relative_error(logits(narrow), logits(model)) < 0.1
    with torch.device("meta"):
        empty = GDAForCausalLM(again.config)
    empty.to_empty(device="cpu")
    empty.initialize_weights()
    empty.load_state_dict(model.state_dict())
    assert torch.equal(logits(empty.eval()), logits(model))


@pytest.mark.slow
def test_bundled_code_fades(tmp_path: Path) -> None:
    """Without the package, the saved code starts, continues and saves the fade."""
    model = model_of(lambda_type="tanh")
    model.set_fade(0.25, lambda_target=TARGET)
    check_bundled_code_fades(model, tmp_path)


def test_set_fade_on_classifiers_and_copies() -> None:
    """The body of a classifier has its own config, and a deep copy its own fade."""
    model = make_asymmetric(GDAForSequenceClassification(tiny_config(num_labels=3, pad_token_id=0)))
    model.set_fade(0.25, lambda_target=TARGET)
    assert model.config.fade == model.model.config.fade == 0.25
    other = copy.deepcopy(model)
    other.set_fade(0.75)
    assert model.config.fade == 0.25
    assert not torch.equal(other(token_ids(1, 5)).logits, model(token_ids(1, 5)).logits)


def test_invalid_values_are_refused() -> None:
    """A fade beyond 1, no target, and a target that is not a number."""
    model = model_of()
    with pytest.raises(ValueError, match="pass lambda_target"):
        model.set_fade(0.5)
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            model.set_fade(value, lambda_target=TARGET)
    with pytest.raises(ValueError, match="finite"):
        model.set_fade(0.5, lambda_target=float("inf"))
    assert model.config.fade is None


@pytest.mark.slow
@each_layout
@pytest.mark.parametrize("train", [False, True])
def test_compiled_model_serves_every_fade(layout: str, train: bool) -> None:
    """With one graph; without the fields, the graph has no trace of it."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model = model_of(layout).train(train)
    sizes = []
    for values in ([0.0, 0.001, 0.5, 1.0], []):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for value in values:
            model.set_fade(value, lambda_target=TARGET)
            with torch.set_grad_enabled(train):
                found = compiled(token_ids(2, 9)).logits
            torch.testing.assert_close(found.detach(), logits(model, token_ids(2, 9)))
        if not values:
            model = model_of(layout).train(train)
            torch.compile(model, fullgraph=True, backend=backend)(token_ids(2, 9))
        sizes.append(len(graphs[-1].graph.nodes))
    assert len(graphs) == 2
    assert sizes[1] < sizes[0]
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------------ the files


def test_inspect_verify_and_export(tmp_path: Path) -> None:
    """inspect shows the fade, verify reads it, and export writes the λ of the moment."""
    model = model_of(lambda_init=0.0)
    model.save_pretrained(tmp_path / "plain")
    model.set_fade(0.5, lambda_target=TARGET)
    model.save_pretrained(tmp_path / "annealed")
    assert "fading in λ via 0.7 (fade 0.5)" in gda.inspect(tmp_path / "annealed").head_map
    for method in ("full", "layers"):
        assert gda.verify(tmp_path / "annealed", tmp_path / "annealed", method=method).passed
    exported = gda.export(tmp_path / "annealed", tmp_path / "out", format="llama")
    assert exported.verification.passed


# --------------------------------------------------------------------------------------------------------- the callback


arguments = partial(trainer_arguments, max_steps=6)


def recorder(num_steps: int = 4, lambda_target: float = TARGET) -> Recorder:
    """A recorder of λ fading in."""
    return Recorder(num_steps, lambda_target)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_callback_raises_the_fade_linearly(accumulated: int, tmp_path: Path) -> None:
    """From 0 to 1; evaluation uses the fade of its step, and the saved model is ordinary."""
    model = model_of()
    callback = recorder()
    trainer = Trainer(
        model,
        arguments(tmp_path, gradient_accumulation_steps=accumulated, eval_strategy="steps", eval_steps=2),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        callbacks=[callback],
    )
    trainer.train()
    assert callback.seen == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    trainer.save_model(str(tmp_path / "saved"))
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not {"fade", "lambda_target"} & written.keys()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model.eval()))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 5])
@pytest.mark.parametrize("read", ["made anew", "read from the checkpoint"])
@pytest.mark.parametrize("restored", [False, True])
def test_resuming_keeps_the_schedule(stop: int, read: str, restored: bool, tmp_path: Path) -> None:
    """Fades and weights equal those of an uninterrupted run, and config.json has the fade in between."""
    whole = model_of()
    wanted = recorder()
    Trainer(whole, arguments(tmp_path / "whole"), train_dataset=DATA, callbacks=[wanted]).train()

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": stop}
    first = recorder()
    callbacks = [first, StopAt(stop)]
    Trainer(model_of(), arguments(tmp_path / "run", **options), train_dataset=DATA, callbacks=callbacks).train()
    checkpoint = tmp_path / "run" / f"checkpoint-{stop}"
    written = json.loads((checkpoint / "config.json").read_text())
    assert (written.get("fade"), written.get("lambda_target")) == ((0.5, TARGET) if stop == 2 else (None, None))

    model = model_of() if read == "made anew" else AutoModelForCausalLM.from_pretrained(checkpoint)
    options |= {"restore_callback_states_from_checkpoint": restored}
    trainer = Trainer(model, arguments(tmp_path / "run", **options), train_dataset=DATA, callbacks=[recorder()])
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)
    if stop == 2:
        (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, Recorder))
        assert first.seen + callback.seen == pytest.approx(wanted.seen)


def test_partly_faded_model_continues(tmp_path: Path) -> None:
    """Another training continues from its fade to 1."""
    model = model_of()
    model.set_fade(0.5, lambda_target=TARGET)
    callback = recorder()
    Trainer(model, arguments(tmp_path, max_steps=4), train_dataset=DATA, callbacks=[callback]).train()
    assert callback.seen == pytest.approx([0.625, 0.75, 0.875, 1])


def test_callback_with_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model_of(), peft.LoraConfig(r=2, target_modules=["o_proj"]))
    Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=DATA, callbacks=[recorder()]).train()
    assert model.config.fade == 0.5


def test_callback_refuses_bad_input(tmp_path: Path) -> None:
    """No steps, an invalid target, and a schedule that differs from the model's or the checkpoint's."""
    with pytest.raises(ValueError, match="num_steps of at least 1, not 0"):
        FadeCallback(0, 0.1)
    with pytest.raises(ValueError, match="finite, not nan"):
        FadeCallback(1, float("nan"))
    begun = model_of()
    begun.set_fade(0.5, lambda_target=0.1)
    with pytest.raises(ValueError, match=r"pass lambda_target=0\.1"):
        Trainer(begun, arguments(tmp_path), train_dataset=DATA, callbacks=[recorder()]).train()
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    Trainer(model_of(), arguments(tmp_path, max_steps=2, **options), train_dataset=DATA, callbacks=[recorder()]).train()
    for other, remedy in (
        (recorder(5), "pass num_steps=4"),
        (recorder(lambda_target=0.1), f"pass lambda_target={TARGET}"),
    ):
        trainer = Trainer(model_of(), arguments(tmp_path, **options), train_dataset=DATA, callbacks=[other])
        with pytest.raises(ValueError, match=remedy):
            trainer.train(resume_from_checkpoint=True)
