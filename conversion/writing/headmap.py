"""A drawing of the heads of a layer."""

from transformers import PreTrainedConfig

from gda.configuration.configuration_gda import MASKED, GDAConfig

MAX_GROUPS_DRAWN = 4


def head_map(config: GDAConfig) -> str:
    r"""Draw which query heads read which KV heads; s is a signal head, n a noise head.

    Each KV head, or pair of them, has a column; wide models are cut after a few columns.

        KV heads     0        1        2
        query heads  s s s n  s s s n  s s s n

        9 signal + 3 noise, 3:1, 30 layers
    """
    kv_columns, query_columns = _columns(config)
    drawn = min(len(kv_columns), MAX_GROUPS_DRAWN)
    widths = [max(len(kv), len(query)) for kv, query in zip(kv_columns, query_columns, strict=True)][:drawn]
    more = "  …" if drawn < len(kv_columns) else ""
    summary = (
        f"{config.num_signal_heads} signal + {config.num_noise_heads} noise, {config.signal_noise_ratio}:1, "
        f"{config.num_hidden_layers} layers"
    )
    lines = [
        "KV heads     " + "  ".join(kv.ljust(width) for kv, width in zip(kv_columns, widths, strict=False)) + more,
        "query heads  " + "  ".join(q.ljust(width) for q, width in zip(query_columns, widths, strict=False)) + more,
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n\n" + summary + _fading(config)


def in_masked_growth(config: PreTrainedConfig) -> bool:
    """Whether new heads, neurons or layers of a GDA model are being faded in."""
    return any(getattr(config, name, None) is not None for name in MASKED)


def _fading(config: GDAConfig) -> str:
    """What is being faded in, and how far."""
    if config.fade is None:
        return ""
    parts = []
    if config.masked_signal_heads is not None:
        parts.append(f"the last {config.masked_signal_heads} of each {config.signal_group_size} signal heads")
    if config.masked_neurons is not None:
        parts.append(f"the last {config.masked_neurons:,} of {config.intermediate_size:,} neurons")
    if config.masked_layers is not None:
        parts.append(f"layers {', '.join(map(str, config.masked_layers))}")
    if config.faded_head_norm is not None:
        parts.append("the head norm")
    if config.lambda_target is not None:
        parts.append(f"λ via {config.lambda_target:.4g}" if config.lambda_target else "λ")
    return f", fading in {'; '.join(parts)} (fade {config.fade:.4g})"


def _columns(config: GDAConfig) -> tuple[list[str], list[str]]:
    noise, kv_heads, ratio = config.num_noise_heads, config.num_key_value_heads, config.signal_noise_ratio
    group = " ".join(["s"] * ratio + ["n"])
    if config.kv_layout == "paired":
        pairs = kv_heads // 2
        kv = [f"{2 * pair} signal, {2 * pair + 1} noise" for pair in range(pairs)]
        return kv, ["  ".join([group] * (noise // pairs))] * pairs
    if noise >= kv_heads:
        return [str(head) for head in range(kv_heads)], ["  ".join([group] * (noise // kv_heads))] * kv_heads
    shared_by = kv_heads // noise
    kv = [", ".join(str(shared_by * head + offset) for offset in range(shared_by)) for head in range(noise)]
    return kv, [group] * noise
