"""Save the tiny models that `run.py` gives to serving engines, and beside each what transformers computes with it.

    python tests/upstream/engines/models.py FOLDER

Every model is a folder as `save_pretrained` leaves it, code included, with `expected.json`: token ids, the logits at
each position, and greedy continuations of a few prompts.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from gda import GDAConfig, GDAForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tiny import make_asymmetric  # noqa: E402

# A head is 32 wide, for the kernels of engines know no smaller one.
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "bos_token_id": None,
    "eos_token_id": None,
}
STOCK: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
GDA: dict[str, dict[str, Any]] = {
    "shared": {},
    "one-kv-head": {"num_noise_heads": 1, "num_key_value_heads": 1},
    "a-kv-head-per-head": {"num_attention_heads": 4},
    "two-noise-heads-per-kv-head": {"num_attention_heads": 12, "num_noise_heads": 4},
    "head-norm": {"head_norm": True},
    "sigmoid": {"lambda_type": "sigmoid"},
    "tanh-and-norms": {"lambda_type": "tanh", "head_norm": True, "qk_norm": True},
    "biases": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "sliding-window": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "tied": {"tie_word_embeddings": True},
    "poly-norm": {"hidden_act": "poly_norm", "head_norm": True},
    "qk-rank": {"qk_rank": 3, "attention_bias": True},
}
REFUSED: dict[str, dict[str, Any]] = {
    "paired": {"kv_layout": "paired", "num_key_value_heads": 4, "head_norm": True},
    "fewer-noise-heads": {"num_attention_heads": 5, "num_noise_heads": 1},
}
NUM_NEW_TOKENS = 8


@torch.no_grad()
def expectation(model: PreTrainedModel) -> dict[str, Any]:
    """What an engine is to compute: logits (T, vocab) of some ids, and greedy continuations of prompts of any length."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(SHAPE["vocab_size"], (length,), generator=generator) for length in (12, 3, 20)]
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS, "pad_token_id": 0}
    return {
        "prompts": [prompt.tolist() for prompt in prompts],
        "logits": model(prompts[0][None]).logits[0].tolist(),
        "tokens": [model.generate(prompt[None], **settings)[0, len(prompt) :].tolist() for prompt in prompts],
    }


def save(model: PreTrainedModel, folder: Path) -> None:
    make_asymmetric(model).save_pretrained(folder)
    (folder / "expected.json").write_text(json.dumps(expectation(model)))


def main(folder: Path) -> None:
    for name, (config_class, model_class) in STOCK.items():
        save(model_class(config_class(**SHAPE)), folder / name)
    for name, fields in (GDA | REFUSED).items():
        save(GDAForCausalLM(GDAConfig(**(SHAPE | {"num_noise_heads": 2} | fields))), folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
