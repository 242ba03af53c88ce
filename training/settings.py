"""How to train: every choice that `gda train` has, checked when it is made."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

LEARNERS = ("new", "attention", "all", "lora")
SCHEDULES = ("linear", "cosine", "wsd", "constant")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainSettings:
    """What a training run does, but for its places.

    Attributes:
        data: Files of text (`.txt` or any other), rows (`.jsonl`, `.parquet`), or datasets of the Hub,
            NAME[:CONFIG[:SPLIT]].
        eval_data: The same, to measure the loss on; none by default.
        text_field: The field of a row that holds its text.
        streaming: Read the data while training, instead of cutting all of it into windows first.
        context: Tokens a window; by default 512, or what the model was made for if that is less.
        train: What learns: `new`, what trainable.json of the model calls new; `attention`, the attention layers; `all`;
            `lora`, low-rank updates of the attention's projections, with λ and the norm of heads beside them.
        lora_rank: Of these updates.
        steps: Optimizer steps; by default `epochs` times through the data.
        epochs: How often the data is read, if `steps` does not say.
        batch_size: Windows in a forward pass of one process.
        accumulation: Forward passes in a step.
        learning_rate: The largest.
        lambda_learning_rate: That of what λ is made of; by default the same.
        weight_decay: AdamW's. λ, norms and biases have none.
        schedule: What the learning rates do after the warm-up: fall to 0 by a line or a cosine; stay, and fall at the
            end (`wsd`); or stay.
        warmup: Share of the steps in which they rise.
        decay: Share of the steps in which they fall at the end; of `wsd` only.
        precision: What matrices are multiplied in. `auto` is bfloat16 for a bfloat16 model on an accelerator that has
            it, and where `accelerate launch` asks for it; else float32. Weights are float32 while they learn.
        gradient_checkpointing: Compute activations again for the gradients, instead of keeping them.
        lambda_target: Fade λ in by way of this value; see `FadeCallback`.
        lambda_anneal_steps: Steps over which λ is faded in.
        teacher: A model whose predictions and, with `hidden_weight`, hidden states are learned: a folder, a Hub id or a
            .gguf file; none by default.
        distill_weight: Share of the teacher's predictions in the loss; the rest is the text's.
        temperature: By which both predictions are softened.
        hidden_weight: Weight of the hidden states' distance in the loss.
        log_every: Steps between two entries of the log; by default a twentieth of the steps.
        eval_every: Steps between two measurements on `eval_data`; by default a tenth of the steps.
        save_every: Steps between two checkpoints; by default a tenth of the steps.
        keep: Checkpoints that are kept while training goes on.
        report_to: Where else the log goes: tensorboard, trackio, wandb.
        seed: Of the order of the data, and of dropout and LoRA's start.

    Raises:
        ValueError: naming the option, the rule and the value.
    """

    data: tuple[str, ...]
    eval_data: tuple[str, ...] = ()
    text_field: str = "text"
    streaming: bool = False
    context: int | None = None
    train: str = "all"
    lora_rank: int = 16
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-4
    lambda_learning_rate: float | None = None
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.02
    decay: float = 0.2
    precision: str = "auto"
    gradient_checkpointing: bool = False
    lambda_target: float | None = None
    lambda_anneal_steps: int | None = None
    teacher: str | None = None
    distill_weight: float = 0.5
    temperature: float = 1.0
    hidden_weight: float = 0.0
    log_every: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 1
    report_to: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("--data is missing; name a file of text or a dataset")
        for name in ("data", "eval_data"):
            if "" in getattr(self, name):
                raise ValueError(f"{option(name)} is empty; name a file of text or a dataset")
        self._check_choices()
        self._check_numbers()
        self._check_together()

    def _check_choices(self) -> None:
        choices = (("train", LEARNERS), ("schedule", SCHEDULES), ("precision", PRECISIONS))
        for name, allowed in choices:
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"--{name} {value} is none of {', '.join(allowed)}")

    def _check_numbers(self) -> None:
        counts = {"context": 2} | dict.fromkeys(
            (
                *("lora_rank", "steps", "batch_size", "accumulation", "lambda_anneal_steps"),
                *("log_every", "eval_every", "save_every", "keep"),
            ),
            1,
        )
        for name, least in counts.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{option(name)} {value} is below {least}")
        for name in ("epochs", "learning_rate", "lambda_learning_rate", "temperature"):
            if (value := getattr(self, name)) is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{option(name)} {value} is no positive number")
        for name in ("weight_decay", "hidden_weight"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise ValueError(f"{option(name)} {value} is no number from 0 upwards")
        for name in ("warmup", "decay", "distill_weight"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{option(name)} {value} is no share from 0 to 1")
        if self.lambda_target is not None and not math.isfinite(self.lambda_target):
            raise ValueError(f"--lambda-target {self.lambda_target} is no number")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed} is not from 0 to {2**32 - 1}")

    def _check_together(self) -> None:
        if self.streaming and self.steps is None:
            raise ValueError("--streaming needs --steps, since nobody knows how long the data is")
        if (self.lambda_target is None) != (self.lambda_anneal_steps is None):
            raise ValueError("--lambda-target and --lambda-anneal-steps go together; one of them is missing")
        if self.steps is not None and self.lambda_anneal_steps is not None and self.lambda_anneal_steps > self.steps:
            raise ValueError(
                f"--lambda-anneal-steps {self.lambda_anneal_steps} is above --steps {self.steps}: "
                "λ would not be its own at the end"
            )
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"--warmup {self.warmup} and --decay {self.decay} are more than all steps together")
        self._refuse_without_effect()

    def _refuse_without_effect(self) -> None:
        usual = {each.name: each.default for each in fields(self)}
        of_teacher = (self.teacher is not None, "a --teacher to learn from")
        needs = dict.fromkeys(("distill_weight", "temperature", "hidden_weight"), of_teacher) | {
            "lora_rank": (self.train == "lora", "--train lora"),
            "decay": (self.schedule == "wsd", "--schedule wsd"),
            "eval_every": (bool(self.eval_data), "--eval-data, on which to measure"),
            "epochs": (self.steps is None, "no --steps beside it, which say how long to train, too"),
        }
        for name, (is_there, needed) in needs.items():
            if not is_there and (value := getattr(self, name)) != usual[name]:
                raise ValueError(f"{option(name)} {value} needs {needed}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return asdict(self)

    def differing(self, other: Mapping[str, Any]) -> str | None:
        """The first setting whose value is another in `other`, which came through JSON; None if all are the same."""
        here = {name: list(value) if isinstance(value, tuple) else value for name, value in self.to_dict().items()}
        return next((name for name in here if here[name] != other.get(name)), None)


def option(name: str) -> str:
    """How the command line spells a setting."""
    return f"--{name.replace('_', '-')}"
