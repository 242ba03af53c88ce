"""Splitting a Llama's heads: which tensors stay, which are fitted and trained, and what is reported."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, GenerationConfig

import gda
from gda.common.perplexity import perplexity
from gda.conversion.options import ConvertOptions
from gda.conversion.split import calibration, distill, fit, sampling
from gda.conversion.split import report as report_module
from gda.conversion.split import splitter as split_module
from gda.conversion.split.calibration import read_calibration, shares, text_beginnings
from gda.conversion.split.distill import ATTENTION, BATCH, BETAS, Distillation, Plan
from gda.conversion.split.heads import RIDGE, Moments
from gda.conversion.split.rows import SHORT, Rows, whole
from gda.conversion.split.sampling import sampled
from gda.conversion.split.work import Work
from gda.conversion.tensors.layerwise import LayerwiseModel, layer_prefix
from gda.conversion.verify import VerificationFailed

from ..support.checkpoints import load
from ..support.commands import Command
from ..support.gguf_files import SHAPE, write_gguf
from ..support.llama_like import save_source
from ..support.llamas import VARIANTS, byte_tokenizer, files_of, llama_model, save_llama, tensors_of
from ..support.splitting import (
    CONTEXT,
    HELD_OUT,
    STEPS,
    TOKENS,
    brief,
    captured,
    measured_windows,
    order_of,
    save_text,
    short_and_whole,
    split,
    windows_of,
)
from ..support.tiny import relative_error

__all__ = ["brief"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("brief")]

# By name: a Llama, and how it is split.
SPLITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gqa 4/2, 1:1": ({}, {}),
    "mqa 4/1, 3:1": (VARIANTS["mqa"], {}),
    "mqa 4/1, 1:1": (VARIANTS["mqa"], {"ratio": "1:1"}),
    "9/3, 2:1": (VARIANTS["odd heads 9/3"], {}),
    "8/2, 3:1": ({"num_attention_heads": 8, "hidden_size": 64}, {"ratio": 3}),
    "8/2, 1:1": ({"num_attention_heads": 8, "hidden_size": 64}, {"noise_heads": 4}),
    "attention_bias": (VARIANTS["attention_bias"], {}),
    "mlp_bias": (VARIANTS["mlp_bias"], {}),
    "tied": (VARIANTS["tied"], {}),
    "head_dim": (VARIANTS["head_dim"], {}),
    "llama3 rope": (VARIANTS["llama3"], {}),
    "bf16, shards": (VARIANTS["shards"], {}),
}
each_split = pytest.mark.parametrize("name", SPLITS)


def save_variant(folder: Path, name: str) -> Path:
    return save_llama(folder, **SPLITS[name][0])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 query heads over 2 KV heads, beside a text. Tests must not change it."""
    folder = tmp_path_factory.mktemp("sources")
    save_text(folder / "text.txt")
    return save_llama(folder / "llama")


def mean_kl(source: Any, result: Any, ids: Tensor) -> float:
    """KL(source ‖ result) in nats per token."""
    with torch.no_grad():
        expected, found = (model(ids, use_cache=False).logits.log_softmax(-1) for model in (source, result))
    return kl_div(found, expected, reduction="none", log_target=True).sum(-1).mean().item()


# ------------------------------------------------------------------------------------------------------ the closed form


@each_split
def test_untrained_rows_equal_the_source(name: str, tmp_path: Path) -> None:
    """q, k, v and their biases consist of rows of the source, bit for bit and in its dtype.

    The rows of q are those in the report. All other tensors except o_proj and λ are unchanged.
    """
    source = save_variant(tmp_path / "llama", name)
    report = split(source, tmp_path / "gda", **SPLITS[name][1])
    expected, got = tensors_of(source), tensors_of(tmp_path / "gda")
    head_dim, noise = report.config.head_dim, report.config.num_noise_heads
    for key, tensor in got.items():
        if ".lambda_" in key or key.endswith(".o_proj.weight"):
            continue
        wanted = expected.pop(key)
        if ".q_proj." in key:
            order = order_of(report.split.layers[int(key.split(".")[2])], noise)
            assert sorted(order) == list(range(report.config.num_attention_heads))
            wanted = torch.cat([wanted[head * head_dim : (head + 1) * head_dim] for head in order])
        assert tensor.dtype == wanted.dtype, key
        assert torch.equal(tensor, wanted), key
    assert all(key.endswith(".o_proj.weight") for key in expected)


@each_split
def test_output_projection_is_a_least_squares_fit(name: str, tmp_path: Path) -> None:
    """Compared with lstsq in float64 on activations of transformers' Llama; errors are compared as well.

    A squared error is divided by the mean square of the state after the attention; first tokens count many times.
    """
    source = save_variant(tmp_path / "llama", name)
    report = split(source, tmp_path / "gda", dtype="float32", **SPLITS[name][1])
    fitted, _ = windows_of(source, tmp_path / "text.txt")
    model, kinds = load(source).double(), short_and_whole(source, fitted)
    seen = [captured(model, lambda layer: layer.self_attn.o_proj, each) for each in kinds]
    states = [captured(model, lambda layer: layer.post_attention_layernorm, each) for each in kinds]
    weights = tensors_of(source)
    for index, layer in enumerate(report.split.layers):
        roots = []
        for ids, of_kind in zip(kinds, states, strict=True):
            size = of_kind[index][0].square().mean(-1) + model.config.rms_norm_eps
            first = torch.ones(ids.shape, dtype=torch.float64)
            first[:, 0] = fit.FIRST_TOKEN_WEIGHT
            roots.append((first.flatten() / size).sqrt()[:, None])
        root = torch.cat(roots)
        heads, output = (torch.cat([each[index][part] for each in seen]) for part in (0, 1))
        of = heads.unflatten(1, (-1, report.config.head_dim))
        signal = torch.tensor(layer.signal_heads)
        noise = torch.tensor(layer.noise_heads).repeat_interleave(len(signal) // len(layer.noise_heads))
        features = root * (of[:, signal] - layer.lambda_ * of[:, noise]).flatten(1)
        target = root * (output - weights.get(f"{layer_prefix(index)}self_attn.o_proj.bias", torch.zeros(1)).double())
        # With a ridge: additional rows that pull every weight towards 0, too weakly to affect the error.
        ridge = math.sqrt(RIDGE * features.square().sum(0).mean()) * torch.eye(features.shape[1], dtype=torch.float64)
        asked = torch.cat([target, torch.zeros(len(ridge), target.shape[1], dtype=torch.float64)])
        weight = torch.linalg.lstsq(torch.cat([features, ridge]), asked).solution.T
        written = tensors_of(tmp_path / "gda")[f"{layer_prefix(index)}self_attn.o_proj.weight"]
        assert ((written - weight).norm() / weight.norm()).item() < 1e-4
        best = torch.linalg.lstsq(features, target).solution
        left = (target - features @ best).square().sum() / target.square().sum()
        assert layer.error_after == pytest.approx(left.item(), rel=1e-3)
        old = weights[f"{layer_prefix(index)}self_attn.o_proj.weight"].double()
        kept = old.unflatten(1, (-1, report.config.head_dim))[:, signal].flatten(1)
        left = (target - features @ kept.T).square().sum() / target.square().sum()
        assert layer.error_before == pytest.approx(left.item(), rel=1e-3)


def test_moments_of_a_narrow_source_are_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The activations of a bfloat16 source are float32."""
    seen = []
    right = fit.split_layer

    def watched(moments: Moments, output: Tensor, **options: Any) -> Any:
        seen.append({moments.heads.dtype, moments.cross.dtype, moments.target.dtype})
        return right(moments, output, **options)

    monkeypatch.setattr(fit, "split_layer", watched)
    split(save_llama(tmp_path / "llama", dtype=torch.bfloat16), tmp_path / "gda")
    assert seen == [{torch.float64}] * 2


# -------------------------------------------------------------------------------------------------- the resulting model


@pytest.mark.parametrize("effort", ["fast", "default"])
@pytest.mark.parametrize("lambda_type", ["reparameterized", "tanh", "sigmoid"])
def test_result_matches_the_report(lambda_type: str, effort: str, llama: Path, tmp_path: Path) -> None:
    """λ, perplexities and the subtracted share, measured again on the loaded model."""
    report = split(llama, tmp_path / "gda", effort=effort, lambda_type=lambda_type).split
    fitted, held_out = windows_of(llama, llama.parent / "text.txt")
    assert (report.tokens, report.held_out_tokens) == (fitted.numel(), held_out.numel())
    assert report.steps == {"fast": 0, "default": STEPS}[effort]
    model = load(tmp_path / "gda")
    assert isinstance(model, gda.GDAForCausalLM)
    ids = held_out.flatten()
    assert report.perplexity_source == pytest.approx(perplexity(load(llama), ids, context=CONTEXT), rel=1e-4)
    assert report.perplexity == pytest.approx(perplexity(model, ids, context=CONTEXT), rel=1e-4)
    assert (report.perplexity_closed_form == report.perplexity) == (effort == "fast")
    texts = {each.text: each for each in report.texts}
    measured = measured_windows(llama, llama.parent / "text.txt")
    for name, here in (("text.txt", held_out), ("the documentation of Python", measured[2:])):
        before, after = (perplexity(each, here.flatten(), context=CONTEXT) for each in (load(llama), model))
        assert texts[name].ratio == pytest.approx(after / before, rel=1e-4)
    entering = captured(model, lambda layer: layer.input_layernorm, measured)
    features = captured(model, lambda layer: layer.self_attn.o_proj, measured)
    for index, layer in enumerate(report.layers):
        attention = model.model.layers[index].self_attn
        states = entering[index][1].view(*measured.shape, -1)
        with torch.no_grad():
            lambda_ = attention.compute_lambda(states)
        assert layer.lambda_ == pytest.approx(lambda_.mean().item(), rel=1e-4, abs=1e-6)
        got = features[index][0] @ attention.o_proj.weight.T
        assert 0 <= layer.subtracted < 1
        if lambda_type != "reparameterized":
            continue
        # Without the subtraction, the features differ only by λ o_noise.
        hook = attention.subtract.register_forward_pre_hook(lambda _, given: (*given[:2], torch.zeros_like(given[2])))
        undivided = (
            captured(model, lambda layer: layer.self_attn.o_proj, measured)[index][0] @ attention.o_proj.weight.T
        )
        hook.remove()
        share = (undivided - got).square().sum() / got.square().sum()
        assert layer.subtracted == pytest.approx(share.item(), rel=1e-3)


def test_lambda_init_matches_the_report(llama: Path, tmp_path: Path) -> None:
    """After the closed form, each layer has one of the λ that are tried, and none is 0."""
    report = split(llama, tmp_path / "gda")
    lambdas = json.loads((tmp_path / "gda" / "config.json").read_text())["lambda_init"]
    assert len(lambdas) == 2
    assert [layer.lambda_ for layer in report.split.layers] == pytest.approx(lambdas, abs=1e-6)
    assert gda.inspect(tmp_path / "gda").lambdas == pytest.approx(lambdas, abs=1e-6)
    assert all(lambda_ > 0 for lambda_ in lambdas)


@pytest.mark.parametrize("effort", ["fast", "default"])
@pytest.mark.parametrize("lambda_type", ["reparameterized", "tanh", "sigmoid"])
def test_result_is_trainable(lambda_type: str, effort: str, llama: Path, tmp_path: Path) -> None:
    """Every λ parameter and every noise row has a gradient, at once or after one step if λ is still 0."""
    report = split(llama, tmp_path / "gda", effort=effort, lambda_type=lambda_type)
    model = load(tmp_path / "gda").train()
    _, held_out = windows_of(llama, llama.parent / "text.txt")

    def gradients() -> None:
        model.zero_grad()
        logits = model(held_out, use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten()).backward()

    gradients()
    for name, parameter in model.named_parameters():
        if ".lambda_" in name:
            assert parameter.grad.abs().max() > 0, name
            assert (parameter.grad != 0).float().mean() > 0.9, name
    if lambda_type == "tanh" and effort == "fast":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lambda_" in name:
                    parameter -= 0.1 * parameter.grad
        gradients()
    for layer in model.model.layers:
        rows = layer.self_attn.q_proj.weight.grad.unflatten(0, (report.config.num_noise_heads, -1, 8))
        assert (rows[:, -1].norm(dim=-1) > 0).all()
        assert (rows[:, :-1].norm(dim=-1) > 0).all()


# ------------------------------------------------------------------------------------------------------------- training


def test_training_reduces_kl_and_changes_only_attention(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the training text and on held-out text."""
    monkeypatch.setattr(split_module, "EFFORTS", {"fast": 0, "default": 30})
    monkeypatch.setattr(distill, "RELATIVE_LEARNING_RATE", 0.02)
    split(llama, tmp_path / "fast")
    report = split(llama, tmp_path / "gda", effort="default")
    source, closed_form, trained = load(llama), load(tmp_path / "fast"), load(tmp_path / "gda")
    for windows in windows_of(llama, llama.parent / "text.txt"):
        assert mean_kl(source, trained, windows) < 0.97 * mean_kl(source, closed_form, windows)
    before, after = tensors_of(tmp_path / "fast"), tensors_of(tmp_path / "gda")
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (".self_attn." not in name), name
    assert report.config.lambda_init == gda.GDAConfig.from_pretrained(tmp_path / "fast").lambda_init


@pytest.mark.parametrize(("keeps_graphs", "cut"), [(False, True), (True, False)])
@pytest.mark.parametrize("variant", ["gqa", "mlp_bias", "tied", "qwen3", "mistral"])
@pytest.mark.parametrize("lambda_type", ["reparameterized", "tanh"])
def test_layerwise_gradients_equal_autograd(
    lambda_type: str, variant: str, keeps_graphs: bool, cut: bool, tmp_path: Path
) -> None:
    """One step against autograd through `GDAForCausalLM`, for every attention tensor, also on short sequences."""
    if variant in VARIANTS:
        source = save_llama(tmp_path / "source", **VARIANTS[variant])
    else:
        options = {"qwen3": {"head_dim": 8}, "mistral": {"sliding_window": 6}}[variant]
        source = save_source(tmp_path / "source", variant, **options)
    split(source, tmp_path / "gda", lambda_type=lambda_type, noise_heads=2)
    fitted, _ = windows_of(source, tmp_path / "text.txt")
    rows = Rows(fitted[:BATCH], torch.tensor([cut] * BATCH))
    ids = rows.ids.view(-1, SHORT) if cut else rows.ids
    teacher, student = load(source), load(tmp_path / "gda")
    tensors = student.state_dict()
    with torch.no_grad():
        wanted = []
        hook = teacher.model.norm.register_forward_hook(lambda _module, inputs, _output: wanted.append(inputs[0]))
        expected = teacher(ids, use_cache=False).logits.log_softmax(-1)
        hook.remove()

    def of_layer(layer: int) -> dict[str, Tensor]:
        prefix = layer_prefix(layer)
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix + ATTENTION)}

    streamed = Distillation(
        LayerwiseModel(student.config, lambda name: tensors[name]),
        of_layer,
        Work(tmp_path / "work", {}),
        keeps_graphs=keeps_graphs,
    )
    plan = Plan(1, 0, mixed_precision=False)
    assert sorted(plan.batch(0, rows).tolist()) == list(range(BATCH))
    (loss,) = streamed.train(plan, rows, wanted[0].view(BATCH, CONTEXT, -1))

    found = student(ids, use_cache=False).logits.log_softmax(-1)
    total = kl_div(found, expected, reduction="sum", log_target=True) / ids.numel()
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    for layer, means in enumerate(streamed.means):
        attention = dict(student.model.layers[layer].self_attn.named_parameters(prefix="self_attn"))
        assert set(means) == set(attention)
        for name, mean in means.items():
            gradient = mean / (1 - BETAS[0])  # after a first step
            if lambda_type == "tanh" and name.endswith(("q_norm.weight", "lambda_proj.weight")):
                assert attention[name].grad.abs().max() > 0
            assert relative_error(gradient, attention[name].grad) < 1e-5, (layer, name)


def test_updates_equal_adam(llama: Path, tmp_path: Path) -> None:
    """After three steps, weights equal those of torch.optim.Adam."""
    split(llama, tmp_path / "gda")
    tensors = load(tmp_path / "gda").state_dict()
    fitted, _ = windows_of(llama, llama.parent / "text.txt")
    work = Work(tmp_path / "work", {})

    def of_layer(layer: int) -> dict[str, Tensor]:
        prefix = layer_prefix(layer)
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix + ATTENTION)}

    distillation = Distillation(LayerwiseModel(load(tmp_path / "gda").config, tensors.__getitem__), of_layer, work)
    name = "self_attn.o_proj.weight"
    ours = distillation.weights[0][name]
    theirs = torch.nn.Parameter(ours.clone())
    adam = torch.optim.Adam([theirs], betas=BETAS, eps=1e-12)
    plan = Plan(3, 0, mixed_precision=False)
    gradients: list[Tensor] = []
    before = torch.zeros_like(ours)
    states = torch.randn(len(fitted), CONTEXT, 32, generator=torch.Generator().manual_seed(0))
    for step, _ in enumerate(distillation.train(plan, whole(fitted), states)):
        mean = distillation.means[0][name]
        gradients.append((mean - BETAS[0] * before) / (1 - BETAS[0]))
        before = mean.clone()
        size = tensors[layer_prefix(0) + name].square().mean().sqrt().item()
        adam.param_groups[0]["lr"] = distill.RELATIVE_LEARNING_RATE * size * plan.rate(step)
        theirs.grad = gradients[-1]
        adam.step()
    assert len(gradients) == 3
    assert relative_error(ours, theirs.detach()) < 1e-5


def test_every_row_is_read_once_per_epoch() -> None:
    """For any number of rows, those of a step all of one kind; the order depends on the seed."""
    for count in (1, 2, 4, 5, 7, 40):
        plan = Plan(30, 0, mixed_precision=False)
        rows = Rows(torch.zeros(count, CONTEXT), torch.arange(count) % 3 == 2)
        steps = sum(-(-int((rows.is_cut == kind).sum()) // BATCH) for kind in (False, True))
        for epoch in range(2):
            drawn = [plan.batch(epoch * steps + step, rows) for step in range(steps)]
            assert sorted(torch.cat(drawn).tolist()) == list(range(count))
            assert all(len(set(rows.is_cut[batch].tolist())) == 1 for batch in drawn)
    assert plan.batch(0, rows).tolist() != Plan(30, 1, mixed_precision=False).batch(0, rows).tolist()
    assert plan.rate(0) > 0
    assert max(map(plan.rate, range(30))) <= 1
    assert plan.rate(29) < 0.1


# -------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mistral", {"sliding_window": 6}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("qwen3", {"head_dim": 8}),
        ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True, "dtype": torch.bfloat16}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_mistral_and_qwen(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """The source's perplexity equals that of transformers' class, within and beyond windows; the result's equals the
    report.
    """
    source = save_source(tmp_path / "source", model_type, **changes)
    report = split(source, tmp_path / "gda", effort="default", dtype="float32", verify=True)
    _, held_out = windows_of(source, tmp_path / "text.txt")
    ids = held_out.flatten()
    assert report.split.perplexity_source == pytest.approx(perplexity(load(source), ids, context=CONTEXT), rel=1e-4)
    result = load(tmp_path / "gda")
    assert report.split.perplexity == pytest.approx(perplexity(result, ids, context=CONTEXT), rel=1e-4)
    assert all(layer.error_after < layer.error_before for layer in report.split.layers)
    assert report.verification.passed


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
def test_gguf(quantization: str, tmp_path: Path) -> None:
    """A GGUF file gives the same split as the Llama that transformers reads from it."""
    gguf = pytest.importorskip("gguf")
    kind = None if quantization == "F32" else gguf.GGMLQuantizationType[quantization]
    file = write_gguf(tmp_path / "model.gguf", llama_model(**SHAPE), quantization=kind)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    same_model = llama_model(**SHAPE)
    same_model.load_state_dict(read.state_dict())
    same_model.save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    report = split(file, tmp_path / "gda", effort="default", dtype="float32")
    same = split(tmp_path / "llama", tmp_path / "same", effort="default", dtype="float32")
    assert report.split.perplexity_source == pytest.approx(same.split.perplexity_source, rel=1e-5)
    assert [layer.noise_heads for layer in report.split.layers] == [layer.noise_heads for layer in same.split.layers]
    expected, got = tensors_of(tmp_path / "same"), tensors_of(tmp_path / "gda")
    assert set(expected) == set(got)
    for name, tensor in expected.items():
        assert relative_error(got[name], tensor) < 1e-3, name


def test_narrow_source_keeps_its_dtype(tmp_path: Path) -> None:
    """The reported perplexity is that before rounding, and the saved model differs by rounding only."""
    source = save_llama(tmp_path / "llama", dtype=torch.bfloat16, max_shard_size="20KB")
    report = split(source, tmp_path / "gda", effort="default", max_shard_size="20KB")
    assert report.num_files > 1
    tensors = tensors_of(tmp_path / "gda")
    narrow = {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
    assert set(tensors) - narrow == {name for name in tensors if ".lambda_" in name}
    _, held_out = windows_of(source, tmp_path / "text.txt")
    measured = perplexity(load(tmp_path / "gda"), held_out.flatten(), context=CONTEXT)
    assert report.split.perplexity == pytest.approx(measured, rel=0.02)


def test_seed_determines_the_bytes(llama: Path, tmp_path: Path) -> None:
    """In every file, with training. The seed affects λ vectors and the order of training."""
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        split(llama, tmp_path / name, effort="default", seed=seed)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    one, other = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other")
    for name in one:
        assert torch.equal(one[name], other[name]) == (".self_attn." not in name), name


def test_short_text_and_jsonl(llama: Path, tmp_path: Path) -> None:
    """The whole text is read. Texts of a JSON Lines file are joined by blank lines."""
    texts = [llama.parent.joinpath("text.txt").read_text()[at : at + 900] for at in range(0, 9000, 900)]
    texts[3] += "\u2028\x85\u2029 and on"
    lines = "\n".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (tmp_path / "b.txt").write_text("\ufeff" + "\n\n".join(texts), encoding="utf-8")
    reports = [
        split(
            llama, tmp_path / f"gda{index}", calibration=(str(tmp_path / name), "sampled:0"), calibration_tokens=10**6
        ).split
        for index, name in enumerate(["a.jsonl", "a.txt", "b.txt"])
    ]
    assert reports[0].calibration == "a.jsonl"
    made = [json.loads((tmp_path / f"gda{index}" / "conversion.json").read_text()) for index in range(3)]
    assert len({each["settings"]["split"]["texts"][0]["sha256"] for each in made}) == 1
    assert len({report.perplexity for report in reports}) == 1
    count = len(byte_tokenizer()("\n\n".join(texts), add_special_tokens=False, verbose=False).input_ids)
    assert reports[0].tokens + reports[0].held_out_tokens == count // CONTEXT * CONTEXT


# -------------------------------------------------------------------------------------------- output and other commands


@pytest.fixture(scope="module")
def divided(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A finished split with its report. Tests must not change it."""
    out = tmp_path_factory.mktemp("divided") / "gda"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_module, "EFFORTS", {"default": STEPS})
        patch.setattr(split_module, "_multiplies_bfloat16", lambda device: False)
        patch.setattr(calibration, "HELD_OUT_TOKENS", HELD_OUT * CONTEXT)
        report = split(llama, out, effort="default", verify=True)
    return out, report


def test_conversion_json_has_the_report(divided: tuple[Path, Any]) -> None:
    """And the conversion is recorded as lossy."""
    out, report = divided
    made = json.loads((out / "conversion.json").read_text())
    assert made["split"] == report.split.to_dict() == report.to_dict()["split"]
    assert made["settings"]["mode"] == "split"
    assert made["settings"]["lossless"] is False
    how = made["tensors"]["model.layers.0.self_attn.o_proj.weight"]["how"]
    assert "solved" in how
    assert "trained" in how
    assert made["tensors"]["model.norm.weight"]["how"] == "copied"
    assert not (out / "work").exists()
    assert [note for note in report.notes if "not lossless" in note]
    assert math.isfinite(report.split.perplexity)


def test_card_mentions_a_cast_only_if_there_was_one(tmp_path: Path) -> None:
    """Of a split, which is lossy for another reason."""
    for source, dtype, mentioned in ((torch.bfloat16, "bfloat16", False), (torch.float32, "bfloat16", True)):
        llama = save_llama(tmp_path / str(source), dtype=source)
        options = {"mode": "split", "effort": "fast", "calibration_tokens": 512, "dtype": dtype, "overwrite": True}
        gda.convert(llama, tmp_path / "gda", verify=False, **options)
        assert ("were cast to bfloat16" in (tmp_path / "gda" / "README.md").read_text()) == mentioned


def test_card_reports_the_loss(divided: tuple[Path, Any]) -> None:
    """Perplexities, and a table row for each layer."""
    out, report = divided
    card = (out / "README.md").read_text()
    assert "**This is lossy**" in card
    assert f"{report.split.perplexity:.3f}" in card
    assert f"{report.split.perplexity_source:.3f}" in card
    assert f"for {STEPS} steps" in card
    for index, layer in enumerate(report.split.layers):
        heads = ", ".join(map(str, layer.noise_heads))
        row = f"| {index} | {heads} | {layer.lambda_:.3f} | {layer.error_before:.3f}, {layer.error_after:.3f} |"
        assert f"{row} {layer.subtracted:.3f} |" in card


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "full", "layers"])
def test_verify_has_no_limit_by_default(method: str, llama: Path, divided: tuple[Path, Any]) -> None:
    """It reports the difference; a given threshold is applied."""
    report = gda.verify(llama, divided[0], method=method)
    assert report.passed
    assert report.threshold is None
    assert report.relative is not None
    assert report.relative > 1e-3
    assert not gda.verify(llama, divided[0], method=method, threshold=1e-5).passed


def test_unavailable_operations_are_refused(llama: Path, divided: tuple[Path, Any], tmp_path: Path) -> None:
    """Comparing bits, and exporting without the noise heads."""
    with pytest.raises(ValueError, match="fits depend on the machine; use full or layers"):
        gda.verify(llama, divided[0], method="tensors")
    with pytest.raises(ValueError, match="layer 0"):
        gda.export(divided[0], tmp_path / "back", format="llama", heads="original")
    assert list(tmp_path.iterdir()) == []


def test_nonfinite_result_fails(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fit.split_layer

    def broken(moments: Moments, output: Tensor, **options: Any) -> Any:
        split = right(moments, output, **options)
        split.output[0, 0] = math.nan
        return split

    monkeypatch.setattr(fit, "split_layer", broken)
    with pytest.raises(VerificationFailed):
        split(llama, tmp_path / "gda", verify=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_output_of_the_commands(llama: Path, divided: tuple[Path, Any], tmp_path: Path, command: Command) -> None:
    """inspect, push and the split itself."""
    out, report = divided
    shown = command("inspect", out)
    assert shown.code == 0
    assert report.to_dict()["head_map"] in shown.out
    pushed = command("push", out, "me/split", "--dry-run")
    assert pushed.code == 0
    assert "model.safetensors" in pushed.out
    printed = command(
        *("convert", llama, tmp_path / "gda", "--mode", "split", "--effort", "default"),
        *("--calibration", llama.parent / "text.txt", "--calibration", "sampled:0", "--calibration-tokens", TOKENS),
    )
    assert printed.code == 0, printed
    assert printed.error == ""
    assert "note: some heads become noise heads, which is not lossless" in printed.out
    assert f"lossy: perplexity on {report.split.held_out_tokens:,} held-out tokens of text.txt" in printed.out
    for value in (report.split.perplexity_source, report.split.perplexity_closed_form, report.split.perplexity):
        assert f"{value:.3f}" in printed.out
    assert files_of(tmp_path / "gda") == files_of(out)


def test_merged_kv_heads_of_an_earlier_version_are_read(
    divided: tuple[Path, Any], tmp_path: Path, command: Command
) -> None:
    """Earlier versions could merge KV heads first and recorded it in conversion.json."""
    folder = Path(shutil.copytree(divided[0], tmp_path / "gda"))
    made = json.loads((folder / "conversion.json").read_text())
    made["settings"]["split"]["merge_kv"] = 2
    for layer in made["split"]["layers"]:
        layer["merge"] = {"groups": [[0, 1], [2, 3]], "lost_keys": 0.1, "lost_values": 0.2, "error": 0.3}
    (folder / "conversion.json").write_text(json.dumps(made))
    assert command("inspect", folder).code == 0
    (folder / "README.md").unlink()  # so that `gda push` creates a card
    assert command("push", folder, "me/split", "--dry-run").code == 0


def test_json_and_dry_run(llama: Path, tmp_path: Path, command: Command) -> None:
    """--json prints only what Python returns; --dry-run checks the text and writes no files."""
    text = llama.parent / "text.txt"
    arguments = ("convert", llama, tmp_path / "gda", "--mode", "split", "--effort", "fast", "--calibration", text)
    dry = command(*arguments, "--dry-run", "--json")
    assert dry.code == 0
    assert json.loads(dry.out)["split"] is None
    assert list(tmp_path.iterdir()) == []
    shown = command(*arguments, "--dry-run")
    assert shown.code == 0
    assert "nothing was written (--dry-run)" in shown.out
    done = command(*arguments, "--json", "--no-verify")
    assert done.code == 0
    printed = json.loads(done.out)
    assert (printed["num_signal_heads"], printed["num_noise_heads"]) == (2, 2)
    assert printed["split"] == json.loads((tmp_path / "gda" / "conversion.json").read_text())["split"]


def test_source_writes_its_own_text(llama: Path, tmp_path: Path) -> None:
    """Without files, the split is fitted to what the source writes, and measured on other samples of it.

    The ids in the work folder are drawn from the source's own probabilities: their mean log-probability is minus the
    entropy, within the error of so many tokens.
    """
    written: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            split_module, "sampled", lambda *args, **options: written.append(sampled(*args, **options)) or written[0]
        )
        report = split(llama, tmp_path / "gda", calibration=()).split
    (ids,) = written
    assert ids.shape == (TOKENS // CONTEXT + HELD_OUT, CONTEXT)
    with torch.no_grad():
        scores = load(llama)(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    nats = -scores.gather(-1, ids[:, 1:, None]).squeeze(-1)
    entropy = -(scores.exp() * scores).sum(-1)
    assert (nats - entropy).mean().abs() < 4 * (nats - entropy).std() / math.sqrt(nats.numel())
    assert report.calibration == report.inside == "text sampled from the source"
    assert report.tokens == TOKENS
    assert [each.text for each in report.texts] == ["text sampled from the source", "the documentation of Python"]
    assert [each.fitted for each in report.texts] == [True, False]
    expected = perplexity(load(llama), ids[-HELD_OUT:].flatten(), context=CONTEXT)
    assert report.perplexity_source == pytest.approx(expected, rel=1e-4)
    assert "text sampled from the source" in (tmp_path / "gda" / "README.md").read_text()


def test_samples_start_with_the_chat_template(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third one; the others start with a random token, alone or after the BOS that the tokenizer omits."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    counted: list[int] = []
    beginnings = text_beginnings(tokenizer, len(tokenizer))
    options: dict[str, Any] = {"length": 24, "beginnings": beginnings, "seed": 0, "advance": counted.append}
    ids, again = (sampled(load(llama), tokenizer, count=6, **options) for _ in range(2))
    assert torch.equal(ids, again)
    opening = tokenizer("<user>", add_special_tokens=False).input_ids
    assert ids[2::3, : len(opening)].tolist() == [opening] * 2
    assert ids[1::3, 0].tolist() == [tokenizer.bos_token_id] * 2
    random = [*ids[::3, 0].tolist(), *ids[1::3, 1].tolist()]
    assert not set(random) & set(tokenizer.all_special_ids)
    assert len({tuple(each) for each in ids.tolist()}) == 6
    assert sampled(load(llama), tokenizer, count=1, **options).shape == (1, 24)
    counted.clear()
    monkeypatch.setattr(sampling, "total_memory", lambda device: 0)  # so they are written one by one
    alone = sampled(load(llama), tokenizer, count=6, **options)
    assert set(counted) == {1}
    assert torch.equal(alone[:, 0], ids[:, 0])
    assert torch.equal(alone[2::3, : len(opening)], ids[2::3, : len(opening)])


@pytest.mark.parametrize("window", [None, 5])
def test_samples_are_what_the_source_writes(
    window: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the likeliest token instead of a drawn one: as without padding, without a cache, and within a window."""
    source, tokenizer = save_source(tmp_path / "mistral", "mistral", sliding_window=window), byte_tokenizer()
    tokenizer.chat_template = "{{ 'User: ' + messages[0].content }}"
    monkeypatch.setattr(sampling, "GenerationConfig", lambda **given: GenerationConfig(**given | {"do_sample": False}))
    beginnings = text_beginnings(tokenizer, len(tokenizer))
    ids = sampled(
        load(source), tokenizer, count=6, length=24, beginnings=beginnings, seed=0, advance=lambda tokens: None
    )
    with torch.no_grad():
        wanted = load(source)(ids, use_cache=False).logits[:, :-1].argmax(-1)
    lengths = [1, 2, len(tokenizer("User: ", add_special_tokens=False).input_ids)]
    for number, row in enumerate(ids):
        start = lengths[number % 3]
        assert torch.equal(row[start:], wanted[number, start - 1 :])


@pytest.mark.parametrize(
    ("bos", "eos", "adds_bos", "expected"),
    [
        ("<s>", "</s>", False, [False, True]),
        ("<s>", "</s>", True, [True, True]),
        (None, "<s>", False, [False, True]),
        (None, None, False, [False, False]),
    ],
)
def test_text_begins_with_bos(
    llama: Path, tmp_path: Path, bos: str | None, eos: str | None, adds_bos: bool, expected: list[bool]
) -> None:
    """As programs feed it: some add BOS, or else EOS, where a tokenizer does not, so text begins in both ways."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    first = tokenizer.bos_token_id
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", first)])
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    beginnings = text_beginnings(tokenizer, len(tokenizer))
    text = save_text(tmp_path / "text.txt")
    wanted = shares({str(text): 1.0}, sampled=0, tokens=2 * CONTEXT, longest=CONTEXT + 3, beginnings=beginnings)
    calibration = read_calibration(text, tokenizer, wanted)
    options: dict[str, Any] = {"length": 24, "beginnings": beginnings, "seed": 0, "advance": lambda tokens: None}
    for ids in (calibration.sequences, sampled(load(llama), tokenizer, count=2, **options)):
        assert (ids[:, 0] == first).tolist() == expected
    ids = tokenizer(text.read_text(), add_special_tokens=False, verbose=False).input_ids
    assert calibration.sequences[:, 1:].tolist() == torch.tensor(ids)[: 2 * CONTEXT].view(2, -1)[:, 1:].tolist()
    assert text_beginnings(tokenizer, 0) == [[]]


def test_samples_have_embeddings(tmp_path: Path) -> None:
    """A tokenizer may know more tokens than the model; a file may have a colon and a number in its name."""
    source = save_llama(tmp_path / "llama", vocab_size=300)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(200)])
    tokenizer.save_pretrained(source)
    text = save_text(tmp_path / "a.txt:7")
    report = split(source, tmp_path / "gda", calibration=(f"{text}",)).split
    assert report.calibration == "a.txt:7, text sampled from the source"


def test_texts_are_mixed_by_weight(llama: Path, tmp_path: Path) -> None:
    """Files count as their weights say, samples as two files; a file is measured on what follows its share."""
    for name in ("a", "b"):
        save_text(tmp_path / f"{name}.txt", 9_000)
    files = (f"{tmp_path / 'a.txt'}:3", str(tmp_path / "b.txt"))
    made = split(llama, tmp_path / "gda", calibration=files)
    recorded = json.loads((tmp_path / "gda" / "conversion.json").read_text())["settings"]["split"]
    assert [(each["name"], each["sequences"]) for each in recorded["texts"]] == [("a.txt", 5), ("b.txt", 2)]
    assert recorded["sampled_sequences"] == 3
    report = made.split
    assert report.tokens == TOKENS
    assert report.calibration == "a.txt, b.txt, text sampled from the source"
    assert report.inside == "a.txt, b.txt"
    assert report.held_out_tokens == 2 * HELD_OUT * CONTEXT
    assert [each.text for each in report.texts][2:] == ["text sampled from the source", "the documentation of Python"]


def test_weight_of_sampled_text() -> None:
    """2 beside files, whether it is named or not."""
    for given, expected in ((), 2), (("sampled",), 2), (("sampled:3",), 3), (("sampled:0",), 0):
        options = ConvertOptions("llama", "gda", mode="split", calibration=("a.txt", *given))
        assert options.calibration_weights() == {"sampled": expected, "a.txt": 1}


def test_warnings_name_the_text(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    """Where a ratio is 1.15 or more, and where little is held out: on the screen, in the card and in JSON."""
    monkeypatch.setattr(report_module, "WORSE", 0.5)
    monkeypatch.setattr(report_module, "HELD_OUT_TOKENS", 512)
    arguments = ("convert", llama, tmp_path / "gda", "--mode", "split", "--effort", "fast", "--no-verify")
    done = command(*arguments, *("--calibration", llama.parent / "text.txt", "--calibration", "sampled:0"))
    assert done.code == 0
    card = (tmp_path / "gda" / "README.md").read_text()
    found = json.loads((tmp_path / "gda" / "conversion.json").read_text())["split"]["warnings"]
    assert found == [
        "perplexity is 0.5 times the source's or more on text.txt and on the documentation of Python",
        "fewer than 512 tokens are held out of text.txt and of the documentation of Python: ratios are rough",
    ]
    for warning in found:
        assert f"warning: {warning}" in done.out
        assert f"**Warning**: {warning}." in card
