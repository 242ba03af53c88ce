"""vLLM serves GDA models: its own transformers backend, scheduler, paged cache and compiled CPU kernels.

Run by `run.py`, which fetches a CPU build of vLLM and saves the models.
"""

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import EXPORTED, GDA, NUM_NEW_TOKENS, REFUSED, STOCK
from vllm import LLM, SamplingParams

MODELS = Path(os.environ["GDA_ENGINE_MODELS"])
Record = Callable[[str, object], None]


def generate(folder: Path, **options: Any) -> list[list[int]]:
    """What vLLM gives for the prompts of a model's folder, all in one batch."""
    prompts = json.loads((folder / "expected.json").read_text())["prompts"]
    settings: dict[str, Any] = {
        "model_impl": "transformers",
        "trust_remote_code": True,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 64,
        "max_num_seqs": 4,
        "enforce_eager": True,
    }
    llm = LLM(str(folder), **(settings | options))
    sampling = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    del llm
    gc.collect()
    return tokens


def expected(name: str) -> list[list[int]]:
    tokens: list[list[int]] = json.loads((MODELS / name / "expected.json").read_text())["tokens"]
    return tokens


@pytest.mark.parametrize("name", [*STOCK, *GDA])
def test_serves_as_transformers_generates(name: str, record_property: Record) -> None:
    """Three prompts of different lengths in one batch: the tokens of transformers' greedy `generate`."""
    assert generate(MODELS / name) == expected(name)
    record_property("row", f"{name} | loads; generates transformers' tokens")


@pytest.mark.parametrize("name", EXPORTED)
def test_serves_exported_models(name: str, record_property: Record) -> None:
    """What `gda export` writes, by vLLM's own class of the type: the tokens of the GDA model in transformers."""
    folder = f"exported-{name}"
    assert generate(MODELS / folder, model_impl="vllm", trust_remote_code=False) == expected(folder)
    record_property("row", f"exported as {name} | loads in vLLM's own class; generates transformers' tokens")


@pytest.mark.parametrize("name", ["shared", "tanh-and-norms"])
def test_serves_compiled(name: str, record_property: Record) -> None:
    """With torch.compile, as vLLM does unless told not to."""
    assert generate(MODELS / name, enforce_eager=False) == expected(name)
    record_property("row", f"{name}, compiled | loads; generates transformers' tokens")


@pytest.mark.parametrize("name", ["shared", "head-norm"])
def test_serves_on_two_ranks(name: str, record_property: Record) -> None:
    """Tensor parallelism by the model's plan: each rank has one of the two groups of heads."""
    assert generate(MODELS / name, tensor_parallel_size=2) == expected(name)
    record_property("row", f"{name}, two ranks | loads; generates transformers' tokens")


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_when_loading_what_it_cannot_run(name: str, record_property: Record) -> None:
    with pytest.raises(ValueError, match="serve it with transformers") as error:
        generate(MODELS / name)
    assert "\n" not in str(error.value)
    record_property("row", f"{name} | refused: {error.value}")
