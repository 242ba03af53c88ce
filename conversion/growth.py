"""Growth: operators that make a larger model of a model, and keep what it computes.

An operator takes a draft, a model that is described but not written, and returns a larger one. Its recipes are recipes
of the draft's recipes, so operators follow one another, and an expansion of a Llama, without a copy on disk.

    --depth    layers  0 1 2 3          →  0 1 1′ 2 3 3′        a copy adds nothing: its o_proj and down_proj are 0
    --signal   heads   a b n  c d n     →  a a b b n  c c d d n   replicas beside their original; noise heads stay
    --width    heads   a b n  c d n     →  a b n  c d n  a b n  c d n   KV heads, channels and neurons likewise
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gda._trainable import Trainable
from gda.configuration.configuration_gda import GDAConfig

from . import new_parts
from .axes import LAYER, axes_of, reads, sizes
from .headmap import in_masked_growth
from .insert import NEW, drawn, inserted, neuron_features, signal_features
from .plan import mode_of, planned_config, planned_recipes
from .provenance import Settings
from .recipes import Recipe, checkpoint_specs, generator_for
from .replicate import Replicas, deviation, repeated, shared_out
from .safetensors_io import TensorSpec
from .sources import PROVENANCE_FILE, Source

DEFAULT_NOISE = 0.01
# More is a slip of the finger, and planning it alone would fill the memory.
MOST_TIMES = 1000
# What a copied layer adds to the residual stream; zero, so that it adds nothing.
ADDS_TO_THE_STREAM = ("self_attn.o_proj.", "mlp.down_proj.")


@dataclass(frozen=True)
class Growth:
    """What a model was asked to grow by: part of the settings in its conversion.json.

    Attributes:
        signal: Replicas of each signal head; if masked, times their number.
        width: Times the hidden size, the MLP's and the numbers of heads.
        depth: Layers of the result.
        layers: Those that are copied, numbered as in the source; a layer named twice is copied twice.
        noise_std: Of the noise that tells replicas apart, relative to the standard deviation of the weight.
        masked: New heads, neurons and layers are no copies but begin as in a new model, behind a mask of 0.
        mlp: If masked, times the number of neurons.
    """

    signal: int | None = None
    width: int | None = None
    depth: int | None = None
    layers: list[int] | None = None
    noise_std: float = DEFAULT_NOISE
    masked: bool = False
    mlp: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class Draft:
    """A model before it is written.

    Attributes:
        config: Its configuration.
        recipes: How each tensor is made of the source's.
        kept: Of each kind of feature (see `axes`), which the source has.
        new_layers: Layers that the source does not have.
    """

    config: GDAConfig
    recipes: dict[str, Recipe]
    kept: dict[str, Tensor]
    new_layers: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, config: GDAConfig, recipes: dict[str, Recipe]) -> "Draft":
        """The model of these recipes, of which nothing is new yet."""
        return cls(config, recipes, {kind: torch.ones(size, dtype=torch.bool) for kind, size in sizes(config).items()})

    def in_order(self) -> "Draft":
        """The same with its recipes in the order in which transformers saves their tensors."""
        specs = checkpoint_specs(self.config)
        assert {name: spec.shape for name, spec in specs.items()} == {
            name: recipe.spec.shape for name, recipe in self.recipes.items()
        }
        return replace(self, recipes={name: self.recipes[name] for name in specs})


def planned(source: Source, *, noise_heads: int | None, lambda_type: str, seed: int, dtype: str) -> Draft:
    """The GDA model that `source` is, or becomes by expansion, before it grows.

    Raises:
        ValueError: for what cannot be, and for a model whose masked growth is under way.
    """
    if in_masked_growth(source.config):
        raise ValueError(f"{source.name} is in masked growth; train it until its fade is 1, then grow it")
    mode = mode_of(source.config, None)
    config = planned_config(source, mode=mode, noise_heads=noise_heads, lambda_type=lambda_type, dtype=dtype)
    return Draft.of(config, planned_recipes(source, config, mode=mode, seed=seed, dtype=dtype))


def planned_growth(source: Source, settings: Settings) -> Draft:
    """The model that growth of these settings makes of the source.

    Raises:
        ValueError: if `settings.growth` is not that of a growth.
    """
    try:
        growth = Growth(**(settings.growth or {}))
    except TypeError:
        raise ValueError(f"{PROVENANCE_FILE} holds no growth that is known here: {settings.growth}") from None
    begun = planned(
        source,
        noise_heads=settings.num_noise_heads,
        lambda_type=settings.lambda_type,
        seed=settings.seed,
        dtype=settings.dtype,
    )
    return grown(begun, growth, seed=settings.seed)


def grown(draft: Draft, growth: Growth, *, seed: int) -> Draft:
    """The model that `growth` makes: deeper, then with more signal heads, then wider; or masked, all at once.

    In that order, since replicas in a copied layer, where o_proj is zero, then have noise of their own.

    Raises:
        ValueError: for growth that cannot be, naming the option.
    """
    _refuse_nothing(growth)
    if growth.depth is not None or growth.layers is not None:
        draft = deeper(draft, growth)
    if growth.masked:
        return masked(draft, growth, seed=seed).in_order()
    if growth.signal is not None:
        draft = _replicated(draft, _signal_config, _signal_replicas, growth.signal, growth, seed=seed, option="signal")
    if growth.width is not None:
        draft = _replicated(draft, _wide_config, _wide_replicas, growth.width, growth, seed=seed, option="width")
    return draft.in_order()


def whole(option: str, times: int | float | None) -> int | None:
    """A number of times, from 2 to `MOST_TIMES`, as an integer.

    Raises:
        ValueError: naming the option, if it is another number.
    """
    if times is not None and times > MOST_TIMES:
        raise ValueError(f"{option} {times:g} is more than {MOST_TIMES}; grow in steps if that is what you mean")
    if times is not None and not (times >= 2 and times == times // 1):
        raise ValueError(
            f"{option} {times:g} is not a whole number from 2 on, and nothing can be replicated that often"
        )
    return None if times is None else int(times)


def _refuse_nothing(growth: Growth) -> None:
    if growth.signal is growth.width is growth.depth is growth.layers is growth.mlp is None:
        options = "--signal, --mlp or --depth" if growth.masked else "--signal, --depth or --width"
        raise ValueError(f"nothing to grow by: give {options}")
    if growth.masked and growth.width is not None:
        raise ValueError("--width replicates the whole model, which no mask can hide; leave away --masked or --width")
    if growth.masked and growth.noise_std != DEFAULT_NOISE:
        raise ValueError("--noise-std tells replicas apart, and --masked makes none")
    if growth.mlp is not None and not growth.masked:
        raise ValueError("--mlp adds new neurons, which only --masked can hide; --width replicates them")
    if not 0 <= growth.noise_std < float("inf"):
        raise ValueError(f"--noise-std {growth.noise_std} is not a number from 0 on")


# ---------------------------------------------------------------------------------------------------------------- depth


def layers_to_copy(layers: int, growth: Growth) -> list[int]:
    """The layers to copy, in order: those named, or the last of each of as many even parts (LLaMA-Pro, 2401.02415).

    Raises:
        ValueError: naming the option, for a depth or layers that cannot be.
    """
    depth, named = growth.depth, growth.layers
    if depth is not None and depth <= layers:
        raise ValueError(f"--depth {depth} is not more than the {layers} layers of the source")
    if depth is not None and depth > MOST_TIMES * layers:
        raise ValueError(f"--depth {depth} is more than {MOST_TIMES} times the {layers} layers of the source")
    if named is None:
        assert depth is not None
        copies = depth - layers
        return [-(-(copy + 1) * layers // copies) - 1 for copy in range(copies)]
    if not named or (wrong := [layer for layer in named if not 0 <= layer < layers]):
        raise ValueError(
            f"--layers {','.join(map(str, wrong)) if named else 'of none'} is not among the {layers} layers of the "
            f"source, 0 to {layers - 1}"
        )
    if depth is not None and layers + len(named) != depth:
        raise ValueError(f"--layers names {len(named)} layers, but --depth {depth} adds {depth - layers}")
    return sorted(named)


def deeper(draft: Draft, growth: Growth) -> Draft:
    """Copies of layers after their originals, that add nothing to the residual stream until they are trained."""
    old = draft.config
    copied = layers_to_copy(old.num_hidden_layers, growth)
    origins = sorted([*range(old.num_hidden_layers), *copied])
    new = [layer for layer, origin in enumerate(origins) if layer and origins[layer - 1] == origin]

    assert old.layer_types is not None  # filled in at construction
    config = copy.deepcopy(old)
    config.num_hidden_layers = len(origins)
    config.layer_types = [old.layer_types[origin] for origin in origins]
    if old.lambda_init is None or isinstance(old.lambda_init, list):
        config.lambda_init = [old.layer_lambda_init(origin) for origin in origins]
    config.validate_architecture()

    by_layer: dict[int, dict[str, Recipe]] = {origin: {} for origin in origins}
    recipes = {}
    for name, recipe in draft.recipes.items():
        if match := LAYER.fullmatch(name):
            by_layer[int(match.group(1))][match.group(2)] = recipe
        else:
            recipes[name] = recipe
    for layer, origin in enumerate(origins):
        for rest, recipe in by_layer[origin].items():
            made = _as_copy(recipe, rest, origin) if layer in new else recipe
            recipes[f"model.layers.{layer}.{rest}"] = made
    return replace(draft, config=config, recipes=recipes, new_layers=new)


def _as_copy(recipe: Recipe, rest: str, origin: int) -> Recipe:
    if rest.startswith(ADDS_TO_THE_STREAM):
        make = partial(torch.zeros, recipe.spec.shape, dtype=recipe.spec.dtype)
        return Recipe(recipe.spec, (), make, f"zero: this copy of layer {origin} adds nothing yet")
    return replace(recipe, how=f"of layer {origin}: {recipe.how}")


# ----------------------------------------------------------------------------------------------------- signal and width


def _signal_config(old: GDAConfig, times: int) -> dict[str, Any]:
    return {"num_attention_heads": times * old.num_signal_heads + old.num_noise_heads}


def _signal_replicas(config: GDAConfig, times: int) -> dict[str, Replicas]:
    """s1 s1′ s2 s2′ n: replicas stand next to their original, and so read its KV head."""
    signal = [times] * config.num_signal_heads
    queries = ([times] * config.signal_noise_ratio + [1]) * config.num_noise_heads
    replicas = {
        "query": Replicas.of_blocks(queries, config.head_dim, times),
        "output": Replicas.of_blocks(signal, config.value_width, times),
        "signal": Replicas.of_blocks(signal, 1, times),
    }
    if config.qk_rank is not None:
        replicas["query rank"] = Replicas.of_blocks(queries, config.qk_rank, times)
    return replicas


WIDENED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_noise_heads", "num_key_value_heads")


def _wide_config(old: GDAConfig, times: int) -> dict[str, Any]:
    return {name: times * getattr(old, name) for name in WIDENED}


def _wide_replicas(config: GDAConfig, times: int) -> dict[str, Replicas]:
    """Everything tiled: whole groups follow whole groups, so heads keep their KV heads and no layout needs a case."""
    return {kind: Replicas.tiled(size, times) for kind, size in sizes(config).items()}


def _replicated(
    draft: Draft,
    fields: Callable[[GDAConfig, int], dict[str, Any]],
    replicas_of: Callable[[GDAConfig, int], dict[str, Replicas]],
    times: int,
    growth: Growth,
    *,
    seed: int,
    option: str,
) -> Draft:
    """Features of some kinds `times` over; which tensors repeat or share them out is `axes`' to say."""
    config = copy.deepcopy(draft.config)
    for name, value in fields(draft.config, times).items():
        setattr(config, name, value)
    config.validate_architecture()
    replicas = replicas_of(draft.config, times)
    recipes = {
        name: _replicated_recipe(name, recipe, draft.config, replicas, growth.noise_std, f"{option}:{name}", seed)
        for name, recipe in draft.recipes.items()
    }
    kept = {
        kind: flags[each.origin] & (each.copy == 0) if (each := replicas.get(kind)) is not None else flags
        for kind, flags in draft.kept.items()
    }
    return replace(draft, config=config, recipes=recipes, kept=kept)


def _replicated_recipe(
    name: str,
    recipe: Recipe,
    config: GDAConfig,
    replicas: dict[str, Replicas],
    noise_std: float,
    drawn_as: str,
    seed: int,
) -> Recipe:
    repeats: dict[int, Replicas] = {}
    shares: dict[int, Replicas] = {}
    for axis, kind in enumerate(axes_of(name)):
        if kind in replicas:
            (shares if reads(name, axis, config) else repeats)[axis] = replicas[kind]
    if not repeats and not shares:
        return recipe
    shape = list(recipe.spec.shape)
    for axis, each in (repeats | shares).items():
        shape[axis] = len(each.origin)
    noise = partial(_noise, noise_std, config.initializer_range)
    make = partial(_make_replicated, recipe, repeats, shares, noise, partial(generator_for, drawn_as, seed))
    return Recipe(
        TensorSpec(tuple(shape), recipe.spec.dtype), recipe.sources, make, f"{recipe.how}; {_told(repeats, shares)}"
    )


def _make_replicated(
    recipe: Recipe,
    repeats: dict[int, Replicas],
    shares: dict[int, Replicas],
    noise: Callable[[Tensor], float],
    generator: Callable[[], torch.Generator],
    *tensors: Tensor,
) -> Tensor:
    made = recipe.make(*tensors).to(recipe.spec.dtype)
    if not shares:
        for axis, replicas in repeats.items():
            made = repeated(made, axis, replicas)
        return made
    ((axis, columns),) = shares.items()  # what a tensor reads is its last axis, and what it writes the one before
    rows = repeats.get(axis - 1)
    wide = shared_out(made if made.dim() == 2 else made[None], rows, columns, noise(made), generator())
    return wide if made.dim() == 2 else wide[0]


def _noise(noise_std: float, initializer_range: float, weight: Tensor) -> float:
    """Standard deviation of the noise on a weight; one that is all the same has none, and gets that of a new one."""
    return 0.0 if noise_std == 0 else noise_std * (deviation(weight) or initializer_range)


def _told(repeats: dict[int, Replicas], shares: dict[int, Replicas]) -> str:
    names = ("rows", "columns")
    told = [f"{names[axis]} × {each.count}" for axis, each in repeats.items()]
    return ", ".join(told + [f"{names[axis]} shared out to {each.count} replicas" for axis, each in shares.items()])


# --------------------------------------------------------------------------------------------------------------- masked


def masked(draft: Draft, growth: Growth, *, seed: int) -> Draft:
    """New signal heads, neurons and layers that begin as in a new model, behind a mask of 0 (arXiv 2305.02869).

    The new layers are those that `deeper` has put into the draft as copies.
    """
    old = draft.config
    if old.fade is not None:
        raise ValueError(f"--masked: λ of the source is at fade {old.fade:g}, and new parts start at 0; train it to 1")
    config = copy.deepcopy(old)
    origins: dict[str, Tensor] = {}
    config.fade = 0.0
    config.masked_layers = draft.new_layers or None
    if growth.signal is not None:
        origins |= signal_features(old, growth.signal)
        config.num_attention_heads = growth.signal * old.num_signal_heads + old.num_noise_heads
        config.masked_signal_heads = (growth.signal - 1) * old.signal_group_size
    if growth.mlp is not None:
        config.intermediate_size = _neurons(old.intermediate_size, growth.mlp)
        config.masked_neurons = config.intermediate_size - old.intermediate_size
        origins["neuron"] = neuron_features(old.intermediate_size, config.masked_neurons)
    config.validate_architecture()
    shapes = {name: spec.shape for name, spec in checkpoint_specs(config).items()}
    recipes = {
        name: _masked_recipe(name, recipe, shapes[name], config, origins, seed)
        for name, recipe in draft.recipes.items()
    }
    kept = draft.kept | {kind: origin != NEW for kind, origin in origins.items()}
    return replace(draft, config=config, recipes=recipes, kept=kept)


def _neurons(old: int, times: float) -> int:
    if not 1 < times < float("inf"):
        raise ValueError(f"--mlp {times:g} is not more than 1")
    if times > MOST_TIMES:
        raise ValueError(f"--mlp {times:g} is more than {MOST_TIMES}")
    if abs(times * old - round(times * old)) > 1e-6:
        raise ValueError(f"--mlp {times:g} times the {old} neurons of the source is no whole number")
    return round(times * old)


def _masked_recipe(
    name: str, recipe: Recipe, shape: tuple[int, ...], config: GDAConfig, origins: dict[str, Tensor], seed: int
) -> Recipe:
    spec = TensorSpec(shape, recipe.spec.dtype)

    def draw() -> Tensor:
        return drawn(name, shape, config, generator_for(f"masked:{name}", seed))

    if (layer := LAYER.fullmatch(name)) and config.is_new_layer(int(layer.group(1))):
        return Recipe(spec, (), draw, "new layer, as a new model is initialized")
    axis = next((axis for axis, kind in enumerate(axes_of(name)) if kind in origins), None)
    if axis is None:
        return recipe
    origin = origins[str(axes_of(name)[axis])]

    def make(*tensors: Tensor) -> Tensor:
        return inserted(recipe.make(*tensors).to(spec.dtype), axis, origin, draw)

    what = "columns" if axis == 1 else "rows"
    return Recipe(spec, recipe.sources, make, f"{recipe.how}; new {what} as a new model is initialized")


# ---------------------------------------------------------------------------------------------------------- what is new


def trainable(draft: Draft) -> Trainable:
    """Which parameters of the grown model are new, wholly or in part."""
    copies = "|".join(map(str, draft.new_layers))
    whole = [rf"model\.layers\.({copies})\..+"] if copies else []
    return new_parts.trainable(draft.config, draft.recipes, kept=draft.kept, whole=whole)
