"""Motif's own code for vLLM against converted and grown models: the same weights must give the same logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gda

from ...support.checkpoints import load, logits
from ...support.llamas import tensors_of
from ...support.relatives import save_motif
from ...support.tiny import relative_error, token_ids
from .fork import fork_logits, load_fork

TOLERANCE = 1e-5
# The backend accepts no head narrower than 32.
WIDTH: dict[str, Any] = {"head_dim": 32, "hidden_size": 64}
MOTIF_2_6B: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_noise_heads": ...,  # a field that the older release lacks
    "num_key_value_heads": 8,
    "head_dim": ...,
    "tie_word_embeddings": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "1:1 as in Motif-2.6B": MOTIF_2_6B,
    "1:1, fewer pairs than noise heads": MOTIF_2_6B | {"num_key_value_heads": 4},
    "4:1 as in Motif-2-12.7B": {**WIDTH, "num_attention_heads": 20, "num_noise_heads": 4, "num_key_value_heads": 8},
    "4:1, fewer pairs than noise heads": {**WIDTH, "num_attention_heads": 20, "num_noise_heads": 4},
    "3:1": {**WIDTH, "num_attention_heads": 8},
    "biases": {**WIDTH, "use_bias": True},
    "biases in attention": {**WIDTH, "attention_bias": True},
    "biases of q, k and v": {**WIDTH, "qkv_bias": True},
    "biases but of q, k and v": {**WIDTH, "use_bias": True, "qkv_bias": False},
}
Record = Callable[[str, object], None]


def compare(name: str, ours: Tensor, theirs: Tensor, record: Record) -> None:
    error = relative_error(ours, theirs)
    record("row", f"{name} | {error:.1e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_converted(variant: str, tmp_path: Path, record_property: Record) -> None:
    """The converted model, and its export, on which Motif's code runs."""
    ids, source = token_ids(2, 24), save_motif(tmp_path / "motif", **VARIANTS[variant])
    gda.convert(source, tmp_path / "gda")
    theirs = fork_logits(source, ids)
    compare(variant, logits(tmp_path / "gda", ids), theirs, record_property)
    gda.export(tmp_path / "gda", tmp_path / "back", format="motif")
    assert torch.equal(fork_logits(tmp_path / "back", ids), theirs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lambda_init_offset": 0},
        {"hidden_act": "silu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
    ],
    ids=str,
)
def test_comparison_notices(wrong: dict[str, Any], tmp_path: Path, record_property: Record) -> None:
    """Another λ_init, activation or RoPE base gives other logits."""
    source = save_motif(tmp_path / "motif", **VARIANTS["4:1 as in Motif-2-12.7B"])
    gda.convert(source, tmp_path / "gda")
    other, ids = load(tmp_path / "gda", **wrong), token_ids(2, 24)
    error = relative_error(logits(other, ids), fork_logits(source, ids))
    record_property("row", f"wrong {next(iter(wrong))} | {error:.1e}")
    assert error > 1e-3


def test_grown_in_width(tmp_path: Path, record_property: Record) -> None:
    """Signal heads, hidden size and MLP of Motif-2.6B's shape grown to that of Motif-2-12.7B, and exported."""
    ids, source = token_ids(2, 24), save_motif(tmp_path / "motif", **MOTIF_2_6B)
    gda.grow(source, tmp_path / "gda", signal=4, hidden=2, mlp=2, untie=True)
    gda.export(tmp_path / "gda", tmp_path / "grown", format="motif")
    theirs = fork_logits(tmp_path / "grown", ids)
    assert relative_error(theirs, fork_logits(source, ids)) <= TOLERANCE
    compare("grown, 1:1 to 4:1, hidden × 2, MLP × 2", logits(tmp_path / "gda", ids), theirs, record_property)


def test_grown_on_the_route_of_motif(tmp_path: Path, record_property: Record) -> None:
    """The whole route, with 5 layers of 4. Motif's code gets each layer's λ_init, for a grown layer keeps its own."""
    ids, source = token_ids(2, 24), save_motif(tmp_path / "motif", **MOTIF_2_6B)
    config = gda.grow(source, tmp_path / "gda", signal=4, hidden=2, mlp=2, depth=5, untie=True).config
    fields = json.loads((source / "config.json").read_text()) | {
        "num_hidden_layers": 5,
        "hidden_size": 512,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": 20,
        "num_noise_heads": 4,
        "head_dim": 32,
        "tie_word_embeddings": False,
    }
    lambda_inits = [config.layer_lambda_init(layer) for layer in range(5)]
    model = load_fork(fields, tensors_of(tmp_path / "gda"), lambda_inits)
    with torch.no_grad():
        theirs = torch.stack([model(row) for row in ids])
    assert relative_error(theirs, fork_logits(source, ids)) <= TOLERANCE
    compare("the same and 4 to 5 layers", logits(tmp_path / "gda", ids), theirs, record_property)
