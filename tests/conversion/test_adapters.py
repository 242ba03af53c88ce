"""PEFT adapters as sources are merged into their base model, then converted or exported."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import gda
from gda.conversion.sources.adapter import AdapterSource
from gda.conversion.split import splitter

from ..support.checkpoints import load, logits
from ..support.hub_server import Blob, Hub, put
from ..support.llamas import byte_tokenizer, files_of, save_llama, tensors_of
from ..support.repository import ROOT
from ..support.tiny import relative_error, tiny_model, token_ids


def save_adapter(base: Path, folder: Path, **changes: Any) -> Path:
    """Save a LoRA with random weights for the model in `base`. λ vectors of a GDA model are trained in full."""
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False} | changes
    get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(folder)
    return folder


def merged(base: Path, adapter: Path) -> Any:
    """The model merged by PEFT."""
    return PeftModel.from_pretrained(load(base), adapter).merge_and_unload().eval()


def test_adapter_of_llama_is_converted(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "llama")
    adapter = save_adapter(base, tmp_path / "adapter")
    report = gda.convert(adapter, tmp_path / "gda")
    assert report.notes == ["the adapter adapter is merged into llama"]
    ids = token_ids(2, 12)
    expected = logits(merged(base, adapter), ids)
    assert relative_error(logits(tmp_path / "gda", ids), expected) < 1e-5
    assert relative_error(logits(base, ids), expected) > 1e-2
    assert (tmp_path / "gda" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_split_does_not_round_the_merged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model writes its calibration text in bfloat16 where that is faster; what is written is in float32."""
    monkeypatch.setattr(splitter, "_multiplies_bfloat16", lambda device: True)
    base = save_llama(tmp_path / "llama")
    adapter = save_adapter(base, tmp_path / "adapter")
    options = {"mode": "split", "effort": "fast", "calibration_tokens": 512, "verify": False}
    gda.convert(adapter, tmp_path / "gda", **options)
    expected = merged(base, adapter).state_dict()
    same = {name: tensor for name, tensor in tensors_of(tmp_path / "gda").items() if ".mlp." in name}
    assert same
    for name, tensor in same.items():
        assert torch.equal(tensor, expected[name]), name


def test_adapter_of_gda_model_is_exported(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter")
    gda.export(adapter, tmp_path / "plain")
    gda.convert(adapter, tmp_path / "merged")
    ids = token_ids(2, 12)
    expected = logits(merged(tmp_path / "base", adapter), ids)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").config.model_type == "llama"
    for folder in ("plain", "merged"):
        assert relative_error(logits(tmp_path / folder, ids), expected) < 1e-5


def test_adapter_of_an_exported_model_restores_it(tmp_path: Path) -> None:
    """Its noise heads are those of the GDA model before, as for the exported model itself."""
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", verify=False)
    gda.export(tmp_path / "gda", tmp_path / "plain", heads="all")
    adapter = save_adapter(tmp_path / "plain", tmp_path / "adapter", target_modules=["up_proj"])
    report = gda.convert(adapter, tmp_path / "again")
    before = load(tmp_path / "gda").config
    assert report.config.num_attention_heads == before.num_attention_heads
    assert report.config.num_noise_heads == before.num_noise_heads
    ids = token_ids(2, 12)
    assert relative_error(logits(tmp_path / "again", ids), logits(merged(tmp_path / "plain", adapter), ids)) < 1e-5


@pytest.mark.parametrize("licence", [None, "other"])
def test_card_of_an_adapter(licence: str | None, tmp_path: Path, hub: Hub) -> None:
    """The adapter's licence counts, if it has one; a local adapter's base model is the one that it names."""
    base = save_llama(tmp_path / "llama")
    card = "---\nlicense: other\nlicense_link: base.txt\nbase_model: me/first\nlanguage: en\n---\n"
    (base / "README.md").write_text(card)
    put(hub, "me/llama", base)
    adapter = save_adapter(base, tmp_path / "adapter")
    change(adapter, base_model_name_or_path="me/llama")
    own = "" if licence is None else f"license: {licence}\nlicense_name: mine\n"
    (adapter / "README.md").write_text(f"---\n{own}base_model: ../llama\n---\n")
    gda.convert(adapter, tmp_path / "gda", verify=False)
    data = ModelCard.load(tmp_path / "gda" / "README.md").data
    assert (data.base_model, data.language) == ("me/llama", "en")
    assert data.license == "other"
    assert (data.license_name, data.license_link) == ((None, "base.txt") if licence is None else ("mine", None))


def test_code_of_the_base_tokenizer_stays_on_the_hub(tmp_path: Path, hub: Hub) -> None:
    """The adapter has no tokenizer, so the code is in the repository of its base."""
    base = save_llama(tmp_path / "llama")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_mine.Mine"]}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    put(hub, "me/llama", base)
    adapter = save_adapter(base, tmp_path / "adapter")
    change(adapter, base_model_name_or_path="me/llama")
    report = gda.convert(adapter, tmp_path / "gda", verify=False)
    assert any("me/llama--tokenization_mine.Mine; it stays on the Hub" in note for note in report.notes)


def test_history_and_new_parameters_are_those_of_the_base(tmp_path: Path) -> None:
    """conversion.json of the merged model has the steps of its base, the merge and the conversion."""
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "gda", verify=False)
    gda.convert(save_adapter(tmp_path / "gda", tmp_path / "adapter"), tmp_path / "merged", verify=False)
    new_parameters = [(tmp_path / name / "trainable.json").read_bytes() for name in ("gda", "merged")]
    assert new_parameters[0] == new_parameters[1]
    assert json.loads((tmp_path / "merged" / "conversion.json").read_text())["history"] == [
        "`expand` of llama.",
        "The adapter adapter was merged into gda.",
        "`map` of adapter.",
    ]


def test_bfloat16_base_stays_bfloat16(tmp_path: Path) -> None:
    """The merged weights have the dtypes of the base."""
    base = save_llama(tmp_path / "llama", dtype=torch.bfloat16)
    gda.convert(save_adapter(base, tmp_path / "adapter"), tmp_path / "gda")
    assert load(tmp_path / "gda", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), "as safetensors"),
        (lambda folder: change(folder, base_model_name_or_path=None), "names no base_model_name_or_path"),
        (lambda folder: change(folder, base_model_name_or_path=str(folder)), "is an adapter itself"),
        (
            lambda folder: change(folder, base_model_name_or_path="/nowhere/at/all"),
            "base_model_name_or_path: .*not exist",
        ),
        (lambda folder: change(folder, peft_type="NONE"), "cannot be merged into llama"),
        (lambda folder: rename_tensors(folder), "its tensors do not fit: it has a superfluous .*attn.*lora_A.weight"),
        (lambda folder: copy_weights(folder), "its tensors do not fit: it has no .*lora_A.weight"),
        (lambda folder: save_llama(folder, tokenizer=False), "holds both a model and an adapter"),
        (lambda folder: convert_base(folder), "base_model_name_or_path in adapter_config.json"),
        (lambda folder: save_prompt(folder), "into llama: PEFT cannot merge PROMPT_TUNING"),
    ],
    ids=[
        *("pickle", "no base", "an adapter of itself", "missing base", "unknown kind", "other tensors"),
        *("weights of the base", "beside a model", "base was converted", "prompt"),
    ],
)
def test_broken_adapter_is_refused(break_it: Any, message: str, tmp_path: Path) -> None:
    adapter = save_adapter(save_llama(tmp_path / "llama"), tmp_path / "adapter")
    break_it(adapter)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
        gda.convert(adapter, tmp_path / "gda")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "gda").exists()


@pytest.mark.parametrize("number_of_noise_heads", [1, 2, 4])
def test_adapter_of_the_source_on_the_converted_model(
    number_of_noise_heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rows that the guide adds, it does what it did on the source."""
    monkeypatch.chdir(tmp_path)
    base = save_llama(tmp_path / "llama")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    ids = token_ids(2, 12)
    expected = logits(merged(base, adapter), ids)
    gda.convert(base, tmp_path / "llama-gda", noise_heads=number_of_noise_heads)
    guide = (ROOT / "docs" / "convert.md").read_text().split("## Adapters")[1]
    exec(guide.split("```python")[1].split("```")[0], {})
    adapted = PeftModel.from_pretrained(load(tmp_path / "llama-gda"), tmp_path / "adapter-gda")
    assert relative_error(logits(adapted.eval(), ids), expected) < 1e-5
    assert relative_error(logits(tmp_path / "llama-gda", ids), expected) > 1e-2


def test_config_of_the_base_beside_an_adapter(tmp_path: Path) -> None:
    """As some programs write it: the folder is still an adapter."""
    base = save_llama(tmp_path / "llama")
    adapter = save_adapter(base, tmp_path / "adapter")
    (adapter / "config.json").write_bytes((base / "config.json").read_bytes())
    gda.convert(adapter, tmp_path / "gda")
    expected = logits(merged(base, adapter), token_ids(2, 12))
    assert relative_error(logits(tmp_path / "gda", token_ids(2, 12)), expected) < 1e-5


def test_adapter_of_gda_beside_its_config(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter")
    (adapter / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    gda.convert(adapter, tmp_path / "merged")
    expected = logits(merged(tmp_path / "base", adapter), token_ids(2, 12))
    assert relative_error(logits(tmp_path / "merged", token_ids(2, 12)), expected) < 1e-5


def test_adapter_that_repeats_layers_is_refused(tmp_path: Path) -> None:
    """The layers of the base alone would be another model."""
    adapter = save_adapter(save_llama(tmp_path / "llama"), tmp_path / "adapter", layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(ValueError, match="adapter repeats layers; merge it with PEFT"):
        gda.convert(adapter, tmp_path / "gda", verify=False)


def test_adapter_that_unties_the_embeddings_is_refused(tmp_path: Path) -> None:
    """The merged model has a head of its own, for which the config of the base has no place."""
    base = save_llama(tmp_path / "llama", tie_word_embeddings=True)
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="it unties the embeddings; merge it with PEFT"):
        gda.convert(adapter, tmp_path / "gda", verify=False)


def test_tokenizer_of_an_adapter_has_its_own_template(tmp_path: Path) -> None:
    """Not that of the base, which is in a file that transformers prefers."""
    base = save_llama(tmp_path / "llama")
    (base / "chat_template.jinja").write_text("of the base")
    adapter = save_adapter(base, tmp_path / "adapter")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "of the adapter"
    tokenizer.save_pretrained(adapter)
    (adapter / "chat_template.jinja").unlink()
    settings = adapter / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "of the adapter"}))
    gda.convert(adapter, tmp_path / "gda")
    assert AutoTokenizer.from_pretrained(tmp_path / "gda").chat_template == "of the adapter"


def test_template_without_a_tokenizer_is_not_the_adapters(tmp_path: Path) -> None:
    """An adapter has a tokenizer of its own or that of its base, not a mixture."""
    base = save_llama(tmp_path / "llama")
    adapter = save_adapter(base, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("of the adapter")
    gda.convert(adapter, tmp_path / "gda")
    expected = AutoTokenizer.from_pretrained(base).chat_template
    assert AutoTokenizer.from_pretrained(tmp_path / "gda").chat_template == expected


def test_adapter_and_its_base_from_the_hub(tmp_path: Path, hub: Hub) -> None:
    """The base is that of the revision which the adapter names, and the adapter has its own name."""
    base = save_llama(tmp_path / "llama")
    adapter = save_adapter(base, tmp_path / "adapter")
    expected = logits(merged(base, adapter), token_ids(2, 12))
    first = put(hub, "me/llama", base)
    weights = files_of(save_llama(tmp_path / "other", seed=1))["model.safetensors"]
    hub.repos["me/llama"].commit("main", "trained", {"model.safetensors": Blob(weights, True)})
    change(adapter, base_model_name_or_path="me/llama", revision=first)
    commit = put(hub, "me/lora", adapter)
    gda.convert("me/lora", tmp_path / "gda")
    assert relative_error(logits(tmp_path / "gda", token_ids(2, 12)), expected) < 1e-5
    source = json.loads((tmp_path / "gda" / "conversion.json").read_text())["source"]
    assert (source["name"], source["revision"]) == ("me/lora", commit)


def test_adapter_on_the_hub_that_names_itself(tmp_path: Path, hub: Hub) -> None:
    adapter = save_adapter(save_llama(tmp_path / "llama"), tmp_path / "adapter")
    change(adapter, base_model_name_or_path="me/lora")
    put(hub, "me/lora", adapter)
    with pytest.raises(ValueError, match="is an adapter itself"):
        gda.convert("me/lora", tmp_path / "gda")


def test_several_writers_merge_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_llama(tmp_path / "llama")
    adapter = save_adapter(base, tmp_path / "adapter")
    merged_by, merge = [], AdapterSource._merge

    def slowly(source: AdapterSource) -> Any:
        merged_by.append(threading.get_ident())
        time.sleep(0.2)
        return merge(source)

    monkeypatch.setattr(AdapterSource, "_merge", slowly)
    gda.convert(adapter, tmp_path / "gda", workers=4, max_shard_size="20KB", verify=False)
    assert len(merged_by) == 1


def test_base_is_not_overwritten(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "llama")
    adapter = save_adapter(base, tmp_path / "adapter")
    before = files_of(base)
    with pytest.raises(ValueError, match="is the source, is inside it or contains it"):
        gda.convert(adapter, base, overwrite=True)
    assert files_of(base) == before


def test_inspect_says_how_to_merge(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="is an adapter; merge it with `gda convert`"):
        gda.inspect(save_adapter(tmp_path / "base", tmp_path / "adapter"))


def test_eval_says_how_to_merge(tmp_path: Path) -> None:
    adapter = save_adapter(save_llama(tmp_path / "llama"), tmp_path / "adapter")
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="is an adapter; merge it into its model: gda convert"):
            gda.evaluate(adapter, tasks="gda_copy_length_64")
        (adapter / "config.json").write_bytes((tmp_path / "llama" / "config.json").read_bytes())  # as some programs do


def test_train_says_how_to_merge(tmp_path: Path) -> None:
    adapter = save_adapter(save_llama(tmp_path / "llama"), tmp_path / "adapter")
    (tmp_path / "text.txt").write_text("a text")
    with pytest.raises(FileNotFoundError, match="is an adapter; merge it into its model: gda convert"):
        gda.train(adapter, tmp_path / "out", data=tmp_path / "text.txt")


def change(folder: Path, **fields: Any) -> None:
    """Change adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def copy_weights(folder: Path) -> None:
    """Take the weights of the base for those of the adapter."""
    base = Path(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
    (folder / "adapter_model.safetensors").write_bytes((base / "model.safetensors").read_bytes())


def convert_base(folder: Path) -> None:
    """Name the converted base as the base."""
    base = folder.with_name("converted")
    gda.convert(folder.with_name("llama"), base, verify=False)
    change(folder, base_model_name_or_path=str(base))


def save_prompt(folder: Path) -> None:
    """Replace the adapter by one that no weight can hold."""
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(load(Path(base)), settings).save_pretrained(folder)


def rename_tensors(folder: Path) -> None:
    """Give the tensors names that are in no module of the base."""
    path = folder / "adapter_model.safetensors"
    save_file({name.replace("self_attn", "attn"): tensor for name, tensor in load_file(path).items()}, path)
