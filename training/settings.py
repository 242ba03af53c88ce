"""Options of `gda train`. Nothing heavy is imported here, so `--help` is fast."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from gda.common.files import partial_of, refuse_existing, refuse_overlap
from gda.common.options import OUTPUT, Options, argument, as_names, flag, option
from gda.common.places import check_data, check_gda_model, check_model, check_reporter, config_entry
from gda.conversion.options import BundleOptions, HubOptions, RevisionOptions

EVAL_TOKENS = 32_768
DATA, LEARNING, STEPS = "Data", "Trained parameters", "Steps and rates"
LAMBDA, TEACHER, LOG = "λ", "Teacher", "Log, evaluation and checkpoints"


@dataclass(frozen=True)
class TrainSettings(Options):
    """Settings of a training run. training.json records them, and a resumed run must have the same.

    `data`, `eval_data` and `report_to` also take a single value, and paths become strings.

    Raises:
        ValueError: naming the option, the rule and the value.
    """

    data: tuple[str, ...] = option(
        (),
        "Text or chats to train on: a file (plain text, or rows in .jsonl, .ndjson, .json, .csv, .tsv, .parquet or "
        ".arrow, also compressed), a folder of such files or of a downloaded or saved dataset, or a dataset "
        "OWNER/NAME[:CONFIG[:SPLIT]] on the Hub. May be repeated.",
        panel=DATA,
        metavar="FILE|DATASET",
        check=check_data,
    )
    eval_data: tuple[str, ...] = option(
        (),
        "Text to measure the loss on before, during and after training. May be repeated. Default: none.",
        panel=DATA,
        metavar="FILE|DATASET",
        check=check_data,
    )
    eval_tokens: int | None = option(
        None,
        f"Largest number of tokens of --eval-data to evaluate on, evenly spread over it. Default: {EVAL_TOKENS:,}.",
        panel=DATA,
        metavar="N",
        minimum=1,
    )
    text_field: str = option(
        "text",
        "Field that holds the text or the messages. By default, data without `text` is read by `messages`, or by "
        "`prompt` and `completion`.",
        panel=DATA,
    )
    streaming: bool = option(
        False, "Read the data while training instead of tokenizing it first. Needs --steps.", panel=DATA
    )
    context: int | None = option(
        None,
        "Tokens per sequence. Default: 512, or the model's max_position_embeddings if that is smaller.",
        panel=DATA,
        minimum=2,
    )

    train: Literal["new", "attention", "all", "lora"] = option(
        "all",
        "Parameters to train. new: those that MODEL's trainable.json lists; all others stay the same bit for bit. "
        "attention: the attention layers. all: all parameters. lora: low-rank updates of the attention's projections, "
        "with λ and the head norms in full.",
        panel=LEARNING,
    )
    lora_rank: int = option(16, "Rank of the updates of --train lora.", panel=LEARNING, minimum=1)
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "Data type of matrix products. auto: bfloat16 for a bfloat16 model on a GPU that supports it, or if "
        "`accelerate launch` asks for it; otherwise float32. Weights are float32 during training.",
        panel=LEARNING,
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: slower, but uses less memory.", panel=LEARNING
    )

    steps: int | None = option(
        None, "Number of optimizer steps. Default: as many as --epochs requires.", panel=STEPS, minimum=1
    )
    epochs: float = option(1.0, "Passes over the data, if --steps is not given.", panel=STEPS, above=0)
    batch_size: int = option(8, "Sequences per forward pass and process.", panel=STEPS, minimum=1)
    accumulation: int = option(1, "Forward passes per optimizer step.", panel=STEPS, minimum=1)
    learning_rate: float = option(1e-4, "Peak learning rate.", panel=STEPS, above=0)
    weight_decay: float = option(
        0.0, "Weight decay of AdamW. λ, norms and biases are not decayed.", panel=STEPS, minimum=0
    )
    schedule: Literal["linear", "cosine", "wsd", "constant"] = option(
        "cosine",
        "Learning rate after the warmup. linear, cosine: decays to 0. wsd: stays constant and decays to 0 at the end. "
        "constant: stays constant.",
        panel=STEPS,
    )
    warmup: float = option(0.02, "Warmup as a fraction of the steps.", panel=STEPS, minimum=0, maximum=1)
    decay: float = option(
        0.2, "Final decay of --schedule wsd as a fraction of the steps.", panel=STEPS, minimum=0, maximum=1
    )
    seed: int = option(
        0, "Seed of the data order and of LoRA's initialization.", panel=STEPS, minimum=0, maximum=2**32 - 1
    )

    lambda_learning_rate: float | None = option(
        None,
        "Peak learning rate of the λ parameters. Default: --learning-rate; ten times that was no better "
        "(docs/evidence.md).",
        panel=LAMBDA,
        above=0,
    )
    lambda_target: float | None = option(
        None,
        "Fade λ in: from 0, shifted by up to a quarter of this value, to the learned λ. "
        "Default: the value in MODEL's config.",
        panel=LAMBDA,
    )
    fade_steps: int | None = option(
        None,
        "Number of steps over which the new parts of MODEL are faded in: heads, neurons, layers, a head norm, λ. "
        "Default: all steps. For a head norm, half as many were better (docs/evidence.md).",
        panel=STEPS,
        minimum=1,
    )

    teacher: str | None = option(
        None,
        "Teacher to distill from: a folder, a Hub id or a GGUF file. Default: no distillation.",
        panel=TEACHER,
        check=check_model,
    )
    distill_weight: float = option(
        0.5,
        "Weight w of the distillation loss. The loss on the text has weight 1 − w.",
        panel=TEACHER,
        minimum=0,
        maximum=1,
    )
    temperature: float = option(1.0, "Temperature of both models' predictions.", panel=TEACHER, above=0)
    hidden_weight: float = option(
        0.0, "Weight of the distance between both models' hidden states.", panel=TEACHER, minimum=0
    )

    log_every: int | None = option(None, "Steps between log entries. Default: 1/20 of all steps.", panel=LOG, minimum=1)
    eval_every: int | None = option(
        None, "Steps between evaluations on --eval-data. Default: 1/10 of all steps.", panel=LOG, minimum=1
    )
    save_every: int | None = option(
        None, "Steps between checkpoints. Default: 1/10 of all steps.", panel=LOG, minimum=1
    )
    keep: int = option(1, "Checkpoints to keep during training.", panel=LOG, minimum=1)
    report_to: tuple[str, ...] = option(
        (),
        "Log to tensorboard, trackio or wandb as well. May be repeated. Default: only to OUT.",
        panel=LOG,
        metavar="NAME",
        check=check_reporter,
    )

    def __post_init__(self) -> None:
        for name in ("data", "eval_data", "report_to"):
            object.__setattr__(self, name, as_names(getattr(self, name)))
        object.__setattr__(self, "teacher", None if self.teacher is None else str(self.teacher))
        super().__post_init__()
        if not self.data:
            raise ValueError("--data is missing; name a text file or a dataset")
        for name in ("data", "eval_data"):
            if "" in getattr(self, name):
                raise ValueError(f"{flag(name)} is empty; name a text file or a dataset")
        self._check_combinations()
        self._refuse_unused()

    def _check_combinations(self) -> None:
        if self.streaming and self.steps is None:
            raise ValueError("--streaming needs --steps, because the length of a stream is unknown")
        if self.lambda_target is not None and not math.isfinite(self.lambda_target):
            raise ValueError(f"--lambda-target {self.lambda_target} is not a finite number")
        if self.steps is not None:
            self.check_fade(self.steps)
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"--warmup {self.warmup} and --decay {self.decay} add up to more than all steps")

    def check_context(self, longest: int) -> None:
        """Raise ValueError if a sequence has more than the `longest` tokens that the model reads."""
        if self.context is not None and self.context > longest:
            raise ValueError(f"--context {self.context} is above {longest}, the model's max_position_embeddings")

    def check_fade(self, steps: int) -> None:
        """Raise ValueError if a run of that many steps ends before the fade does."""
        if (self.fade_steps or 0) > steps:
            raise ValueError(
                f"--fade-steps {self.fade_steps} is above the {steps} steps of this run: the fade would not end"
            )

    def _refuse_unused(self) -> None:
        """Refuse options that have no effect without another one."""
        with_teacher = (self.teacher is not None, "--teacher")
        needs = dict.fromkeys(("distill_weight", "temperature", "hidden_weight"), with_teacher) | {
            "lora_rank": (self.train == "lora", "--train lora"),
            "decay": (self.schedule == "wsd", "--schedule wsd"),
            "eval_every": (bool(self.eval_data), "--eval-data"),
            "eval_tokens": (bool(self.eval_data), "--eval-data"),
        }
        defaults = {each.name: each.default for each in fields(self)}
        for name, (is_given, needed) in needs.items():
            if not is_given and (value := getattr(self, name)) != defaults[name]:
                raise ValueError(f"{flag(name)} {value} has no effect without {needed}")
        if self.steps is not None and self.epochs != defaults["epochs"]:
            raise ValueError(f"--epochs {self.epochs} and --steps {self.steps} both set the length; pass one of them")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class RunOptions(BundleOptions, RevisionOptions, HubOptions):
    """Where a training run reads from and writes to, and what is done with its result."""

    plot: bool = option(False, "Draw the log as OUT/training.html.", panel=LOG)
    resume: bool = option(
        False, "Continue an unfinished run from its last checkpoint. Start a new run if there is none.", panel=OUTPUT
    )
    overwrite: bool = option(False, "Replace OUT and an unfinished run, if they exist.", panel=OUTPUT)
    show_batch: bool = option(
        False, "Print the first sequence, with the parts that are learned and those that are only read.", panel=LOG
    )
    dry_run: bool = option(
        False,
        "Check the input, and count tokens, steps and parameters, but keep nothing; Hub ids are still downloaded.",
        panel=OUTPUT,
    )


@dataclass(frozen=True)
class TrainOptions(TrainSettings, RunOptions):
    """Options of `gda train`."""

    model: str | Path = argument(
        "GDA language model with its tokenizer: a folder, a checkpoint of an earlier run or a Hub id.",
        check=check_gda_model,
    )
    out: str | Path | None = argument("Folder to create. Omit it with --plot to draw the log of MODEL.", default=None)

    def __post_init__(self) -> None:
        if self.only_plots:
            self._refuse_training_options()
            return
        if self.out is None:
            raise ValueError("OUT is missing; name the folder to create")
        super().__post_init__()

    def check_places(self) -> None:
        if self.only_plots:
            return
        super().check_places()
        assert self.out is not None
        refuse_overlap(self.model, self.out, "the model")
        for place in (*self.data, *self.eval_data):
            refuse_overlap(place, self.out, f"the data {place}")
        if self.teacher is not None:
            for written in (Path(self.out), partial_of(Path(self.out))):
                refuse_overlap(self.teacher, written, f"the teacher {self.teacher}")
        refuse_existing(Path(self.out), self.overwrite)
        if (longest := config_entry(self.model, "max_position_embeddings", int)) is not None:
            self.check_context(longest)

    def _refuse_training_options(self) -> None:
        for each in fields(self):
            given, default = getattr(self, each.name) or None, each.default or None  # an empty list and tuple are equal
            if each.name not in ("model", "out", "plot") and given != default:
                option = flag(each.name)
                raise ValueError(
                    f"{option} has no effect without OUT: --plot only draws the log of MODEL; name OUT or omit {option}"
                )

    @property
    def only_plots(self) -> bool:
        """Whether nothing is trained, but the log of an earlier run is drawn."""
        return self.out is None and self.plot and not self.data

    @property
    def settings(self) -> TrainSettings:
        """The options that training.json records."""
        return TrainSettings(**{each.name: getattr(self, each.name) for each in fields(TrainSettings)})
