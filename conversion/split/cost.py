"""How long a split takes, and how much disk it needs."""

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from gda.conversion.families.llamalike import head_dim
from gda.conversion.split.distill import BATCH
from gda.conversion.tensors.layerwise import LayerwiseModel

# Cost of sampling, fitting to and training on a sequence, in multiples of its forward pass: measured on SmolLM2, on a
# CPU that multiplies bfloat16 twice as fast as float32.
SAMPLING, FITTING, TRAINING = 3.7, 2.0, 2.5
RUNS = 4


@dataclass(frozen=True)
class Amount:
    """What a split has to do, in sequences of `context` tokens."""

    context: int
    sampled: int  # sequences that the source writes
    fitted: int  # sequences that run through the layers, held-out ones included
    steps: int  # of training


@torch.no_grad()
def estimated_minutes(source: LayerwiseModel, amount: Amount) -> float:
    """Minutes of a split on this machine, from the best time of the first layer on one batch of arbitrary tokens."""
    ids = torch.arange(BATCH * amount.context).view(BATCH, -1) % source.config.vocab_size
    tensors, states = source.tensors(0), source.embed(ids)
    times = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        source.run(0, tensors, states)[..., 0].sum().item()
        times.append(time.perf_counter() - begun)
    head = source.config.vocab_size * source.config.hidden_size / sum(each.numel() for each in tensors.values())
    layers = SAMPLING * amount.sampled + FITTING * amount.fitted + TRAINING * BATCH * amount.steps
    passes = source.num_layers * layers + head * TRAINING * BATCH * amount.steps
    return passes * min(times) / BATCH / 60


def work_bytes(config: PreTrainedConfig, amount: Amount) -> int:
    """Bytes of the work folder, in float32.

    It holds the states before and after a layer, the output projections in closed form and, of each weight in training,
    its value, the two moments of Adam, and a checkpoint of these while the one before is still there.
    """
    states = 2 * amount.fitted * amount.context * config.hidden_size
    heads = config.num_attention_heads + config.num_key_value_heads
    matrix = config.num_hidden_layers * head_dim(config) * config.hidden_size  # of one head in all layers
    fitted = config.num_attention_heads * matrix  # at most: noise heads have no columns
    trained = 9 * 2 * heads * matrix if amount.steps else 0
    return torch.float32.itemsize * (states + fitted + trained)
