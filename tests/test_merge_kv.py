"""KV heads are merged in closed form before heads are divided: exactly where heads say the same in other words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import gda
from gda.conversion.convert import ConvertReport
from gda.conversion.split.merge import cluster

from .commands import Command
from .llamas import byte_tokenizer, llama_model, save_llama, tensors_of
from .test_sources_llamalike import some_ids, source_model
from .tiny import relative_error

TEXT = Path(gda.__file__).read_text() * 2  # some English, some code
TOKENS = 1024


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"{line} {number}" for number, line in enumerate(TEXT.splitlines())))
    return path


@pytest.fixture
def split(text: Path, tmp_path: Path) -> Callable[..., ConvertReport]:
    """Split a folder into a fresh one, in closed form unless told otherwise."""

    def run(source: Path, merge_kv: int | None, out: str = "out", **options: Any) -> ConvertReport:
        options = {"effort": "fast", "calibration": text, "calibration_tokens": TOKENS} | options
        return gda.convert(source, tmp_path / out, mode="split", merge_kv=merge_kv, **options)

    return run


def save(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# ------------------------------------------------------------------------------- KV heads that differ in nothing real


@torch.no_grad()
def with_spread_heads(
    grouped: PreTrainedModel, mha: PreTrainedModel, places: list[int], seed: int = 0
) -> PreTrainedModel:
    """`mha`, made to compute what `grouped` computes, though no two of its keys or values are alike.

    Query head i of `grouped`, and a KV head of its own, become head places[i]: the key of each is turned and scaled,
    another way at each frequency (only in sign, where keys are normed), and its value is multiplied by a matrix; what
    reads them undoes it.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors, config = grouped.state_dict(), grouped.config
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    normed = hasattr(grouped.model.layers[0].self_attn, "k_norm")
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        made: dict[str, list[Tensor]] = {name: [torch.empty(0)] * heads for name in tensors if prefix in name}
        made = {name: parts for name, parts in made.items() if "_norm" not in name and "o_proj.bias" not in name}
        for head, place in enumerate(places):
            read = head * kv_heads // heads
            turn = torch.randn(d // 2, generator=generator, dtype=torch.complex64)
            if normed:
                turn = turn.real.sign().to(turn)
            matrix = torch.randn(d, d, generator=generator) + 2 * torch.eye(d)
            for name, parts in made.items():
                if "q_proj" in name:
                    parts[place] = turned(rows(tensors[name], head, d), 1 / turn.conj())
                elif "k_proj" in name:
                    parts[place] = turned(rows(tensors[name], read, d), turn)
                elif "v_proj" in name:
                    parts[place] = matrix @ rows(tensors[name], read, d)
                else:
                    parts[place] = (tensors[name][:, head * d : (head + 1) * d] @ matrix.inverse()).T
        for name, parts in made.items():
            tensors[name] = torch.cat(parts).T if "o_proj" in name else torch.cat(parts)
    mha.load_state_dict(tensors)
    return mha.eval()


def rows(tensor: Tensor, head: int, d: int) -> Tensor:
    return tensor[head * d : (head + 1) * d]


def turned(rows: Tensor, turn: Tensor) -> Tensor:
    """The pairs (i, i + d/2) of a head's rows, times a complex number each."""
    real, imaginary = rows.chunk(2)
    z = torch.complex(real, imaginary) * (turn[:, None] if rows.dim() == 2 else turn)
    return torch.cat([z.real, z.imag])


PLACES = [5, 0, 3, 1, 7, 2, 4, 6]  # of the heads of two KV heads, four each: {0, 1, 3, 5} and {2, 4, 6, 7}
SPREAD = {"num_attention_heads": 8, "hidden_size": 40, "head_dim": 8}


def spread(model_type: str, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model of two KV heads, and one with eight that computes the same."""
    make: Callable[..., PreTrainedModel] = llama_model
    if model_type != "llama":

        def make(**fields: Any) -> PreTrainedModel:
            return source_model(model_type, **fields)

    grouped = make(**SPREAD, num_key_value_heads=2, **changes)
    return grouped, with_spread_heads(grouped, make(**SPREAD, num_key_value_heads=8, **changes), PLACES)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True}),
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
    ids=str,
)
def test_heads_that_differ_in_nothing_real_are_found_and_merged_without_loss(
    model_type: str, changes: dict[str, Any], tmp_path: Path, split: Callable[..., ConvertReport]
) -> None:
    grouped, mha = spread(model_type, **changes)
    ids = some_ids()
    with torch.no_grad():
        assert relative_error(mha(ids).logits, grouped(ids).logits) < 1e-4
    report = split(save(mha, tmp_path / "source"), 2)
    assert report.split is not None
    for layer in report.split.layers:
        assert layer.merge is not None
        assert layer.merge.groups == [[0, 1, 3, 5], [2, 4, 6, 7]]
        assert max(layer.merge.lost_keys, layer.merge.lost_values, layer.merge.error) < 1e-6
