# Copyright 2026 the authors of Grouped Differential Attention. Apache License 2.0, see
# https://www.apache.org/licenses/LICENSE-2.0. This file is of grouped-differential-attention 0.1.0, which saves it
# beside a model's weights, so that they load with transformers alone.
"""The configuration of Grouped Differential Attention models."""

import copy
import dataclasses
import math
import os
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin

import torch
from transformers import PretrainedConfig  # transformers 4 knows no other spelling
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

KV_LAYOUTS = ("shared", "paired")
LAMBDA_TYPES = ("reparameterized", "sigmoid", "tanh")
LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")

# What says of RoPE: in transformers 5 the first, in transformers 4 the others.
ROPE_ARGUMENTS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")

# Fields of a model under masked growth; None in every other.
GROWTH_FIELDS = ("growth_mask", "masked_signal_heads", "masked_neurons", "masked_layers")
# Fields of a model whose λ is on its way to what it has learned; None in every other.
ANNEAL_FIELDS = ("lambda_anneal", "lambda_target")

# Fields that no other model family has: an unknown argument that resembles one of them is a typo, not an
# attribute that somebody else's tool wants to keep in config.json.
OWN_FIELDS = (
    "num_noise_heads",
    "kv_layout",
    "lambda_type",
    "lambda_init",
    "lambda_init_offset",
    "head_norm",
    "head_norm_eps",
    "qk_norm",
    "qk_rank",
    "attention_out_bias",
    *GROWTH_FIELDS,
    *ANNEAL_FIELDS,
)
# What config.json says of the code saved beside it: by Auto class, file and class.
AUTO_MAP = {
    "AutoConfig": "configuration_gda.GDAConfig",
    "AutoModel": "modeling_gda.GDAModel",
    "AutoModelForCausalLM": "modeling_gda.GDAForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_gda.GDAForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_gda.GDAForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_gda.GDAForTokenClassification",
}
# What follows from other fields. (PreTrainedConfig would set it, and fail with an AttributeError.)
DERIVED = ("num_signal_heads", "signal_noise_ratio", "signal_group_size", "value_width", "factored_projections")
# Of what else belongs to the class and is no field, what config.json may say.
GIVEN_BESIDE_FIELDS = ("model_type", "name_or_path", "num_labels", "output_attentions", "torch_dtype")
# What says of a model to transformers that it has parts that a GDA model has not.
FOREIGN_PARTS = ("per_layer_config", "text_config", "decoder", "generator", "text_encoder", "mlp_layer_types")

# Far above every model that there is. Beyond them a number is a mistake, and whoever took it for true would count its
# layers and its frequencies, or overflow.
MAX_LAYERS = 10_000
MAX_HEAD_DIM = 65_536
MAX_LABELS = 100_000  # a map of them is copied each time that transformers shows a config
MAX_SIZE = 2**30
MAX_NESTING = 20  # of lists and dicts; Python's own limit ends in a RecursionError
MAX_SHOWN = 200  # characters of a value, in a message


class GDAConfig(PretrainedConfig):
    r"""
    Configuration of a Grouped Differential Attention model (arXiv 2510.06949).

    A layer has `num_attention_heads` query heads: `num_noise_heads` of them draw noise maps, the others signal maps.
    Signal head *i* gives ``softmax(q_i kᵀ) v − λ_i · softmax(q_noise(i) kᵀ) v``; each noise map serves a group of
    `signal_noise_ratio` signal heads. Everything that is not listed here means what it means in `LlamaConfig`.

    Args:
        num_attention_heads (`int`, defaults to 40):
            Query heads of a layer, signal **and** noise. With N noise heads, the rows of `q_proj` are N groups of
            ``[signal_1 … signal_r, noise]``.
        num_noise_heads (`int`, defaults to 8):
            Noise query heads N. The S = num_attention_heads − N signal heads must be a multiple of N.
        num_key_value_heads (`int`, defaults to 8):
            KV heads G; the KV cache is (B, G, T, head_dim) in both layouts. Shared: G divides S, and N and G divide
            one another one way or the other. Paired: G counts both members of each pair, and the G / 2 pairs divide
            both S and N.
        kv_layout (`"shared"` or `"paired"`, defaults to `"shared"`):
            `"shared"`: signal and noise heads of a group read the same K and V (DIFF Transformer V2, Motif-3).
            `"paired"`: k_proj holds pairs (signal key, noise key), v_proj pairs of slabs that are both read by signal
            and noise, so that values are 2 · head_dim wide (DIFF Transformer V1, Motif-2).
        lambda_type (`"reparameterized"`, `"sigmoid"` or `"tanh"`, defaults to `"reparameterized"`):
            `"reparameterized"`: one scalar a layer, λ = exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) + λ_init (arXiv 2410.05258).
            `"sigmoid"`: λ = σ(W_λ x), by token and signal head (DIFF Transformer V2).
            `"tanh"`: λ = tanh(W_λ x), which can start at exactly 0 and still learn.
        lambda_init (`float`, `list[float]` or `None`, defaults to `None`):
            λ_init: one value, one value a layer, or `None` for the schedule 0.8 − 0.6 · exp(−0.3 · (layer + offset)).
        lambda_init_offset (`int` or `float`, defaults to 0):
            Offset of that schedule: 0 in the DIFF Transformer, −1 in Motif-2.
        head_norm (`bool`, defaults to `False`):
            RMSNorm over each signal head's output, weight `subln`, then × (1 − λ_init of the layer).
        head_norm_eps (`float`, defaults to 1e-5): epsilon of that norm.
        qk_norm (`bool`, defaults to `False`): RMSNorm over head_dim of queries and keys before RoPE, as in Qwen3.
        qk_rank (`int`, *optional*):
            `None`: dense projections. A rank R from 1 to min(head_dim, hidden_size): those of the Shared DIFF
            Transformer (arXiv 2501.17900). The query weight of a role k of a group, W_base + P_k R_k, is a base that
            the roles signal_1 … signal_r and noise share, and an update of rank R. In place of `q_proj` there are
            `q_base` (N · head_dim, hidden), a block of rows for each group, `q_down` (H · R, hidden), the R_k of each
            head in the order of `q_proj`, and `q_up` (H · head_dim, R), their P_k, with the bias if there is one.
            With `kv_layout="paired"` also `k_base`, `k_down` and `k_up`: a group is a pair, its roles signal and noise.
            With n roles there are fewer parameters than in dense projections for R below
            (1 − 1/n) · head_dim · hidden_size / (hidden_size + head_dim).
        growth_mask (`float`, *optional*):
            While masked growth (arXiv 2305.02869) is under way, what the outputs of new parts are multiplied by, from
            0, where the model computes what it computed before it grew, to 1. `model.set_growth_mask` changes it in
            a model. At 1 new parts are parts like any other, so this field and the next three are then saved as
            `None`, which is what they are in a model that is not growing.
        masked_signal_heads (`int`, *optional*):
            Of each `signal_group_size` signal heads that share keys, values and a noise head, how many are new: the
            last ones. Their outputs are masked after the head norm.
        masked_neurons (`int`, *optional*):
            How many of the `intermediate_size` neurons of each MLP are new: the last ones. They are masked after the
            activation, and weigh as much in the means of PolyNorm.
        masked_layers (`list[int]`, *optional*):
            Which layers are new, counted from 0. What they add to the residual stream is masked, and that once: none
            of their heads and neurons is masked again.
        lambda_anneal (`float`, *optional*):
            While λ is annealed, how far that has come: at a, from 0 to 1, the layers subtract by
            (1 − a) · a · lambda_target + a · λ, where λ is what their parameters say. `model.set_lambda_anneal` changes
            it in a model. At 1 this is λ, so this field and the next are then saved as `None`, which is what they are
            where nothing is annealed.
        lambda_target (`float`, *optional*):
            What λ is drawn to on its way, most of all at half of it.
        head_dim (`int`, defaults to 128): width of a query, key and value head; independent of `hidden_size`.
        hidden_act (`str`, defaults to `"silu"`): as in Llama, or `"poly_norm"` (arXiv 2411.03884).
        attention_bias (`bool`, defaults to `False`): whether the projections of queries, keys and values have biases.
        attention_out_bias (`bool`, *optional*):
            Whether `o_proj` has one; by default as `attention_bias`, as in Llama. In Qwen2 it has none, and those have.
        attention_dropout (`float`, defaults to 0.0):
            Must be 0: the published equations define no dropout for the difference of two attention maps.
        sliding_window (`int`, *optional*):
            How many keys a sliding layer sees, as in Mistral. (With a window of 1, which is only the token itself, the
            caches of transformers 5.23 keep too many keys: pass `use_cache=False`.)
        layer_types (`list[str]`, *optional*):
            `"full_attention"` or `"sliding_attention"` for each layer; by default sliding everywhere if
            `sliding_window` is given, full otherwise.

    Raises:
        ValueError: for every impossible combination, naming the field, the rule and the value.

    Example:
        >>> config = GDAConfig()  # the shape of Llama-3-8B with one noise head added to each KV group
        >>> config.num_signal_heads, config.num_noise_heads, config.signal_noise_ratio
        (32, 8, 4)
    """

    model_type: ClassVar[str] = "gda"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    default_theta: ClassVar[float] = 500000.0  # type: ignore[misc]
    base_model_pp_plan: ClassVar[dict[str, Any]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 40
    num_noise_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 128
    kv_layout: str = "shared"
    lambda_type: str = "reparameterized"
    lambda_init: int | float | list[int | float] | None = None
    lambda_init_offset: int | float = 0
    head_norm: bool = False
    head_norm_eps: int | float = 1e-5
    qk_norm: bool = False
    qk_rank: int | None = None
    growth_mask: int | float | None = None
    masked_signal_heads: int | None = None
    masked_neurons: int | None = None
    masked_layers: list[int] | None = None
    lambda_anneal: int | float | None = None
    lambda_target: int | float | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: int | float = 0.02
    rms_norm_eps: int | float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    def __init__(self, **kwargs: Any):
        rope = _one_rope(**{name: kwargs.pop(name, None) for name in ROPE_ARGUMENTS})
        fields = {name: kwargs.pop(name, getattr(type(self), name)) for name in FIELDS} | {"rope_parameters": rope}
        for name, value in kwargs.items():
            self._refuse_argument(name, value)
        for name, value in fields.items():
            setattr(self, name, value)
        _require(_is_size(self.num_hidden_layers, MAX_LAYERS), *_size_rule(self, "num_hidden_layers", MAX_LAYERS))
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        self.validate_architecture()
        self.base_model_tp_plan = self._tensor_parallel_plan()
        # transformers 4 sets these itself, to its own defaults where they are not passed on.
        passed_on = {name: fields[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")}
        try:
            super().__init__(**passed_on, **kwargs)
        except Exception as error:  # each release has exceptions of its own
            raise ValueError(f"GDAConfig: {_in_short(error.__cause__ or error)}") from error

    def __setattr__(self, name: str, value: Any) -> None:
        _check_value(name, value)
        super().__setattr__(name, value)

    @property
    def rope_theta(self) -> float:
        """The base of RoPE, where transformers 4 looks for it."""
        return (self.rope_parameters or {}).get("rope_theta", self.default_theta)

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """RoPE's scaling, where transformers 4 looks for it: None where there is none."""
        rope = {key: value for key, value in (self.rope_parameters or {}).items() if key != "rope_theta"}
        return None if rope.get("rope_type", "default") == "default" else rope

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        self.rope_parameters = _one_rope(None, rope_scaling=value, rope_theta=self.rope_theta)

    def _refuse_argument(self, name: str, value: Any) -> None:
        """Raise ValueError for an argument that is no field and cannot be kept for whoever wants it in config.json."""
        if name == "noise_heads":
            raise ValueError("GDAConfig has no field `noise_heads`; did you mean `num_noise_heads`?")
        _require(name not in DERIVED, name, "follows from other fields and cannot be given", value)
        if resembled := get_close_matches(name, OWN_FIELDS, n=1, cutoff=0.85):
            raise ValueError(f"GDAConfig has no field `{_named(name)}`; did you mean `{resembled[0]}`?")
        inherited = [field.name for field in dataclasses.fields(self)] if dataclasses.is_dataclass(self) else []
        of_the_class = hasattr(type(self), name) and name not in (*inherited, *GIVEN_BESIDE_FIELDS, *FOREIGN_PARTS)
        _require(not of_the_class, name, "belongs to the class, and cannot be given", value)
        undecided = name in ("dtype", "torch_dtype") and value == "auto"  # where there are no weights to decide
        _require(not undecided, "dtype", "must name a floating-point type of torch", value)
        _check_value(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a dictionary of fields, as config.json holds them: as `PretrainedConfig.from_dict`.

        Raises:
            ValueError: naming the field that cannot be as it is.
        """
        if not isinstance(config_dict, dict):
            raise ValueError(f"GDAConfig is made of a dictionary of fields; got {_shown(config_dict)}.")
        _require("self" not in config_dict, "self", "is no field", config_dict.get("self"))
        return super().from_dict(_with_fewer_layers(config_dict, kwargs.get("num_hidden_layers")), **kwargs)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GDAConfig":
        """The configuration of a known shape.

        Args:
            name: "motif-2-12.7b", "motif-2.6b", "diff-v1", "diff-v2", "diffllama", "llama-3-8b-expand",
                "llama-3.2-1b-expand" or "smollm2-135m-expand". The last three are what expansion makes of these
                models. Not every number of the others could be read at its source: docs/family.md names the guesses.
            changes: Fields to give another value.

        Raises:
            ValueError: for an unknown name, with those that resemble it, or fields that cannot be.

        Example:
            >>> GDAConfig.preset("motif-2-12.7b", num_hidden_layers=2).signal_noise_ratio
            4
        """
        try:
            presets = import_module(".presets", __package__).PRESETS
        except ModuleNotFoundError:
            raise ImportError("presets belong to the package: pip install grouped-differential-attention") from None
        if name not in presets:
            resembling = get_close_matches(name.lower(), presets, n=3, cutoff=0.5)
            meant = f"did you mean {' or '.join(resembling)}?" if resembling else f"there are {', '.join(presets)}"
            raise ValueError(f"GDAConfig has no preset {name!r}; {meant}")
        return cls(**(copy.deepcopy(presets[name]) | changes))

    @property
    def num_signal_heads(self) -> int:
        """Signal query heads S = num_attention_heads − num_noise_heads."""
        return self.num_attention_heads - self.num_noise_heads

    @property
    def signal_noise_ratio(self) -> int:
        """Signal heads for each noise head, r = S / N."""
        return self.num_signal_heads // self.num_noise_heads

    @property
    def signal_group_size(self) -> int:
        """Signal heads that share keys, values and a noise head: they stand side by side in each group."""
        groups = self.num_noise_heads
        if self.kv_layout == "shared":  # one noise head may serve several KV heads; paired, it is never so
            groups = max(groups, self.num_key_value_heads)
        return self.num_signal_heads // groups

    @property
    def value_width(self) -> int:
        """Width of a head's value: head_dim (shared) or 2 · head_dim (paired)."""
        return self.head_dim if self.kv_layout == "shared" else 2 * self.head_dim

    @property
    def factored_projections(self) -> dict[str, int]:
        """Projections that are a base and updates of rank `qk_rank`, with the number of roles that share a base.

        None of them, `q`, or with paired keys `q` and `k`.
        """
        if self.qk_rank is None:
            return {}
        queries = {"q": self.signal_noise_ratio + 1}
        return queries if self.kv_layout == "shared" else queries | {"k": 2}

    def is_new_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` is new: it is then masked as a whole, and none of its heads and neurons again."""
        return self.masked_layers is not None and layer_idx in self.masked_layers

    def layer_type(self, layer_idx: int) -> str:
        """`"full_attention"` or `"sliding_attention"`, for layer `layer_idx`."""
        assert self.layer_types is not None  # filled in at construction
        return self.layer_types[layer_idx]

    def layer_lambda_init(self, layer_idx: int) -> float:
        """λ_init of layer `layer_idx`, counted from 0 (arXiv 2410.05258, section 2.1)."""
        if self.lambda_init is None:
            return 0.8 - 0.6 * math.exp(-0.3 * (layer_idx + self.lambda_init_offset))
        if isinstance(self.lambda_init, list):
            return float(self.lambda_init[layer_idx])
        return float(self.lambda_init)

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """Tensor-parallel plan. Columns of q_proj are cut between groups, so each rank holds whole groups."""
        attention = "layers.*.self_attn"
        plan = {f"{attention}.{name}": "colwise" for name in self._input_projections()}
        plan[f"{attention}.o_proj"] = "rowwise"
        if self.hidden_act != "poly_norm":  # a norm over the MLP's whole width, so it stays whole on every rank
            plan |= {f"layers.*.mlp.{name}_proj": "colwise" for name in ("gate", "up")}
            plan["layers.*.mlp.down_proj"] = "rowwise"
        # What follows is whole on every rank but sees only the rank's heads, so its gradient is summed over ranks.
        shared_by_heads = ["subln"] * self.head_norm + ["q_norm", "k_norm"] * self.qk_norm
        plan |= {f"{attention}.{name}": "replicated_with_grad_allreduce" for name in shared_by_heads}
        if self.lambda_type == "reparameterized":
            plan[attention] = "replicated_with_grad_allreduce"
        else:
            plan[f"{attention}.lambda_proj"] = "colwise"
        return plan

    @property
    def base_model_fsdp_plan(self) -> dict[Any, str]:  # type: ignore[override]
        """FSDP2 plan. λ vectors are float32 in models of any dtype, and what FSDP2 gathers together has one dtype."""
        plan = dict(getattr(PretrainedConfig, "base_model_fsdp_plan", None) or {})  # releases before 5.14 have none
        if self.lambda_type == "reparameterized":
            modules = [*self._input_projections(), "o_proj"] + ["subln"] * self.head_norm
            modules += ["q_norm", "k_norm"] * self.qk_norm
            plan |= {f"layers.*.self_attn.{name}": "free_full_weight" for name in modules}
        return plan

    def _input_projections(self) -> list[str]:
        """The modules that make queries, keys and values; their rows are those of groups, pairs or heads, in order."""
        factored = [f"{name}_{part}" for name in self.factored_projections for part in ("base", "down", "up")]
        return factored + [f"{name}_proj" for name in "qkv" if name not in self.factored_projections]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values. What has come to its end is left out: a 1 masks and anneals nothing."""
        fields = super().to_dict()
        if self.growth_mask == 1:
            fields |= dict.fromkeys(GROWTH_FIELDS)
        if self.lambda_anneal == 1:
            fields |= dict.fromkeys(ANNEAL_FIELDS)
        return fields

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json says: RoPE and dtype also in the words of transformers 4, which other readers know."""
        fields = super().to_diff_dict()
        fields |= {"rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling}
        return fields | ({"torch_dtype": fields["dtype"]} if "dtype" in fields else {})

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, *, bundle_code: bool = True, **kwargs: Any
    ) -> None:
        """Write config.json and, beside it, the code of the model: as `PretrainedConfig.save_pretrained`.

        With `trust_remote_code=True` the folder then loads where this package is not installed. Saving a model comes
        here too, whatever became of its class on the way (FSDP2 swaps it for one of its own).

        Args:
            save_directory: The folder; made if it is not there.
            push_to_hub: Push the folder as well.
            bundle_code: Whether to write the code.
            kwargs: As in `PretrainedConfig.save_pretrained`.
        """
        if type(self) is GDAConfig:  # a class made from it has code of its own, which is not known here
            vars(self).pop("auto_map", None)
            if bundle_code:
                self.auto_map = self._save_code(save_directory)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def _save_code(self, folder: str | os.PathLike) -> dict[str, str]:
        """Copy the files of model and config into `folder`, and return the `auto_map` that goes with them."""
        from transformers import MODEL_MAPPING  # imports transformers' modelling code, which takes seconds

        os.makedirs(folder, exist_ok=True)
        has_model = type(self) in MODEL_MAPPING
        if has_model:
            custom_object_save(MODEL_MAPPING[type(self)], folder)
        custom_object_save(GDAConfig, folder)  # the last, for it takes the place of the bridge beside the model
        return dict(AUTO_MAP) if has_model else {"AutoConfig": AUTO_MAP["AutoConfig"]}

    def validate_architecture(self) -> None:
        """Check every rule that ties fields together; runs at construction and again when a model is built.

        Raises:
            ValueError: naming the field, the rule and the value.
        """
        self._validate_values()
        self._validate_heads()
        self._validate_lambda()
        self._validate_layers()
        self._validate_growth()
        self._validate_rope()

    def _validate_values(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_noise_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            most = {"num_hidden_layers": MAX_LAYERS, "head_dim": MAX_HEAD_DIM}.get(name, MAX_SIZE)
            _require(_is_size(getattr(self, name), most), *_size_rule(self, name, most))
        _require(
            self.num_attention_heads * self.head_dim <= MAX_SIZE,
            "num_attention_heads",
            f"times head_dim={self.head_dim} must be at most {MAX_SIZE}",
            self.num_attention_heads,
        )
        for name in ("rms_norm_eps", "head_norm_eps"):
            eps = getattr(self, name)
            _require(eps > 0 and _is_finite(eps), name, "must be positive, and finite in float32", eps)
        deviation = self.initializer_range
        _require(
            deviation >= 0 and _is_finite(deviation),
            "initializer_range",
            "must not be negative, and finite in float32",
            deviation,
        )
        _require(
            self.pad_token_id is None or -self.vocab_size <= self.pad_token_id < self.vocab_size,
            "pad_token_id",
            f"must be a row of the {self.vocab_size} embeddings",
            self.pad_token_id,
        )
        _require(self.kv_layout in KV_LAYOUTS, "kv_layout", f"must be one of {KV_LAYOUTS}", self.kv_layout)
        _require(
            self.hidden_act == "poly_norm" or _is_activation(self.hidden_act),
            "hidden_act",
            "must be `poly_norm` or an activation of transformers that has no weights",
            self.hidden_act,
        )
        _require(
            self.attention_out_bias is not None,
            "attention_out_bias",
            "must be true or false once the config is made",
            self.attention_out_bias,
        )
        _require(
            self.attention_dropout == 0,
            "attention_dropout",
            "must be 0: the equations of differential attention define no dropout for a difference of two maps",
            self.attention_dropout,
        )

    def _validate_heads(self) -> None:
        noise, kv_heads = self.num_noise_heads, self.num_key_value_heads
        signal = self.num_signal_heads
        _require(signal >= 1, "num_noise_heads", f"must be below num_attention_heads={self.num_attention_heads}", noise)
        _require(
            signal % noise == 0,
            "num_noise_heads",
            f"must divide the number of signal heads ({signal} = num_attention_heads − num_noise_heads)",
            noise,
        )
        if self.kv_layout == "shared":
            _require(
                signal % kv_heads == 0,
                "num_key_value_heads",
                f"must divide the number of signal heads ({signal})",
                kv_heads,
            )
            _require(
                noise % kv_heads == 0 or kv_heads % noise == 0,
                "num_noise_heads",
                f"must divide num_key_value_heads={kv_heads} or be a multiple of it",
                noise,
            )
        else:
            _require(kv_heads % 2 == 0, "num_key_value_heads", 'must be even with kv_layout="paired"', kv_heads)
            pairs = kv_heads // 2
            _require(
                signal % pairs == 0 and noise % pairs == 0,
                "num_key_value_heads",
                f"must count pairs that divide both the signal heads ({signal}) and the noise heads ({noise})",
                kv_heads,
            )

        possible = min(self.head_dim, self.hidden_size)
        _require(
            self.qk_rank is None or 1 <= self.qk_rank <= possible,
            "qk_rank",
            f"must be from 1 to {possible}, the smaller of head_dim and hidden_size, or None for dense projections",
            self.qk_rank,
        )

    def _validate_lambda(self) -> None:
        _require(self.lambda_type in LAMBDA_TYPES, "lambda_type", f"must be one of {LAMBDA_TYPES}", self.lambda_type)
        values = self.lambda_init if isinstance(self.lambda_init, list) else [self.lambda_init or 0.0]
        _require(
            not isinstance(self.lambda_init, list) or len(values) == self.num_hidden_layers,
            "lambda_init",
            f"must hold one value for each of the {self.num_hidden_layers} layers if it is a list",
            self.lambda_init,
        )
        field = "lambda_init_offset" if self.lambda_init is None else "lambda_init"
        try:
            finite = all(_is_finite(self.layer_lambda_init(layer)) for layer in range(self.num_hidden_layers))
        except OverflowError:
            finite = False
        _require(finite, field, "must give every layer a λ_init that is finite in float32", getattr(self, field))
        self._validate_anneal()

    def _validate_anneal(self) -> None:
        far, target = self.lambda_anneal, self.lambda_target
        _require(far is None or 0 <= far <= 1, "lambda_anneal", "must be from 0 to 1, or None", far)
        if far is None:
            _require(
                target is None, "lambda_target", "must be None where lambda_anneal is: nothing is annealed", target
            )
        else:
            within = target is not None and _is_finite(target)
            _require(within, "lambda_target", "must be given, and finite in float32, where lambda_anneal is", target)

    def _validate_layers(self) -> None:
        assert self.layer_types is not None  # filled in at construction
        _require(
            len(self.layer_types) == self.num_hidden_layers,
            "layer_types",
            f"must name one type for each of the {self.num_hidden_layers} layers",
            self.layer_types,
        )
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        _require(not unknown, "layer_types", f"may hold only {LAYER_TYPES}", unknown)
        if self.sliding_window is not None:
            _require(_is_size(self.sliding_window, MAX_SIZE), *_size_rule(self, "sliding_window", MAX_SIZE))
        _require(
            self.sliding_window is not None or "sliding_attention" not in self.layer_types,
            "sliding_window",
            "must be given where layer_types holds `sliding_attention`",
            self.sliding_window,
        )

    def _validate_growth(self) -> None:
        new_parts = {name: getattr(self, name) for name in GROWTH_FIELDS[1:]}
        if self.growth_mask is None:
            for name, value in new_parts.items():
                _require(value is None, name, "must be None where growth_mask is, for nothing would mask it", value)
            return
        _require(0 <= self.growth_mask <= 1, "growth_mask", "must be from 0 to 1, or None", self.growth_mask)
        _require(
            any(value is not None for value in new_parts.values()),
            "growth_mask",
            f"must be None where there is nothing new: none of {', '.join(new_parts)} is given",
            self.growth_mask,
        )
        for name, whole in (
            ("masked_signal_heads", self.signal_group_size),
            ("masked_neurons", self.intermediate_size),
        ):
            _require(
                new_parts[name] is None or 1 <= new_parts[name] < whole,
                name,
                f"must be from 1 to {whole - 1}: of {whole}, one at least is not new" if whole > 1 else "must be None",
                new_parts[name],
            )
        layers = self.masked_layers
        _require(
            layers is None or (0 < len(layers) < self.num_hidden_layers and layers == sorted(set(layers))),
            "masked_layers",
            f"must list some, not all, of the {self.num_hidden_layers} layers in ascending order",
            layers,
        )
        _require(
            layers is None or (layers[0] >= 0 and layers[-1] < self.num_hidden_layers),
            "masked_layers",
            f"must be from 0 to {self.num_hidden_layers - 1}",
            layers,
        )

    def _validate_rope(self) -> None:
        _require(self.head_dim % 2 == 0, "head_dim", "must be even for rotary embeddings", self.head_dim)
        rope = _one_rope(self.rope_parameters)  # it may have been changed since the config was made
        rope_type = rope["rope_type"]
        _require(rope_type in ROPE_TYPES, "rope_parameters", f"rope_type must be one of {ROPE_TYPES}", rope_type)
        partial = rope.get("partial_rotary_factor", 1.0)
        if rope_type == "proportional":
            possible = isinstance(partial, int | float) and 0 < partial <= 1
            _require(possible, "rope_parameters", "partial_rotary_factor must be above 0, at most 1", partial)
        else:
            rule = "partial_rotary_factor must be 1.0 except with rope_type `proportional`"
            _require(partial == 1.0, "rope_parameters", rule, partial)
        try:
            getattr(self, "validate_rope", lambda: None)()  # transformers 4 has none
            frequencies = self._rope_frequencies(str(rope_type))
        except Exception as error:  # whatever transformers' functions make of values that they do not expect
            raise ValueError(f"GDAConfig.rope_parameters: {_in_short(error)} (got {_shown(rope)})") from None
        _require(
            all(len(each) == self.head_dim // 2 and all(map(math.isfinite, each)) for each in frequencies),
            "rope_parameters",
            f"must give {self.head_dim // 2} finite frequencies, half of head_dim",
            rope,
        )

    def _rope_frequencies(self, rope_type: str) -> list[list[float]]:
        """The frequencies that the model will compute, within and beyond its length: what cannot be must fail here."""
        rope: dict[str, Any] = dict(self.rope_parameters or {})
        if rope_type == "default":
            if not rope["rope_theta"] > 0:
                raise ValueError("rope_theta must be positive")
            return [[rope["rope_theta"] ** (-2 * j / self.head_dim) for j in range(self.head_dim // 2)]]
        compute = ROPE_INIT_FUNCTIONS[rope_type]
        wanted = signature(compute).parameters.values()  # transformers 4 asks for a device
        device = {each.name: None for each in wanted if each.name == "device" and each.default is each.empty}
        beyond = 2 * max(self.max_position_embeddings, rope.get("original_max_position_embeddings") or 1)
        with torch.device("cpu"):  # a model may be under construction on the meta device
            return [compute(self, **device, seq_len=length)[0].tolist() for length in (None, beyond)]


# The type of each field, by its name.
FIELDS = {name: hint for name, hint in GDAConfig.__annotations__.items() if get_origin(hint) is not ClassVar}


def _is_of_type(value: Any, hint: Any) -> bool:
    """Whether a value is what the annotation of a field says; a truth value is no number."""
    if isinstance(hint, UnionType):
        return any(_is_of_type(value, each) for each in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is_of_type(each, get_args(hint)[0]) for each in value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _one_rope(
    rope_parameters: Any, rope_scaling: Any = None, rope_theta: Any = None, partial_rotary_factor: Any = None
) -> dict[str, Any]:
    """RoPE in the words of transformers 5, from those or the words of transformers 4; both must say the same."""
    for name, rope in (("rope_parameters", rope_parameters), ("rope_scaling", rope_scaling)):
        _check_value(name, rope)
        _require(rope is None or isinstance(rope, dict), name, "must be a dictionary", rope)
        nested = [key for key in LAYER_TYPES if key in (rope or {})]
        _require(not nested, name, "must be one dict for layers of all types", rope)
    rope = dict(rope_scaling or {} if rope_parameters is None else rope_parameters)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", GDAConfig.default_theta if rope_theta is None else rope_theta)
    if partial_rotary_factor is not None:
        rope.setdefault("partial_rotary_factor", partial_rotary_factor)
    said = {"rope_theta": rope_theta} if rope_theta is not None else {}
    said |= {("rope_type" if key == "type" else key): value for key, value in (rope_scaling or {}).items()}
    differing = {key: value for key, value in said.items() if rope.get(key) != value}
    _require(not differing, "rope_parameters", f"contradicts rope_theta or rope_scaling, which say {differing}", rope)
    return rope


def _with_fewer_layers(fields: dict[str, Any], num_layers: int | None) -> dict[str, Any]:
    """The fields of a model's first layers: `from_pretrained(…, num_hidden_layers=1)` runs a part of a model."""
    if num_layers is None or not isinstance(num_layers, int):
        return fields
    lists = {name: fields[name] for name in ("layer_types", "lambda_init") if isinstance(fields.get(name), list)}
    return fields | {name: values[:num_layers] for name, values in lists.items()} | {"num_hidden_layers": num_layers}


def _is_activation(name: str) -> bool:
    """Whether transformers has an activation of that name, and one that no checkpoint need hold anything for."""
    from transformers.activations import ACT2FN  # imports transformers' modelling code, which takes seconds

    return name in ACT2FN and not ACT2FN[name].state_dict()


def _require(condition: bool, field: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"GDAConfig.{_named(field)} {rule}; got {_shown(value)}.")


def _named(field: str) -> str:
    """A name as a message shows it; config.json may hold any."""
    return field if field.isidentifier() else _shown(field)


def _shown(value: object) -> str:
    """A value as a message shows it, of a length that can be read."""
    try:
        shown = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} of too many levels"
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…"


def _in_short(error: BaseException) -> str:
    """What somebody else's error says, in one line."""
    said = " ".join(str(error).split())
    return said if len(said) <= 2 * MAX_SHOWN else f"{said[: 2 * MAX_SHOWN]}…"


def _is_size(value: int, most: int) -> bool:
    return 1 <= value <= most


def _size_rule(config: GDAConfig, name: str, most: int) -> tuple[str, str, int]:
    value = getattr(config, name)
    return name, "must be at least 1" if value < 1 else f"must be at most {most}", value


def _is_finite(value: float) -> bool:
    """Whether a number is finite in float32; integers of Python know no bound."""
    return abs(value) < torch.finfo(torch.float32).max


def _nests_deeply(value: Any) -> bool:
    """Whether lists and dicts are nested beyond the limit; level by level, since a recursion would fail at that."""
    level = [value]
    for _ in range(MAX_NESTING):
        containers = {id(each): each for each in level if isinstance(each, dict | list | tuple)}.values()
        level = [inner for each in containers for inner in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return False
    return True


def _names_a_dtype(value: Any) -> bool:
    """Whether that is, or names, a type that weights can have; "auto", of `from_pretrained`, leaves it to them."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    return value in (None, "auto") or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)


def _maps_labels(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(isinstance(key, int) or key.removeprefix("-").isdecimal() for key in value)
    )


# Attributes of PreTrainedConfig that it takes as they are, and cannot work with if they are anything else.
VALUE_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{name: (lambda value: value is None, "must be null: a GDA model has no such parts") for name in FOREIGN_PARTS},
    **dict.fromkeys(("dtype", "torch_dtype"), (_names_a_dtype, "must name a floating-point type of torch")),
    "is_encoder_decoder": (lambda value: not value, "must be false"),
    "id2label": (_maps_labels, "must map numbers to names"),
    "label2id": (lambda value: value is None or isinstance(value, dict), "must map names to numbers"),
    "num_labels": (
        lambda value: isinstance(value, int) and 0 <= value <= MAX_LABELS,
        f"must be an integer from 0 to {MAX_LABELS}",
    ),
    "quantization_config": (
        lambda value: isinstance(value, dict) or value is None or hasattr(value, "to_dict"),
        "must be a dictionary",
    ),
    "attn_implementation": (
        lambda value: value is None or isinstance(value, str | dict),
        "must be the name of an implementation of attention",
    ),
}


def _check_value(name: str, value: Any) -> None:
    _require(not _nests_deeply(value), name, f"must not nest deeper than {MAX_NESTING} levels", value)
    if name in FIELDS and not _is_of_type(value, FIELDS[name]):
        expected = FIELDS[name].__name__ if isinstance(FIELDS[name], type) else FIELDS[name]
        got = f"{type(value).__name__} (value: {_shown(value)})"
        raise ValueError(f"GDAConfig.{name}: expected {expected}, got {got}")
    holds, rule = VALUE_RULES.get(name, (None, ""))
    _require(holds is None or holds(value), name, rule, value)


__all__ = ["GDAConfig"]
