"""Recipes: how each tensor of a converted checkpoint is made from tensors of its source."""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import gda.modeling_gda  # noqa: F401 - registers the model type with the Auto classes
from gda.conversion.tensors.safetensors_io import TensorSpec

# The choices of --dtype; "keep" keeps the source's.
DTYPE_CHOICES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAMBDA_VECTOR_STD = 0.1


@dataclass(frozen=True)
class Recipe:
    """How to make one tensor of the result from the source tensors named in `sources`; `how` says it in words.

    `scaled_by` names further tensors, from which `make` only finds powers of two to scale the result by.
    """

    spec: TensorSpec
    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor]
    how: str
    scaled_by: tuple[str, ...] = ()

    def __call__(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Make the tensor; `read` reads a source tensor by its name. Errors are those of `of`."""
        return self.of(*(read(name) for name in (*self.sources, *self.scaled_by)))

    def of(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Make the tensor of its source tensors. ValueError for values beyond float16's range."""
        made = self.make(*tensors)
        narrows = self.spec.dtype == torch.float16 and made.dtype != torch.float16
        if narrows and made.abs().max() > torch.finfo(torch.float16).max:
            raise ValueError(f"{self.sources[0]} has values that float16 cannot hold; use bfloat16")
        return made.to(self.spec.dtype)

    @property
    def copy_of(self) -> str | None:
        """Name of the source tensor that this is a copy of, perhaps in another dtype; None if it is computed."""
        return self.sources[0] if self.make is _identity else None


def copied(name: str, source: TensorSpec, dtype: torch.dtype | None) -> Recipe:
    """A copy of the source tensor `name`, in `dtype` if given; λ is then in float32."""
    if dtype is not None and ".lambda_" in name:
        dtype = torch.float32
    spec = TensorSpec(source.shape, dtype or source.dtype)
    how = "copied" if spec.dtype == source.dtype else f"cast from {_short(source.dtype)} to {_short(spec.dtype)}"
    return Recipe(spec, (name,), _identity, how)


def all_copied(config: PreTrainedConfig, source: dict[str, TensorSpec], dtype: torch.dtype | None) -> dict[str, Recipe]:
    """Copies of the tensors of a checkpoint of `config`, from a source that has them under the same names."""
    return {name: copied(name, source[name], dtype) for name in checkpoint_specs(config)}


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def lambda_recipe(name: str, spec: TensorSpec, seed: int) -> Recipe:
    """A λ tensor that gives λ = λ_init, or tanh or sigmoid of 0, with a non-zero gradient."""
    if name.endswith(".lambda_proj.weight"):
        return Recipe(spec, (), partial(torch.zeros, spec.shape), "zero, where tanh and sigmoid are steepest")
    # lambda_q2 equals lambda_q1, and k2 equals k1, so that the two exponentials cancel exactly.
    drawn_as = name[:-1] + "1"

    def make() -> torch.Tensor:
        return LAMBDA_VECTOR_STD * torch.randn(spec.shape, generator=generator_for(drawn_as, seed))

    return Recipe(spec, (), make, f"N(0, {LAMBDA_VECTOR_STD}²), the same in both pairs")


def is_lossless(recipes: dict[str, Recipe], source: dict[str, TensorSpec]) -> bool:
    """Whether no tensor is cast to a dtype that cannot hold its sources exactly."""
    return all(
        torch.promote_types(source[name].dtype, recipe.spec.dtype) == recipe.spec.dtype
        for recipe in recipes.values()
        for name in recipe.sources
    )


def generator_for(name: str, seed: int) -> torch.Generator:
    """A random generator that depends only on the tensor's name and the seed, not on the order of the work."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of `config` on the meta device in float32. `config` is not modified."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="sdpa")


def checkpoint_specs(config: PreTrainedConfig) -> dict[str, TensorSpec]:
    """The tensors of a checkpoint of `config`'s causal language model, in the order in which transformers saves them.

    As in a saved checkpoint, a tied head is absent.
    """
    model = meta_model(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    return {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
