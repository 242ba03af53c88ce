"""The code saved with a model runs where the package is absent, and is not used where it is installed."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import gda
from gda.configuration import configuration_gda

from ..support.commands import Command
from ..support.llamas import byte_tokenizer, change_config, files_of, save_llama
from ..support.tiny import tiny_config, tiny_model

ROOT = Path(__file__).parents[2]
CODE = {
    "configuration_gda.py": ROOT / "configuration",
    "modeling_gda.py": ROOT / "modeling_gda",
    "attention_gda.py": ROOT / "modeling_gda",
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {"lambda_type": "tanh", "head_norm": True},
    "paired": {
        "kv_layout": "paired",
        "num_key_value_heads": 4,
        "hidden_act": "poly_norm",
        "head_norm": True,
        "qk_rank": 3,
    },
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="session")
def python_without_gda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the packages of this environment except gda."""
    place = tmp_path_factory.mktemp("env")
    venv.EnvBuilder(symlinks=True).create(place)
    installed = Path(sysconfig.get_path("purelib"))
    empty = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    for entry in installed.iterdir():
        if not re.search("gda|grouped_differential_attention", entry.name):
            (empty / entry.name).symlink_to(entry)
    return place / "bin" / "python"


def run(python: Path | str, script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script offline, in a folder without our files."""
    return subprocess.run(
        [python, "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd="/",
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment,
        check=False,
        capture_output=True,
        text=True,
    )


def saved(folder: Path, layout: str) -> gda.GDAForCausalLM:
    """A model of that layout in `folder`, with the byte tokenizer."""
    tokenizer = byte_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), num_labels=3, pad_token_id=1, **LAYOUTS[layout])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


WITHOUT_GDA = """
    import importlib.util, sys
    import torch, transformers
    from transformers import AutoConfig, AutoTokenizer, pipeline

    folder, again, out = sys.argv[1:]
    assert importlib.util.find_spec("gda") is None
    trusted = {"trust_remote_code": True}
    ids = torch.tensor([[5, 9, 200, 31, 7]])
    results = {"config": AutoConfig.from_pretrained(folder, **trusted).to_dict()}
    for name in (
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForQuestionAnswering",
    ):
        auto = getattr(transformers, name)
        torch.manual_seed(0)
        model = auto.from_pretrained(folder, **trusted).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        with torch.no_grad():
            results[name] = model(ids)[0]
            model.save_pretrained(again)
            reloaded = auto.from_pretrained(again, **trusted).eval()
            assert torch.equal(reloaded(ids)[0], results[name]), name
    tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **trusted)
    results["generated"] = model.generate(ids, do_sample=False, max_new_tokens=12)
    speak = pipeline("text-generation", model=folder, tokenizer=tokenizer, **trusted)
    results["said"] = speak("in the", do_sample=False, max_new_tokens=12)[0]["generated_text"]
    model.save_pretrained(again)
    assert not any(name == "gda" or name.startswith("gda.") for name in sys.modules)
    torch.save(results, out)
"""


@pytest.mark.slow
@each_layout
def test_bundled_code_runs_without_the_package(layout: str, tmp_path: Path, python_without_gda: Path) -> None:
    """Every Auto class, generate, pipeline, save and reload, from a folder whose name is not an identifier."""
    folder, again = tmp_path / "Motif-2-12.7B.v1", tmp_path / "again-1.0"
    model = saved(folder, layout)
    done = run(python_without_gda, WITHOUT_GDA, folder, again, tmp_path / "results.pt")
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt")
    ids = torch.tensor([[5, 9, 200, 31, 7]])
    with torch.no_grad():
        assert torch.equal(results["AutoModelForCausalLM"], model(ids).logits)
        assert torch.equal(results["AutoModel"], model.model(ids).last_hidden_state)
        assert torch.equal(results["generated"], model.generate(ids, do_sample=False, max_new_tokens=12))
    tokenizer = byte_tokenizer()
    generated = model.generate(**tokenizer("in the", return_tensors="pt"), do_sample=False, max_new_tokens=12)
    assert results["said"] == tokenizer.decode(generated[0], skip_special_tokens=True)
    assert results["config"]["kv_layout"] == model.config.kv_layout
    # Saved again there, it has the same content and loads here.
    assert {name: files_of(again)[name] for name in CODE} == {name: files_of(folder)[name] for name in CODE}
    reloaded = AutoModelForCausalLM.from_pretrained(again).eval()
    assert type(reloaded) is gda.GDAForCausalLM
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, model(ids).logits)


CONFIG_ALONE = """
    import sys
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
    config.max_position_embeddings = 64
    config.save_pretrained(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    assert model.config.max_position_embeddings == 64
"""


@pytest.mark.slow
def test_config_saved_again_without_the_package(tmp_path: Path, python_without_gda: Path) -> None:
    """Where no model was loaded before: the entries of the models stay."""
    saved(tmp_path / "model", "shared")
    done = run(python_without_gda, CONFIG_ALONE, tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"] == configuration_gda.AUTO_MAP


@pytest.mark.slow
def test_converted_llama_runs_without_the_package(tmp_path: Path, python_without_gda: Path) -> None:
    """With trust_remote_code only."""
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "llama-1.0-gda", verify=False)
    load = "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code={})"
    done = run(python_without_gda, load.format(True), tmp_path / "llama-1.0-gda")
    assert done.returncode == 0, done.stderr
    done = run(python_without_gda, load.format(None), tmp_path / "llama-1.0-gda")
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


PAIRS_TASK = """
task: pairs
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[good, bad]}}}}"
num_fewshot: 0
"""

PLAIN_LM_EVAL = """
    import importlib.util, json, sys
    from lm_eval import simple_evaluate

    folder, task, out = sys.argv[1:]
    assert importlib.util.find_spec("gda") is None
    results = simple_evaluate(
        "hf",
        model_args={"pretrained": folder, "trust_remote_code": True},
        tasks=[task],
        device="cpu",
        bootstrap_iters=0,
    )
    json.dump([sample["resps"] for sample in results["samples"]["pairs"]], open(out, "w"))
"""


@pytest.mark.slow
def test_lm_eval_without_the_package(tmp_path: Path, python_without_gda: Path) -> None:
    """`--model hf` with trust_remote_code gives the log-likelihoods of `gda.evaluate`."""
    folder, data, task = tmp_path / "model-1.0", tmp_path / "pairs.jsonl", tmp_path / "pairs.yaml"
    saved(folder, "shared")
    pairs = [("the cat sleeps", "the cat sleep"), ("they go there", "they goes there"), ("an ox", "a ox")]
    data.write_text("".join(json.dumps({"good": good, "bad": bad}) + "\n" for good, bad in pairs))
    task.write_text(PAIRS_TASK.format(data=data))
    done = run(python_without_gda, PLAIN_LM_EVAL, folder, task, tmp_path / "out.json")
    assert done.returncode == 0, done.stderr[-3000:]
    ours = gda.evaluate(folder, tasks=[str(task)], bootstrap_iters=0)["samples"]["pairs"]
    theirs = json.loads((tmp_path / "out.json").read_text())
    assert len(theirs) == len(pairs)
    for sample, responses in zip(ours, theirs, strict=True):
        for (own,), (other,) in zip(sample["resps"], responses, strict=True):
            assert own[0] == pytest.approx(float(other[0]), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("trusted", [None, True])
def test_installed_classes_take_precedence(trusted: bool | None, tmp_path: Path) -> None:
    """Without warnings and without remote code, with and without the flag."""
    saved(tmp_path, "shared")
    for name in CODE:
        (tmp_path / name).write_text("raise SystemExit('this must not be run')\n")
    script = f"""
        import sys, gda, transformers
        model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code={trusted})
        assert type(model) is gda.GDAForCausalLM
        assert type(model.config) is gda.GDAConfig
        transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    """
    done = run(sys.executable, script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_bundled_files_equal_the_source(tmp_path: Path) -> None:
    """Byte for byte, with the real config file in place of the bridge; after saving and after converting."""
    tiny_model().save_pretrained(tmp_path / "saved")
    gda.convert(save_llama(tmp_path / "llama"), tmp_path / "converted", verify=False)
    for folder in ("saved", "converted"):
        code = {name: content for name, content in files_of(tmp_path / folder).items() if name.endswith(".py")}
        assert code == {name: (where / name).read_bytes() for name, where in CODE.items()}, folder


@pytest.mark.parametrize("name", CODE)
def test_bundled_files_name_licence_and_version(name: str) -> None:
    """And they do not refer to the package, which may be absent."""
    text = (CODE[name] / name).read_text()
    head = " ".join(text.splitlines()[:3])
    assert "Apache License 2.0" in head
    assert f"grouped-differential-attention {gda.__version__}," in head
    assert not re.search(r"(?<!_)gda\.", text)


def test_config_json_maps_every_auto_class(tmp_path: Path) -> None:
    """For every saved class; each entry names a class in the file."""
    gda.GDAForTokenClassification(tiny_config(num_labels=4)).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == configuration_gda.AUTO_MAP
    for reference in auto_map.values():
        module, class_name = reference.split(".")
        assert re.search(rf"^class {class_name}\(", (tmp_path / f"{module}.py").read_text(), re.MULTILINE)


def test_config_saved_without_code(tmp_path: Path) -> None:
    """`bundle_code=False` removes auto_map, also from a config that had one."""
    config = tiny_config()
    config.save_pretrained(tmp_path / "with")
    AutoConfig.from_pretrained(tmp_path / "with").save_pretrained(tmp_path / "without", bundle_code=False)
    assert list(files_of(tmp_path / "without")) == ["config.json"]
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())


def test_derived_config_class_gets_no_auto_map(tmp_path: Path) -> None:
    """The code of a class derived from ours is not bundled."""

    class TheirConfig(gda.GDAConfig):
        model_type = "theirs"

    TheirConfig(
        **{name: value for name, value in tiny_config().to_dict().items() if name != "model_type"}
    ).save_pretrained(tmp_path)
    assert list(files_of(tmp_path)) == ["config.json"]


@pytest.mark.slow
def test_convert_without_code(tmp_path: Path, command: Command) -> None:
    """`--no-bundle-code`: no code in the folder, and no mention in the card."""
    source = save_llama(tmp_path / "llama")
    assert command("convert", source, tmp_path / "gda", "--no-bundle-code").code == 0
    assert not list((tmp_path / "gda").glob("*.py"))
    card = (tmp_path / "gda" / "README.md").read_text()
    assert "trust_remote_code" not in card
    assert "\nimport gda " in card
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "gda").config.num_noise_heads == 2


def test_auto_map_of_a_source_is_not_followed(tmp_path: Path, command: Command) -> None:
    """No command sets trust_remote_code."""
    source = save_llama(tmp_path / "llama")
    (source / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nclass C: pass\n")
    change_config(
        source, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": "evil.C"}
    )
    command("convert", source, tmp_path / "gda")
    assert not (tmp_path / "was-run").exists()
