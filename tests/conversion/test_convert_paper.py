"""Conversion to the layouts of the GDA paper: paired keys, a head norm, and a λ that is faded in."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gda
from gda import GDAConfig, GDAForCausalLM
from gda.configuration.configuration_gda import FADED

from ..support.checkpoints import load, logits
from ..support.llamas import save_llama, tensors_of
from ..support.paper_layouts import LAMBDAS, LAYOUTS, SOURCES, is_faded, measure
from ..support.tiny import relative_error


def some_ids() -> Tensor:
    return torch.randint(200, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("layout", "lambda_"), itertools.product(LAYOUTS, LAMBDAS))
def test_exact_at_fade_0_and_plain_at_fade_1(layout: str, lambda_: str, tmp_path: Path) -> None:
    """At fade 0 the logits are the source's. At 1 they equal those of a model without the fields, bit for bit."""
    options = LAYOUTS[layout] | LAMBDAS[lambda_]
    source = save_llama(tmp_path / "llama", attention_bias=True)
    report = gda.convert(source, tmp_path / "gda", **options)
    assert report.verification is not None
    assert report.verification.threshold == 1e-5
    model, ids = load(tmp_path / "gda"), some_ids()
    assert relative_error(logits(model, ids), logits(source, ids)) < 1e-5
    assert (model.config.fade == 0) == is_faded(options)
    if is_faded(options):
        model.set_fade(1.0)
    model.save_pretrained(tmp_path / "end")
    fields = json.loads((tmp_path / "end" / "config.json").read_text())
    assert all(fields.get(name) is None for name in ("fade", *FADED))
    at_end = load(tmp_path / "end")
    assert torch.equal(logits(at_end, ids), logits(model, ids))
    if is_faded(options):
        assert relative_error(logits(at_end, ids), logits(source, ids)) > 1e-3


# Which λ goes with which layout makes no difference to a kind of source, so each has every layout once.
OTHERS = [
    (source, layout, list(LAMBDAS)[(row + column) % len(LAMBDAS)])
    for row, source in enumerate(name for name in SOURCES if name != "llama")
    for column, layout in enumerate(LAYOUTS)
]


@pytest.mark.parametrize(("source", "layout", "lambda_"), OTHERS)
def test_exact_from_every_kind_of_source(source: str, layout: str, lambda_: str, tmp_path: Path) -> None:
    """At fade 0 as its source; at 1 bit for bit as the same weights without a fade."""
    options = LAYOUTS[layout] | LAMBDAS[lambda_]
    measured = measure(SOURCES[source](tmp_path), tmp_path, options)
    assert measured.start <= 1e-5
    assert measured.end == 0
    assert (measured.change is not None) == is_faded(options)
    assert measured.change is None or measured.change > 1e-3


@pytest.mark.parametrize(("layout", "lambda_"), itertools.product(LAYOUTS, LAMBDAS))
def test_all_new_weights_have_gradients_in_the_second_step(layout: str, lambda_: str, tmp_path: Path) -> None:
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", verify=False, **LAYOUTS[layout], **LAMBDAS[lambda_])
    model = GDAForCausalLM.from_pretrained(tmp_path / "gda", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        if model.config.fade is not None:
            model.set_fade((step + 1) / 10)
        optimizer.zero_grad()
        model(some_ids(), labels=some_ids()).loss.backward()
        optimizer.step()
    head_dim, attention = model.config.head_dim, model.model.layers[0].self_attn
    ratio = model.config.signal_noise_ratio
    noise_queries = attention.q_proj.weight.grad.unflatten(0, (-1, ratio + 1, head_dim))[:, -1]
    new = {"noise queries": noise_queries}
    new |= {name: p.grad for name, p in attention.named_parameters() if "lambda" in name or "subln" in name}
    if model.config.kv_layout == "paired":
        new["noise keys"] = attention.k_proj.weight.grad.unflatten(0, (-1, 2, head_dim))[:, 1]
        new["second slabs"] = attention.v_proj.weight.grad.unflatten(0, (-1, 2, head_dim))[:, 1]
        new["their columns"] = attention.o_proj.weight.grad.unflatten(1, (-1, 2, head_dim))[:, :, 1]
    for name, gradient in new.items():
        assert gradient.abs().max() > 0, name


def test_origin_of_each_head_of_a_pair(tmp_path: Path) -> None:
    """Keys are (k, k + noise), values (v, new), and o_proj reads only v."""
    source = save_llama(tmp_path / "llama")
    gda.convert(source, tmp_path / "gda", kv_layout="paired", verify=False)
    before, after = tensors_of(source), tensors_of(tmp_path / "gda")
    prefix = "model.layers.1.self_attn"
    key = after[f"{prefix}.k_proj.weight"].unflatten(0, (2, 2, 8))
    value = after[f"{prefix}.v_proj.weight"].unflatten(0, (2, 2, 8))
    output = after[f"{prefix}.o_proj.weight"].unflatten(1, (4, 2, 8))
    assert torch.equal(key[:, 0].flatten(0, 1), before[f"{prefix}.k_proj.weight"])
    assert torch.equal(value[:, 0].flatten(0, 1), before[f"{prefix}.v_proj.weight"])
    assert torch.equal(output[:, :, 0].flatten(1), before[f"{prefix}.o_proj.weight"])
    assert output[:, :, 1].count_nonzero() == 0
    assert 0 < (key[:, 1] - key[:, 0]).abs().mean() < 0.1 * key[:, 0].abs().mean()
    assert (value[:, 1] - value[:, 0]).abs().mean() > value[:, 0].abs().mean() / 2


@pytest.mark.parametrize("layout", ["head norm", "both"])
def test_values_are_scaled_by_powers_of_two(layout: str, tmp_path: Path) -> None:
    """v and o_proj change by inverse powers of two, which give simulated outputs a size near a quarter."""
    source = save_llama(tmp_path / "llama", attention_bias=True)
    gda.convert(source, tmp_path / "gda", verify=False, **LAYOUTS[layout])
    before, after = tensors_of(source), tensors_of(tmp_path / "gda")
    prefix, slabs = "model.layers.1.self_attn", 1 + (layout == "both")
    for name in ("weight", "bias"):
        was = before[f"{prefix}.v_proj.{name}"].unflatten(0, (2, 8))
        now = after[f"{prefix}.v_proj.{name}"].unflatten(0, (2, slabs, 8))[:, 0]
        scales = (now / was).flatten(1)
        assert torch.equal(scales, scales[:, :1].expand_as(scales))
        assert torch.equal(scales.log2(), scales.log2().round())
    was = before[f"{prefix}.o_proj.weight"].unflatten(1, (4, 8))
    now = after[f"{prefix}.o_proj.weight"].unflatten(1, (4, slabs, 8))[:, :, 0]
    assert torch.equal(now * scales[:, 0].repeat_interleave(2)[:, None], was)
    norm = before["model.layers.1.input_layernorm.weight"]
    inputs = torch.randn(200_000, len(norm), generator=torch.Generator().manual_seed(0)) * norm
    value = before[f"{prefix}.v_proj.weight"].unflatten(0, (2, 8)) * scales[:, :1, None]
    bias = before[f"{prefix}.v_proj.bias"].unflatten(0, (2, 8)) * scales[:, :1]
    averaged = 0.2 * (inputs @ value.flatten(0, 1).T).unflatten(1, (2, 8))
    size = (averaged.square().mean((0, 2)) + bias.square().mean(1)).sqrt()
    assert ((size > 0.25 / 2**0.51) & (size < 0.25 * 2**0.51)).all(), size


@pytest.mark.parametrize(
    ("lambda_", "at_end"), [("reparameterized", 0.0), ("tanh", 0.0), ("sigmoid", 0.5), ("schedule", None)]
)
def test_initial_weight_of_the_head_norm(lambda_: str, at_end: float | None, tmp_path: Path) -> None:
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", head_norm=True, verify=False, **LAMBDAS[lambda_])
    scheduled = 0.8 - 0.6 * math.exp(-0.3)
    expected = (1 - scheduled) ** -1.5 if at_end is None else (1 - at_end) ** -0.5
    weight = tensors_of(tmp_path / "gda")["model.layers.1.self_attn.subln.weight"]
    assert torch.allclose(weight, torch.full_like(weight, expected))
    assert GDAConfig.from_pretrained(tmp_path / "gda").head_norm_eps == 1


def test_norms_in_float32_keep_a_bfloat16_conversion_exact(tmp_path: Path) -> None:
    """They only give the scale, so nothing is lost."""
    source = save_llama(tmp_path / "llama", dtype=torch.bfloat16)
    mixed = {name: each.float() if "norm" in name else each for name, each in tensors_of(source).items()}
    save_file(mixed, source / "model.safetensors", {"format": "pt"})
    report = gda.convert(source, tmp_path / "gda", head_norm=True)
    assert report.verification is not None
    assert (report.verification.threshold, report.verification.relative) == (1e-5, 0)


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-6])
def test_float16_is_widened_before_it_is_scaled(size: float, tmp_path: Path) -> None:
    """Also where the scaled values would be too small or too large for float16."""
    source = save_llama(tmp_path / "llama", dtype=torch.float16)
    changed = {name: each * size if "v_proj" in name else each for name, each in tensors_of(source).items()}
    save_file(changed, source / "model.safetensors", {"format": "pt"})
    report = gda.convert(source, tmp_path / "gda", head_norm=True, dtype="float32")
    assert report.verification is not None
    assert report.verification.relative < 1e-6
    name = "model.layers.1.self_attn.o_proj.weight"
    scale = (changed[name].float() / tensors_of(tmp_path / "gda")[name]).unflatten(1, (2, -1))[0, :, 0]
    assert torch.equal(scale, torch.exp2(scale.log2().round()))
    assert scale.max() <= 1024


@pytest.mark.parametrize("half", ["", "v_proj", "o_proj"])
def test_float16_is_not_scaled(half: str, tmp_path: Path) -> None:
    """Not even where only one of the two projections has it; a note says so."""
    source = save_llama(tmp_path / "llama")
    mixed = {name: each.half() if half and half in name else each for name, each in tensors_of(source).items()}
    save_file(mixed, source / "model.safetensors", {"format": "pt"})
    report = gda.convert(source, tmp_path / "gda", head_norm=True, dtype="keep" if half else "float16")
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(
        tensors_of(tmp_path / "gda")[name].float(), mixed[name].half().float() if not half else mixed[name].float()
    )
    assert any("v_proj and o_proj in float16 are not scaled" in note for note in report.notes)


def test_a_bias_counts_in_the_size_of_values(tmp_path: Path) -> None:
    """Attention passes it on undiminished. Weights of zero and no bias are scaled by 1,024 at most."""
    source = save_llama(tmp_path / "llama", attention_bias=True)
    changed = tensors_of(source)
    changed["model.layers.0.self_attn.v_proj.weight"].zero_()
    changed["model.layers.0.self_attn.v_proj.bias"].copy_(torch.tensor([3.0] * 8 + [0.0] * 8))
    save_file(changed, source / "model.safetensors", {"format": "pt"})
    gda.convert(source, tmp_path / "gda", head_norm=True)
    name = "model.layers.0.self_attn.o_proj.weight"
    scale = (changed[name] / tensors_of(tmp_path / "gda")[name]).unflatten(1, (2, -1))[0, :, 0]
    assert scale.tolist() == [1 / 16, 1024.0]  # 3 / 16 is within a factor of √2 of a quarter


def test_new_parts_are_listed(tmp_path: Path) -> None:
    """trainable.json: noise queries, noise keys, second slabs, their columns, λ and the head norm."""
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", kv_layout="paired", head_norm=True)
    listed = json.loads((tmp_path / "gda" / "trainable.json").read_text())
    text = json.dumps(listed)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "lambda_", "subln"):
        assert name in text, name
    assert "mlp" not in text


def test_verification_by_tensors_plans_the_same_layout(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "llama")
    gda.convert(source, tmp_path / "gda", kv_layout="paired", head_norm=True, lambda_init="schedule")
    assert gda.verify(source, tmp_path / "gda", method="tensors").passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_init": "schedule", "lambda_type": "tanh"}, "--lambda-init schedule has no effect"),
        ({"kv_layout": "paired", "noise_heads": 1}, "1 noise heads cannot be added"),
        ({"head_norm": True, "mode": "split"}, "--head-norm is only for --mode expand"),
        ({"kv_layout": "paired", "mode": "split"}, "--kv-layout is only for --mode expand"),
    ],
    ids=str,
)
def test_impossible_layouts_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", **options)
    assert not (tmp_path / "gda").exists()


@pytest.mark.parametrize("options", [LAYOUTS["both"], LAYOUTS["head norm"] | LAMBDAS["schedule"]], ids=str)
def test_growth_of_a_fading_model(options: dict[str, Any], tmp_path: Path) -> None:
    """A Llama grows signal heads while its head norm waits to be faded in."""
    source = save_llama(tmp_path / "llama")
    gda.grow(source, tmp_path / "grown", signal=2, **options)
    assert relative_error(logits(tmp_path / "grown", some_ids()), logits(source, some_ids())) < 1e-5
