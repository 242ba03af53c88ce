"""What the axes of each tensor count. Growth adds features, such as a signal head's output or a channel of the residual
stream; this table says which axes of which tensors hold them, and which tensors sum over them."""

import re

from gda.configuration.configuration_gda import GDAConfig

# The kind of feature that each axis counts, by the end of the tensor's name; None where growth changes nothing.
AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens.weight": (None, "hidden"),
    "lm_head.weight": (None, "hidden"),
    "model.norm.weight": ("hidden",),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "q_proj.weight": ("query", "hidden"),
    "q_proj.bias": ("query",),
    "q_base.weight": ("query base", "hidden"),
    "q_down.weight": ("query rank", "hidden"),
    "q_up.weight": ("query", None),
    "q_up.bias": ("query",),
    "k_proj.weight": ("key", "hidden"),
    "k_proj.bias": ("key",),
    "k_base.weight": ("key base", "hidden"),
    "k_down.weight": ("key rank", "hidden"),
    "k_up.weight": ("key", None),
    "k_up.bias": ("key",),
    "v_proj.weight": ("key", "hidden"),
    "v_proj.bias": ("key",),
    "o_proj.weight": ("hidden", "output"),
    "o_proj.bias": ("hidden",),
    "q_norm.weight": (None,),
    "k_norm.weight": (None,),
    "subln.weight": (None,),
    "lambda_q1": (None,),
    "lambda_k1": (None,),
    "lambda_q2": (None,),
    "lambda_k2": (None,),
    "lambda_proj.weight": ("signal", "hidden"),
    "gate_proj.weight": ("neuron", "hidden"),
    "gate_proj.bias": ("neuron",),
    "up_proj.weight": ("neuron", "hidden"),
    "up_proj.bias": ("neuron",),
    "down_proj.weight": ("hidden", "neuron"),
    "down_proj.bias": ("hidden",),
    "act_fn.weight": (None,),
    "act_fn.bias": (None,),
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def axes_of(name: str) -> tuple[str | None, ...]:
    """The kinds of features that the axes of the tensor `name` count."""
    return next(axes for ending, axes in AXES.items() if name == ending or name.endswith("." + ending))


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
