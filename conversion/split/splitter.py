"""Splitting the heads of a source: closed form, training on the source's predictions, and measuring the loss."""

import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gda._version import __version__
from gda.common.files import stamps
from gda.common.perplexity import SequenceLoss, mean_perplexity, ratio_interval
from gda.common.progress import logger, shows_progress
from gda.common.screen import progress_bars
from gda.configuration.configuration_gda import GDAConfig
from gda.conversion.conversion import with_fields
from gda.conversion.options import SAMPLED, ConvertOptions
from gda.conversion.sources.source import Source
from gda.conversion.sources.tokenizers import NoTokenizerError
from gda.conversion.split.calibration import (
    begin,
    documentation,
    read_calibration,
    sampled_text,
    shares,
    text_beginnings,
)
from gda.conversion.split.cost import Amount, estimated_minutes, work_bytes
from gda.conversion.split.distill import ATTENTION, BATCH, Distillation, Plan, graph_bytes
from gda.conversion.split.fit import FIRST_TOKEN_WEIGHT, fit_layers, last_states
from gda.conversion.split.heads import Split
from gda.conversion.split.measure import Measurements, losses, measure
from gda.conversion.split.recipes import split_recipes
from gda.conversion.split.report import SplitLayer, SplitReport, TextLoss
from gda.conversion.split.rows import EVERY, SHORT, Rows, to_cut, whole
from gda.conversion.split.sampling import AT_ONCE, sampled
from gda.conversion.split.work import Work
from gda.conversion.tensors.layerwise import LayerwiseModel, free_memory, layer_prefix, memory_to_use
from gda.conversion.tensors.recipes import Recipe

# By effort: the default number of tokens, and the training steps, which read each sequence of that many tokens once.
TOKENS = {"fast": 16384, "default": 98304}
EFFORTS = {"fast": 0, "default": 96}


class Splitter:
    """Splits the heads of every layer of a source, and fits the remaining attention to the source's.

    Memory holds one layer and its moments, in training the head as well, and as far as they fit the tensors of the
    source and the activations of a training step; to write text, it holds the whole source. Other activations and
    trained weights are files in the work folder, and a resumed run continues from there. `config` is from
    `split_config`.

    Raises:
        FileNotFoundError, ValueError: for a text that cannot be read or is too short.
    """

    def __init__(self, source: Source, config: GDAConfig, options: ConvertOptions):
        self.effort, self.seed = options.effort or "default", options.seed
        self.steps = EFFORTS[self.effort]
        self.source, self.read, self.config = source, _Cache(source), config
        try:
            tokenizer = source.tokenizer()
        except NoTokenizerError as error:
            raise ValueError(f"--mode split reads text, but {error}; --mode expand needs no tokenizer") from None
        weights, tokens = options.calibration_weights(), options.calibration_tokens
        sampled_weight = weights.pop(SAMPLED)
        self.shares = shares(
            weights,
            sampled=sampled_weight,
            tokens=TOKENS[self.effort] if tokens is None else tokens,
            longest=config.max_position_embeddings,
            beginnings=text_beginnings(tokenizer, config.vocab_size),
        )
        if self.shares.sampled and not options.resume:  # a resumed run may have the text
            self._require_memory()
        self.tokenizer = tokenizer
        self.files = [read_calibration(path, tokenizer, self.shares) for path in self.shares.files]
        self.outside = documentation(tokenizer, self.shares)
        for text in (*self.files, *self.outside):
            if (largest := int(torch.cat([text.sequences, text.held_out]).max())) >= config.vocab_size:
                raise ValueError(
                    f"the tokenizer gives ids up to {largest}, but the model has {config.vocab_size} embeddings"
                )
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.mixed_precision = _multiplies_bfloat16(self.device)
        self.teacher = LayerwiseModel(source.config, self.read, self.device)

    def settings(self) -> dict[str, Any]:
        """The settings that the result depends on, as JSON-ready values."""
        return {
            "effort": self.effort,
            "context": self.shares.context,
            "texts": [text.to_dict() for text in self.files],
            "sampled_sequences": self.shares.sampled,
        }

    def minutes(self) -> float:
        """Estimated minutes of `run`."""
        return estimated_minutes(self.teacher, self.amount)

    def expected(self, minutes: float) -> str:
        """What `run` takes, as a sentence."""
        count, size = max(1, round(minutes)), work_bytes(self.source.config, self.amount) / 1e9
        time = f"{count} minute{'s' * (count > 1)}"
        return f"--effort {self.effort} takes about {time} on this machine, and {size:.1f} GB of disk meanwhile"

    def short_texts(self) -> list[str]:
        """Notes on files that are too short for their share."""
        return [
            f"{text.name} gives {text.sequences.numel():,} of the {wanted * self.shares.context:,} tokens of its share"
            for text, wanted in zip(self.files, self.shares.files.values(), strict=True)
            if len(text.sequences) < wanted
        ]

    @property
    def amount(self) -> Amount:
        """What `run` has to do."""
        written = self.shares.sampled and self.shares.sampled + self.shares.held_out
        read = sum(len(text.sequences) + len(text.held_out) for text in (*self.files, *self.outside))
        return Amount(self.shares.context, written, written + read, self.steps)

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
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = progress_bars(console, TextColumn("{task.description}"), *columns)
        if self.work.is_new and (minutes := self.minutes()) > 1:  # shorter runs need no announcement
            if console is not None and shows_progress(console):
                console.print(self.expected(minutes), highlight=False)
            else:
                logger.info(self.expected(minutes))
        with self.progress:
            written = [sampled_text(self._sampled(), self.shares)] if self.shares.sampled else []
            self.texts = [*self.files, *written, *self.outside]
            rows, held_out = self._rows(), torch.cat([text.held_out for text in self.texts])
            both = Rows(torch.cat([rows.ids, held_out]), torch.cat([rows.is_cut, whole(held_out).is_cut]))
            fits = fit_layers(self.teacher, self.config, both, fitted=len(rows), work=self.work)
            layers = self.teacher.num_layers
            splits = list(self.progress.track(fits, total=layers, description="splitting heads, layer"))
            if self.config.lambda_type == "reparameterized":
                self.config = with_fields(self.config, lambda_init=[split.lambda_ for split in splits])
            student = LayerwiseModel(self.config, self.read, self.device)
            states = last_states(self.teacher, len(both), self.shares.context, self.work)
            of_source = losses(self.teacher, held_out, states[len(rows) :])
            if not math.isfinite(mean_perplexity(of_source)):
                raise ValueError("the last norm or the head of the source gives values that are not finite")
            attention = partial(self._attention, self._recipes(splits, None, torch.float32))
            closed_form = measure(student, lambda layer: student.tensors(layer, attention(layer)), held_out)
            trained = self._train(student, attention, rows, states) if self.steps else None
            result = closed_form if trained is None else measure(student, trained.tensors, held_out)
        self.read.forget()
        report = self._report(splits, of_source, closed_form, result)
        return self.config, self._recipes(splits, trained, dtype), report

    def _require_memory(self) -> None:
        """Raise ValueError unless memory can hold the whole source, which writes text."""
        size = 4 * sum(spec.numel for spec in self.source.specs.values())
        if size > free_memory():
            raise ValueError(
                f"{self.source.name} needs {size / 1e9:.0f} GB of memory to write calibration text; "
                "pass --calibration FILE --calibration sampled:0"
            )

    def _sampled(self) -> torch.Tensor:
        """Token ids that the source has written, (sequences, context); a resumed run reads them from the work."""
        if not self.work.has("sampled"):
            self._require_memory()
            count, context = self.shares.sampled + self.shares.held_out, self.shares.context
            task = self.progress.add_task("sampling text, token", total=count * context)
            model: Any = self.source.load()
            device, dtype = self.device, torch.bfloat16 if self.mixed_precision else torch.float32
            # Weights may take half of the memory; the cache takes a share of the rest.
            if device != "cpu" and dtype.itemsize * model.num_parameters() > free_memory(device) / 2:
                device, dtype = "cpu", torch.bfloat16 if _multiplies_bfloat16("cpu") else torch.float32
                logger.info("the model and its cache may not fit into the GPU, so text is sampled on the CPU")
            ids = sampled(
                model.to(device, dtype),
                self.tokenizer,
                count=count,
                length=context,
                beginnings=self.shares.beginnings,
                seed=self.seed,
                advance=lambda tokens: self.progress.advance(task, tokens),
            )
            self.work.save("sampled", {"ids": ids.tolist()})
        return torch.tensor(self.work.facts("sampled")["ids"])

    def _rows(self) -> Rows:
        """The sequences of all texts to fit to, in random order; some are cut."""
        ids = torch.cat([text.sequences for text in self.texts])
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(self.seed))]
        is_cut = to_cut(len(ids))
        short = ids[is_cut].view(-1, SHORT)
        begin(short, self.shares.beginnings)
        ids[is_cut] = short.view(-1, ids.shape[1])
        return Rows(ids, is_cut)

    def _train(
        self,
        student: LayerwiseModel,
        start: Callable[[int], dict[str, torch.Tensor]],
        rows: Rows,
        states: torch.Tensor,
    ) -> Distillation:
        fits = graph_bytes(student.config, BATCH * self.shares.context) < memory_to_use(self.device)
        distillation = Distillation(student, start, self.work, keeps_graphs=fits)
        plan = Plan(self.steps, self.seed, mixed_precision=self.mixed_precision)
        task = self.progress.add_task("training, step", total=self.steps, completed=distillation.step)
        for loss in distillation.train(plan, rows, states):
            self.progress.advance(task)
            if not math.isfinite(loss):
                raise ValueError("the training loss is not finite; does the source hold NaN or infinity?")
        return distillation

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

    def _report(
        self, splits: list[Split], of_source: list[SequenceLoss], closed_form: Measurements, result: Measurements
    ) -> SplitReport:
        texts, done = [], 0
        for text in self.texts:
            here = slice(done, done := done + len(text.held_out))
            fitted, tokens = len(text.sequences) > 0, text.held_out.numel()
            before, after = mean_perplexity(of_source[here]), mean_perplexity(result.losses[here])
            interval = ratio_interval(result.losses[here], of_source[here])
            texts.append(TextLoss(text.name, fitted, tokens, before, after, after / before, interval))
        calibrated = [text for text in self.texts if len(text.sequences)]
        measured = self.files or calibrated
        inside = slice(sum(len(text.held_out) for text in measured))
        return SplitReport(
            calibration=", ".join(text.name for text in calibrated),
            tokens=sum(text.sequences.numel() for text in calibrated),
            effort=self.effort,
            steps=self.steps,
            inside=", ".join(text.name for text in measured),
            held_out_tokens=sum(text.held_out.numel() for text in measured),
            perplexity_source=mean_perplexity(of_source[inside]),
            perplexity_closed_form=mean_perplexity(closed_form.losses[inside]),
            perplexity=mean_perplexity(result.losses[inside]),
            ratio_interval=ratio_interval(result.losses[inside], of_source[inside]),
            texts=texts,
            layers=self._layers(splits, result),
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
        fields = self.config.to_dict()
        for name in ("_name_or_path", "transformers_version"):  # the path may be relative
            fields.pop(name, None)
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
        for text in (*self.files, *self.outside):
            digest.update(torch.cat([text.sequences, text.held_out]).numpy().tobytes())
        return {
            "versions": [__version__, torch.__version__],
            "source": [self.source.name, self.source.revision, stamps(self.source.weight_files)],
            "inputs": digest.hexdigest(),
            "seed": self.seed,
            "method": [SHORT, EVERY, FIRST_TOKEN_WEIGHT, AT_ONCE],
            **self.settings(),
        }


class _Cache:
    """Reads tensors of a source, and keeps them in memory as long as they fit into a share of it.

    Training reads every layer in every step, and some sources have to dequantize what they read.
    """

    def __init__(self, source: Source):
        self._source = source
        self._kept: dict[str, torch.Tensor] = {}
        self._unused = memory_to_use()

    def forget(self) -> None:
        """Free the memory."""
        self._kept.clear()

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
