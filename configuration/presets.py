"""Known shapes of GDA models. docs/family.md says where each number comes from, and which are guesses."""

import copy
from difflib import get_close_matches
from typing import Any

MOTIF: dict[str, Any] = {
    "kv_layout": "paired",
    "lambda_init_offset": -1,
    "head_norm": True,
    "head_norm_eps": 1e-5,
    "rms_norm_eps": 1e-6,
    "hidden_act": "poly_norm",
}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}
MOTIF_2_6B: dict[str, Any] = {
    **MOTIF,
    **NO_TOKENS,
    "vocab_size": 219520,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_noise_heads": 8,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
PRESETS: dict[str, dict[str, Any]] = {
    "motif-2-12.7b": {
        **MOTIF,
        "bos_token_id": 219396,
        "eos_token_id": 219395,
        "pad_token_id": 219395,
        "vocab_size": 219520,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_noise_heads": 8,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "motif-2.6b": MOTIF_2_6B,
    "motif-2.6b-lc": {
        **MOTIF_2_6B,
        "max_position_embeddings": 16384,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "diff-v1": {
        **NO_TOKENS,
        "vocab_size": 100288,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_noise_heads": 12,
        "num_key_value_heads": 24,
        "head_dim": 128,
        "kv_layout": "paired",
        "head_norm": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "diff-v2": {
        "num_attention_heads": 64,
        "num_noise_heads": 32,
        "lambda_type": "sigmoid",
        "lambda_init": 0.0,
    },
    "diffllama": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_noise_heads": 16,
        "num_key_value_heads": 32,
        "head_dim": 64,
        "kv_layout": "paired",
        "head_norm": True,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "llama-3-8b-expand": {"lambda_init": 0.0},
    "llama-3.2-1b-expand": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "lambda_init": 0.0,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "smollm2-135m-expand": {
        **NO_TOKENS,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 12,
        "num_noise_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "lambda_init": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
}


def preset_fields(name: str) -> dict[str, Any]:
    """The fields of a preset; the caller may change them.

    Raises:
        ValueError: for an unknown name, with those that resemble it.
    """
    if name not in PRESETS:
        resembling = get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.5)
        meant = f"did you mean {' or '.join(resembling)}?" if resembling else f"there are {', '.join(PRESETS)}"
        raise ValueError(f"GDAConfig has no preset {name!r}; {meant}")
    return copy.deepcopy(PRESETS[name])
