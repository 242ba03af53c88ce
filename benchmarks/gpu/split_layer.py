"""One layer of a split, fitted and trained for a step, on the GPU and on the CPU."""

import tempfile
from pathlib import Path

import torch
from checked_models import SHAPE
from kit import Row
from torch import Tensor
from transformers import LlamaConfig

from gda.conversion.split.distill import ATTENTION, Distillation, Plan
from gda.conversion.split.fit import fit_layers, last_states
from gda.conversion.split.recipes import split_config, split_recipes
from gda.conversion.split.rows import Rows, to_cut
from gda.conversion.split.work import Work
from gda.conversion.tensors.layerwise import LayerwiseModel, layer_prefix
from gda.conversion.tensors.recipes import checkpoint_specs


def split_layer(shape: Row, rows: int, length: int, place: str) -> dict[str, Tensor]:
    """The output projection of the closed form, and the gradients of the attention in a step of training."""
    heads = {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2}
    source = LlamaConfig(**(shape | heads), tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(spec.shape) if len(spec.shape) == 1 else torch.randn(spec.shape, generator=generator) / 8
        for name, spec in checkpoint_specs(source).items()
    }
    ids = torch.randint(SHAPE["vocab_size"], (rows, length), generator=generator)
    config = split_config(
        source, noise_heads=source.num_key_value_heads, lambda_type="reparameterized", dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as scratch:
        work = Work(Path(scratch) / "work", {})
        teacher = LayerwiseModel(source, tensors.__getitem__, place)
        in_rows = Rows(ids, to_cut(rows))
        (split,) = fit_layers(teacher, config, in_rows, fitted=rows, work=work)
        config.lambda_init = [split.lambda_]
        recipes = split_recipes(config, checkpoint_specs(source), [split], trained=None, seed=0, dtype=torch.float32)
        prefix = layer_prefix(0)
        start = {
            name.removeprefix(prefix): recipe(tensors.__getitem__)
            for name, recipe in recipes.items()
            if name.startswith(prefix + ATTENTION)
        }
        student = LayerwiseModel(config, tensors.__getitem__, place)
        distillation = Distillation(student, lambda _: start, work)
        states = last_states(teacher, rows, length, work)
        list(distillation.train(Plan(1, 0, mixed_precision=False), in_rows, states))
        gradients = {f"gradient of {name}": mean.clone() for name, mean in distillation.means[0].items()}
    return {"output projection": split.output.double()} | gradients
