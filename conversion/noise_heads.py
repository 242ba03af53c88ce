"""How many noise heads a model can get. Plain arithmetic, so that options are checked before a model is read."""


def added(heads: int, kv_heads: int, *, noise_heads: int | None, ratio: str | int | None, kv_layout: str) -> int:
    """The number of noise heads to add to `heads` query heads: one per KV head, unless it or a ratio is given.

    Raises:
        ValueError: for a number that is impossible, naming those that are possible.
    """
    fewer = kv_layout == "shared"  # with paired keys, each pair has noise heads of its own
    possible = [
        noise
        for noise in range(1, heads + 1)
        if heads % noise == 0 and (noise % kv_heads == 0 or (fewer and kv_heads % noise == 0))
    ]
    hint = f"possible for --noise-heads: {', '.join(f'{noise} ({heads // noise}:1)' for noise in possible)}"
    noise = _requested(heads, kv_heads, noise_heads, ratio, others=0, hint=hint)
    if noise not in possible:
        raise ValueError(f"{noise} noise heads cannot be added to {heads} query heads over {kv_heads} KV heads; {hint}")
    return noise


def divided(heads: int, kv_heads: int, *, noise_heads: int | None, ratio: str | int | None) -> int:
    """How many of `heads` query heads become noise heads: one per KV head, unless it or a ratio is given.

    Raises:
        ValueError: as `added`.
    """
    in_group = heads // kv_heads
    possible = [kv_heads * noise for noise in range(1, in_group) if in_group % noise == 0]
    hint = f"possible for --noise-heads: {', '.join(f'{noise} ({heads // noise - 1}:1)' for noise in possible)}"
    if not possible:
        hint = (
            f"each of the {kv_heads} KV heads has only one of the {heads} query heads; --mode expand adds noise heads"
        )
    noise = _requested(heads, kv_heads, noise_heads, ratio, others=1, hint=hint)
    if noise not in possible:
        raise ValueError(f"--mode split: {noise} of {heads} query heads cannot become noise heads; {hint}")
    return noise


def _requested(
    heads: int, kv_heads: int, noise_heads: int | None, ratio: str | int | None, *, others: int, hint: str
) -> int:
    """The number that is asked for. `others`: query heads of a group that are not signal heads."""
    if ratio is None:
        return kv_heads if noise_heads is None else noise_heads
    in_group = int(str(ratio).partition(":")[0]) + others
    if heads % in_group:
        raise ValueError(f"--ratio {ratio} does not fit the {heads} query heads of the source; {hint}")
    return heads // in_group
