"""`gda.attention`: read a model's attention in one text, and the baseline's beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gda.common.options import takes
from gda.common.screen import progress_bars, quiet_transformers
from gda.common.text import read_text
from gda.conversion.sources.open import open_source
from gda.eval.attention.analysis import (
    AttentionArrays,
    LayerAttention,
    attention_arrays,
    attention_modules,
    visit_attention,
)
from gda.eval.attention.maps import LayerMaps, MapKind, MapPlan, baseline_maps, group_maps, pack
from gda.eval.attention.report import AttentionReport
from gda.eval.models import choose_device, longest_sequence
from gda.eval.options import AttentionOptions


@takes(AttentionOptions)
def attention(
    options: AttentionOptions,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    console: Console | None = None,
) -> AttentionReport:
    """Read a model's attention on one text: its maps, and the numbers of `gda.eval.attention.analysis`.

    One layer's maps are in memory at a time. Models are loaded in float32, the baseline after the model. Both may also
    be models in memory, which keep their data type and, unless a device is given, their device.

    Args:
        tokenizer: Tokenizer of a model in memory, or one to use instead of the model's own.

    Raises:
        FileNotFoundError, ValueError: for bad input, in one line that names the remedy.
    """
    choose_device(options.device)
    text_name, text = "text", options.text or ""
    if options.file is not None:
        text_name, text = read_text(Path(options.file))
    opened = _open(options.model, tokenizer, options.device, options.revision)
    ids, notes = _encode(opened, text, text_name, options.max_tokens)
    labels = token_labels(opened.tokenizer, ids)
    depth, groups, heads, differential = _shape(opened.model)
    lambda_type = str(opened.model.config.lambda_type) if differential else None
    plan = MapPlan.that_fits(
        options.chosen_layers(depth),
        groups=groups,
        heads=heads,
        tokens=len(ids),
        limit=int(options.map_megabytes * 1e6),
        differential=differential,
        baseline=options.baseline is not None,
    )
    name = opened.name
    arrays, maps = _read(opened, ids, groups, plan, group_maps, console)
    del opened  # the baseline takes its place in memory
    baseline_name: str | None = None
    baseline: AttentionArrays | None = None
    maps_of_baseline: dict[int, LayerMaps] = {}
    if options.baseline is not None:
        in_memory = isinstance(options.baseline, torch.nn.Module)
        other = _open(options.baseline, tokenizer if in_memory else None, options.device, role="baseline")
        if other.name == name:
            other = replace(other, name=f"{name} (baseline)")
        _check_same_tokens(other, text, ids)
        same_depth = len(attention_modules(other.model)) == depth
        if not same_depth:
            notes.append(f"{other.name} has a different number of layers than {name}; its maps are omitted")
        baseline_name = other.name
        baseline, maps_of_baseline = _read(other, ids, groups, plan if same_depth else None, baseline_maps, console)
    return AttentionReport(
        name=name,
        baseline_name=baseline_name,
        text_name=text_name,
        token_ids=ids,
        tokens=labels,
        arrays=arrays,
        baseline=baseline,
        lambda_type=lambda_type,
        plan=plan,
        maps=maps,
        baseline_maps=maps_of_baseline,
        notes=[*notes, *_notes_on_maps(plan, depth, heads)],
    )


@dataclass(frozen=True)
class _Opened:
    """A model with its name and tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def _open(
    place: str | Path | torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str | None,
    revision: str | None = None,
    role: str = "model",
) -> _Opened:
    if isinstance(place, torch.nn.Module):
        if tokenizer is None:
            raise ValueError(f"a {role} in memory needs its tokenizer: attention(model, tokenizer=…)")
        model: Any = place
        if hasattr(model, "get_base_model"):  # a wrapper of PEFT
            if not hasattr(model, "merge_and_unload"):  # for example a prompt, which only the wrapper adds
                raise ValueError(f"the adapter of the {role} cannot be merged, so its attention cannot be shown")
            model = model.get_base_model()  # which has the adapter, too
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"the {role} is a {type(model).__name__}, not a model of transformers")
        if device is not None:
            model.to(device)  # type: ignore[arg-type]
        return _Opened(model.name_or_path or type(model).__name__, model, tokenizer)
    with quiet_transformers():
        source = open_source(place, revision)
        if not source.can_run:
            raise ValueError(
                f"{place} is a {source.config.model_type}, which transformers cannot run; convert it with "
                "`gda convert` first"
            )
        model = source.load()
        return _Opened(source.name, model.to(choose_device(device)), tokenizer or source.tokenizer())


def _shape(model: PreTrainedModel) -> tuple[int, int, int, bool]:
    """The numbers of layers, of groups in a layer and of signal heads in a group, and whether there are noise heads.

    They are read from the maps of one token.
    """
    layers: list[LayerAttention] = []
    visit_attention(model, torch.zeros(1, dtype=torch.long), layers.append)
    signal, noise = len(layers[0].signal), layers[0].noise
    groups = len(noise) if noise is not None else int(getattr(model.config, "num_key_value_heads", None) or 1)
    groups = groups if signal % groups == 0 else 1
    return len(layers), groups, signal // groups, noise is not None


def _encode(opened: _Opened, text: str, text_name: str, max_tokens: int) -> tuple[list[int], list[str]]:
    """Token ids with the tokenizer's special tokens, and a note if the text was cut."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text_name} contains half of a surrogate pair, which is not a character") from None
    ids = [int(token) for token in opened.tokenizer(text, verbose=False)["input_ids"]]
    if not text.strip() or not ids:
        raise ValueError(f"{text_name} is empty; name a text with at least one word")
    config = opened.model.config.get_text_config()
    longest = min(max_tokens, longest_sequence(config))
    if max(ids[:longest]) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives ids up to {max(ids)}, and {opened.name} has {config.vocab_size} embeddings"
        )
    if len(ids) <= longest:
        return ids, []
    return ids[:longest], [f"{text_name} has {len(ids):,} tokens; the first {longest:,} were read"]


def _check_same_tokens(opened: _Opened, text: str, ids: list[int]) -> None:
    config = opened.model.config.get_text_config()
    if max(ids) >= config.vocab_size or opened.tokenizer(text, verbose=False)["input_ids"][: len(ids)] != ids:
        raise ValueError(
            f"{opened.name} has different tokens for this text; model and baseline must share one tokenizer"
        )
    if len(ids) > (longest := longest_sequence(config)):
        raise ValueError(f"{opened.name} reads {longest} tokens, and the text has {len(ids)}; lower --max-tokens")


def _notes_on_maps(plan: MapPlan, depth: int, heads: int) -> list[str]:
    notes = plan.reductions(heads)
    if len(plan.layers) < depth:
        kept = f"maps are kept for {len(plan.layers)} of {depth} layers (--layers)"
        notes.append(f"{kept}; the numbers cover all layers")
    if notes and (plan.pool > 1 or not plan.heads):
        notes[-1] += "; fewer --layers or more --map-megabytes give finer maps"
    return notes


def _read(
    opened: _Opened,
    ids: list[int],
    groups: int,
    plan: MapPlan | None,
    select_maps: Callable[[LayerAttention, MapPlan, int], list[tuple[MapKind, torch.Tensor]]],
    console: Console | None,
) -> tuple[AttentionArrays, dict[int, LayerMaps]]:
    """A model's numbers, and the maps, by layer, that `select_maps` keeps of each layer of the plan."""
    maps: dict[int, LayerMaps] = {}
    with progress_bars(console) as bar:
        task = bar.add_task(f"reading {escape(opened.name)}", total=len(attention_modules(opened.model)))

        def visit(layer: LayerAttention) -> None:
            if plan is not None and layer.layer in plan.layers:
                maps[layer.layer] = pack(select_maps(layer, plan, groups))
            bar.advance(task)

        arrays = attention_arrays(opened.model, torch.tensor(ids), groups=groups, visit=visit)
    return arrays, maps


def token_labels(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token as text. Spaces and line ends become visible signs, and control characters their numbers."""
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    return [_visible(_as_text(tokenizer, token, str(piece))) for token, piece in zip(ids, pieces, strict=True)]


def _as_text(tokenizer: PreTrainedTokenizerBase, token_id: int, piece: str) -> str:
    text = str(tokenizer.decode([token_id]))
    if not text or "\ufffd" in text:  # a part of a character
        return piece
    return f" {text}" if piece.startswith(("▁", "Ġ")) and not text.startswith(" ") else text


def _visible(text: str) -> str:
    signs = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
    return "".join(signs.get(each) or (each if each.isprintable() else f"\\u{ord(each):04x}") for each in text)
