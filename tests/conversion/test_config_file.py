"""A hostile config.json is refused when it is read, with the names of the file and the field."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gda import GDAConfig
from gda.conversion.sources.config_file import read_config, read_config_file, read_gda_config
from gda.eval.models import find_model

from ..support.llamas import change_config, save_llama
from ..support.tiny import tiny_config

READERS: dict[str, Callable[[Path], object]] = {
    "read_config_file": read_config_file,
    "convert": read_config,
    "train": read_gda_config,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the config.json of a tiny GDA model."""
    tiny_config().save_pretrained(tmp_path, bundle_code=False)
    return tmp_path


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


# Changes to the config.json of a GDA model, and the field that the error must name.
HOSTILE: list[tuple[dict[str, Any], str]] = [
    *(({name: 2**31}, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "num_labels")),
    ({"sliding_window": 2**63}, "sliding_window"),
    ({"num_attention_heads": 2**27, "num_noise_heads": 2**26, "head_dim": 64}, "num_attention_heads"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ({"text_config": {}}, "text_config"),
    ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
    ({"dtype": "load"}, "dtype"),
    ({"dtype": "auto"}, "dtype"),
    ({"dtype": 0.5}, "dtype"),
    ({"torch_dtype": "int8"}, "torch_dtype"),
    ({"id2label": {"a": "b"}}, "id2label"),
    ({"id2label": 5}, "id2label"),
    ({"label2id": []}, "label2id"),
    ({"num_labels": "2"}, "num_labels"),
    ({"quantization_config": 5}, "quantization_config"),
    ({"attn_implementation": 1}, "attn_implementation"),
    ({"attribute_map": {"hidden_size": "head_dim"}}, "attribute_map"),
    ({"num_signal_heads": 6}, "num_signal_heads"),
    ({"to_dict": 1}, "to_dict"),
    ({"__class__": None}, "__class__"),
    ({"self": 1}, "self"),
    ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),
    *(({name: nested(500)}, name) for name in ("num_noise_heads", "rope_parameters", "somebody_elses", "id2label")),
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("changes", "field"), HOSTILE, ids=lambda value: str(value)[:70])
def test_hostile_config_is_refused(changes: dict[str, Any], field: str, reader: str, folder: Path) -> None:
    """By each function that reads a config.json, in one line that names the file and the field."""
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=rf"config\.json: {field} ") as error:
        READERS[reader](folder)
    assert len(str(error.value)) < 1000
    assert len(str(error.value).splitlines()) == 1


def test_evaluation_refuses_hostile_config(folder: Path) -> None:
    """Before the model is loaded."""
    change_config(folder, num_hidden_layers=2**31)
    save_llama(folder / "llama")
    with pytest.raises(ValueError, match=r"config\.json: num_hidden_layers must be from 1 to"):
        find_model(folder, tokenizer=folder / "llama")


@pytest.mark.parametrize("reader", READERS)
def test_additional_entries_are_allowed(reader: str, folder: Path) -> None:
    """Those that transformers, older versions of it and other tools write."""
    extra = {"num_labels": 3, "torch_dtype": "bfloat16", "rope_theta": 100.0, "cls": 1, "somebody_elses": nested(15)}
    change_config(folder, **extra, text_config=None, quantization_config=None, id2label={"0": "a", "-1": "b", "2": "c"})
    read = READERS[reader](folder)
    assert isinstance(read, GDAConfig if reader != "read_config_file" else dict)


def test_gda_rules_apply_only_to_gda_models(folder: Path) -> None:
    """Evaluation accepts any model type."""
    changes = {"model_type": "other", "text_config": {"a": 1}, "is_encoder_decoder": True, "dtype": "auto"}
    change_config(folder, **changes)
    assert read_config_file(folder)["text_config"] == {"a": 1}
    change_config(folder, hidden_size=2**31)
    with pytest.raises(ValueError, match=r"config\.json: hidden_size must be from 1 to"):
        read_config_file(folder)


@pytest.mark.parametrize("text", ["[]", "1", "null"])
def test_config_must_be_a_dictionary(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json names no model_type"):
        read_config_file(folder)


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        read_config_file(tmp_path)


def test_odd_field_name_is_printed_on_one_line(folder: Path) -> None:
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(held | {"a\nb": nested(50)}))
    with pytest.raises(ValueError, match=r"config\.json: 'a\\nb' must not nest deeper than 20 levels$"):
        read_config_file(folder)
