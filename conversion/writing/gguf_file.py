"""Write a plain decoder as one GGUF file, for llama.cpp and the programs built on it, such as Ollama and LM Studio."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gda._version import __version__
from gda.common.errors import errors_as
from gda.common.extras import needed_by
from gda.common.files import created_parents, in_background, refuse_existing, require_space, sha256, written_beside
from gda.conversion.conversion import Conversion
from gda.conversion.families.llamalike import head_dim, layer_windows
from gda.conversion.options import ExportOptions
from gda.conversion.sources.gguf import GGUFSource
from gda.conversion.sources.gguf_rope import ROPE_FREQS, rope_factors
from gda.conversion.sources.source import Source
from gda.conversion.tensors.recipes import Recipe
from gda.conversion.tensors.safetensors_io import TensorSpec
from gda.conversion.verify import VerificationFailed, verify_by_logits
from gda.conversion.writing.gguf_tokenizer import add_tokenizer
from gda.conversion.writing.stream import byte_progress
from gda.conversion.writing.write_model import ConvertReport

if TYPE_CHECKING:  # an extra
    from gguf import GGUFWriter

# llama.cpp's names of the types of matrices. Vectors are always float32.
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPE_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
# Largest values, which Q8_0 stores as 127 times a float16.
LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0}
# What llama.cpp computes for each type of RoPE, besides rope_theta. Other parameters would be ignored.
ROPE_PARAMETERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its name, its type, and the recipe of its values in llama.cpp's row order."""

    name: str
    type: str
    recipe: Recipe

    @property
    def nbytes(self) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        return self.recipe.spec.numel // block * size


def write_gguf(
    conversion: Conversion, source: Source, out: Path, options: ExportOptions, *, console: Console | None = None
) -> ConvertReport:
    """Write a conversion to a Llama, Mistral, Qwen2 or Qwen3 as the file `out`, which appears when it is verified.

    Raises:
        ImportError: if the package gguf is missing.
        FileExistsError, ValueError, OSError: if llama.cpp cannot run the model or its tokenizer, or `out` cannot be
            written.
        VerificationFailed: if the file does not compute what the source computes.
    """
    with needed_by("writing a GGUF file", "gguf"):
        from gguf import GGUFWriter
    if out.is_dir():
        raise ValueError(f"{out} is a folder; choose another path")
    config: Any = conversion.config
    with errors_as(source.name, ValueError):
        architecture = architecture_of(config)
        writer = GGUFWriter(None, architecture)
        tokenizer_file = None if options.tokenizer is None else Path(options.tokenizer)
        notes = [*source.notes, *conversion.notes, *add_tokenizer(writer, source, config, tokenizer_file)]
    entries = _entries(conversion, architecture, options.dtype)
    types = [entry.type for entry in entries.values() if len(entry.recipe.spec.shape) > 1]
    file_type = max(set(types), key=types.count)
    _add_metadata(writer, config, out.stem, file_type, source)
    holds_all = all(_holds(entry.type, entry.recipe.spec.dtype) for entry in entries.values())
    if not holds_all:
        notes.append(f"the matrices are rounded to {' and '.join(sorted(set(types)))}, which is not lossless")
    report = ConvertReport(
        out=out,
        config=config,
        num_tensors=len(entries),
        num_parameters=conversion.num_parameters,
        num_dense_parameters=conversion.num_parameters,
        nbytes=sum(entry.nbytes for entry in entries.values()),
        num_files=1,
        notes=notes,
        dry_run=options.dry_run,
        file_type=file_type,
    )
    if options.dry_run:
        return report
    verification = None
    with created_parents(out), written_beside(out, alone=True) as file:
        require_space(out.parent, report.nbytes)
        hashes = in_background(source.hashes)  # which compares them with the Hub's
        beside = Path(file.name)
        factors = rope_factors(config) if config.rope_parameters.get("rope_type") == "llama3" else None
        _write(writer, beside, entries, factors, source, console)
        if options.verify:
            written, lossless = WrittenGGUF(beside, config), conversion.lossless and holds_all
            verification = verify_by_logits(source, written, lossless=lossless, console=console)
            if not verification.passed:
                raise VerificationFailed(verification)
        hashes.result()
        refuse_existing(out, options.overwrite)  # it may have appeared meanwhile
    return replace(report, nbytes=out.stat().st_size, sha256={out.name: sha256(out)}, verification=verification)


def architecture_of(config: Any) -> str:
    """The architecture of llama.cpp (src/models) that computes what the model of this configuration does.

    Its "llama" has optional biases everywhere and heads of any width. Its "qwen2" has no o_proj that is wider than the
    hidden size, and its "qwen3" has no bias of o_proj.

    Raises:
        ValueError: if there is none.
    """
    if any(layer_windows(config)):
        raise ValueError("sliding_window has no counterpart in llama.cpp's Llama, which would attend to all tokens")
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act={config.hidden_act!r} has no counterpart in llama.cpp's Llama, which uses silu")
    rope = _require_rope(config)
    if config.model_type == "qwen3":
        if config.attention_bias:
            raise ValueError("attention_bias=True has no counterpart in llama.cpp's Qwen3, whose o_proj has no bias")
        if rope == "llama3":
            raise ValueError("rope_type='llama3' has no counterpart in llama.cpp's Qwen3")
        return "qwen3"
    square = config.num_attention_heads * head_dim(config) == config.hidden_size
    return "qwen2" if config.model_type == "qwen2" and square and rope != "llama3" else "llama"


def _require_rope(config: Any) -> str:
    """The type of RoPE; ValueError unless llama.cpp reads all of its parameters."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_PARAMETERS:
        raise ValueError(f"rope_type={kind!r} has no counterpart in llama.cpp; it has {', '.join(ROPE_PARAMETERS)}")
    kinds = {"rope_type": kind, "type": kind}  # the second is an older name
    defaults = kinds | {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1.0}
    for name, value in rope.items():
        if name not in ("rope_theta", *ROPE_PARAMETERS[kind]) and value not in (None, defaults.get(name)):
            raise ValueError(f"rope_parameters has {name}={value!r}, which llama.cpp does not read")
    return kind


def _entries(conversion: Conversion, architecture: str, dtype: str) -> dict[str, _Entry]:
    """The tensors of the file, by their names in transformers."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    config: Any = conversion.config
    key = next(each for each in MODEL_ARCH if MODEL_ARCH_NAMES[each] == architecture)
    names = get_tensor_name_map(key, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    entries = {}
    for name, recipe in conversion.recipes.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        if architecture == "llama" and (projection := name.split(".")[-2]) in heads:
            recipe = replace(recipe, make=_interleaved(recipe.make, heads[projection]))
        entries[name] = _Entry(theirs, _type(recipe.spec, dtype), recipe)
    return entries


def _holds(kind: str, dtype: torch.dtype) -> bool:
    return kind == TYPES.get(dtype) or (kind == "F32" and dtype.itemsize <= 4)


def _type(spec: TensorSpec, dtype: str) -> str:
    if len(spec.shape) == 1:
        return "F32"
    kind = TYPES.get(spec.dtype, "F32") if dtype == "keep" else DTYPE_TYPES[dtype]
    # Q8_0 packs blocks of 32 values of a row. llama.cpp, too, stores other rows as float16.
    return "F16" if kind == "Q8_0" and spec.shape[-1] % 32 else kind


def _interleaved(make: Callable[..., Tensor], heads: int) -> Callable[..., Tensor]:
    """Rows of q or k in the order of llama.cpp's Llama, where rows that RoPE rotates together are adjacent."""

    def ordered(*sources: Tensor) -> Tensor:
        return make(*sources).unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    return ordered


def _add_metadata(writer: "GGUFWriter", config: Any, name: str, file_type: str, source: Source) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

    writer.add_type("model")
    writer.add_name(name)
    writer.add_description(f"{source.name}, a GDA model, exported by grouped-differential-attention {__version__}")
    card = source.card_data()
    if isinstance(card.get("license"), str):
        writer.add_license(card["license"])
    writer.add_file_type(LlamaFileType["ALL_F32" if file_type == "F32" else f"MOSTLY_{file_type}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if (kind := rope.get("rope_type")) in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _write(
    writer: "GGUFWriter",
    path: Path,
    entries: dict[str, _Entry],
    rope: Tensor | None,
    source: Source,
    console: Console | None,
) -> None:
    """Write the metadata, then one tensor after the other."""
    import numpy as np
    from gguf import GGMLQuantizationType, quantize

    if rope is not None:
        writer.add_tensor_info(ROPE_FREQS, rope.shape, np.dtype(np.float32), rope.nbytes)
    for entry in entries.values():
        kind = GGMLQuantizationType[entry.type]
        writer.add_tensor_info(entry.name, entry.recipe.spec.shape, np.dtype(np.float32), entry.nbytes, raw_dtype=kind)
    writer.write_header_to_file(path)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if rope is not None:
            writer.write_tensor_data(rope.numpy())
        with byte_progress(console) as progress:
            task = progress.add_task("writing", total=sum(entry.nbytes for entry in entries.values()))
            for name, entry in entries.items():
                values = entry.recipe(source.read).float().contiguous().numpy()
                if np.abs(values).max() > LARGEST.get(entry.type, np.inf):
                    raise ValueError(f"{name} has values that {entry.type} cannot hold; use --dtype bfloat16")
                writer.write_tensor_data(quantize(values, GGMLQuantizationType[entry.type]))
                progress.update(task, advance=entry.nbytes)
    finally:
        writer.close()


class WrittenGGUF(GGUFSource):
    """The file that was just written, read tensor by tensor, with the row order restored by transformers.

    Its configuration is known. transformers cannot read all of it from the metadata: not biases, and not a Mistral.
    """

    def __init__(self, path: Path, config: PreTrainedConfig):
        self._known_config = config
        super().__init__(path)

    def _read_config(self) -> PreTrainedConfig:
        return self._known_config

    def _refuse_unread_contents(self) -> None:
        """Do nothing: contents that transformers would not read are in the known configuration."""

    def load(self) -> PreTrainedModel:
        config = copy.deepcopy(self.config)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        loaded = model.load_state_dict({name: self.read(name) for name in self.specs}, strict=False)
        assert set(loaded.missing_keys) <= {"lm_head.weight"}  # absent where it is tied
        assert not loaded.unexpected_keys
        return model.eval()
