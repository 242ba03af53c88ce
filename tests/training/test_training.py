"""Training: loss, gradients, checkpointing, the dead start, embeddings, accumulation, PEFT and the Trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gda import GDAConfig, GDAForCausalLM

VOCAB = 48
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {"num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 2},
    "fewer-noise-than-kv": {"num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 4},
    "paired": {"kv_layout": "paired", "num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 4},
}
LAMBDA_TYPES = ["reparameterized", "sigmoid", "tanh"]
EVERY_PARAMETER = {
    "head_norm": True,
    "qk_norm": True,
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "poly_norm",
}
# The name before transformers 5.23, which these tests and PEFT use.
pytestmark = [pytest.mark.sampled, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_lambda_type = pytest.mark.parametrize("lambda_type", LAMBDA_TYPES)


def tiny_config(layout: str = "shared", lambda_type: str = "reparameterized", **fields: Any) -> GDAConfig:
    return GDAConfig(
        **SIZES | {"bos_token_id": None, "eos_token_id": None} | LAYOUTS[layout] | {"lambda_type": lambda_type} | fields
    )


def tiny_llama(**fields: Any) -> LlamaForCausalLM:
    return scattered(LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, **fields)))


def scattered(model: PreTrainedModel, seed: int = 0) -> Any:
    """Weights far from their initialization: rows of different sizes, norms that are not 1, λ that is not λ_init."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.copy_(0.2 * noise + (1.0 if "norm" in name or "subln" in name else 0.1))
            else:
                rows = torch.linspace(0.5, 1.5, weight.shape[0])[:, None]
                weight.copy_(noise * rows / weight.shape[1] ** 0.5)
    return model


def tiny_model(layout: str = "shared", lambda_type: str = "reparameterized", **fields: Any) -> GDAForCausalLM:
    return scattered(GDAForCausalLM(tiny_config(layout, lambda_type, **fields)))


def token_ids(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def every_token() -> torch.Tensor:
    """(2, VOCAB + 1) ids in which each token occurs before the last position, so that each embedding gets a
    gradient.
    """
    orders = [torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return torch.stack([torch.cat([order, order[:1]]) for order in orders])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def noise_rows(model: GDAForCausalLM, weight: torch.Tensor) -> torch.Tensor:
    """(N · head_dim, hidden): the rows of the noise heads in a q_proj weight or its gradient."""
    config = model.config
    return weight.unflatten(0, (config.num_noise_heads, -1, config.head_dim))[:, -1].flatten(0, 1)


def train(model: nn.Module, ids: torch.Tensor, steps: int, lr: float = 1e-2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@each_layout
@each_lambda_type
def test_loss_is_cross_entropy_of_the_next_token(layout: str, lambda_type: str) -> None:
    """The mean of −log p(next token) over the labels that are not −100, computed by hand."""
    model = tiny_model(layout, lambda_type)
    ids = token_ids()
    labels = ids.clone()
    labels[0, :5] = -100
    output = model(ids, labels=labels)
    log_p = output.logits[:, :-1].float().log_softmax(-1)
    wanted = [-log_p[b, t, labels[b, t + 1]] for b in range(2) for t in range(11) if labels[b, t + 1] != -100]
    assert len(wanted) == 11 + 7
    torch.testing.assert_close(output.loss, torch.stack(wanted).mean())


@each_layout
@each_lambda_type
def test_every_row_of_every_parameter_has_a_gradient(layout: str, lambda_type: str) -> None:
    """λ, noise queries, norms, biases and PolyNorm included."""
    model = tiny_model(layout, lambda_type, **EVERY_PARAMETER)
    ids = every_token()
    model(ids, labels=ids).loss.backward()
    found = gradients(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert (gradient.flatten(1) if gradient.dim() > 1 else gradient[:, None]).abs().amax(1).gt(0).all(), name
    for layer in model.model.layers:
        assert noise_rows(model, layer.self_attn.q_proj.weight.grad).abs().amax(1).gt(0).all()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(("layout", "lambda_type"), [("shared", "sigmoid"), ("paired", "reparameterized")])
def test_gradient_checkpointing_changes_no_gradient(layout: str, lambda_type: str, use_reentrant: bool) -> None:
    """Layers run again in the backward pass, and every gradient is the same."""
    model = tiny_model(layout, lambda_type, head_norm=True, qk_norm=True).train()
    ids = token_ids()
    model(ids, labels=ids).loss.backward()
    wanted = gradients(model)
    model.zero_grad()

    runs: list[int] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, *_: runs.append(module.layer_idx))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model(ids, labels=ids).loss.backward()
    assert runs == [0, 1, 1, 0]
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_gradient_checkpointing_named_in_the_config() -> None:
    """transformers reads this field of older configs. It is used up, and layers run again in the backward pass."""
    config = tiny_config()
    config.gradient_checkpointing = True
    model, runs = GDAForCausalLM(config).train(), []
    assert not hasattr(model.config, "gradient_checkpointing")
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, *_: runs.append(module.layer_idx))
    model(token_ids(), labels=token_ids()).loss.backward()
    assert runs == [0, 1, 1, 0]


@each_layout
@each_lambda_type
def test_model_overfits_a_tiny_batch(layout: str, lambda_type: str) -> None:
    """From its own initialization within a few steps, and λ changes."""
    torch.manual_seed(0)
    model = GDAForCausalLM(tiny_config(layout, lambda_type))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    losses = train(model, token_ids(), steps=25)
    assert losses[-1] < 0.2 * losses[0]
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == set(before)


def test_attention_dropout_is_refused() -> None:
    """Also if it is set after construction."""
    with pytest.raises(ValueError, match=r"attention_dropout.*defines no dropout.*0\.1"):
        tiny_config(attention_dropout=0.1)
    config = tiny_config()
    config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        GDAForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("change", [5, -8])
def test_resized_embeddings_keep_old_logits_and_train(tied: bool, change: int, tmp_path: Path) -> None:
    """Remaining tokens keep their logits, and new ones are trained; tying, loss and saved files follow the new size."""
    model = tiny_model(tie_word_embeddings=tied)
    ids = token_ids().clamp(max=VOCAB - 9)
    wanted = model(ids).logits.detach()
    size, kept = VOCAB + change, min(VOCAB, VOCAB + change)
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied
    logits = model(ids).logits
    assert logits.shape[-1] == size
    torch.testing.assert_close(logits[..., :kept], wanted[..., :kept])

    last = torch.tensor([[3, size - 1, 4, size - 1, 5]])
    model(last, labels=last).loss.backward()
    assert model.model.embed_tokens.weight.grad[size - 1].abs().max() > 0
    assert model.lm_head.weight.grad[size - 1].abs().max() > 0
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(GDAForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)


def parts_of_a_batch() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two micro-batches with different numbers of labels, so that a mean of means is not the mean."""
    ids = token_ids(batch=4)
    labels = ids.clone()
    labels[:2, :8] = -100
    return [(ids[:2], labels[:2]), (ids[2:], labels[2:])]


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_model, lambda: tiny_model("paired", "tanh")])
def test_accumulated_gradients_equal_the_whole_batch(make_model: Callable[[], PreTrainedModel]) -> None:
    """With num_items_in_batch, as for Llama."""
    model = make_model()
    parts = parts_of_a_batch()
    items = sum((labels[:, 1:] != -100).sum() for _, labels in parts)
    whole = model(torch.cat([ids for ids, _ in parts]), labels=torch.cat([labels for _, labels in parts])).loss
    whole.backward()
    wanted = gradients(model)
    model.zero_grad()

    losses = [model(ids, labels=labels, num_items_in_batch=items).loss for ids, labels in parts]
    torch.testing.assert_close(sum(losses), whole)
    means = [model(ids, labels=labels).loss for ids, labels in parts]
    assert abs(sum(means) / 2 - whole) > 1e-3
    sum(losses).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@each_layout
@each_lambda_type
def test_bf16_autocast(layout: str, lambda_type: str) -> None:
    """λ stays in float32, and loss and gradients are close to those of float32."""
    model = tiny_model(layout, lambda_type, **EVERY_PARAMETER)
    ids = every_token()
    wanted = model(ids, labels=ids).loss
    wanted.backward()
    exact = gradients(model)
    model.zero_grad()
    dtypes: dict[str, torch.dtype] = {}
    attention = model.model.layers[0].self_attn
    compute_lambda = attention.compute_lambda
    attention.q_proj.register_forward_hook(lambda _, __, output: dtypes.update(query=output.dtype))

    def watched(hidden_states: torch.Tensor) -> torch.Tensor:
        lambda_ = compute_lambda(hidden_states)
        dtypes["lambda"] = lambda_.dtype
        return lambda_

    attention.compute_lambda = watched
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert dtypes == {"query": torch.bfloat16, "lambda": torch.float32}
    torch.testing.assert_close(loss.float(), wanted, rtol=2e-2, atol=0)
    for name, gradient in gradients(model).items():
        assert gradient.isfinite().all(), name
        cosine = nn.functional.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0)
        assert cosine > 0.9, (name, cosine)


def start_at_zero(model: GDAForCausalLM, kind: str) -> dict[str, nn.Parameter]:
    """Set λ of every layer to exactly 0, and return the parameters of λ."""
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            if kind == "equal pairs":
                attention.lambda_q2.copy_(attention.lambda_q1)
                attention.lambda_k2.copy_(attention.lambda_k1)
            elif kind == "zero vectors":
                for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
                    getattr(attention, name).zero_()
            else:
                attention.lambda_proj.weight.zero_()
    ids = token_ids()
    hidden = model.model.embed_tokens(ids)
    assert all(layer.self_attn.compute_lambda(hidden).eq(0).all() for layer in model.model.layers)
    return {name: weight for name, weight in model.named_parameters() if "lambda" in name}


@each_layout
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("kind", ["equal pairs", "zero projection"])
def test_exact_start_trains_lambda_and_then_noise_heads(
    layout: str, optimizer_class: type[torch.optim.Optimizer], kind: str
) -> None:
    """λ = 0 by equal non-zero pairs, or by tanh of a zero projection: λ has a gradient at step 0, and noise rows
    after it.
    """
    lambda_type = "reparameterized" if kind == "equal pairs" else "tanh"
    model = tiny_model(layout, lambda_type, lambda_init=0.0)
    lambdas = start_at_zero(model, kind)
    ids = token_ids()
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        queries = [noise_rows(model, layer.self_attn.q_proj.weight.grad) for layer in model.model.layers]
        if step == 0:
            assert all(weight.grad.abs().gt(0).all() for weight in lambdas.values())
            assert all(rows.eq(0).all() for rows in queries)
        optimizer.step()
    assert all(rows.abs().amax(1).gt(0).all() for rows in queries)


@each_layout
def test_zero_vectors_are_a_dead_start(layout: str) -> None:
    """λ = 0 from four zero vectors is stationary: neither λ nor a noise row ever changes."""
    model = tiny_model(layout, lambda_init=0.0)
    lambdas = start_at_zero(model, "zero vectors")
    rows = [noise_rows(model, layer.self_attn.q_proj.weight).clone() for layer in model.model.layers]
    losses = train(model, token_ids(), steps=3)
    assert losses[-1] < losses[0]
    assert all(weight.eq(0).all() and weight.grad.eq(0).all() for weight in lambdas.values())
    for layer, before in zip(model.model.layers, rows, strict=True):
        assert torch.equal(noise_rows(model, layer.self_attn.q_proj.weight), before)


@pytest.mark.parametrize(("layout", "lambda_type"), [("shared", "reparameterized"), ("paired", "sigmoid")])
def test_lora(layout: str, lambda_type: str, tmp_path: Path) -> None:
    """On q_proj and o_proj with a frozen base; the saved adapter and the merged model give equal logits."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model(layout, lambda_type),
        peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM", init_lora_weights=True),
    )
    ids = token_ids()
    base = model(ids).logits.detach()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".self_attn.")[1].split(".lora_")[0] for name in trained} == {"q_proj", "o_proj"}
    losses = train(model, ids, steps=8, lr=3e-2)
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    wanted = model(ids).logits.detach()
    assert (wanted - base).abs().max() > 0.1

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(layout, lambda_type), tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, wanted)
    merged = again.merge_and_unload()
    assert type(merged) is GDAForCausalLM
    torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("layout", "lambda_type"), [("shared", "reparameterized"), ("paired", "tanh")])
def test_trainer(layout: str, lambda_type: str, tmp_path: Path) -> None:
    """With accumulation, three steps change every parameter, and the saved model reloads bit for bit."""
    from transformers import Trainer, TrainingArguments

    model = tiny_model(layout, lambda_type, head_norm=True, use_cache=False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    data = [{"input_ids": ids, "labels": ids} for ids in token_ids(batch=12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    assert trainer.model_accepts_loss_kwargs
    assert trainer.train().global_step == 3
    trained = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert trained == set(before)

    trainer.save_model(str(tmp_path / "saved"))
    assert [path.name for path in (tmp_path / "saved").glob("*.safetensors")] == ["model.safetensors"]
    again = GDAForCausalLM.from_pretrained(tmp_path / "saved")
    for name, weight in again.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "with LoRA"])
def test_label_smoothing_predicts_the_next_token(wrapped: bool, tmp_path: Path) -> None:
    """The Trainer shifts the labels itself, of language models that it knows by name."""
    from transformers import Trainer, TrainingArguments

    from gda.training.trainer import GDATrainer

    model: Any = tiny_model()
    if wrapped:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    model.eval()
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    found = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    log_probabilities = model(ids).logits[:, :-1].log_softmax(-1)
    of_next = -log_probabilities.gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(found, 0.9 * of_next - 0.1 * log_probabilities.mean())
    trainer = GDATrainer(model, arguments, predicted_per_sequence=8)
    dataset = [{"input_ids": each, "labels": each} for each in ids]
    assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(found.item(), rel=1e-5)
