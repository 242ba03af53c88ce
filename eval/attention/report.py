"""`gda attention`: what a model attends to in one text, for people who want to look."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gda._version import __version__
from gda.common.files import refuse_existing, written_beside
from gda.common.screen import quiet_transformers, shows_progress
from gda.common.text import read_text
from gda.conversion.sources.open import open_source
from gda.eval.attention.analysis import (
    AttentionArrays,
    LayerAttention,
    MapArrays,
    attention_arrays,
    attention_modules,
    visit_attention,
)
from gda.eval.attention.maps import MapKind, MapPlan, group_maps, pack, pooled

DEFAULT_TOKENS = 512
DEFAULT_MAP_MEGABYTES = 36.0
BYTES_PER_MEGABYTE = 1_000_000
MOST_CANCELLED = 20
PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class LayerMaps:
    """The kept maps of one layer, as `attention_maps.pack` gives them.

    Attributes:
        kinds: K of them.
        scales: (G, K).
        levels: (G, K, values of a map).
    """

    kinds: list[MapKind]
    scales: np.ndarray
    levels: np.ndarray


@dataclass(frozen=True)
class AttentionReport:
    """What a model attends to in one text.

    Attributes:
        name: The model.
        baseline_name: What it is set beside; None without a baseline, and so is its attention.
        text_name: Where the text is from.
        token_ids: T of them.
        tokens: As text, spaces and line ends made visible.
        arrays: The model's attention in numbers.
        baseline: The baseline's.
        lambda_type: Of the model; None without noise heads.
        plan: Which maps are kept, and how finely.
        maps: By layer.
        baseline_maps: By layer, of those heads that stand in the place of a group's.
        notes: What one who reads the numbers ought to know.
    """

    name: str
    baseline_name: str | None
    text_name: str
    token_ids: list[int]
    tokens: list[str]
    arrays: AttentionArrays
    baseline: AttentionArrays | None
    lambda_type: str | None
    plan: MapPlan
    maps: dict[int, LayerMaps]
    baseline_maps: dict[int, LayerMaps]
    notes: list[str] = field(default_factory=list)

    @property
    def signal_heads_per_group(self) -> int:
        """Signal heads of a group."""
        return int(self.arrays.signal.entropy.shape[1]) // self.arrays.num_groups

    @property
    def baseline_heads(self) -> int:
        """How many heads of the baseline stand in the place of a group's; 0 without a baseline."""
        if self.baseline is None:
            return 0
        heads = int(self.baseline.signal.entropy.shape[1])
        return heads // self.arrays.num_groups if heads % self.arrays.num_groups == 0 else heads

    def most_cancelled(self, layer: int | None = None, group: int | None = None) -> list[dict[str, Any]]:
        """The tokens that noise takes the most attention away from, the first ones first; none without noise heads.

        Args:
            layer: In that layer; by default the mean over all.
            group: In that group; by default the mean over all.
        """
        if self.arrays.cancelled is None:
            return []
        received, cancelled = (
            one[slice(None) if layer is None else [layer]][:, slice(None) if group is None else [group]].mean(
                axis=(0, 1)
            )
            for one in (self.arrays.received, self.arrays.cancelled)
        )
        order = np.argsort(-cancelled, kind="stable")[:MOST_CANCELLED]
        return [
            {
                "position": int(at),
                "token": self.tokens[at],
                "received": float(received[at]),
                "cancelled": float(cancelled[at]),
            }
            for at in order
            if cancelled[at] > 0
        ]

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON-ready values, without the maps."""
        return {
            "model": self.name,
            "baseline": self.baseline_name,
            "text": self.text_name,
            "token_ids": self.token_ids,
            "tokens": self.tokens,
            "layers": self.arrays.num_layers,
            "groups": self.arrays.num_groups,
            "signal_heads_per_group": self.signal_heads_per_group,
            "lambda_type": self.lambda_type,
            "attention": arrays_to_dict(self.arrays),
            "baseline_attention": None if self.baseline is None else arrays_to_dict(self.baseline),
            "most_cancelled": self.most_cancelled(),
            "maps": {
                "layers": list(self.plan.layers),
                "pool": self.plan.pool,
                "each_head": self.plan.heads,
            },
            "versions": versions(),
            "notes": self.notes,
        }

    def to_html(self) -> str:
        """A page that needs nothing else: a navigator, maps on hover, and every number of the report."""
        from gda.eval.attention.page import to_html

        return to_html(self)

    def write_html(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the page; it appears whole.

        Raises:
            FileExistsError: if `out` exists and may not be replaced.
        """
        path = check_out(out, overwrite, "--out")
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as file:
            file.write(self.to_html().encode())
        return path

    def write_png(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Draw the overview and the maps of the group that cancels most; the file appears whole.

        Raises:
            FileExistsError: if `out` exists and may not be replaced.
            ImportError: without matplotlib.
        """
        from gda.eval.attention.picture import draw

        path = check_out(out, overwrite, "--png")
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as file:
            draw(self, file)
        return path


def versions() -> dict[str, str]:
    """Of this package and those that compute."""
    return {"gda": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES}


def arrays_to_dict(arrays: AttentionArrays) -> dict[str, Any]:
    """Every array as lists."""

    def listed(value: Any) -> Any:
        if isinstance(value, MapArrays):
            return {name: one.tolist() for name, one in vars(value).items()}
        return None if value is None else value.tolist()

    return {name.rstrip("_"): listed(value) for name, value in vars(arrays).items()}


def check_out(out: str | Path, overwrite: bool, option: str) -> Path:
    """The path of a file that may be written.

    Raises:
        FileExistsError, ValueError: if it may not.
    """
    path = Path(out)
    if not str(out) or path.is_dir():
        raise ValueError(f"{option} {str(out) or '(empty)'} is no file; name one, such as report.html")
    refuse_existing(path, overwrite)
    return path


def attention(
    model: str | Path | PreTrainedModel,
    *,
    text: str | None = None,
    file: str | Path | None = None,
    baseline: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int = DEFAULT_TOKENS,
    layers: Sequence[int] | None = None,
    map_megabytes: float = DEFAULT_MAP_MEGABYTES,
    device: str | None = None,
    revision: str | None = None,
    console: Console | None = None,
) -> AttentionReport:
    """Read what a model attends to in one text: maps, and what `gda.eval.attention.analysis` counts of them.

    One layer's maps are in memory at a time; what is kept of them is within `map_megabytes`. Models are computed in
    float32, the baseline after the model.

    Args:
        model: A GDA model or one like Llama: a folder, a Hub id, a `.gguf` file, or one in memory with its tokenizer.
        text: The text. Or:
        file: A file in UTF-8; of a `.jsonl` the fields `text`.
        baseline: Another model with the same tokenizer, as a rule the Llama that the first was made of.
        tokenizer: Of a model in memory; of any other, instead of its own.
        max_tokens: Read that many tokens of the text, and no more than the model was made for.
        layers: Keep the maps of these layers only, so that they are finer. The numbers are of all layers.
        map_megabytes: Largest size of the maps that are kept, before compression.
        device: By default a GPU if there is one, else "cpu"; a model in memory stays where it is.
        revision: Of the model, for a Hub id.
        console: Where progress is shown; nowhere if None or no terminal.

    Raises:
        FileNotFoundError, ValueError: for bad input, in one line that names the remedy.
    """
    _check(text, file, max_tokens, map_megabytes)
    text_name, words = ("text", text) if text is not None else read_text(Path(file or ""), "--file")
    name, learner, tokenizer = _open(model, tokenizer, revision)
    ids, notes = _encode(tokenizer, words or "", text_name, learner, name, max_tokens)
    config: Any = learner.config
    depth = len(attention_modules(learner))
    chosen = _chosen_layers(layers, depth)
    groups, heads, differential = _shape(learner)
    plan = MapPlan.that_fits(
        chosen,
        groups=groups,
        heads=heads,
        tokens=len(ids),
        limit=int(map_megabytes * BYTES_PER_MEGABYTE),
        differential=differential,
        baseline=baseline is not None,
    )
    arrays, maps = _read(learner, ids, plan, groups, name, _device(model, device), console)
    del learner
    other: AttentionArrays | None = None
    other_maps: dict[int, LayerMaps] = {}
    other_name: str | None = None
    if baseline is not None:
        other_name, second, own = _open(
            baseline, tokenizer if isinstance(baseline, PreTrainedModel) else None, None, "baseline"
        )
        if other_name == name:
            other_name = f"{other_name} (baseline)"
        _check_same_tokens(own, words or "", ids, second, other_name)
        same_depth = len(attention_modules(second)) == depth
        if not same_depth:
            notes.append(f"{other_name} has another number of layers than {name}; its maps are left out")
        kept, place = plan if same_depth else None, _device(baseline, device)
        other, other_maps = _read(second, ids, kept, groups, other_name, place, console, True)
    notes += _told(plan, heads, depth)
    return AttentionReport(
        name=name,
        baseline_name=other_name,
        text_name=text_name,
        token_ids=ids,
        tokens=token_labels(tokenizer, ids),
        arrays=arrays,
        baseline=other,
        lambda_type=str(config.lambda_type) if differential else None,
        plan=plan,
        maps=maps,
        baseline_maps=other_maps,
        notes=notes,
    )


def _check(text: str | None, file: str | Path | None, max_tokens: int, map_megabytes: float) -> None:
    if (text is None) == (file is None):
        raise ValueError("name one text: --text TEXT or --file FILE")
    if max_tokens < 1:
        raise ValueError(f"--max-tokens {max_tokens} is below 1")
    if not 0 < map_megabytes < 1e6:
        raise ValueError(f"--map-megabytes {map_megabytes} is no size in megabytes, such as {DEFAULT_MAP_MEGABYTES:g}")


def _open(
    place: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    revision: str | None,
    role: str = "model",
) -> tuple[str, PreTrainedModel, PreTrainedTokenizerBase]:
    if isinstance(place, PreTrainedModel):
        if tokenizer is None:
            raise ValueError(f"a {role} in memory needs its tokenizer: attention(model, tokenizer=…)")
        return place.name_or_path or type(place).__name__, place, tokenizer
    if not str(place):
        raise ValueError(f"the name of the {role} is empty; name a folder, a Hub id or a .gguf file")
    with quiet_transformers():
        source = open_source(place, revision)
        if not source.can_run:
            raise ValueError(
                f"{place} is a {source.config.model_type}, which transformers cannot run; `gda convert` it"
            )
        tokenizer = tokenizer or source.tokenizer()
        if tokenizer is None:
            raise ValueError(f"{place} holds no tokenizer that transformers can load")
        return source.name, source.load(), tokenizer


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, text_name: str, model: PreTrainedModel, name: str, max_tokens: int
) -> tuple[list[int], list[str]]:
    """Token ids, with those that the tokenizer puts around a text, and a note if there were more."""
    try:
        ids = [int(one) for one in tokenizer(text, verbose=False)["input_ids"]]
    except UnicodeEncodeError:
        raise ValueError(f"{text_name} has half a surrogate pair, which is no character") from None
    if not text.strip() or not ids:
        raise ValueError(f"{text_name} is empty; name a text with one word at least")
    most = min(max_tokens, int(getattr(model.config, "max_position_embeddings", max_tokens)))
    if max(ids[:most]) >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer gives ids up to {max(ids)}, and {name} has {model.config.vocab_size} embeddings"
        )
    if len(ids) <= most:
        return ids, []
    return ids[:most], [f"{text_name} has {len(ids):,} tokens, of which the first {most:,} were read"]


def _check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], model: PreTrainedModel, name: str
) -> None:
    if max(ids) >= model.config.vocab_size or tokenizer(text, verbose=False)["input_ids"][: len(ids)] != ids:
        raise ValueError(f"{name} reads the text as other tokens; model and baseline must have one tokenizer")
    if len(ids) > (most := int(model.config.max_position_embeddings)):
        raise ValueError(f"{name} reads {most} tokens, and the text has {len(ids)}; lower --max-tokens")


def _chosen_layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    if layers is None:
        return list(range(depth))
    for layer in layers:
        if not 0 <= layer < depth:
            raise ValueError(f"--layers {layer} is not from 0 to {depth - 1}")
    if not layers:
        raise ValueError("--layers names no layer")
    return sorted(set(layers))


def _shape(model: PreTrainedModel) -> tuple[int, int, bool]:
    """Groups, signal heads of each, and whether there are noise heads: as in the maps of one token."""
    shapes: list[tuple[int, int | None]] = []

    def visit(maps: LayerAttention) -> None:
        shapes.append((len(maps.signal), None if maps.noise is None else len(maps.noise)))

    visit_attention(model, torch.zeros(1, dtype=torch.long), visit)
    signal, noise = shapes[0]
    if noise is not None:
        return noise, signal // noise, True
    groups = int(getattr(model.config, "num_key_value_heads", None) or 1)
    groups = groups if signal % groups == 0 else 1
    return groups, signal // groups, False


def _told(plan: MapPlan, heads: int, depth: int) -> list[str]:
    told = plan.reductions(heads)
    if len(plan.layers) < depth:
        told.append(f"maps are kept of {len(plan.layers)} of {depth} layers (--layers); numbers are of all")
    if told and (plan.pool > 1 or not plan.heads):
        told[-1] += "; --layers or --map-megabytes keeps more"
    return told


def _read(
    model: PreTrainedModel,
    ids: list[int],
    plan: MapPlan | None,
    groups: int,
    name: str,
    device: str | None,
    console: Console | None,
    is_baseline: bool = False,
) -> tuple[AttentionArrays, dict[int, LayerMaps]]:
    maps: dict[int, LayerMaps] = {}
    depth = len(attention_modules(model))
    model = _placed(model, device)
    with Progress(console=console, disable=not shows_progress(console), transient=True) as bar:
        task = bar.add_task(f"reading {name}", total=depth)

        def visit(layer: LayerAttention) -> None:
            if plan is not None and layer.layer in plan.layers:
                kept = baseline_maps(layer, plan, groups) if is_baseline else group_maps(layer, plan, groups)
                maps[layer.layer] = LayerMaps([kind for kind, _ in kept], *pack(kept))
            bar.advance(task)

        arrays = attention_arrays(model, torch.tensor(ids), groups=groups, visit=visit)
    return arrays, maps


def baseline_maps(maps: LayerAttention, plan: MapPlan, groups: int) -> list[tuple[MapKind, torch.Tensor]]:
    """What the baseline attends by, the mean over the heads in the place of a group's, or over all of them."""
    heads = maps.difference.float()
    count = groups if len(heads) % groups == 0 else 1
    means = pooled(heads.unflatten(0, (count, -1)).mean(dim=1), plan.pool)
    return [(MapKind("baseline", maps.noise is not None), means.expand(groups, -1, -1))]


def _placed(model: PreTrainedModel, device: str | None) -> PreTrainedModel:
    if device is None:
        return model
    try:
        return model.to(device)  # type: ignore[arg-type]
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device} is not there") from None


def _device(place: str | Path | PreTrainedModel, device: str | None) -> str | None:
    """A model in memory stays where it is unless told."""
    if device is not None or isinstance(place, PreTrainedModel):
        return device
    return "cuda" if torch.cuda.is_available() else None


def token_labels(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token as text, with spaces and line ends in signs that can be seen, and nothing that moves other text."""
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    return [_visible(_as_text(tokenizer, one, str(piece))) for one, piece in zip(ids, pieces, strict=True)]


def _as_text(tokenizer: PreTrainedTokenizerBase, token_id: int, piece: str) -> str:
    text = str(tokenizer.decode([token_id]))
    if not text or "\ufffd" in text:  # a part of a character
        return piece
    return f" {text}" if piece.startswith(("▁", "Ġ")) and not text.startswith(" ") else text


def _visible(text: str) -> str:
    signs = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
    return "".join(signs.get(one) or (one if one.isprintable() else f"\\u{ord(one):04x}") for one in text)


def check_outs(out: str | None, png: str | None, *, as_json: bool, file: str | None, overwrite: bool) -> None:
    """Refuse, before anything is run, what could not be written when it has.

    Raises:
        FileExistsError, ValueError, ImportError: naming the option.
    """
    if out is None and png is None and not as_json:
        raise ValueError("nothing to write: name --out FILE, --png FILE or --json")
    for option, place in (("--out", out), ("--png", png)):
        if place is not None:
            path = check_out(place, overwrite, option)
            if file is not None and path.exists() and path.samefile(file):
                raise ValueError(f"{option} {place} is the text that is read; choose another place")
    if out is not None and png is not None and Path(out).resolve() == Path(png).resolve():
        raise ValueError(f"--out and --png are one file, {out}; name two")
    if png is not None:
        import gda.eval.attention.picture  # noqa: F401, says so if matplotlib is absent
