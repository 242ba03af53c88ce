"""Trained and decayed parameters, by the names of every layout and by a step with huge decay."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainingArguments

import gda
from gda import GDAForCausalLM
from gda.common.trainable import NewParameters, Trainable
from gda.training.parameters import choose_what_learns, count_learning, decays, is_lambda, optimizer_groups
from gda.training.trainer import GDATrainer, _refuse_deepspeed_optimizer

from ..support.checkpoints import load
from ..support.llamas import save_llama, tensors_of
from ..support.tiny import tiny_model, token_ids

pytestmark = pytest.mark.sampled

LAYOUTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "fewer noise than KV": {"num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 4},
    "paired": {"kv_layout": "paired", "num_key_value_heads": 4},
    "paired at a rank": {"kv_layout": "paired", "num_key_value_heads": 4, "qk_rank": 3},
}
EXTRAS: dict[str, Any] = {
    "head_norm": True,
    "qk_norm": True,
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "poly_norm",
}
# All parameters of a GDA model, by the end of their names.
DECAY = ("embed_tokens.weight", "lm_head.weight", *(f"{name}_proj.weight" for name in ("q", "k", "v", "o")))
DECAY += tuple(f"{name}_proj.weight" for name in ("gate", "up", "down"))
DECAY += tuple(f"{name}_{part}.weight" for name in "qk" for part in ("base", "down", "up"))
LAMBDA = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "lambda_proj.weight")
KEEP = (
    "layernorm.weight",
    "model.norm.weight",
    "q_norm.weight",
    "k_norm.weight",
    "subln.weight",
    "act_fn.weight",
    ".bias",
)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_lambda_type = pytest.mark.parametrize("lambda_type", ["reparameterized", "sigmoid", "tanh"])
DATA = [{"input_ids": ids, "labels": ids} for ids in token_ids(16, 8)]


def model_of(layout: str = "gqa", **fields: Any) -> GDAForCausalLM:
    return tiny_model(**LAYOUTS[layout] | EXTRAS | {"use_cache": False} | fields)


def trainer(model: Any, folder: Path, *, lambda_learning_rate: float | None = None, **options: Any) -> GDATrainer:
    plain: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    arguments = TrainingArguments(output_dir=str(folder), **plain | options)
    return GDATrainer(model, arguments, train_dataset=DATA, lambda_learning_rate=lambda_learning_rate)


@each_layout
@each_lambda_type
def test_every_parameter_is_in_its_group(layout: str, lambda_type: str) -> None:
    """Exactly once, and λ in the last group with its learning rate."""
    model = model_of(layout, lambda_type=lambda_type)
    groups = optimizer_groups(model, learning_rate=1.0, lambda_learning_rate=2.0, weight_decay=3.0)
    assert [(each["lr"], each["weight_decay"]) for each in groups] == [(1.0, 3.0), (1.0, 0.0), (2.0, 0.0)]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [[names[id(parameter)] for parameter in each["params"]] for each in groups]
    assert sorted(name for each in found for name in each) == sorted(names.values())
    for endings, of_group in zip((DECAY, KEEP, LAMBDA), found, strict=True):
        assert of_group
        assert all(name.endswith(endings) for name in of_group), of_group


@each_layout
@each_lambda_type
def test_huge_decay_affects_only_decayed_parameters(layout: str, lambda_type: str, tmp_path: Path) -> None:
    """In an SGD step with tiny gradients, decayed parameters are halved and the others stay."""
    model = model_of(layout, lambda_type=lambda_type)
    before = copy.deepcopy(dict(model.named_parameters()))
    options = {"optim": "adamw_torch", "learning_rate": 1e-6, "weight_decay": 5e5}
    trainer(model, tmp_path, **options).train()
    for name, parameter in model.named_parameters():
        half = 0.5 * before[name] if name.endswith(DECAY) else before[name]
        torch.testing.assert_close(parameter, half, atol=3e-6, rtol=0, msg=name)
        assert decays(name) == name.endswith(DECAY)
        assert is_lambda(name) == name.endswith(LAMBDA)


def test_settings_that_would_lose_the_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers that want all parameters, an optimizer in DeepSpeed's configuration, and model_init."""
    model = model_of("gqa")
    made = trainer(model, tmp_path)
    monkeypatch.setattr(made, "optimizer_cls_and_kwargs", (torch.optim.SGD, {"model": model}))
    with pytest.raises(ValueError, match="the optimizer SGD takes no parameter groups"):
        made.create_optimizer()
    plugin = SimpleNamespace(deepspeed_config={"scheduler": {}})
    with pytest.raises(ValueError, match="remove `scheduler` from DeepSpeed's configuration"):
        _refuse_deepspeed_optimizer(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
    with pytest.raises(ValueError, match="does not support model_init"):
        GDATrainer(None, TrainingArguments(str(tmp_path)), model_init=lambda: model)
    with pytest.raises(ValueError, match="needs a single evaluation dataset"):
        GDATrainer(model, made.args, predicted_per_sequence=8, eval_dataset={"a": DATA})


def test_lambda_alone_is_trained(tmp_path: Path) -> None:
    """The rate of the other parameters may be 0."""
    made = trainer(model_of("gqa"), tmp_path, learning_rate=0.0, lambda_learning_rate=1e-2)
    before = copy.deepcopy(dict(made.model.named_parameters()))
    made.train()
    for name, parameter in made.model.named_parameters():
        assert torch.equal(parameter, before[name]) != is_lambda(name), name
    assert made.state.log_history[0]["lambda_learning_rate"] == 1e-2


@each_lambda_type
def test_lambda_learning_rate(lambda_type: str, tmp_path: Path) -> None:
    """Adam's first step has the size of the learning rate; the log has both rates; by default λ uses the common one."""
    for rate in (1e-2, None):
        model = model_of(lambda_type=lambda_type)
        before = copy.deepcopy(dict(model.named_parameters()))
        made = trainer(model, tmp_path, lambda_learning_rate=rate)
        made.train()
        for name, parameter in model.named_parameters():
            wanted = 1e-2 if rate and is_lambda(name) else 1e-3
            assert (parameter - before[name]).abs().max().item() == pytest.approx(wanted, rel=1e-2), name
        assert made.state.log_history[0]["learning_rate"] == 1e-3
        assert made.state.log_history[0].get("lambda_learning_rate") == rate


@each_layout
@pytest.mark.parametrize("what", ["attention", "all"])
def test_train_attention_and_all(layout: str, what: str, tmp_path: Path) -> None:
    """Frozen parameters keep their bits, and the number of trained parameters is that of the changed ones."""
    model = choose_what_learns(model_of(layout), what, tmp_path, 0)
    before = copy.deepcopy(dict(model.named_parameters()))
    trainer(model, tmp_path, weight_decay=0.1, max_steps=2).train()
    moved = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert moved == {name for name in before if what == "all" or ".self_attn." in name}
    assert count_learning(model) == sum(before[name].numel() for name in moved)


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    """The error names the part; `new` needs trainable.json."""
    with pytest.raises(ValueError, match="--train some is not one of new, attention, all, lora"):
        choose_what_learns(model_of(), "some", tmp_path, 0)
    with pytest.raises(FileNotFoundError, match=r"trainable.json is missing"):
        choose_what_learns(model_of(), "new", tmp_path, 0)


# ------------------------------------------------------------------------------------------------------------------ new


@pytest.mark.parametrize("accumulation", [1, 2])
def test_old_entries_stay_bit_for_bit_under_huge_decay(accumulation: int, tmp_path: Path) -> None:
    """Old entries of partly new parameters; entirely new ones decay."""
    new = [NewParameters(r"model\.layers\.0\.mlp\.up_proj\.weight", None)]
    new += [NewParameters(r"model\.layers\.\d+\.self_attn\.q_proj\.weight", ["0:24,32:56", ":"])]
    Trainable(new, {}).write(tmp_path)
    model = choose_what_learns(model_of(), "new", tmp_path, 0)
    assert count_learning(model) == 40 * 24 + 2 * 16 * 24
    before = copy.deepcopy(dict(model.named_parameters()))
    options = {"weight_decay": 100.0, "max_steps": 3, "gradient_accumulation_steps": accumulation}
    trainer(model, tmp_path, per_device_train_batch_size=2, **options).train()
    for name, parameter in model.named_parameters():
        moved = parameter != before[name]
        if name.endswith("q_proj.weight"):
            assert not moved[:24].any()
            assert not moved[32:56].any()
            assert moved[24:32].all()
            assert moved[56:].all()
            assert (parameter - before[name]).abs().max() < 4e-3
        else:
            assert bool(moved.any()) == (name == "model.layers.0.mlp.up_proj.weight"), name


def test_all_after_new(tmp_path: Path) -> None:
    """In one script, the old entries would stay frozen."""
    new = [NewParameters(r"model\.layers\.0\.self_attn\.q_proj\.weight", ["0:24", ":"])]
    Trainable(new, {}).write(tmp_path)
    model = choose_what_learns(model_of(), "new", tmp_path, 0)
    for what in ("attention", "all", "lora"):
        with pytest.raises(ValueError, match=r"the old part of .*q_proj.weight is frozen; load the model again"):
            choose_what_learns(model, what, tmp_path, 2)
    assert choose_what_learns(model, "new", tmp_path, 0) is model


CONVERSIONS: dict[str, dict[str, Any]] = {
    "expanded": {},
    "more noise heads": {"noise_heads": 4},
    "fewer noise heads than KV heads": {"noise_heads": 1},
    "tanh": {"lambda_type": "tanh"},
    "at a rank": {"qk_rank": 8},
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_train_new_after_an_expansion(conversion: str, bias: bool, tmp_path: Path) -> None:
    """Noise rows and λ change, and signal rows keep the bits of the Llama."""
    llama = save_llama(tmp_path / "llama", attention_bias=bias)
    gda.convert(llama, tmp_path / "gda", verify=False, **CONVERSIONS[conversion])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gda", use_cache=False)
    choose_what_learns(model, "new", tmp_path / "gda", 0)
    before = copy.deepcopy(dict(model.named_parameters()))
    trainer(model, tmp_path, max_steps=2, weight_decay=0.1).train()
    config = model.config
    groups = (config.num_noise_heads, config.signal_noise_ratio + 1, -1)
    for name, parameter in model.named_parameters():
        moved = (parameter != before[name]).flatten(1).any(1) if parameter.dim() > 1 else parameter != before[name]
        if ".q_proj." in name or ".q_down." in name or ".q_up." in name:
            by_head = moved.view(groups)
            assert not by_head[:, :-1].any(), name
            assert by_head[:, -1].any(), name
        else:
            assert bool(moved.any()) == is_lambda(name), name
    if config.qk_rank is None:
        source = tensors_of(llama)
        for name, tensor in model.state_dict().items():
            if ".q_proj." in name:
                signal = tensor.unflatten(0, (config.num_noise_heads, -1, config.head_dim))[:, :-1]
                assert torch.equal(signal.flatten(0, 2), source[name])


def test_new_keys_of_low_rank_are_trainable(tmp_path: Path) -> None:
    """The noise keys' rows of both factors, and no row of signal keys."""
    options: dict[str, Any] = {"kv_layout": "paired", "qk_rank": 2, "verify": False}
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", **options)
    model = choose_what_learns(load(tmp_path / "gda"), "new", tmp_path / "gda", 0)
    attention, rank = model.model.layers[0].self_attn, 2
    for name, width in (("k_down", rank), ("k_up", model.config.head_dim)):
        is_new = getattr(attention, name).weight.new_entries
        heads = is_new.reshape(model.config.num_key_value_heads, width, -1).flatten(1)
        assert heads.all(1).tolist() == [False, True] * (len(heads) // 2), name
        assert heads.any(1).tolist() == [False, True] * (len(heads) // 2), name


@pytest.mark.slow
def test_train_new_after_a_split(tmp_path: Path) -> None:
    """Noise rows, λ and the output projection."""
    save_llama(tmp_path / "llama", num_attention_heads=8, num_key_value_heads=2, head_dim=4)
    (tmp_path / "text.txt").write_text("the one and the other, in and of itself, and then another of the same\n" * 60)
    options: dict[str, Any] = {"calibration": tmp_path / "text.txt", "calibration_tokens": 512, "effort": "fast"}
    gda.convert(tmp_path / "llama", tmp_path / "gda", mode="split", verify=False, **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gda")
    new = Trainable.read(tmp_path / "gda")
    held = {name.split("self_attn.")[-1]: new.new_entries(name, each) for name, each in model.named_parameters()}
    found = {name: bool(each.all()) for name, each in held.items() if each is not None}
    wanted = {name: True for name in held if "lambda_" in name} | {
        "o_proj.weight": True,
        "q_proj.weight": False,
    }
    assert found == wanted
    rows: Tensor = held["q_proj.weight"]  # type: ignore[assignment]
    by_head = rows.view(model.config.num_noise_heads, -1, 4 * 32).all(-1)
    assert by_head[:, -1].all()
    assert not by_head[:, :-1].any()
