r"""Dense projections → a base that the heads of a group share, and a low-rank update for each (arXiv 2501.17900).

    W_k ≈ B + P_k R_k        k = signal_1 … signal_r, noise        B, W_k (d, hidden), P_k (d, R), R_k (R, hidden)

For a given base B the best update is the truncated SVD of W_k − B. The best B depends on the updates in turn: with Q_k
the projection onto what P_k does not span, the error is Σ_k |Q_k (W_k − B)|², a least-squares problem in B. Solving the
two in turn, starting from the mean of the heads, never increases the error. Relative error of the queries of
SmolLM2-135M-Instruct, expanded to 3:1, mean of five layers (d = 64):

    rank                                     8      16     32     48
    mean of the heads and truncated SVD    0.526  0.426  0.276  0.153
    after 20 rounds                        0.470  0.336  0.143  0.009

Updates of full rank, the smaller of d and hidden, are exact for any B. (With n heads in a group, rank d − d/n is
enough for the best base, and the rounds come close to it; there are then as many parameters as in dense projections.)
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gda.common.errors import errors_as
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.conversion import Conversion, with_fields
from gda.conversion.sources.source import Source
from gda.conversion.tensors.recipes import Recipe, checkpoint_specs, is_lossless
from gda.conversion.tensors.safetensors_io import TensorSpec

ROUNDS = 20
# Relative cutoff below which a direction is left to the updates. Otherwise the base could grow without bound.
CUTOFF = 1e-2
# P_k and R_k share each singular value evenly, down to this size relative to a head's root mean square. Below it P_k
# keeps that size, since the gradient of R_k passes through it.
FLOOR = 1e-3
PARTS = ("base", "down", "up")


def low_rank(dense: Conversion, source: Source, rank: int) -> Conversion:
    """Factorize the queries, and the paired keys, of a planned conversion.

    Raises:
        ValueError: for an impossible rank, a source that is factorized already, or one that cannot be run to compare it
            with the result.
    """
    if dense.config.qk_rank is not None:
        raise ValueError(f"{source.name} has qk_rank={dense.config.qk_rank} already; run `gda fold` first")
    if not source.can_run:
        raise ValueError(
            f"--qk-rank: a {source.config.model_type} model cannot be run to compare it with the result; "
            "convert it first, then convert the result with --qk-rank"
        )
    with errors_as(source.name, ValueError):
        config = with_fields(dense.config, qk_rank=rank)
    recipes = factored_recipes(config, dense.recipes)
    factors = [recipe for name, recipe in recipes.items() if name not in dense.recipes]
    wide = all(recipe.spec.dtype.itemsize >= 4 for recipe in factors)
    exact = dense.lossless and rank == full_rank(config) and wide and is_lossless(recipes, source.specs)
    what = "queries and keys" if "k" in config.factored_projections else "queries"
    notes = list(dense.notes)
    if rank < full_rank(config):
        notes.append(
            f"qk_rank {rank} is below the full rank of {full_rank(config)}: {what} are approximated, "
            "which is not lossless"
        )
    elif dense.lossless and not exact:
        notes.append(
            f"base and updates of {what} are rounded to a narrow dtype, which is not lossless; "
            "--dtype float32 avoids that"
        )
    kept = dict(dense.kept)
    for kind in {"query", "key"} & kept.keys():
        kept[f"{kind} rank"] = kept[kind].view(-1, config.head_dim)[:, :1].expand(-1, rank).flatten()
    return replace(
        dense,
        config=config,
        recipes=recipes,
        lossless=exact,
        notes=notes,
        settings=dense.settings | {"qk_rank": rank},
        kept=kept,
        before=dense,
    )


def dense_specs(config: GDAConfig) -> dict[str, TensorSpec]:
    """The tensors of a checkpoint of the same model with dense projections."""
    return checkpoint_specs(with_fields(config, qk_rank=None))


def factored_recipes(config: GDAConfig, dense: dict[str, Recipe]) -> dict[str, Recipe]:
    """The recipes of the factored checkpoint, given those of the dense one."""
    last: dict[str, dict[str, Tensor]] = {}  # the three factors of a weight are written one after the other

    def make(part: str, name: str, roles: int, *tensors: Tensor) -> Tensor:
        factors = last.get(name)
        if factors is None:
            weight = dense[name].make(*tensors)
            if not torch.isfinite(weight).all():
                raise ValueError(
                    f"{name} is not finite and cannot be factorized; does the source hold NaN or infinity?"
                )
            assert config.qk_rank is not None  # otherwise there is no such tensor
            factors = factor(weight, roles=roles, head_dim=config.head_dim, rank=config.qk_rank)
            last.clear()
            last[name] = factors
        return factors[part]

    recipes = {}
    for name, spec in checkpoint_specs(config).items():
        module, _, parameter = name.rpartition(".")
        projection, _, part = module.rpartition(".")[2].partition("_")
        if part not in PARTS:
            recipes[name] = dense[name]
            continue
        dense_name = f"{module.removesuffix(part)}proj.{parameter}"
        whole = dense[dense_name]
        if parameter == "bias":
            recipes[name] = whole
            continue
        how = f"{part} of {dense_name}, rank {config.qk_rank}, {ROUNDS} rounds; that one: {whole.how}"
        made = partial(make, part, dense_name, config.factored_projections[projection])
        recipes[name] = Recipe(TensorSpec(spec.shape, whole.spec.dtype), whole.sources, made, how)
    return recipes


def full_rank(config: GDAConfig) -> int:
    """The rank at which updates can hold any weight."""
    return min(config.head_dim, config.hidden_size)


def factor(weight: Tensor, *, roles: int, head_dim: int, rank: int, rounds: int = ROUNDS) -> dict[str, Tensor]:
    """Factorize a dense weight (H · d, hidden) in float64; `roles` heads share a base.

    Updates and base are solved `rounds` times; with 1 the base is the mean of the heads. Returns `base` (H / roles · d,
    hidden), `down` (H · R, hidden) and `up` (H · d, R), as in `GDAConfig.qk_rank`.
    """
    dense = weight.double().unflatten(0, (-1, roles, head_dim))  # (groups, roles, d, hidden)
    basis = None
    if roles * head_dim < weight.shape[1]:
        # Base and updates are combinations of a group's rows, so we work in coordinates of the space of these rows.
        basis, coordinates = torch.linalg.qr(dense.flatten(1, 2).mT)  # (groups, hidden, roles · d)
        dense = coordinates.mT.unflatten(1, (roles, head_dim))
    base = dense.mean(dim=1, keepdim=True)
    for _ in range(rounds - 1):
        base = base + _correction(dense - base, rank)
    left = _left_vectors(dense - base)[..., -rank:]  # (groups, roles, d, R)
    down = left.mT @ (dense - base)
    sizes = down.norm(dim=-1)  # the singular values, (groups, roles, R)
    typical = dense.pow(2).sum(dim=(-2, -1)).div(head_dim).sqrt().unsqueeze(-1)
    share = sizes.maximum(FLOOR * typical).maximum(torch.tensor(torch.finfo(torch.float32).tiny)).sqrt()
    up, down = left * share.unsqueeze(-2), down / share.unsqueeze(-1)
    base, down = base.squeeze(1), down.flatten(1, 2)
    if basis is not None:
        base, down = base @ basis.mT, down @ basis.mT
    return {"base": base.flatten(0, 1), "down": down.flatten(0, 1), "up": up.flatten(0, 2)}


def _left_vectors(remainder: Tensor) -> Tensor:
    """Left singular vectors (…, d, d) of (…, d, hidden), largest last, each with its largest entry positive."""
    _, vectors = torch.linalg.eigh(remainder @ remainder.mT)
    largest = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
    return vectors * largest.sign()


def _correction(remainder: Tensor, rank: int) -> Tensor:
    """The correction (groups, 1, d, hidden) of the base that is best for remainders (groups, roles, d, hidden)."""
    left_out = _left_vectors(remainder)[..., :-rank]
    projection = left_out @ left_out.mT  # Q_k
    seen = projection.sum(dim=1, keepdim=True)
    return torch.linalg.pinv(seen, rtol=CUTOFF, hermitian=True) @ (projection @ remainder).sum(dim=1, keepdim=True)


def folded(base: Tensor, down: Tensor, up: Tensor, *, roles: int, head_dim: int) -> Tensor:
    """The dense weight (H · d, hidden) in float64, B + P_k R_k for each head. The inverse of `factor`."""
    ups = up.double().unflatten(0, (-1, roles, head_dim))  # (groups, roles, d, R)
    downs = down.double().unflatten(0, (-1, roles, up.shape[1]))  # (groups, roles, R, hidden)
    bases = base.double().unflatten(0, (-1, 1, head_dim))  # (groups, 1, d, hidden)
    return (bases + ups @ downs).flatten(0, 2)


def layer_errors(
    config: GDAConfig, dense: dict[str, Recipe], read: Callable[[str], Tensor], written: Callable[[str], Tensor]
) -> dict[str, list[float]]:
    """Relative error |W − (B + P_k R_k)| / |W| (Frobenius) of the written tensors, by projection and layer."""
    errors: dict[str, list[float]] = {}
    for projection, roles in config.factored_projections.items():
        errors[projection] = []
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}.self_attn.{projection}"
            recipe = dense[f"{prefix}_proj.weight"]
            wanted = recipe.make(*map(read, recipe.sources)).double()
            parts = (written(f"{prefix}_{part}.weight") for part in PARTS)
            got = folded(*parts, roles=roles, head_dim=config.head_dim)
            size = wanted.norm().clamp_min(torch.finfo(torch.float64).tiny)
            errors[projection].append(((got - wanted).norm() / size).item())
    return errors
