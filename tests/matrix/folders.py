"""The models that every release is tested with, saved or converted once by the installed package.

Each has a folder: `model` is the GDA model, and `source` what it was converted from, if any. `expected.safetensors` has
token ids and, for a model without a source, the results of `tests/support/naive.py`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import gda
from gda import GDAConfig, GDAForCausalLM

from ..support import naive
from ..support.llamas import VOCAB_SIZE, byte_tokenizer, with_older_names
from ..support.tiny import make_asymmetric, tiny_model

LENGTH, NEW_TOKENS = 40, 8  # the text is longer than every window, and than llama3's first context
WINDOW = 6
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MIXED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}  # full, then sliding
SOURCES: dict[str, tuple[type[PreTrainedModel], type[Any], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3 | {"rope_theta": 100.0}}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, MIXED),
    "tanh": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "diffllama": (DiffLlamaForCausalLM, DiffLlamaConfig, {"num_attention_heads": 8, "num_key_value_heads": 4}),
}
# Models with non-zero λ and without a source: by name, the fields of their configs.
PAIRED: dict[str, Any] = {"kv_layout": "paired", "num_key_value_heads": 4}
GROWING = {"fade": 0.4, "masked_signal_heads": 1, "masked_neurons": 5, "masked_layers": [1]}
LIVE: dict[str, dict[str, Any]] = {
    "shared": {"sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"]},
    "token": {"lambda_type": "tanh", "head_norm": True, "qk_norm": True},
    "fading": {"lambda_target": 0.5, "qk_rank": 3, **GROWING},
    "blended": {"fade": 0.4, "masked_layers": [1], "blended_layers": True},
    "motif": {**PAIRED, "hidden_act": "poly_norm", "head_norm": True, "lambda_init_offset": -1, "rms_norm_eps": 1e-6},
}
PLAIN = ("fading",)  # those that a Llama can hold


def make(root: Path) -> None:
    """Create all folders under `root`, and a text for the commands."""
    for seed, name in enumerate(SOURCES):
        _save_source(root / name / "source", name, seed)
        options = {"lambda_type": "tanh"} if name == "tanh" else {}
        gda.convert(root / name / "source", root / name / "model", **options)
        gda.export(root / name / "model", root / name / "exported", format=source_type(root / name / "source"))
        save_file({"ids": token_ids(seed)}, root / name / "expected.safetensors")
    for seed, (name, fields) in enumerate(LIVE.items(), len(SOURCES)):
        model = tiny_model(vocab_size=VOCAB_SIZE, pad_token_id=0, seed=seed, **fields)
        model.save_pretrained(root / name / "model")
        if name in PLAIN:
            gda.export(root / name / "model", root / name / "exported")
        save_file(_expected(model, token_ids(seed)), root / name / "expected.safetensors")
    (root / "text.txt").write_text("The cat sat on the mat, and another cat sat in the other hat.\n" * 40)


def source_type(folder: Path) -> str:
    """The model type of a saved model."""
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def token_ids(seed: int) -> Tensor:
    """(2, LENGTH), without padding tokens."""
    return torch.randint(1, VOCAB_SIZE, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def _save_source(folder: Path, name: str, seed: int) -> None:
    """A model of transformers whose config.json has RoPE in the forms of transformers 4 and 5."""
    model_class, config_class, fields = SOURCES[name]
    model = make_asymmetric(model_class(config_class(**(SHAPE | fields))), seed)
    model.generation_config = GenerationConfig(pad_token_id=0)
    model.save_pretrained(folder)
    _save_tokenizer(folder, name)
    _change_json(folder / "config.json", **with_older_names(json.loads((folder / "config.json").read_text())))


def _save_tokenizer(folder: Path, name: str) -> None:
    """A tokenizer in the form of transformers 4. The Mistral's names a class that transformers 5 doesn't believe."""
    tokenizer = byte_tokenizer()
    fields: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if name == "mistral":
        fields = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    tokenizer.save_pretrained(folder)
    _change_json(folder / "tokenizer_config.json", **fields)


def _change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


@torch.no_grad()
def _expected(model: GDAForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """Logits and maps of the whole text, and the greedy text after it, by the loops of `naive`."""
    config: GDAConfig = model.config
    run = naive.run(model.state_dict(), config, ids)
    text = ids
    for _ in range(NEW_TOKENS):
        text = torch.cat((text, naive.run(model.state_dict(), config, text).logits[:, -1:].argmax(-1)), dim=1)
    maps = torch.stack(run.maps).float()
    return {"ids": ids, "logits": run.logits.float(), "maps": maps, "greedy": text}
