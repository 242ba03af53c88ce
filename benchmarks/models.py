"""Compare whole models with transformers' Llama of as many query heads: prefill, decode, training steps, memory.

    python benchmarks/models.py --part prefill decode --batch 1 8
    python benchmarks/models.py --part train --dtype bfloat16

Models have random weights, head_dim 64, a vocabulary of 16,384, and hidden size 2,048 with 2 layers (as wide as in
attention.py) or hidden size 1,024 with 6 layers. Prefill fills a DynamicCache; a decode step is one call of the model
with a cache of the given context. A training step is forward, backward and AdamW over all weights. With --dtype
bfloat16, weights stay in float32 in training and matrices are multiplied in bfloat16. "step" is the peak of torch's
allocations during one step, beyond what was allocated before it: activations, in prefill also the cache, in training
also gradients. "cache" is the size of the KV cache after the prefill.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from attention import BACKENDS, PADDINGS, padding_mask
from filled_cache import CACHES, FilledCache
from layers import DIFFLLAMA, LLAMA, Shape, build_model
from measuring import Figure, add_options, device, figures, interleaved, parse, peak_allocated, report, tell
from transformers import DynamicCache

from gda.modeling_gda.attention_gda import CACHE_ARGUMENT

PARTS = ("prefill", "decode", "train")
WIDE: dict[str, Any] = {"hidden": 2048, "mlp": 8192, "layers": 2, "vocabulary": 16384}
DEEP: dict[str, Any] = {"hidden": 1024, "mlp": 2816, "layers": 6, "vocabulary": 16384}
# What is compared, by the query heads / KV heads of the Llama.
GROUPS = {
    "32/8": (Shape(32, 8, **WIDE), (LLAMA, DIFFLLAMA, "GDA 3:1", "GDA expanded 4:1", "GDA paired 3:1")),
    "16/4": (Shape(16, 4, **DEEP), (LLAMA, DIFFLLAMA, "GDA 3:1", "GDA expanded 4:1", "GDA paired 3:1")),
    "20/4": (Shape(20, 4, **DEEP), (LLAMA, DIFFLLAMA, "GDA 4:1")),
    "16/2": (Shape(16, 2, **DEEP), (LLAMA, DIFFLLAMA, "GDA 7:1")),
    # What `gda convert` makes of a Llama with 32 heads, and the plain model that `gda export` writes after training.
    "40/8": (Shape(40, 8, **WIDE | {"layers": 4}), (LLAMA, "GDA 4:1")),
}


class Situation:
    """One model in one situation: `prepare` is not timed, and `run` is."""

    def __init__(self, model: Any, compiled: bool):
        self.model = model
        self.call: Callable = torch.compile(model) if compiled else model

    def prepare(self) -> None:
        """Undo the last run where the next depends on it."""

    def run(self) -> Any:
        raise NotImplementedError


class Prefill(Situation):
    def __init__(self, model: Any, compiled: bool, ids: torch.Tensor, mask: torch.Tensor | None, cache: str):
        super().__init__(model, compiled)
        self.inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": True, "logits_to_keep": 1}

    @torch.inference_mode()
    def run(self) -> Any:
        return self.call(**self.inputs)[CACHE_ARGUMENT]


class Decode(Prefill):
    """The last token, with all others in a cache."""

    @torch.inference_mode()
    def __init__(self, model: Any, compiled: bool, ids: torch.Tensor, mask: torch.Tensor | None, cache: str):
        super().__init__(model, compiled, ids[:, -1:], mask, cache)
        self.filled = FilledCache(cache, model.config, ids.shape[0], ids.shape[1] - 1, model.dtype)
        self.inputs[CACHE_ARGUMENT] = self.filled.cache
        self.prepare = self.filled.rewind  # type: ignore[method-assign]


class Training(Situation):
    def __init__(self, model: Any, compiled: bool, ids: torch.Tensor, autocast: bool):
        super().__init__(model.train(), compiled)
        self.ids, self.autocast = ids, autocast
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=True)

    def run(self) -> None:
        with torch.autocast(device(), torch.bfloat16, enabled=self.autocast):
            loss = self.call(self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def cache_bytes(cache: DynamicCache) -> int:
    return sum(each.numel() * each.element_size() for layer in cache.layers for each in (layer.keys, layer.values))


def compare(case: str, situations: dict[str, Situation], options: argparse.Namespace) -> list[Figure]:
    """Speed and memory of each model; the first is the Llama."""
    tell(case)
    if options.backend in ("flex_attention", "compiled"):
        torch.compiler.reset()  # each size as if it were the only one: no general code for all of them
    runs = {name: each.run for name, each in situations.items()}
    seconds = interleaved(runs, options, prepare=lambda name: situations[name].prepare())
    found = figures(case, seconds, (LLAMA, DIFFLLAMA))
    for figure in found:
        situation = situations[figure.name]
        situation.prepare()
        figure.bytes["step"] = peak_allocated(situation.run)
        if type(situation) is Prefill:
            figure.bytes["cache"] = cache_bytes(situation.run())
        if found[0].name == LLAMA:
            figure.bytes_ratio = {kind: nbytes / found[0].bytes[kind] for kind, nbytes in figure.bytes.items()}
    return found


def measure(group: str, part: str, options: argparse.Namespace) -> list[Figure]:
    """Figures of the models of a group in all situations of one part."""
    shape, names = GROUPS[group]
    compiled = options.backend == "compiled"
    models = {name: build_model(name, shape, "sdpa" if compiled else options.backend).to(device()) for name in names}
    if part == "train":
        ids = torch.randint(shape.vocabulary, (options.train_batch, options.train), device=device())
        bf16 = options.dtype == "bfloat16"
        training = {name: Training(model, compiled, ids, bf16) for name, model in models.items()}
        return compare(f"{group}, training step of {options.train_batch} × {options.train}", dict(training), options)
    found = []
    prefill = part == "prefill"
    for length in options.prefill if prefill else options.decode:
        for batch in options.prefill_batch if prefill else options.batch:
            for padding in options.padding:
                ids = torch.randint(shape.vocabulary, (batch, length), device=device())
                mask = padding_mask(batch, length, padding)
                situation = Prefill if prefill else Decode
                situations = {
                    name: situation(model.eval().to(getattr(torch, options.dtype)), compiled, ids, mask, options.cache)
                    for name, model in models.items()
                }
                what = f"prefill of {length}" if prefill else f"decode at {length}"
                case = f"{group}, {what}, batch {batch}" + (", padded" if padding != "none" else "")
                found += compare(case, dict(situations), options)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="HEADS/KV")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--backend", choices=BACKENDS, default="sdpa")
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512, 2048], metavar="TOKENS")
    parser.add_argument("--decode", type=int, nargs="*", default=[512, 2048], metavar="CONTEXT")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="Batch sizes of decode steps.")
    parser.add_argument("--prefill-batch", type=int, nargs="+", default=[1])
    parser.add_argument("--cache", choices=CACHES, default="dynamic")
    parser.add_argument("--padding", nargs="+", choices=PADDINGS, default=["none"])
    parser.add_argument(
        "--train", type=int, default=512, metavar="TOKENS", help="Tokens of each row of a training step."
    )
    parser.add_argument("--train-batch", type=int, default=2)
    add_options(parser, budget=10.0)
    options = parse(parser)
    found = [figure for group in options.groups for part in options.part for figure in measure(group, part, options)]
    report(f"whole models, {options.backend}, {options.dtype}, {options.threads} threads", found, options)


if __name__ == "__main__":
    main()
