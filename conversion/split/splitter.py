"""Splitting the heads of a source: closed form, training on the source's predictions, and measuring the loss."""

import copy
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gda._version import __version__
from gda.common.perplexity import mean_perplexity, ratio_interval
from gda.common.progress import logger
from gda.common.screen import progress_bars, shows_progress
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.sources.source import Source
from gda.conversion.sources.tokenizers import NoTokenizerError
from gda.conversion.split.calibration import DEFAULT_TOKENS, read_calibration
from gda.conversion.split.distill import ATTENTION, BATCH, Distillation, Plan
from gda.conversion.split.fit import fit_layers, last_states
from gda.conversion.split.heads import Split
from gda.conversion.split.measure import Measurements, losses, measure
from gda.conversion.split.recipes import LAMBDAS, split_recipes
from gda.conversion.split.work import Work
from gda.conversion.tensors.layerwise import LayerwiseModel, layer_prefix, memory_to_use
from gda.conversion.tensors.recipes import Recipe

# Training steps after the closed form.
EFFORTS = {"fast": 0, "default": 80, "best": 320}
# Measured cost of fitting a layer to a batch, and of a training step, in forward passes of that batch.
FITTING_COST, TRAINING_COST = 1.3, 3.0

T = TypeVar("T")


@dataclass(frozen=True)
class SplitLayer:
    """The split of one layer."""

    signal_heads: list[int]  # indices of the source's heads, in the order of the result
    noise_heads: list[int]
    lambda_: float  # λ of the result; a token-dependent λ is averaged over the held-out text
    error_before: float  # |y − y'|² / |y|² of the attention's output, with the source's output projection
    error_after: float  # the same with the output projection that fits best
    subtracted: float  # |W (λ o_noise)|² / |W (o − λ o_noise)|² of the result: energy of the subtracted part


@dataclass(frozen=True)
class SplitReport:
    """How heads were split, and what it cost.

    Attributes:
        calibration: Name of the calibration text.
        sha256: SHA-256 of the text.
        tokens: Number of tokens fitted to.
        held_out_tokens: Number of tokens not fitted to, on which perplexities are measured.
        effort: "fast", "default" or "best".
        steps: Number of training steps.
        perplexity_source: Perplexity of the source.
        perplexity_closed_form: Perplexity after the closed form.
        perplexity: Perplexity of the result.
        ratio_interval: 95 % confidence interval of `perplexity` / `perplexity_source`; None for a single sequence.
        layers: The split of each layer.
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
    ratio_interval: tuple[float, float] | None
    layers: list[SplitLayer]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)


class Splitter:
    """Splits the heads of every layer of a source, and fits the remaining attention to the source's.

    Memory holds one layer and its moments; activations and trained weights are files in the work folder. A resumed run
    continues from there. `config` is from `split_config`; the other arguments are options of `gda convert`.

    Raises:
        FileNotFoundError, ValueError: for a text that cannot be read or is too short, and for an unknown effort.
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
        try:
            tokenizer = source.tokenizer()
        except NoTokenizerError as error:
            raise ValueError(f"--mode split reads text, but {error}; --mode expand needs no tokenizer") from None
        self.calibration = read_calibration(
            calibration,
            tokenizer,
            tokens=DEFAULT_TOKENS if tokens is None else tokens,
            longest=config.max_position_embeddings,
            vocab_size=config.vocab_size,
        )
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def settings(self) -> dict[str, Any]:
        """The settings that the result depends on, as JSON-ready values."""
        return {"effort": self.effort, **self.calibration.to_dict()}

    def expected(self, minutes: float | None = None) -> str:
        """How long `run` takes on this machine, as a sentence; `minutes` are the estimate, if it is known."""
        minutes = max(1, round(self.minutes() if minutes is None else minutes))
        return f"--effort {self.effort} takes about {minutes} minute{'s' * (minutes > 1)} on this machine"

    @torch.no_grad()
    def minutes(self) -> float:
        """Estimated minutes of `run`, from the time that one layer takes on this machine."""
        model = LayerwiseModel(self.source.config, self.source.read, self.device)
        tensors, states = model.tensors(0), model.embed(self.calibration.sequences[:BATCH])
        for _ in range(2):  # the first run warms up
            begun = time.perf_counter()
            model.run(0, tensors, states)[..., 0].sum().item()
            forward = time.perf_counter() - begun
        head = model.config.vocab_size * model.config.hidden_size / sum(each.numel() for each in tensors.values())
        batches = math.ceil((len(self.calibration.sequences) + len(self.calibration.held_out)) / BATCH)
        fitting = FITTING_COST * batches * model.num_layers
        training = TRAINING_COST * self.steps * (model.num_layers + head)
        return (fitting + training) * forward / 60

    def run(
        self, folder: Path, *, dtype: torch.dtype | None, console: Console | None
    ) -> tuple[GDAConfig, dict[str, Recipe], SplitReport]:
        """Split the source, or continue an interrupted split.

        Keep `folder`, which holds working files, until the recipes of the result have been used. A `dtype` of None
        keeps the source's.

        Raises:
            ValueError: if `folder` has work with another source, text or setting, or the source gives values that are
                not finite.
            OSError: if the disk has no space for the work.
        """
        self.work = Work(folder, self._fingerprint())
        self.read = _Cache(self.source)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = progress_bars(console, TextColumn("{task.description}"), *columns)
        if (minutes := self.minutes()) > 1:  # shorter runs need no announcement
            if console is not None and shows_progress(console):
                console.print(self.expected(minutes), highlight=False)
            else:
                logger.info(self.expected(minutes))
        teacher = LayerwiseModel(self.source.config, self.read, self.device)
        sequences = torch.cat([self.calibration.sequences, self.calibration.held_out])
        with self.progress:
            splits = self._fit(teacher, sequences)
            if self.config.lambda_type == "reparameterized":
                self.config.lambda_init = [split.lambda_ for split in splits]
            student = LayerwiseModel(self.config, self.read, self.device)
            states = last_states(teacher, sequences, self.work)
            held_out = self.calibration.held_out
            of_source = losses(teacher, held_out, states[-len(held_out) :])
            if not math.isfinite(mean_perplexity(of_source)):
                raise ValueError("the last norm or the head of the source gives values that are not finite")
            initial = self._recipes(splits, None, torch.float32)
            closed_form = measure(student, lambda layer: self._closed_form(student, initial, layer), held_out)
            trained = self._train(student, initial, states) if self.steps else None
            result = closed_form if trained is None else measure(student, trained.tensors, held_out)
        report = SplitReport(
            calibration=self.calibration.name,
            sha256=self.calibration.sha256,
            tokens=self.calibration.sequences.numel(),
            held_out_tokens=self.calibration.held_out.numel(),
            effort=self.effort,
            steps=self.steps,
            perplexity_source=mean_perplexity(of_source),
            perplexity_closed_form=closed_form.perplexity,
            perplexity=result.perplexity,
            ratio_interval=ratio_interval(result.losses, of_source),
            layers=self._layers(splits, result),
        )
        return self.config, self._recipes(splits, trained, dtype), report

    def _fit(self, teacher: LayerwiseModel, sequences: torch.Tensor) -> list[Split]:
        fits = fit_layers(
            teacher,
            self.config,
            sequences,
            fitted=len(self.calibration.sequences),
            lambdas=LAMBDAS[self.config.lambda_type],
            work=self.work,
        )
        return list(self._with_progress("splitting heads, layer", fits, teacher.num_layers))

    def _train(self, student: LayerwiseModel, initial: dict[str, Recipe], states: torch.Tensor) -> Distillation:
        distillation = Distillation(student, lambda layer: self._attention(initial, layer), self.work)
        plan = Plan(self.steps, self.seed, mixed_precision=_multiplies_bfloat16(self.device))
        losses = distillation.train(plan, self.calibration.sequences, states)
        for loss in self._with_progress("training, step", losses, self.steps, distillation.step):
            if not math.isfinite(loss):
                raise ValueError("the training loss is not finite; does the source hold NaN or infinity?")
        return distillation

    def _closed_form(self, student: LayerwiseModel, initial: dict[str, Recipe], layer: int) -> dict[str, torch.Tensor]:
        """All tensors of a layer before training."""
        frozen = student.tensors(layer, without=ATTENTION)
        return frozen | {name: each.to(self.device) for name, each in self._attention(initial, layer).items()}

    def _attention(self, initial: dict[str, Recipe], layer: int) -> dict[str, torch.Tensor]:
        """The tensors of a layer's attention before training, in float32."""
        prefix = layer_prefix(layer)
        names = [name for name in initial if name.startswith(prefix + ATTENTION)]
        return {name.removeprefix(prefix): initial[name](self.read) for name in names}

    def _recipes(
        self, splits: list[Split], trained: Distillation | None, dtype: torch.dtype | None
    ) -> dict[str, Recipe]:
        return split_recipes(
            self.config,
            self.source.specs,
            splits,
            trained=None if trained is None else lambda layer, name: trained.weights[layer][name],
            seed=self.seed,
            dtype=dtype,
        )

    def _layers(self, splits: list[Split], result: Measurements) -> list[SplitLayer]:
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
                )
            )
        return layers

    def _fingerprint(self) -> dict[str, Any]:
        """What a resumed run must have in common with the interrupted one."""
        config = self.config
        return {
            "versions": [__version__, torch.__version__],
            "source": [self.source.name, self.source.revision, [list(each) for each in self.source.file_stamps()]],
            "heads": [config.num_attention_heads, config.num_noise_heads, config.num_key_value_heads],
            "lambda_type": config.lambda_type,
            "seed": self.seed,
            **self.settings(),
        }

    def _with_progress(self, what: str, work: Iterable[T], total: int, done: int = 0) -> Iterator[T]:
        task = self.progress.add_task(what, total=total, completed=done)
        for each in work:
            self.progress.advance(task)
            yield each


class _Cache:
    """Reads tensors of a source, and keeps them in memory as long as they fit into a share of it.

    Training reads every layer in every step, and some sources have to dequantize what they read.
    """

    def __init__(self, source: Source):
        self._source = source
        self._kept: dict[str, torch.Tensor] = {}
        self._unused = memory_to_use()

    def __call__(self, name: str) -> torch.Tensor:
        if name in self._kept:
            return self._kept[name]
        tensor = self._source.read(name)
        if (size := 4 * tensor.numel()) <= self._unused:
            self._unused -= size
            self._kept[name] = tensor = tensor.float()
        return tensor


def _multiplies_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
