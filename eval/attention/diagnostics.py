"""Where a model looks when it is asked for a fact in a long context.

The Differential Transformer's paper (arXiv 2410.05258, "Key Information Retrieval") compares how much attention goes to
the answer and how much to the rest of the context, the noise. Here this is read off the retrieval task's prompts, for
the signal maps, the noise maps, and their difference, beside the maps of a baseline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gda.common.screen import shows_progress
from gda.eval.attention.analysis import LayerAttention, attention_modules, row_entropy, row_shares, visit_attention
from gda.eval.tasks.needles import DEPTHS, NeedlePrompt, NeedleSettings, make_prompts
from gda.eval.tasks.settings import read_settings, tokens_of

DEFAULTS = NeedleSettings(
    length=512, depth="all", needles=6, queries=1, digits=7, samples=20, data_seed=0
)  # gda_needles


@dataclass(frozen=True)
class AttentionShares:
    """Where maps look, the mean over heads and over the tokens that predict the answer.

    Shares are of a row's magnitude, |a| / Σ|a|: of maps whose rows sum to 1 the attention itself, and of differences
    what is comparable with it.

    Attributes:
        answer: Share on the sentences that hold the answer.
        noise_context: Share on the context's other sentences.
        first_token: Share on the text's first token, the attention sink, which neither of the two counts.
        entropy: Of the shares, in nats.
    """

    answer: float
    noise_context: float
    first_token: float
    entropy: float


@dataclass(frozen=True)
class DiagnosticsReport:
    """Attention on retrieval prompts.

    `by_layer` and `by_depth` go by kind of map: "signal" and, of a GDA model, "noise" and "difference"; "baseline" is
    what the baseline attends by, its difference if it is a GDA model.

    Attributes:
        length, needles, queries, digits, samples, seed: Settings of the prompts; `samples` is their number for each
            depth.
        tokens: Mean length of a prompt.
        depths: Where the answers lie in the context, from 0 to 1.
        by_layer: The mean over depths, for each layer.
        by_depth: The mean over layers, for each depth.
        lambdas: λ of each layer, the mean over heads and over the rows read; None in a layer without noise heads.
    """

    length: int
    needles: int
    queries: int
    digits: int
    samples: int
    seed: int
    tokens: float
    depths: list[float]
    by_layer: dict[str, list[AttentionShares]]
    by_depth: dict[str, list[AttentionShares]]
    lambdas: list[float | None]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Both tables, in Markdown."""
        return "\n".join(
            f"{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}\n"
            + "".join(f"| {' | '.join(row)} |\n" for row in rows)
            for title, header, rows in self._contents()
        )

    def tables(self) -> list[Table]:
        """Both tables, for a terminal."""
        tables = []
        for title, header, rows in self._contents():
            table = Table(*header, title=title)
            for row in rows:
                table.add_row(*row)
            tables.append(table)
        return tables

    def _contents(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, header and rows of each table."""
        depth_rows = [
            [kind, *(f"{cell.answer:.3f} / {cell.noise_context:.3f}" for cell in [*cells, _mean(cells)])]
            for kind, cells in self.by_depth.items()
        ]
        layer_rows = [
            [str(layer), self._show_lambda(layer), *(_show(cells, layer) for cells in self.by_layer.values())]
            for layer in range(max(map(len, self.by_layer.values())))
        ]
        return [
            (
                f"Attention on the answer / on the noise context, by depth ({self.tokens:.0f} tokens)",
                ["maps", *(f"{100 * depth:.0f} %" for depth in self.depths), "mean"],
                depth_rows,
            ),
            (
                "Answer / noise context / first token / entropy, by layer",
                ["layer", "λ", *self.by_layer],
                layer_rows,
            ),
        ]

    def _show_lambda(self, layer: int) -> str:
        lambda_ = self.lambdas[layer] if layer < len(self.lambdas) else None
        return "" if lambda_ is None else f"{round(lambda_, 4) + 0.0:.4f}"  # no −0.0000


def prompts_by_metadata(metadata: Mapping[str, Any], *, alone: bool = False) -> dict[str, Any]:
    """Arguments of `diagnose` by the settings of the retrieval tasks, whose `samples` are shared out among the depths.

    Args:
        metadata: What ``--metadata`` says; settings that it leaves out are those of `gda_needles`.
        alone: Whether no task reads it, so that every name must be a setting of these prompts.

    Raises:
        ValueError: for a name that is no setting, or a value out of range.
    """
    names = [field.name for field in fields(DEFAULTS)]
    unknown = [name for name in metadata if name == "seed" or (alone and name not in names)]
    settings = read_settings(NeedleSettings, {**asdict(DEFAULTS), **metadata})
    if unknown:
        raise ValueError(f"metadata: --diagnostics has no setting `{unknown[0]}`; it has {', '.join(names)}")
    depths = DEPTHS if settings.depth == "all" else (float(settings.depth),)
    return {
        "length": settings.length,
        "needles": settings.needles,
        "queries": settings.queries,
        "digits": settings.digits,
        "depths": depths,
        "samples": -(-settings.samples // len(depths)),
        "seed": settings.data_seed,
    }


def diagnose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    baseline: PreTrainedModel | None = None,
    length: int = DEFAULTS.length,
    needles: int = DEFAULTS.needles,
    queries: int = DEFAULTS.queries,
    digits: int = DEFAULTS.digits,
    depths: Sequence[float] = DEPTHS,
    samples: int = DEFAULTS.samples // len(DEPTHS),
    seed: int = DEFAULTS.data_seed,
    console: Console | None = None,
) -> DiagnosticsReport:
    """Measure where a model looks while it answers the retrieval task's prompts (see `eval/tasks/README.md`).

    The answer is given, and the rows that predict its tokens are read; the prompt before them is read by the model's
    own attention backend and costs no maps.

    Args:
        model: A GDA model, or one like Llama.
        tokenizer: The model's, and the baseline's.
        baseline: Another model to set beside it, as a rule the Llama that it was made of.
        length: Tokens of a prompt, at most.
        needles: Sentences with a magic number in a prompt.
        queries: How many of them are asked for.
        digits: Of a magic number.
        depths: Where they lie in the context, from 0 to 1.
        samples: Prompts for each depth; the same ones, but for their order.
        seed: Decides the prompts, as `data_seed` decides the task's.
        console: Where progress is shown; nowhere if None.

    Raises:
        ValueError: if a setting is out of range, the length does not hold the needles or exceeds the model's, the
            tokenizer cannot tell where its tokens stand in the text, or a model's attention cannot be read.
    """
    if not depths:
        raise ValueError("depths is empty; name one at least")
    texts: list[_Text] = []
    for index, depth in enumerate(depths):
        settings = NeedleSettings(length, depth, needles, queries, digits, samples, data_seed=seed)
        texts += [_Text.of(prompt, tokenizer, index) for prompt in make_prompts(settings, tokens_of(tokenizer))]
    readings = [_Reading(one, len(depths)) for one in (model, baseline) if one is not None]
    for reading in readings:
        reading.check(texts)
    for text in track(texts, "diagnosing", console=console, disable=not shows_progress(console)):
        for reading in readings:
            reading.add(text)
    means = readings[0].means()
    if baseline is not None:
        of_baseline = readings[1].means()
        means["baseline"] = of_baseline.get("difference", of_baseline["signal"])
    return DiagnosticsReport(
        length=length,
        needles=needles,
        queries=queries,
        digits=digits,
        samples=samples,
        seed=seed,
        tokens=sum(text.first_row + 1 for text in texts) / len(texts),
        depths=[float(depth) for depth in depths],
        by_layer={kind: [AttentionShares(*row) for row in cells.mean(0).tolist()] for kind, cells in means.items()},
        by_depth={kind: [AttentionShares(*row) for row in cells.mean(1).tolist()] for kind, cells in means.items()},
        lambdas=readings[0].lambdas(),
    )


@dataclass(frozen=True)
class _Text:
    """A prompt with its answer in tokens.

    Attributes:
        ids: (T,).
        first_row: The row that predicts the answer's first token.
        answer, context: Masks (T,) of the tokens of `AttentionShares.answer` and `.noise_context`.
        depth_index: Which of the depths it belongs to.
    """

    ids: torch.Tensor
    first_row: int
    answer: torch.Tensor
    context: torch.Tensor
    depth_index: int

    @classmethod
    def of(cls, prompt: NeedlePrompt, tokenizer: PreTrainedTokenizerBase, depth_index: int) -> "_Text":
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} cannot tell where its tokens stand in the text; give a fast tokenizer"
            )
        encoded = tokenizer(prompt.text + prompt.target, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]

        def overlapping(start: int, end: int) -> torch.Tensor:
            return torch.tensor([first < min(last, end) and last > start for first, last in offsets])

        answer = overlapping(prompt.answer_start, prompt.answer_end)
        context = overlapping(0, len(prompt.context)) & ~answer
        answer[0] = context[0] = False
        target = overlapping(len(prompt.text), len(prompt.text + prompt.target)).nonzero().flatten().tolist()
        # The last token predicts what comes after the answer: its row is left out, and with it the token.
        length, first_row = target[-1], target[0] - 1
        ids = torch.tensor(encoded["input_ids"])
        return cls(ids[:length], first_row, answer[:length], context[:length], depth_index)


class _Reading:
    """What is read of one model: sums over prompts, by kind of map, depth and layer."""

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
                f"a prompt with its answer takes {longest} tokens, and {name} reads {limit}; give a smaller length"
            )
        highest = max(int(text.ids.max()) for text in texts)
        if highest >= config.vocab_size:
            raise ValueError(
                f"{name} has a vocabulary of {config.vocab_size} tokens, and a prompt holds the token id {highest}; "
                "model and baseline must have one tokenizer"
            )

    def add(self, text: _Text) -> None:
        visit_attention(self.model, text.ids, lambda maps: self._visit(maps, text), first_row=text.first_row)
        self.counts[text.depth_index] += 1

    def _visit(self, maps: LayerAttention, text: _Text) -> None:
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
        """(depths, layers, measures) by kind."""
        return {kind: sums / self.counts[:, None, None] for kind, sums in self.sums.items()}

    def lambdas(self) -> list[float | None]:
        texts = self.counts.sum().item()
        return [None if total is None else total / texts for total in self.lambda_sums]


def _mean(cells: Sequence[AttentionShares]) -> AttentionShares:
    columns = zip(*(astuple(cell) for cell in cells), strict=True)
    return AttentionShares(*(sum(column) / len(cells) for column in columns))


def _show(layers: Sequence[AttentionShares], layer: int) -> str:
    if layer >= len(layers):  # the baseline may be deeper, or less deep
        return ""
    cell = layers[layer]
    return f"{cell.answer:.3f} / {cell.noise_context:.3f} / {cell.first_token:.3f} / {cell.entropy:.2f}"
