"""The tiny models that the engines run. Tests do not import `gda`, so that engines use the saved code."""

from typing import Any

# Heads are 32 wide, because the kernels of engines do not support smaller ones. On a CPU, SGLang pads an MLP to a
# multiple of 32.
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "bos_token_id": None,
    "eos_token_id": None,
}
STOCK = {"llama": "Llama", "qwen3": "Qwen3"}
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
# Exported models, by the model type that they are exported to.
EXPORTED: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "attention_out_bias": True, "qk_rank": 3, "tie_word_embeddings": True},
    "mistral": {"num_attention_heads": 10, "sliding_window": 5},
    "qwen2": {"attention_bias": True, "attention_out_bias": False, "hidden_size": 256},  # vLLM's ignores head_dim
    "qwen3": {"qk_norm": True},
}
NUM_NEW_TOKENS = 8
