"""A grown model computes the same function, has more trainable parameters, and lists the new ones."""

import json
import math
import os
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import gda
from gda import GDAConfig, GDAForCausalLM
from gda.common.trainable import Trainable
from gda.conversion.growth.growth import copied_layers
from gda.conversion.growth.replicate import split_exactly
from gda.conversion.modes.registry import plan
from gda.conversion.options import GrowOptions
from gda.conversion.tensors.recipes import checkpoint_specs
from gda.conversion.verify import VerificationFailed

from ..support import naive
from ..support.checkpoints import load, logits, needs_smollm2
from ..support.commands import Command, assert_refused
from ..support.head_layouts import HEADS
from ..support.llamas import VARIANTS, change_config, files_of, save_llama, tensors_of
from ..support.relatives import save_diffllama, save_motif
from ..support.tiny import relative_error, tiny_model, token_ids

pytestmark = pytest.mark.sampled

TOLERANCE = 1e-5
OPERATORS: dict[str, dict[str, Any]] = {
    "signal": {"signal": 3},
    "depth": {"depth": 5},
    "width": {"width": 2},
    "hidden": {"hidden": 2},
    "hidden, MLP, signal and depth": {"hidden": 2, "mlp": 3, "signal": 2, "depth": 4},
    "all": {"signal": 2, "depth": 4, "width": 3},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {"num_attention_heads": 8, "num_noise_heads": 2, "num_key_value_heads": 2},
    "paired": {"kv_layout": "paired", "num_attention_heads": 8, "num_noise_heads": 2, "num_key_value_heads": 4},
}
FIELDS: dict[str, dict[str, Any]] = {
    "sigmoid": {"lambda_type": "sigmoid"},
    "tanh": {"lambda_type": "tanh"},
    "λ by layer": {"lambda_init": [0.05, 0.3, 0.1]},
    "λ of Motif": {"lambda_init_offset": -1, "head_norm": True},
    "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "norms, sigmoid": {"head_norm": True, "qk_norm": True, "lambda_type": "sigmoid"},
    "PolyNorm": {"hidden_act": "poly_norm"},
    "shared base": {"qk_rank": 3, "attention_bias": True},
    "sliding": {
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "head_dim of its own": {"head_dim": 20},
}
each_operator = pytest.mark.parametrize("growth", OPERATORS.values(), ids=OPERATORS)
# All operators, each in one of two combinations.
COMBINED = {name: OPERATORS[name] for name in ("hidden, MLP, signal and depth", "all")}
combined = pytest.mark.parametrize("growth", COMBINED.values(), ids=COMBINED)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def saved(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    tiny_model(**({"num_hidden_layers": 3} | fields)).to(dtype).save_pretrained(folder)
    return folder


def error(source: Path, grown: Path) -> float:
    ids = token_ids(2, 13)
    return relative_error(logits(grown, ids), logits(source, ids))


def grow(source: Path, out: Path, **options: Any) -> Any:
    """`gda.grow` without verification, which the tests do themselves."""
    return gda.grow(source, out, **({"verify": False} | options))


# ------------------------------------------------------------------------------------------------------------- function


@combined
@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
def test_logits_do_not_change(fields: dict[str, Any], growth: dict[str, Any], tmp_path: Path) -> None:
    """MHA, GQA, MQA, fewer and more noise heads than KV heads, both layouts, non-zero λ and biases."""
    source = saved(tmp_path / "source", attention_bias=True, mlp_bias=True, **fields)
    grow(source, tmp_path / "grown", **growth)
    assert error(source, tmp_path / "grown") <= TOLERANCE


@combined
@each_layout
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_logits_do_not_change_with_any_field(
    fields: dict[str, Any], layout: str, growth: dict[str, Any], tmp_path: Path
) -> None:
    """λ types and schedules, norms, activations, tied embeddings, windows, shared bases; in one file and in shards."""
    source = saved(tmp_path / "source", **LAYOUTS[layout], **fields)
    grow(source, tmp_path / "grown", max_shard_size="30KB", **growth)
    assert error(source, tmp_path / "grown") <= TOLERANCE


@each_operator
@each_layout
def test_grown_model_matches_the_equations(layout: str, growth: dict[str, Any], tmp_path: Path) -> None:
    """The loops of the reference give equal logits for source and result."""
    source = saved(tmp_path / "source", head_norm=True, **LAYOUTS[layout])
    grow(source, tmp_path / "grown", **growth)
    ids = token_ids(1, 7)
    wanted, got = (
        naive.run(model.state_dict(), model.config, ids).logits for model in map(load, (source, tmp_path / "grown"))
    )
    assert relative_error(got, wanted) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("growth", [{"signal": 3}, {"width": 3}, {"signal": 2, "depth": 4, "width": 2}], ids=str)
def test_growth_is_exact_in_narrow_dtypes(growth: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """The shares of a weight sum to it exactly, although a third of it is not representable."""
    source = saved(tmp_path / "source", dtype, tie_word_embeddings=True)
    report = gda.grow(source, tmp_path / "grown", **growth)
    assert report.notes == []
    assert report.verification is not None
    assert report.verification.threshold == TOLERANCE
    assert all(tensor.dtype in (dtype, torch.float32) for tensor in tensors_of(tmp_path / "grown").values())


def test_greedy_text_does_not_change(tmp_path: Path) -> None:
    """With a cache; `gda.grow` verifies it."""
    report = gda.grow(save_llama(tmp_path / "llama"), tmp_path / "grown", signal=2, depth=3, width=2)
    assert report.verification is not None
    assert report.verification.passed
    assert report.verification.greedy_match == 1.0
    assert report.verification.threshold == TOLERANCE


# ----------------------------------------------------------------------------------------------------- tensor by tensor


@each_layout
@pytest.mark.parametrize("times", [2, 3])
def test_signal_heads_are_replicated_beside_the_originals(times: int, layout: str, tmp_path: Path) -> None:
    """Rows of q_proj and W_λ are repeated, and columns of o_proj are divided; the rest is unchanged bit for bit."""
    source = saved(tmp_path / "source", lambda_type="tanh", attention_bias=True, head_norm=True, **LAYOUTS[layout])
    report = grow(source, tmp_path / "grown", signal=times)
    assert report.config.signal_noise_ratio == times * 3
    assert report.config.num_noise_heads == 2
    before, after = tensors_of(source), tensors_of(tmp_path / "grown")
    width = report.config.value_width
    for name, tensor in before.items():
        new = after[name]
        if "q_proj" in name:
            rows = list(tensor.split(8))  # [s s s n] twice
            order = [head for head in range(8) for _ in range(1 if head % 4 == 3 else times)]
            assert torch.equal(new, torch.cat([rows[head] for head in order])), name
        elif "lambda_proj" in name:
            assert torch.equal(new, torch.stack([row for row in tensor for _ in range(times)])), name
        elif name.endswith("o_proj.weight"):
            for head, columns in enumerate(tensor.split(width, dim=1)):
                replicas = new[:, head * times * width : (head + 1) * times * width].split(width, dim=1)
                assert torch.equal(sum(each.double() for each in replicas), columns.double()), name
                for one, other in pairwise(replicas):
                    assert 0 < (one - other).std() < 0.1 * columns.std()
        else:
            assert torch.equal(new, tensor), name


@each_layout
@pytest.mark.parametrize("tied", [True, False])
def test_width_tiles_whole_groups(tied: bool, layout: str, tmp_path: Path) -> None:
    """Written axes are tiled, and read axes are divided; tied embeddings divide the last norm instead of the head."""
    fields = {"attention_bias": True, "mlp_bias": True, "head_norm": True, "hidden_act": "poly_norm"}
    source = saved(tmp_path / "source", tie_word_embeddings=tied, **fields, **LAYOUTS[layout])
    report = grow(source, tmp_path / "grown", width=2)
    config = report.config
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (48, 80, 8)
    assert (config.num_attention_heads, config.num_noise_heads) == (16, 4)
    before, after = tensors_of(source), tensors_of(tmp_path / "grown")
    assert ("lm_head.weight" in after) != tied
    for name, tensor in before.items():
        new = after[name]
        if "lambda" in name or "subln" in name or "act_fn" in name:
            assert torch.equal(new, tensor), name
        elif "embed" in name:
            assert torch.equal(new, torch.cat([tensor, tensor], 1)), name
        elif name == "lm_head.weight" or (tied and name == "model.norm.weight"):
            one, other = new.chunk(2, dim=-1)
            assert torch.equal(one.double() + other.double(), tensor.double()), name
            assert not torch.equal(one, other)
        elif tensor.dim() == 1:
            assert torch.equal(new, torch.cat([tensor, tensor])), name
        else:
            blocks = [half.chunk(2, dim=1) for half in new.chunk(2)]
            for one, other in blocks:
                assert torch.equal(one.double() + other.double(), tensor.double()), name
            assert not torch.equal(blocks[0][0], blocks[1][0]), name


@pytest.mark.slow
def test_copied_layers_have_no_effect(tmp_path: Path) -> None:
    """o_proj and down_proj are zero; everything else equals the original layer, λ and window included."""
    windows = ["sliding_attention", "full_attention", "sliding_attention"]
    source = saved(
        tmp_path / "source", attention_bias=True, mlp_bias=True, sliding_window=3, layer_types=windows, head_norm=True
    )
    report = gda.grow(source, tmp_path / "grown", layers=[2, 0, 0])
    assert (report.copied_layers, report.new_layers) == ([0, 0, 2], [1, 2, 5])
    origins = [0, 0, 0, 1, 2, 2]
    config = load(source).config
    assert report.config.layer_types == [windows[origin] for origin in origins]
    assert report.config.lambda_init == [config.layer_lambda_init(origin) for origin in origins]
    before, after = tensors_of(source), tensors_of(tmp_path / "grown")
    for layer, origin in enumerate(origins):
        for name in (name for name in before if name.startswith(f"model.layers.{origin}.")):
            new = after[name.replace(f".{origin}.", f".{layer}.", 1)]
            if layer in report.new_layers and ("o_proj" in name or "down_proj" in name):
                assert not new.any(), name
            else:
                assert torch.equal(new, before[name]), name


def test_single_lambda_init_is_kept(tmp_path: Path) -> None:
    """Only values that differ between layers become a list."""
    report = grow(saved(tmp_path / "source", lambda_init=0.1), tmp_path / "grown", depth=4)
    assert report.config.lambda_init == 0.1


@pytest.mark.parametrize(
    ("layers", "depth", "copied"),
    [
        (32, 40, [3, 7, 11, 15, 19, 23, 27, 31]),  # LLaMA-Pro's own
        (30, 36, [4, 9, 14, 19, 24, 29]),
        (5, 7, [2, 4]),
        (4, 5, [3]),
        (2, 5, [0, 1, 1]),
        (2, 4, [0, 1]),
        (3, 9, [0, 0, 1, 1, 2, 2]),
        (1, 4, [0, 0, 0]),
    ],
)
def test_copies_are_spread_evenly(layers: int, depth: int, copied: list[int]) -> None:
    """Also if the depth is not a multiple, and if there are more copies than layers."""
    assert copied_layers(GrowOptions("source", "out", depth=depth), layers) == copied


numbers = st.floats(-60000, 60000) | st.floats(-1e-7, 1e-7)


@settings(deadline=None, max_examples=150)
@given(
    values=st.lists(numbers, min_size=1, max_size=30),
    count=st.integers(1, 7),
    noise=st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_shares_sum_to_the_weight(values: list[float], count: int, noise: float, dtype: torch.dtype) -> None:
    """Exactly, for every dtype, number of shares, size and noise; and each is close to its share."""
    weight = torch.tensor(values).to(dtype)
    drawn = noise * torch.randn(count, len(weight), generator=torch.Generator().manual_seed(0)) if noise else None
    shares = split_exactly(weight, count, drawn)
    assert shares.dtype == dtype
    assert torch.isfinite(shares).all()
    assert torch.equal(shares.double().sum(0), weight.double())
    if noise == 0:
        apart = (shares.double() - weight.double() / count).abs()
        assert (apart <= torch.finfo(dtype).eps * weight.double().abs() / count + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_shares_of_small_weights_sum_exactly(count: int, dtype: torch.dtype) -> None:
    """Noise far above the weight is reduced, down to shares that use every digit."""
    generator = torch.Generator().manual_seed(0)
    weight = (1e-4 * torch.randn(20000, generator=generator)).to(dtype)
    shares = split_exactly(weight, count, torch.randn(count, len(weight), generator=generator))
    assert torch.equal(shares.double().sum(0), weight.double())


def test_noise_has_the_requested_size(tmp_path: Path) -> None:
    """Relative to the weight's deviation, times √(1 − 1/r) because r replicas sum to zero."""
    source = saved(tmp_path / "source")
    before = tensors_of(source)
    for noise_std, least in ((0.0, 0.0), (0.01, 0.9), (0.1, 0.7), (1.0, 0.2)):
        grow(source, tmp_path / "grown", width=2, noise_std=noise_std, overwrite=True)
        after = tensors_of(tmp_path / "grown")
        name = "model.layers.1.mlp.up_proj.weight"
        differences = after[name] - before[name].repeat(2, 2) / 2
        measured = (differences.std() / before[name].std()).item()
        assert least * noise_std / math.sqrt(2) <= measured <= 1.1 * noise_std / math.sqrt(2) + 1e-7


# ------------------------------------------------------------------------------------------------------------- learning


def trained(model: GDAForCausalLM, steps: int = 2) -> dict[str, Tensor]:
    """Gradients, by name, of the last of several SGD steps on random tokens."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ids = torch.arange(61).repeat(2).view(2, 61)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@each_operator
@each_layout
@pytest.mark.parametrize("lambda_type", ["reparameterized", "tanh"])
def test_new_parameters_get_gradients(lambda_type: str, layout: str, growth: dict[str, Any], tmp_path: Path) -> None:
    """Each new part has one after two optimizer steps."""
    source = saved(tmp_path / "source", lambda_type=lambda_type, attention_bias=True, **LAYOUTS[layout])
    grow(source, tmp_path / "grown", **growth)
    model, new = load(tmp_path / "grown"), Trainable.read(tmp_path / "grown")
    gradients = trained(model)
    for name, parameter in model.named_parameters():
        entries = new.new_entries(name, parameter)
        if entries is not None and "k_proj.bias" not in name:  # softmax removes what all keys have in common
            assert gradients[name][entries].abs().max() > 0, name


@each_layout
@pytest.mark.parametrize(
    "growth", [{"signal": 2}, {"signal": 2, "depth": 5}, {"width": 2}, {"signal": 2, "width": 2}], ids=str
)
def test_replicas_diverge(growth: dict[str, Any], layout: str, tmp_path: Path) -> None:
    """After two steps no two signal heads are equal. Without noise, they stay equal."""
    source = saved(tmp_path / "source", lambda_type="tanh", **LAYOUTS[layout])
    for noise_std in (0.01, 0.0):
        grow(source, tmp_path / "grown", noise_std=noise_std, overwrite=True, **growth)
        model = load(tmp_path / "grown")
        trained(model)
        for layer in model.model.layers:
            heads = layer.self_attn.q_proj.weight.unflatten(0, (-1, 8))
            equal = [(one - other).abs().max() < 1e-8 for i, one in enumerate(heads) for other in heads[:i]]
            assert any(equal) == (noise_std == 0)


def test_deepened_model_can_grow_again(tmp_path: Path) -> None:
    """Replicas also diverge where o_proj is zero."""
    source = saved(tmp_path / "source")
    grow(source, tmp_path / "deep", depth=4)
    report = gda.grow(tmp_path / "deep", tmp_path / "grown", signal=2)
    assert report.verification is not None
    assert report.verification.relative <= TOLERANCE
    output = load(tmp_path / "grown").model.layers[3].self_attn.o_proj.weight
    assert output.abs().max() > 0
    assert output.unflatten(1, (6, 2, 8)).sum(dim=2).abs().max() == 0


def test_zero_noise_is_noted(tmp_path: Path) -> None:
    """Only if there are replicas."""
    source = saved(tmp_path / "source")
    assert "stay equal during training" in grow(source, tmp_path / "out", width=2, noise_std=0, dry_run=True).notes[0]
    assert grow(source, tmp_path / "out", depth=4, noise_std=0, dry_run=True).notes == []


# ------------------------------------------------------------------------------------------------------- trainable.json


@each_operator
@each_layout
def test_trainable_json_marks_exactly_the_new_entries(layout: str, growth: dict[str, Any], tmp_path: Path) -> None:
    """The others are as many as the source's, and equal to them where nothing new is read."""
    source = saved(tmp_path / "source", lambda_type="tanh", attention_bias=True, **LAYOUTS[layout])
    report = grow(source, tmp_path / "grown", **growth)
    model, new = load(tmp_path / "grown"), Trainable.read(tmp_path / "grown")
    assert json.loads((tmp_path / "grown" / "trainable.json").read_text()) == report.trainable.to_dict()
    old = sum(
        parameter.numel() if entries is None else int((~entries).sum())
        for parameter, entries in ((each, new.new_entries(name, each)) for name, each in model.named_parameters())
    )
    assert old == report.num_parameters_before == load(source).num_parameters()
    if "depth" not in growth:
        before = tensors_of(source)
        for name in ("model.layers.1.self_attn.q_proj.bias", "model.embed_tokens.weight", "model.norm.weight"):
            parameter = model.get_parameter(name)
            entries = new.new_entries(name, parameter)
            kept = parameter if entries is None else parameter[~entries]
            assert torch.equal(kept.flatten(), before[name].flatten()), name


def test_freeze_others_trains_only_new_entries(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", lambda_type="tanh", attention_bias=True)
    report = grow(source, tmp_path / "grown", signal=2, depth=4)
    assert report.new_layers == [3]
    begun, model = load(tmp_path / "grown").state_dict(), load(tmp_path / "grown")
    learning = set(report.trainable.freeze_others(model))
    assert "model.layers.3.input_layernorm.weight" in learning
    assert "model.layers.0.self_attn.lambda_proj.weight" in learning
    assert not any("0.mlp" in name or "embed" in name or "0.self_attn.k_proj" in name for name in learning)
    trained(model)
    for name, parameter in model.named_parameters():
        moved = parameter != begun[name]
        entries = report.trainable.new_entries(name, parameter)
        old = ~entries if name in learning else torch.ones_like(moved)
        assert not moved[old].any(), name
    with pytest.raises(ValueError, match="is it the model's"):
        report.trainable.freeze_others(torch.nn.Linear(2, 2))


@each_operator
def test_peft_config(growth: dict[str, Any], tmp_path: Path) -> None:
    """`LoraConfig(**peft)` adapts and saves exactly the modules with new entries, and they are trained."""
    peft = pytest.importorskip("peft")
    source = saved(tmp_path / "source", lambda_type="tanh", head_norm=True)
    report = grow(source, tmp_path / "grown", **growth)
    model, new = load(tmp_path / "grown"), report.trainable
    modules = dict(model.named_modules())
    names = [*new.peft["target_modules"], *new.peft["modules_to_save"]]
    assert len(names) == len(set(names))
    for name, module in modules.items():
        own = any(new.holds(f"{name}.{parameter}") for parameter, _ in module.named_parameters(recurse=False))
        assert (name in names) == own, name
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=2, **new.peft))
    learning = {name for name, gradient in trained(adapted).items() if gradient.any()}
    for name in names:
        assert any(f".{name}." in each for each in learning), name
    assert all("lora_" in name or "modules_to_save" in name for name in learning)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"parameters": [{"pattern": "(", "kept": null}], "peft": {}}',
        '{"parameters": [{"pattern": "a{4294967296}", "kept": null}], "peft": {}}',
        "not JSON",
    ],
)
def test_invalid_trainable_json(content: str, tmp_path: Path) -> None:
    """One line names the file. A missing file gives a similar line."""
    with pytest.raises(FileNotFoundError, match=r"trainable\.json"):
        Trainable.read(tmp_path)
    (tmp_path / "trainable.json").write_text(content)
    with pytest.raises(ValueError, match=r"trainable\.json"):
        Trainable.read(tmp_path)


# -------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("variant", ["gqa", "mha", "mqa", "mlp_bias", "tied", "llama3", "shards"])
def test_llama_is_expanded_and_grown_at_once(variant: str, tmp_path: Path) -> None:
    """The bytes equal those of an expansion that is grown, and the logits those of the Llama."""
    llama = save_llama(tmp_path / "llama", **VARIANTS[variant])
    gda.convert(llama, tmp_path / "gda", lambda_type="tanh", verify=False, seed=3)
    growth: dict[str, Any] = {"signal": 2, "depth": 3, "width": 2, "seed": 3}
    grow(tmp_path / "gda", tmp_path / "twice", **growth)
    report = gda.grow(llama, tmp_path / "once", lambda_type="tanh", **growth)
    assert report.sha256 == json.loads((tmp_path / "twice" / "conversion.json").read_text())["sha256"]
    assert report.verification is not None
    assert report.verification.passed
    assert report.verification.threshold == TOLERANCE


def test_expansion_options(tmp_path: Path) -> None:
    """--ratio and --noise-heads apply to a Llama, and not to a GDA model."""
    llama = save_llama(tmp_path / "llama")
    report = grow(llama, tmp_path / "grown", signal=2, ratio="4:1")
    assert (report.before.signal_noise_ratio, report.config.signal_noise_ratio) == (4, 8)
    for options in ({"ratio": 4}, {"noise_heads": 1}, {"lambda_type": "tanh"}):
        with pytest.raises(ValueError, match="is only for a Llama"):
            grow(tmp_path / "grown", tmp_path / "out", depth=3, **options)


def test_layout_of_new_heads_is_stored(tmp_path: Path) -> None:
    """So that the tensors can be made again, and a run with another layout is not continued."""
    llama, out, layout = save_llama(tmp_path / "llama"), tmp_path / "grown", {"kv_layout": "paired", "head_norm": True}
    grow(llama, out, signal=2, noise_std=0, **layout)
    assert json.loads((out / "conversion.json").read_text())["settings"]["layout"] == layout
    assert gda.verify(llama, out, method="tensors").passed


@each_operator
def test_diffllama_and_motif_grow_at_once(growth: dict[str, Any], tmp_path: Path) -> None:
    """A DiffLlama is run and compared. A Motif cannot be run, so its tensors are compared."""
    report = gda.grow(save_diffllama(tmp_path / "diffllama"), tmp_path / "grown", **growth)
    assert report.verification is not None
    assert report.verification.method == "full"
    assert report.verification.relative <= TOLERANCE
    motif = save_motif(tmp_path / "motif")
    gda.convert(motif, tmp_path / "gda")
    report = gda.grow(motif, tmp_path / "motif-grown", **growth)
    assert report.verification is not None
    assert (report.verification.method, report.verification.passed) == ("tensors", True)
    assert error(tmp_path / "gda", tmp_path / "motif-grown") <= TOLERANCE


# --------------------------------------------------------------------------------------------------- files and commands


@pytest.mark.slow
@each_operator
def test_verify_grown_models(growth: dict[str, Any], tmp_path: Path) -> None:
    """Every method passes, and fails for a changed tensor."""
    source = saved(tmp_path / "source")
    grow(source, tmp_path / "grown", **growth)
    for method in ("full", "layers", "tensors"):
        assert gda.verify(source, tmp_path / "grown", method=method).passed
    tensors = tensors_of(tmp_path / "grown")
    tensors["model.layers.1.self_attn.o_proj.weight"][:, 0] += 1.0
    save_file(tensors, tmp_path / "grown" / "model.safetensors", metadata={"format": "pt"})
    for method in ("full", "layers", "tensors"):
        assert not gda.verify(source, tmp_path / "grown", method=method).passed


def test_wrong_growth_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification runs before OUT appears."""
    source = saved(tmp_path / "source")
    monkeypatch.setattr("gda.conversion.growth.replicate.reads", lambda name, axis, config: False)
    with pytest.raises(VerificationFailed):
        gda.grow(source, tmp_path / "grown", width=2)
    assert os.listdir(tmp_path) == ["source"]


def test_edited_config_fails_verification(tmp_path: Path) -> None:
    """With another λ schedule or other windows, equal tensors compute something else."""
    source = saved(tmp_path / "source")
    grow(source, tmp_path / "grown", depth=4)
    change_config(tmp_path / "grown", lambda_init=[0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match="lambda_init"):
        gda.verify(source, tmp_path / "grown", method="tensors")


def test_settings_of_an_unknown_growth(tmp_path: Path) -> None:
    """For example from a later version, or edited."""
    source = saved(tmp_path / "source")
    grow(source, tmp_path / "grown", depth=4)
    path = tmp_path / "grown" / "conversion.json"
    made = json.loads(path.read_text())
    made["settings"]["growth"] = {"sideways": 2}
    path.write_text(json.dumps(made))
    with pytest.raises(ValueError, match=r"conversion\.json holds an unknown growth"):
        gda.verify(source, tmp_path / "grown", method="tensors")


@pytest.mark.parametrize("how", [{"mlp": 2}, {"mlp": 2, "masked": True}, {"signal": 2, "head_norm": True}], ids=str)
def test_values_beyond_float16_are_refused(how: dict[str, Any], tmp_path: Path) -> None:
    """Also where a growth or a head norm computes with the tensor that is cast."""
    llama = save_llama(tmp_path / "llama")
    tensors = load_file(llama / "model.safetensors")
    name = f"model.layers.1.{'self_attn.v_proj' if 'head_norm' in how else 'mlp.up_proj'}.weight"
    tensors[name][0, 0] = 1e6
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} has values that float16 cannot hold; use bfloat16"):
        gda.grow(llama, tmp_path / "out", dtype="float16", verify=False, **how)


def test_conversion_json_card_and_inspect(tmp_path: Path) -> None:
    """Settings and origins, the growth, and the heads and layers."""
    llama = save_llama(tmp_path / "llama")
    report = gda.grow(llama, tmp_path / "grown", signal=2, depth=4)
    made = json.loads((tmp_path / "grown" / "conversion.json").read_text())
    assert made["settings"]["mode"] == "grow"
    assert made["settings"]["growth"] == report.growth
    assert made["tensors"]["model.layers.1.self_attn.k_proj.weight"]["how"] == "of layer 0: copied"
    assert "shared out to 2 replicas" in made["tensors"]["model.layers.0.self_attn.o_proj.weight"]["how"]
    card = (tmp_path / "grown" / "README.md").read_text()
    assert "grown: 4 layers, of which the new ones are copies" in card
    assert "2 times the signal heads" in card
    shown = gda.inspect(tmp_path / "grown")
    assert "s s s s n  s s s s n" in shown.head_map
    assert shown.num_layers == 4
    assert shown.source_kv_cache_bytes_per_token == shown.kv_cache_bytes_per_token // 2
    assert (tmp_path / "grown" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def test_card_names_every_part_of_a_growth(tmp_path: Path) -> None:
    """Also what masked growth makes of new layers."""
    llama = save_llama(tmp_path / "llama", tie_word_embeddings=True)
    gda.grow(llama, tmp_path / "wide", hidden=2, mlp=3, untie=True, verify=False)
    card = (tmp_path / "wide" / "README.md").read_text()
    for part in ("2 times the hidden size", "3 times the neurons of the MLP", "The output head has weights of its own"):
        assert part in card
    gda.grow(llama, tmp_path / "masked", masked=True, layers=[1], new_layers="copy", mlp=1.5, verify=False)
    card = (tmp_path / "masked" / "README.md").read_text()
    assert "3 layers, of which the new ones are copies that are blended in; 1.5 times the neurons of the MLP" in card


def test_card_of_a_model_with_qk_rank(tmp_path: Path) -> None:
    """It mentions the rank, and no errors of a factorization."""
    grow(saved(tmp_path / "source", qk_rank=3), tmp_path / "grown", signal=2)
    card = (tmp_path / "grown" / "README.md").read_text()
    assert "an update of rank 3" in card
    assert "Relative error" not in card


def test_interrupted_growth_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the same bytes, and OUT is absent before."""
    source = saved(tmp_path / "source")
    options: dict[str, Any] = {"signal": 2, "depth": 5, "width": 2, "max_shard_size": "30KB"}
    whole = grow(source, tmp_path / "whole", **options)
    calls = []

    def interrupted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return split_exactly(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("gda.conversion.growth.replicate.split_exactly", interrupted)
        with pytest.raises(KeyboardInterrupt):
            grow(source, tmp_path / "killed", **options)
    assert not (tmp_path / "killed").exists()
    with pytest.raises(ValueError, match="other settings"):
        grow(source, tmp_path / "killed", resume=True, **(options | {"noise_std": 0.02}))
    resumed = grow(source, tmp_path / "killed", resume=True, **options)
    assert resumed.sha256 == whole.sha256
    one, other = files_of(tmp_path / "whole"), files_of(tmp_path / "killed")
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one if name != "README.md")


def test_cast_is_reported_as_lossy(tmp_path: Path) -> None:
    """Growth in the narrow dtype is exact for the cast weights."""
    source = saved(tmp_path / "source")
    report = gda.grow(source, tmp_path / "grown", signal=3, dtype="bfloat16")
    assert "cast to bfloat16" in report.notes[0]
    assert report.verification is not None
    assert report.verification.threshold is None
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "narrow", dtype="bfloat16", verify=False)
    gda.grow(tmp_path / "llama", tmp_path / "cast", signal=3, dtype="bfloat16", verify=False)
    assert error(tmp_path / "narrow", tmp_path / "cast") <= TOLERANCE


# ------------------------------------------------------------------------------------------------------------ bad input

IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "nothing to grow"),
    "signal 1": ({"signal": 1}, "--signal 1 is not an integer of at least 2"),
    "signal 1.5": ({"signal": 1.5}, "--signal 1.5 is not"),
    "width 0": ({"width": 0}, "--width 0 is not"),
    "width 1.5": ({"width": 1.5}, "--width 1.5 is not an integer of at least 2"),
    "width nan": ({"width": float("nan")}, "--width nan is not"),
    "width inf": ({"width": float("inf")}, "--width inf is more than 1000"),
    "signal beyond measure": ({"signal": 10**30}, "--signal 1e+30 is more than 1000"),
    "layers beyond measure": ({"depth": 10**9}, "--depth 1000000000 is more than 1000 times the 3 layers"),
    "fewer layers": ({"depth": 2}, "--depth 2 is not more than the 3 layers"),
    "as many layers": ({"depth": 3}, "--depth 3 is not more"),
    "layers beyond": ({"layers": [1, 3]}, "--layers 3 is not among the 3 layers"),
    "layers below": ({"layers": [-1]}, "--layers -1 is not among"),
    "no layers": ({"layers": []}, "--layers names no layer"),
    "layers and depth": ({"layers": [1], "depth": 5}, "--layers names 1 layers, but --depth 5 adds 2"),
    "noise": ({"signal": 2, "noise_std": -1.0}, "--noise-std -1.0 is below 0"),
    "endless noise": ({"signal": 2, "noise_std": float("nan")}, "--noise-std nan is not"),
    "noise of nobody": ({"depth": 4, "noise_std": 0.1}, "--noise-std 0.1 is for replicas, but new layers are copies"),
    "dtype": ({"signal": 2, "dtype": "int8"}, "--dtype int8"),
}


@pytest.mark.parametrize(("options", "named"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_growth_is_refused(options: dict[str, Any], named: str, tmp_path: Path, command: Command) -> None:
    """One line names option and value, with exit code 2 and no files."""
    source = saved(tmp_path / "source")
    with pytest.raises(ValueError, match=re.escape(named)):
        gda.grow(source, tmp_path / "deep" / "out", **options)
    printed = [
        f"--{name.replace('_', '-')}={','.join(map(str, v)) if isinstance(v, list) else v}"
        for name, v in options.items()
    ]
    outcome = command("grow", source, tmp_path / "deep" / "out", *printed)
    assert (outcome.code, outcome.out) == (2, "")
    assert len(outcome.error.splitlines()) == 1
    assert os.listdir(tmp_path) == ["source"]


def test_unfinished_masked_growth_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", fade=0.5, masked_signal_heads=1)
    with pytest.raises(ValueError, match="masked growth"):
        grow(source, tmp_path / "out", depth=4)


def test_output_of_the_command(tmp_path: Path, command: Command) -> None:
    """Heads, layers and size before and after, copied layers, verification; with --json the report."""
    source = saved(tmp_path / "source")
    dry = command("grow", source, tmp_path / "grown", "--signal", 2, "--depth", 5, "--dry-run")
    assert dry.code == 0, dry.error
    assert "3:1, 3 layers" in dry.out
    assert "6:1, 5 layers" in dry.out
    assert "layers copied: 1, 2; the copies are 2, 4" in dry.out
    assert "nothing was written (--dry-run)" in dry.out
    assert os.listdir(tmp_path) == ["source"]
    done = command("grow", source, tmp_path / "grown", "--layers", "0,2", "--width", 2, "--json")
    assert done.code == 0, done.error
    report = json.loads(done.out)
    assert report["new_layers"] == [1, 4]
    assert (report["hidden_size_before"], report["hidden_size"]) == (24, 48)
    assert report["num_parameters_before"] == gda.inspect(source).num_parameters
    assert report["num_parameters"] == gda.inspect(tmp_path / "grown").num_parameters
    assert report["verification"]["relative"] <= TOLERANCE
    assert_refused(command("grow", source, tmp_path / "out", "--layers", "0;2"), "such as 3,7,11")


def test_other_sources_are_refused(tmp_path: Path) -> None:
    """Sources that are not models, and an OUT that exists or contains the source."""
    source = saved(tmp_path / "source")
    with pytest.raises(FileNotFoundError):
        gda.grow(tmp_path / "absent", tmp_path / "out", depth=4)
    with pytest.raises(ValueError, match="is the source"):
        gda.grow(source, source / "out", depth=4)
    grow(source, tmp_path / "out", depth=4)
    with pytest.raises(FileExistsError, match="--overwrite"):
        gda.grow(source, tmp_path / "out", depth=4)
    assert grow(source, tmp_path / "out", depth=5, overwrite=True).config.num_hidden_layers == 5


@pytest.mark.slow
@needs_smollm2
def test_smollm2_grown_to_6_to_1_and_36_layers(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct, expanded to 3:1 first: the same text."""
    from gda.conversion.demo import find_demo_model

    report = gda.grow(find_demo_model(), tmp_path / "grown", signal=2, depth=36)
    assert report.copied_layers == [4, 9, 14, 19, 24, 29]
    assert report.verification is not None
    assert report.verification.relative <= TOLERANCE
    assert report.verification.greedy_match == 1.0
    shown = gda.inspect(tmp_path / "grown")
    assert "18 signal + 3 noise, 6:1, 36 layers" in shown.head_map
    assert "s s s s s s n  s s s s s s n  s s s s s s n" in shown.head_map
    assert set(shown.lambdas) == {0.0}


# ------------------------------------------------------------------------------------- from Motif-2.6B to Motif-2-12.7B

MOTIF_ROUTE: dict[str, Any] = {"hidden": 2, "mlp": 2, "signal": 4, "untie": True}


def test_the_route_of_motif_on_a_small_model(tmp_path: Path) -> None:
    """1:1 paired, PolyNorm, head norm and tied embeddings: KV heads, noise heads and head_dim stay."""
    fields = {"kv_layout": "paired", "head_norm": True, "hidden_act": "poly_norm", "lambda_init_offset": -1}
    heads = {"num_attention_heads": 8, "num_noise_heads": 4, "num_key_value_heads": 8}
    source = saved(tmp_path / "source", num_hidden_layers=4, tie_word_embeddings=True, **fields, **heads)
    gda.grow(source, tmp_path / "grown", depth=5, **MOTIF_ROUTE)
    before, after = (load(folder).config for folder in (source, tmp_path / "grown"))
    assert (after.num_signal_heads, after.num_hidden_layers) == (4 * before.num_signal_heads, 5)
    assert after.hidden_size == 2 * before.hidden_size
    assert after.intermediate_size == 2 * before.intermediate_size
    for name in ("num_noise_heads", "num_key_value_heads", "head_dim"):
        assert getattr(after, name) == getattr(before, name)
    assert not after.tie_word_embeddings
    assert error(source, tmp_path / "grown") <= TOLERANCE


def test_the_route_of_motif_at_full_size() -> None:
    """Planned without weights: the shapes of all 643 tensors are those of Motif-2-12.7B."""
    small, large = GDAConfig.preset("motif-2.6b"), GDAConfig.preset("motif-2-12.7b")
    source = SimpleNamespace(config=small, specs=checkpoint_specs(small), name="motif-2.6b", notes=())
    options = GrowOptions("motif-2.6b", "grown", depth=40, **MOTIF_ROUTE)
    grown = plan("grow", source, options)  # type: ignore[arg-type]
    assert {name: recipe.spec.shape for name, recipe in grown.recipes.items()} == {
        name: spec.shape for name, spec in checkpoint_specs(large).items()
    }
    assert (len(grown.recipes), grown.num_parameters) == (643, 12_703_860_896)


def test_untie_needs_tied_embeddings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--untie: the embeddings of the source are not tied"):
        gda.grow(saved(tmp_path / "source"), tmp_path / "grown", signal=2, untie=True)
