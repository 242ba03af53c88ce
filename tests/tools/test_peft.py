"""PEFT adapts a GDA model by default as it adapts a Llama, and its adapters are saved, loaded and merged."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gda import GDAForCausalLM

from ..support.llamas import llama_model
from ..support.repository import ROOT
from ..support.tiny import tiny_model, token_ids

peft = pytest.importorskip("peft")

MODELS: dict[str, dict[str, Any]] = {
    "shared": {"head_norm": True},
    "paired": {"kv_layout": "paired", "num_key_value_heads": 4, "lambda_type": "tanh"},
}
CONFIGS: dict[str, Any] = {
    "LoRA": lambda: peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
    "DoRA": lambda: peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, init_lora_weights=False),
    "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
    "LoHa": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", init_weights=False, target_modules="all-linear"),
}


def adapted_layers(model: Any) -> set[str]:
    return {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "base_layer")}


@pytest.mark.parametrize("config", ["LoRA", "DoRA", "IA3"])
def test_same_layers_as_in_a_llama(config: str) -> None:
    """Without target_modules."""
    llama = peft.get_peft_model(llama_model(), CONFIGS[config]())
    assert adapted_layers(peft.get_peft_model(tiny_model(), CONFIGS[config]())) == adapted_layers(llama)


def test_factored_queries_are_adapted() -> None:
    """With qk_rank there is no q_proj: LoRA adapts the base of the queries and the first factor of the updates."""
    adapted = peft.get_peft_model(tiny_model(qk_rank=3), CONFIGS["LoRA"]())
    assert adapted_layers(adapted) == {"q_base", "q_down", "v_proj"}
    assert adapted_layers(peft.get_peft_model(tiny_model(), CONFIGS["LoRA"]())) == {"q_proj", "v_proj"}


IMPORTED_LATE = """
import sys
from tests.support.tiny import tiny_model
model = tiny_model()
assert "peft" not in sys.modules
from peft import LoraConfig, get_peft_model
adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
print(*sorted({name.split(".")[-1] for name, each in adapted.named_modules() if hasattr(each, "base_layer")}))
"""


@pytest.mark.slow
def test_peft_may_be_imported_after_the_model_is_made() -> None:
    ran = subprocess.run([sys.executable, "-c", IMPORTED_LATE], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.split() == ["q_proj", "v_proj"], ran.stderr


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", CONFIGS)
def test_saved_and_merged_adapters(config: str, name: str, tmp_path: Path) -> None:
    """The loaded adapter and the merged model give the logits of the adapted model; λ stays float32."""
    torch.manual_seed(0)
    ids = token_ids(2, 12)
    adapted = peft.get_peft_model(tiny_model(**MODELS[name]), CONFIGS[config]()).eval()
    with torch.no_grad():
        plain, wanted = tiny_model(**MODELS[name])(ids).logits, adapted(ids).logits
        assert (plain - wanted).abs().max() > 1e-3
        adapted.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(tiny_model(**MODELS[name]), tmp_path).eval()
        torch.testing.assert_close(again(ids).logits, wanted)
        merged = again.merge_and_unload()
        assert type(merged) is GDAForCausalLM
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert all(weight.dtype == torch.float32 for key, weight in merged.named_parameters() if "lambda" in key)
