"""Masked growth: at fade 0 the model before growth, at 1 an ordinary model, and in between the equations."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer
from transformers.activations import ACT2FN

import gda
from gda import GDAConfig, GDAForCausalLM, GDAForSequenceClassification
from gda.common.trainable import Trainable
from gda.configuration.configuration_gda import FADED, MASKED
from gda.conversion.demo import find_demo_model
from gda.modeling_gda import modeling_gda
from gda.training import FadeCallback

from ..support import naive
from ..support.checkpoints import needs_smollm2
from ..support.commands import Command
from ..support.fading import Recorder, StopAt, check_bundled_code_fades, trainer_arguments
from ..support.llamas import save_llama
from ..support.tiny import make_asymmetric, relative_error, tiny_config, tiny_model, token_ids

pytestmark = pytest.mark.sampled

ROUNDING = 1e-5
LAYOUTS: dict[str, dict[str, Any]] = {
    "gqa": {"num_attention_heads": 8, "num_noise_heads": 2, "num_key_value_heads": 2},
    "mha": {"num_attention_heads": 8, "num_noise_heads": 4, "num_key_value_heads": 4},
    "mqa": {"num_attention_heads": 6, "num_noise_heads": 2, "num_key_value_heads": 1},
    "fewer noise than KV": {"num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 4},
    "more noise than KV": {"num_attention_heads": 12, "num_noise_heads": 4, "num_key_value_heads": 2},
    "paired": {"kv_layout": "paired", "num_attention_heads": 8, "num_noise_heads": 2, "num_key_value_heads": 4},
    "paired, one pair": {
        "kv_layout": "paired",
        "num_attention_heads": 6,
        "num_noise_heads": 2,
        "num_key_value_heads": 2,
    },
}
EXTRAS = {
    "head_norm": True,
    "qk_norm": True,
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "poly_norm",
    "tie_word_embeddings": True,
}
OLD_NEURONS, NEURONS = 40, 57
NEW_LAYERS = [1]
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_lambda_type = pytest.mark.parametrize("lambda_type", ["reparameterized", "sigmoid", "tanh"])


def base_config(layout: str = "gqa", **fields: Any) -> GDAConfig:
    """Two layers, before growth."""
    return tiny_config(**LAYOUTS[layout] | {"lambda_init": [0.25, 0.4], "intermediate_size": OLD_NEURONS} | fields)


def grown_config(base: GDAConfig, mask: float | None = 0.0) -> GDAConfig:
    """Twice the signal heads, more neurons and a new layer between the two; without a fade, the final model."""
    config = copy.deepcopy(base)
    config.num_attention_heads = 2 * base.num_signal_heads + base.num_noise_heads
    config.intermediate_size = NEURONS
    config.num_hidden_layers = 3
    config.layer_types = ["full_attention"] * 3
    config.lambda_init = [0.25, 0.6, 0.4]
    if mask is not None:
        config.fade = mask
        config.masked_signal_heads = base.signal_group_size
        config.masked_neurons = NEURONS - OLD_NEURONS
        config.masked_layers = list(NEW_LAYERS)
    config.validate_architecture()
    return config


def grown_model(base: GDAForCausalLM, mask: float | None = 0.0, seed: int = 5) -> GDAForCausalLM:
    """A model with random weights, into which those of `base` are copied, head by head."""
    model = tiny_model(grown_config(base.config, mask), seed=seed)
    state, old = model.state_dict(), base.state_dict()
    with torch.no_grad():
        for name, tensor in old.items():
            place = name.replace("layers.1.", "layers.2.")
            rows, columns = places(name, base.config, model.config)
            target = state[place]
            if rows is not None:
                target[rows] = tensor
            elif columns is not None:
                target[:, columns] = tensor
            else:
                target.copy_(tensor)
    return model


def places(name: str, old: GDAConfig, new: GDAConfig) -> tuple[list[int] | None, list[int] | None]:
    """The rows or columns of a grown tensor that hold the old one's."""
    heads = [old_head(i, old, new) for i in range(old.num_signal_heads)]
    if ".q_proj." in name:
        rows = {query(i, old): query(head, new) for i, head in enumerate(heads)}
        rows |= {noise_query(j, old): noise_query(j, new) for j in range(old.num_noise_heads)}
        return features([rows[i] for i in range(old.num_attention_heads)], old.head_dim), None
    if ".lambda_proj." in name:
        return heads, None
    if ".o_proj.weight" in name:
        return None, features(heads, old.value_width)
    if ".gate_proj." in name or ".up_proj." in name:
        return list(range(OLD_NEURONS)), None
    return None, list(range(OLD_NEURONS)) if ".down_proj.weight" in name else None


def old_head(head: int, old: GDAConfig, new: GDAConfig) -> int:
    """Index of signal head `head` after growth: new heads follow the old ones of each set that reads the same."""
    size = old.signal_group_size
    return head // size * new.signal_group_size + head % size


def query(signal_head: int, config: GDAConfig) -> int:
    ratio = config.signal_noise_ratio
    return signal_head // ratio * (ratio + 1) + signal_head % ratio


def noise_query(noise_head: int, config: GDAConfig) -> int:
    return (noise_head + 1) * (config.signal_noise_ratio + 1) - 1


def features(heads: list[int], width: int) -> list[int]:
    return [head * width + j for head in heads for j in range(width)]


@torch.no_grad()
def logits(model: GDAForCausalLM, ids: Tensor | None = None) -> Tensor:
    return model(token_ids(2, 11) if ids is None else ids, use_cache=False).logits


def new_entries(model: GDAForCausalLM, base: GDAConfig) -> dict[str, Tensor]:
    """By name, which entries of each parameter are new; parameters without any are left out."""
    found = {}
    for name, parameter in model.named_parameters():
        new = torch.ones_like(parameter, dtype=torch.bool)
        if "layers.1." not in name:
            rows, columns = places(name.replace("layers.2.", "layers.1."), base, model.config)
            if rows is not None:
                new[rows] = False
            elif columns is not None:
                new[:, columns] = False
            else:
                continue
        found[name] = new
    return found


# -------------------------------------------------------------------------------------------------------- the equations


@each_layout
@each_lambda_type
@pytest.mark.parametrize("fields", [{}, EXTRAS], ids=["plain", "extras"])
def test_fade_0_equals_the_model_before_growth(layout: str, lambda_type: str, fields: dict[str, Any]) -> None:
    """For any new weights, even large ones."""
    base = tiny_model(base_config(layout, lambda_type=lambda_type, **fields))
    model = grown_model(base)
    assert relative_error(logits(model), logits(base)) <= ROUNDING
    with torch.no_grad():
        for name, new in new_entries(model, base.config).items():
            model.get_parameter(name)[new] *= 10
    assert relative_error(logits(model), logits(base)) <= ROUNDING
    model.set_fade(0.5)
    assert relative_error(logits(model), logits(base)) > 1e-2


@each_layout
@each_lambda_type
@pytest.mark.parametrize("fields", [{}, EXTRAS], ids=["plain", "extras"])
def test_fade_1_equals_the_ordinary_model(layout: str, lambda_type: str, fields: dict[str, Any]) -> None:
    """Bit for bit, with the same weights."""
    base = tiny_model(base_config(layout, lambda_type=lambda_type, **fields))
    model = grown_model(base)
    plain = grown_model(base, mask=None)
    assert plain.config.fade is None
    model.set_fade(1)
    assert torch.equal(logits(model), logits(plain))


@each_layout
@each_lambda_type
@pytest.mark.parametrize(("fields", "attention"), [({}, "sdpa"), (EXTRAS, "eager")], ids=["plain", "extras"])
def test_fade_in_between_matches_the_equations(
    layout: str, lambda_type: str, fields: dict[str, Any], attention: str
) -> None:
    """Logits and maps at 0.4."""
    base = tiny_model(base_config(layout, lambda_type=lambda_type, **fields))
    model = grown_model(base, mask=0.4)
    model.set_attn_implementation(attention)
    ids = token_ids(2, 7)
    wanted = naive.run(model.state_dict(), model.config, ids)
    assert relative_error(logits(model, ids), wanted.logits) <= ROUNDING
    if attention == "eager":
        with torch.no_grad():
            output = model(ids, output_attentions=True)
        assert relative_error(output.logits, wanted.logits) <= ROUNDING
        for got, maps in zip(output.attentions, wanted.maps, strict=True):
            assert relative_error(got, maps) <= ROUNDING


def test_each_kind_of_growth_alone() -> None:
    """A new layer leaves hidden states unchanged bit for bit."""
    layers: dict[str, Any] = {"masked_layers": [1]}
    for growth in ({"masked_signal_heads": 1}, {"masked_neurons": 11}, layers, layers | {"blended_layers": True}):
        masked = tiny_model(base_config(fade=0.3, **growth))
        wanted = naive.run(masked.state_dict(), masked.config, token_ids(2, 7))
        assert relative_error(logits(masked, token_ids(2, 7)), wanted.logits) <= ROUNDING
    masked.set_fade(0)
    with torch.no_grad():
        states = masked(token_ids(2, 7), output_hidden_states=True).hidden_states
    assert torch.equal(masked.model.norm(states[1]), states[2])


def test_blended_layer() -> None:
    """It outputs fade · layer(x) + (1 − fade) · x, and the layer itself at 1; new heads and neurons are masked too."""
    fields: dict[str, Any] = {"masked_signal_heads": 1, "masked_neurons": 11, "hidden_act": "poly_norm"}
    model = tiny_model(base_config(fade=0.4, masked_layers=[1], blended_layers=True, **fields))
    plain, ids = tiny_model(base_config(fade=0.4, **fields)), token_ids(2, 7)
    plain.load_state_dict(model.state_dict())
    wanted = naive.run(model.state_dict(), model.config, ids)
    assert relative_error(logits(model, ids), wanted.logits) <= ROUNDING
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, each in {"blended": model, "whole": plain}.items():
        each.model.layers[1].register_forward_hook(
            lambda _, given, out, name=name: seen.update({name: (given[0], out)})
        )
        logits(each, ids)
    (before, got), (same, output) = seen["blended"], seen["whole"]
    assert torch.equal(before, same)
    assert relative_error(got, 0.4 * output + 0.6 * before) <= ROUNDING
    model.set_fade(1)
    ordinary = tiny_model(base_config(hidden_act="poly_norm"))
    ordinary.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, ids), logits(ordinary, ids))


@pytest.mark.parametrize("layout", ["gqa", "paired"])
def test_decoding_with_a_cache(layout: str) -> None:
    """Token by token, at 0 and in between."""
    base = tiny_model(base_config(layout, lambda_type="tanh", **EXTRAS))
    model = grown_model(base)
    ids = token_ids(2, 6)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **settings), base.generate(ids, **settings))
    model.set_fade(0.6)
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("layout", ["gqa", "fewer noise than KV", "paired"])
@each_lambda_type
def test_new_parameters_have_gradients_only_above_0(layout: str, lambda_type: str) -> None:
    """Row by row."""
    base = tiny_model(base_config(layout, lambda_type=lambda_type, **EXTRAS | {"tie_word_embeddings": False}))
    model = grown_model(base)
    ids = torch.cat([torch.randperm(61, generator=torch.Generator().manual_seed(s))[None] for s in (1, 2)])
    for mask in (0.0, 0.01):
        model.zero_grad()
        model.set_fade(mask)
        model(ids, labels=ids).loss.backward()
        for name, new in new_entries(model, base.config).items():
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            assert gradient[new].isfinite().all()
            assert (gradient[new] != 0).any() == (mask > 0), (name, mask)
            assert "layers.1." in name or gradient[~new].any(), name


# ----------------------------------------------------------------------------------------------------- files and memory


@pytest.mark.parametrize("layout", ["gqa", "paired"])
def test_fade_is_saved_and_loaded(layout: str, tmp_path: Path) -> None:
    """config.json has its value with all digits, and the weights do not depend on it."""
    model = grown_model(tiny_model(base_config(layout, **EXTRAS)))
    model.set_fade(1 / 3)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["fade"] == 1 / 3
    assert {written[name] is None for name in ("fade", *MASKED)} == {False}
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(again), logits(model))
    for dtype in (torch.bfloat16, torch.float16):
        narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert narrow.config.fade == 1 / 3
        assert logits(narrow).dtype == dtype
        assert relative_error(logits(narrow), logits(model)) < 0.1
    again.bfloat16().save_pretrained(tmp_path / "narrow")
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["fade"] == 1 / 3


@pytest.mark.slow
def test_bundled_code_fades(tmp_path: Path) -> None:
    """Without the package, the saved code applies, changes and saves the fade."""
    model = grown_model(tiny_model(base_config(lambda_type="tanh")), mask=0.4)
    check_bundled_code_fades(model, tmp_path)


def test_fade_1_is_saved_as_an_ordinary_model(tmp_path: Path) -> None:
    base = tiny_model(base_config(**EXTRAS))
    model, plain = grown_model(base), grown_model(base, mask=None)
    model.set_fade(1)
    for each, name in ((model, "grown"), (plain, "plain")):
        each.save_pretrained(tmp_path / name)
    assert (tmp_path / "grown" / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert not [name for name, _ in again.named_modules() if "fade" in name]
    assert torch.equal(logits(again), logits(plain))
    model.set_fade(0.5)
    assert relative_error(logits(model), logits(plain)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["meta", "disk", "device map"])
def test_fade_is_set_by_every_way_of_loading(loaded: str, tmp_path: Path) -> None:
    """Meta models that are filled later, layers on disk, and `initialize_weights`."""
    model = grown_model(tiny_model(base_config(**EXTRAS | {"tie_word_embeddings": False})), mask=0.4)
    model.save_pretrained(tmp_path / "model")
    if loaded == "meta":
        with torch.device("meta"):
            empty = GDAForCausalLM(model.config)
        empty.to_empty(device="cpu")
        empty.initialize_weights()
        empty.load_state_dict(model.state_dict())
        again = empty.eval()
    else:
        places_ = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        places_ |= {"model.layers.0": "disk", "model.layers.1": "disk", "model.layers.2": "cpu"}
        if loaded == "disk":
            with init_empty_weights():
                empty = GDAForCausalLM(model.config)
            again = load_checkpoint_and_dispatch(
                empty, tmp_path / "model", device_map=places_, offload_folder=tmp_path / "offload"
            ).eval()
        else:
            again = GDAForCausalLM.from_pretrained(
                tmp_path / "model", device_map=places_, offload_folder=tmp_path / "offload"
            )
    assert torch.equal(logits(again), logits(model))
    again.set_fade(0.7)
    model.set_fade(0.7)
    assert torch.equal(logits(again), logits(model))


def test_set_fade_on_classifiers_and_copies() -> None:
    """The body of a classifier has its own config, and a deep copy its own fade."""
    base = base_config()
    model = make_asymmetric(GDAForSequenceClassification(copy.deepcopy(grown_config(base))))
    model.set_fade(0.25)
    assert model.config.fade == model.model.config.fade == 0.25
    other = copy.deepcopy(model)
    other.set_fade(0.75)
    assert model.config.fade == 0.25
    ids = token_ids(1, 5)
    assert not torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_exported_program_has_the_fade() -> None:
    """As a buffer."""
    model = grown_model(tiny_model(base_config(**EXTRAS)), mask=0.4)
    ids = token_ids(2, 9)
    program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}).module()
    torch.testing.assert_close(program(input_ids=ids, use_cache=False).logits, logits(model, ids))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_fade_must_be_from_0_to_1(value: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        tiny_model(grown_config(base_config())).set_fade(value)
    with pytest.raises(ValueError, match="nothing is faded in"):
        tiny_model().set_fade(0.5)


# ---------------------------------------------------------------------------------------------------------- compilation


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["gqa", "paired"])
@pytest.mark.parametrize("train", [False, True])
def test_compiled_model_serves_every_fade(layout: str, train: bool) -> None:
    """With one graph."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model = grown_model(tiny_model(base_config(layout, **EXTRAS))).train(train)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ids = token_ids(2, 9)
    for mask in (0.0, 0.001, 0.5, 1.0):
        model.set_fade(mask)
        with torch.set_grad_enabled(train):
            found = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(found.detach(), logits(model, ids))
    assert len(graphs) == 1
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------- the callback


DATA = [{"input_ids": ids, "labels": ids} for ids in token_ids(32, 8)]


arguments = partial(trainer_arguments, max_steps=8)


def small_grown_model(mask: float = 0.0) -> GDAForCausalLM:
    return grown_model(tiny_model(base_config(use_cache=False)), mask=mask)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "wanted"),
    [(0.0, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]), (0.5, [0.625, 0.75, 0.875, 1, 1, 1, 1, 1])],
)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_callback_raises_the_fade_linearly(start: float, wanted: list[float], accumulated: int, tmp_path: Path) -> None:
    """From its current value; the model saved at the end is ordinary and equals the trained one."""
    model = small_grown_model(start)
    callback = Recorder(4)
    options = {"gradient_accumulation_steps": accumulated}
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=DATA, callbacks=[callback])
    trainer.train()
    assert callback.seen == pytest.approx(wanted)
    trainer.save_model(str(tmp_path / "saved"))
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not {"fade", *MASKED} & written.keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model.eval()))


@pytest.mark.slow
def test_every_new_parameter_changes_within_two_steps(tmp_path: Path) -> None:
    """With the Trainer, from a fade of 0."""
    base = tiny_model(base_config(use_cache=False, **EXTRAS | {"tie_word_embeddings": False}))
    model = grown_model(base)
    before = copy.deepcopy(model.state_dict())
    Trainer(
        model,
        arguments(tmp_path, max_steps=2, weight_decay=0.0),
        train_dataset=DATA,
        callbacks=[FadeCallback(100)],
    ).train()
    assert model.config.fade == 0.02
    for name, new in new_entries(model, base.config).items():
        moved = model.get_parameter(name) != before[name]
        assert moved[new].float().mean() > 0.9, name


@pytest.mark.slow
@pytest.mark.parametrize("read", ["made anew", "read from the checkpoint"])
@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("start", [0.0, 0.2])
def test_resuming_keeps_the_schedule(read: str, restored: bool, start: float, tmp_path: Path) -> None:
    """After an interruption at step 3 of 8, fades and weights equal those of an uninterrupted run."""
    whole = small_grown_model(start)
    wanted = Recorder(6)
    Trainer(whole, arguments(tmp_path / "whole"), train_dataset=DATA, callbacks=[wanted]).train()

    options = {"save_strategy": "steps", "save_steps": 3}
    first = Recorder(6)
    stopped = Trainer(
        small_grown_model(start), arguments(tmp_path / "run", **options), train_dataset=DATA, callbacks=[first]
    )
    stopped.add_callback(StopAt(3))
    stopped.train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert json.loads((checkpoint / "config.json").read_text())["fade"] == pytest.approx(wanted.seen[2])

    model = small_grown_model(start)
    if read == "read from the checkpoint":
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
    second = Recorder(6)
    options |= {"restore_callback_states_from_checkpoint": restored}
    trainer = Trainer(model, arguments(tmp_path / "run", **options), train_dataset=DATA, callbacks=[second])
    trainer.train(resume_from_checkpoint=str(checkpoint))
    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, Recorder))
    assert first.seen + callback.seen == pytest.approx(wanted.seen)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)


def test_finished_growth_resumes_as_an_ordinary_model(tmp_path: Path) -> None:
    """A checkpoint at fade 1 has no fade, and resuming is not refused."""
    options = {"save_strategy": "steps", "save_steps": 4}
    first = arguments(tmp_path, max_steps=4, **options)
    Trainer(small_grown_model(), first, train_dataset=DATA, callbacks=[FadeCallback(3)]).train()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert model.config.fade is None
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=DATA, callbacks=[FadeCallback(3)])
    assert trainer.train(resume_from_checkpoint=True).global_step == 8


def test_schedule_can_start_at_a_later_step(tmp_path: Path) -> None:
    """From the checkpoint of a training without the callback."""
    options = {"save_strategy": "steps", "save_steps": 2}
    Trainer(small_grown_model(), arguments(tmp_path, max_steps=2, **options), train_dataset=DATA).train()
    callback = Recorder(4)
    trainer = Trainer(small_grown_model(), arguments(tmp_path, **options), train_dataset=DATA, callbacks=[callback])
    trainer.train(resume_from_checkpoint=True)
    assert callback.seen == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_best_model_has_its_own_fade(tmp_path: Path) -> None:
    """If it is loaded at the end."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "learning_rate": 3.0}
    model = small_grown_model()
    trainer = Trainer(
        model,
        arguments(tmp_path, **options),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        callbacks=[FadeCallback(8)],
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 8  # with this learning rate
    assert model.config.fade == best / 8
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert torch.equal(logits(saved), logits(model.eval()))


def test_mask_of_another_poly_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class that ACT2FN knows may come from the folder of another model: that of the first that was loaded."""
    fields: dict[str, Any] = {"hidden_act": "poly_norm", "masked_neurons": 11, "fade": 0.4}
    expected = tiny_model(**fields)
    kind = modeling_gda.PolyNorm

    class Twin(torch.nn.Module):
        forward, _mean = kind.forward, staticmethod(kind._mean)

        def __init__(self) -> None:
            super().__init__()
            vars(self).update(vars(kind()))
            torch.nn.init.zeros_(self.weight)

    Twin.__name__ = "PolyNorm"
    monkeypatch.setitem(ACT2FN, "poly_norm", Twin)
    model = tiny_model(**fields)
    assert type(model.model.layers[0].mlp.act_fn) is Twin
    assert torch.equal(model(token_ids(2, 9)).logits, expected(token_ids(2, 9)).logits)
    assert GDAForCausalLM(tiny_config(**fields)).model.layers[0].mlp.act_fn.weight.tolist() == pytest.approx(
        [1 / 3] * 3
    )


def test_callback_with_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small_grown_model(), peft.LoraConfig(r=2, target_modules=["o_proj"]))
    Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=DATA, callbacks=[FadeCallback(4)]).train()
    assert model.config.fade == 0.5


def test_callback_refuses_bad_input(tmp_path: Path) -> None:
    """One line each: no steps, no fade, and another number of steps than the checkpoint's."""
    with pytest.raises(ValueError, match="num_steps of at least 1, not 0"):
        FadeCallback(0)
    plain = Trainer(tiny_model(), arguments(tmp_path), train_dataset=DATA, callbacks=[FadeCallback(4)])
    with pytest.raises(ValueError, match=r"no fade.*gda grow --masked"):
        plain.train()
    options = {"save_strategy": "steps", "save_steps": 2}
    short = arguments(tmp_path, max_steps=2, **options)
    Trainer(small_grown_model(), short, train_dataset=DATA, callbacks=[FadeCallback(4)]).train()
    other = Trainer(
        small_grown_model(), arguments(tmp_path, **options), train_dataset=DATA, callbacks=[FadeCallback(5)]
    )
    with pytest.raises(ValueError, match="pass num_steps=4"):
        other.train(resume_from_checkpoint=True)


# ------------------------------------------------------------------------------------------------------------- gda grow


def saved(folder: Path, config: GDAConfig, **options: Any) -> Path:
    tiny_model(config).save_pretrained(folder, **options)
    return folder


def wanted_config(base: GDAConfig) -> GDAConfig:
    """The result of `--signal 2 --mlp 1.5 --depth 3` on two layers: a third one at the end, with its λ_init."""
    config = copy.deepcopy(base)
    config.num_attention_heads = 2 * base.num_signal_heads + base.num_noise_heads
    config.intermediate_size = 60
    config.num_hidden_layers = 3
    config.layer_types = ["full_attention"] * 3
    config.lambda_init = [0.25, 0.4, 0.4]
    config.fade = 0.0
    config.masked_signal_heads, config.masked_neurons, config.masked_layers = base.signal_group_size, 20, [2]
    return config


@pytest.mark.slow
@each_layout
@pytest.mark.parametrize(
    ("lambda_type", "fields"),
    [("reparameterized", EXTRAS), ("sigmoid", {}), ("tanh", EXTRAS | {"qk_rank": 3, "tie_word_embeddings": False})],
    ids=["reparameterized", "sigmoid", "tanh at a rank"],
)
def test_grow_masked_keeps_the_logits_and_the_old_weights(
    layout: str, lambda_type: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """All three kinds at once, with each method of verification; trainable.json lists exactly the new entries."""
    base = saved(tmp_path / "base", base_config(layout, lambda_type=lambda_type, **fields), max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    report = gda.grow(base, tmp_path / "out", masked=True, signal=2, mlp=1.5, depth=3)
    assert report.verification is not None
    assert report.verification.relative <= ROUNDING
    for method in ("full", "layers", "tensors"):
        assert gda.verify(base, tmp_path / "out", method=method).passed
    old = AutoModelForCausalLM.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wanted = wanted_config(old.config)
    assert {name: getattr(model.config, name) for name in vars(wanted) if not name.startswith("_")} == {
        name: value for name, value in vars(wanted).items() if not name.startswith("_")
    }
    new = Trainable.read(tmp_path / "out")
    before = old.state_dict()
    for name, tensor in model.state_dict().items():
        entries = new.new_entries(name, tensor)
        if "layers.2." in name:
            assert entries is not None
            assert entries.all()
        elif entries is None:
            assert torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor[~entries], before[name].flatten()), name
    model.set_fade(0.3)
    assert relative_error(logits(model), logits(old)) > 1e-4


@each_layout
@each_lambda_type
def test_new_heads_are_where_the_mask_expects_them(layout: str, lambda_type: str, tmp_path: Path) -> None:
    """Head by head."""
    base = tiny_model(base_config(layout, lambda_type=lambda_type, attention_bias=True))
    base.save_pretrained(tmp_path / "base")
    gda.grow(tmp_path / "base", tmp_path / "out", masked=True, signal=3, verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.masked_signal_heads == 2 * base.config.signal_group_size
    for name, tensor in base.state_dict().items():
        rows, columns = places(name, base.config, model.config)
        if "mlp" in name:
            rows = columns = None
        found = model.state_dict()[name]
        found = found if rows is None else found[rows]
        assert torch.equal(found if columns is None else found[:, columns], tensor), name


def test_new_weights_are_initialized_as_in_a_new_model(tmp_path: Path) -> None:
    """Mean and deviation of every tensor of a new layer, and no two are equal."""
    fields = EXTRAS | {"hidden_size": 64, "head_dim": 32, "qk_rank": 8, "initializer_range": 0.03}
    for lambda_type in ("reparameterized", "tanh"):
        base = saved(tmp_path / lambda_type, base_config("paired", lambda_type=lambda_type, **fields))
        gda.grow(base, tmp_path / f"{lambda_type}-out", masked=True, depth=4, mlp=2, signal=2, verify=False)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{lambda_type}-out")
        torch.manual_seed(0)
        fresh = GDAForCausalLM(model.config)
        drawn = []
        for name, tensor in fresh.model.layers[1].state_dict().items():
            found = model.model.layers[1].state_dict()[name]
            if tensor.unique().numel() == 1:
                assert torch.equal(found, tensor), name
                continue
            drawn.append(found.flatten()[:8])
            assert found.std() == pytest.approx(tensor.std().item(), rel=0.5 if tensor.numel() < 100 else 0.1), name
        assert len(torch.stack(drawn).unique(dim=0)) == len(drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masked_growth_in_narrow_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Old weights are unchanged bit for bit, new ones have their dtype, and λ its own."""
    tiny_model(base_config()).to(dtype).save_pretrained(tmp_path / "base")
    report = gda.grow(tmp_path / "base", tmp_path / "out", masked=True, signal=2, depth=4)
    assert report.verification is not None
    assert report.verification.relative <= ROUNDING
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.layers[1].self_attn.q_proj.weight.dtype == dtype


@pytest.mark.slow
def test_llama_is_expanded_and_grown_masked(tmp_path: Path, command: Command) -> None:
    """Then trained to the end, it is an ordinary model."""
    llama = save_llama(tmp_path / "llama", tie_word_embeddings=True)
    done = command("grow", llama, tmp_path / "out", "--masked", "--signal", 2, "--mlp", 1.5, "--depth", 3)
    assert done.code == 0, done.error
    assert "(fade 0)" in done.out
    assert "new layers 2, after layers 1" in done.out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "masked growth" in card
    assert "(fade 0)" in card
    shown = command("inspect", tmp_path / "out")
    assert "the last 2 of each 4 signal heads; the last 20 of 60 neurons; layers 2 (fade 0)" in shown.out
    assert gda.inspect(tmp_path / "out").to_dict()["growth"] == {
        "fade": 0.0,
        "masked_signal_heads": 2,
        "masked_neurons": 20,
        "masked_layers": [2],
        "blended_layers": None,
    }
    assert command("verify", llama, tmp_path / "out").code == 0

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    Trainer(model, arguments(tmp_path / "run", max_steps=3), train_dataset=DATA, callbacks=[FadeCallback(3)]).train()
    model.save_pretrained(tmp_path / "trained")
    assert "fading" not in command("inspect", tmp_path / "trained").out
    assert gda.inspect(tmp_path / "trained").growth is None
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(again), logits(model.eval()))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["gqa", "paired"])
def test_new_layers_as_copies(layout: str, tmp_path: Path) -> None:
    """Every new weight is its neighbour's; exact at 0, gradients above 0, and no field is left at 1."""
    base = saved(tmp_path / "base", base_config(layout, **EXTRAS))
    report = gda.grow(base, tmp_path / "out", masked=True, depth=4, new_layers="copy")
    assert report.verification is not None
    assert report.verification.relative <= ROUNDING
    assert (report.copied_layers, report.new_layers) == ([0, 1], [1, 3])
    for method in ("full", "layers", "tensors"):
        assert gda.verify(base, tmp_path / "out", method=method).passed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.blended_layers
    for name, tensor in model.model.layers[2].state_dict().items():
        assert torch.equal(tensor, model.model.layers[3].state_dict()[name])
    model.set_fade(0.01)
    model(token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
    for layer in (1, 3):
        for name, parameter in model.model.layers[layer].named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
    model.set_fade(1)
    model.save_pretrained(tmp_path / "end")
    fields = json.loads((tmp_path / "end" / "config.json").read_text())
    assert all(fields.get(name) is None for name in ("fade", *FADED))
    at_end = AutoModelForCausalLM.from_pretrained(tmp_path / "end")
    assert torch.equal(logits(at_end), logits(model))
    assert relative_error(logits(at_end), logits(AutoModelForCausalLM.from_pretrained(base))) > 1e-3


def test_blended_layers_are_exported_at_0_only(tmp_path: Path) -> None:
    """At 0 the layer adds nothing; in between no plain layer computes it."""
    base = saved(tmp_path / "base", base_config())
    gda.grow(base, tmp_path / "out", masked=True, depth=3, new_layers="copy")
    gda.export(tmp_path / "out", tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative_error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(model)) <= ROUNDING
    model.set_fade(0.3)
    model.save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match=r"blended with their input \(blended_layers\) at fade=0.3"):
        gda.export(tmp_path / "half", tmp_path / "x")


@pytest.mark.parametrize("options", [{"head_norm": True}, {"kv_layout": "paired", "lambda_init": "schedule"}], ids=str)
def test_llama_gets_a_new_layout_and_new_parts_at_once(options: dict[str, Any], tmp_path: Path) -> None:
    """What conversion and growth fade in has one fade, which is 0. Later it is refused."""
    llama = save_llama(tmp_path / "llama")
    report = gda.grow(llama, tmp_path / "out", masked=True, signal=2, mlp=1.5, depth=3, new_layers="copy", **options)
    assert report.verification is not None
    assert report.verification.relative <= ROUNDING
    gda.convert(llama, tmp_path / "gda", **options)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "gda")
    half.set_fade(0.5)
    half.save_pretrained(tmp_path / "half")
    part = "the head norm" if "head_norm" in options else "λ"
    with pytest.raises(ValueError, match=f"--masked: {part} of the source is at fade 0.5"):
        gda.grow(tmp_path / "half", tmp_path / "x", masked=True, signal=2)


BAD_GROWTH: list[tuple[tuple[object, ...], str]] = [
    (("--masked",), "nothing to grow: pass --signal, --mlp or --depth"),
    (("--mlp", 1.5), "--mlp 1.5 is not an integer of at least 2; a fraction needs --masked"),
    (("--masked", "--hidden", 2), "--hidden cannot be masked, because RMSNorm is over all channels"),
    (("--masked", "--width", 2), "omit --masked or --width"),
    (("--masked", "--signal", 2, "--noise-std", 0.1), "--masked makes none"),
    (("--masked", "--signal", 1), "--signal 1 is not"),
    (("--masked", "--mlp", 1), "--mlp 1 is not more than 1"),
    (("--masked", "--mlp", 0.5), "--mlp 0.5 is not more than 1"),
    (("--masked", "--mlp", "nan"), "--mlp nan is not more than 1"),
    (("--masked", "--mlp", "inf"), "--mlp inf is not more than 1"),
    (("--masked", "--mlp", 1e300), "--mlp 1e+300 is more than 1000"),
    (("--masked", "--mlp", 1.33), "--mlp 1.33 times the 40 neurons of the source is not a whole number"),
    (("--new-layers", "copy", "--depth", 3), "--new-layers is for --masked with --depth"),
    (("--masked", "--new-layers", "copy", "--mlp", 2), "--new-layers is for --masked with --depth"),
    (("--masked", "--depth", 2), "--depth 2 is not more than the 2 layers"),
]


def test_impossible_masked_growth_is_refused(tmp_path: Path, command: Command) -> None:
    """Exit code 2, one line with the option, and no OUT."""
    base = saved(tmp_path / "base", base_config())
    for options, message in BAD_GROWTH:
        done = command("grow", base, tmp_path / "out", *options)
        assert (done.code, done.out) == (2, ""), options
        assert done.error.count("\n") == 1
        assert message in done.error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_growing_model_cannot_grow_again(tmp_path: Path, command: Command) -> None:
    """Until its fade is 1. Factorization and folding work, and export writes what the model computes now."""
    base = saved(tmp_path / "base", base_config(lambda_init=0.0))
    gda.grow(base, tmp_path / "out", masked=True, signal=2)
    done = command("grow", tmp_path / "out", tmp_path / "x", "--signal", 2)
    assert (done.code, done.out) == (2, "")
    assert "masked growth" in done.error
    exported = gda.export(tmp_path / "out", tmp_path / "plain")
    assert exported.verification.passed
    plain, grown = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("plain", "out"))
    assert relative_error(logits(plain), logits(grown)) <= ROUNDING
    shared = gda.convert(tmp_path / "out", tmp_path / "shared", qk_rank=8)
    assert shared.config.fade == 0.0
    folded = gda.fold(tmp_path / "shared", tmp_path / "folded")
    assert folded.config.masked_signal_heads == 3
    assert gda.verify(base, tmp_path / "out").passed


@pytest.mark.slow
@needs_smollm2
def test_smollm2_text_does_not_change(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct with 94 million new parameters at fade 0: equal logits and text."""
    report = gda.grow(find_demo_model(), tmp_path / "grown", masked=True, signal=2, mlp=1.5, depth=36)
    assert (report.num_parameters_before, report.num_parameters) == (137_840_448, 231_409_728)
    assert report.verification is not None
    assert report.verification.relative <= ROUNDING
    assert report.verification.greedy_match == 1.0
