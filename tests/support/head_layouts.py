"""Head counts as fields of GDAConfig: one case for each way to share KV heads and noise heads."""

from typing import Any

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def heads(signal: int, noise: int, key_value: int, **fields: Any) -> dict[str, Any]:
    """The fields for these numbers of heads, and `fields` beside them."""
    return {"num_attention_heads": signal + noise, "num_noise_heads": noise, "num_key_value_heads": key_value, **fields}


# One case for each path through the attention layer. Decoding, padding and chunked prefill are tested on them.
PATHS: dict[str, dict[str, Any]] = {
    "shared": heads(6, 2, 2),
    "shared-more-noise-than-kv": heads(8, 4, 2),
    "shared-repeated-noise": heads(8, 2, 4),
    "paired": heads(6, 2, 4, kv_layout="paired"),
    "paired-grouped": heads(8, 4, 4, kv_layout="paired"),
    "sigmoid": heads(8, 2, 4, lambda_type="sigmoid"),
    "paired-tanh": heads(6, 2, 2, kv_layout="paired", lambda_type="tanh", head_norm=True),
    "head-norm-qk-norm-poly-norm": heads(6, 2, 2, head_norm=True, qk_norm=True, hidden_act="poly_norm"),
    "sliding": heads(6, 2, 2, sliding_window=3),
    "mixed": heads(6, 2, 2, sliding_window=3, num_hidden_layers=3, layer_types=MIXED),
    "paired-mixed": heads(6, 2, 2, kv_layout="paired", sliding_window=3, num_hidden_layers=3, layer_types=MIXED),
}

# Head counts alone.
HEADS: dict[str, dict[str, Any]] = {
    "grouped": heads(6, 2, 2),
    "multi-head": heads(6, 6, 6),
    "multi-head-one-noise": heads(6, 1, 6),
    "multi-query": heads(6, 2, 1),
    "multi-query-one-noise": heads(5, 1, 1),
    "more-noise-than-kv": heads(8, 4, 2),
    "fewer-noise-than-kv": heads(8, 2, 4),
    "paired": heads(6, 2, 4, kv_layout="paired"),
    "paired-one-pair": heads(6, 2, 2, kv_layout="paired"),
    "paired-more-noise-than-pairs": heads(8, 4, 4, kv_layout="paired"),
    "paired-1:1": heads(3, 3, 6, kv_layout="paired"),
}
