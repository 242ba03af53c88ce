# Copyright 2026 the authors of Grouped Differential Attention. Apache License 2.0, see
# https://www.apache.org/licenses/LICENSE-2.0. This file is of grouped-differential-attention 0.1.0, which saves it
# beside a model's weights, so that they load with transformers alone.
"""Grouped Differential Attention models: the decoder, the language model and the classification heads."""

from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_gda import (
    ATTENTION_CLASSES,
    GDAAttention,
    GrowthMask,
    HeadwiseUp,
    LambdaAnneal,
    LambdaProjection,
    SharedBase,
)
from .configuration_gda import GDAConfig

MASK_FUNCTIONS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


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


class GDAMLP(nn.Module):
    """Llama's gated MLP, with PolyNorm among its activations."""

    def __init__(self, config: GDAConfig, layer_idx: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = PolyNorm() if config.hidden_act == "poly_norm" else ACT2FN[config.hidden_act]
        self.config = config
        has_new_neurons = config.masked_neurons is not None and not config.is_new_layer(layer_idx)
        self.growth_mask = GrowthMask(config) if has_new_neurons else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.growth_mask is None:  # in one expression: a name would keep the gate in memory
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        gate, up = self.gate_proj(x), self.up_proj(x)
        assert self.config.masked_neurons is not None  # there would be no mask
        first_new = self.config.intermediate_size - self.config.masked_neurons
        mask = self.growth_mask(self._neurons(up) >= first_new)
        gate = self.act_fn(gate, mask) if isinstance(self.act_fn, PolyNorm) else self.act_fn(gate)
        return self.down_proj(gate * up * mask.to(up.dtype))

    def _neurons(self, up: torch.Tensor) -> torch.Tensor:
        """The numbers of the neurons in `up` (…, width): all, or the block that tensor parallelism left here."""
        total, width, first = self.config.intermediate_size, up.shape[-1], 0
        if width < total:
            mesh = self.down_proj.weight.device_mesh  # type: ignore[attr-defined]
            first = mesh.get_local_rank(mesh.ndim - 1) * -(-total // mesh.size(mesh.ndim - 1))
        return torch.arange(first, first + width, device=up.device)


class GDADecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each after an RMSNorm and added to the residual stream."""

    def __init__(self, config: GDAConfig, layer_idx: int):
        super().__init__()
        self.self_attn = ATTENTION_CLASSES[config.kv_layout](config, layer_idx)
        self.mlp = GDAMLP(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.growth_mask = GrowthMask(config) if config.is_new_layer(layer_idx) else None

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, hidden)
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        # In one expression: a name would keep what attention gives in memory during the MLP.
        hidden_states = hidden_states + self._masked(
            self.self_attn(
                self.input_layernorm(hidden_states),
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )[0]
        )
        return hidden_states + self._masked(self.mlp(self.post_attention_layernorm(hidden_states)))

    def _masked(self, branch: torch.Tensor) -> torch.Tensor:
        """What a branch adds to the residual stream: all of it, except in a layer that is new."""
        return branch if self.growth_mask is None else branch * self.growth_mask.value


class GDAPreTrainedModel(PreTrainedModel):
    """What transformers must know of a GDA model to initialize, load, place and record it."""

    config: GDAConfig
    config_class = GDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GDADecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": GDADecoderLayer,
        "attentions": GDAAttention,
    }

    def __init__(self, config: GDAConfig, *args: Any, **kwargs: Any):
        config.validate_architecture()  # a field may have been changed since the config was made
        super().__init__(config, *args, **kwargs)
        if type(config) not in MODEL_MAPPING:  # the code was loaded from a model's folder, without our package
            AutoModel.register(type(config), GDAModel)
        self.model_tags = ["grouped-differential-attention", "gda"]  # for the card of a model that is pushed
        reparameterized = ["lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"]
        self._keep_in_fp32_modules_strict = (
            reparameterized if config.lambda_type == "reparameterized" else ["lambda_proj"]
        )

    @torch.no_grad()
    def set_growth_mask(self, value: float) -> None:
        """Set what the outputs of new heads, neurons and layers are multiplied by (arXiv 2305.02869).

        At 0 the model computes what it computed before it grew. At 1 new parts are like all others, and a saved model
        says no more of them. `GrowthMaskCallback` raises it from step to step of a Trainer.

        Args:
            value: From 0 to 1.

        Raises:
            ValueError: if the value is another, or nothing of the model is masked.
        """
        if self.config.growth_mask is None:
            raise ValueError(
                "the model has no growth_mask: it has no masked heads, neurons or layers; `gda grow --masked` adds some"
            )
        if not 0 <= value <= 1:
            raise ValueError(f"the growth mask must be from 0 to 1, not {value!r}")
        for module in self.modules():
            if isinstance(module, GrowthMask):
                module.value.fill_(value)
            elif (config := getattr(module, "config", None)) is not None:  # a classifier's body has one of its own
                config.growth_mask = float(value)

    @torch.no_grad()
    def set_lambda_anneal(self, value: float, target: float | None = None) -> None:
        """Set how far λ has come on its way from 0, over a target, to what is learned.

        At a the layers subtract by (1 − a) · a · target + a · λ: at 0 by nothing, at 1 by the λ of their parameters.
        A saved model then says no more of it. `LambdaAnnealCallback` raises it from step to step of a Trainer.

        Args:
            value: a, from 0 to 1.
            target: Begins to anneal, or changes what is annealed over; else it stays.

        Raises:
            ValueError: if the value is another, the target is no number, or there is none.
        """
        target = self.config.lambda_target if target is None else float(target)
        if target is None:
            raise ValueError("nothing is annealed yet; give the target, as in set_lambda_anneal(0.0, target=0.1)")
        if not 0 <= value <= 1:
            raise ValueError(f"λ must have come from 0 to 1 of its way, not {value!r}")
        if not abs(target) < torch.finfo(torch.float32).max:
            raise ValueError(f"the target of λ must be finite in float32, not {target!r}")
        for module in self.modules():
            if (config := getattr(module, "config", None)) is not None:  # a classifier's body has one of its own
                config.lambda_anneal, config.lambda_target = float(value), target
            if isinstance(module, GDAAttention):
                if module.lambda_anneal is None:
                    module.lambda_anneal = LambdaAnneal(module.config).to(module.o_proj.weight.device)
                module.lambda_anneal.target = target
                module.lambda_anneal.value.fill_(value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PolyNorm):
            init.constant_(module.weight, 1 / 3)
            init.zeros_(module.bias)
        elif isinstance(module, LambdaProjection):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, GrowthMask):
            init.constant_(module.value, self.config.growth_mask or 0.0)
        elif isinstance(module, LambdaAnneal):
            init.constant_(module.value, self.config.lambda_anneal or 0.0)
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


class GDAModel(GDAPreTrainedModel):
    """The GDA decoder without a head: token ids in, hidden states out."""

    def __init__(self, config: GDAConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(GDADecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Run the decoder. Arguments are those of `LlamaModel.forward`.

        With `output_attentions=True` and the eager backend, `attentions` holds for each layer the *differential* maps
        (B, S, T, T_kv) of the S signal heads, signal − λ · noise: rows sum to 1 − λ and entries may be negative.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("GDAModel takes exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)

        masks = self._attention_masks(attention_mask, inputs_embeds, past_key_values, position_ids)
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=masks[self.config.layer_type(index)],
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _attention_masks(
        self,
        attention_mask: torch.Tensor | dict[str, Any] | None,
        inputs_embeds: torch.Tensor,
        past_key_values: Cache | None,
        position_ids: torch.Tensor,
    ) -> dict[str, Any]:
        """One mask for each type of layer there is; `generate` hands them in ready-made."""
        if isinstance(attention_mask, dict):
            return attention_mask
        return {
            layer_type: MASK_FUNCTIONS[layer_type](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            for layer_type in dict.fromkeys(self.config.layer_types or [])
        }


class GDAForCausalLM(GDAPreTrainedModel, GenerationMixin):
    """A GDA decoder with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GDAConfig):
        super().__init__(config)
        self.model = GDAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Run the model. Arguments and outputs are those of `LlamaForCausalLM.forward`: `labels` (B, T) are token ids,
        −100 where no loss is wanted; `logits` are (B, T, vocab_size). For `attentions`, see `GDAModel.forward`.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        assert hidden_states is not None
        logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class GDAForSequenceClassification(GenericForSequenceClassification, GDAPreTrainedModel):
    """A GDA decoder with a classifier on the last token that is not padding."""


class GDAForTokenClassification(GenericForTokenClassification, GDAPreTrainedModel):
    """A GDA decoder with a classifier on every token."""


class GDAForQuestionAnswering(GenericForQuestionAnswering, GDAPreTrainedModel):
    """A GDA decoder with a head for the start and the end of an answer span."""


__all__ = [
    "GDAForCausalLM",
    "GDAForQuestionAnswering",
    "GDAForSequenceClassification",
    "GDAForTokenClassification",
    "GDAModel",
    "GDAPreTrainedModel",
]
