"""Attention on the answer when a model is asked for a fact in a long context.

The Differential Transformer's paper (arXiv 2410.05258, "Key Information Retrieval") compares the attention on the
answer with that on the rest of the context, the noise. Here both are measured on the prompts of the retrieval task, for
the signal maps, the noise maps and their difference, and for the maps of a baseline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gda.common.screen import progress_bars
from gda.conversion.sources.compare_tokenizers import first_difference
from gda.eval.attention.analysis import LayerAttention, row_entropy, row_shares, visit_attention
from gda.eval.models import longest_sequence
from gda.eval.tables import TextTable
from gda.eval.tasks.needles import NeedlePrompt, NeedleSettings, make_prompts
from gda.eval.tasks.settings import read_settings, tokens_of

# The settings of the task gda_needles.
DEFAULTS = NeedleSettings(length=512, depth="all", needles=6, queries=1, digits=7, samples=20, data_seed=0)


def read_prompt_settings(metadata: Mapping[str, Any], *, alone: bool = False) -> NeedleSettings:
    """The settings that `--metadata` gives to the retrieval tasks.

    `alone` says that no task reads the metadata, so that every name must be a setting.

    Raises:
        ValueError: for a name that is not a setting, or a value out of range.
    """
    names = [field.name for field in fields(DEFAULTS)]
    unknown = [name for name in metadata if name == "seed" or (alone and name not in names)]
    settings = read_settings(NeedleSettings, {**asdict(DEFAULTS), **metadata})
    if unknown:
        raise ValueError(f"metadata: --diagnostics has no setting `{unknown[0]}`; it has {', '.join(names)}")
    return settings


def _prompts_by_depth(settings: NeedleSettings) -> list[NeedleSettings]:
    """Settings for each depth. Prompts of two depths differ in the order of their sentences only."""
    samples = -(-settings.samples // len(settings.depths))
    return [replace(settings, depth=depth, samples=samples) for depth in settings.depths]


@dataclass(frozen=True)
class AttentionShares:
    """Where maps attend: means over the heads and over the tokens that predict the answer.

    Shares are fractions of a row's magnitude, |a| / Σ|a|. For signal and noise maps this is the attention itself; for
    difference maps it makes them comparable.
    """

    answer: float  # share on the sentences that hold the answer
    noise_context: float  # share on the other sentences of the context
    first_token: float  # share on the first token of the text, the attention sink, which the first two exclude
    entropy: float  # entropy of the shares, in nats


@dataclass(frozen=True)
class DiagnosticsReport:
    """Attention on retrieval prompts, by kind of map: "signal", and "noise" and "difference" for a GDA model.

    "baseline" is the baseline's maps, or its difference maps if it is a GDA model.
    """

    settings: NeedleSettings
    tokens: float  # mean length of a prompt
    by_layer: dict[str, list[AttentionShares]]  # means over the depths for each layer
    by_depth: dict[str, list[AttentionShares]]  # means over the layers for each depth
    lambdas: list[float | None]  # λ of each layer, the mean over heads and rows; None for a layer without noise heads

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        found = asdict(self)
        settings = found.pop("settings")
        by_depth = {"depths": list(self.settings.depths), "samples": _prompts_by_depth(self.settings)[0].samples}
        del settings["depth"]
        return settings | by_depth | found

    def to_markdown(self) -> str:
        """Both tables in Markdown."""
        return "\n\n".join(table.to_markdown() for table in self.tables())

    def tables(self) -> list[TextTable]:
        """A table by depth and one by layer."""
        depth_rows = [
            [kind, *(f"{cell.answer:.3f} / {cell.noise_context:.3f}" for cell in [*cells, _mean_cell(cells)])]
            for kind, cells in self.by_depth.items()
        ]
        layer_rows = [
            [str(layer), self._lambda_text(layer), *(_cell(cells, layer) for cells in self.by_layer.values())]
            for layer in range(max(map(len, self.by_layer.values())))
        ]
        depths = [f"{100 * depth:.0f} %" for depth in self.settings.depths]
        title = f"Attention on the answer / on the noise context, by depth ({self.tokens:.0f} tokens)"
        return [
            TextTable(["maps", *depths, "mean"], depth_rows, title),
            TextTable(
                ["layer", "λ", *self.by_layer], layer_rows, "Answer / noise context / first token / entropy, by layer"
            ),
        ]

    def _lambda_text(self, layer: int) -> str:
        lambda_ = self.lambdas[layer] if layer < len(self.lambdas) else None
        return "" if lambda_ is None else f"{round(lambda_, 4) + 0.0:.4f}"  # + 0.0: no −0.0000


def _mean_cell(cells: Sequence[AttentionShares]) -> AttentionShares:
    columns = zip(*(astuple(cell) for cell in cells), strict=True)
    return AttentionShares(*(sum(column) / len(cells) for column in columns))


def _cell(layers: Sequence[AttentionShares], layer: int) -> str:
    if layer >= len(layers):  # model and baseline may differ in depth
        return ""
    cell = layers[layer]
    return f"{cell.answer:.3f} / {cell.noise_context:.3f} / {cell.first_token:.3f} / {cell.entropy:.2f}"


def read_texts(
    settings: NeedleSettings, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase | None = None
) -> list["Text"]:
    """The prompts of the retrieval task in tokens (see `eval/tasks/README.md`), those of the first depth first.

    Raises:
        ValueError: if the length is too short for the needles, the tokenizer cannot locate its tokens in the text, or
            `other`, the baseline's tokenizer, reads a prompt differently.
    """
    count = tokens_of(tokenizer)
    prompts = [prompt for each in _prompts_by_depth(settings) for prompt in make_prompts(each, count)]
    if other is not None:
        for prompt in prompts:
            ids, others = (each(prompt.text + prompt.target, verbose=False).input_ids for each in (tokenizer, other))
            if ids != others:
                raise ValueError(
                    "--diagnostics: model and baseline must share one tokenizer, but a prompt is read differently: "
                    f"{first_difference(ids, others)}; omit --baseline or --diagnostics"
                )
    return [Text.of(prompt, tokenizer) for prompt in prompts]


def diagnose(
    model: PreTrainedModel,
    texts: Sequence["Text"],
    settings: NeedleSettings,
    *,
    baseline: PreTrainedModel | None = None,
    console: Console | None = None,
) -> DiagnosticsReport:
    """Measure where a model attends while it answers the `texts` that `read_texts` made by the `settings`.

    The model reads each prompt with its answer, and the rows that predict the answer count. Earlier rows are computed
    by the model's own attention backend and cost no maps.

    Raises:
        ValueError: if the texts are too long for a model, or a model's attention cannot be read.
    """
    models = [model] if baseline is None else [model, baseline]
    for each in models:
        _check_fits(each, texts)
    readings: list[list[_Reading]] = [[] for _ in models]
    with progress_bars(console) as progress:
        for text in progress.track(texts, description="diagnosing"):
            for each, of_model in zip(models, readings, strict=True):
                of_model.append(_read(each, text))
    means = _mean_shares(readings[0], len(settings.depths))
    if baseline is not None:
        of_baseline = _mean_shares(readings[1], len(settings.depths))
        means["baseline"] = of_baseline.get("difference", of_baseline["signal"])
    lambdas = zip(*(reading.lambdas for reading in readings[0]), strict=True)  # by layer
    return DiagnosticsReport(
        settings=settings,
        tokens=mean(text.first_row + 1 for text in texts),
        by_layer={kind: [AttentionShares(*row) for row in cells.mean(0).tolist()] for kind, cells in means.items()},
        by_depth={kind: [AttentionShares(*row) for row in cells.mean(1).tolist()] for kind, cells in means.items()},
        lambdas=[None if None in layer else mean(layer) for layer in lambdas],
    )


@dataclass(frozen=True)
class Text:
    """A prompt with its answer in tokens `ids` (T,), and masks (T,) of those of the answer and of the noise context.

    `first_row` is the row that predicts the first token of the answer.
    """

    ids: torch.Tensor
    first_row: int
    answer: torch.Tensor
    context: torch.Tensor

    @classmethod
    def of(cls, prompt: NeedlePrompt, tokenizer: PreTrainedTokenizerBase) -> "Text":
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} cannot locate its tokens in the text; use a fast tokenizer")
        encoded = tokenizer(prompt.text + prompt.target, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]

        def overlapping(start: int, end: int) -> torch.Tensor:
            return torch.tensor([first < min(last, end) and last > start for first, last in offsets])

        answer = overlapping(prompt.answer_start, prompt.answer_end)
        context = overlapping(0, len(prompt.context)) & ~answer
        answer[0] = context[0] = False
        target = overlapping(len(prompt.text), len(prompt.text + prompt.target)).nonzero().flatten().tolist()
        # The last token predicts what comes after the answer, so its row does not count.
        length, first_row = target[-1], target[0] - 1
        ids = torch.tensor(encoded["input_ids"])
        return cls(ids[:length], first_row, answer[:length], context[:length])


def _check_fits(model: PreTrainedModel, texts: Sequence[Text]) -> None:
    """Raise ValueError unless the model reads texts of that length and has all of their token ids."""
    name, config = type(model).__name__, model.config
    longest, limit = max(len(text.ids) for text in texts), longest_sequence(config)
    if longest > limit:
        raise ValueError(
            f"a prompt with its answer has {longest} tokens, and {name} reads {limit}; choose a smaller length"
        )
    highest, embeddings = max(int(text.ids.max()) for text in texts), config.get_text_config().vocab_size
    if highest >= embeddings:
        raise ValueError(
            f"{name} has a vocabulary of {embeddings} tokens, and a prompt holds the token id {highest}; "
            "model and baseline must share one tokenizer"
        )


@dataclass(frozen=True)
class _Reading:
    """The attention of one model in one text: `AttentionShares` (layers, 4) by kind of map, and λ of each layer."""

    shares: dict[str, torch.Tensor]
    lambdas: list[float | None]


def _read(model: PreTrainedModel, text: Text) -> _Reading:
    shares: dict[str, list[torch.Tensor]] = {}
    lambdas: list[float | None] = []

    def visit(maps: LayerAttention) -> None:
        kinds = {"signal": maps.signal}
        if maps.noise is not None:
            kinds |= {"noise": maps.noise, "difference": maps.difference}
        for kind, tensor in kinds.items():
            shares.setdefault(kind, []).append(_shares(tensor, text))
        lambdas.append(None if maps.lambda_ is None else maps.lambda_.mean().item())

    visit_attention(model, text.ids, visit, first_row=text.first_row)
    return _Reading({kind: torch.stack(layers) for kind, layers in shares.items()}, lambdas)


def _shares(maps: torch.Tensor, text: Text) -> torch.Tensor:
    """`AttentionShares` of the maps (H, Q, T) of one layer, (4,)."""
    shares = row_shares(maps).cpu()
    measured = (
        shares[..., text.answer].sum(dim=-1),
        shares[..., text.context].sum(dim=-1),
        shares[..., 0],
        row_entropy(shares),
    )
    return torch.stack([values.mean() for values in measured])


def _mean_shares(readings: Sequence[_Reading], num_depths: int) -> dict[str, torch.Tensor]:
    """Means over the texts of each depth, (depths, layers, 4) by kind of map."""
    return {
        kind: torch.stack([reading.shares[kind] for reading in readings]).unflatten(0, (num_depths, -1)).mean(1)
        for kind in readings[0].shares
    }
