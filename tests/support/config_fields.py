"""Fields of GDAConfig as hypothesis strategies: arbitrary values, and valid configurations."""

import dataclasses
from typing import Any

from hypothesis import strategies as st
from transformers import PreTrainedConfig

from gda import GDAConfig

OWN_FIELDS = {field.name for field in dataclasses.fields(GDAConfig)} - {
    field.name for field in dataclasses.fields(PreTrainedConfig)
}
ANY_FIELDS = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(-1, 8),
        "hidden_size": st.integers(-1, 12),
        "intermediate_size": st.integers(-1, 12),
        "num_hidden_layers": st.integers(-1, 3),
        "num_attention_heads": st.integers(-1, 12),
        "num_noise_heads": st.integers(-1, 5),
        "num_key_value_heads": st.integers(-1, 6),
        "head_dim": st.integers(-1, 8),
        "max_position_embeddings": st.integers(-1, 8),
    },
    optional={
        "kv_layout": st.sampled_from(["shared", "paired"]),
        "lambda_type": st.sampled_from(["reparameterized", "sigmoid", "tanh"]),
        "lambda_init": st.none() | st.integers(-2, 2) | st.lists(st.integers(-2, 2), max_size=3),
        "lambda_init_offset": st.integers(-3, 3),
        "head_norm": st.booleans(),
        "qk_norm": st.booleans(),
        "fade": st.none() | st.integers(-1, 2) | st.floats(0, 1),
        "masked_signal_heads": st.none() | st.integers(-1, 4),
        "masked_neurons": st.none() | st.integers(-1, 12),
        "masked_layers": st.none() | st.lists(st.integers(-1, 3), max_size=3),
        "blended_layers": st.none() | st.booleans(),
        "faded_head_norm": st.none() | st.booleans(),
        "lambda_target": st.none() | st.integers(-1, 2) | st.floats(),
        "hidden_act": st.sampled_from(["silu", "poly_norm"]),
        "tie_word_embeddings": st.booleans(),
        "attention_bias": st.booleans(),
        "attention_out_bias": st.none() | st.booleans(),
        "sliding_window": st.none() | st.integers(-1, 4),
        "layer_types": st.none() | st.lists(st.sampled_from(["full_attention", "sliding_attention"]), max_size=3),
    },
)


def _groups_of_signal_heads(layout: str, noise: int, key_value: int) -> int:
    """Number of sets of signal heads that read the same KV head and the same noise head."""
    return len({(i * noise // 60, i * key_value // 60 if layout == "shared" else 0) for i in range(60)})


@st.composite
def possible_fading(draw: st.DrawFn, neurons: int, layers: int, heads: int, head_norm: bool) -> dict[str, Any]:
    """The fields of fading in, or None for all of them. Some heads, neurons and layers are old."""
    parts = {
        "masked_signal_heads": draw(st.none() | st.integers(1, heads - 1)) if heads > 1 else None,
        "masked_neurons": draw(st.none() | st.integers(1, neurons - 1)) if neurons > 1 else None,
        "masked_layers": draw(st.none() | st.just([layers - 1])) if layers > 1 else None,
        "faded_head_norm": draw(st.sampled_from([None, True])) if head_norm else None,
        "lambda_target": draw(st.none() | st.floats(-2, 2)),
    }
    parts["blended_layers"] = draw(st.sampled_from([None, True])) if parts["masked_layers"] else None
    fades = any(value is not None for value in parts.values())
    return parts | {"fade": draw(st.floats(0, 1)) if fades else None}


@st.composite
def possible_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Valid fields: a few numbers are drawn, and the others follow from them."""
    layout = draw(st.sampled_from(["shared", "paired"]))
    layers, ratio, neurons = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 12))
    if layout == "paired":
        pairs = draw(st.integers(1, 2))
        noise, key_value = pairs * draw(st.integers(1, 2)), 2 * pairs
    elif draw(st.booleans()):
        key_value = draw(st.integers(1, 3))
        noise = key_value * draw(st.integers(1, 2))
    else:
        noise = draw(st.integers(1, 2))
        key_value = noise * draw(st.sampled_from([copies for copies in range(1, ratio + 1) if ratio % copies == 0]))
    fields = draw(ANY_FIELDS)
    signal_heads = noise * ratio // _groups_of_signal_heads(layout, noise, key_value)
    return fields | {
        "vocab_size": draw(st.integers(1, 8)),
        "hidden_size": draw(st.integers(1, 12)),
        "intermediate_size": neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": noise * (ratio + 1),
        "num_noise_heads": noise,
        "num_key_value_heads": key_value,
        "head_dim": 2 * draw(st.integers(1, 4)),
        "max_position_embeddings": draw(st.integers(1, 8)),
        "kv_layout": layout,
        "lambda_init": draw(
            st.none() | st.integers(-2, 2) | st.lists(st.integers(-2, 2), min_size=layers, max_size=layers)
        ),
        **draw(possible_fading(neurons, layers, signal_heads, fields.get("head_norm", False))),
        "sliding_window": draw(st.integers(1, 4)),
        "layer_types": draw(
            st.none()
            | st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers, max_size=layers)
        ),
    }
