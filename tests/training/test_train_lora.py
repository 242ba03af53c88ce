"""LoRA beside λ: the trained parameters, checkpoints, resuming, and the plain model that results."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

import gda
from gda.training import FadeCallback
from gda.training.lora import LEARNED_FILE, merged
from gda.training.parameters import choose_what_learns, count_learning
from gda.training.trainer import GDATrainer

from ..support.llamas import save_llama, tensors_of
from ..support.tiny import make_asymmetric, relative_error, tiny_config, tiny_model, token_ids

pytestmark = pytest.mark.slow

peft = pytest.importorskip("peft")

RANK = 2
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {"attention_bias": True, "head_norm": True},
    "paired, tanh": {"kv_layout": "paired", "num_key_value_heads": 4, "lambda_type": "tanh"},
    "paired at a rank": {"kv_layout": "paired", "num_key_value_heads": 4, "qk_rank": 3, "attention_bias": True},
    "tied": {"tie_word_embeddings": True, "lambda_type": "sigmoid"},
}
WHOLE = ("lambda_", "subln", "_up.")
each_model = pytest.mark.parametrize("name", MODELS)
DATA = [{"input_ids": ids, "labels": ids} for ids in token_ids(24, 8)]


def model_of(name: str) -> Any:
    return tiny_model(**MODELS[name] | {"use_cache": False})


def adapted(name: str, folder: Path, seed: int = 0) -> Any:
    return choose_what_learns(model_of(name), "lora", folder, RANK, seed=seed)


def trainer(model: Any, folder: Path, callbacks: tuple[TrainerCallback, ...] = (), **options: Any) -> GDATrainer:
    plain: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": 3,
        "seed": 5,
    }
    evaluated = options.pop("eval_dataset", None)
    arguments = TrainingArguments(output_dir=str(folder), **plain | options)
    return GDATrainer(
        model,
        arguments,
        train_dataset=DATA,
        eval_dataset=evaluated,
        lambda_learning_rate=0.05,
        callbacks=[FadeCallback(5, 0.3), *callbacks],
    )


class StopAt(TrainerCallback):
    """Stops training after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(token_ids(2, 9)).logits


@each_model
def test_lora_and_lambda_are_trained(name: str, tmp_path: Path) -> None:
    """They change and are counted; others keep their bits, and the initial function is the same."""
    model = adapted(name, tmp_path)
    torch.testing.assert_close(logits(model.eval()), logits(model_of(name)))
    before = {each: parameter.detach().clone() for each, parameter in model.named_parameters()}
    trainer(model, tmp_path, save_strategy="no").train()
    moved = {each for each, parameter in model.named_parameters() if not torch.equal(parameter, before[each])}
    assert moved == {each for each in before if ".lora_" in each or any(part in each for part in WHOLE)}
    assert count_learning(model) == sum(before[each].numel() for each in moved)
    targets = {each.split(".")[-4] for each in moved if ".lora_A." in each}
    rank = {"q_base", "q_down", "k_base", "k_down"} if "rank" in name else {"q_proj", "k_proj"}
    assert targets == rank | {"v_proj", "o_proj"}


def test_seed_of_lora() -> None:
    """Initialization depends on it and leaves the global random state unchanged."""
    models = [model_of("gqa") for _ in range(3)]
    state = torch.get_rng_state()
    made = [choose_what_learns(each, "lora", "", RANK, seed=seed) for each, seed in zip(models, (1, 1, 2), strict=True)]
    a, b, c = (each.state_dict() for each in made)
    assert torch.equal(torch.get_rng_state(), state)
    differing = {each for each in a if not torch.equal(a[each], c[each])}
    assert all(torch.equal(a[each], b[each]) for each in a)
    assert differing
    assert all(".lora_A." in each for each in differing)


@each_model
def test_merged_model_is_plain(name: str, tmp_path: Path) -> None:
    """It has the logits of the adapted model and the parameter names of the original."""
    model = adapted(name, tmp_path)
    made = trainer(model, tmp_path)
    made.train()
    wanted = logits(model.eval())
    made.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / LEARNED_FILE).exists()
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-6"):
        again, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values())
        assert relative_error(logits(again), wanted) < 1e-5
    plain = merged(model)
    assert type(plain) is gda.GDAForCausalLM
    assert plain.state_dict().keys() == model_of(name).state_dict().keys()
    saved = tensors_of(tmp_path / "saved")
    torch.testing.assert_close(dict(plain.named_parameters()), saved, msg=lambda text: f"saved: {text}")
    assert relative_error(logits(plain), wanted) < 1e-5
    assert merged(plain) is plain


@pytest.mark.slow
@each_model
def test_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    """λ, fade, updates and optimizer are equal; the checkpoint stores the fade."""
    whole = adapted(name, tmp_path)
    trainer(whole, tmp_path / "whole").train()
    trainer(adapted(name, tmp_path), tmp_path / "run", (StopAt(3),)).train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert json.loads((checkpoint / "config.json").read_text())["fade"] == pytest.approx(0.6)
    model = adapted(name, tmp_path, seed=9)  # the initial values do not matter: the checkpoint replaces them
    trainer(model, tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    wanted = whole.state_dict()
    for each, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[each]), each


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    """Although embeddings have no gradient."""
    models = []
    for checkpointing in (False, True):
        model = adapted("gqa", tmp_path)
        trainer(model, tmp_path, save_strategy="no", gradient_checkpointing=checkpointing).train()
        models.append(model.state_dict())
    for each, tensor in models[0].items():
        torch.testing.assert_close(models[1][each], tensor, msg=each)


def test_checkpoints_of_another_training_are_refused(tmp_path: Path) -> None:
    """Without learned.safetensors, or with that of another run: other parameters, another rank or scale, or none."""
    trainer(adapted("gqa", tmp_path), tmp_path / "run", (StopAt(3),)).train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    with pytest.raises(ValueError, match="it differs in base_model"):
        trainer(adapted("tied", tmp_path), tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    rank = choose_what_learns(model_of("gqa"), "lora", tmp_path, RANK + 1)
    with pytest.raises(ValueError, match=r"it differs in base_model.*lora_A"):
        trainer(rank, tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    scaled = adapted("gqa", tmp_path)
    for module in scaled.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = 4.0
    with pytest.raises(ValueError, match="it differs in the scale of base_model"):
        trainer(scaled, tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    save_file(load_file(checkpoint / LEARNED_FILE), checkpoint / LEARNED_FILE)
    with pytest.raises(ValueError, match="it differs in the scale of base_model"):
        trainer(adapted("gqa", tmp_path), tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / LEARNED_FILE).unlink()
    with pytest.raises(ValueError, match=f"{LEARNED_FILE} is missing"):
        trainer(adapted("gqa", tmp_path), tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))


def test_checkpoint_with_modules_that_are_trained_in_full(tmp_path: Path) -> None:
    """As trainable.json asks for after growth: the plain model has the trained copies."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model_of("gqa"), config)
    trainer(model, tmp_path, save_steps=6).train()
    ids = token_ids(2, 9)
    plain, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6", output_loading_info=True)
    assert not any(loading.values())
    assert relative_error(plain.eval()(ids).logits, model.eval()(ids).logits) < 1e-5


def test_checkpoint_of_a_classifier(tmp_path: Path) -> None:
    """It has the classifier's head and class, and no generation config."""
    model = make_asymmetric(gda.GDAForSequenceClassification(tiny_config(num_labels=3, pad_token_id=0)))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    data = [{"input_ids": ids, "labels": torch.tensor(0)} for ids in token_ids(8, 8)]
    options: dict[str, Any] = {"max_steps": 2, "save_steps": 2, "use_cpu": True, "report_to": []}
    GDATrainer(adapted, TrainingArguments(output_dir=str(tmp_path), **options), train_dataset=data).train()
    plain = gda.GDAForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2").eval()
    assert plain.config.architectures == ["GDAForSequenceClassification"]
    assert not (tmp_path / "checkpoint-2" / "generation_config.json").exists()
    ids = token_ids(2, 9)
    assert relative_error(plain(ids).logits, adapted.eval()(ids).logits) < 1e-5


def test_replicated_layers_run() -> None:
    """PEFT's `layer_replication` sets more layers than the config's lists are for."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    model = peft.get_peft_model(model_of("gqa"), config).eval()
    assert len(model.base_model.model.model.layers) == 3
    plain = model_of("gqa").eval()
    plain.model.layers.append(copy.deepcopy(plain.model.layers[1]))
    plain.model.layers[2].self_attn.layer_idx = 2
    plain.config.num_hidden_layers = 3
    ids = token_ids(2, 9)
    assert relative_error(model(ids).logits, plain(ids).logits) < 1e-5


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """Where the highest loss counts as the best, it is that of the first checkpoint."""
    model = adapted("gqa", tmp_path)
    best = {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "loss"}
    run = trainer(model, tmp_path, eval_dataset=DATA, eval_strategy="steps", eval_steps=2, save_steps=2, **best)
    run.train()
    assert run.state.best_global_step == 2
    ids = token_ids(2, 9)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").eval()
    assert relative_error(plain(ids).logits, model.eval()(ids).logits) < 1e-5


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("default", peft.LoraConfig(target_modules=["q_proj"], use_dora=True)),
        ("default", peft.LoraConfig(target_modules=["q_proj"], lora_bias=True)),
        ("default", peft.LoraConfig(target_modules=["embed_tokens"])),
        ("default", peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
        ("mine", peft.LoraConfig(target_modules=["q_proj"])),
    ],
    ids=["DoRA", "biases", "embeddings", "IA3", "name"],
)
def test_other_adapters_are_refused(name: str, config: Any, tmp_path: Path) -> None:
    """Before the first step."""
    with pytest.raises(ValueError, match="can't be merged into the plain model of a checkpoint"):
        trainer(peft.get_peft_model(model_of("gqa"), config, adapter_name=name), tmp_path)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    """Before the first step: a checkpoint could not hold the plain model."""
    model = peft.get_peft_model(model_of("gqa"), peft.LoraConfig(target_modules=["q_proj"]))
    model.base_model.model.is_quantized = True  # as transformers marks them
    with pytest.raises(ValueError, match="quantized weights of this model; load it unquantized"):
        trainer(model, tmp_path)


def test_new_heads_are_trained(tmp_path: Path) -> None:
    """From the exact start of an expansion, where λ is 0, LoRA trains λ and the noise queries."""
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gda", use_cache=False)
    before = copy.deepcopy(model)
    learner = choose_what_learns(model, "lora", tmp_path / "gda", RANK)
    made = trainer(learner, tmp_path / "run", save_strategy="no")
    made.train()
    plain = merged(made.model)
    for layer, old in zip(plain.model.layers, before.model.layers, strict=True):
        assert layer.self_attn.compute_lambda(torch.zeros(1, 1, 32)).abs() > 1e-3
        noise = slice(2 * 8, 3 * 8)  # of the first group of two signal heads
        assert (layer.self_attn.q_proj.weight[noise] != old.self_attn.q_proj.weight[noise]).all()
