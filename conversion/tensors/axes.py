"""The meaning of each axis of each tensor.

Growth adds features, such as a signal head's output or a channel of the residual stream. This table says which axes of
which tensors hold them, and which tensors sum over them.
"""

import re

from gda.configuration.configuration_gda import GDAConfig

# By module, the kind of feature that each axis of its weight counts; None where growth changes nothing. A bias counts
# what the first axis counts.
AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens": (None, "hidden"),
    "lm_head": (None, "hidden"),
    "norm": ("hidden",),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "q_proj": ("query", "hidden"),
    "q_base": ("query base", "hidden"),
    "q_down": ("query rank", "hidden"),
    "q_up": ("query", None),
    "k_proj": ("key", "hidden"),
    "k_base": ("key base", "hidden"),
    "k_down": ("key rank", "hidden"),
    "k_up": ("key", None),
    "v_proj": ("key", "hidden"),
    "o_proj": ("hidden", "output"),
    "q_norm": (None,),
    "k_norm": (None,),
    "subln": (None,),
    "self_attn": (None,),  # the vectors of λ
    "lambda_proj": ("signal", "hidden"),
    "gate_proj": ("neuron", "hidden"),
    "up_proj": ("neuron", "hidden"),
    "down_proj": ("hidden", "neuron"),
    "act_fn": (None,),
}
KINDS = frozenset(kind for axes in AXES.values() for kind in axes if kind is not None)
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def axes_of(name: str) -> tuple[str | None, ...]:
    """The kinds of features that the axes of the tensor `name` count."""
    module, _, parameter = name.rpartition(".")
    axes = AXES[module.rpartition(".")[2]]
    return axes[:1] if parameter == "bias" else axes


def reads(name: str, axis: int, config: GDAConfig) -> bool:
    """Whether the tensor sums over that axis, so that n equal features there count n times.

    Tied embeddings cannot be divided for the head alone, so the norm before the head is divided in its place.
    """
    if name == "model.norm.weight":
        return config.tie_word_embeddings
    return (
        axis == 1
        and not name.endswith("embed_tokens.weight")
        and not (name == "lm_head.weight" and config.tie_word_embeddings)
    )


def sizes(config: GDAConfig) -> dict[str, int]:
    """The number of features of each kind."""
    d, rank = config.head_dim, config.qk_rank or 0
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return {
        "hidden": config.hidden_size,
        "query": heads * d,
        "query base": config.num_noise_heads * d,
        "query rank": heads * rank,
        "key": kv_heads * d,
        "key base": kv_heads // 2 * d,
        "key rank": kv_heads * rank,
        "output": config.num_signal_heads * config.value_width,
        "signal": config.num_signal_heads,
        "neuron": config.intermediate_size,
    }
