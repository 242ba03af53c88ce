"""The choice of noise heads and the fitted output projection, against least squares on the features.

The references use every output of every head, which the closed form never stores.
"""

from collections.abc import Iterator
from itertools import combinations, permutations
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gda.conversion.split.heads import Moments, Split, split_layer

pytestmark = pytest.mark.sampled

HIDDEN, HEAD_DIM = 12, 3


class Layer(NamedTuple):
    """Outputs of heads o (tokens, H · d), an output projection (hidden, H · d), and the output of both."""

    heads: Tensor
    output: Tensor
    target: Tensor


def some_layer(heads: int, seed: int = 0, tokens: int = 400, head_dim: int = HEAD_DIM) -> Layer:
    """Correlated heads of different sizes, and a target that they cannot explain completely."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = drawn(tokens, 2 * head_dim) @ drawn(2 * head_dim, heads * head_dim)
    sizes = torch.linspace(0.5, 1.5, heads, dtype=torch.float64)[torch.randperm(heads, generator=generator)]
    outputs = (drawn(tokens, heads * head_dim) + 0.5 * common) * sizes.repeat_interleave(head_dim)
    output = drawn(HIDDEN, heads * head_dim)
    return Layer(outputs, output, outputs @ output.T + 0.1 * drawn(tokens, HIDDEN))


def moments_of(layer: Layer, pieces: int = 3) -> Moments:
    """Its moments, accumulated in pieces."""
    moments = Moments(layer.heads.shape[1], len(layer.output))
    for heads, target in zip(layer.heads.chunk(pieces), layer.target.chunk(pieces), strict=True):
        moments.add(heads.unsqueeze(0), target.unsqueeze(0))
    return moments


def split_of(layer: Layer, noise: int, kv_heads: int, lambdas: list[float], head_dim: int = HEAD_DIM) -> Split:
    return split_layer(
        moments_of(layer),
        layer.output,
        num_noise_heads=noise,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        lambdas=lambdas,
    )


def groups_of(order: list[int], noise: int) -> list[tuple[list[int], int]]:
    """Signal heads and noise head of each group."""
    size = len(order) // noise
    return [(order[at : at + size - 1], order[at + size - 1]) for at in range(0, len(order), size)]


def naive_features(heads: Tensor, order: list[int], noise: int, lambda_: float, head_dim: int = HEAD_DIM) -> Tensor:
    """o_i − λ o_noise(i), head by head."""
    of = heads.unflatten(1, (-1, head_dim))
    return torch.cat(
        [of[:, head] - lambda_ * of[:, last] for signal, last in groups_of(order, noise) for head in signal], dim=1
    )


def error_of(features: Tensor, weight: Tensor, target: Tensor) -> float:
    return ((target - features @ weight.T).square().sum() / target.square().sum()).item()


def least_error(features: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """A dense least-squares fit: its error and weight (hidden, S · d)."""
    weight = torch.linalg.lstsq(features, target).solution.T
    return error_of(features, weight, target), weight


def all_orders(heads: int, noise: int) -> Iterator[list[int]]:
    """Every division of heads into groups of signal heads and a noise head, up to the order of signals and groups."""

    def divided(left: list[int]) -> Iterator[list[int]]:
        if not left:
            yield []
            return
        first, *others = left  # is in the first group
        for rest in combinations(others, heads // noise - 1):
            group = [first, *rest]
            remaining = [head for head in left if head not in group]
            for last in group:
                begun = [*(head for head in group if head != last), last]
                yield from (begun + later for later in divided(remaining))

    return divided(list(range(heads)))


def test_all_orders_is_complete() -> None:
    """Checks the reference: each division once."""

    def division(order: tuple[int, ...] | list[int], noise: int) -> frozenset[tuple[frozenset[int], int]]:
        return frozenset((frozenset(signal), last) for signal, last in groups_of(list(order), noise))

    for heads, noise in ((4, 1), (4, 2), (6, 2)):
        found = [division(order, noise) for order in all_orders(heads, noise)]
        assert len(found) == len(set(found))
        assert set(found) == {division(order, noise) for order in permutations(range(heads))}


# ------------------------------------------------------------------------------------------------------ the closed form


@pytest.mark.parametrize("lambda_", [-0.3, 0.0, 0.1, 0.5])
@pytest.mark.parametrize(("heads", "noise", "kv_heads"), [(9, 3, 3), (4, 2, 2), (4, 1, 1), (8, 2, 1), (8, 4, 2)])
def test_output_and_errors_equal_least_squares(heads: int, noise: int, kv_heads: int, lambda_: float) -> None:
    """W and both errors, against a fit of the features."""
    layer = some_layer(heads)
    split = split_of(layer, noise, kv_heads, [lambda_])
    features = naive_features(layer.heads, split.order, noise, lambda_)
    error, weight = least_error(features, layer.target)
    assert split.lambda_ == lambda_
    assert (split.output - weight).norm() / weight.norm() < 1e-4
    assert split.error_after == pytest.approx(error, rel=1e-5)
    signal = [head for signals, _ in groups_of(split.order, noise) for head in signals]
    kept = layer.output.unflatten(1, (-1, HEAD_DIM))[:, signal].flatten(1)
    assert split.error_before == pytest.approx(error_of(features, kept, layer.target), rel=1e-9)
    assert split.error_after < split.error_before


def test_moments_are_sums_in_float64() -> None:
    """For any input dtype; many small terms beside a large one are not lost."""
    moments = Moments(2, 1)
    heads, target = torch.ones(1, 4096, 2, dtype=torch.bfloat16), torch.full((1, 4096, 1), 2.0, dtype=torch.bfloat16)
    heads[0, 0], target[0, 0] = 256.0, 512.0
    moments.add(heads, target)
    assert moments.heads.dtype == moments.cross.dtype == moments.target.dtype == torch.float64
    assert moments.heads.tolist() == [[65536.0 + 4095] * 2] * 2
    assert moments.cross.tolist() == [[2 * (65536.0 + 4095)] * 2]
    assert moments.target.item() == 4 * (65536.0 + 4095)


def test_heads_stay_in_their_kv_group() -> None:
    """Each group has heads of one KV head, each head once, and signals in the source's order."""
    split = split_of(some_layer(12), 6, 3, [0.1])
    assert sorted(split.order) == list(range(12))
    for number, (signal, last) in enumerate(groups_of(split.order, 6)):
        assert {head // 4 for head in [*signal, last]} == {number // 2}
        assert signal == sorted(signal)


# ----------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("heads", "noise"), [(3, 1), (4, 1), (4, 2), (8, 1), (8, 2), (8, 4)])
def test_order_of_one_group_is_optimal(heads: int, noise: int, seed: int) -> None:
    """By brute force."""
    layer = some_layer(heads, seed, tokens=120, head_dim=2)
    split = split_of(layer, noise, 1, [0.2], head_dim=2)
    least = min(
        least_error(naive_features(layer.heads, order, noise, 0.2, head_dim=2), layer.target)[0]
        for order in all_orders(heads, noise)
    )
    assert split.error_after == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_each_group_is_chosen_given_all_heads_of_the_others(seed: int) -> None:
    """By brute force in each group, with the undivided heads of the others."""
    heads, kv_heads, lambda_ = 12, 3, 0.2
    layer = some_layer(heads, seed)
    split = split_of(layer, kv_heads, kv_heads, [lambda_])
    for group in range(kv_heads):
        of_group = range(4 * group, 4 * group + 4)
        of = layer.heads.unflatten(1, (-1, HEAD_DIM))
        others = of[:, [head for head in range(heads) if head not in of_group]].flatten(1)
        errors = {}
        for last in of_group:
            order = [*(head for head in of_group if head != last), last]
            features = naive_features(layer.heads, order, 1, lambda_)
            errors[last] = least_error(torch.cat([features, others], dim=1), layer.target)[0]
        assert split.order[4 * group + 3] == min(errors, key=errors.__getitem__)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("heads", "noise", "kv_heads"), [(9, 3, 3), (8, 2, 2), (8, 4, 2), (16, 4, 2)])
def test_never_worse_than_the_last_head_of_each_group(heads: int, noise: int, kv_heads: int, seed: int) -> None:
    """The naive choice, also with a fitted output projection."""
    layer = some_layer(heads, seed)
    split = split_of(layer, noise, kv_heads, [0.1])
    naive = least_error(naive_features(layer.heads, list(range(heads)), noise, 0.1), layer.target)[0]
    assert split.error_after <= naive * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_lambda_has_the_least_error(seed: int) -> None:
    """Among those given, in any order, each with its best heads."""
    layer = some_layer(6, seed)
    lambdas = [0.6, 0.1, 0.3, -0.2]
    alone = {lambda_: split_of(layer, 2, 2, [lambda_]) for lambda_ in lambdas}
    best = min(lambdas, key=lambda lambda_: alone[lambda_].error_after)
    together = split_of(layer, 2, 2, lambdas)
    assert together.lambda_ == best
    assert together.order == alone[best].order
    assert together.error_after == alone[best].error_after


def test_lambda_of_the_data_is_found() -> None:
    """If the target needs exactly the difference with λ = 0.3, λ and its noise head are found."""
    layer = some_layer(4)
    features = naive_features(layer.heads, [0, 1, 3, 2], 1, 0.3)
    target = features @ layer.output[:, : features.shape[1]].T
    split = split_of(layer._replace(target=target), 1, 1, [0.1, 0.2, 0.3, 0.4])
    assert split.lambda_ == 0.3
    assert split.order == [0, 1, 3, 2]
    assert split.error_after < 1e-6


# ----------------------------------------------------------------------------------------------------- singular moments


def test_zero_head_becomes_the_noise_head() -> None:
    """Without any loss."""
    layer = some_layer(4)
    layer.heads[:, HEAD_DIM : 2 * HEAD_DIM] = 0
    target = layer.heads @ layer.output.T
    split = split_of(layer._replace(target=target), 1, 1, [0.1, 0.3])
    assert split.order == [0, 2, 3, 1]
    assert split.error_after < 1e-6
    assert torch.isfinite(split.output).all()


def test_of_two_equal_heads_one_becomes_the_noise_head() -> None:
    """The moments are singular; the output projection compensates for the factor 1 − λ."""
    layer = some_layer(4)
    layer.heads[:, 3 * HEAD_DIM :] = layer.heads[:, HEAD_DIM : 2 * HEAD_DIM]
    target = layer.heads @ layer.output.T
    split = split_of(layer._replace(target=target), 1, 1, [0.1, 0.3])
    assert split.order[-1] in (1, 3)
    assert split.error_after < 1e-6
    assert torch.isfinite(split.output).all()


def test_fewer_tokens_than_features() -> None:
    """The fit is exact on these tokens, and finite."""
    layer = some_layer(8, tokens=10)
    split = split_of(layer, 2, 2, [0.1])
    assert 0 <= split.error_after + 1e-9 < 1e-3
    assert torch.isfinite(split.output).all()
    assert split.output.norm() < 1e3 * layer.output.norm()


@pytest.mark.parametrize("zero", ["heads", "output"])
def test_zero_attention_gives_zero_errors(zero: str) -> None:
    """As in a newly inserted layer."""
    layer = some_layer(4)
    getattr(layer, zero).zero_()
    split = split_of(layer._replace(target=layer.heads @ layer.output.T), 2, 2, [0.1, 0.3])
    assert sorted(split.order) == [0, 1, 2, 3]
    assert (split.error_before, split.error_after) == (0, 0)
    assert torch.equal(split.output, torch.zeros(HIDDEN, 2 * HEAD_DIM, dtype=torch.float64))
