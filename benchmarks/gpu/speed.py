"""Speed and memory of one attention layer and of whole models on a GPU, in bfloat16, against transformers' Llama.

The layer has the shape of Llama-3-8B's attention, and the model that of Llama-3.2-1B (contestants.py). The models take
turns in every case. Times are from CUDA events, as medians over rounds. `speed` is the Llama's time divided by the
model's time, as a median over rounds. `limit` is the speed that follows from FLOPs for prefill and training, and from
bytes for decoding. `peak_mb` is the peak of allocated memory during one run, beyond what was allocated before it.

A decode step reads a cache of the given context and appends a token. `eager` steps use a DynamicCache, which copies
itself with every token. `CUDA graph` steps use a StaticCache and are captured once. A training step of a layer is
forward and backward; that of a model also includes fused AdamW. Everything is in bfloat16.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from contestants import (
    DECODING,
    LAYER,
    LLAMA,
    MODEL,
    NAMES,
    PAIRED,
    SHARED,
    TANH,
    Shape,
    build,
    decode_bytes,
    forward_flops,
)
from filled_cache import FilledCache
from kit import Contest, Part, Row, capture, free_memory, one_line, parser_of
from measuring import device
from transformers import DynamicCache
from transformers.utils import logging

from gda.modeling_gda.attention_gda import CACHE_ARGUMENT

PREFILLS = (2048, 8192, 32768)
DECODES = ((8192, 1), (8192, 32), (32768, 1), (32768, 32))  # context, batch
# A model's cache of 32 sequences of 32,768 tokens takes 34 GB, and a DynamicCache, copied in each step, twice that.
MODEL_DECODES = DECODES[:3]
GRAPHED = ((8192, 1), (8192, 32), (32768, 32))
TRAINED = (2048, 8192)
SMOKE_LAYER = Shape(heads=8, kv_heads=2, head_dim=16, hidden=64, mlp=32, layers=1, vocabulary=64)
SMOKE_MODEL = Shape(heads=8, kv_heads=2, head_dim=16, hidden=64, mlp=64, layers=2, vocabulary=64)


class Sizes:
    """The measured sizes, and seconds of rounds per case."""

    def __init__(self, smoke: bool):
        self.layer, self.model = (SMOKE_LAYER, SMOKE_MODEL) if smoke else (LAYER, MODEL)
        self.prefills = (16, 32) if smoke else PREFILLS
        self.decodes = ((16, 1), (16, 2)) if smoke else DECODES
        self.model_decodes = self.decodes if smoke else MODEL_DECODES
        self.graphed = ((16, 1),) if smoke else GRAPHED
        self.trained = (16,) if smoke else TRAINED
        self.flex = 32 if smoke else 8192
        self.layer_seconds, self.model_seconds = (0.1, 0.1) if smoke else (1.5, 4.0)


Runs = Mapping[str, Callable[[], Any]]


class Subjects:
    """The contestants of one kind, layers or models, and their cases."""

    def __init__(self, part: Part, kind: str, shape: Shape, seconds: float, names: Sequence[str] = NAMES):
        self.part, self.kind, self.shape, self.seconds = part, kind, shape, seconds
        self.models: dict[str, Any] = {}
        for name in names:
            part.attempt({"kind": kind, "case": "build", "name": name}, partial(self._build, name))

    def _build(self, name: str) -> Row:
        self.models[name] = build(name, self.shape)
        return {"parameters": sum(parameter.numel() for parameter in self.module(name).parameters())}

    def module(self, name: str) -> Any:
        """The measured module: the first layer's attention, or the model."""
        model = self.models[name]
        return model.model.layers[0].self_attn if self.kind == "layer" else model

    def contest(
        self, case: str, runs: Runs, limits: Mapping[str, float], prepare: Any = lambda: None, has_peaks: bool = True
    ) -> None:
        """Measure one case and add its rows."""
        labels = {"kind": self.kind, "case": case}

        def measured() -> None:
            contest = Contest(runs, prepare, has_peaks)
            contest.measure(self.seconds)
            for row in contest.rows(labels, LLAMA, limits):
                self.part.add(row)

        self.part.attempt({**labels, "name": "(case)"}, measured, needs=3 * self.seconds)
        free_memory()

    def by_flops(self, tokens: int, with_head: bool = False) -> dict[str, float]:
        """Speed relative to the Llama if only FLOPs counted."""
        count = {
            name: forward_flops(name, self.module(name), self.shape, tokens, with_head) for name in self.models
        }  # fmt: skip
        return {name: count[LLAMA] / each for name, each in count.items()} if LLAMA in count else {}

    def by_bytes(self, context: int, batch: int, passes: int) -> dict[str, float]:
        """Speed relative to the Llama if only bytes counted; `passes` as in `decode_bytes`."""
        count = {name: decode_bytes(self.module(name), self.shape, context, batch, passes) for name in self.models}
        return {name: count[LLAMA] / each for name, each in count.items()} if LLAMA in count else {}

    def filled(self, kind: str, context: int, batch: int) -> FilledCache:
        """One cache for all contestants: their keys and values have the same shape."""
        return FilledCache(kind, self.models[LLAMA].config, batch, context, torch.bfloat16)


# --------------------------------------------------------------------------------------------------------------- layer


def layer_call(subjects: Subjects, name: str, hidden: torch.Tensor, position: int, cache: Any = None) -> Any:
    """A call of one layer's attention without a mask: causal over several tokens, over the whole cache for one."""
    model, layer = subjects.models[name], subjects.module(name)
    positions = torch.arange(position, position + hidden.shape[1], device=device()).unsqueeze(0)
    rotation = model.model.rotary_emb(hidden, position_ids=positions)

    def run() -> Any:
        return layer(hidden, position_embeddings=rotation, attention_mask=None, **{CACHE_ARGUMENT: cache})[0]

    return run


def random_hidden(shape: Shape, batch: int, tokens: int) -> torch.Tensor:
    return torch.randn(batch, tokens, shape.hidden, device=device(), dtype=torch.bfloat16)


def layer_cases(subjects: Subjects, sizes: Sizes) -> Iterator[partial[None]]:
    shape = subjects.shape

    def prefill(tokens: int) -> None:
        hidden = random_hidden(shape, 1, tokens)
        runs = {name: torch.inference_mode()(layer_call(subjects, name, hidden, 0)) for name in subjects.models}
        subjects.contest(f"prefill of {tokens:,}", runs, subjects.by_flops(tokens))

    def decode(context: int, batch: int) -> None:
        with torch.inference_mode():
            filled = subjects.filled("dynamic", context, batch)
            hidden = random_hidden(shape, batch, 1)
            calls = {name: layer_call(subjects, name, hidden, context, filled.cache) for name in subjects.models}
        runs = {name: torch.inference_mode()(call) for name, call in calls.items()}
        case = f"decode at {context:,}, batch {batch}, eager"
        subjects.contest(case, runs, subjects.by_bytes(context, batch, passes=3), filled.rewind)

    def train(tokens: int) -> None:
        hidden = random_hidden(shape, 1, tokens).requires_grad_()
        upstream = random_hidden(shape, 1, tokens)

        def step(name: str) -> Callable[[], None]:
            call, layer = layer_call(subjects, name, hidden, 0), subjects.module(name)

            def run() -> None:
                call().backward(upstream)
                layer.zero_grad(set_to_none=True)
                hidden.grad = None

            return run

        runs = {name: step(name) for name in subjects.models}
        subjects.contest(f"forward and backward of {tokens:,}", runs, subjects.by_flops(tokens))

    yield from (partial(prefill, tokens) for tokens in sizes.prefills)
    yield from (partial(decode, *each) for each in sizes.decodes)
    yield from (partial(train, tokens) for tokens in sizes.trained)


# -------------------------------------------------------------------------------------------------------------- models


def model_cases(subjects: Subjects, sizes: Sizes) -> Iterator[partial[None]]:
    vocabulary = subjects.shape.vocabulary

    def random_ids(batch: int, tokens: int) -> torch.Tensor:
        return torch.randint(vocabulary, (batch, tokens), device=device())

    def prefill(tokens: int) -> None:
        ids = random_ids(1, tokens)

        def run(name: str) -> Callable[[], Any]:
            model = subjects.models[name]
            return torch.inference_mode()(
                lambda: model(
                    ids, **{CACHE_ARGUMENT: DynamicCache(config=model.config)}, use_cache=True, logits_to_keep=1
                )
            )

        subjects.contest(f"prefill of {tokens:,}", {name: run(name) for name in subjects.models},
                         subjects.by_flops(tokens))  # fmt: skip

    def decode(context: int, batch: int) -> None:
        ids, position = random_ids(batch, 1), torch.full((batch, 1), context, device=device())
        with torch.inference_mode():
            filled = subjects.filled("dynamic", context, batch)

        def run(name: str) -> Callable[[], Any]:
            model = subjects.models[name]
            return torch.inference_mode()(
                lambda: model(ids, position_ids=position, **{CACHE_ARGUMENT: filled.cache}, use_cache=True)
            )

        case = f"decode at {context:,}, batch {batch}, eager"
        subjects.contest(case, {name: run(name) for name in subjects.models},
                         subjects.by_bytes(context, batch, passes=3), filled.rewind)  # fmt: skip

    def decode_graphed(context: int, batch: int) -> None:
        ids, position = random_ids(batch, 1), torch.full((batch, 1), context, device=device())
        case = f"decode at {context:,}, batch {batch}, CUDA graph"
        runs: dict[str, Callable[[], Any]] = {}
        on_gpu = torch.cuda.is_available()
        pool, stream = (torch.cuda.graph_pool_handle(), torch.cuda.Stream()) if on_gpu else (None, None)
        subjects.models[LLAMA].set_attn_implementation(DECODING)
        with torch.no_grad():
            filled = subjects.filled("static", context, batch)
            for name, model in subjects.models.items():

                def step(model: Any = model) -> Any:
                    layers: Any = filled.cache.layers
                    for layer in layers:  # in the graph: every replay appends at the same place
                        layer.cumulative_length.fill_(context)
                    return model(ids, position_ids=position, **{CACHE_ARGUMENT: filled.cache}, use_cache=True)

                free_memory()
                try:
                    runs[name] = torch.no_grad()(capture(step, pool=pool, stream=stream))
                except Exception as error:  # the others can still be captured
                    subjects.part.add(
                        {"kind": subjects.kind, "case": case, "name": name, "error": f"capture: {one_line(error)}"}
                    )
        limits = subjects.by_bytes(context, batch, passes=1)
        subjects.contest(case, runs, limits, has_peaks=not on_gpu)  # a replay allocates nothing
        subjects.models[LLAMA].set_attn_implementation("sdpa")

    def train(tokens: int) -> None:
        ids = random_ids(1, tokens)
        on_gpu = torch.cuda.is_available()

        def step(name: str) -> Callable[[], None]:
            model = subjects.models[name].train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=on_gpu)

            def run() -> None:
                model(ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            return run

        subjects.models.pop(TANH, None)  # to have its memory
        subjects.contest(f"training step of {tokens:,}", {name: step(name) for name in subjects.models},
                         subjects.by_flops(tokens, with_head=True))  # fmt: skip
        for model in subjects.models.values():
            model.eval().zero_grad(set_to_none=True)

    yield from (partial(prefill, tokens) for tokens in sizes.prefills)
    yield from (partial(decode, *each) for each in sizes.model_decodes)
    yield from (partial(decode_graphed, *each) for each in sizes.graphed)
    yield from (partial(train, tokens) for tokens in sizes.trained)


# ---------------------------------------------------------------------------------------------------------------- flex


def flex_case(subjects: Subjects, tokens: int) -> None:
    """A prefill of one layer with compiled flex attention. It runs last because compiling takes tens of seconds."""
    from transformers.masking_utils import create_causal_mask

    hidden, runs = random_hidden(subjects.shape, 1, tokens), {}
    positions = torch.arange(tokens, device=device()).unsqueeze(0)
    for name in subjects.models:
        model, layer = subjects.models[name], subjects.module(name)
        model.set_attn_implementation("flex_attention")
        rotation = model.model.rotary_emb(hidden, position_ids=positions)
        mask = create_causal_mask(model.config, hidden, None, None, positions)

        def run(layer: Any = layer, rotation: Any = rotation, mask: Any = mask) -> Any:
            return layer(hidden, position_embeddings=rotation, attention_mask=mask)[0]

        runs[name] = torch.inference_mode()(run)
    # Each gets a kernel for its own number of heads; otherwise all after the first would get one for any number.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        subjects.contest(f"prefill of {tokens:,}, flex_attention", runs, subjects.by_flops(tokens))


def guarded(part: Part, kind: str, case: partial[None]) -> None:
    """Run a case, and add a row if it fails before its contest: for a cache that does not fit, for example."""
    try:
        case()
    except Exception as error:
        sizes = ", ".join(str(each) for each in case.args if isinstance(each, int))
        part.add({"kind": kind, "case": f"{case.func.__name__} {sizes}", "name": "(case)", "error": one_line(error)})
    free_memory()


def main() -> None:
    options = parser_of(__doc__).parse_args()
    logging.set_verbosity_error()
    part, sizes = Part("speed", options), Sizes(options.smoke)
    kinds: tuple[tuple[str, Shape, float, Any], ...] = (
        ("layer", sizes.layer, sizes.layer_seconds, layer_cases),
        ("model", sizes.model, sizes.model_seconds, model_cases),
    )
    for kind, shape, seconds, cases in kinds:
        subjects = Subjects(part, kind, shape, seconds)
        for case in cases(subjects, sizes):
            guarded(part, kind, case)
        del subjects, case
        free_memory()
    if part.left() > (20 if options.smoke else 75):
        subjects = Subjects(part, "layer", sizes.layer, sizes.layer_seconds, (LLAMA, SHARED, PAIRED))
        guarded(part, "layer", partial(flex_case, subjects, sizes.flex))
    part.finish()


if __name__ == "__main__":
    main()
