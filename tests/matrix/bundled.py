"""Check the code saved beside the weights with the transformers at hand, where the package cannot be imported.

    python bundled.py FOLDERS OUT.json

It is run by `run.py` in a process of its own, with FOLDERS from `folders.py`.
"""
# ruff: noqa: E402

import contextlib
import inspect
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

sys.modules["gda"] = None  # type: ignore[assignment]  # whatever is installed: `import gda` raises

import torch
import transformers
from outcomes import Absent, Checks, run_checks
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

FOLDERS, OUT = Path(sys.argv[1]), Path(sys.argv[2])
TOLERANCE = 1e-5
NEW_TOKENS = 8
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CONVERTED = [path.parent.name for path in sorted(FOLDERS.glob("*/source"))]
SHARED = [name for name in CONVERTED if name != "diffllama"]  # transformers' DiffLlama has no cache of a static size
MODELS = [path.parent.name for path in sorted(FOLDERS.glob("*/model"))]
WITH_WINDOWS = ["mistral", "qwen3", "shared"]
HEADS = {
    "AutoModel": (2, 40, None),
    "AutoModelForSequenceClassification": (2, 3),
    "AutoModelForTokenClassification": (2, 40, 3),
    "AutoModelForQuestionAnswering": (2, 40),
}


# --- loading ----------------------------------------------------------------------------------------------------------


def load(folder: Path, auto: str = "AutoModelForCausalLM", **settings: Any) -> Any:
    """The model of a folder by its own code, or of a source by transformers' class, in evaluation mode."""
    model = getattr(transformers, auto).from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, **({"attn_implementation": "sdpa"} | settings)
    )
    if folder.name not in ("source", "exported"):
        assert type(model).__module__.startswith("transformers_modules."), f"{type(model)} is no bundled code"
    return model.eval()


@cache
def gda_model(name: str, attention: str = "sdpa") -> Any:
    """A GDA model that checks must not change."""
    return load(FOLDERS / name / "model", attn_implementation=attention)


@cache
def source_model(name: str) -> Any:
    """Its source, which checks must not change."""
    return load(FOLDERS / name / "source")


@cache
def expected(name: str) -> dict[str, Tensor]:
    return load_file(FOLDERS / name / "expected.safetensors")


def ids_of(name: str) -> Tensor:
    return expected(name)["ids"]


@torch.no_grad()
def logits_of(name: str) -> Tensor:
    """The expected logits of a model."""
    saved = expected(name)
    return saved["logits"] if "logits" in saved else source_model(name)(saved["ids"], use_cache=False).logits


def same(got: Tensor, wanted: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Raise an AssertionError that names `what` if tensors differ by more than `tolerance`, relative to the largest."""
    assert got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    assert error <= tolerance, f"{what}: differs by {error:.1e}"


# --- checks -----------------------------------------------------------------------------------------------------------


def check_load() -> None:
    """Each folder loads without importing `gda`."""
    with contextlib.suppress(ModuleNotFoundError):
        import gda  # noqa: F401

        raise AssertionError("the installed package can be imported")
    for name in MODELS:
        model = gda_model(name)
        assert model.config.model_type == "gda", name
        state = model.state_dict()
        for tensor, weight in load_file(FOLDERS / name / "model" / "model.safetensors").items():
            assert torch.equal(state[tensor], weight), f"{name}: {tensor} is not what the file holds"


def check_tokenizer() -> None:
    """AutoTokenizer gives the ids that it gives for the source."""
    text = "  The cat</s>sat<s> on 12345 hats\n\n\tin Äpfeln 🙂"
    for name in CONVERTED:
        for kind in ("model", "exported"):
            source, found = (
                transformers.AutoTokenizer.from_pretrained(FOLDERS / name / folder, trust_remote_code=True)
                for folder in ("source", kind)
            )
            assert found(text).input_ids == source(text).input_ids, f"{name}, {kind}: other ids"


@torch.no_grad()
def check_logits() -> None:
    """Logits of the whole text equal the source's or the naive reference's, with both backends."""
    for name in MODELS:
        for attention in ("sdpa", "eager"):
            got = gda_model(name, attention)(ids_of(name), use_cache=False).logits
            same(got, logits_of(name), f"{name}, {attention}")


class CacheOfThreeArguments(DynamicCache):
    """A user's cache, whose `update` has the arguments that layers of transformers 5.4 to 5.23 pass."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        return super().update(key_states, value_states, layer_idx)


@torch.no_grad()
def check_cache() -> None:
    """A text in two pieces gives the logits of the whole, for every name of the cache argument."""
    known = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    for name in MODELS:
        model, ids = gda_model(name), ids_of(name)
        for argument in ("past_key_values", "cache"):
            if argument == "cache" and argument not in known:
                continue
            cache_class = CacheOfThreeArguments if (5, 4) <= RELEASE < (5, 24) else DynamicCache
            kept = cache_class(config=model.config)
            pieces = [model(piece, use_cache=True, **{argument: kept}).logits for piece in ids.tensor_split([25], 1)]
            assert kept.get_seq_length() == ids.shape[1], f"{name}: {argument} holds {kept.get_seq_length()} tokens"
            same(torch.cat(pieces, 1), logits_of(name), f"{name}, {argument}")


def greedy(model: Any, ids: Tensor, **settings: Any) -> Tensor:
    return model.generate(ids, **({"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0} | settings))


def check_greedy() -> None:
    """Greedy text with a dynamic, a static and no cache, and in a left-padded batch, is the source's."""
    for name in MODELS:
        model, ids = gda_model(name), ids_of(name)
        wanted = expected(name).get("greedy")
        if wanted is None:
            wanted = greedy(source_model(name), ids, use_cache=False)
        ways: dict[str, dict[str, Any]] = {
            "dynamic cache": {},
            "static cache": {"cache_implementation": "static"},
            "no cache": {"use_cache": False},
        }
        for way, settings in ways.items():
            same_text(greedy(model, ids, **settings), wanted, f"{name}, {way}")
        padding = torch.zeros(2, 5, dtype=ids.dtype)
        padded, mask = torch.cat((padding, ids), 1), torch.cat((padding, torch.ones_like(ids)), 1)
        for way in ("dynamic cache", "static cache"):
            got = greedy(model, padded, attention_mask=mask, **ways[way])
            same_text(got[:, 5:], wanted, f"{name}, left-padded, {way}")


def same_text(got: Tensor, wanted: Tensor, what: str) -> None:
    assert torch.equal(got, wanted), f"{what}: other tokens"


@torch.no_grad()
def check_exported() -> None:
    """What a model is exported to computes the same in transformers' own class, and greedy text is the same."""
    for folder in sorted(FOLDERS.glob("*/exported")):
        name = folder.parent.name
        both_words(folder, name)
        model, ids = load(folder), ids_of(name)
        same(model(ids, use_cache=False).logits, logits_of(name), name)
        same_text(greedy(model, ids), greedy(gda_model(name), ids), name)


def check_beams() -> None:
    """Beam search gives the source's text."""
    for name in SHARED:
        settings = {"num_beams": 3, "attention_mask": torch.ones_like(ids_of(name))}
        got, wanted = (greedy(model(name), ids_of(name), **settings) for model in (gda_model, source_model))
        same_text(got, wanted, name)
    for name in set(MODELS) - set(SHARED):
        cached, uncached = (greedy(gda_model(name), ids_of(name), num_beams=3, use_cache=use) for use in (True, False))
        same_text(cached, uncached, f"{name}, cached")


@torch.no_grad()
def check_windows() -> None:
    """A token outside every window changes nothing, and one inside does."""
    for name in WITH_WINDOWS:
        model, ids = gda_model(name), ids_of(name)[:1]
        assert model.config.sliding_window < ids.shape[1] / 4, name
        assert "sliding_attention" in model.config.layer_types, name
        layer = model.config.layer_types.index("sliding_attention")
        maps = load(FOLDERS / name / "model", attn_implementation="eager")(ids, output_attentions=True).attentions
        rows, columns = torch.meshgrid(torch.arange(ids.shape[1]), torch.arange(ids.shape[1]), indexing="ij")
        outside = (columns > rows) | (rows - columns >= model.config.sliding_window)
        assert not maps[layer][..., outside].any(), f"{name}: a map sees beyond its window"
        assert maps[layer][..., ~outside].all(), f"{name}: a map sees less than its window"
        long = greedy(model, ids, max_new_tokens=3 * model.config.sliding_window)
        short = greedy(model, ids, max_new_tokens=3 * model.config.sliding_window, use_cache=False)
        same_text(long, short, f"{name}, past the window")


def gradients(model: Any, ids: Tensor) -> tuple[dict[str, Tensor], int]:
    """Gradients of the loss by parameter, and how often attention ran."""
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    hooks = [layer.self_attn.register_forward_hook(count) for layer in model.model.layers]
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for hook in hooks:
        hook.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, runs


def check_checkpointing() -> None:
    """Gradients are the same with activation checkpointing, and each layer's attention runs once more."""
    for name in ("llama", "qwen3", "token", "fading", "motif"):
        model = load(FOLDERS / name / "model").train()
        plain, once = gradients(model, ids_of(name))
        model.gradient_checkpointing_enable()
        again, twice = gradients(model, ids_of(name))
        assert (once, twice) == (2, 4), f"{name}: attention ran {once} and {twice} times, not 2 and 4"
        assert plain.keys() == again.keys() == dict(model.named_parameters()).keys(), f"{name}: no gradient"
        for parameter, gradient in plain.items():
            if gradient.abs().max() > 0:
                same(again[parameter], gradient, f"{name}: {parameter}")


@torch.no_grad()
def check_outputs() -> None:
    """Hidden states equal the source's, and maps are the differential ones of the naive reference."""
    for name in MODELS:
        model, ids = gda_model(name, "eager"), ids_of(name)
        output = model(ids, output_hidden_states=True, output_attentions=True)
        layers = model.config.num_hidden_layers
        assert output.hidden_states, f"{name}: no hidden states"
        assert output.attentions, f"{name}: no attentions"
        assert (len(output.hidden_states), len(output.attentions)) == (layers + 1, layers), name
        same(model.lm_head(output.hidden_states[-1]), output.logits, f"{name}: last hidden state")
        if name in CONVERTED:
            states = source_model(name)(ids, output_hidden_states=True).hidden_states
            for index, (got, wanted) in enumerate(zip(output.hidden_states, states, strict=True)):
                same(got, wanted, f"{name}: hidden state {index}")
        else:
            for index, (got, wanted) in enumerate(zip(output.attentions, expected(name)["maps"], strict=True)):
                same(got, wanted, f"{name}: maps of layer {index}")


@torch.no_grad()
def check_heads() -> None:
    """The bare model and the classification heads load with their Auto classes and give the right shapes."""
    for name in ("llama", "motif"):
        for auto, shape in HEADS.items():
            extra = {} if auto == "AutoModel" else {"num_labels": 2 if "Question" in auto else 3}
            model = load(FOLDERS / name / "model", auto, **extra)
            got = model(ids_of(name))[0]
            wanted = tuple(model.config.hidden_size if size is None else size for size in shape)
            assert got.shape == wanted, f"{name}, {auto}: {tuple(got.shape)}, not {wanted}"
            assert got.isfinite().all(), f"{name}, {auto}"
            if auto == "AutoModel":
                same(gda_model(name).lm_head(got), logits_of(name), f"{name}, {auto}")


@torch.no_grad()
def check_save() -> None:
    """A model saved by this release reloads with equal logits, and its config suits transformers 4 and 5."""
    for name in MODELS:
        with tempfile.TemporaryDirectory() as again:
            gda_model(name).save_pretrained(again)
            both_words(Path(again), name)
            reloaded = load(Path(again))
            got, wanted = (model(ids_of(name)).logits for model in (reloaded, gda_model(name)))
            assert torch.equal(got, wanted), f"{name}: other logits"


@torch.no_grad()
def check_fewer_layers() -> None:
    """`from_pretrained(folder, num_hidden_layers=1)` equals the source with one layer."""
    for name in ("llama", "llama3", "mistral", "tanh"):
        got, wanted = (
            load(FOLDERS / name / kind, num_hidden_layers=1)(ids_of(name)).logits for kind in ("model", "source")
        )
        same(got, wanted, name)
    for name in ("qwen3", "motif"):  # a source with a list of layer types may refuse
        assert len(load(FOLDERS / name / "model", num_hidden_layers=1).model.layers) == 1, name


def check_config() -> None:
    """config.json has RoPE and dtype in the forms of transformers 4 and 5."""
    for name in MODELS:
        both_words(FOLDERS / name / "model", name)


def both_words(folder: Path, name: str) -> None:
    fields = json.loads((folder / "config.json").read_text())
    for field in ("rope_parameters", "rope_theta", "dtype", "torch_dtype"):
        assert fields.get(field) is not None, f"{name}: config.json has no {field}"
    assert fields["dtype"] == fields["torch_dtype"] == "float32", name
    rope = fields["rope_parameters"]
    assert fields["rope_theta"] == rope["rope_theta"] == 100.0, f"{name}: {rope}"
    if name == "llama3":
        assert fields.get("rope_scaling"), f"{name}: config.json has no rope_scaling"
        for field in ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            assert fields["rope_scaling"].get(field) == rope[field], f"{name}: rope_scaling: {field}"


def check_lost_cache() -> None:
    """An unknown argument that looks like a cache raises an error that names it."""
    for name in ("llama", "motif"):
        model, ids = gda_model(name), ids_of(name)
        x = model.model.embed_tokens(ids)
        cosines = model.model.rotary_emb(x, position_ids=torch.arange(x.shape[1]).unsqueeze(0))
        attention = model.model.layers[0].self_attn
        calls: dict[str, Callable[[Any], Any]] = {
            "attention": lambda kept, f=attention, x=x, p=cosines: f(
                x, position_embeddings=p, attention_mask=None, kv_store=kept
            ),
            "model": lambda kept, f=model, ids=ids: f(ids, kv_store=kept),
            "model, use_cache=False": lambda kept, f=model, ids=ids: f(ids, use_cache=False, kv_store=kept),
        }
        for what, call in calls.items():
            message = type_error_of(call, DynamicCache(config=model.config))
            assert message is not None, f"{name}, {what}: a cache was dropped in silence"
            for word in ("kv_store", transformers.__version__):
                assert word in message, f"{name}, {what}: {message} does not name {word}"


def type_error_of(call: Callable[[Any], Any], argument: Any) -> str | None:
    try:
        call(argument)
    except TypeError as error:
        return str(error)
    return None


# --- warnings ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def overheard() -> Iterator[set[str]]:
    """Every Python warning and every warning logged by transformers, as text."""
    heard: set[str] = set()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.add(record.getMessage())

    listener, logger = Listener(logging.WARNING), logging.getLogger("transformers")
    logger.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield heard
    finally:
        logger.removeHandler(listener)
        heard.update(f"{warning.category.__name__}: {warning.message}" for warning in caught)


def workload(folder: Path, ids: Tensor) -> None:
    """Typical use of a model, with the argument names of this release."""
    model = load(folder)
    for settings in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        greedy(model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, **settings)
    model(ids, labels=ids, output_hidden_states=True)
    model.train().gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    load(folder, attn_implementation="eager")(ids, output_attentions=True)
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        if (folder / "modeling_gda.py").exists():
            load(Path(again))
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def check_warnings() -> None:
    """Warnings that a GDA model gives and its source does not.

    Sources run first, because transformers gives some warnings only once.
    """
    theirs: set[str] = set()
    for name in SHARED:
        with overheard() as heard:
            workload(FOLDERS / name / "source", ids_of(name))
        theirs |= heard
    for name in SHARED:
        with overheard() as heard:
            workload(FOLDERS / name / "model", ids_of(name))
        new = sorted(heard - theirs)
        assert not new, f"{name}: {' ∥ '.join(new)}"


# --- continuous batching ----------------------------------------------------------------------------------------------


def check_paged() -> None:
    """`generate_batch` gives each prompt the text it gets alone; paired keys need 5.19."""
    paired = ["motif"] if RELEASE >= (5, 19) else []
    compare_batched("llama", ["llama", "token", *paired])


def check_paged_windows() -> None:
    """The same for models with full and sliding layers."""
    compare_batched("qwen3", ["qwen3", "shared"])


def compare_batched(like: str, names: list[str]) -> None:
    """Check these models, unless transformers' own model `like` fails too."""
    try:
        batched(FOLDERS / like / "source")
    except Exception as error:  # not caused by our code
        raise Absent(f"the source too: {type(error).__name__}: {error}".splitlines()[0][:80]) from error
    for name in names:
        batched(FOLDERS / name / "model")


def batched(folder: Path) -> None:
    model, alone = load(folder), load(folder)
    ids = ids_of(folder.parent.name)
    prompts = [ids[0, :11].tolist(), ids[1, :5].tolist(), ids[0, :17].tolist()]
    generation = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=False
    )
    settings = {}
    if hasattr(transformers, "ContinuousBatchingConfig"):
        known = inspect.signature(transformers.ContinuousBatchingConfig).parameters
        page = "page_size" if "page_size" in known else "block_size"
        settings["continuous_batching_config"] = transformers.ContinuousBatchingConfig(
            **{page: 4, "num_blocks": 32, "max_batch_tokens": 16}
        )
    outputs = model.generate_batch(prompts, generation_config=generation, **settings)
    assert len(outputs) == len(prompts), f"{folder.parent.name}: {len(outputs)} of {len(prompts)} prompts came back"
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        assert not output.error, f"{folder.parent.name}: {output.error}"
        wanted = greedy(alone, torch.tensor([prompt]), use_cache=False)[0, len(prompt) :].tolist()
        assert output.generated_tokens == wanted, f"{folder.parent.name}: other tokens"


CHECKS: Checks = {
    "warnings": check_warnings,  # first, because transformers gives some warnings only once
    "load": check_load,
    "config": check_config,
    "tokenizer": check_tokenizer,
    "logits": check_logits,
    "cache": check_cache,
    "greedy": check_greedy,
    "beams": check_beams,
    "windows": check_windows,
    "checkpointing": check_checkpointing,
    "outputs": check_outputs,
    "heads": check_heads,
    "save": check_save,
    "exported": check_exported,
    "fewer layers": check_fewer_layers,
    "lost cache": check_lost_cache,
    "paged": check_paged,
    "paged windows": check_paged_windows,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    run_checks(CHECKS, OUT)
