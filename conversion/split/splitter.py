"""Dividing the heads of a Llama: closed form, training on the source's predictions, and what it cost."""

import copy
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gda._version import __version__
from gda.common.screen import shows_progress
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.sources.source import Source
from gda.conversion.split.calibration import DEFAULT_TOKENS, read_calibration
from gda.conversion.split.distill import ATTENTION, BATCH, Distillation, Plan
from gda.conversion.split.fit import fit_layers, last_states, merged_tensor, merges
from gda.conversion.split.heads import Split
from gda.conversion.split.measure import Measured, measure, perplexity
from gda.conversion.split.merge import Merge
from gda.conversion.split.recipes import LAMBDAS, split_recipes
from gda.conversion.split.work import Work
from gda.conversion.tensors.layerwise import LayerwiseModel, layer_prefix, memory_to_use
from gda.conversion.tensors.recipes import Recipe

# Steps of training after the closed form.
EFFORTS = {"fast": 0, "default": 80, "best": 320}
# What it takes to divide the heads of a layer, and to train it for a step, in forward passes of a batch: as measured.
DIVIDING, TRAINING = 1.3, 3.0

T = TypeVar("T")


@dataclass(frozen=True)
class SplitLayer:
    """What became of the heads of a layer.

    Attributes:
        signal_heads, noise_heads: The source's heads that became them, in the order of the result.
        lambda_: λ of the result; where it depends on the token, its mean over the held-out text.
        error_before: |y − y'|² / |y|² of the attention's output, with the source's output projection.
        error_after: The same with the output projection that fits best.
        subtracted: Of the result, |W (λ o_noise)|² / |W (o − λ o_noise)|²: what the subtraction contributes.
        merge: How KV heads were merged before, and what that lost; None if they were not.
    """

    signal_heads: list[int]
    noise_heads: list[int]
    lambda_: float
    error_before: float
    error_after: float
    subtracted: float
    merge: Merge | None = None


@dataclass(frozen=True)
class SplitReport:
    """How heads were divided, and what it cost.

    Attributes:
        calibration: Name of the text.
        sha256: Of the text.
        tokens: That were fitted to.
        held_out_tokens: That were not, and that perplexities are of.
        effort: "fast", "default" or "best".
        steps: Of training.
        perplexity_source: Of the source.
        perplexity_closed_form: After the closed form.
        perplexity: Of the result.
        layers: What became of each layer.
    """

    calibration: str
    sha256: str
    tokens: int
    held_out_tokens: int
    effort: str
    steps: int
    perplexity_source: float
    perplexity_closed_form: float
    perplexity: float
    layers: list[SplitLayer]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class Divided:
    """A split that is done: the configuration, how each tensor is made, and the report."""

    config: GDAConfig
    recipes: dict[str, Recipe]
    report: SplitReport


class Splitter:
    """Divides the heads of every layer of a source, and fits what is left to that.

    Memory is that of a layer and its moments; activations and weights in training are files in `folder`. What is done
    there already is not done again.

    Args:
        source: The source.
        config: From `split_config`.
        calibration: A text file, or `.jsonl` with a field `text`; None for the documentation of Python.
        tokens: Of it to read, at most; None for `DEFAULT_TOKENS`.
        effort: One of `EFFORTS`; None for "default".
        seed: Of the λ vectors, and of the order of training.

    Raises:
        FileNotFoundError, ValueError: for a text that cannot be read or is too short, and for another effort.
    """

    def __init__(
        self,
        source: Source,
        config: GDAConfig,
        *,
        calibration: str | Path | None,
        tokens: int | None,
        effort: str | None,
        seed: int,
    ):
        self.effort = "default" if effort is None else effort
        if self.effort not in EFFORTS:
            raise ValueError(f"--effort {effort} is not one of {', '.join(EFFORTS)}")
        self.steps, self.seed = EFFORTS[self.effort], seed
        self.source = source
        self.config = copy.deepcopy(config)
        self.calibration = read_calibration(
            calibration,
            source.tokenizer(),
            tokens=DEFAULT_TOKENS if tokens is None else tokens,
            longest=config.max_position_embeddings,
            vocab_size=config.vocab_size,
        )
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def settings(self) -> dict[str, Any]:
        """What the result depends on, as JSON-ready values."""
        merge_kv = self.config.num_key_value_heads if merges(self.source.config, self.config) else None
        return {"effort": self.effort, "merge_kv": merge_kv, **self.calibration.to_dict()}

    def expected(self) -> str:
        """How long `run` will take on this machine, in words."""
        minutes = max(1, round(self.minutes()))
        return f"--effort {self.effort} takes about {minutes} minute{'s' * (minutes > 1)} on this machine"

    @torch.no_grad()
    def minutes(self) -> float:
        """About how long `run` will take, by the time that one layer takes on this machine."""
        model = LayerwiseModel(self.source.config, self.source.read, self.device)
        tensors, states = model.tensors(0), model.embed(self.calibration.windows[:BATCH])
        for _ in range(2):  # the first warms up
            begun = time.perf_counter()
            model.run(0, tensors, states)[..., 0].sum().item()
            forward = time.perf_counter() - begun
        head = model.config.vocab_size * model.config.hidden_size / sum(each.numel() for each in tensors.values())
        batches = math.ceil((len(self.calibration.windows) + len(self.calibration.held_out)) / BATCH)
        dividing = DIVIDING * batches * model.num_layers
        training = TRAINING * self.steps * (model.num_layers + head)
        return (dividing + training) * forward / 60

    def run(self, folder: Path, *, dtype: torch.dtype | None, console: Console | None) -> Divided:
        """Do what is left to do.

        Args:
            folder: A place for work; it must stay until the recipes have been used.
            dtype: Of the result; None to keep the source's.
            console: Where progress is shown; nowhere if None.

        Raises:
            ValueError: if `folder` has work of another source, text or setting, or the source gives values that are
                not finite.
            OSError: if there is no room for the work.
        """
        self.work = Work(folder, self._fingerprint())
        self.read = _Cache(self.source)
        self.progress = _progress(console)
        if console is not None and shows_progress(console):
            console.print(self.expected(), highlight=False)
        teacher = LayerwiseModel(self.source.config, self.read, self.device)
        windows = torch.cat([self.calibration.windows, self.calibration.held_out])
        with self.progress:
            splits = self._divide(teacher, windows)
            if self.config.lambda_type == "reparameterized":
                self.config.lambda_init = [split.lambda_ for split in splits]
            student = LayerwiseModel(self.config, self.read, self.device)
            states = last_states(teacher, windows, self.work)
            held_out = self.calibration.held_out
            of_source = perplexity(teacher, held_out, states[-len(held_out) :])
            if not math.isfinite(of_source):
                raise ValueError("the last norm or the head of the source gives values that are not finite")
            begun = self._recipes(splits, None, torch.float32)
            closed_form = measure(student, lambda layer: self._closed_form(student, begun, layer), held_out)
            trained = self._train(student, begun, states) if self.steps else None
            result = closed_form if trained is None else measure(student, trained.tensors, held_out)
        report = SplitReport(
            calibration=self.calibration.name,
            sha256=self.calibration.sha256,
            tokens=self.calibration.windows.numel(),
            held_out_tokens=self.calibration.held_out.numel(),
            effort=self.effort,
            steps=self.steps,
            perplexity_source=of_source,
            perplexity_closed_form=closed_form.perplexity,
            perplexity=result.perplexity,
            layers=self._layers(splits, result),
        )
        return Divided(self.config, self._recipes(splits, trained, dtype), report)

    def _divide(self, teacher: LayerwiseModel, windows: torch.Tensor) -> list[Split]:
        what = "merging KV heads and dividing heads" if merges(teacher.config, self.config) else "dividing heads"
        fits = fit_layers(
            teacher,
            self.config,
            windows,
            fitted=len(self.calibration.windows),
            lambdas=LAMBDAS[self.config.lambda_type],
            work=self.work,
        )
        return list(self._watched(f"{what}, layer", fits, teacher.num_layers))

    def _train(self, student: LayerwiseModel, begun: dict[str, Recipe], states: torch.Tensor) -> Distillation:
        distillation = Distillation(student, lambda layer: self._attention(begun, layer), self.work)
        plan = Plan(self.steps, self.seed, mixed_precision=_multiplies_bfloat16(self.device))
        losses = distillation.train(plan, self.calibration.windows, states)
        for loss in self._watched("training, step", losses, self.steps, distillation.step):
            if not math.isfinite(loss):
                raise ValueError("training gave a loss that is not finite; does the source hold NaN or infinity?")
        return distillation

    def _closed_form(self, student: LayerwiseModel, begun: dict[str, Recipe], layer: int) -> dict[str, torch.Tensor]:
        """All tensors of a layer before training."""
        frozen = student.tensors(layer, without=ATTENTION)
        return frozen | {name: each.to(self.device) for name, each in self._attention(begun, layer).items()}

    def _attention(self, begun: dict[str, Recipe], layer: int) -> dict[str, torch.Tensor]:
        """The tensors of a layer's attention before training, in float32."""
        prefix = layer_prefix(layer)
        names = [name for name in begun if name.startswith(prefix + ATTENTION)]
        return {name.removeprefix(prefix): begun[name](self.read) for name in names}

    def _recipes(
        self, splits: list[Split], trained: Distillation | None, dtype: torch.dtype | None
    ) -> dict[str, Recipe]:
        return split_recipes(
            self.config,
            self.source.specs,
            splits,
            merged=partial(merged_tensor, self.work),
            trained=None if trained is None else lambda layer, name: trained.weights[layer][name],
            seed=self.seed,
            dtype=dtype,
        )

    def _layers(self, splits: list[Split], result: Measured) -> list[SplitLayer]:
        layers = []
        for split, lambda_, subtracted in zip(splits, result.lambda_, result.subtracted, strict=True):
            groups = torch.tensor(split.order).view(self.config.num_noise_heads, -1)
            layers.append(
                SplitLayer(
                    signal_heads=groups[:, :-1].flatten().tolist(),
                    noise_heads=groups[:, -1].tolist(),
                    lambda_=lambda_,
                    error_before=split.error_before,
                    error_after=split.error_after,
                    subtracted=subtracted,
                    merge=split.merge,
                )
            )
        return layers

    def _fingerprint(self) -> dict[str, Any]:
        """What work that is taken up must have in common with what began it."""
        config = self.config
        return {
            "versions": [__version__, torch.__version__],
            "source": [self.source.name, self.source.revision, [list(each) for each in self.source.file_stamps()]],
            "heads": [config.num_attention_heads, config.num_noise_heads, config.num_key_value_heads],
            "lambda_type": config.lambda_type,
            "seed": self.seed,
            **self.settings(),
        }

    def _watched(self, what: str, work: Iterable[T], total: int, done: int = 0) -> Iterator[T]:
        task = self.progress.add_task(what, total=total, completed=done)
        for each in work:
            self.progress.advance(task)
            yield each


class _Cache:
    """Tensors of a source, kept while they fill no more than a part of the memory that is free.

    A layer is read at every step of training, and some sources have to dequantize what is read.
    """

    def __init__(self, source: Source):
        self._source = source
        self._kept: dict[str, torch.Tensor] = {}
        self._room = memory_to_use()

    def __call__(self, name: str) -> torch.Tensor:
        if name in self._kept:
            return self._kept[name]
        tensor = self._source.read(name)
        if (size := 4 * tensor.numel()) <= self._room:
            self._room -= size
            self._kept[name] = tensor = tensor.float()
        return tensor


def _multiplies_bfloat16(device: str) -> bool:
    """Whether bfloat16 is the faster way to multiply."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not shows_progress(console),
        transient=True,
    )
