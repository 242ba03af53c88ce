# Copyright 2026 the authors of Grouped Differential Attention. Apache License 2.0, see
# https://www.apache.org/licenses/LICENSE-2.0. This file is of grouped-differential-attention 0.1.0, which saves it
# beside a model's weights, so that they load with transformers alone.
"""Grouped Differential Attention models: the decoder, the language model and the classification heads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
)

from .attention_gda import (
    ATTENTION_CLASSES,
    Fade,
    GDAAttention,
    GrowthMask,
    HeadwiseUp,
    LambdaAnneal,
    LambdaProjection,
    SharedBase,
)
from .configuration_gda import GDAConfig

try:
    from transformers import initialization as init  # leaves alone what a checkpoint has filled
except ImportError:  # transformers 4
    from torch.nn import init  # type: ignore[no-redef]


class PolyNorm(nn.Module):
    """w0 · n(x³) + w1 · n(x²) + w2 · n(x) + b with n(z) = z / RMS(z) (arXiv 2411.03884), as Motif uses it."""

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 1 / 3))
        self.bias = nn.Parameter(torch.zeros(1))
        self.eps = eps

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Activations of x (…, width). A mask (width,) says how much each neuron weighs in the means; all else is 1."""
        wide = x.float()
        powers = (wide**3, wide**2, wide)
        normed = (z * torch.rsqrt(self._mean(z.pow(2), mask) + self.eps) for z in powers)
        return (sum(w * z for w, z in zip(self.weight, normed, strict=True)) + self.bias).to(x.dtype)

    @staticmethod
    def _mean(z: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return z.mean(-1, keepdim=True) if mask is None else (z * mask).mean(-1, keepdim=True) / mask.mean()


ACT2FN.setdefault("poly_norm", PolyNorm)  # by this name Llama's MLP finds it


class GDAGrowingMLP(LlamaMLP):
    """Llama's MLP while it grows: the outputs of new neurons, or of all in a new layer, are masked."""

    def __init__(self, config: GDAConfig, layer_idx: int):
        super().__init__(config)
        self.growth_mask = GrowthMask(config)
        self.is_new = config.is_new_layer(layer_idx)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_new:
            return super().forward(x) * self.growth_mask.value
        gate, up = self.gate_proj(x), self.up_proj(x)
        first_new = self.config.intermediate_size - (self.config.masked_neurons or 0)
        mask = self.growth_mask(self._neurons(up) >= first_new)
        gate = self.act_fn(gate, mask) if isinstance(self.act_fn, PolyNorm) else self.act_fn(gate)
        return self.down_proj(gate * up * mask.to(up.dtype))

    def _neurons(self, up: torch.Tensor) -> torch.Tensor:
        """The numbers of the neurons in `up` (…, width): all, or the block that tensor parallelism left here."""
        total, width, first = self.config.intermediate_size, up.shape[-1], 0
        if width < total:
            mesh = self.down_proj.weight.device_mesh
            first = mesh.get_local_rank(mesh.ndim - 1) * -(-total // mesh.size(mesh.ndim - 1))
        return torch.arange(first, first + width, device=up.device)


class GDADecoderLayer(Qwen3DecoderLayer):
    """Attention and MLP, each after an RMSNorm and added to the residual stream."""

    def __init__(self, config: GDAConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.self_attn = ATTENTION_CLASSES[config.kv_layout](config, layer_idx)  # type: ignore[assignment]
        grows = config.masked_neurons is not None or config.is_new_layer(layer_idx)
        self.mlp = GDAGrowingMLP(config, layer_idx) if grows else LlamaMLP(config)  # type: ignore[assignment]
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention_type = config.layer_type(layer_idx)  # transformers before 5.4 reads it


@contextmanager
def _without_layers(config: GDAConfig) -> Iterator[None]:
    """For the initializers of Qwen3, which would build layers of their own."""
    fields = vars(config)  # setting it as an attribute would shorten the lists of a value for each layer
    num_layers, fields["num_hidden_layers"] = fields["num_hidden_layers"], 0
    try:
        yield
    finally:
        fields["num_hidden_layers"] = num_layers


class GDAPreTrainedModel(Qwen3PreTrainedModel):
    """What transformers must know of a GDA model to initialize, load, place and record it."""

    config: GDAConfig  # type: ignore[assignment]
    config_class = GDAConfig
    _no_split_modules = ["GDADecoderLayer"]
    _can_record_outputs = {"hidden_states": GDADecoderLayer, "attentions": GDAAttention}

    def __init__(self, config: GDAConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if type(config) not in MODEL_MAPPING:  # the code was loaded from a model's folder, without our package
            AutoModel.register(type(config), GDAModel)
        self.model_tags = ["grouped-differential-attention", "gda"]  # for the card of a model that is pushed

    def post_init(self) -> None:
        self._no_split_modules = ["GDADecoderLayer"]  # and not what was replaced
        super().post_init()
        by_token = self.config.lambda_type != "reparameterized"
        names = ["lambda_proj"] if by_token else ["lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"]
        self._keep_in_fp32_modules_strict = set(names)
        getattr(self, "dtype_plan", {}).update(dict.fromkeys(names, torch.float32))  # releases before 5.4 read this

    def set_growth_mask(self, value: float) -> None:
        """Set what the outputs of new heads, neurons and layers are multiplied by (arXiv 2305.02869).

        At 0 the model computes what it computed before it grew; at 1 new parts are like all others, and a saved model
        no longer mentions them. `GrowthMaskCallback` raises it from step to step of a Trainer.

        Raises:
            ValueError: if the value is not from 0 to 1, or nothing of the model is masked.
        """
        if self.config.growth_mask is None:
            raise ValueError("the model has no growth_mask: nothing of it is new; `gda grow --masked` adds new parts")
        if not 0 <= value <= 1:
            raise ValueError(f"the growth mask must be from 0 to 1, not {value!r}")
        self._set_fade(growth_mask=float(value))

    def set_lambda_anneal(self, value: float, target: float | None = None) -> None:
        """Set the progress a of annealing λ: layers subtract with (1 − a) · a · target + a · λ.

        At 0 nothing is subtracted; at 1 λ is that of the parameters, and a saved model no longer mentions the target.
        `LambdaAnnealCallback` raises it from step to step of a Trainer. A target begins to anneal, or replaces the one
        there is.

        Raises:
            ValueError: if the value is not from 0 to 1, the target is not finite, or there is none.
        """
        target = self.config.lambda_target if target is None else float(target)
        if target is None:
            raise ValueError("nothing is annealed yet; give the target, as in set_lambda_anneal(0.0, target=0.1)")
        if not 0 <= value <= 1:
            raise ValueError(f"λ must have come from 0 to 1 of its way, not {value!r}")
        if not abs(target) < torch.finfo(torch.float32).max:
            raise ValueError(f"the target of λ must be finite in float32, not {target!r}")
        self._set_fade(lambda_anneal=float(value), lambda_target=target)
        for module in self.modules():
            if isinstance(module, GDAAttention) and module.lambda_anneal is None:
                module.lambda_anneal = LambdaAnneal(module.config).to(module.o_proj.weight.device)
            elif isinstance(module, LambdaAnneal):
                module.target = target

    @torch.no_grad()
    def _set_fade(self, **fields: float) -> None:
        """Set fields of the config, of which a classifier's body has one of its own, and the tensors that follow."""
        for module in self.modules():
            if isinstance(module, Fade) and module.field in fields:
                module.value.fill_(fields[module.field])
            elif (config := getattr(module, "config", None)) is not None:
                vars(config).update(fields)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PolyNorm):
            init.constant_(module.weight, 1 / 3)
            init.zeros_(module.bias)
        elif isinstance(module, LambdaProjection):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, Fade):
            init.constant_(module.value, getattr(self.config, module.field))
        # Base and update give half of a dense projection's variance each, so that queries start as large as its.
        # With the base alone signal and noise maps would start equal, and zero updates would hide one factor from the
        # gradient of the other; with updates alone the roles would share nothing.
        elif isinstance(module, SharedBase):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range / 2**0.5)
        elif isinstance(module, HeadwiseUp):
            init.normal_(module.weight, mean=0.0, std=(2 * module.rank) ** -0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, GDAAttention) and self.config.lambda_type == "reparameterized":
            for vector in (module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2):
                init.normal_(vector, mean=0.0, std=0.1)  # arXiv 2410.05258, as in its authors' code


class GDAModel(GDAPreTrainedModel, Qwen3Model):
    """
    The GDA decoder without a head: token ids in, hidden states out. Arguments are those of `Qwen3Model.forward`.

    With `output_attentions=True` and the eager backend, `attentions` holds for each layer the *differential* maps
    (B, S, T, T_kv) of the S signal heads, signal − λ · noise: rows sum to 1 − λ and entries may be negative.

    Raises:
        ValueError: if a field of the config was changed to what cannot be.
    """

    def __init__(self, config: GDAConfig):
        config.validate_architecture()  # a field may have been changed since the config was made
        with _without_layers(config):
            super().__init__(config)
        self.layers = nn.ModuleList(GDADecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class GDAForCausalLM(GDAPreTrainedModel, Qwen3ForCausalLM):
    """
    A GDA decoder with a language-modelling head. Arguments and outputs are those of `Qwen3ForCausalLM.forward`:
    `labels` (B, T) are token ids, −100 where no loss is wanted. For `attentions`, see `GDAModel`.
    """

    def __init__(self, config: GDAConfig):
        with torch.device("meta"), _without_layers(config):  # its body and head are replaced
            super().__init__(config)
        self.model = GDAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class GDAForSequenceClassification(GenericForSequenceClassification, GDAPreTrainedModel):
    """A GDA decoder with a classifier on the last token that is not padding."""


class GDAForTokenClassification(GenericForTokenClassification, GDAPreTrainedModel):
    """A GDA decoder with a classifier on every token."""


class GDAForQuestionAnswering(GenericForQuestionAnswering, GDAPreTrainedModel):
    """A GDA decoder with a head for the start and the end of an answer span."""
