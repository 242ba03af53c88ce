"""Compare one attention layer with transformers' Llama attention of as many query and KV heads, in prefill and decode.

    python benchmarks/attention.py --prefill 2048 4096 --decode 2048 8192
    python benchmarks/attention.py --backend flex_attention --dtype bfloat16 --prefill 2048 --decode 2048 --batch 1
    python benchmarks/attention.py --targets

Layers have hidden size 2,048 and head_dim 64. A decode step reads a cache of the given context and appends one token.
Prefill has no cache. With left padding, (i + 1) / 2B of the tokens of row i in a batch of B are padding.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from filled_cache import CACHES, FilledCache
from layers import DIFFLLAMA, LLAMA, NAIVE, Shape, build_layer
from measuring import Figure, add_options, device, figures, interleaved, parse, report, tell
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gda.modeling_gda.attention_gda import CACHE_ARGUMENT

# What is compared, by the query heads / KV heads of the Llama. With 32 query heads there is no 4:1, and with 8 KV heads
# and as few query heads no 7:1, so these have Llamas of their own.
GROUPS = {
    "32/8": (Shape(32, 8), (LLAMA, DIFFLLAMA, NAIVE, "GDA 3:1", "GDA expanded 4:1")),
    "40/8": (Shape(40, 8), (LLAMA, DIFFLLAMA, "GDA 4:1", "GDA paired 4:1")),
    "32/4": (Shape(32, 4), (LLAMA, DIFFLLAMA, "GDA 7:1")),
}
BACKENDS = ("eager", "sdpa", "flex_attention", "compiled")
PADDINGS = ("none", "left")
# (group, prefill tokens, decode contexts, names) of the figures that are aimed at
TARGETS = (
    ("32/8", (2048, 4096), (2048, 8192), (LLAMA, DIFFLLAMA, "GDA 3:1", "GDA expanded 4:1")),
    ("40/8", (2048, 4096), (8192,), (LLAMA, "GDA paired 4:1")),
)


def padding_mask(batch: int, length: int, padding: str) -> torch.Tensor | None:
    """(B, length), 0 for padding. The last half has none."""
    if padding == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.long, device=device())
    for row in range(batch):
        mask[row, : length * (row + 1) // (2 * batch)] = 0
    return mask


class Case:
    """One layer in one situation: `prepare` is not timed, and `run` is."""

    def __init__(
        self, layer: nn.Module, call: Callable, tokens: int, context: int, batch: int, padding: str, cache: str
    ):
        self.call, self.cache, self.filled = call, None, None
        config: Any = layer.config
        dtype = layer.o_proj.weight.dtype
        torch.manual_seed(1)
        self.hidden = torch.randn(batch, tokens, config.hidden_size, device=device()).to(dtype)
        position_ids = torch.arange(context, context + tokens, device=device()).unsqueeze(0)
        self.position_embeddings = LlamaRotaryEmbedding(config).to(device())(self.hidden, position_ids)
        if context:
            self.filled = FilledCache(cache, config, batch, context, dtype)
            self.cache = self.filled.cache
        self.mask = create_causal_mask(
            config=config,
            inputs_embeds=self.hidden,
            attention_mask=padding_mask(batch, context + tokens, padding),
            position_ids=position_ids,
            **{CACHE_ARGUMENT: self.cache},
        )

    def prepare(self) -> None:
        """Remove the token that the last run appended."""
        if self.filled is not None:
            self.filled.rewind()

    def run(self) -> torch.Tensor:
        return self.call(
            self.hidden,
            position_embeddings=self.position_embeddings,
            attention_mask=self.mask,
            **{CACHE_ARGUMENT: self.cache},
        )[0]


@torch.inference_mode()
def measure(
    group: str,
    names: tuple[str, ...],
    situations: list[tuple[int, int, int, str]],  # (tokens, context, batch, padding)
    options: argparse.Namespace,
) -> list[Figure]:
    """Figures of the layers of a group in each situation."""
    compiled, found = options.backend == "compiled", []
    layers = {name: build_layer(name, GROUPS[group][0], "sdpa" if compiled else options.backend) for name in names}
    for layer in layers.values():
        layer.to(device(), getattr(torch, options.dtype))
    calls = {name: torch.compile(layer) if compiled else layer for name, layer in layers.items()}
    for tokens, context, batch, padding in situations:
        if options.backend == "flex_attention" or compiled:
            torch.compiler.reset()  # each size as if it were the only one: no general code for all of them
        cases = {
            name: Case(layer, calls[name], tokens, context, batch, padding, options.cache)
            for name, layer in layers.items()
            if name != NAIVE or naive_fits(tokens, context, batch, options.backend)
        }
        if NAIVE in cases and "GDA 3:1" in cases:
            check_equal(cases[NAIVE], cases["GDA 3:1"])
        what = f"decode at {context}, {options.cache} cache" if context else f"prefill of {tokens}"
        case = f"{group}, {what}, batch {batch}" + (", padded" if padding != "none" else "")
        tell(case)
        runs = {name: each.run for name, each in cases.items()}
        seconds = interleaved(runs, options, prepare=lambda name, cases=cases: cases[name].prepare())
        found += figures(case, seconds, (LLAMA, DIFFLLAMA))
    return found


def naive_fits(tokens: int, context: int, batch: int, backend: str) -> bool:
    """Whether the naive layer can run: it does not support block masks of flex, and its maps must fit into memory."""
    return backend != "flex_attention" and batch * tokens * max(tokens, context) <= 1 << 25


def check_equal(naive: Case, fast: Case) -> None:
    """Check that the naive layer, with the same weights as GDA 3:1, gives the same output."""
    for case in (naive, fast):
        case.prepare()
    expected, got = naive.run().float(), fast.run().float()
    real = expected[:, expected.shape[1] // 2 :], got[:, expected.shape[1] // 2 :]  # the first half may be padding
    tolerance = 1e-5 if fast.hidden.dtype == torch.float32 else 0.03
    assert (real[0] - real[1]).norm() <= tolerance * real[0].norm()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="HEADS/KV")
    parser.add_argument("--backend", choices=BACKENDS, default="sdpa")
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512, 2048, 4096, 8192], metavar="TOKENS")
    parser.add_argument("--decode", type=int, nargs="*", default=[512, 2048, 8192], metavar="CONTEXT")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prefill-batch", type=int, nargs="+", default=[1])
    parser.add_argument("--padding", nargs="+", choices=PADDINGS, default=["none", "left"])
    parser.add_argument("--cache", choices=CACHES, default="dynamic")
    parser.add_argument(
        "--targets", action="store_true", help="Measure only the cases that have a target in docs/performance.md."
    )
    add_options(parser, budget=5.0)
    options = parse(parser)
    found = []
    if options.targets:
        for group, prefill, decode, names in TARGETS:
            situations = [(tokens, 0, 1, "none") for tokens in prefill if options.cache == "dynamic"]
            situations += [(1, context, 1, "none") for context in decode]
            found += measure(group, names, situations, options)
    else:
        for group in options.groups:
            situations = [
                (tokens, 0, batch, padding)
                for tokens in options.prefill
                for batch in options.prefill_batch
                for padding in options.padding
            ]
            situations += [
                (1, context, batch, padding)
                for context in options.decode
                for batch in options.batch
                for padding in options.padding
            ]
            found += measure(group, GROUPS[group][1], situations, options)
    report(f"attention layers, {options.backend}, {options.dtype}, {options.threads} threads", found, options)


if __name__ == "__main__":
    main()
