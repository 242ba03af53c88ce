"""Shared DIFF Transformer: queries, and paired keys, as a shared base and a low-rank update per role."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from gda import GDAConfig, GDAForCausalLM
from gda.conversion.tensors.recipes import meta_model

from ..support import naive
from ..support.head_layouts import HEADS, PATHS, heads
from ..support.tiny import relative_error, tiny_config, tiny_model, token_ids

pytestmark = pytest.mark.sampled

TOLERANCE = 1e-5
LENGTH = 11

VARIANTS: dict[str, dict[str, Any]] = {
    "reparameterized": {},
    "sigmoid": {"lambda_type": "sigmoid"},
    "tanh": {"lambda_type": "tanh"},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head-dim-above-hidden-over-heads": {"head_dim": 20},
    "head-dim-above-hidden": {"head_dim": 32, "qk_rank": 24},
    "head-dim-below-hidden-over-heads": {"head_dim": 2, "qk_rank": 1},
    "full-rank": {"qk_rank": 8},
    "rank-1": {"qk_rank": 1},
    "norms": {"qk_norm": True, "head_norm": True},
    "sliding": {"sliding_window": 3},
}
BOTH_LAYOUTS = pytest.mark.parametrize("kv_layout", ["shared", "paired"])


def reference(model: GDAForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return naive.run(model.state_dict(), model.config, ids).logits


@torch.no_grad()
def agree(attention: str = "sdpa", **fields: Any) -> float:
    model, ids = tiny_model(attention=attention, **({"qk_rank": 3} | fields)), token_ids(2, LENGTH)
    with torch.compiler.set_stance("force_eager"):  # compiling flex_attention takes ten seconds
        return relative_error(model(ids).logits, reference(model, ids))


# ------------------------------------------------------------------------------------------------ against the equations


@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_projection_matches_the_equation(rank: int, fields: dict[str, Any]) -> None:
    """W_base + P_k R_k, head by head, for any numbers of heads."""
    assert agree(qk_rank=rank, **fields) <= TOLERANCE


@BOTH_LAYOUTS
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_variants(fields: dict[str, Any], kv_layout: str) -> None:
    """Every λ type, biases, norms, windows and head widths."""
    assert agree(kv_layout=kv_layout, **fields) <= TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
@BOTH_LAYOUTS
def test_backends(kv_layout: str, attention: str) -> None:
    assert agree(attention, kv_layout=kv_layout) <= TOLERANCE


@pytest.mark.parametrize("fields", PATHS.values(), ids=PATHS)
@torch.no_grad()
def test_decoding(fields: dict[str, Any]) -> None:
    """A prompt and then single tokens with a cache."""
    model, ids = tiny_model(qk_rank=3, **fields), token_ids(2, LENGTH)
    cache = DynamicCache(config=model.config)
    pieces = [(0, 6), *pairwise(range(6, LENGTH + 1))]
    logits = torch.cat([model(ids[:, begin:end], past_key_values=cache).logits for begin, end in pieces], dim=1)
    assert relative_error(logits, reference(model, ids)) <= TOLERANCE


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("rank", "fields"),
    [(0, {}), (-1, {}), (9, {}), (25, {"head_dim": 32}), (3, {"head_dim": 2})],
    ids=str,
)
def test_impossible_ranks_are_refused(rank: int, fields: dict[str, Any]) -> None:
    """Below 1, or above the smaller of head_dim and hidden_size."""
    possible = min(tiny_config(**fields).head_dim, 24)
    with pytest.raises(ValueError, match=rf"qk_rank must be from 1 to {possible}.*got {rank}\."):
        tiny_config(qk_rank=rank, **fields)


def test_invalid_rank_is_refused_when_a_model_is_built() -> None:
    """For a field that was changed after construction."""
    config = tiny_config()
    config.qk_rank = 9
    with pytest.raises(ValueError, match="qk_rank"):
        GDAForCausalLM(config)


def test_misspelled_field_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean `qk_rank`"):
        tiny_config(qk_ranks=4)


@BOTH_LAYOUTS
def test_tensors_and_shapes(kv_layout: str) -> None:
    """As GDAConfig documents them. Shared keys stay dense."""
    model = GDAForCausalLM(
        tiny_config(qk_rank=3, attention_bias=True, kv_layout=kv_layout, **heads(8, 4, 4))
    )  # 2:1; paired: 2 pairs
    prefix = "model.layers.1.self_attn."
    shapes = {
        name.removeprefix(prefix): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name.startswith((f"{prefix}q_", f"{prefix}k_"))
    }
    queries = {
        "q_base.weight": (4 * 8, 24),
        "q_down.weight": (12 * 3, 24),
        "q_up.weight": (12 * 8, 3),
        "q_up.bias": (12 * 8,),
    }
    keys = {
        "shared": {"k_proj.weight": (4 * 8, 24), "k_proj.bias": (4 * 8,)},
        "paired": {
            "k_base.weight": (2 * 8, 24),
            "k_down.weight": (4 * 3, 24),
            "k_up.weight": (4 * 8, 3),
            "k_up.bias": (4 * 8,),
        },
    }
    assert shapes == queries | keys[kv_layout]


# --------------------------------------------------------------------------------------------------------- a good start


@BOTH_LAYOUTS
@pytest.mark.parametrize("rank", [1, 4, 32])
@torch.no_grad()
def test_initial_scale_equals_that_of_dense_projections(rank: int, kv_layout: str) -> None:
    """Within 10 %, and half of the variance is shared."""
    fields = heads(12, 4, 4, kv_layout=kv_layout, hidden_size=256, head_dim=64, num_hidden_layers=1)
    hidden = torch.randn(1, 512, 256, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    attention = GDAForCausalLM(tiny_config(qk_rank=rank, **fields)).model.layers[0].self_attn
    dense = GDAForCausalLM(tiny_config(**fields)).model.layers[0].self_attn
    for name in "qk":
        ours, theirs = (getattr(each, f"{name}_proj")(hidden) for each in (attention, dense))
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.25 if rank == 1 else 0.1)
    queries = attention.q_proj(hidden).flatten(0, 1).unflatten(1, (4, 4, 64))  # (T, groups, roles, d)
    of_one_group = torch.nn.functional.cosine_similarity(queries[:, :, 0], queries[:, :, 3], dim=-1).mean()
    of_two_groups = torch.nn.functional.cosine_similarity(queries[:, 0, 0], queries[:, 1, 0], dim=-1).mean()
    assert of_one_group.item() == pytest.approx(0.5, abs=0.25 if rank == 1 else 0.1)
    assert abs(of_two_groups) < 0.1


@BOTH_LAYOUTS
@pytest.mark.parametrize("lambda_type", ["reparameterized", "sigmoid", "tanh"])
def test_every_tensor_has_a_gradient_from_the_start(lambda_type: str, kv_layout: str) -> None:
    """Every row of base, down and up, and a different one for each role."""
    torch.manual_seed(0)
    model = GDAForCausalLM(tiny_config(qk_rank=3, kv_layout=kv_layout, lambda_type=lambda_type, attention_bias=True))
    ids = token_ids(2, LENGTH)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # softmax ignores what a key bias adds to all scores, except for its rotation by RoPE
        assert parameter.grad.abs().max() > 0, name
        if any(part in name for part in ("_base.weight", "_down.weight", "_up.weight")):
            assert (parameter.grad.abs().amax(1) > 0).all(), name


@BOTH_LAYOUTS
def test_training_reduces_the_loss(kv_layout: str) -> None:
    """To a tenth on one batch, with AdamW."""
    torch.manual_seed(0)
    model = GDAForCausalLM(tiny_config(qk_rank=2, kv_layout=kv_layout)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = token_ids(2, LENGTH)
    losses = []
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


# ---------------------------------------------------------------------------------------------------- with transformers


@BOTH_LAYOUTS
@torch.no_grad()
def test_save_and_load(kv_layout: str, tmp_path: Path) -> None:
    """Names, config and logits."""
    model, ids = tiny_model(qk_rank=3, kv_layout=kv_layout, attention_bias=True), token_ids(2, LENGTH)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.qk_rank == 3
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_missing_tensors_are_initialized_as_from_scratch(tmp_path: Path) -> None:
    model = tiny_model(qk_rank=3, hidden_size=256, head_dim=32)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".0.self_attn.q_base" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = GDAForCausalLM.from_pretrained(tmp_path)
    first, second = (layer.self_attn for layer in loaded.model.layers)
    assert first.q_base.weight.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.1)
    assert torch.equal(second.q_base.weight, model.model.layers[1].self_attn.q_base.weight)
    assert torch.equal(first.q_up.weight, model.model.layers[0].self_attn.q_up.weight)


def test_meta_model() -> None:
    """An 8 B model is built without memory, and is smaller than the dense one."""
    factored, dense = (meta_model(GDAConfig(qk_rank=rank)) for rank in (32, None))
    assert all(parameter.is_meta for parameter in factored.parameters())
    group = 4096 * 128 + 5 * 32 * (4096 + 128)  # in place of 5 · 4096 · 128
    assert dense.num_parameters() - factored.num_parameters() == 32 * 8 * (5 * 4096 * 128 - group)


@BOTH_LAYOUTS
def test_generate(kv_layout: str) -> None:
    """Greedy text with each cache equals that without one."""
    model = tiny_model(qk_rank=3, kv_layout=kv_layout)
    ids = token_ids(2, 5)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    texts = [model.generate(ids, use_cache=False, **arguments)]
    texts += [model.generate(ids, cache_implementation=kind, **arguments) for kind in ("dynamic", "static")]
    assert texts[0].shape == (2, 13)
    assert all(torch.equal(texts[0], text) for text in texts[1:])


@BOTH_LAYOUTS
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool, kv_layout: str) -> None:
    """Gradients are the same."""
    ids = token_ids(2, LENGTH)
    found = []
    for checkpointing in (False, True):
        model = tiny_model(qk_rank=3, kv_layout=kv_layout).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(ids, labels=ids).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.slow
@BOTH_LAYOUTS
@torch.no_grad()
def test_compiles_in_one_graph(kv_layout: str) -> None:
    """With equal logits."""
    torch._dynamo.reset()
    model, ids = tiny_model(qk_rank=3, kv_layout=kv_layout, attention_bias=True), token_ids(2, LENGTH)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(ids, use_cache=False).logits, model(ids).logits) <= TOLERANCE


@BOTH_LAYOUTS
def test_flash_attention_finds_a_dtype(kv_layout: str) -> None:
    """For float32 queries it uses the dtype of the first Linear module of the attention."""
    model = tiny_model(qk_rank=3, kv_layout=kv_layout).to(torch.bfloat16)
    for layer in model.model.layers:
        linear = next(module for module in layer.self_attn.modules() if isinstance(module, torch.nn.Linear))
        assert linear.weight.dtype == torch.bfloat16


@BOTH_LAYOUTS
def test_bfloat16_autocast(kv_layout: str) -> None:
    """Every factor has finite gradients."""
    model, ids = tiny_model(qk_rank=3, kv_layout=kv_layout, attention_bias=True).train(), token_ids(2, LENGTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


@BOTH_LAYOUTS
def test_data_parallel_replicas_use_their_own_factors(kv_layout: str) -> None:
    """`nn.DataParallel` copies modules, and the projection must use the copy's weights."""
    attention = tiny_model(qk_rank=3, kv_layout=kv_layout).model.layers[0].self_attn
    replica = attention._replicate_for_data_parallel()
    hidden = torch.randn(1, 5, attention.config.hidden_size)
    projections = ("q_proj",) if kv_layout == "shared" else ("q_proj", "k_proj")
    before = [getattr(attention, name)(hidden) for name in projections]
    for name in projections:
        setattr(replica, f"{name[0]}_base", None)
        with pytest.raises(TypeError):
            getattr(replica, name)(hidden)
    for name, expected in zip(projections, before, strict=True):
        assert torch.equal(getattr(attention, name)(hidden), expected)
