"""Recipes: how each tensor of a converted checkpoint is made from tensors of its source."""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import gda.modeling_gda  # noqa: F401 - registers the model type with the Auto classes

from .safetensors_io import TensorSpec


@dataclass(frozen=True)
class Recipe:
    """One output tensor: what it will be, which source tensors it needs, how it is made of them, and that in words."""

    spec: TensorSpec
    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor]
    how: str

    def __call__(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Make the tensor, reading its sources by `read`."""
        return self.make(*(read(name) for name in self.sources)).to(self.spec.dtype)

    @property
    def copy_of(self) -> str | None:
        """The source tensor that this one is, but perhaps for its dtype; None if it is made of some."""
        return self.sources[0] if self.make is _identity else None


def copied(name: str, source: TensorSpec, dtype: torch.dtype | None) -> Recipe:
    """The source's tensor of that name, in `dtype` if given, else as it is."""
    spec = TensorSpec(source.shape, dtype or source.dtype)
    how = "copied" if spec.dtype == source.dtype else f"cast from {_short(source.dtype)} to {_short(spec.dtype)}"
    return Recipe(spec, (name,), _identity, how)


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_lossless(recipes: dict[str, Recipe], source: dict[str, TensorSpec]) -> bool:
    """Whether every tensor keeps all bits of what it is made of: no dtype on the way holds less than the one before."""
    return all(
        torch.promote_types(source[name].dtype, recipe.spec.dtype) == recipe.spec.dtype
        for recipe in recipes.values()
        for name in recipe.sources
    )


def generator_for(name: str, seed: int) -> torch.Generator:
    """A random generator that depends on the tensor's name and the seed alone, not on the order of the work."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of `config` in float32, with shapes and no memory. `config` stays as it is."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="sdpa")


def checkpoint_specs(config: PreTrainedConfig) -> dict[str, TensorSpec]:
    """The tensors of a checkpoint of `config`'s causal language model, in the order in which transformers saves them.

    A tied head is left out, as in a saved checkpoint.
    """
    model = meta_model(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    return {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
