"""Tasks are found by name as in lm-eval, datasets come from local files, and errors are one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import gda

from ..support.commands import Command
from ..support.evaluation import pairs, write_data, write_jsonl
from ..support.llamas import change_config, save_llama

pytestmark = pytest.mark.slow

pytest.importorskip("lm_eval")
BLIMP = "blimp_passive_1"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset root. Tests must not change it."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama. Tests must not change it."""
    return save_llama(tmp_path_factory.mktemp("model") / "llama")


def raising(error: Exception) -> Callable[..., None]:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


# ---------------------------------------------------------------------------------------------------------------- names


def test_names_mean_the_same_as_in_lm_eval() -> None:
    """A task, a group, a tag over several folders and a pattern give the same entries as the full index."""
    from lm_eval.tasks import TaskManager

    from gda.eval.lm_eval.find_tasks import find_tasks

    everything = TaskManager()
    for name in ("gsm8k", "blimp", "leaderboard_bbh", "social_bias", "blimp_passive_*"):
        manager, found = find_tasks([name])
        assert found == (everything.match_tasks([name]) if "*" in name else [name])
        for one in found:
            entry, expected = manager.task_index[one], everything.task_index[one]
            assert (entry.kind, entry.yaml_path, entry.tags) == (expected.kind, expected.yaml_path, expected.tags)
            for member in (
                (expected.cfg or {}).get("task") if isinstance((expected.cfg or {}).get("task"), list) else []
            ):
                if isinstance(member, str) and member in everything.task_index:
                    assert manager.task_index[member].yaml_path == everything.task_index[member].yaml_path


def test_only_needed_task_files_are_parsed() -> None:
    """For a task of one folder, that folder and ours."""
    from gda.eval.lm_eval.find_tasks import find_tasks

    manager, _ = find_tasks([BLIMP])
    assert len(manager.all_tasks) < 1000
    assert "gda_copy" in manager.all_tasks
    assert find_tasks(["gda_copy", "gda_copy"])[1] == ["gda_copy"]


@pytest.mark.parametrize(
    ("name", "meant"), [("blimp_pasive_1", "blimp_passive_1"), ("gsm8", "gsm8k"), ("gda_nedles", "gda_needles")]
)
def test_unknown_task_gets_a_suggestion(name: str, meant: str) -> None:
    """From lm-eval's tasks and ours."""
    from gda.eval.lm_eval.find_tasks import find_tasks

    with pytest.raises(ValueError, match=rf"unknown task '{name}'; did you mean .*\b{meant}\b.*\?"):
        find_tasks([name])


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("gda_mqar_pairs_[48]", ["gda_mqar_pairs_4", "gda_mqar_pairs_8"]),
        ("[!a-fh-z]da_cop?", ["gda_copy"]),
        ("blimp_passive_[1]", ["blimp_passive_1"]),
    ],
)
def test_patterns_with_brackets(pattern: str, meant: list[str]) -> None:
    """As fnmatch reads them; the check before lm-eval is imported takes them, too."""
    from gda.eval.lm_eval.find_tasks import find_tasks
    from gda.eval.task_texts import check_tasks

    check_tasks([pattern])
    assert find_tasks([pattern])[1] == meant
    for unknown in ("gda_mqar_pairs_[ab]", "gda_mqar_pairs_[8-4]"):
        with pytest.raises(ValueError, match="unknown task"):
            check_tasks([unknown])


def test_unknown_task_without_similar_names() -> None:
    """The error says how to list the tasks."""
    from gda.eval.lm_eval.find_tasks import find_tasks

    with pytest.raises(ValueError, match=r"unknown task 'qqqqxxxx'; .* lists all tasks"):
        find_tasks(["qqqqxxxx"])


# ----------------------------------------------------------------------------------------------------------------- data


def test_only_the_source_of_the_data_is_replaced(data: Path) -> None:
    """The task keeps lm-eval's definition, and `datasets` is restored afterwards."""
    import datasets
    from lm_eval.tasks import TaskManager

    from gda.eval.lm_eval.find_tasks import find_tasks, load_tasks

    original = datasets.load_dataset
    blimp, gsm8k = load_tasks([BLIMP, "gsm8k"], dataset_root=data)
    assert datasets.load_dataset is original
    assert list(blimp.validation_docs()) == pairs()
    assert len(list(gsm8k.test_docs())) == 2  # parquet
    assert len(list(gsm8k.training_docs())) == 7
    manager: TaskManager = find_tasks([BLIMP])[0]
    definition = manager.task_index[BLIMP].cfg
    assert definition is not None
    for field in ("doc_to_choice", "doc_to_target", "output_type", "dataset_path", "dataset_name"):
        assert blimp.get_config(field) == definition[field]


def test_files_that_a_definition_names(tmp_path: Path) -> None:
    """Only those are read: other files of the folder are other languages, or other shards."""
    from gda.eval.lm_eval.find_tasks import load_tasks

    for language in ("gu", "hi"):
        write_jsonl(tmp_path / f"toy/many/{language}/test.jsonl", [{"text": f"{language} {n}"} for n in range(3)])
    definition = "task: toy_{0}\ndataset_path: toy/many\noutput_type: loglikelihood_rolling\ntest_split: test\n"
    definition += (
        "doc_to_text: ''\ndoc_to_target: '{{{{text}}}}'\ndataset_kwargs: {{data_files: {{test: {0}/test.jsonl}}}}"
    )
    for language in ("gu", "fr"):
        (tmp_path / f"{language}.yaml").write_text(definition.format(language))
    (task,) = load_tasks([str(tmp_path / "gu.yaml")], dataset_root=tmp_path)
    assert [doc["text"] for doc in task.test_docs()] == ["gu 0", "gu 1", "gu 2"]
    with pytest.raises(FileNotFoundError, match=r"task toy_fr: .*toy/many lacks .*fr/test.jsonl"):
        load_tasks([str(tmp_path / "fr.yaml")], dataset_root=tmp_path)
    write_jsonl(tmp_path / "toy/many/fr/test.jsonl", [{"text": "fr 0"}])
    for changed in ("{test: fr/test.jsonl}}", "{test: fr/none.jsonl}}\ndataset_name: fr"):
        text = (tmp_path / "fr.yaml").read_text().replace("{test: fr/test.jsonl}}", changed)
        (tmp_path / "fr.yaml").write_text(text)
        (task,) = load_tasks([str(tmp_path / "fr.yaml")], dataset_root=tmp_path)
        assert [doc["text"] for doc in task.test_docs()] == ["fr 0"]


def test_strings_are_not_converted(tmp_path: Path) -> None:
    """A date stays a string; blank lines are ignored, and the configuration `default` may be omitted."""
    from gda.eval.lm_eval.local_data import load_local

    write_jsonl(tmp_path / "d/default/test.jsonl", [{"day": "2018-01-22", "n": None}, {"day": "x", "n": [1]}])
    with open(tmp_path / "d/default/test.jsonl", "a") as file:
        file.write("\n\n")
    assert load_local(tmp_path, "d", None)["test"].to_list() == [
        {"day": "2018-01-22", "n": None},
        {"day": "x", "n": [1]},
    ]
    assert load_local(tmp_path, "d", None, split="test").num_rows == 2


def test_names_of_files_are_those_of_training(tmp_path: Path) -> None:
    """Shards with a fingerprint, words for splits, folders of splits, and all endings; a list in README.md is first."""
    import datasets

    from gda.eval.lm_eval.local_data import load_local

    shard = "-of-00002-ab12cd34ef56.parquet"
    for number in range(2):
        (tmp_path / "a/data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list([{"n": number}]).to_parquet(tmp_path / f"a/data/train-0000{number}{shard}")
    assert load_local(tmp_path, "a", None, "train")["n"][:] == [0, 1]
    files = {
        "b/train.json": '[{"n": 1}, {"n": 2}]',
        "b/dataset_infos.json": "{}",
        "c/c1/dev.csv": "n,text\n3,NA\n",
        "d/test/0000.jsonl": '{"n": 4}\n',
        "e/c1/train.jsonl": '{"n": 5}\n',
        "e/other.jsonl": '{"n": 6}\n',
        "e/README.md": "---\nconfigs:\n- config_name: c1\n  data_files:\n  - {split: train, path: other.jsonl}\n---\n",
    }
    files |= {
        "f/c1/train.jsonl": '{"n": 7}\n',
        "f/README.md": files["e/README.md"].replace("other", "not_downloaded"),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert load_local(tmp_path, "b", None, "train").to_list() == [{"n": 1}, {"n": 2}]
    assert load_local(tmp_path, "c", "c1", "validation").to_list() == [{"n": 3, "text": "NA"}]
    assert load_local(tmp_path, "c", "c1", "dev").to_list() == [{"n": 3, "text": "NA"}]
    assert load_local(tmp_path, "d", None, "test").to_list() == [{"n": 4}]
    assert load_local(tmp_path, "e", "c1", "train").to_list() == [{"n": 6}]
    assert load_local(tmp_path, "f", "c1", "train").to_list() == [{"n": 7}]
    with pytest.raises(FileNotFoundError, match=r"validation\.jsonl"):
        load_local(tmp_path, "b", None, "validation")


def test_field_missing_in_the_first_row(tmp_path: Path) -> None:
    """Every row has every field; missing values are None."""
    from gda.eval.lm_eval.local_data import load_local

    write_jsonl(tmp_path / "d/test.jsonl", [{"a": 1}, {"a": 2, "b": "x"}])
    assert load_local(tmp_path, "d", None)["test"].to_list() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]


def test_error_in_a_group_names_the_task(data: Path) -> None:
    from gda.eval.lm_eval.find_tasks import load_tasks

    with pytest.raises(FileNotFoundError, match=r"^task blimp_\w+: "):
        load_tasks(["blimp"], dataset_root=data)


def test_error_in_a_task_that_is_a_class_names_it(data: Path, tmp_path: Path) -> None:
    """While it reads its data, it has a configuration without a name, or none."""
    from gda.eval.lm_eval.find_tasks import load_tasks

    text = "from lm_eval.api.task import Task\n\nclass Own(Task):\n    DATASET_PATH = 'me/own'\n\n"
    (tmp_path / "own.py").write_text(text + "Own.__abstractmethods__ = frozenset()\n")
    (tmp_path / "own.yaml").write_text("task: own\nclass: !function own.Own\n")
    for name in ("squadv2", "own"):
        with pytest.raises(FileNotFoundError, match=rf"^task {name}: .* holds no data files"):
            load_tasks([name], dataset_root=data, include_path=tmp_path)


def test_groups_that_share_a_task_are_refused_first(tmp_path: Path) -> None:
    """Before a model is loaded. A task that is in a group, too, runs once."""
    from gda.eval.lm_eval.find_tasks import load_tasks

    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(f"group: {name}\ntask: [gda_mqar]\n")
    assert [group.name for group in load_tasks(["gda_mqar", "one"], include_path=tmp_path)] == ["one"]
    with pytest.raises(ValueError, match="'gda_mqar': found in both 'one' and 'two'"):
        load_tasks(["one", "two"], include_path=tmp_path)


def test_our_tasks_with_include_path(data: Path) -> None:
    from gda.eval.lm_eval.find_tasks import TaskManagerWithOurs

    for given in (data, str(data), [data]):
        known = TaskManagerWithOurs(include_path=given, include_defaults=False).all_tasks
        assert {"toy_sums", "gda_needles"} <= set(known)


def rewrite(name: str, text: str | None) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / name
        path.unlink() if text is None else path.write_text(text)

    return change


TRAIN = "nyu-mll/blimp/passive_1/train.jsonl"
SPOILT: dict[str, tuple[Callable[[Path], None], str, list[str]]] = {
    "empty": (rewrite(TRAIN, ""), BLIMP, ["passive_1/train.jsonl is empty"]),
    "blank lines": (rewrite(TRAIN, "\n\n"), BLIMP, ["passive_1/train.jsonl is empty"]),
    "half a line": (rewrite(TRAIN, '{"a": 1}\n{"a": '), BLIMP, ["passive_1/train.jsonl", "line 2"]),
    "no object": (rewrite(TRAIN, "[1]\n"), BLIMP, ["passive_1/train.jsonl, line 1", "not a JSON object"]),
    "mixed types": (rewrite(TRAIN, '{"a": 1}\n{"a": "b"}\n'), BLIMP, ["passive_1/train.jsonl cannot be read"]),
    "not text": (rewrite(TRAIN, "\0"), BLIMP, ["passive_1/train.jsonl"]),
    "other columns": (rewrite(TRAIN, '{"a": 1}\n'), BLIMP, ["cannot be loaded from", "nyu-mll/blimp/passive_1"]),
    "no such split": (
        rewrite("openai/gsm8k/main/test.parquet", None),
        "gsm8k",
        ["main/test.jsonl (or .parquet) is missing"],
    ),
    "no parquet": (rewrite("openai/gsm8k/main/test.parquet", "x"), "gsm8k", ["main/test.parquet cannot be read"]),
    "no such folder": (lambda root: shutil.rmtree(root / "openai"), "gsm8k", ["openai/gsm8k/main", "no data files"]),
}


@pytest.mark.parametrize("case", SPOILT)
def test_damaged_data(case: str, data: Path, model: Path, tmp_path: Path, command: Command) -> None:
    """One line names the task and the file."""
    root = shutil.copytree(data, tmp_path / "data")
    spoil, task, words = SPOILT[case]
    spoil(root)
    outcome = command("eval", model, "--tasks", task, "--dataset-root", root)
    assert outcome.code == 2
    last = outcome.error.strip().splitlines()[-1]
    assert last.startswith(f"gda: task {task}")
    for word in words:
        assert word in last
    assert "Traceback" not in outcome.error


def test_task_that_needs_the_network(model: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, the error names the task, its dataset and where its files are expected."""
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'nyu-mll/blimp' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    outcome = command("eval", model, "--tasks", BLIMP)
    assert outcome.code == 2
    last = outcome.error.strip().splitlines()[-1]
    for word in (BLIMP, "nyu-mll/blimp (passive_1)", "--dataset-root DIR", "DIR/nyu-mll/blimp/passive_1/SPLIT.jsonl"):
        assert word in last
    assert datasets.load_dataset is offline


# ------------------------------------------------------------------------------------------------------------ bad input

BAD: dict[str, tuple[list[str], str]] = {
    "nothing to do": ([], "nothing to do: name --tasks"),
    "unknown task": (["--tasks", "blimp_pasive_1"], "did you mean blimp_passive_1"),
    "only commas": (["--tasks", ","], "--tasks names no task"),
    "no such root": (["--tasks", BLIMP, "--dataset-root", "nowhere"], "--dataset-root nowhere is not a folder"),
    "negative limit": (["--tasks", BLIMP, "--limit", "-1"], "--limit -1"),
    "limit 0": (["--tasks", BLIMP, "--limit", "0"], "--limit 0"),
    "negative shots": (["--tasks", BLIMP, "--num-fewshot", "-1"], "--num-fewshot -1"),
    "batch size": (["--tasks", BLIMP, "--batch-size", "many"], "--batch-size many"),
    "batch size autox": (["--tasks", BLIMP, "--batch-size", "autox"], "--batch-size autox"),
    "endless limit": (["--tasks", BLIMP, "--limit", "inf"], "--limit inf"),
    "broken limit": (["--tasks", BLIMP, "--limit", "2.7"], "--limit 2.7"),
    "device": (["--tasks", BLIMP, "--device", "foo"], "--device foo is not a device such as cpu, cuda or cuda:0"),
    "seed": (["--tasks", BLIMP, "--seed", "-1"], "--seed -1"),
    "no output": (["--tasks", BLIMP, "--output", ""], "--output '' is not a folder"),
    "output below a file": (["--tasks", BLIMP, "--output", f"{__file__}/x"], "--output"),
    "context of nothing": (["--tasks", BLIMP, "--context", "64"], "--context and --stride belong to --perplexity"),
    "dtype": (["--tasks", BLIMP, "--dtype", "int8"], "--dtype int8 is not one of auto"),
    "metadata": (["--tasks", "gda_copy", "--metadata", "{"], "--metadata { is not JSON"),
    "metadata list": (["--tasks", "gda_copy", "--metadata", "[1]"], "is not a JSON object"),
    "setting of a task": (["--tasks", "gda_copy", "--metadata", '{"length": -1}'], "gda_copy"),
    "baseline": (["--tasks", BLIMP, "--baseline", "nowhere/at/all"], "nowhere/at/all does not exist"),
    "perplexity": (["--perplexity", "nowhere.txt"], "--perplexity nowhere.txt is not a file"),
    "generation": (["--perplexity", __file__, "--gen-kwargs", "top_k=1"], "--gen-kwargs belongs to --tasks; name"),
    "system": (
        ["--perplexity", __file__, "--system-instruction", "A"],
        "--system-instruction belongs to --tasks; name",
    ),
    "include path": (["--perplexity", __file__, "--include-path", "nodir"], "--include-path nodir is not a folder"),
    "stride": (["--perplexity", __file__, "--stride", "600"], "--stride 600"),
    "context": (["--perplexity", __file__, "--context", "0"], "--context 0"),
    "prompts": (["--tasks", BLIMP, "--show-prompts", "-1"], "--show-prompts -1"),
    "html": (["--tasks", BLIMP, "--html"], "--output"),
    "output": (["--tasks", BLIMP, "--output", __file__], "is not a folder"),
    "card": (["--perplexity", __file__, "--update-card"], "--update-card"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str, model: Path, command: Command) -> None:
    """Exit code 2, and the last line names the option or the remedy."""
    arguments, word = BAD[case]
    outcome = command("eval", model, *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    last = outcome.error.strip().splitlines()[-1]
    assert last.startswith("gda: ")
    assert word in last
    assert "Traceback" not in outcome.error


def test_folder_that_is_not_a_model(data: Path, model: Path, tmp_path: Path, command: Command) -> None:
    """No folder, config, weights or tokenizer, or damaged weights: exit code 2 and one line."""
    (tmp_path / "empty").mkdir()
    broken = {
        "absent": tmp_path / "absent",
        "config.json is missing": tmp_path / "empty",
        "no weights": shutil.copytree(model, tmp_path / "a", ignore=shutil.ignore_patterns("*.safetensors")),
        "holds no tokenizer": shutil.copytree(model, tmp_path / "b", ignore=shutil.ignore_patterns("tokenizer*")),
        "c cannot be loaded": shutil.copytree(model, tmp_path / "c"),
    }
    (tmp_path / "c" / "model.safetensors").write_bytes(b"\1")
    for words, place in broken.items():
        outcome = command("eval", place, "--tasks", BLIMP, "--dataset-root", data)
        assert outcome.code == 2
        assert words in outcome.error.strip().splitlines()[-1]
        assert "Traceback" not in outcome.error


def test_request_that_does_not_fit(data: Path, model: Path, command: Command) -> None:
    """GSM8K generates 256 tokens, and the model reads 128."""
    outcome = command("eval", model, "--tasks", "gsm8k", "--dataset-root", data)
    assert outcome.code == 2
    assert "at most 128 tokens" in outcome.error.strip().splitlines()[-1]


def test_model_in_memory_needs_a_tokenizer(model: Path) -> None:
    from ..support.llamas import llama_model

    with pytest.raises(ValueError, match="needs its tokenizer"):
        gda.evaluate(llama_model(), tasks=BLIMP)


def test_missing_chat_template_is_refused(data: Path, model: Path, tmp_path: Path, command: Command) -> None:
    """Exit code 2."""
    folder = shutil.copytree(model, tmp_path / "plain", ignore=shutil.ignore_patterns("chat_template*"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    outcome = command("eval", folder, "--tasks", BLIMP, "--dataset-root", data, "--apply-chat-template")
    assert outcome.code == 2
    assert "no chat template" in outcome.error
    outcome = command("eval", model, "--baseline", folder, "--tasks", BLIMP, "--apply-chat-template")
    assert outcome.error.endswith("gda: --apply-chat-template: the tokenizer of plain has no chat template\n")
    assert "running" not in outcome.error


def test_bad_baseline_is_refused_first(data: Path, model: Path, tmp_path: Path, command: Command) -> None:
    """Without a tokenizer, or with one that has neither BOS nor EOS."""
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    unmarked = shutil.copytree(model, tmp_path / "unmarked")
    settings = json.loads((unmarked / "tokenizer_config.json").read_text())
    kept = {name: value for name, value in settings.items() if name not in ("bos_token", "eos_token")}
    (unmarked / "tokenizer_config.json").write_text(json.dumps(kept))
    for baseline, words in ((bare, "holds no tokenizer"), (unmarked, "of unmarked has neither BOS nor EOS")):
        outcome = command("eval", model, "--baseline", baseline, "--tasks", BLIMP, "--dataset-root", data)
        assert outcome.code == 2
        assert words in outcome.error.strip().splitlines()[-1]
        assert "running" not in outcome.error


def test_checkpoint_with_missing_weights_is_refused(data: Path, model: Path, tmp_path: Path, command: Command) -> None:
    """transformers would initialize them. lm-eval's own way of loading is covered too."""
    from safetensors.torch import load_file, save_file

    from gda.eval.lm_eval.harness import GDALM

    folder = shutil.copytree(model, tmp_path / "lacking")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.wheight"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    outcome = command("eval", folder, "--tasks", BLIMP, "--dataset-root", data)
    assert outcome.code == 2
    assert "has no model.norm.weight" in outcome.error.strip().splitlines()[-1]
    with pytest.raises(ValueError, match=r"has no model\.norm\.weight"):
        GDALM(str(folder), device="cpu")


def test_checkpoint_of_another_shape_is_refused(model: Path, tmp_path: Path, command: Command) -> None:
    """The line names the tensor, where transformers would refer to a report that is not shown."""
    folder = shutil.copytree(model, tmp_path / "other")
    change_config(folder, intermediate_size=json.loads((folder / "config.json").read_text())["intermediate_size"] + 8)
    (tmp_path / "text.txt").write_text("a text of some words " * 20)
    outcome = command("eval", folder, "--perplexity", tmp_path / "text.txt")
    assert outcome.code == 2
    assert "the checkpoint has a different shape for model.layers.0.mlp" in outcome.error


@pytest.mark.parametrize("beside", ["an adapter", "pickled weights"])
def test_other_weights_beside_the_model_are_refused(beside: str, model: Path, tmp_path: Path, command: Command) -> None:
    """transformers would apply the adapter, or read the pickle in the place of a file that is no model's."""
    folder = shutil.copytree(model, tmp_path / "mixed")
    if beside == "an adapter":
        (folder / "adapter_config.json").write_text("{}")
    else:
        state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    (tmp_path / "text.txt").write_text("a text of some words " * 20)
    outcome = command("eval", folder, "--perplexity", tmp_path / "text.txt")
    assert outcome.code == 2
    expected = "holds both a model and an adapter" if beside == "an adapter" else "no file named model.safetensors"
    assert expected in outcome.error.strip().splitlines()[-1]


def test_failing_perplexity_wastes_no_tasks(
    data: Path, model: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured before the tasks run."""
    (tmp_path / "text.txt").write_text("a text of some words " * 20)
    arguments = ("--dataset-root", data, "--perplexity", tmp_path / "text.txt")
    monkeypatch.setattr("gda.eval.evaluate.text_perplexity", raising(ValueError("no perplexity")))
    monkeypatch.setattr("gda.eval.lm_eval.run_tasks.run_tasks", raising(AssertionError("the tasks ran")))
    outcome = command("eval", model, "--tasks", BLIMP, *arguments)
    assert outcome.code == 2
    assert outcome.error.strip().splitlines()[-1] == "gda: no perplexity"


def test_nan_log_likelihood_is_refused(data: Path, model: Path, command: Command, tmp_path: Path) -> None:
    """lm-eval would always choose the first answer."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    outcome = command("eval", folder, "--tasks", BLIMP, "--dataset-root", data)
    assert outcome.code == 2
    assert f"task {BLIMP}: a log-likelihood is nan" in outcome.error.strip().splitlines()[-1]
    text = tmp_path / "text.txt"
    text.write_text("The cat thanked the hen.")
    assert "--perplexity is nan" in command("eval", folder, "--perplexity", text).error


@pytest.mark.parametrize("task", ["gda_needles_length_512", "gda_copy_length_256"])
def test_generated_prompt_that_does_not_fit_is_refused(task: str, model: Path, command: Command) -> None:
    """The answer may be in the part that would be cut."""
    outcome = command("eval", model, "--tasks", task, "--limit", 2)
    assert outcome.code == 2
    last = outcome.error.strip().splitlines()[-1]
    assert last.startswith(f"gda: task {task}: a prompt of ")
    assert "--metadata" in last


def test_errors_of_the_lm_eval_command_line(data: Path, model: Path, tmp_path: Path) -> None:
    """An empty data file causes no traceback."""
    import subprocess
    import sys

    root = shutil.copytree(data, tmp_path / "data")
    (root / TRAIN).write_text("")
    command = [sys.executable, "-m", "gda.eval", "run", "--model", "gda", "--model_args", f"pretrained={model}"]
    command += ["--tasks", BLIMP, "--dataset_root", str(root), f"--include_path={data}"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode != 0
    assert "train.jsonl is empty" in ran.stderr.strip().splitlines()[-1]
    assert "Traceback" not in ran.stderr
