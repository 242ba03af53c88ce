"""Tiny Llama checkpoints with a tokenizer, and with weights in which no two rows are equal."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .tiny import make_asymmetric

CHAT_TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}\n"
SPECIAL_TOKENS = ("<s>", "</s>", "<unk>")
MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("e", "r"), ("Ġ", "a"), ("o", "f"))
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS) + len(MERGES)

# By name, what differs from a Llama of 4 query heads over 2 KV heads in float32, one file.
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "odd heads 9/3": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36, "head_dim": 4},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True, "attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 16},
    "gelu": {"hidden_act": "gelu"},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
    "dynamic": {
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "factor": 4.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 32,
        }
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16, "tie_word_embeddings": True},
    "shards": {"max_shard_size": "20KB", "dtype": torch.bfloat16},
}


def llama_config(**changes: Any) -> LlamaConfig:
    """A config of two small layers, updated with `changes`."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "rms_norm_eps": 3e-6,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return LlamaConfig(**(fields | changes))


def llama_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A Llama of `llama_config(**changes)` in which all rows, norms and biases differ."""
    model = make_asymmetric(LlamaForCausalLM(llama_config(**changes)), seed)
    return model.to(dtype)


_HOME = tempfile.TemporaryDirectory(prefix="gda-tests-llamas-")
_SAVED: dict[str, Path] = {}  # by options


def save_llama(folder: Path, **options: Any) -> Path:
    """Save a tiny Llama to `folder`; `options` are those of `_save_llama`. Each is made once, and then copied."""
    key = repr(sorted(options.items()))
    if key not in _SAVED:
        _SAVED[key] = _save_llama(Path(_HOME.name) / str(len(_SAVED)), **options)
    # Like files that are written, they have times of their own, by which a changed source is known.
    shutil.copytree(_SAVED[key], folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    return folder


def _save_llama(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
    tokenizer: bool = True,
    **changes: Any,
) -> Path:
    """Save a tiny Llama to `folder` with transformers' `save_pretrained`, by default with its tokenizer."""
    model = llama_model(dtype, seed, **changes)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, temperature=0.7, do_sample=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges, special tokens and a chat template, which encodes any text."""
    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    bpe = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, list(MERGES)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def change_config(folder: Path, **changes: Any) -> None:
    """Write `changes` into `folder`/config.json; a value of `...` removes the field."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}, indent=2))


def with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 with transformers 4's names for RoPE and the dtype beside."""
    rope = config["rope_parameters"]
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "torch_dtype": config["dtype"]}
    return config | older | ({"rope_scaling": None} if rope["rope_type"] == "default" else {})


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every file under `folder`, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if not path.is_dir()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
