"""Meta devices, offloading and loading with accelerate and from_pretrained."""

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.utils import compute_module_sizes
from safetensors.torch import load_file, save_file

from gda import GDAConfig, GDAForCausalLM

pytestmark = pytest.mark.sampled

LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {"num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 2},
    "fewer-noise-than-kv": {"num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 4},
    "paired": {"kv_layout": "paired", "num_attention_heads": 10, "num_noise_heads": 2, "num_key_value_heads": 4},
}
CASES = [("shared", "reparameterized"), ("fewer-noise-than-kv", "sigmoid"), ("paired", "reparameterized")]
SPLIT_OVER_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "lm_head": "cpu",
}
each_case = pytest.mark.parametrize(("layout", "lambda_type"), CASES)
each_meta_device = pytest.mark.parametrize(
    "on_meta_device",
    [init_empty_weights, lambda: init_empty_weights(include_buffers=True), lambda: torch.device("meta")],
)


def tiny_config(layout: str, lambda_type: str, **fields: Any) -> GDAConfig:
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
    extras = {"head_norm": True, "qk_norm": True, "hidden_act": "poly_norm", "attention_bias": True}
    return GDAConfig(
        **sizes
        | extras
        | {"bos_token_id": None, "eos_token_id": None, "lambda_type": lambda_type}
        | LAYOUTS[layout]
        | fields
    )


def tiny_model(layout: str, lambda_type: str, **fields: Any) -> GDAForCausalLM:
    """A model in which every weight differs from its initialization."""
    generator = torch.Generator().manual_seed(0)
    model = GDAForCausalLM(tiny_config(layout, lambda_type, **fields)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            rows = torch.linspace(0.5, 1.5, weight.shape[0]).view(-1, *[1] * (weight.dim() - 1))
            weight.copy_(rows * (0.3 * torch.randn(weight.shape, generator=generator) + 0.1 * (weight.dim() == 1)))
    return model


def token_ids() -> torch.Tensor:
    return torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(1))


def without(folder: Path, names: str) -> set[str]:
    """Remove the tensors that match `names` from a saved checkpoint, and return them."""
    tensors = load_file(folder / "model.safetensors")
    gone = {name for name in tensors if re.search(names, name)}
    save_file({k: v for k, v in tensors.items() if k not in gone}, folder / "model.safetensors", {"format": "pt"})
    return gone


@pytest.fixture
def dirty_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill uninitialized tensors with NaN, so that a missing initialization is visible."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@each_case
@each_meta_device
def test_meta_model_has_shapes_and_no_storage(
    layout: str, lambda_type: str, on_meta_device: Callable[[], AbstractContextManager]
) -> None:
    """Names, shapes and dtypes are those of a real model, and λ_init is known."""
    real = tiny_model(layout, lambda_type)
    with on_meta_device():
        empty = GDAForCausalLM(real.config)
    assert all(weight.is_meta for weight in empty.parameters())
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in real.state_dict().items()
    }
    assert [layer.self_attn.lambda_init for layer in empty.model.layers] == [
        layer.self_attn.lambda_init for layer in real.model.layers
    ]
    empty.load_state_dict(real.state_dict(), assign=True)
    empty.model.rotary_emb = real.model.rotary_emb
    assert torch.equal(empty(token_ids()).logits, real(token_ids()).logits)


@pytest.mark.parametrize("lambda_type", ["reparameterized", "tanh"])
def test_initialization_fills_a_materialized_meta_model(lambda_type: str) -> None:
    """`to_empty` and `initialize_weights` initialize every parameter and buffer."""
    with torch.device("meta"):
        model = GDAForCausalLM(tiny_config("shared", lambda_type))
    model.to_empty(device="cpu")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(float("nan"))
    model.initialize_weights()
    assert {name for name, tensor in tensors.items() if tensor.isnan().any()} == set()
    assert model(token_ids()).logits.isfinite().all()


@pytest.mark.slow
@each_case
def test_load_checkpoint_and_dispatch_over_disk(layout: str, lambda_type: str, tmp_path: Path) -> None:
    """accelerate runs a layer, λ vectors included, from disk with equal logits."""
    model = tiny_model(layout, lambda_type)
    model.save_pretrained(tmp_path / "model")
    with init_empty_weights():
        empty = GDAForCausalLM(model.config)
    spread = load_checkpoint_and_dispatch(
        empty, tmp_path / "model", device_map=SPLIT_OVER_DISK, offload_folder=tmp_path / "offload"
    ).eval()
    assert {weight.is_meta for weight in spread.model.layers[1].parameters()} == {True}
    assert {weight.is_meta for weight in spread.model.layers[0].parameters()} == {False}
    for _ in range(2):
        assert torch.equal(spread(token_ids()).logits, model(token_ids()).logits)


@each_case
def test_from_pretrained_with_a_layer_on_disk(layout: str, lambda_type: str, tmp_path: Path) -> None:
    """Logits and tokens equal those of the model in memory."""
    model = tiny_model(layout, lambda_type)
    model.save_pretrained(tmp_path / "model")
    spread = GDAForCausalLM.from_pretrained(
        tmp_path / "model", device_map=SPLIT_OVER_DISK, offload_folder=tmp_path / "offload"
    )
    assert spread.hf_device_map == SPLIT_OVER_DISK
    assert {weight.is_meta for weight in spread.model.layers[1].parameters()} == {True}
    ids = token_ids()
    assert torch.equal(spread(ids).logits, model(ids).logits)
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    found = spread.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_automatic_device_map_splits_no_layer(layout: str) -> None:
    """For any amount of memory; without `_no_split_modules` it would."""
    with init_empty_weights():
        model = GDAForCausalLM(tiny_config(layout, "reparameterized", num_hidden_layers=3))
    sizes = compute_module_sizes(model)

    def layers_are_split(kept_whole: list[str]) -> set[bool]:
        found = set()
        for percent in range(5, 110, 5):
            memory = {"cpu": sizes[""] * percent // 100, "disk": sizes[""] * 2}
            device_map = infer_auto_device_map(model, memory, no_split_module_classes=kept_whole)
            found.add(any(re.match(r"model\.layers\.\d+\.", name) for name in device_map))
        return found

    assert layers_are_split(model._no_split_modules) == {False}
    assert layers_are_split([]) == {False, True}


@each_case
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_saved_weights_reload_bit_for_bit(layout: str, lambda_type: str, shard: str, tmp_path: Path) -> None:
    """from_pretrained initializes no tensor that it loads, from one file or many shards."""
    model = tiny_model(layout, lambda_type)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (shard == "8KB")
    state = torch.get_rng_state()
    again, report = GDAForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(report.values())
    wanted = model.state_dict()
    assert again.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("names", ["lambda_", "lambda_q1"])
@pytest.mark.parametrize("layout", ["shared", "paired"])
def test_missing_lambda_vectors_are_initialized(layout: str, names: str, tmp_path: Path, dirty_memory: None) -> None:
    """They are N(0, 0.1²), as in a new model. Tensors in the checkpoint are kept."""
    model = tiny_model(layout, "reparameterized", num_hidden_layers=8, head_dim=16)
    model.save_pretrained(tmp_path)
    gone = without(tmp_path, names)
    assert len(gone) == {"lambda_": 4 * 8, "lambda_q1": 8}[names]
    torch.manual_seed(0)
    again, report = GDAForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == gone
    drawn = torch.stack([again.get_parameter(name) for name in sorted(gone)])
    assert 0.08 < drawn.std() < 0.12
    assert drawn.mean().abs() < 0.03
    assert len(drawn.unique(dim=0)) == len(gone)
    assert all(torch.equal(w, model.get_parameter(n)) for n, w in again.named_parameters() if n not in gone)


@pytest.mark.parametrize(
    ("names", "value"),
    [
        (r"act_fn\.weight", 1 / 3),
        (r"act_fn\.bias", 0.0),
        (r"[qk]_norm\.weight", 1.0),
        (r"subln\.weight", 1.0),
    ],
)
def test_other_missing_tensors_are_initialized(names: str, value: float, tmp_path: Path, dirty_memory: None) -> None:
    """PolyNorm and norms get the values of a new model."""
    model = tiny_model("shared", "reparameterized")
    model.save_pretrained(tmp_path)
    gone = without(tmp_path, names)
    assert gone
    again = GDAForCausalLM.from_pretrained(tmp_path)
    for name in gone:
        torch.testing.assert_close(again.get_parameter(name), torch.full_like(model.get_parameter(name), value))


def test_missing_lambda_projection_is_initialized(tmp_path: Path, dirty_memory: None) -> None:
    model = tiny_model("shared", "sigmoid", hidden_size=64, initializer_range=0.05)
    model.save_pretrained(tmp_path)
    gone = without(tmp_path, "lambda_proj")
    again = GDAForCausalLM.from_pretrained(tmp_path)
    assert len(gone) == 2
    assert all(0.04 < again.get_parameter(name).std() < 0.06 for name in gone)


@each_case
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(
    layout: str, lambda_type: str, copied: Callable[[GDAForCausalLM], GDAForCausalLM]
) -> None:
    """By deepcopy and by pickle."""
    model = tiny_model(layout, lambda_type, tie_word_embeddings=True)
    ids = token_ids()
    wanted = model(ids).logits
    again = copied(model)
    assert torch.equal(again(ids).logits, wanted)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        for weight in again.parameters():
            weight.zero_()
    assert torch.equal(model(ids).logits, wanted)
