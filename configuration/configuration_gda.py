# Copyright 2026 the authors of Grouped Differential Attention. Apache License 2.0, see
# https://www.apache.org/licenses/LICENSE-2.0. This file is of grouped-differential-attention 0.1.0, which saves it
# beside a model's weights, so that they load with transformers alone.
"""The configuration of Grouped Differential Attention models."""

import math
import os
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin

import torch
from transformers import PretrainedConfig, Qwen3Config  # transformers 4 knows no PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

KV_LAYOUTS = ("shared", "paired")
LAMBDA_TYPES = ("reparameterized", "sigmoid", "tanh")
LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
# The arguments that describe RoPE: the first in transformers 5, the others in transformers 4.
ROPE_ARGUMENTS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")

# Fields that must be at least 1.
SIZES: tuple[str, ...] = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_noise_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
MASKED = ("masked_signal_heads", "masked_neurons", "masked_layers")
# What is being faded in. These and `fade` are None in a model that fades nothing in.
FADED = (*MASKED, "blended_layers", "faded_head_norm", "lambda_target")
# Fields that depend on the number of layers, and the attribute that keeps them whole while that number is reduced.
PER_LAYER = ("layer_types", "lambda_init", "masked_layers", "blended_layers", "fade")
WHOLE = "_whole"
# Fields that no other model family has. An unknown argument that resembles one of them is a typo; any other belongs to
# whoever passed it, and is kept in config.json.
OWN_FIELDS: tuple[str, ...] = ("num_noise_heads", "kv_layout", "lambda_type", "lambda_init", "lambda_init_offset")
OWN_FIELDS += ("head_norm", "head_norm_eps", "qk_norm", "qk_rank", "attention_out_bias", "fade", *FADED)

MAX_LAYERS = 10_000  # lists with a value per layer have this length
FLOAT32_MAX = torch.finfo(torch.float32).max
Rules = Iterator[tuple[bool, str, str]]  # whether a rule holds, the field that it is about, and the rule in words

# The code that is saved beside config.json: file and class by Auto class.
AUTO_MAP = {"AutoConfig": "configuration_gda.GDAConfig", "AutoModel": "modeling_gda.GDAModel"}
for _task in ("CausalLM", "QuestionAnswering", "SequenceClassification", "TokenClassification"):
    AUTO_MAP[f"AutoModelFor{_task}"] = f"modeling_gda.GDAFor{_task}"


class GDAConfig(PretrainedConfig):
    r"""
    Configuration of a Grouped Differential Attention model (arXiv 2510.06949).

    `num_noise_heads` of the `num_attention_heads` query heads compute noise maps, the others signal maps. Signal head
    *i* computes ``softmax(q_i kᵀ) v − λ_i · softmax(q_noise(i) kᵀ) v``; each noise map serves `signal_noise_ratio`
    signal heads. Fields that are not listed here mean what they mean in `LlamaConfig`.

    Args:
        num_attention_heads: Query heads per layer, signal **and** noise. The rows of `q_proj` are one group of
            ``[signal_1 … signal_r, noise]`` per noise head.
        num_noise_heads: Noise heads N. The number of signal heads, S = num_attention_heads − N, is a multiple of N.
        num_key_value_heads: KV heads G. Shared: G divides S, and G divides N or N divides G. Paired: G counts both
            members of each pair, and the G / 2 pairs divide both S and N.
        kv_layout: `"shared"`: the signal and noise heads of a group read the same K and V (DIFF Transformer V2,
            Motif-3). `"paired"`: `k_proj` holds pairs (signal key, noise key), and `v_proj` pairs of slabs that signal
            and noise heads both read as one value of width 2 · head_dim (DIFF Transformer V1, Motif-2).
        lambda_type: `"reparameterized"`: λ = exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) + λ_init per layer (arXiv 2410.05258);
            `"sigmoid"`: λ = σ(W_λ x) per token and signal head (DIFF Transformer V2); `"tanh"`: λ = tanh(W_λ x), which
            can start at exactly 0 and still learn.
        lambda_init: λ_init, or a list of one per layer. `None`: 0.8 − 0.6 · exp(−0.3 · (layer + lambda_init_offset)).
        lambda_init_offset: 0 in the DIFF Transformer, −1 in Motif-2.
        head_norm: Apply RMSNorm (weight `subln`) to the output of each signal head, then multiply by 1 − λ_init.
        head_norm_eps: Epsilon of that norm.
        qk_norm: Apply RMSNorm over head_dim to queries and keys before RoPE, as in Qwen3.
        qk_rank: Rank R of the Shared DIFF Transformer (arXiv 2501.17900), or `None` for dense projections. Role k of a
            group (signal_1 … signal_r, noise) has the query weights W_base + P_k R_k. `q_base` (N · head_dim, hidden),
            `q_down` (H · R, hidden) and `q_up` (H · head_dim, R) replace `q_proj`; with paired keys, whose roles are
            signal and noise, `k_base`, `k_down` and `k_up` replace `k_proj`.
        fade: How far the parts that the next six fields name are faded in, from 0 to 1; `None` if nothing is.
            `model.set_fade` changes it. At 1 none of the seven is saved.
        masked_signal_heads: How many of each `signal_group_size` signal heads, the last ones, are new: their outputs
            are multiplied by `fade` after the head norm (masked growth, arXiv 2305.02869).
        masked_neurons: How many neurons of each MLP, the last ones, are new: `fade` multiplies their activations.
        masked_layers: Indices of new layers, from 0. What their attention and their MLP add to the residual stream is
            multiplied by `fade`.
        blended_layers: Whether these layers output fade · layer(x) + (1 − fade) · x instead.
        faded_head_norm: Whether the head norm is faded in: heads output (1 − fade) · x + fade · norm(x) · (1 − λ_init).
        lambda_target: Shifts λ while it fades in: layers subtract with fade · λ + (1 − fade) · fade · lambda_target.
        hidden_act: As in Llama, or `"poly_norm"` (arXiv 2411.03884).
        attention_bias: Whether the query, key and value projections have biases.
        attention_out_bias: Whether `o_proj` has a bias. `None`: as `attention_bias`.
        attention_dropout: Must be 0: the equations define no dropout for a difference of attention maps.
        sliding_window: Number of keys that a sliding layer sees; full layers ignore it, as in Qwen2. With a window of
            1, pass `use_cache=False`: the caches of transformers keep too many keys.
        layer_types: `"full_attention"` or `"sliding_attention"` per layer. `None`: all sliding if there is a window.

    Raises:
        ValueError: for an impossible combination, naming the field, the rule and the value.

    Example:
        >>> config = GDAConfig()  # the shape of Llama-3-8B with one noise head added to each KV group
        >>> config.num_signal_heads, config.num_noise_heads, config.signal_noise_ratio
        (32, 8, 4)
    """

    model_type: ClassVar[str] = "gda"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]  # the name depends on the release
    default_theta: ClassVar[float] = 500000.0  # type: ignore[misc]
    base_model_pp_plan: ClassVar[dict[str, Any]] = Qwen3Config.base_model_pp_plan

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
    fade: int | float | None = None
    masked_signal_heads: int | None = None
    masked_neurons: int | None = None
    masked_layers: list[int] | None = None
    blended_layers: bool | None = None
    faded_head_norm: bool | None = None
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
            is_taken = name == WHOLE or callable(getattr(type(self), name, None))
            _require(not is_taken, name, "is not a field of a config", value)
            read_only = getattr(getattr(type(self), name, None), "fset", name) is None
            _require(not read_only, name, "follows from other fields and cannot be given", value)
            if meant := get_close_matches(name, OWN_FIELDS, n=1, cutoff=0.84):
                raise ValueError(f"GDAConfig has no field `{name}`; did you mean `{meant[0]}`?")
        undecided = "auto" in (kwargs.get("dtype"), kwargs.get("torch_dtype"))  # where there are no weights to decide
        _require(not undecided, "dtype", "must name a floating-point type of torch", "auto")
        for name, value in fields.items():
            setattr(self, name, value)
        layers = self.num_hidden_layers
        _require(layers <= MAX_LAYERS, "num_hidden_layers", f"must be at most {MAX_LAYERS}", layers)
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * layers
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        self.validate_architecture()
        # transformers 4 sets these to defaults of its own unless they are passed on.
        given = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
        passed_on = {name: fields[name] for name in given}
        try:
            super().__init__(**passed_on, **kwargs)
        except Exception as error:  # each release has exceptions of its own
            raise ValueError(f"GDAConfig: {_in_one_line(error.__cause__ or error)}") from error

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIELDS and not _is_of_type(value, FIELDS[name]):
            expected = FIELDS[name].__name__ if isinstance(FIELDS[name], type) else FIELDS[name]
            got = f"{type(value).__name__} (value: {value!r:.200})"
            raise ValueError(f"GDAConfig.{name}: expected {expected}, got {got}")
        before = vars(self).get(name)
        if name == "rope_parameters" and before and value is not None:  # other scaling, the same base
            value = {"rope_theta": before["rope_theta"], **value} if "rope_theta" in before else value
        super().__setattr__(name, value)
        if name == "num_hidden_layers" and before is not None:
            self._cut_layers(before)
        elif name in PER_LAYER:
            vars(self).pop(WHOLE, None)

    def _cut_layers(self, before: int) -> None:
        """Cut lists with a value per layer, as for `from_pretrained(…, num_hidden_layers=1)`: a model's first layers.

        If the number grows, as by PEFT's `layer_replication`, layers of a single type remain of that type. Lists are
        whole again when the number is: `generate(assistant_early_exit=…)` changes it for a while.
        """
        fields, layers = vars(self), self.num_hidden_layers
        whole = fields.pop(WHOLE, None) or {"num_hidden_layers": before} | {name: fields[name] for name in PER_LAYER}
        fields |= whole | {"num_hidden_layers": layers}
        if layers >= whole["num_hidden_layers"]:
            if len(set(types := fields["layer_types"] or ())) == 1:
                fields["layer_types"] = types[:1] * layers
            return
        fields[WHOLE] = whole
        for name in ("layer_types", "lambda_init"):
            if isinstance(fields[name], list):
                fields[name] = fields[name][:layers]
        if fields["masked_layers"] is not None:
            fields["masked_layers"] = [layer for layer in fields["masked_layers"] if layer < layers] or None
            fields["blended_layers"] = fields["masked_layers"] and fields["blended_layers"]
        if all(fields[part] is None for part in FADED):
            fields["fade"] = None

    @property
    def rope_theta(self) -> float:
        """The base of RoPE, where transformers 4 looks for it."""
        return (self.rope_parameters or {}).get("rope_theta", self.default_theta)

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = (self.rope_parameters or {}) | {"rope_theta": value}

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """RoPE's scaling, where transformers 4 looks for it: None where there is none."""
        rope = {key: value for key, value in (self.rope_parameters or {}).items() if key != "rope_theta"}
        return None if rope.get("rope_type", "default") == "default" else rope

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        self.rope_parameters = _one_rope(None, rope_scaling=value, rope_theta=self.rope_theta)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GDAConfig":
        """The configuration of a known shape, with `changes` to its fields; docs/family.md lists names and sources."""
        presets = import_module(".presets", __package__)  # belongs to the package, and is not saved beside weights
        return cls(**(presets.preset_fields(name) | changes))

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
        kv_heads = self.num_key_value_heads if self.kv_layout == "shared" else 1  # paired, a noise head serves one pair
        return self.num_signal_heads // max(self.num_noise_heads, kv_heads)

    @property
    def value_width(self) -> int:
        """Width of a head's value: head_dim (shared) or 2 · head_dim (paired)."""
        return self.head_dim if self.kv_layout == "shared" else 2 * self.head_dim

    @property
    def factored_projections(self) -> dict[str, int]:
        """Projections with a base that roles share (none, `q`, or with paired keys `q` and `k`), and how many do."""
        if self.qk_rank is None:
            return {}
        queries = {"q": self.signal_noise_ratio + 1}
        return queries if self.kv_layout == "shared" else queries | {"k": 2}

    def is_new_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` is new and not blended: what it adds is faded in, not its heads and neurons."""
        return not self.blended_layers and layer_idx in (self.masked_layers or [])

    def is_blended_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` is new and blended with its input."""
        return bool(self.blended_layers) and layer_idx in (self.masked_layers or [])

    def layer_type(self, layer_idx: int) -> str:
        """`"full_attention"` or `"sliding_attention"`, for layer `layer_idx`."""
        assert self.layer_types is not None  # filled in at construction
        return self.layer_types[layer_idx]

    def layer_lambda_init(self, layer_idx: int) -> float:
        """λ_init of layer `layer_idx`, counted from 0 (arXiv 2410.05258, section 2.1)."""
        value = self.lambda_init[layer_idx] if isinstance(self.lambda_init, list) else self.lambda_init
        if value is None:
            return 0.8 - 0.6 * math.exp(-0.3 * (layer_idx + self.lambda_init_offset))
        return float(value)

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
            modules = ["o_proj"] + ["subln"] * self.head_norm + ["q_norm", "k_norm"] * self.qk_norm
            plan |= {f"layers.*.self_attn.{name}": "free_full_weight" for name in self._input_projections() + modules}
        return plan

    def _input_projections(self) -> list[str]:
        """The modules that make queries, keys and values; their rows are those of groups, pairs or heads, in order."""
        factored = [f"{name}_{part}" for name in self.factored_projections for part in ("base", "down", "up")]
        return factored + [f"{name}_proj" for name in "qkv" if name not in self.factored_projections]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; those of fading in only while something is faded in."""
        self._register_with_peft()  # PEFT asks for the fields right before it looks up the model type
        left_out = {WHOLE, "fade", *FADED} if self.fade in (None, 1) else {WHOLE}
        return {name: value for name, value in super().to_dict().items() if name not in left_out}

    def _register_with_peft(self) -> None:
        """Give PEFT, if it is imported, the layers that LoRA and the like adapt by default: those of a Llama."""
        factored = {f"{name}_proj": [f"{name}_base", f"{name}_down"] for name in self.factored_projections}
        constants = sys.modules.get("peft.utils.constants")
        for name, by_model_type in vars(constants).items() if constants else ():
            if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(layers := by_model_type.get("llama"), list):
                by_model_type["gda"] = [each for layer in layers for each in factored.get(layer, [layer])]

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of config.json: RoPE and dtype also in the form of transformers 4, for other readers."""
        fields = super().to_diff_dict()
        fields |= {"rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling}
        return fields | ({"torch_dtype": fields["dtype"]} if "dtype" in fields else {})

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, *, bundle_code: bool = True, **kwargs: Any
    ) -> None:
        """Write config.json and, unless `bundle_code` is false, the code of the model beside it.

        With `trust_remote_code=True` the folder then loads where this package is not installed. Saving a model always
        comes here, even if FSDP2 has swapped its class. The other arguments are those of `PretrainedConfig`.

        Raises:
            ValueError: for `push_to_hub` with code, which transformers would leave out.
        """
        if push_to_hub and bundle_code:
            raise ValueError("save_pretrained(push_to_hub=True) leaves out the model's code; use config.push_to_hub()")
        if type(self) is GDAConfig:  # a class made from it has code of its own, which is not known here
            before = vars(self).pop("auto_map", None)
            if bundle_code:
                code = self._save_code(save_directory)
                kept = {} if "AutoModel" in code else self._models_of(before or {}, save_directory)
                self.auto_map = kept | code
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def _save_code(self, folder: str | os.PathLike) -> dict[str, str]:
        """Copy the files of model and config into `folder`, and return their entries of `auto_map`.

        Where only a config was loaded from a model's folder, the code of its model is not known.
        """
        from transformers import MODEL_MAPPING  # imports transformers' modelling code, which takes seconds

        os.makedirs(folder, exist_ok=True)
        has_model = type(self) in MODEL_MAPPING
        if has_model:
            custom_object_save(MODEL_MAPPING[type(self)], folder)
        custom_object_save(GDAConfig, folder)  # the last, for it takes the place of the bridge beside the model
        return dict(AUTO_MAP) if has_model else {"AutoConfig": AUTO_MAP["AutoConfig"]}

    @staticmethod
    def _models_of(auto_map: dict[str, Any], folder: str | os.PathLike) -> dict[str, Any]:
        """The entries of models whose code is on the Hub or in the folder."""
        has_code = os.path.isfile(os.path.join(folder, "modeling_gda.py"))
        return {name: place for name, place in auto_map.items() if name in AUTO_MAP and (has_code or "--" in place)}

    def validate_architecture(self) -> None:
        """Check every rule, at construction and again when a model is built; ValueError names field, rule and value."""
        for rules in (self._value_rules, self._head_rules, self._lambda_rules, self._layer_rules, self._fade_rules):
            for holds, field, rule in rules():  # one after the other: a rule may rely on those before it
                _require(holds, field, rule, getattr(self, field))
        self._validate_rope()
        # transformers up to 5.20 adds the embeddings of a tied model to the plan
        added = {name: way for name, way in vars(self).get("base_model_tp_plan", {}).items() if "layers." not in name}
        vars(self)["base_model_tp_plan"] = self._tensor_parallel_plan() | added

    def _value_rules(self) -> Rules:
        for name in SIZES:
            yield getattr(self, name) >= 1, name, "must be at least 1"
        for name in ("rms_norm_eps", "head_norm_eps"):
            yield 0 < getattr(self, name) < FLOAT32_MAX, name, "must be positive, and finite in float32"
        yield 0 <= self.initializer_range < FLOAT32_MAX, "initializer_range", "must be finite in float32, not below 0"
        row = self.pad_token_id is None or -self.vocab_size <= self.pad_token_id < self.vocab_size
        yield row, "pad_token_id", f"must be an index of one of the {self.vocab_size} embeddings"
        known = self.hidden_act == "poly_norm" or _is_activation(self.hidden_act)
        yield known, "hidden_act", "must be `poly_norm` or an activation of transformers that has no weights"
        yield self.attention_out_bias is not None, "attention_out_bias", "must be true or false once the config is made"
        rule = "must be 0: differential attention defines no dropout for the difference of two maps"
        yield self.attention_dropout == 0, "attention_dropout", rule

    def _head_rules(self) -> Rules:
        signal, noise, kv_heads = self.num_signal_heads, self.num_noise_heads, self.num_key_value_heads
        yield self.kv_layout in KV_LAYOUTS, "kv_layout", f"must be one of {KV_LAYOUTS}"
        yield signal >= 1, "num_noise_heads", f"must be below num_attention_heads={self.num_attention_heads}"
        rule = f"must divide the number of signal heads ({signal} = num_attention_heads − num_noise_heads)"
        yield signal % noise == 0, "num_noise_heads", rule
        if self.kv_layout == "shared":
            yield signal % kv_heads == 0, "num_key_value_heads", f"must divide the number of signal heads ({signal})"
            rule = f"must divide num_key_value_heads={kv_heads} or be a multiple of it"
            yield noise % kv_heads == 0 or kv_heads % noise == 0, "num_noise_heads", rule
        else:
            yield kv_heads % 2 == 0, "num_key_value_heads", 'must be even with kv_layout="paired"'
            rule = f"must count pairs that divide both the signal heads ({signal}) and the noise heads ({noise})"
            yield math.gcd(signal, noise) % (kv_heads // 2) == 0, "num_key_value_heads", rule
        most = min(self.head_dim, self.hidden_size)
        rule = f"must be from 1 to {most}, the smaller of head_dim and hidden_size, or None for dense projections"
        yield self.qk_rank is None or 1 <= self.qk_rank <= most, "qk_rank", rule

    def _lambda_rules(self) -> Rules:
        yield self.lambda_type in LAMBDA_TYPES, "lambda_type", f"must be one of {LAMBDA_TYPES}"
        layers = self.num_hidden_layers
        complete = not isinstance(self.lambda_init, list) or len(self.lambda_init) == layers
        yield complete, "lambda_init", f"must hold one value for each of the {layers} layers if it is a list"
        try:
            finite = all(abs(self.layer_lambda_init(layer)) < FLOAT32_MAX for layer in range(layers))
        except OverflowError:
            finite = False
        field = "lambda_init_offset" if self.lambda_init is None else "lambda_init"
        yield finite, field, "must give every layer a λ_init that is finite in float32"

    def _layer_rules(self) -> Rules:
        types, window = self.layer_types or [], self.sliding_window
        rule = f"must name one type for each of the {self.num_hidden_layers} layers"
        yield len(types) == self.num_hidden_layers, "layer_types", rule
        yield set(types) <= set(LAYER_TYPES), "layer_types", f"may hold only {LAYER_TYPES}"
        yield window is None or window >= 1, "sliding_window", "must be at least 1"
        rule = "must be given if layer_types contains `sliding_attention`"
        yield window is not None or "sliding_attention" not in types, "sliding_window", rule

    def _fade_rules(self) -> Rules:
        given = [name for name in FADED if getattr(self, name) is not None]
        for name in given:
            yield self.fade is not None, name, "must be None if fade is None"
        if self.fade is None:
            return
        yield 0 <= self.fade <= 1, "fade", "must be from 0 to 1, or None"
        yield bool(given), "fade", f"must be None, because nothing is faded in: none of {', '.join(FADED)} is given"
        wholes = {"masked_signal_heads": self.signal_group_size, "masked_neurons": self.intermediate_size}
        for name, whole in wholes.items():
            rule = f"must be from 1 to {whole - 1} of {whole}: not all can be new" if whole > 1 else "must be None"
            yield name not in given or 1 <= getattr(self, name) < whole, name, rule
        if (new := self.masked_layers) is not None:
            layers = self.num_hidden_layers
            some = 0 < len(new) < layers and new == sorted(set(new))
            yield some, "masked_layers", f"must list some, not all, of the {layers} layers in ascending order"
            yield new[0] >= 0 and new[-1] < layers, "masked_layers", f"must be from 0 to {layers - 1}"
        blends = self.masked_layers and self.blended_layers
        yield blends or self.blended_layers is None, "blended_layers", "must be None, or true with masked_layers"
        fades_norm = self.head_norm and self.faded_head_norm
        yield fades_norm or self.faded_head_norm is None, "faded_head_norm", "must be None, or true with head_norm"
        finite = self.lambda_target is None or abs(self.lambda_target) < FLOAT32_MAX
        yield finite, "lambda_target", "must be finite in float32"

    def _validate_rope(self) -> None:
        _require(self.head_dim % 2 == 0, "head_dim", "must be even for rotary embeddings", self.head_dim)
        rope = _one_rope(self.rope_parameters)  # it may have been changed since the config was made
        rope_type, partial = rope["rope_type"], rope.get("partial_rotary_factor", 1.0)
        _require(rope_type in ROPE_TYPES, "rope_parameters", f"rope_type must be one of {ROPE_TYPES}", rope_type)
        may_be_partial = rope_type == "proportional" and isinstance(partial, int | float)
        rule = "partial_rotary_factor must be 1.0, or with rope_type `proportional` above 0 and at most 1"
        _require(partial == 1.0 or (may_be_partial and 0 < partial <= 1), "rope_parameters", rule, partial)
        try:
            for step in ("standardize_rope_params", "validate_rope"):  # transformers 4 has neither
                getattr(self, step, lambda: None)()
            frequencies = self._rope_frequencies(str(rope_type))
        except Exception as error:  # whatever transformers' functions raise for values that they do not expect
            raise ValueError(f"GDAConfig.rope_parameters: {_in_one_line(error)} (got {rope!r:.200})") from None
        half = self.head_dim // 2
        usable = all(len(each) == half and all(map(math.isfinite, each)) for each in frequencies)
        _require(usable, "rope_parameters", f"must give {half} finite frequencies, half of head_dim", rope)

    def _rope_frequencies(self, rope_type: str) -> list[list[float]]:
        """The frequencies that the model will compute within its length and beyond, where some types change."""
        rope: dict[str, Any] = dict(self.rope_parameters or {})
        if rope_type == "default":
            if not rope["rope_theta"] > 0:
                raise ValueError("rope_theta must be positive")
            return [[rope["rope_theta"] ** (-2 * j / self.head_dim) for j in range(self.head_dim // 2)]]
        beyond = 2 * max(self.max_position_embeddings, rope.get("original_max_position_embeddings") or 1)
        compute = ROPE_INIT_FUNCTIONS[rope_type]
        with torch.device("cpu"):  # a model may be under construction on the meta device
            return [compute(self, device=None, seq_len=length)[0].tolist() for length in (None, beyond)]


# The type of each field, by its name.
FIELDS = {name: hint for name, hint in GDAConfig.__annotations__.items() if get_origin(hint) is not ClassVar}


def _is_of_type(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a field's annotation. A bool is not a number."""
    if isinstance(hint, UnionType):
        return any(_is_of_type(value, each) for each in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is_of_type(each, get_args(hint)[0]) for each in value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _one_rope(
    rope_parameters: Any, rope_scaling: Any = None, rope_theta: Any = None, partial_rotary_factor: Any = None
) -> dict[str, Any]:
    """RoPE in the form of transformers 5, from that form or the form of transformers 4; both must agree."""
    for name, rope in (("rope_parameters", rope_parameters), ("rope_scaling", rope_scaling)):
        possible = rope is None or (isinstance(rope, dict) and not any(key in rope for key in LAYER_TYPES))
        _require(possible, name, "must be one dictionary for layers of all types", rope)
    rope = dict(rope_scaling or {} if rope_parameters is None else rope_parameters)
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", GDAConfig.default_theta if rope_theta is None else rope_theta)
    if partial_rotary_factor is not None:
        rope.setdefault("partial_rotary_factor", partial_rotary_factor)
    said = {"rope_theta": rope_theta} if rope_theta is not None else {}
    said |= {("rope_type" if key == "type" else key): value for key, value in (rope_scaling or {}).items()}
    differing = {key: value for key, value in said.items() if rope.get(key) != value}
    _require(not differing, "rope_parameters", f"contradicts rope_theta or rope_scaling, which say {differing}", rope)
    return rope


def _is_activation(name: str) -> bool:
    """Whether transformers has an activation of that name, and it has no weights."""
    from transformers.activations import ACT2FN  # imports transformers' modelling code, which takes seconds

    return name in ACT2FN and not ACT2FN[name].state_dict()


def _require(holds: bool, field: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"GDAConfig.{field} {rule}; got {value!r:.200}.")


def _in_one_line(error: BaseException) -> str:
    return f"{' '.join(str(error).split()):.400}"
