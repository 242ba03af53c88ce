"""Factoring dense projections into a shared base and low-rank updates, and folding them into dense ones again."""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import gda
from gda.conversion.modes.low_rank import factor, folded
from gda.conversion.sources.open import open_source
from gda.conversion.verify import VerificationFailed

from ..support.checkpoints import logits, needs_smollm2
from ..support.commands import Command
from ..support.head_layouts import HEADS
from ..support.llamas import change_config, save_llama, tensors_of
from ..support.relatives import save_diffllama, save_motif
from ..support.tiny import tiny_model, token_ids

pytestmark = pytest.mark.sampled

ROUNDING = 1e-5
LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {"num_attention_heads": 8, "num_noise_heads": 2, "num_key_value_heads": 2},
    "paired": {"kv_layout": "paired", "num_attention_heads": 8, "num_noise_heads": 2, "num_key_value_heads": 4},
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def saved(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    tiny_model(**fields).to(dtype).save_pretrained(folder)
    return folder


def random_weight(groups: int, roles: int, head_dim: int, hidden: int) -> Tensor:
    generator = torch.Generator().manual_seed(groups * roles + head_dim)
    return torch.randn(groups * roles * head_dim, hidden, generator=generator)


def error_of(weight: Tensor, roles: int, head_dim: int, rank: int, **options: Any) -> float:
    parts = factor(weight, roles=roles, head_dim=head_dim, rank=rank, **options)
    got = folded(**parts, roles=roles, head_dim=head_dim)
    return ((got - weight.double()).norm() / weight.double().norm()).item()


# ------------------------------------------------------------------------------------------------- one weight at a time


SHAPES = [(3, 4, 8, 100), (2, 3, 8, 24), (1, 6, 8, 16), (2, 2, 16, 12), (1, 2, 2, 5)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def test_folded_equals_the_equation() -> None:
    """W_k = B + P_k R_k, head by head."""
    groups, roles, d, hidden, rank = 2, 3, 4, 5, 2
    generator = torch.Generator().manual_seed(0)
    base, down, up = (
        torch.randn(*shape, generator=generator)
        for shape in ((groups * d, hidden), (groups * roles * rank, hidden), (groups * roles * d, rank))
    )
    weight = folded(base, down, up, roles=roles, head_dim=d)
    for group in range(groups):
        for role in range(roles):
            head = group * roles + role
            update = up[head * d : (head + 1) * d].double() @ down[head * rank : (head + 1) * rank].double()
            wanted = base[group * d : (group + 1) * d] + update
            torch.testing.assert_close(weight[head * d : (head + 1) * d], wanted)


@each_shape
def test_full_rank_is_exact_and_more_rank_is_never_worse(shape: tuple[int, int, int, int]) -> None:
    """Full rank is the smaller of d and hidden; its error is float64 rounding."""
    _, roles, d, hidden = shape
    weight = random_weight(*shape)
    errors = [error_of(weight, roles, d, rank) for rank in range(1, min(d, hidden) + 1)]
    assert errors[-1] < 1e-12
    assert all(after <= before * 1.01 + 1e-12 for before, after in pairwise(errors))


@each_shape
@pytest.mark.parametrize("rank", [1, 2])
def test_updates_are_a_truncated_svd(rank: int, shape: tuple[int, int, int, int]) -> None:
    """With the mean as base, the error equals that of torch's SVD. More rounds never increase it."""
    groups, roles, d, _ = shape
    weight = random_weight(*shape)
    heads = weight.double().unflatten(0, (groups, roles, d))
    tails = torch.linalg.svdvals(heads - heads.mean(1, keepdim=True))[..., rank:]
    of_mean = (tails.pow(2).sum().sqrt() / weight.double().norm()).item()
    errors = [error_of(weight, roles, d, rank, rounds=rounds) for rounds in (1, 2, 4, 8, 20)]
    assert errors[0] == pytest.approx(of_mean, rel=1e-6, abs=1e-12)
    assert all(after <= before * 1.001 + 1e-12 for before, after in pairwise(errors))


def test_factorizable_weights_are_factored_exactly() -> None:
    """The factors may differ from those that made the weight, but their product does not."""
    generator = torch.Generator().manual_seed(3)
    base, down, up = (
        torch.randn(*shape, generator=generator) for shape in ((32, 64), (2 * 4 * 2, 64), (2 * 4 * 16, 2))
    )
    weight = folded(base, down, up, roles=4, head_dim=16)
    assert error_of(weight, 4, 16, 2, rounds=1) > 0.1
    assert error_of(weight, 4, 16, 2, rounds=60) < 0.02


def test_factors_have_equal_norms_and_no_zero_rows() -> None:
    """Where roles are equal, `up` keeps a size that gives `down` a gradient."""
    weight = random_weight(2, 4, 8, 40)
    parts = factor(weight, roles=4, head_dim=8, rank=3)
    torch.testing.assert_close(
        parts["down"].norm(dim=1), parts["up"].unflatten(0, (8, 8)).norm(dim=1).flatten(), rtol=1e-6, atol=1e-6
    )
    same = factor(weight[:8].repeat(4, 1), roles=4, head_dim=8, rank=3)
    assert (same["up"].norm(dim=0) > 0).all()
    assert torch.isfinite(same["down"]).all()
    zero = factor(torch.zeros(16, 40), roles=2, head_dim=8, rank=8)
    assert all(torch.isfinite(part).all() for part in zero.values())


# ---------------------------------------------------------------------------------------------------- whole checkpoints


@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
def test_full_rank_and_fold_give_equal_logits(fields: dict[str, Any], tmp_path: Path) -> None:
    """A dense GDA model factored at full rank, and folded again: 1e-5 each. Biases and λ do not change."""
    dense = saved(tmp_path / "dense", attention_bias=True, **fields)
    report = gda.convert(dense, tmp_path / "shared", qk_rank=8)
    assert report.verification is not None
    assert report.verification.threshold == 1e-5
    again = gda.fold(tmp_path / "shared", tmp_path / "folded")
    assert again.verification is not None
    assert again.verification.passed
    ids = token_ids(2, 13)
    wanted = logits(dense, ids)
    assert relative(logits(tmp_path / "shared", ids), wanted) <= ROUNDING
    assert relative(logits(tmp_path / "folded", ids), wanted) <= ROUNDING
    before, after = tensors_of(dense), tensors_of(tmp_path / "folded")
    assert set(before) == set(after)
    for name, tensor in before.items():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            assert relative(after[name], tensor) <= 1e-6, name
        else:
            assert torch.equal(after[name], tensor), name


@pytest.mark.slow
@each_layout
@pytest.mark.parametrize("lambda_type", ["reparameterized", "sigmoid", "tanh"])
def test_folding_is_exact_at_any_rank(lambda_type: str, layout: str, tmp_path: Path) -> None:
    """The config is that of the dense model."""
    fields = LAYOUTS[layout] | {"lambda_type": lambda_type, "head_norm": True, "qk_norm": True}
    saved(tmp_path / "shared", qk_rank=3, attention_bias=True, **fields)
    gda.fold(tmp_path / "shared", tmp_path / "folded")
    ids = token_ids(2, 13)
    assert relative(logits(tmp_path / "folded", ids), logits(tmp_path / "shared", ids)) <= ROUNDING
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("shared", "folded"))
    assert {name for name in before if before[name] != after[name]} == {"qk_rank"}
    assert after["qk_rank"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", [{}, {"attention_bias": True}, {"num_key_value_heads": 1}, {"head_dim": 16}], ids=str
)
def test_llama_is_expanded_and_factored(variant: dict[str, Any], tmp_path: Path) -> None:
    """At full rank the function is the same. A lower rank is reported as lossy."""
    llama = save_llama(tmp_path / "llama", **variant)
    full = variant.get("head_dim", 8)
    report = gda.convert(llama, tmp_path / "full", qk_rank=full)
    assert report.notes == []
    assert report.verification is not None
    assert report.verification.relative <= ROUNDING
    report = gda.convert(llama, tmp_path / "low", qk_rank=2)
    assert "approximated" in report.notes[0]
    assert report.verification is not None
    assert report.verification.threshold is None
    assert report.verification.passed
    assert report.verification.relative > ROUNDING


@pytest.mark.slow
@each_layout
def test_errors_by_layer_match_the_files(layout: str, tmp_path: Path) -> None:
    """In the report and in conversion.json, for queries and paired keys."""
    dense = saved(tmp_path / "dense", attention_bias=True, num_hidden_layers=3, **LAYOUTS[layout])
    report = gda.convert(dense, tmp_path / "shared", qk_rank=3)
    before, after = tensors_of(dense), tensors_of(tmp_path / "shared")
    roles = {"shared": {"q": 4}, "paired": {"q": 4, "k": 2}}[layout]
    assert set(report.projection_errors) == set(roles)
    for projection, count in roles.items():
        for layer, error in enumerate(report.projection_errors[projection]):
            prefix = f"model.layers.{layer}.self_attn.{projection}"
            parts = {part: after[f"{prefix}_{part}.weight"] for part in ("base", "down", "up")}
            got, wanted = folded(**parts, roles=count, head_dim=8), before[f"{prefix}_proj.weight"].double()
            assert error == pytest.approx(((got - wanted).norm() / wanted.norm()).item(), rel=1e-9)
            assert 0.01 < error < 1
    made = json.loads((tmp_path / "shared" / "conversion.json").read_text())
    assert made["projection_errors"] == report.projection_errors
    assert made["settings"]["qk_rank"] == 3
    assert made["settings"]["lossless"] is False
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "rank 3" in card
    assert "approximate" in card


@each_layout
def test_parameter_counts_beside_dense_ones(layout: str, tmp_path: Path) -> None:
    """In the reports of convert and inspect."""
    dense = saved(tmp_path / "dense", attention_bias=True, **LAYOUTS[layout])
    report = gda.convert(dense, tmp_path / "shared", qk_rank=2, verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "shared")
    inspected = gda.inspect(tmp_path / "shared")
    assert report.num_parameters == inspected.num_parameters == model.num_parameters()
    assert report.num_dense_parameters == inspected.num_dense_parameters == gda.inspect(dense).num_parameters
    assert inspected.num_parameters < inspected.num_dense_parameters
    assert inspected.qk_rank == 2
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert inspected.parameters["signal and noise queries"] == sum(sizes[name] for name in sizes if ".q_" in name)
    keys_and_values = sum(sizes[name] for name in sizes if ".k_" in name or ".v_" in name)
    assert inspected.parameters["keys and values"] == keys_and_values
    assert gda.inspect(dense).qk_rank is None


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "lossless"), [("keep", False), ("float32", True)])
def test_rounding_to_a_narrow_dtype_is_reported(dtype: str, lossless: bool, tmp_path: Path) -> None:
    """In bfloat16, neither full rank nor folding is exact to 1e-5; in float32, both are."""
    dense = saved(tmp_path / "dense", torch.bfloat16)
    report = gda.convert(dense, tmp_path / "shared", qk_rank=8, dtype=dtype)
    assert (report.notes == []) == lossless
    assert report.verification is not None
    assert (report.verification.threshold is not None) == lossless
    saved(tmp_path / "low", torch.bfloat16, qk_rank=3)
    report = gda.fold(tmp_path / "low", tmp_path / "folded", dtype=dtype)
    assert any("bfloat16" in note for note in report.notes) != lossless
    assert report.verification is not None
    assert (report.verification.threshold is not None) == lossless
    assert report.verification.relative < (ROUNDING if lossless else 0.1)


def test_wider_dtype_is_not_reported_as_lossy(tmp_path: Path) -> None:
    """For a bfloat16 model factored in float32, only the rank is lossy."""
    dense = saved(tmp_path / "dense", torch.bfloat16)
    report = gda.convert(dense, tmp_path / "shared", qk_rank=3, dtype="float32", verify=False)
    assert len(report.notes) == 1
    assert "approximated" in report.notes[0]
    assert "cast" not in (tmp_path / "shared" / "README.md").read_text()


def test_nonfinite_weights_fail(tmp_path: Path) -> None:
    """A lossy conversion passes with any difference, but not with NaN."""
    dense = saved(tmp_path / "dense")
    tensors = tensors_of(dense)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationFailed, match="finite"):
        gda.convert(dense, tmp_path / "shared", qk_rank=3)
    assert os.listdir(tmp_path) == ["dense"]


def test_nonfinite_queries_are_refused(tmp_path: Path) -> None:
    """The message names the tensor."""
    dense = saved(tmp_path / "dense")
    tensors = tensors_of(dense)
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight"):
        gda.convert(dense, tmp_path / "shared", qk_rank=3)
    assert os.listdir(tmp_path) == ["dense"]


def test_bytes_do_not_depend_on_shards(tmp_path: Path) -> None:
    """The factors of one projection may be in different shards, and a second run gives the same bytes."""
    dense = saved(tmp_path / "dense", attention_bias=True)
    for name, size in (("one", "5GB"), ("again", "5GB"), ("many", "3KB")):
        gda.convert(dense, tmp_path / name, qk_rank=3, max_shard_size=size, verify=False)
    one, again, many = (tensors_of(tmp_path / name) for name in ("one", "again", "many"))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    assert one.keys() == many.keys() == again.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_interrupted_factorization_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the same bytes and the errors of every layer."""
    dense = saved(tmp_path / "dense", num_hidden_layers=3)
    options: dict[str, Any] = {"qk_rank": 3, "max_shard_size": "10KB", "verify": False}
    whole = gda.convert(dense, tmp_path / "whole", **options)
    calls = []

    def interrupted(*arguments: Any, **named: Any) -> dict[str, Tensor]:
        calls.append(named)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return factor(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr("gda.conversion.modes.low_rank.factor", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gda.convert(dense, tmp_path / "killed", **options)
    assert not (tmp_path / "killed").exists()
    resumed = gda.convert(dense, tmp_path / "killed", resume=True, **options)
    assert resumed.sha256 == whole.sha256
    assert resumed.projection_errors == whole.projection_errors


@pytest.mark.slow
def test_verify_factored_models(tmp_path: Path) -> None:
    """By running them; comparing bits is refused with a reason."""
    dense = saved(tmp_path / "dense")
    gda.convert(dense, tmp_path / "shared", qk_rank=3)
    gda.fold(tmp_path / "shared", tmp_path / "folded")
    assert gda.verify(tmp_path / "shared", tmp_path / "folded").passed
    assert gda.verify(tmp_path / "shared", tmp_path / "folded", method="layers").relative <= ROUNDING
    assert gda.verify(dense, tmp_path / "shared").threshold is None
    for source, out in (("dense", "shared"), ("shared", "folded")):
        with pytest.raises(ValueError, match="use full or layers"):
            gda.verify(tmp_path / source, tmp_path / out, method="tensors")


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("rank", [0, 9, -2])
@pytest.mark.parametrize("kind", ["llama", "gda"])
def test_impossible_ranks_are_refused(kind: str, rank: int, tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source") if kind == "llama" else saved(tmp_path / "source")
    refusal = rf"qk_rank must be from 1 to 8.*got {rank}" if rank > 0 else f"--qk-rank {rank} is below 1"
    with pytest.raises(ValueError, match=refusal):
        gda.convert(source, tmp_path / "out", qk_rank=rank)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "already a GDA model"),
        ({"qk_rank": 2, "ratio": 3}, "--ratio"),
        ({"qk_rank": 2, "mode": "expand"}, "--mode"),
    ],
    ids=str,
)
def test_options_that_do_not_apply_to_a_gda_model(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    """It already has noise heads and λ; only --qk-rank applies."""
    dense = saved(tmp_path / "dense")
    with pytest.raises(ValueError, match=named):
        gda.convert(dense, tmp_path / "out", **options)
    assert os.listdir(tmp_path) == ["dense"]


@pytest.mark.slow
def test_diffllama_and_motif(tmp_path: Path) -> None:
    """A DiffLlama is mapped and factored at once. A Motif cannot be run, so the message asks for two steps."""
    save_diffllama(tmp_path / "diffllama")
    report = gda.convert(tmp_path / "diffllama", tmp_path / "shared", qk_rank=8)
    assert set(report.projection_errors) == {"q", "k"}
    assert report.verification is not None
    assert report.verification.relative <= ROUNDING
    save_motif(tmp_path / "motif")
    with pytest.raises(ValueError, match="convert it first"):
        gda.convert(tmp_path / "motif", tmp_path / "out", qk_rank=2)


def test_a_model_with_a_rank_is_folded_first(tmp_path: Path) -> None:
    """For another rank: the message says how."""
    shared = saved(tmp_path / "shared", qk_rank=3)
    with pytest.raises(ValueError, match="gda fold"):
        gda.convert(shared, tmp_path / "out", qk_rank=2)
    assert os.listdir(tmp_path) == ["shared"]


@pytest.mark.parametrize("kind", ["dense", "llama", "nothing", "broken"])
def test_fold_refuses_other_models(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    if kind == "dense":
        saved(folder)
    elif kind == "llama":
        save_llama(folder)
    elif kind == "broken":
        change_config(saved(folder, qk_rank=3), qk_rank=4)
    wanted = {"dense": "nothing to fold", "llama": "type 'llama'", "nothing": "does not exist", "broken": "q_"}[kind]
    with pytest.raises((ValueError, FileNotFoundError), match=wanted):
        gda.fold(folder, tmp_path / "deep" / "out")
    assert sorted(os.listdir(tmp_path)) == ([] if kind == "nothing" else ["source"])


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_output_of_the_commands(tmp_path: Path, command: Command) -> None:
    """convert prints the parameters beside the dense ones and the error of each layer. fold reverses it."""
    llama = save_llama(tmp_path / "llama")
    dry = command("convert", llama, tmp_path / "shared", "--qk-rank", 2, "--dry-run")
    assert dry.code == 0
    assert "qk_rank 2" in dry.out
    assert os.listdir(tmp_path) == ["llama"]
    done = command("convert", llama, tmp_path / "shared", "--qk-rank", 2)
    assert done.code == 0, done.error
    assert "not lossless" in done.out
    assert "with dense projections" in done.out
    assert "relative error of the q weights, layer by layer" in done.out
    shown = command("inspect", tmp_path / "shared")
    assert "qk_rank 2" in shown.out
    folded_ = command("fold", tmp_path / "shared", tmp_path / "folded", "--json")
    assert folded_.code == 0, folded_.error
    report = json.loads(folded_.out)
    assert report["qk_rank"] is None
    assert report["verification"]["relative"] <= ROUNDING
    refused = command("fold", tmp_path / "folded", tmp_path / "out")
    assert (refused.code, refused.out) == (2, "")
    assert refused.error.count("\n") == 1
    assert "nothing to fold" in refused.error
    assert command("convert", llama, tmp_path / "out", "--qk-rank", 0).code == 2


def test_a_lost_trainable_json_is_named(tmp_path: Path) -> None:
    """Factored or folded, a model has other tensors than those that the list of its new parameters names."""
    save_llama(tmp_path / "llama")
    gda.convert(tmp_path / "llama", tmp_path / "gda", noise_heads=2, verify=False)
    low = gda.convert(tmp_path / "gda", tmp_path / "low", qk_rank=2, verify=False)
    assert not (tmp_path / "low" / "trainable.json").exists()
    plain = gda.export(tmp_path / "gda", tmp_path / "plain", verify=False)
    noted = [any("trainable.json names tensors" in note for note in each.notes) for each in (low, plain)]
    assert noted == [True, False]


def test_fold_overwrite_and_dry_run(tmp_path: Path) -> None:
    shared = saved(tmp_path / "shared", qk_rank=3)
    assert gda.fold(shared, tmp_path / "folded", dry_run=True).sha256 == {}
    assert os.listdir(tmp_path) == ["shared"]
    gda.fold(shared, tmp_path / "folded", verify=False)
    with pytest.raises(FileExistsError, match="--overwrite"):
        gda.fold(shared, tmp_path / "folded")
    assert gda.fold(shared, tmp_path / "folded", overwrite=True, verify=False).sha256


@pytest.mark.slow
@needs_smollm2
def test_smollm2_factored_and_folded(tmp_path: Path) -> None:
    """Four layers of SmolLM2-135M-Instruct, expanded and factored at rank 32: measured errors, exact folding."""
    from gda.conversion.demo import find_demo_model

    source = open_source(find_demo_model())
    config = LlamaConfig.from_dict(source.config.to_dict() | {"num_hidden_layers": 4})
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.load().state_dict(), strict=False)
    model.save_pretrained(tmp_path / "source")
    source.tokenizer().save_pretrained(tmp_path / "source")
    report = gda.convert(tmp_path / "source", tmp_path / "shared", qk_rank=32)
    assert report.num_parameters < report.num_dense_parameters
    errors = report.projection_errors["q"]
    assert len(errors) == 4
    assert max(errors) < 0.25
    assert report.verification is not None
    assert report.verification.finite
    again = gda.fold(tmp_path / "shared", tmp_path / "folded")
    assert again.verification is not None
    assert again.verification.relative <= ROUNDING
    assert again.verification.greedy_match == 1.0
