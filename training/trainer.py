"""The Trainer of transformers with what GDA models need: a λ learning rate, a teacher, a layer log, LoRA beside λ."""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, save_fsdp_optimizer
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, Trainer
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import TrainingArguments

from gda.common.numbers import exponential
from gda.training.callbacks.layer_log import LayerLog, for_reporters
from gda.training.callbacks.progress import ThroughputCallback
from gda.training.distillation import Distillation
from gda.training.labels import num_predicted
from gda.training.lora import is_adapted, load_learned, require_mergeable, save_learned
from gda.training.parameters import optimizer_groups, partly_frozen
from gda.training.sharding import NEW_WITH_DEEPSPEED, FrozenEntriesCallback, first_failure, reshard
from gda.training.weights import load_plain, save_plain

# Numbers of a training entry of the log, beside step, epoch and tokens.
LOGGED = (
    *("loss", "learning_rate", "lambda_learning_rate", "grad_norm", "tokens_per_second"),
    *("cross_entropy", "kl", "hidden", "fade"),
)
# Each process holds the whole model.
REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class GDATrainer(Trainer):
    """The Trainer of transformers for GDA models.

    - λ can have its own learning rate. λ, norms, biases and partly trained parameters are not decayed.
    - With a teacher, the loss includes its predictions and hidden states. Evaluation measures the text alone.
    - The log also has the parts of the loss, the progress of fading in, tokens per second and, with a `LayerLog`,
      measurements of the layers. The latter are omitted with DeepSpeed, FSDP1 and compiled models.
    - A checkpoint of a PEFT model is a plain model with LoRA merged. All trained parameters are in a file beside it,
      from which training is resumed.

    Args:
        model: The model, prepared by `choose_what_learns`.
        args: Arguments of the Trainer.
        lambda_learning_rate: Peak learning rate of λ, on the same schedule. Default: that of all other parameters.
        distillation: The teacher.
        layer_log: Writes the log and measures the layers.
        predicted_per_sequence: Mean number of predicted tokens in a sequence of the evaluation data. Required if it
            varies, for an evaluation loss in which each token counts the same.
        kwargs: As for the Trainer.

    Attributes:
        throughput: Steps, seconds and tokens since the start or the last resume.

    Raises:
        ValueError: if this process sees several GPUs, an adapter can't be merged, or DeepSpeed's configuration has an
            optimizer or a schedule.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        lambda_learning_rate: float | None = None,
        distillation: Distillation | None = None,
        layer_log: LayerLog | None = None,
        predicted_per_sequence: float | None = None,
        **kwargs: Any,
    ):
        if args.n_gpu > 1:
            raise ValueError(f"this process sees {args.n_gpu} GPUs; start one for each by `accelerate launch`")
        if model is None:
            raise ValueError("GDATrainer needs a model, and does not support model_init")
        if predicted_per_sequence is not None and isinstance(kwargs.get("eval_dataset"), dict):
            raise ValueError("predicted_per_sequence needs a single evaluation dataset")
        require_mergeable(model)
        self.lambda_learning_rate = lambda_learning_rate
        self.distillation = distillation
        self.layer_log = layer_log
        self.predicted_per_sequence = predicted_per_sequence
        self.throughput = ThroughputCallback()
        self._loss_sums: dict[str, Tensor] = {}  # since the last log entry
        self._use_cache = model.config.use_cache  # which the Trainer switches off
        self._lambda_group: int | None = None  # the optimizer's group of λ, once it is created
        self._lambda_rate: float | None = None  # of the last step
        super().__init__(model, args, **kwargs)
        _refuse_deepspeed_optimizer(self.accelerator)
        _keep_weights_in_float32(self.accelerator)
        self.add_callback(self.throughput)
        if layer_log is not None:
            self.add_callback(layer_log)
        if partly := partly_frozen(model):
            if self.is_deepspeed_enabled:
                raise ValueError(NEW_WITH_DEEPSPEED)
            self.add_callback(FrozenEntriesCallback(partly))

    @property
    def _learner(self) -> Any:
        """The model, or PEFT's model around it."""
        return self.model

    # ------------------------------------------------------------------------------------------------------- optimizing

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, over the three groups of `optimizer_groups`."""
        if self.optimizer is None:
            model = self._learner if model is None else model
            optimizer: Any = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, cast(PreTrainedModel, model)
            )
            if {"params", "model", "optimizer_dict"} & optimizer[1].keys():
                raise ValueError(f"the optimizer {optimizer[0].__name__} takes no parameter groups; choose another")
            groups = optimizer_groups(
                model,
                learning_rate=self.args.learning_rate,
                lambda_learning_rate=self.lambda_learning_rate,
                weight_decay=self.args.weight_decay,
            )
            has_lambda = bool(groups[-1]["params"])
            if self._is_sharded:  # sharded checkpoints cannot restore an empty group
                groups = [group for group in groups if group["params"]]
            self._lambda_group = len(groups) - 1 if has_lambda else None
            self.optimizer = optimizer[0](groups, **optimizer[1])
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss on the text; during training with a teacher, the loss of `Distillation`."""
        if not model.training:
            # The Trainer takes the labels out of the dictionary, for label smoothing and loss functions.
            loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
            loss = loss * self._weight_in_mean(inputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        if self.layer_log is not None and inputs.get("output_attentions", self._learner.config.output_attentions):
            raise ValueError("a layer log cannot be written where the model returns its attention maps")
        log = self._measuring_log
        with contextlib.nullcontext() if log is None else log.measuring(self._learner, self.state.global_step + 1):
            if self.distillation is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            hidden_states = {"output_hidden_states": True} if self.distillation.hidden_weight > 0 else {}
            loss, outputs = super().compute_loss(model, {**inputs, **hidden_states}, True, num_items_in_batch)
        with self.accelerator.autocast():
            taught = self.distillation.ask(inputs)
        losses = self.distillation.compare(outputs, taught, inputs["labels"], self._divisor(inputs, num_items_in_batch))
        self._add_losses({"cross_entropy": loss, **losses}, num_items_in_batch)
        loss = self.distillation.loss(loss, losses)
        return (loss, outputs) if return_outputs else loss

    def _weight_in_mean(self, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor | float:
        """Weight of a batch in the mean loss of an evaluation, so that each predicted token counts the same.

        The Trainer averages the losses of the batches over their sequences.
        """
        if self.predicted_per_sequence is None:
            return 1.0
        return self._divisor(inputs, num_items) / len(inputs["labels"]) / self.predicted_per_sequence

    def _divisor(self, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor | int:
        """What a sum over the tokens of this process is divided by to be on the scale of `Trainer.compute_loss`."""
        if num_items is None:
            return num_predicted(inputs["labels"])
        if self.args.average_tokens_across_devices:
            return num_items / (self.accelerator.num_processes // self.get_tp_size())
        return num_items

    def _add_losses(self, losses: Mapping[str, Tensor], num_items: Tensor | int | None) -> None:
        """Add up the parts of the loss for the next log entry."""
        share = 1 if num_items is not None else self.current_gradient_accumulation_steps
        for name, part in losses.items():
            self._loss_sums[name] = self._loss_sums.get(name, torch.zeros_like(part)) + part.detach() / share

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The Trainer's. After the last backward pass of a step, gradients are complete and not yet clipped."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._lambda_group is not None and self.optimizer is not None:
            self._lambda_rate = float(self.optimizer.param_groups[self._lambda_group]["lr"])
        if (log := self._measuring_log) is not None and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler  # of float16, which multiplies the loss
            log.read_gradients(self._learner, 1.0 if scaler is None else 1 / scaler.get_scale())
        return loss

    # ---------------------------------------------------------------------------------------------------------- logging

    @property
    def _measuring_log(self) -> LayerLog | None:
        """The layer log, if layers are measured in the current step because it will be logged."""
        step, args = self.state.global_step + 1, self.args
        regular = args.logging_strategy == IntervalStrategy.STEPS and step % self.state.logging_steps == 0
        logged = regular or (step == 1 and args.logging_first_step) or step == self.state.max_steps
        is_compiled = self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        can_measure = self.accelerator.is_fsdp2 or self.accelerator.distributed_type in REPLICATED
        return self.layer_log if logged and can_measure and not is_compiled else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's, with further metrics; also writes the layer log."""
        layers: list[dict[str, float]] = []
        if "loss" in logs:
            logs |= self._extra_metrics(logs)
            if self.layer_log is not None:
                layers = self.layer_log.collect(self.state.global_step, self._sum)
        elif "eval_loss" in logs:
            logs["eval_perplexity"] = exponential(logs["eval_loss"])
        super().log(logs, start_time)
        if layers:
            self._report_layers(for_reporters(layers))
        if self.layer_log is not None and self.is_world_process_zero() and (entry := self._log_entry(logs)):
            self.layer_log.write(entry | ({"layers": layers} if layers else {}))

    def _extra_metrics(self, logs: dict[str, float]) -> dict[str, float]:
        """Metrics of the steps since the last log entry."""
        steps, seconds, tokens = self.throughput.since_last_call()
        processes = self.accelerator.num_processes
        extra = {name: float(self._sum(total)) / processes / steps for name, total in self._loss_sums.items()}
        self._loss_sums = {}
        if self.lambda_learning_rate is not None and self._lambda_rate is not None:
            extra["lambda_learning_rate"] = self._lambda_rate
        if tokens and seconds:
            extra["tokens_per_second"] = tokens / seconds
        if (fade := getattr(self._learner.config, "fade", None)) is not None:
            extra["fade"] = fade
        return extra

    def _log_entry(self, logs: dict[str, float]) -> dict[str, Any]:
        """The entry of the log file; empty if the Trainer logs neither training nor evaluation."""
        step = self.state.global_step
        if "eval_loss" in logs:
            return {"step": step, "eval_loss": logs["eval_loss"], "perplexity": logs["eval_perplexity"]}
        if "loss" not in logs:
            return {}
        entry: dict[str, Any] = {"step": step, "epoch": logs.get("epoch")}
        if self.args.include_num_input_tokens_seen != "no":
            entry["tokens"] = int(self.state.num_input_tokens_seen)
        return entry | {name: float(logs[name]) for name in LOGGED if name in logs}

    def _report_layers(self, layers: dict[str, float]) -> None:
        """Send the layers to tensorboard, trackio and wandb, but not to the terminal and the Trainer's own history."""
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
    def _is_sharded(self) -> bool:
        return self.accelerator.is_fsdp2 or self.is_deepspeed_enabled

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the plain model, without gathering all of it; in a LoRA checkpoint, also all trained parameters."""
        config, during_training = self._learner.config, self._learner.config.use_cache
        config.use_cache = self._use_cache
        try:
            self._save_plain_model(output_dir, _internal_call)
        finally:
            config.use_cache = during_training

    def _save_plain_model(self, output_dir: str | None, _internal_call: bool) -> None:
        if not self._is_sharded and not is_adapted(self._learner):
            super().save_model(output_dir, _internal_call)
            return
        folder, writes = Path(str(output_dir or self.args.output_dir)), self.args.should_save
        save_plain(self._learner, folder, writes=writes)
        if writes:
            if self._learner.can_generate():
                self._learner.generation_config.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        if _internal_call and is_adapted(self._learner):
            save_learned(self._learner, folder, writes=writes)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_adapted(self._learner):
            load_learned(self._learner, Path(resume_from_checkpoint))
        elif self.accelerator.is_fsdp2:
            load_plain(self._learner, Path(resume_from_checkpoint), reads=self.is_world_process_zero())
        else:
            with warnings.catch_warnings():
                # The Trainer reads config.json by a class for which the names that older releases know are deprecated.
                warnings.simplefilter("ignore", FutureWarning)
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        # With LoRA, the Trainer would look for PEFT's own files; with DeepSpeed, it reads those of DeepSpeed.
        if self.accelerator.is_fsdp2 or (is_adapted(self._learner) and not self.is_deepspeed_enabled):
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.accelerator.is_fsdp2:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The Trainer's would also store the model a second time.
        plugin = self.accelerator.state.fsdp_plugin
        reshard(self._learner)  # or its parameters are not those of the optimizer
        with first_failure():
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)


def _refuse_deepspeed_optimizer(accelerator: Accelerator) -> None:
    """Raise ValueError if DeepSpeed's configuration has an optimizer or a schedule, which would replace the Trainer's.

    Its optimizer has one group: λ, norms and biases would decay, and λ would have no rate of its own.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    for section in ("optimizer", "scheduler"):
        if plugin is not None and section in plugin.deepspeed_config:
            raise ValueError(f"remove `{section}` from DeepSpeed's configuration; it would replace that of GDATrainer")


def _keep_weights_in_float32(accelerator: Accelerator) -> None:
    """Let FSDP2 and DeepSpeed, when they compute in bfloat16, keep the weights and sum the gradients in float32.

    By accelerate's policy for FSDP2, sums of gradients and the loss are rounded to bfloat16: a loss of 4.74 is reported
    as 4.75, and small contributions of many processes are lost. DeepSpeed's `bf16` rounds the weights themselves before
    the first step, λ too; its autocast does not.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    elif plugin is not None and plugin.deepspeed_config.get("bf16", {}).get("enabled") is True:
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}  # none is sent rounded
        plugin.deepspeed_config |= {"bf16": {"enabled": False}, "torch_autocast": autocast}
