# Copyright 2026 the authors of Grouped Differential Attention. Apache License 2.0, see
# https://www.apache.org/licenses/LICENSE-2.0. This file is of grouped-differential-attention 0.1.0, which saves it
# beside a model's weights, so that they load with transformers alone.
"""Grouped Differential Attention models: the decoder, the language model and the classification heads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, Qwen3ForCausalLM, Qwen3Model, Qwen3PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm

from .attention_gda import ATTENTION_CLASSES, Fade, GDAAttention, HeadwiseUp, LambdaProjection, SharedBase
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
        """Activations of x (…, width). A mask (width,) weighs the neurons in the means."""
        wide = x.float()
        powers = (wide**3, wide**2, wide)
        normed = (z * torch.rsqrt(self._mean(z.pow(2), mask) + self.eps) for z in powers)
        return (sum(w * z for w, z in zip(self.weight, normed, strict=True)) + self.bias).to(x.dtype)

    @staticmethod
    def _mean(z: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return z.mean(-1, keepdim=True) if mask is None else (z * mask).mean(-1, keepdim=True) / mask.mean()


ACT2FN.setdefault("poly_norm", PolyNorm)  # Llama's MLP looks it up by this name


class GDAGrowingMLP(LlamaMLP):
    """Llama's MLP in masked growth: new neurons, or the output of a new layer, are multiplied by `fade`."""

    def __init__(self, config: GDAConfig, layer_idx: int):
        super().__init__(config)
        self.fade = Fade(config)
        self.is_new = config.is_new_layer(layer_idx)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_new:
            return super().forward(x) * self.fade.value
        gate, up = self.gate_proj(x), self.up_proj(x)
        first_new = self.config.intermediate_size - (self.config.masked_neurons or 0)
        mask = self.fade(self._neurons(up) >= first_new)
        gate = self.act_fn(gate, mask) if self.config.hidden_act == "poly_norm" else self.act_fn(gate)
        return self.down_proj(gate * up * mask.to(up.dtype))

    def _neurons(self, up: torch.Tensor) -> torch.Tensor:
        """Indices of the neurons in `up` (…, width): all, or this rank's block under tensor parallelism."""
        total, width, first = self.config.intermediate_size, up.shape[-1], 0
        if width < total:
            mesh = self.down_proj.weight.device_mesh
            first = mesh.get_local_rank(mesh.ndim - 1) * -(-total // mesh.size(mesh.ndim - 1))
        return torch.arange(first, first + width, device=up.device)


class GDADecoderLayer(Qwen3DecoderLayer):
    """Attention and MLP, each after an RMSNorm and added to the residual stream; blended in if it is a new copy."""

    def __init__(self, config: GDAConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.self_attn = ATTENTION_CLASSES[config.kv_layout](config, layer_idx)  # type: ignore[assignment]
        grows = config.masked_neurons is not None or config.is_new_layer(layer_idx)
        self.mlp = GDAGrowingMLP(config, layer_idx) if grows else LlamaMLP(config)  # type: ignore[assignment]
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention_type = config.layer_type(layer_idx)  # transformers before 5.4 reads it
        self.fade = Fade(config) if config.is_blended_layer(layer_idx) else None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = super().forward(hidden_states, *args, **kwargs)
        return output if self.fade is None else hidden_states.lerp(output, self.fade.value.to(output.dtype))


@contextmanager
def _without_layers(config: GDAConfig) -> Iterator[None]:
    """Keep the initializers of Qwen3 from building layers of their own, and from switching their checkpointing on."""
    fields = vars(config)  # setting the attribute would shorten the lists with a value per layer
    names = ("num_hidden_layers", "gradient_checkpointing")
    kept: dict[str, Any] = {name: fields.pop(name) for name in names if name in fields}
    fields["num_hidden_layers"] = 0
    try:
        yield
    finally:
        fields.update(kept)


class GDAPreTrainedModel(Qwen3PreTrainedModel):
    """Tells transformers how to initialize, load, place and record a GDA model."""

    config: GDAConfig  # type: ignore[assignment]
    config_class = GDAConfig
    _no_split_modules = ["GDADecoderLayer"]
    _can_record_outputs = {"hidden_states": GDADecoderLayer, "attentions": GDAAttention}

    def __init__(self, config: GDAConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        # Bundled code runs without our package, which would register it, and its config may be another folder's class.
        if type(config).__name__ == GDAConfig.__name__ and type(config) not in MODEL_MAPPING:
            AutoModel.register(type(config), GDAModel)
        self.model_tags = ["grouped-differential-attention", "gda"]  # for the model card

    def post_init(self) -> None:
        # Without Qwen3's layer, which __init__ replaced.
        self._no_split_modules = sorted({"GDADecoderLayer", *(type(self)._no_split_modules or ())})
        super().post_init()
        by_token = self.config.lambda_type != "reparameterized"
        names = ("lambda_proj",) if by_token else GDAAttention.lambda_vectors
        self._keep_in_fp32_modules_strict = {*names, *(self._keep_in_fp32_modules_strict or ())}
        getattr(self, "dtype_plan", {}).update(dict.fromkeys(names, torch.float32))  # releases before 5.4 read this

    @torch.no_grad()
    def set_fade(self, value: float, lambda_target: float | None = None) -> None:
        """Set how far new heads, neurons and layers, a head norm or λ are faded in.

        At 0 new parts have no effect, and with a `lambda_target`, which shifts λ while it fades in, nothing is
        subtracted. At 1 the model is an ordinary one, and is saved as such.

        Raises:
            ValueError: if nothing is faded in, or a value is out of range.
        """
        target = self.config.lambda_target if lambda_target is None else float(lambda_target)
        if self.config.fade is None and target is None:
            raise ValueError("nothing is faded in: pass lambda_target, or start with `gda grow --masked`, for example")
        if not 0 <= value <= 1:
            raise ValueError(f"fade must be from 0 to 1, not {value!r}")
        if target is not None and not abs(target) < torch.finfo(torch.float32).max:
            raise ValueError(f"lambda_target must be finite in float32, not {target!r}")
        for module in self.modules():  # a classifier's body has a config of its own
            if (config := getattr(module, "config", None)) is not None:
                config.fade, config.lambda_target = float(value), target
        for module in list(self.modules()):
            if isinstance(module, Fade):
                module.value.fill_(value)
            elif isinstance(module, GDAAttention) and module.fade is None:
                module.fade = Fade(module.config).to(module.o_proj.weight.device)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if type(module).__name__ == "PolyNorm":  # perhaps that of another model's folder, which registered it first
            init.constant_(module.weight, 1 / 3)
            init.zeros_(module.bias)
        elif isinstance(module, LambdaProjection):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, Fade):
            init.constant_(module.value, float(self.config.fade or 0.0))
        # Base and update contribute half of a dense projection's variance each. With the base alone, signal and noise
        # maps would start equal, and zero updates would hide one factor from the gradient of the other; with updates
        # alone, the roles would share nothing.
        elif isinstance(module, SharedBase):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range / 2**0.5)
        elif isinstance(module, HeadwiseUp):
            init.normal_(module.weight, mean=0.0, std=(2 * module.rank) ** -0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, GDAAttention) and self.config.lambda_type == "reparameterized":
            for name in module.lambda_vectors:
                init.normal_(getattr(module, name), mean=0.0, std=0.1)  # arXiv 2410.05258, as in its authors' code


class GDAModel(GDAPreTrainedModel, Qwen3Model):
    """
    The GDA decoder without a head: token ids in, hidden states out. Arguments are those of `Qwen3Model.forward`.

    With `output_attentions=True` and the eager backend, `attentions` holds for each layer the *differential* maps
    (B, S, T, T_kv) of the S signal heads, signal − λ · noise: rows sum to 1 − λ and entries may be negative.

    Raises:
        ValueError: if a field of the config was changed to an impossible value.
    """

    def __init__(self, config: GDAConfig):
        config.validate_architecture()  # fields can change after construction
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
        config.validate_architecture()  # before the body of a Qwen3, which would fail in its own way
        with torch.device("meta"), _without_layers(config):  # its body and head are replaced
            super().__init__(config)
        self.model = GDAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# For label smoothing, the Trainer shifts the labels only of classes that are named here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("gda", "GDAForCausalLM")


class GDAForSequenceClassification(GenericForSequenceClassification, GDAPreTrainedModel):
    """A GDA decoder with a classifier on the last token that is not padding."""


class GDAForTokenClassification(GenericForTokenClassification, GDAPreTrainedModel):
    """A GDA decoder with a classifier on every token."""


class GDAForQuestionAnswering(GenericForQuestionAnswering, GDAPreTrainedModel):
    """A GDA decoder with a head for the start and the end of an answer span."""
