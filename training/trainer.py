"""transformers' Trainer, with what GDA models need: rates of λ, a teacher, a log by layers, and LoRA beside λ."""

import contextlib
import time
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType, DynamoBackend
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, Trainer
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import TrainingArguments

from gda.common.numbers import exponential
from gda.training.callbacks.layer_log import LayerLog, for_reporters
from gda.training.distillation import NO_LABEL, Distillation, Parts
from gda.training.parameters import is_adapted, merged_state, optimizer_groups, partly_frozen
from gda.training.precision import keep_sums_wide

# What a checkpoint of LoRA holds beside the plain model: all that learns, by its name in PEFT's model.
LEARNED_FILE = "learned.safetensors"
# Of a compiled module around another, and of one whose activations are computed again.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "module.")


class GDATrainer(Trainer):
    """transformers' Trainer for GDA models.

    - λ has a learning rate of its own; weight decay spares λ, norms, biases and what learns only in part.
    - With a teacher its predictions, and hidden states, are part of the loss. Evaluation measures the text alone.
    - A line of the log has the parts of the loss, how far new parts or λ are faded in, tokens a second
      and, with a `LayerLog`, the layers. What is measured in layers is left out where it could not be measured right:
      with DeepSpeed, the first FSDP and compiled models.
    - A checkpoint of a model of PEFT is a plain model, LoRA merged into it, and all that learns, λ as well, in a file
      of its own, from which training is resumed.

    Args:
        model: The model, prepared by `choose_what_learns`.
        args: The Trainer's.
        lambda_learning_rate: Of λ; by default that of all else. Both follow the same schedule.
        distillation: The teacher.
        layer_log: Where to log by layer.
        kwargs: As of the Trainer.

    Attributes:
        pace: Steps, seconds and tokens of this session.

    Raises:
        ValueError: if one process sees several GPUs: start a process for each.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        lambda_learning_rate: float | None = None,
        distillation: Distillation | None = None,
        layer_log: LayerLog | None = None,
        **kwargs: Any,
    ):
        if args.n_gpu > 1:
            raise ValueError(f"this process sees {args.n_gpu} GPUs; start one for each by `accelerate launch`")
        self.lambda_learning_rate = lambda_learning_rate
        self.distillation = distillation
        self.layer_log = layer_log
        self._parts: dict[str, Tensor] = {}
        self.pace = Pace()
        super().__init__(model, args, **kwargs)
        keep_sums_wide(self.accelerator)
        self.add_callback(self.pace)
        if layer_log is not None:
            self.add_callback(layer_log)
        if partly := partly_frozen(model):
            if self.is_deepspeed_enabled:
                raise ValueError("--train new does not go with DeepSpeed, which has gradients of its own; use FSDP2")
            self.add_callback(_OldEntries(partly))

    # ------------------------------------------------------------------------------------------------------- optimizing

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, over three groups, of which λ is the last."""
        if self.optimizer is None:
            model = self._learner if model is None else model
            made: Any = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, cast(PreTrainedModel, model)
            )
            groups = optimizer_groups(
                model,
                learning_rate=self.args.learning_rate,
                lambda_learning_rate=self.lambda_learning_rate,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = made[0](groups, **made[1])
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss on the text; in training, with a teacher, that of `Distillation`."""
        with self._listening() if model.training else contextlib.nullcontext():
            if self.distillation is None or not model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            wants_states = {"output_hidden_states": True} if self.distillation.hidden_weight > 0 else {}
            loss, outputs = super().compute_loss(model, {**inputs, **wants_states}, True, num_items_in_batch)
        with self.accelerator.autocast():
            taught = self.distillation.ask(inputs)
        parts = self.distillation.compare(outputs, taught, inputs["labels"], self._divisor(inputs, num_items_in_batch))
        self._note(loss, parts, num_items_in_batch)
        loss = self.distillation.loss(loss, parts)
        return (loss, outputs) if return_outputs else loss

    def _divisor(self, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor | int:
        """What a sum over this process's tokens is divided by, to be what `Trainer.compute_loss` gives."""
        if num_items is None:
            return inputs["labels"][:, 1:].ne(NO_LABEL).sum()
        if self.args.average_tokens_across_devices:
            return num_items / (self.accelerator.num_processes // self.get_tp_size())
        return num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As the Trainer's; the last of a step leaves the gradients whole and not yet clipped."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.layer_log is not None and self._measures and self.accelerator.sync_gradients:
            self.layer_log.read_gradients(self._learner)
        return loss

    # ---------------------------------------------------------------------------------------------------------- logging

    @property
    def _measures(self) -> bool:
        """Whether layers are measured in the step under way, which will be logged."""
        step, args = self.state.global_step + 1, self.args
        regular = args.logging_strategy == IntervalStrategy.STEPS and step % self.state.logging_steps == 0
        logged = regular or (step == 1 and args.logging_first_step) or step == self.state.max_steps
        return self.layer_log is not None and logged and self._can_measure

    @property
    def _can_measure(self) -> bool:
        kind = self.accelerator.distributed_type
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            return False
        if kind == DistributedType.FSDP:
            return self.accelerator.state.fsdp_plugin.fsdp_version == 2
        return kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

    def _listening(self) -> contextlib.AbstractContextManager[None]:
        if self.layer_log is None or not self._measures:
            return contextlib.nullcontext()
        return self.layer_log.listening(self._learner, self.state.global_step + 1)

    def _note(self, cross_entropy: Tensor, parts: Parts, num_items: Tensor | int | None) -> None:
        """Add up the parts of the loss until they are logged."""
        share = 1 if num_items is not None else self.current_gradient_accumulation_steps
        for name, part in (("cross_entropy", cross_entropy), ("kl", parts.kl), ("hidden", parts.hidden)):
            if part is not None:
                self._parts[name] = self._parts.get(name, torch.zeros_like(part)).detach() + part.detach() / share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with what it does not know of."""
        layers: list[dict[str, float]] = []
        if "loss" in logs:
            if self.lambda_learning_rate is not None and "learning_rate" in logs:
                logs["lambda_learning_rate"] = logs["learning_rate"] * self._ratio
            logs |= self._more()
            if self.layer_log is not None:
                layers = self.layer_log.collect(self.state.global_step, self._sum)
        elif "eval_loss" in logs:
            logs["eval_perplexity"] = exponential(logs["eval_loss"])
        super().log(logs, start_time)
        if layers:
            self._report(for_reporters(layers))
        if self.layer_log is not None and self.is_world_process_zero() and (entry := self._entry(logs)):
            self.layer_log.write(entry | ({"layers": layers} if layers else {}))

    @property
    def _ratio(self) -> float:
        """The rate of λ relative to that of the rest, which the schedule keeps."""
        rate = self.lambda_learning_rate
        return 1.0 if rate is None else rate / self.args.learning_rate

    def _more(self) -> dict[str, float]:
        """Of the steps since the last line."""
        steps, seconds, tokens = self.pace.since_last()
        more = {
            name: float(self._sum(part)) / self.accelerator.num_processes / steps for name, part in self._parts.items()
        }
        self._parts = {}
        if tokens and seconds:
            more["tokens_per_second"] = tokens / seconds
        if (fade := getattr(self._learner.config, "fade", None)) is not None:
            more["fade"] = fade
        return more

    def _entry(self, logs: dict[str, float]) -> dict[str, Any]:
        """The line of the log; empty if it is of neither training nor evaluation."""
        if "eval_loss" in logs:
            return {
                "step": self.state.global_step,
                "eval_loss": logs["eval_loss"],
                "perplexity": logs["eval_perplexity"],
            }
        if "loss" not in logs:
            return {}
        entry: dict[str, Any] = {"step": self.state.global_step, "epoch": logs.get("epoch")}
        if self.args.include_num_input_tokens_seen != "no":
            entry["tokens"] = int(self.state.num_input_tokens_seen)
        names: tuple[str, ...] = ("loss", "learning_rate", "lambda_learning_rate", "grad_norm", "tokens_per_second")
        names += ("cross_entropy", "kl", "hidden", "fade")
        return entry | {name: float(logs[name]) for name in names if name in logs}

    def _report(self, layers: dict[str, float]) -> None:
        """Hand the layers to tensorboard and its like; they would flood a terminal and the Trainer's state."""
        reporters = tuple(INTEGRATION_TO_CALLBACK.values())
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, reporters):
                cast(TrainerCallback, callback).on_log(
                    self.args, self.state, self.control, model=self.model, logs=dict(layers)
                )

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    # ------------------------------------------------------------------------------------------------------ checkpoints

    @property
    def _learner(self) -> Any:
        """The model, or PEFT's around it."""
        return self.model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the plain model; in a checkpoint of LoRA, all that learns as well."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and is_adapted(self._learner):
            named = [(name, each) for name, each in self._learner.named_parameters() if each.requires_grad]
            learned = {_bare(name): _whole(each.detach()).cpu().contiguous() for name, each in named}
            if self.args.should_save:
                save_file(learned, Path(str(output_dir or self.args.output_dir)) / LEARNED_FILE, {"format": "pt"})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not is_adapted(self._learner):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = str(output_dir or self.args.output_dir)
            self._learner.get_base_model().save_pretrained(folder, state_dict=merged_state(self._learner, state_dict))
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not is_adapted(self._learner):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        path = Path(resume_from_checkpoint) / LEARNED_FILE
        if not path.is_file():
            raise ValueError(f"{path} is missing; a checkpoint of --train lora holds one")
        learned = load_file(path)
        learning = {_bare(name): each for name, each in self._learner.named_parameters() if each.requires_grad}
        if differing := sorted(learned.keys() ^ learning.keys()):
            raise ValueError(f"{path} is of another training: it differs in {differing[0]}")
        with torch.no_grad():
            for name, parameter in learning.items():
                parameter.copy_(_as(parameter, learned[name]))


class Pace(TrainerCallback):
    """Tokens a second in training steps: without evaluation, checkpoints and reading the data."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.tokens = 0, 0.0, 0  # of the session
        self._first_token: int | None = None
        self._told = (0, 0.0, 0)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._first_token is None:
            self._first_token = int(state.num_input_tokens_seen)
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.steps += 1
        self.seconds += time.perf_counter() - self._began
        self.tokens = int(state.num_input_tokens_seen) - (self._first_token or 0)

    @property
    def tokens_per_second(self) -> float | None:
        """Of this process's session, over all processes; None if it did no step."""
        return self.tokens / self.seconds if self.seconds else None

    def since_last(self) -> tuple[int, float, int]:
        """Steps, seconds in them, and tokens since this was last asked."""
        now = self.steps, self.seconds, self.tokens
        steps, seconds, tokens = (here - before for here, before in zip(now, self._told, strict=True))
        self._told = now
        return max(int(steps), 1), seconds, int(tokens)


class _OldEntries(TrainerCallback):
    """Keeps the old entries of parameters that FSDP2 has put others in the place of, whose hooks are lost with them."""

    def __init__(self, new_entries: dict[str, Tensor]):
        self.new_entries = new_entries

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        parameters = {_bare(name): each for name, each in kwargs["model"].named_parameters()}
        for name, new in self.new_entries.items():
            parameter = parameters.get(name)
            if hasattr(parameter, "new_entries"):
                continue  # it is the one that has the hook
            if not isinstance(parameter, DTensor):
                raise ValueError(f"--train new cannot keep the old part of {name} in place here; use FSDP2 or DDP")
            mask = _as(parameter, new)
            parameter.new_entries = new  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(lambda each, mask=mask: each.grad.mul_(mask))


def _bare(name: str) -> str:
    """The name of a parameter without what was wrapped around its modules."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as(parameter: Tensor, whole: Tensor) -> Tensor:
    """`whole`, distributed as the parameter is."""
    if isinstance(parameter, DTensor):
        device = parameter.to_local().device
        return distribute_tensor(whole.to(device), parameter.device_mesh, parameter.placements)
    return whole
