"""Where a model attends when it is asked for a fact in a long context.

The Differential Transformer's paper (arXiv 2410.05258, "Key Information Retrieval") compares the attention on the
answer with that on the rest of the context, the noise. Here both are measured on the prompts of the retrieval task, for
the signal maps, the noise maps and their difference, and for the maps of a baseline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gda.common.screen import shows_progress
from gda.eval.attention.analysis import LayerAttention, attention_modules, row_entropy, row_shares, visit_attention
from gda.eval.tables import TextTable
from gda.eval.tasks.needles import DEPTHS, NeedlePrompt, NeedleSettings, make_prompts
from gda.eval.tasks.settings import read_settings, tokens_of

# The settings of the task gda_needles.
DEFAULTS = NeedleSettings(length=512, depth="all", needles=6, queries=1, digits=7, samples=20, data_seed=0)


@dataclass(frozen=True)
class PromptSettings:
    """Settings of the prompts.

    Attributes:
        length: Length of a prompt at most, in tokens.
        needles: Number of sentences with a magic number.
        queries: Number of magic numbers asked for.
        digits: Number of digits of a magic number.
        samples: Number of prompts at each depth. They differ between depths in the order of their sentences only.
        seed: Seed of the prompts, like the task's `data_seed`.
        depths: Positions of the answer in the context, from 0 to 1.
    """

    length: int = DEFAULTS.length
    needles: int = DEFAULTS.needles
    queries: int = DEFAULTS.queries
    digits: int = DEFAULTS.digits
    samples: int = DEFAULTS.samples // len(DEPTHS)
    seed: int = DEFAULTS.data_seed
    depths: Sequence[float] = DEPTHS

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], *, alone: bool = False) -> "PromptSettings":
        """The settings that `--metadata` gives to the retrieval tasks. Their `samples` are divided among the depths.

        Args:
            metadata: Settings that differ from those of `gda_needles`.
            alone: Whether no task reads the metadata, so that every name must be a setting of these prompts.

        Raises:
            ValueError: for a name that is not a setting, or a value out of range.
        """
        names = [field.name for field in fields(DEFAULTS)]
        unknown = [name for name in metadata if name == "seed" or (alone and name not in names)]
        task = read_settings(NeedleSettings, {**asdict(DEFAULTS), **metadata})
        if unknown:
            raise ValueError(f"metadata: --diagnostics has no setting `{unknown[0]}`; it has {', '.join(names)}")
        depths = DEPTHS if task.depth == "all" else (float(task.depth),)
        samples = -(-task.samples // len(depths))
        return cls(task.length, task.needles, task.queries, task.digits, samples, task.data_seed, depths)

    def prompts(self, depth: float, tokenizer: PreTrainedTokenizerBase) -> list[NeedlePrompt]:
        """The prompts with the answer at `depth`."""
        settings = NeedleSettings(
            self.length, depth, self.needles, self.queries, self.digits, self.samples, data_seed=self.seed
        )
        return make_prompts(settings, tokens_of(tokenizer))


@dataclass(frozen=True)
class AttentionShares:
    """Where maps attend: means over the heads and over the tokens that predict the answer.

    Shares are fractions of a row's magnitude, |a| / Σ|a|. For signal and noise maps this is the attention itself; for
    difference maps it is what can be compared with it.

    Attributes:
        answer: Share on the sentences that hold the answer.
        noise_context: Share on the other sentences of the context.
        first_token: Share on the first token of the text, the attention sink, which the first two exclude.
        entropy: Entropy of the shares, in nats.
    """

    answer: float
    noise_context: float
    first_token: float
    entropy: float


@dataclass(frozen=True)
class DiagnosticsReport:
    """Attention on retrieval prompts.

    Attributes:
        settings: Settings of the prompts.
        tokens: Mean length of a prompt.
        by_layer: Means over the depths for each layer, by kind of map: "signal"; "noise" and "difference" for a GDA
            model; "baseline" for the baseline's maps, its difference maps if it is a GDA model.
        by_depth: Means over the layers for each depth, by kind of map.
        lambdas: λ of each layer, the mean over heads and rows; None for a layer without noise heads.
    """

    settings: PromptSettings
    tokens: float
    by_layer: dict[str, list[AttentionShares]]
    by_depth: dict[str, list[AttentionShares]]
    lambdas: list[float | None]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        found = asdict(self)
        return {**found.pop("settings"), "depths": list(map(float, self.settings.depths)), **found}

    def to_markdown(self) -> str:
        """Both tables in Markdown."""
        return "\n\n".join(table.to_markdown() for table in self.tables())

    def tables(self) -> list[TextTable]:
        """A table by depth and one by layer."""
        depth_rows = [
            [kind, *(f"{cell.answer:.3f} / {cell.noise_context:.3f}" for cell in [*cells, _mean(cells)])]
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


def _mean(cells: Sequence[AttentionShares]) -> AttentionShares:
    columns = zip(*(astuple(cell) for cell in cells), strict=True)
    return AttentionShares(*(sum(column) / len(cells) for column in columns))


def _cell(layers: Sequence[AttentionShares], layer: int) -> str:
    if layer >= len(layers):  # model and baseline may differ in depth
        return ""
    cell = layers[layer]
    return f"{cell.answer:.3f} / {cell.noise_context:.3f} / {cell.first_token:.3f} / {cell.entropy:.2f}"


def diagnose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: PromptSettings | None = None,
    *,
    baseline: PreTrainedModel | None = None,
    console: Console | None = None,
) -> DiagnosticsReport:
    """Measure where a model attends while it answers the prompts of the retrieval task (see `eval/tasks/README.md`).

    The model reads each prompt with its answer, and the rows that predict the answer count. Earlier rows are computed
    by the model's own attention backend and cost no maps.

    Args:
        model: A GDA model, or one like Llama.
        tokenizer: Tokenizer of the model and the baseline.
        settings: Settings of the prompts. Default: those of the task `gda_needles`.
        baseline: Another model to compare with, such as the source of a conversion.
        console: Where progress is shown. Default: nowhere.

    Raises:
        ValueError: if a setting is out of range, the length is too short for the needles or too long for a model, the
            tokenizer cannot locate its tokens in the text, or a model's attention cannot be read.
    """
    settings = settings or PromptSettings()
    if not settings.depths:
        raise ValueError("depths is empty; name at least one")
    texts = [
        _Text.of(prompt, tokenizer, index)
        for index, depth in enumerate(settings.depths)
        for prompt in settings.prompts(depth, tokenizer)
    ]
    readings = [_Reading(each, len(settings.depths)) for each in (model, baseline) if each is not None]
    for reading in readings:
        reading.check(texts)
    for text in track(texts, "diagnosing", console=console, disable=not shows_progress(console)):
        for reading in readings:
            reading.add(text)
    means = readings[0].means()
    if baseline is not None:
        baseline_means = readings[1].means()
        means["baseline"] = baseline_means.get("difference", baseline_means["signal"])
    return DiagnosticsReport(
        settings=settings,
        tokens=sum(text.first_row + 1 for text in texts) / len(texts),
        by_layer={kind: [AttentionShares(*row) for row in cells.mean(0).tolist()] for kind, cells in means.items()},
        by_depth={kind: [AttentionShares(*row) for row in cells.mean(1).tolist()] for kind, cells in means.items()},
        lambdas=readings[0].lambdas(),
    )


@dataclass(frozen=True)
class _Text:
    """A prompt with its answer in tokens.

    Attributes:
        ids: (T,).
        first_row: The row that predicts the first token of the answer.
        answer, context: Masks (T,) of the tokens of `AttentionShares.answer` and `.noise_context`.
        depth_index: Index of its depth.
    """

    ids: torch.Tensor
    first_row: int
    answer: torch.Tensor
    context: torch.Tensor
    depth_index: int

    @classmethod
    def of(cls, prompt: NeedlePrompt, tokenizer: PreTrainedTokenizerBase, depth_index: int) -> "_Text":
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
        return cls(ids[:length], first_row, answer[:length], context[:length], depth_index)


class _Reading:
    """Sums over the prompts for one model, by kind of map, depth and layer."""

    def __init__(self, model: PreTrainedModel, num_depths: int):
        self.model = model
        self.num_layers = len(attention_modules(model))
        self.sums: dict[str, torch.Tensor] = {}
        self.counts = torch.zeros(num_depths)
        self.lambda_sums: list[float | None] = [None] * self.num_layers

    def check(self, texts: Sequence[_Text]) -> None:
        name, config = type(self.model).__name__, self.model.config
        longest, limit = max(len(text.ids) for text in texts), config.max_position_embeddings
        if longest > limit:
            raise ValueError(
                f"a prompt with its answer has {longest} tokens, and {name} reads {limit}; choose a smaller length"
            )
        highest = max(int(text.ids.max()) for text in texts)
        if highest >= config.vocab_size:
            raise ValueError(
                f"{name} has a vocabulary of {config.vocab_size} tokens, and a prompt holds the token id {highest}; "
                "model and baseline must share one tokenizer"
            )

    def add(self, text: _Text) -> None:
        visit_attention(self.model, text.ids, lambda maps: self._add_layer(maps, text), first_row=text.first_row)
        self.counts[text.depth_index] += 1

    def _add_layer(self, maps: LayerAttention, text: _Text) -> None:
        self._add("signal", maps.signal, maps.layer, text)
        if maps.noise is not None and maps.lambda_ is not None:
            self._add("noise", maps.noise, maps.layer, text)
            self._add("difference", maps.difference, maps.layer, text)
            before = self.lambda_sums[maps.layer] or 0.0
            self.lambda_sums[maps.layer] = before + maps.lambda_.mean().item()

    def _add(self, kind: str, maps: torch.Tensor, layer: int, text: _Text) -> None:
        shares = row_shares(maps).cpu()  # (H, Q, T)
        measured = (
            shares[..., text.answer].sum(dim=-1),
            shares[..., text.context].sum(dim=-1),
            shares[..., 0],
            row_entropy(shares),
        )
        sums = self.sums.setdefault(kind, torch.zeros(len(self.counts), self.num_layers, len(measured)))
        sums[text.depth_index, layer] += torch.stack([values.mean() for values in measured])

    def means(self) -> dict[str, torch.Tensor]:
        """(depths, layers, measures) by kind of map."""
        return {kind: sums / self.counts[:, None, None] for kind, sums in self.sums.items()}

    def lambdas(self) -> list[float | None]:
        texts = self.counts.sum().item()
        return [None if total is None else total / texts for total in self.lambda_sums]
