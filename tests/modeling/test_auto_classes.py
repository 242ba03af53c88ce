"""After `import gda`, the Auto classes work, and every head saves, loads and trains."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

import gda

from ..support import naive
from ..support.tiny import make_asymmetric, relative_error, tiny_config, tiny_model, token_ids

HEADS: dict[str, tuple[Any, type[PreTrainedModel], dict[str, Any]]] = {
    "model": (AutoModel, gda.GDAModel, {}),
    "causal-lm": (AutoModelForCausalLM, gda.GDAForCausalLM, {}),
    "sequence": (AutoModelForSequenceClassification, gda.GDAForSequenceClassification, {"num_labels": 4}),
    "token": (AutoModelForTokenClassification, gda.GDAForTokenClassification, {"num_labels": 5}),
    "question": (AutoModelForQuestionAnswering, gda.GDAForQuestionAnswering, {}),
}
every_head = pytest.mark.parametrize(("auto_class", "model_class", "fields"), HEADS.values(), ids=HEADS)
each_layout = pytest.mark.parametrize("kv_layout", ["shared", "paired"])


@torch.no_grad()
def outputs(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    return [value for value in model(ids, use_cache=False).to_tuple() if isinstance(value, Tensor)]


@every_head
@each_layout
def test_auto_classes(
    auto_class: Any, model_class: type[PreTrainedModel], fields: dict[str, Any], kv_layout: str, tmp_path: Path
) -> None:
    """Each Auto class creates its class from a config, and loads a saved model from a folder."""
    config = tiny_config(pad_token_id=0, kv_layout=kv_layout, **fields)
    model = auto_class.from_config(config)
    assert type(model) is model_class
    make_asymmetric(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [model_class.__name__]
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = token_ids(2, 9)
    for got, expected in zip(outputs(loaded, ids), outputs(model, ids), strict=True):
        assert torch.equal(got, expected)


@each_layout
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sharded_checkpoint(kv_layout: str, tied: bool, tmp_path: Path) -> None:
    """Each tensor is in one shard under its name, and the model reloads."""
    model = tiny_model(kv_layout=kv_layout, tie_word_embeddings=tied, head_norm=True, qk_norm=True)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].keys()
    assert ("lm_head.weight" in names) != tied
    assert names == model.state_dict().keys() - ({"lm_head.weight"} if tied else set())
    loaded = gda.GDAForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, token_ids(2, 9))[0], outputs(model, token_ids(2, 9))[0])
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


SHARED_NAMES = {
    "self_attn.q_proj.weight": (8 * 8, 24),
    "self_attn.k_proj.weight": (2 * 8, 24),
    "self_attn.v_proj.weight": (2 * 8, 24),
    "self_attn.o_proj.weight": (24, 6 * 8),
    "self_attn.q_proj.bias": (8 * 8,),
    "self_attn.k_proj.bias": (2 * 8,),
    "self_attn.v_proj.bias": (2 * 8,),
    "self_attn.o_proj.bias": (24,),
    "self_attn.q_norm.weight": (8,),
    "self_attn.k_norm.weight": (8,),
    "mlp.gate_proj.weight": (40, 24),
    "mlp.up_proj.weight": (40, 24),
    "mlp.down_proj.weight": (24, 40),
    "mlp.gate_proj.bias": (40,),
    "mlp.up_proj.bias": (40,),
    "mlp.down_proj.bias": (24,),
    "mlp.act_fn.weight": (3,),
    "mlp.act_fn.bias": (1,),
    "input_layernorm.weight": (24,),
    "post_attention_layernorm.weight": (24,),
}


@each_layout
@pytest.mark.parametrize("lambda_type", ["reparameterized", "sigmoid"])
def test_names_and_shapes_of_tensors(kv_layout: str, lambda_type: str) -> None:
    """The names of Llama's and Motif's tensors, with shapes that follow from the heads."""
    model = tiny_model(
        kv_layout=kv_layout,
        lambda_type=lambda_type,
        head_norm=True,
        qk_norm=True,
        attention_bias=True,
        mlp_bias=True,
        hidden_act="poly_norm",
    )
    width = 8 if kv_layout == "shared" else 16
    of_a_layer = SHARED_NAMES | {"self_attn.o_proj.weight": (24, 6 * width), "self_attn.subln.weight": (width,)}
    if lambda_type == "reparameterized":
        of_a_layer |= {f"self_attn.lambda_{name}": (8,) for name in ("q1", "k1", "q2", "k2")}
    else:
        of_a_layer["self_attn.lambda_proj.weight"] = (6, 24)
    expected = {f"model.layers.{layer}.{name}": shape for layer in (0, 1) for name, shape in of_a_layer.items()}
    expected |= {"model.embed_tokens.weight": (61, 24), "model.norm.weight": (24,), "lm_head.weight": (61, 24)}
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == expected


@pytest.mark.slow
def test_importing_gda_imports_no_optional_library() -> None:
    script = (
        "import sys, gda\n"
        "assert 'gda.modeling_gda.modeling_gda' in sys.modules\n"
        "assert not sys.modules.keys() & {'lm_eval', 'datasets', 'matplotlib', 'gda.conversion.convert'}\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_command_registers_the_type_when_it_opens_a_model() -> None:
    """Started as the command `gda`, `import gda` imports no library."""
    script = (
        "import sys\n"
        "sys.argv[0] = '/somewhere/gda'\n"
        "import gda\n"
        "assert not sys.modules.keys() & {'transformers', 'torch', 'numpy', 'huggingface_hub'}\n"
        "import gda.conversion.sources.open, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model('gda', **TINY))\n"
        "assert type(model) is gda.GDAForCausalLM\n"
    )
    tiny = tiny_config().to_diff_dict()
    tiny.pop("model_type")
    subprocess.run([sys.executable, "-c", f"TINY = {tiny!r}\n{script}"], check=True)


FROM_A_CONFIG = (
    "model = transformers.AutoModelForCausalLM.from_config(config)\nassert type(model) is gda.GDAForCausalLM"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        "import gda, transformers; config = transformers.AutoConfig.for_model('gda', **fields)",
        "import transformers.models.auto, gda; config = transformers.AutoConfig.for_model('gda', **fields)",
        "import gda; config = gda.GDAConfig(**fields); import transformers",
        "import gda; gda.GDAForCausalLM; import transformers; config = gda.GDAConfig(**fields)",
        "import pickle; config = pickle.loads(pickled); import transformers, gda",
    ],
)
def test_order_of_imports_does_not_matter(order: str) -> None:
    """Of gda, transformers and the first config."""
    config = tiny_config()
    fields = f"fields = {config.to_diff_dict()!r}\nfields.pop('model_type')\n"
    script = f"pickled = {pickle.dumps(config)!r}\n{fields}{order}\n{FROM_A_CONFIG}"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModelForTokenClassification"])
def test_fresh_process_needs_only_the_import(auto_class: str, tmp_path: Path) -> None:
    """With each Auto class as the first one used."""
    tiny_model().save_pretrained(tmp_path)
    script = (
        "import sys, gda, transformers\n"
        f"model = transformers.{auto_class}.from_pretrained(sys.argv[1])\n"
        f"assert type(model).__name__ == '{auto_class}'.replace('AutoModel', 'GDA'), type(model)\n"
        "assert type(model.config) is gda.GDAConfig\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


@pytest.mark.slow
def test_without_the_import_the_type_is_unknown(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path, bundle_code=False)
    script = "import sys, transformers; transformers.AutoConfig.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "gda" in done.stderr


@each_layout
@torch.no_grad()
def test_sequence_classification_reads_the_last_token(kv_layout: str) -> None:
    """(B, num_labels) at the last token that is not padding, with padding on either side."""
    config = tiny_config(pad_token_id=0, kv_layout=kv_layout, num_labels=4)
    model = make_asymmetric(gda.GDAForSequenceClassification(config))
    ids = token_ids(1, 6).clamp(min=1)
    alone = model(ids).logits
    assert alone.shape == (1, 4)
    for padding in ((0, 3), (3, 0)):
        padded = torch.nn.functional.pad(ids, padding)
        logits = model(padded, attention_mask=(padded != 0).long()).logits
        assert relative_error(logits, alone) <= 1e-5


def loss_and_gradients(model: PreTrainedModel, **labels: Tensor) -> Tensor:
    """The loss of a batch, after checking that every parameter has a gradient."""
    loss = model(token_ids(2, 9).clamp(min=1), **labels).loss
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    lambda_gradients = [p.grad for name, p in model.named_parameters() if "lambda" in name]
    assert lambda_gradients
    assert all(gradient.abs().max() > 0 for gradient in lambda_gradients)
    return loss.detach()


@each_layout
@pytest.mark.parametrize("lambda_type", ["reparameterized", "sigmoid", "tanh"])
def test_causal_lm_loss(kv_layout: str, lambda_type: str) -> None:
    """The cross entropy of the reference's logits; λ has a gradient."""
    model = tiny_model(kv_layout=kv_layout, lambda_type=lambda_type)
    ids = token_ids(2, 9).clamp(min=1)
    labels = ids.clone()
    labels[0, :4] = -100
    loss = loss_and_gradients(model, labels=labels)
    logits = naive.run(model.state_dict(), model.config, ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert relative_error(loss, expected) <= 1e-5


@each_layout
def test_sequence_classification_loss(kv_layout: str) -> None:
    """Labels (B,) and logits (B, num_labels)."""
    config = tiny_config(pad_token_id=0, kv_layout=kv_layout, num_labels=4)
    model = make_asymmetric(gda.GDAForSequenceClassification(config))
    labels = torch.tensor([3, 1])
    logits = outputs(model, token_ids(2, 9).clamp(min=1))[0]
    assert (
        relative_error(loss_and_gradients(model, labels=labels), torch.nn.functional.cross_entropy(logits, labels))
        <= 1e-5
    )


@each_layout
def test_token_classification(kv_layout: str) -> None:
    """Logits (B, T, num_labels), and the cross entropy of every token's label."""
    model = make_asymmetric(gda.GDAForTokenClassification(tiny_config(kv_layout=kv_layout, num_labels=5)))
    labels = torch.randint(5, (2, 9), generator=torch.Generator().manual_seed(1))
    (logits,) = outputs(model, token_ids(2, 9).clamp(min=1))
    assert logits.shape == (2, 9, 5)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert relative_error(loss_and_gradients(model, labels=labels), expected) <= 1e-5


@each_layout
def test_question_answering(kv_layout: str) -> None:
    """Start and end logits (B, T), and the mean of their cross entropies."""
    model = make_asymmetric(gda.GDAForQuestionAnswering(tiny_config(kv_layout=kv_layout)))
    start, end = torch.tensor([2, 5]), torch.tensor([4, 8])
    logits = outputs(model, token_ids(2, 9).clamp(min=1))
    assert [part.shape for part in logits] == [(2, 9), (2, 9)]
    expected = (
        sum(torch.nn.functional.cross_entropy(part, at) for part, at in zip(logits, (start, end), strict=True)) / 2
    )
    assert relative_error(loss_and_gradients(model, start_positions=start, end_positions=end), expected) <= 1e-5


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_embeddings_resize(tied: bool, tmp_path: Path) -> None:
    """Remaining tokens keep their logits, and the resized model saves and loads."""
    model, ids = tiny_model(tie_word_embeddings=tied), token_ids(2, 9).clamp(max=49)
    expected = model(ids).logits
    for size in (70, 50):
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.config.vocab_size == size
        logits = model(ids).logits
        kept = min(size, 61)
        assert logits.shape[-1] == size
        assert torch.equal(logits[..., :kept], expected[..., :kept])
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        model.save_pretrained(tmp_path / str(size))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(size))
        assert torch.equal(loaded(ids).logits, logits)


def test_public_names() -> None:
    """Every public name can be imported from gda; an unknown one is an AttributeError."""
    for name in ("GDAModel", "GDAForCausalLM", "GDAForSequenceClassification"):
        assert name in dir(gda)
        assert getattr(gda, name).config_class is gda.GDAConfig
    with pytest.raises(AttributeError, match="no attribute 'GDAForTranslation'"):
        gda.GDAForTranslation  # noqa: B018
    assert AutoConfig.for_model("gda").model_type == "gda"


@pytest.mark.slow
def test_unpickled_config_builds_a_model(tmp_path: Path) -> None:
    """In a worker process that never called the config's constructor."""
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(tiny_config()))
    program = (
        "import pickle, sys, transformers; config = pickle.load(open(sys.argv[1], 'rb'));"
        "print(type(transformers.AutoModel.from_config(config)).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "config.pkl"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["GDAModel"]


def test_public_names_are_stable() -> None:
    """No module replaces a function of the same name."""
    for name in gda.__all__:
        first = getattr(gda, name)
        assert getattr(gda, name) is first
        assert isinstance(first, str) or callable(first), name


def test_dtype_auto(tmp_path: Path) -> None:
    """As in transformers' server. Without weights there is no dtype to use."""
    tiny_config().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, dtype="auto").dtype == "auto"
    with pytest.raises(ValueError, match=r"GDAConfig\.dtype .* got 'auto'"):
        tiny_config(dtype="auto")


FIRST_LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lists": {
        "lambda_init": [0.1, 0.2, 0.3],
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "a new layer": {"fade": 0.5, "masked_layers": [1]},
}


@pytest.mark.parametrize("fields", FIRST_LAYERS.values(), ids=FIRST_LAYERS)
@torch.no_grad()
def test_first_layers_of_a_model(fields: dict[str, Any], tmp_path: Path) -> None:
    """`num_hidden_layers=1` loads the first layer only; a model that was cut by hand can be saved and loaded."""
    model, ids = tiny_model(num_hidden_layers=3, **fields), token_ids(2, 9)
    model.save_pretrained(tmp_path / "whole")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", num_hidden_layers=1).eval()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    expected = naive.run(model.state_dict(), model.config, ids).logits
    assert relative_error(first(ids).logits, expected) <= 1e-5
    model.save_pretrained(tmp_path / "cut")
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert torch.equal(cut(ids).logits, first(ids).logits)


@pytest.mark.parametrize("fields", FIRST_LAYERS.values(), ids=FIRST_LAYERS)
def test_drafts_of_the_first_layers(fields: dict[str, Any]) -> None:
    """Self-speculative generation cuts the config for a while: the text is the model's own, and the config is whole."""
    model, ids = tiny_model(num_hidden_layers=3, **fields), token_ids(1, 9)
    before = model.config.to_dict()
    expected = model.generate(ids, do_sample=False, max_new_tokens=12)
    calls = [0, 0, 0]

    def count(layer: int) -> None:
        calls[layer] += 1

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: count(index))
    drafted = model.generate(ids, do_sample=False, max_new_tokens=12, assistant_early_exit=1)
    assert torch.equal(drafted, expected)
    assert calls[0] > calls[1] == calls[2] > 0
    assert model.config.to_dict() == before
    model.config.num_hidden_layers = 1
    assert len(model.config.layer_types) == 1


def test_fade_of_a_cut_model(tmp_path: Path) -> None:
    """`set_fade` counts, not the fade of the whole model."""
    tiny_model(num_hidden_layers=4, fade=0.2, masked_layers=[1, 3]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=3)
    model.set_fade(0.7)
    model.generate(token_ids(1, 5), do_sample=False, max_new_tokens=4, assistant_early_exit=1)
    assert (model.config.fade, model.config.masked_layers, model.config.num_hidden_layers) == (0.7, [1], 3)


def test_classes_derived_from_ours(tmp_path: Path) -> None:
    """A config and a model class of somebody else, as transformers' own allow it."""

    class TheirConfig(gda.GDAConfig):
        model_type = "theirs"

    class TheirModel(gda.GDAForCausalLM):
        config_class = TheirConfig
        _no_split_modules = ["TheirBlock"]
        _keep_in_fp32_modules_strict = {"router"}

    fields = {name: value for name, value in tiny_config().to_dict().items() if name != "model_type"}
    model = make_asymmetric(TheirModel(TheirConfig(**fields)))
    assert set(model._no_split_modules) == {"TheirBlock", "GDADecoderLayer"}
    assert {"router", "lambda_q1"} <= set(model._keep_in_fp32_modules_strict)
    ids = token_ids(2, 9)
    assert torch.equal(model(ids).logits, tiny_model()(ids).logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(TheirModel.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)
