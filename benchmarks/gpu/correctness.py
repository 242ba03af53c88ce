"""Check that GDA computes the same on a GPU: logits, gradients and greedy text against a float64 reference on the CPU.

The reference for logits and gradients is tests/support/naive.py, the equations as plain loops in float64, with the
weights that the model has after loading in its dtype. The reference for text is the model's own argmax without a cache,
prompt by prompt; every cache and every kind of batching must give the same text. Weights are random and scaled so that
logits lie far apart. In float32, all tokens must be equal. In bfloat16, near ties can be decided either way, and the
text after them differs. At the first difference, the reference's logits of the two tokens must therefore be within TIE
standard deviations.

TF32 is off: float32 means float32.
"""

import contextlib
import functools
import itertools
import logging as std_logging
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import naive
import torch
import transformers
from checked_models import CONFIGS, DTYPES, SHAPE, load, make_model, state_of
from kit import Part, Row, capture, one_line, parser_of
from measuring import device
from packaging.version import Version
from split_layer import split_layer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, StaticCache
from transformers.utils import is_flash_attn_2_available, logging
from transformers.utils.import_utils import is_flash_attn_3_available

from gda.conversion.split.rows import SHORT
from gda.modeling_gda.attention_gda import CACHE_ARGUMENT

# Largest relative error ‖got − expected‖ / ‖expected‖: far above rounding, far below what a wrong head would cause.
LIMITS = {("logits", "float32"): 1e-4, ("logits", "bfloat16"): 3e-2}
LIMITS |= {("gradients", "float32"): 1e-3, ("gradients", "bfloat16"): 1e-1}
TIE = 0.1
Ways = list[tuple[str, str, Callable[[], list[list[int]]]]]  # check, backend, texts
FLASH = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}


class Sizes:
    """Sizes of the models and the sequences."""

    def __init__(self, smoke: bool):
        self.shape = SHAPE | ({"hidden_size": 64, "intermediate_size": 96, "head_dim": 16} if smoke else {})
        self.rows, self.length, self.padding = (2, 24, 5) if smoke else (3, 160, 37)
        self.gradient_length = min(64, self.length)
        self.prompts, self.new_tokens = ((3, 9, 6), 6) if smoke else ((7, 61, 33), 48)


# -------------------------------------------------------------------------------------------------------------- models


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖; a NaN stays one."""
    return ((got.detach().cpu().double() - expected).norm() / expected.norm()).item()


def judged(kind: str, dtype: str, error: float, **more: Any) -> Row:
    limit = LIMITS[kind, dtype]
    return {"relative_error": error, "limit": limit, "ok": error <= limit, **more}


# -------------------------------------------------------------------------------------------------- logits, gradients


class Subject:
    """One model in one dtype, with its references."""

    def __init__(self, folder: str, dtype: str, sizes: Sizes):
        self.dtype, self.sizes = dtype, sizes
        self.model = load(folder, dtype)
        self.config: Any = self.model.config
        self.ids = random_ids(sizes.rows, sizes.length)
        self.padding = torch.ones_like(self.ids)
        self.padding[0, : sizes.padding] = 0  # on the left, of the first row
        state = state_of(self.model)
        self.expected = {False: naive.run(state, self.config, self.ids).logits}
        self.expected[True] = naive.run(state, self.config, self.ids, self.padding).logits
        self.prompts = [random_ids(1, length, seed=length) for length in sizes.prompts]

    @torch.no_grad()
    def logits(self, backend: str, padded: bool) -> Row:
        """Error of the logits of real tokens."""
        self.model.set_attn_implementation(backend)
        mask = self.padding.to(device()) if padded else None
        got = self.model(self.ids.to(device()), attention_mask=mask, use_cache=False).logits.cpu()
        real = self.padding.bool() if padded else torch.ones_like(self.ids, dtype=torch.bool)
        return judged("logits", self.dtype, relative_error(got[real], self.expected[padded][real]))

    @functools.cached_property
    def expected_gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a next-token prediction on the first two rows, and its gradient for each weight."""
        ids = self.ids[:2, : self.sizes.gradient_length]
        state = state_of(self.model, gradients=True)
        logits = naive.run(state, self.config, ids).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return loss.detach(), {name: weight.grad for name, weight in state.items() if weight.grad is not None}

    def gradients(self, backend: str, checkpointing: bool) -> Row:
        """Error of the gradients; all must be finite.

        In float32 that of the worst weight counts. In bfloat16 it is that of all gradients as one vector, since what a
        scalar λ gets is a sum of large terms that nearly cancel.
        """
        ids = self.ids[:2, : self.sizes.gradient_length].to(device())
        model = self.model.train()
        model.set_attn_implementation(backend)
        if checkpointing:
            model.gradient_checkpointing_enable()
        try:
            model.zero_grad(set_to_none=True)
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
        finally:
            model.gradient_checkpointing_disable()
            model.eval()
        got = {name: parameter.grad.cpu().double() for name, parameter in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        for name, gradient in got.items():
            assert gradient.isfinite().all(), f"{name}: gradient is not finite"
        expected_loss, expected = self.expected_gradients
        errors = {name: relative_error(gradient, expected[name]) for name, gradient in got.items()}
        worst = max(errors, key=lambda name: errors[name])
        total = relative_error(
            torch.cat([each.flatten() for each in got.values()]),
            torch.cat([expected[name].flatten() for name in got]),
        )
        return judged(
            "gradients",
            self.dtype,
            errors[worst] if self.dtype == "float32" else total,
            worst=worst,
            worst_error=errors[worst],
            loss_error=relative_error(loss, expected_loss),
        )

    # ------------------------------------------------------------------------------------------------------- text

    @functools.cached_property
    def uncached(self) -> list[tuple[list[int], Tensor]]:
        """Greedy text of each prompt without a cache, and the logits of each token: the reference for all others."""
        self.model.set_attn_implementation("sdpa")
        texts = []
        for prompt in self.prompts:
            ids, logits = prompt.to(device()), []
            for _ in range(self.sizes.new_tokens):
                with torch.no_grad():
                    logits.append(self.model(ids, use_cache=False).logits[:, -1])
                ids = torch.cat((ids, logits[-1].argmax(-1, keepdim=True)), dim=1)
            texts.append((ids[0, prompt.shape[1] :].tolist(), torch.cat(logits).float().cpu()))
        return texts

    def generation_config(self, **more: Any) -> GenerationConfig:
        tokens = self.sizes.new_tokens
        return GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **more
        )  # fmt: skip

    def generated(self, backend: str = "sdpa", **settings: Any) -> list[list[int]]:
        """`generate`, prompt by prompt."""
        self.model.set_attn_implementation(backend)
        texts = []
        for prompt in self.prompts:
            ids = prompt.to(device())
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=self.generation_config(**settings)
            )
            texts.append(out[0, ids.shape[1] :].tolist())
        return texts

    def left_padded(self, backend: str = "sdpa", **settings: Any) -> list[list[int]]:
        """All prompts in one batch."""
        self.model.set_attn_implementation(backend)
        longest = max(prompt.shape[1] for prompt in self.prompts)
        ids = torch.zeros(len(self.prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(self.prompts):
            ids[row, longest - prompt.shape[1] :], mask[row, longest - prompt.shape[1] :] = prompt[0], 1
        out = self.model.generate(
            ids.to(device()),
            attention_mask=mask.to(device()),
            generation_config=self.generation_config(**settings),
        )
        return out[:, longest:].tolist()

    def continuous(self, backend: str) -> list[list[int]]:
        """Continuous batching over a paged cache."""
        self.model.set_attn_implementation(backend)
        errors: list[str] = []  # of its thread, which are only logged
        try:
            with errors_logged(errors):
                out = self.model.generate_batch(
                    [prompt[0].tolist() for prompt in self.prompts],
                    generation_config=GenerationConfig(
                        max_new_tokens=self.sizes.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
                    ),
                    continuous_batching_config=_paged_cache(),
                )
        finally:
            self.model.set_attn_implementation("sdpa")
        failed = [each.error for each in out.values() if each.error] or errors
        if failed or len(out) != len(self.prompts):
            raise RuntimeError(f"generate_batch answered {len(out)} of {len(self.prompts)} requests: {failed[:1]}")
        by_prompt = {tuple(each.prompt_ids): list(each.generated_tokens) for each in out.values()}
        return [by_prompt[tuple(prompt[0].tolist())] for prompt in self.prompts]

    @torch.no_grad()
    def graphed(self) -> list[list[int]]:
        """A decode step with a static cache, captured once in a CUDA graph and replayed for each token."""
        return self._stepped(lambda step: capture(step))

    @torch.no_grad()
    def compiled(self) -> list[list[int]]:
        """A decode step with a static cache, compiled; on a GPU `reduce-overhead`, with graphs of its own."""
        settings: Row = {"mode": "reduce-overhead"} if torch.cuda.is_available() else {"backend": "eager"}
        call = torch.compile(self.model, **settings)

        def prepared(step: Callable[[], None]) -> Callable[[], None]:
            def marked() -> None:
                torch.compiler.cudagraph_mark_step_begin()
                step()

            for _ in range(3):
                marked()
            return marked

        return self._stepped(prepared, call)

    def _stepped(self, prepare: Callable[[Any], Any], call: Any = None) -> list[list[int]]:
        """Decode with a step that reads and writes the same tensors every time."""
        self.model.set_attn_implementation("sdpa")
        call = self.model if call is None else call
        longest = max(prompt.shape[1] for prompt in self.prompts)
        cache = StaticCache(config=self.config, max_cache_len=longest + self.sizes.new_tokens)
        token = torch.zeros(1, 1, dtype=torch.long, device=device())
        position = torch.zeros(1, 1, dtype=torch.long, device=device())

        def step() -> None:
            logits = call(input_ids=token, position_ids=position, **{CACHE_ARGUMENT: cache}, use_cache=True).logits
            token.copy_(logits[:, -1:].argmax(-1))
            position.add_(1)

        def prefill(prompt: Tensor) -> None:
            cache.reset()
            logits = self.model(prompt.to(device()), **{CACHE_ARGUMENT: cache}, use_cache=True).logits
            token.copy_(logits[:, -1:].argmax(-1))
            position.fill_(prompt.shape[1])

        prefill(self.prompts[0])  # allocates the cache, which a capture must not do
        run = prepare(step)
        texts = []
        for prompt in self.prompts:
            prefill(prompt)
            tokens = [int(token.item())]
            for _ in range(self.sizes.new_tokens - 1):
                run()
                tokens.append(int(token.item()))
            texts.append(tokens)
        return texts


def _paged_cache() -> Any:
    """A small paged cache; by default transformers takes most of the GPU's memory. The name of a page differs by
    release.
    """
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    page = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
    settings: dict[str, Any] = {page: 32, "num_blocks": 64, "max_batch_tokens": 128}
    return ContinuousBatchingConfig(**settings)


@contextlib.contextmanager
def errors_logged(errors: list[str]) -> Iterator[None]:
    """Collect the errors that transformers logs."""
    handler = std_logging.Handler(std_logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [std_logging.getLogger(name) for name in ("transformers", "ContinuousBatchingLogger")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def compare(way: Callable[[], list[list[int]]], subject: Subject) -> Row:
    """Share of equal tokens, and the difference of the reference's logits where a text first differs."""
    equal = tokens = 0
    gap = 0.0
    for text, (reference, logits) in zip(way(), subject.uncached, strict=True):
        same = [a == b for a, b in zip(text, reference, strict=True)]
        equal, tokens = equal + sum(same), tokens + len(same)
        if not all(same):
            at = same.index(False)
            here = ((logits[at, reference[at]] - logits[at, text[at]]) / logits[at].std()).item()
            gap = math.inf if math.isnan(here) else max(gap, here)
    ok = equal == tokens if subject.dtype == "float32" else gap <= TIE
    return {"equal_tokens": equal / tokens, "tokens": tokens, "gap": gap, "ok": ok}


# ---------------------------------------------------------------------------------------------------------------- rows


def missing(check: str, backend: str, config: Any) -> str | None:
    """What this environment lacks for the check, if anything."""
    if backend in FLASH and not FLASH[backend]():
        return "not installed"
    if backend == "flex_attention" and device() == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return "torch 2.13's flex kernel for AVX2 gives NaN in bfloat16, also in a stock Llama"
    if check.endswith("continuous batching") and config.kv_layout == "paired":
        needed = "5.24" if backend == "paged|eager" else "5.19"  # the check is modeling_gda's
        return None if Version(transformers.__version__) >= Version(needed) else f"needs transformers {needed}"
    return None


def attempt(part: Part, row: Row, subject: Subject, check: Callable[[], Row], needs: float = 1) -> None:
    """Add the check's row, or what it lacks here."""
    if lacking := missing(row["check"], row["backend"], subject.config):
        part.add({**row, "skipped": lacking})
    else:
        part.attempt(row, check, needs=needs)


def exact_checks(part: Part, labels: Row, subject: Subject) -> None:
    """Logits and gradients of one model in one dtype, without a compiler."""
    dtype = subject.dtype
    for backend in ("eager", "sdpa", *FLASH):
        if backend in FLASH and dtype == "float32":
            continue  # flash attention has no float32
        for padded in (False, True):
            row = {**labels, "check": "logits, left-padded" if padded else "logits", "backend": backend}
            attempt(part, row, subject, partial(subject.logits, backend, padded))
    for backend, checkpointing in (("eager", False), ("sdpa", False), ("sdpa", True)):
        check = "gradients, checkpointing" if checkpointing else "gradients"
        part.attempt(
            {**labels, "check": check, "backend": backend},
            partial(subject.gradients, backend, checkpointing),
        )


def text_checks(part: Part, labels: Row, subject: Subject) -> None:
    """Greedy text with each cache."""
    ways: Ways = [
        ("text, dynamic cache", "eager", lambda: subject.generated("eager")),
        ("text, dynamic cache", "sdpa", subject.generated),
        ("text, static cache", "sdpa", lambda: subject.generated(cache_implementation="static", disable_compile=True)),
        ("text, left-padded batch", "sdpa", subject.left_padded),
        ("text, left-padded batch, static cache", "sdpa",
         lambda: subject.left_padded(cache_implementation="static", disable_compile=True)),
    ]  # fmt: skip
    if subject.dtype != "float32":
        ways += [("text, left-padded batch", name, partial(subject.left_padded, name)) for name in FLASH]
    compare_all(part, labels, subject, ways)


def risky_checks(part: Part, labels: Row, subject: Subject) -> None:
    """Text in ways that may break the device or hang."""
    paged = ("paged|eager", "paged|sdpa", *(FLASH if subject.dtype != "float32" else ()))
    ways: Ways = [("text, CUDA graph of a decode step", "sdpa", subject.graphed)]
    ways += [("text, continuous batching", name, partial(subject.continuous, name)) for name in paged]
    compare_all(part, labels, subject, ways)


def compare_all(part: Part, labels: Row, subject: Subject, ways: Ways) -> None:
    for check, backend, way in ways:
        attempt(part, {**labels, "check": check, "backend": backend}, subject, partial(compare, way, subject))


def compiled_checks(part: Part, labels: Row, subject: Subject) -> None:
    """Checks with a compiler, which take tens of seconds each."""
    part.attempt(
        {**labels, "check": "text, static cache, torch.compile reduce-overhead", "backend": "sdpa"},
        partial(compare, subject.compiled, subject),
        needs=45,
    )
    torch.compiler.reset()
    for padded in (False, True):
        row = {**labels, "check": "logits, left-padded" if padded else "logits", "backend": "flex_attention"}
        attempt(part, row, subject, partial(subject.logits, "flex_attention", padded), needs=25)
    torch.compiler.reset()


def loaded(part: Part, folders: dict[str, str], sizes: Sizes) -> dict[tuple[str, str], Subject]:
    """The tiny models by config and dtype, and a row for each that cannot be loaded."""
    found = {}
    for dtype, config in itertools.product(DTYPES, CONFIGS):
        try:
            found[config, dtype] = Subject(folders[config], dtype, sizes)
        except Exception as error:
            labels = {"config": config, "dtype": dtype, "check": "load", "backend": ""}
            part.add({**labels, "error": one_line(error)})
    return found


def split_errors(sizes: Sizes) -> Row:
    """The worst error of a layer that is split on this device, relative to the CPU, in float32 on both."""
    # More tokens than features, so that the closed form has one solution; whole short sequences.
    size = (sizes.shape, 16, sizes.length // SHORT * SHORT)
    expected, got = split_layer(*size, "cpu"), split_layer(*size, device())
    errors = {name: relative_error(got[name], expected[name].double()) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    return judged("gradients", "float32", errors[worst], worst=worst)


def main() -> None:
    options = parser_of(__doc__).parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    part, sizes = Part("correctness", options), Sizes(options.smoke)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {config: f"{scratch}/{number}" for number, config in enumerate(CONFIGS)}
        for config, fields in CONFIGS.items():
            make_model(sizes.shape | fields, folders[config])
        subjects = loaded(part, folders, sizes)
        split = {"config": "a Llama's layer", "dtype": "float32", "check": "split", "backend": "sdpa"}
        part.attempt(split, partial(split_errors, sizes))
        # What may break the device, or take long, comes after what is worth most.
        for checks in (exact_checks, text_checks, risky_checks):
            for (config, dtype), subject in subjects.items():
                checks(part, {"config": config, "dtype": dtype}, subject)
        shared, paired = list(CONFIGS)[:2]
        slow = [(shared, "bfloat16"), (paired, "bfloat16"), (shared, "float32"), (paired, "float32")]
        for config, dtype in slow[:1] if options.smoke else slow:
            if (config, dtype) in subjects:
                compiled_checks(part, {"config": config, "dtype": dtype}, subjects[config, dtype])
    part.finish()


if __name__ == "__main__":
    main()
