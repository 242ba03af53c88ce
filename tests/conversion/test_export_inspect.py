"""Export of an expanded Llama restores it bit for bit, and `inspect` counts correctly."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import gda
from gda import GDAConfig, GDAForCausalLM
from gda.conversion.writing.headmap import head_map

from ..support.checkpoints import logits
from ..support.llamas import VARIANTS, change_config, files_of, save_llama, tensors_of, with_older_names
from ..support.tiny import set_lambda, tiny_config, tiny_model, token_ids

pytestmark = pytest.mark.sampled


def expanded(folder: Path, **options: Any) -> Path:
    """A tiny Llama in `folder`/llama, and the path of its conversion."""
    conversion = {name: options.pop(name) for name in ("lambda_type", "noise_heads") if name in options}
    gda.convert(save_llama(folder / "llama", **options), folder / "gda", verify=False, **conversion)
    return folder / "gda"


# --------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize(
    ("variant", "lambda_type"), zip(VARIANTS, itertools.cycle(["reparameterized", "tanh"]), strict=False)
)
def test_round_trip_is_bit_for_bit(variant: str, lambda_type: str, tmp_path: Path) -> None:
    """Tensors, dtypes, config and all other files equal the source's, and transformers loads it as a Llama."""
    gda_folder = expanded(tmp_path, **VARIANTS[variant], lambda_type=lambda_type)
    report = gda.export(gda_folder, tmp_path / "back", max_shard_size=VARIANTS[variant].get("max_shard_size", "5GB"))
    before, after = files_of(tmp_path / "llama"), files_of(tmp_path / "back")
    assert set(before) | {"README.md", "conversion.json"} == set(after)
    for name in before:
        if name == "config.json":
            assert json.loads(after[name]) == with_older_names(json.loads(before[name]))
        else:
            assert after[name] == before[name], name
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "back"), LlamaForCausalLM)
    ids = torch.randint(200, (2, 40), generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(tmp_path / "back", ids), logits(tmp_path / "llama", ids))
    assert report.num_parameters == sum(tensor.numel() for tensor in tensors_of(tmp_path / "llama").values())
    assert json.loads(json.dumps(report.to_dict()))["num_tensors"] == len(tensors_of(tmp_path / "llama"))


@pytest.mark.parametrize("variant", ["gqa", "llama3", "yarn"])
def test_exported_folder_converts_again(variant: str, tmp_path: Path) -> None:
    """RoPE in the forms of transformers 4 and 5 is read as one RoPE, and no field is reported as unread."""
    gda_folder = expanded(tmp_path, **VARIANTS[variant])
    gda.export(gda_folder, tmp_path / "back")
    report = gda.convert(tmp_path / "back", tmp_path / "again", verify=False)
    assert report.notes == []
    assert (tmp_path / "again" / "config.json").read_bytes() == (gda_folder / "config.json").read_bytes()


@pytest.mark.parametrize("noise_heads", [1, 2, 4, 8])
def test_round_trip_for_every_number_of_noise_heads(noise_heads: int, tmp_path: Path) -> None:
    """Fewer than the KV heads, as many and more, with biases: the right rows are dropped."""
    changes = {"num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": True}
    gda.export(expanded(tmp_path, noise_heads=noise_heads, **changes), tmp_path / "back")
    before, after = tensors_of(tmp_path / "llama"), tensors_of(tmp_path / "back")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_trained_noise_rows_are_dropped(tmp_path: Path) -> None:
    """While λ is 0, noise rows have no effect."""
    folder = expanded(tmp_path)
    tensors = tensors_of(folder)
    tensors["model.layers.0.self_attn.q_proj.weight"][-8:] += 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    gda.export(folder, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "llama" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("lambda_type", "tensor"),
    [("reparameterized", "lambda_q1"), ("reparameterized", "lambda_k2"), ("tanh", "lambda_proj.weight")],
)
def test_dropping_noise_heads_requires_lambda_0(lambda_type: str, tensor: str, tmp_path: Path) -> None:
    """One element of one λ tensor of layer 1 changed: the message names the layer, and no files are left."""
    folder = expanded(tmp_path, lambda_type=lambda_type)
    tensors = tensors_of(folder)
    tensors[f"model.layers.1.self_attn.{tensor}"].view(-1)[3] += 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="layer 1"):
        gda.export(folder, tmp_path / "deep" / "back", heads="original")
    assert sorted(os.listdir(tmp_path)) == ["gda", "llama"]


def test_window_without_sliding_layers(tmp_path: Path) -> None:
    """This computes what a Llama computes, so it is exported or the field is named."""
    model = tiny_model(sliding_window=4, layer_types=["full_attention"] * 2, lambda_init=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda" in name:
                parameter.zero_()
    model.save_pretrained(tmp_path / "gda")
    ids = token_ids(1, 20)
    reason = None
    try:
        gda.export(tmp_path / "gda", tmp_path / "back")
    except ValueError as error:
        reason = str(error)
    if reason is not None:
        assert "sliding_window" in reason
    else:
        assert torch.allclose(logits(tmp_path / "back", ids), logits(tmp_path / "gda", ids), atol=1e-5)


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    """The message lists the formats."""
    with pytest.raises(ValueError, match="llama"):
        gda.export(expanded(tmp_path), tmp_path / "back", format="gpt")
    assert sorted(os.listdir(tmp_path)) == ["gda", "llama"]


def test_export_overwrite(tmp_path: Path) -> None:
    """An existing OUT is kept unless --overwrite is passed, and is then replaced as a whole."""
    folder = expanded(tmp_path)
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "old").write_text("old")
    with pytest.raises(FileExistsError, match="--overwrite"):
        gda.export(folder, tmp_path / "back")
    assert files_of(tmp_path / "back") == {"old": b"old"}
    gda.export(folder, tmp_path / "back", overwrite=True)
    assert not (tmp_path / "back" / "old").exists()
    assert sorted(os.listdir(tmp_path)) == ["back", "gda", "llama"]


# -------------------------------------------------------------------------------------------------------------- inspect


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_norm": True, "qk_norm": True, "lambda_type": "sigmoid"},
        {"kv_layout": "paired", "head_norm": True, "hidden_act": "poly_norm"},
        {"lambda_type": "tanh", "num_noise_heads": 4, "num_key_value_heads": 2},
    ],
    ids=str,
)
def test_parameters_by_part(changes: dict[str, Any], tmp_path: Path) -> None:
    """Each part equals its modules, and the sum is `model.num_parameters()`."""
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path / "gda")
    report = gda.inspect(tmp_path / "gda")
    assert report.num_parameters == sum(report.parameters.values()) == model.num_parameters()

    def size(*suffixes: str) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if any(suffix in name for suffix in suffixes))

    assert report.parameters["embedding"] == size("embed_tokens")
    assert report.parameters["signal and noise queries"] == size(".q_proj.", ".q_norm.")
    assert report.parameters["keys and values"] == size(".k_proj.", ".v_proj.", ".k_norm.")
    assert report.parameters["attention output"] == size(".o_proj.")
    assert report.parameters["λ"] == size(".lambda_")
    assert report.parameters["MLP"] == size(".mlp.")
    assert report.parameters["norms"] == size("layernorm", "model.norm", ".subln.")
    assert report.parameters["language-model head"] == size("lm_head")


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_cache_bytes_equal_a_filled_cache(dtype: torch.dtype, width: int, tmp_path: Path) -> None:
    """The source's cache has the same size, because keys and values are shared."""
    folder = expanded(tmp_path, dtype=dtype, num_key_value_heads=1)
    report = gda.inspect(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    cache = model(torch.arange(7).unsqueeze(0), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert report.kv_cache_bytes_per_token == held / 7 == 2 * 2 * 1 * 8 * width
    assert report.source_kv_cache_bytes_per_token == report.kv_cache_bytes_per_token
    assert report.dtype == str(dtype).removeprefix("torch.")
    (folder / "conversion.json").unlink()
    assert gda.inspect(folder).source_kv_cache_bytes_per_token is None


def test_cache_bytes_of_the_paired_layout(tmp_path: Path) -> None:
    """num_key_value_heads counts both members of the pairs."""
    tiny_model(kv_layout="paired").save_pretrained(tmp_path / "gda")
    assert gda.inspect(tmp_path / "gda").kv_cache_bytes_per_token == 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("lambda_init", [None, 0.25, [0.5, -0.5]])
def test_lambda_by_layer(lambda_init: Any, tmp_path: Path) -> None:
    """As the model computes it, after its vectors have changed."""
    model = GDAForCausalLM(tiny_config(lambda_init=lambda_init))
    generator = torch.Generator().manual_seed(3)
    wanted = [0.9, 1.7]
    for layer, value in zip(model.model.layers, wanted, strict=True):
        set_lambda(layer.self_attn, value, generator)
    model.save_pretrained(tmp_path / "gda")
    assert gda.inspect(tmp_path / "gda").lambdas == pytest.approx(wanted, abs=1e-5)


def test_token_dependent_lambda_is_none(tmp_path: Path) -> None:
    """Except where the projection is zero."""
    folder = expanded(tmp_path, lambda_type="tanh")
    assert gda.inspect(folder).lambdas == [0.0, 0.0]
    tensors = tensors_of(folder)
    tensors["model.layers.1.self_attn.lambda_proj.weight"][0, 0] = 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert gda.inspect(folder).lambdas == [0.0, None]
    tiny_model(lambda_type="sigmoid").save_pretrained(tmp_path / "sigmoid")
    assert gda.inspect(tmp_path / "sigmoid").lambdas == [None, None]


def test_report_is_json_and_matches_the_config(tmp_path: Path) -> None:
    report = gda.inspect(expanded(tmp_path, num_attention_heads=4, num_key_value_heads=4))
    assert (report.num_signal_heads, report.num_noise_heads, report.num_key_value_heads) == (4, 4, 4)
    assert (report.num_layers, report.head_dim, report.kv_layout, report.name) == (2, 8, "shared", "gda")
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()


def test_inspect_reads_only_lambda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it works for models larger than memory."""
    from gda.conversion.tensors.safetensors_io import SafetensorsReader

    folder = expanded(tmp_path)
    read, names = SafetensorsReader.read, []

    def counted(self: SafetensorsReader, name: str) -> Tensor:
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(SafetensorsReader, "read", counted)
    gda.inspect(folder)
    assert len(names) == 8
    assert all("lambda" in name for name in names)


@pytest.mark.parametrize("kind", ["llama", "nothing"])
def test_inspect_refuses_other_models(kind: str, tmp_path: Path) -> None:
    """For a Llama, the message names the remedy; a missing folder is named."""
    if kind == "llama":
        save_llama(tmp_path / "llama")
        with pytest.raises(ValueError, match="gda convert"):
            gda.inspect(tmp_path / "llama")
    else:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            gda.inspect(tmp_path / "nowhere" / "at" / "all")


# ------------------------------------------------------------------------------------------------------------- head map

HEAD_MAPS = {
    # N = G
    (12, 3, 3, "shared"): """\
KV heads     0        1        2
query heads  s s s n  s s s n  s s s n

9 signal + 3 noise, 3:1, 2 layers""",
    # N < G: a noise head serves two KV heads
    (9, 1, 2, "shared"): """\
KV heads     0, 1
query heads  s s s s s s s s n

8 signal + 1 noise, 8:1, 2 layers""",
    # N > G: two groups on each KV head
    (12, 4, 2, "shared"): """\
KV heads     0                1
query heads  s s n  s s n     s s n  s s n

8 signal + 4 noise, 2:1, 2 layers""",
    # a wide model is cut after four KV heads
    (40, 8, 8, "shared"): """\
KV heads     0          1          2          3           …
query heads  s s s s n  s s s s n  s s s s n  s s s s n  …

32 signal + 8 noise, 4:1, 2 layers""",
    (8, 2, 4, "paired"): """\
KV heads     0 signal, 1 noise  2 signal, 3 noise
query heads  s s s n            s s s n

6 signal + 2 noise, 3:1, 2 layers""",
}


@pytest.mark.parametrize(("heads", "noise", "kv_heads", "layout"), HEAD_MAPS)
def test_head_map(heads: int, noise: int, kv_heads: int, layout: str) -> None:
    """Each KV head has a column above the query heads that read it."""
    config = tiny_config(
        num_attention_heads=heads, num_noise_heads=noise, num_key_value_heads=kv_heads, kv_layout=layout
    )
    drawn = [line.split() for line in head_map(config).splitlines()]
    assert drawn == [line.split() for line in HEAD_MAPS[heads, noise, kv_heads, layout].splitlines()]


@pytest.mark.parametrize("layout", ["shared", "paired"])
@pytest.mark.parametrize("noise", [1, 2, 4, 8])
def test_columns_of_the_head_map_line_up(noise: int, layout: str) -> None:
    """Each KV column starts above the first query head that reads it, and each head is drawn once."""
    kv_heads = {"shared": 4, "paired": 2}[layout]
    config = tiny_config(
        num_attention_heads=8 + noise, num_noise_heads=noise, num_key_value_heads=kv_heads, kv_layout=layout
    )
    kv_line, query_line = head_map(config).splitlines()[:2]
    assert query_line.split().count("s") == 8
    assert query_line.split().count("n") == noise
    kv_starts = [
        i for i, char in enumerate(kv_line) if char.isdigit() and kv_line[i - 1] == " " and kv_line[i - 2] == " "
    ]
    for start in kv_starts:
        assert query_line[start] == "s"
        assert query_line[start - 2 : start] == "  "


def test_head_map_is_the_same_everywhere(tmp_path: Path) -> None:
    """In the report of convert, in inspect and in the card."""
    folder = expanded(tmp_path, noise_heads=1)
    drawing = head_map(GDAConfig.from_pretrained(folder))
    assert gda.inspect(folder).head_map == drawing
    assert drawing in (folder / "README.md").read_text()


def test_float64_keeps_its_bits(tmp_path: Path) -> None:
    """Signal rows of a float64 source do not pass through float32."""
    source = save_llama(tmp_path / "llama", dtype=torch.float64)
    gda.convert(source, tmp_path / "gda", verify=False)
    gda.export(tmp_path / "gda", tmp_path / "back")
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_equal_tensors_with_another_rope_fail_verification(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "llama")
    gda.convert(source, tmp_path / "gda", verify=False)
    assert gda.verify(source, tmp_path / "gda", method="tensors").passed
    change_config(source, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    with pytest.raises(ValueError, match="rope_parameters"):
        gda.verify(source, tmp_path / "gda", method="tensors")


def test_folder_named_like_a_licence_is_not_copied(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "llama")
    (source / "LICENSES").mkdir()
    (source / "LICENSE").write_text("do what you like")
    gda.convert(source, tmp_path / "gda", verify=False)
    assert (tmp_path / "gda" / "LICENSE").read_text() == "do what you like"
    assert not (tmp_path / "gda" / "LICENSES").exists()


def test_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", verify=False)
    with pytest.raises(ValueError, match="--revision"):
        gda.inspect(tmp_path / "gda", revision="main")
