"""vLLM serves GDA models, with its own transformers backend, scheduler, paged cache and compiled CPU kernels.

`run.py` unpacks a CPU build of vLLM, saves the models and runs this file.
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
    """vLLM's continuations of the prompts in a model's folder, as one batch."""
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
def test_tokens_are_those_of_transformers(name: str, record_property: Record) -> None:
    """A batch of three prompts of different lengths gives the tokens of transformers' greedy `generate`."""
    assert generate(MODELS / name) == expected(name)
    record_property("row", f"{name} | loads; generates transformers' tokens")


@pytest.mark.parametrize("name", EXPORTED)
def test_serves_exported_models(name: str, record_property: Record) -> None:
    """vLLM's own class runs a folder of `gda export` and gives the tokens of the GDA model in transformers."""
    folder = f"exported-{name}"
    assert generate(MODELS / folder, model_impl="vllm", trust_remote_code=False) == expected(folder)
    record_property("row", f"exported as {name} | loads in vLLM's own class; generates transformers' tokens")


@pytest.mark.parametrize("name", ["shared", "tanh-and-norms"])
def test_serves_compiled(name: str, record_property: Record) -> None:
    """With torch.compile, vLLM's default."""
    assert generate(MODELS / name, enforce_eager=False) == expected(name)
    record_property("row", f"{name}, compiled | loads; generates transformers' tokens")


@pytest.mark.parametrize("name", ["shared", "head-norm"])
def test_serves_on_two_ranks(name: str, record_property: Record) -> None:
    """With the model's tensor-parallel plan, each rank has one of the two groups of heads."""
    assert generate(MODELS / name, tensor_parallel_size=2) == expected(name)
    record_property("row", f"{name}, two ranks | loads; generates transformers' tokens")


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_models_are_refused_when_they_load(name: str, record_property: Record) -> None:
    with pytest.raises(ValueError, match="serve it with transformers") as error:
        generate(MODELS / name)
    assert "\n" not in str(error.value)
    record_property("row", f"{name} | refused: {error.value}")
