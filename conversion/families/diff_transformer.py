r"""State dicts of Microsoft's attention modules, DIFF Transformer V1 and V2, as GDA's.

Both turn neighbours (x_{2j}, x_{2j+1}) of a head in their rotary embedding; transformers, and so GDA, turns
(x_j, x_{j + d/2}). Scores are sums over the positions of a head, so the rows of q and k may be put in another order,
the same for both: even rows first. v, o, λ and norms have no part in it.

Heads stand in GDA's order already. V1: q in pairs (signal, noise), k in pairs, v in pairs of slabs: the paired layout
at 1:1. V2: q in pairs (signal, noise), of which both read one KV head: the shared layout at 1:1.
"""

from collections.abc import Mapping
from typing import Any

import torch

from gda.configuration.configuration_gda import GDAConfig

# What the last part of a tensor's name becomes. V1 calls its output projection otherwise.
V1_NAMES = {name: name for name in ("q_proj", "k_proj", "v_proj", "subln")} | {"out_proj": "o_proj"}
V1_NAMES |= {name: name for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")}
V2_NAMES = {name: name for name in ("q_proj", "k_proj", "v_proj", "o_proj", "lambda_proj")}

# What the equations of each are in `GDAConfig`.
V1_EQUATIONS: dict[str, Any] = {
    "kv_layout": "paired",
    "lambda_type": "reparameterized",
    "lambda_init": None,
    "lambda_init_offset": 0,
    "head_norm": True,
    "head_norm_eps": 1e-5,
    "qk_norm": False,
    "qk_rank": None,
}
V2_EQUATIONS: dict[str, Any] = {
    "kv_layout": "shared",
    "lambda_type": "sigmoid",
    "head_norm": False,
    "qk_norm": False,
    "qk_rank": None,
}


def interleaved_to_half(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows (H · head_dim, …) of q or k from interleaved RoPE to rotate-half: 0 2 4 … 1 3 5 … in each head.

    Raises:
        ValueError: if the rows are not heads of an even width.
    """
    if head_dim % 2 or rows.shape[0] % head_dim:
        raise ValueError(f"{rows.shape[0]} rows are not heads of an even width {head_dim}")
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def diff_v1_fields(embed_dim: int, num_heads: int, num_kv_heads: int | None = None) -> dict[str, Any]:
    """Fields of `GDAConfig` for V1's arguments, which count pairs: `num_heads` is half of the query heads.

    Source: arXiv 2410.05258 and `multihead_diffattn.py` of its authors' repository.

    Raises:
        ValueError: if the numbers do not divide.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if embed_dim % (2 * num_heads) or num_heads % kv_heads:
        raise ValueError(
            f"embed_dim={embed_dim} must be a multiple of 2 · num_heads={2 * num_heads}, "
            f"and num_heads={num_heads} of num_kv_heads={kv_heads}"
        )
    return {
        "hidden_size": embed_dim,
        "num_attention_heads": 2 * num_heads,
        "num_noise_heads": num_heads,
        "num_key_value_heads": 2 * kv_heads,
        "head_dim": embed_dim // num_heads // 2,
        **V1_EQUATIONS,
    }


def diff_v2_fields(d_model: int, num_heads: int, num_kv_heads: int | None, head_dim: int) -> dict[str, Any]:
    """Fields of `GDAConfig` for V2's arguments, of which `num_heads` counts the heads after the subtraction.

    Source: `multihead_flashdiffv2.py` of its authors' repository.

    Raises:
        ValueError: if the numbers do not divide: a signal head and its noise head would then read two KV heads.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % kv_heads:
        raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={kv_heads}")
    return {
        "hidden_size": d_model,
        "num_attention_heads": 2 * num_heads,
        "num_noise_heads": num_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "lambda_init": 0.0,  # which nothing reads: λ is projected, and no norm scales by it
        **V2_EQUATIONS,
    }


def from_diff_v1(state: Mapping[str, torch.Tensor], config: GDAConfig, *, variant: str) -> dict[str, torch.Tensor]:
    """The tensors of V1 attention modules under GDA's names, their q and k rows in the order of rotate-half.

    Args:
        state: A state dict of one module, or of a model that holds some; what is no part of one is passed on as it is.
        config: As `diff_v1_fields` gives its fields.
        variant: "naive" for weights trained by `MultiheadDiffAttn`, "flash" for `MultiheadFlashDiff1` or `…2`. They
            agree where every pair of query heads has keys of its own. With fewer KV heads the naive module repeats
            them before it forms pairs, so that signal and noise of a pair share a key; only "flash" is GDA's paired
            layout.

    Returns:
        A state dict for `GDAAttention`, or for the model.

    Raises:
        ValueError: for an unknown variant, another member's config, a naive one with grouped keys, or tensors of other
            names or shapes.
    """
    if variant not in ("naive", "flash"):
        raise ValueError(f"variant {variant!r} is not one of naive, flash")
    pairs, kv_pairs = config.num_noise_heads, config.num_key_value_heads // 2
    sizes = {"num_attention_heads": 2 * pairs, "head_dim": config.hidden_size // pairs // 2}
    _require_fields(config, "DIFF V1", V1_EQUATIONS | sizes)
    if variant == "naive" and kv_pairs != pairs:
        raise ValueError(
            f"variant 'naive' with num_heads={pairs} and num_kv_heads={kv_pairs}: "
            "that module pairs repeated keys otherwise than GDA and the flash variants; "
            "only num_kv_heads = num_heads can be mapped"
        )
    return _mapped(state, config, V1_NAMES, "out_proj")


def from_diff_v2(state: Mapping[str, torch.Tensor], config: GDAConfig) -> dict[str, torch.Tensor]:
    """The tensors of V2 attention modules under GDA's names, their q and k rows in the order of rotate-half.

    Args:
        state: A state dict of one `MultiheadFlashDiffV2`, or of a model that holds some; what is no part of one is
            passed on as it is.
        config: As `diff_v2_fields` gives its fields.

    Returns:
        A state dict for `GDAAttention`, or for the model.

    Raises:
        ValueError: for another member's config, or tensors of other names or shapes.
    """
    _require_fields(config, "DIFF V2", V2_EQUATIONS | {"num_attention_heads": 2 * config.num_noise_heads})
    return _mapped(state, config, V2_NAMES, "lambda_proj")


def _require_fields(config: GDAConfig, member: str, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if getattr(config, name) != value:
            raise ValueError(f"the config has {name}={getattr(config, name)!r}, and {member} has {value!r}")


def _mapped(
    state: Mapping[str, torch.Tensor], config: GDAConfig, names: dict[str, str], mark: str
) -> dict[str, torch.Tensor]:
    """Rename and reorder what belongs to a module; `mark` is the part by which a module is known."""
    modules = {name.removesuffix(f"{mark}.weight") for name in state if name.endswith(f"{mark}.weight")}
    if not modules:
        raise ValueError(f"no tensor is called {mark}.weight, so the state dict holds no attention module of this kind")
    mapped = {}
    for name, tensor in state.items():
        prefix, part, suffix = _split(name)
        if prefix in modules:
            if part not in names:
                raise ValueError(f"{name} is no part of an attention module that has {mark}")
            if part in ("q_proj", "k_proj"):
                _require_rows(name, tensor, config)
                tensor = interleaved_to_half(tensor, config.head_dim)
            name = f"{prefix}{names[part]}{suffix}"
        mapped[name] = tensor
    return mapped


def _split(name: str) -> tuple[str, str, str]:
    """`layers.0.attn.q_proj.weight` → `layers.0.attn.`, `q_proj`, `.weight`; a bare parameter has no suffix."""
    suffix = ".weight" if name.endswith(".weight") else ""
    prefix, dot, part = name.removesuffix(suffix).rpartition(".")
    return prefix + dot, part, suffix


def _require_rows(name: str, tensor: torch.Tensor, config: GDAConfig) -> None:
    heads = config.num_attention_heads if "q_proj" in name.split(".") else config.num_key_value_heads
    wanted = (heads * config.head_dim, config.hidden_size)
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but the config asks for {wanted}")
