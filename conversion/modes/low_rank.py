r"""Dense projections → a base that the roles of a group share, and an update of low rank for each (arXiv 2501.17900).

    W_k ≈ B + P_k R_k        k = signal_1 … signal_r, noise        B, W_k (d, hidden), P_k (d, R), R_k (R, hidden)

For a given B the best update is the truncated SVD of W_k − B. The best B depends on the updates in turn: with Q_k the
projection onto what P_k leaves out, the error is Σ_k |Q_k (W_k − B)|², a least-squares problem in B. Solving the two in
turn, from the mean of the roles on, never makes the error larger. Relative error of queries of SmolLM2-135M-Instruct,
expanded to 3:1, mean of five layers (d = 64):

    rank                                     8      16     32     48
    mean of the roles and truncated SVD    0.526  0.426  0.276  0.153
    after 20 rounds                        0.470  0.336  0.143  0.009

Updates of full rank, the smaller of d and hidden, are exact whatever B is. (With n roles, rank d − d/n is enough for a
base that leaves nothing, which the rounds come near; there are as many parameters then as in dense projections.)
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.tensors.recipes import Recipe, checkpoint_specs, copied, is_lossless
from gda.conversion.tensors.safetensors_io import TensorSpec

ROUNDS = 20
# Directions that the projections Q_k hardly see are left to the updates: a base that follows them grows without bound.
CUTOFF = 1e-2
# Smallest singular value, relative to the root mean square of a head's, that is shared out between P_k and R_k evenly.
# Below it P_k keeps a size, for the gradient of R_k goes through it.
FLOOR = 1e-3
PARTS = ("base", "down", "up")


def same_config(config: GDAConfig, dtype: torch.dtype | None) -> GDAConfig:
    """The configuration of a GDA model, in `dtype` if given."""
    same = copy.deepcopy(config)
    if dtype is not None:
        same.dtype = dtype
    return same


def same_recipes(config: GDAConfig, source: dict[str, TensorSpec], dtype: torch.dtype | None) -> dict[str, Recipe]:
    """Each tensor of a GDA model as it is, in `dtype` if given; λ keeps its own."""
    names = checkpoint_specs(config)
    return {name: copied(name, source[name], None if ".lambda_" in name else dtype) for name in names}


def factored_config(dense: GDAConfig, rank: int) -> GDAConfig:
    """The configuration of `dense` with projections of that rank.

    Raises:
        ValueError: for a rank that cannot be.
    """
    config = copy.deepcopy(dense)
    config.qk_rank = rank
    config.validate_architecture()
    return config


def dense_config(config: GDAConfig) -> GDAConfig:
    """The configuration of the same model with dense projections."""
    dense = copy.deepcopy(config)
    dense.qk_rank = None
    return dense


def factored_recipes(config: GDAConfig, dense: dict[str, Recipe]) -> dict[str, Recipe]:
    """How each tensor of the factored checkpoint is made, given the recipes of the dense one."""
    factorizer = _Factorizer(config)
    recipes = {}
    for name, spec in checkpoint_specs(config).items():
        module, _, parameter = name.rpartition(".")
        projection, _, part = module.rpartition(".")[2].partition("_")
        if part not in PARTS:
            recipes[name] = dense[name]
            continue
        dense_name = f"{module.removesuffix(part)}proj.{parameter}"
        made = dense[dense_name]
        if parameter == "bias":
            recipes[name] = made
            continue
        make = partial(factorizer.part, name=dense_name, dense=made, roles=config.factored_projections[projection])
        how = f"{part} of {dense_name}, rank {config.qk_rank}, {ROUNDS} rounds; that one: {made.how}"
        recipes[name] = Recipe(TensorSpec(spec.shape, made.spec.dtype), made.sources, partial(make, part), how)
    return recipes


def is_exact(config: GDAConfig, recipes: dict[str, Recipe], source: dict[str, TensorSpec]) -> bool:
    """Whether the factored model computes what the dense one does: nothing truncated, nothing rounded below float32."""
    wide = all(recipe.spec.dtype.itemsize >= 4 for name, recipe in recipes.items() if _is_factor(name, config))
    return config.qk_rank == full_rank(config) and wide and is_lossless(recipes, source)


def full_rank(config: GDAConfig) -> int:
    """The rank at which updates can be anything."""
    return min(config.head_dim, config.hidden_size)


def _is_factor(name: str, config: GDAConfig) -> bool:
    return any(f".{projection}_{part}." in name for projection in config.factored_projections for part in PARTS)


def factor(weight: Tensor, *, roles: int, head_dim: int, rank: int, rounds: int = ROUNDS) -> dict[str, Tensor]:
    """Base, downs and ups of a dense weight, in float64.

    Args:
        weight: (H · d, hidden), groups of `roles` heads.
        roles: Heads that share a base.
        head_dim: d.
        rank: R, from 1 to the smaller of d and hidden.
        rounds: Of updates and base in turn; with 1 the base is the mean of the roles.

    Returns:
        `base` (H / roles · d, hidden), `down` (H · R, hidden) and `up` (H · d, R), as `GDAConfig.qk_rank` has them.
    """
    dense = weight.double().unflatten(0, (-1, roles, head_dim))  # (groups, roles, d, hidden)
    basis = None
    if roles * head_dim < weight.shape[1]:
        # Base and updates are combinations of a group's rows: all is done in coordinates of the space of these rows.
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
    """Left singular vectors (…, d, d) of (…, d, hidden), the largest last, each with its largest entry positive."""
    _, vectors = torch.linalg.eigh(remainder @ remainder.mT)
    largest = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
    return vectors * largest.sign()


def _correction(remainder: Tensor, rank: int) -> Tensor:
    """What to add to the base, (groups, 1, d, hidden), for the best updates of the remainders (groups, roles, d, …)."""
    left_out = _left_vectors(remainder)[..., :-rank]
    projection = left_out @ left_out.mT  # Q_k
    seen = projection.sum(dim=1, keepdim=True)
    return torch.linalg.pinv(seen, rtol=CUTOFF, hermitian=True) @ (projection @ remainder).sum(dim=1, keepdim=True)


def folded(base: Tensor, down: Tensor, up: Tensor, *, roles: int, head_dim: int) -> Tensor:
    """The dense weight (H · d, hidden) in float64: B + P_k R_k of each head. The inverse of `factor`."""
    ups = up.double().unflatten(0, (-1, roles, head_dim))  # (groups, roles, d, R)
    downs = down.double().unflatten(0, (-1, roles, up.shape[1]))  # (groups, roles, R, hidden)
    bases = base.double().unflatten(0, (-1, 1, head_dim))  # (groups, 1, d, hidden)
    return (bases + ups @ downs).flatten(0, 2)


class _Factorizer:
    """Factors one weight at a time, and remembers the last: its three tensors are written one after the other."""

    def __init__(self, config: GDAConfig):
        self._config = config
        self._name = ""
        self._factors: dict[str, Tensor] = {}

    def part(self, part: str, *tensors: Tensor, name: str, dense: Recipe, roles: int) -> Tensor:
        if self._name != name:
            weight = dense.make(*tensors)
            if not torch.isfinite(weight).all():
                raise ValueError(f"{name} holds NaN or infinity, which no factors have; does the source?")
            rank = self._config.qk_rank
            assert rank is not None  # or there would be no such tensor
            self._factors = factor(weight, roles=roles, head_dim=self._config.head_dim, rank=rank)
            self._name = name
        return self._factors[part]


def layer_errors(
    config: GDAConfig, dense: dict[str, Recipe], read: Callable[[str], Tensor], written: Callable[[str], Tensor]
) -> dict[str, list[float]]:
    """Relative error |W − (B + P_k R_k)| / |W| (Frobenius) by projection and layer, of the tensors as they are written.

    Args:
        config: Of the factored model.
        dense: Recipes of the dense one.
        read: Reads a tensor of the source.
        written: Reads a tensor of the factored checkpoint.
    """
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
