"""Training in several processes: the configurations for accelerate, and equal results of one process and two."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType

import gda
from gda.common.trainable import Trainable
from gda.training import TrainSettings, accelerate_config
from gda.training.runs.processes import Processes
from gda.training.runs.run_folder import RunIdentity

from ..support.llamas import tensors_of
from ..support.machines import free_port
from ..support.tiny import tiny_model
from ..support.training import save_inputs

pytestmark = [pytest.mark.slow, pytest.mark.early]

FOUR_MACHINES = ("--num_machines", "4", "--num_processes", "32", "--machine_rank", "2", "--main_process_ip", "10.0.0.1")
LAUNCHES = {
    "ddp": ("--multi_gpu", "--num_machines", "1", "--dynamo_backend", "no"),
    "fsdp2": ("--config_file", str(accelerate_config("fsdp2"))),
    "zero3": ("--config_file", str(accelerate_config("zero3"))),
}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
# By name of the result: the model and options. Each step reads 8 sequences.
RUNS: dict[str, dict[str, Any]] = {
    "all": {"model": "gda", "eval_data": "text.txt", "eval_every": 4},
    "new": {"model": "grown", "train": "new", "weight_decay": 0.5},
    "attention": {"model": "gda", "train": "attention", "lambda_learning_rate": 5e-2, "accumulation": 2},
    "lora": {"model": "gda", "train": "lora", "lora_rank": 2, "weight_decay": 0.3, "save_every": 3},
    "taught": {
        "model": "gda",
        "teacher": "llama",
        "hidden_weight": 0.3,
        "lambda_target": 0.3,
        "fade_steps": 4,
    },
    "stream": {"model": "gda", "streaming": True},
}
INTERRUPTED = "attention"  # with several groups of parameters, and some that are frozen
COMMON: dict[str, Any] = {"data": "text.txt", "context": 32, "steps": 6, "learning_rate": 1e-2, "precision": "float32"}
COMMON |= {"log_every": 1, "save_every": 2}


# --------------------------------------------------------------------------------------------------- the configurations


def parsed(name: str) -> Any:
    """The arguments that `accelerate launch` parses from a configuration on the third of four machines."""
    arguments = ("--config_file", str(accelerate_config(name)), *FOUR_MACHINES, "-m", "gda.cli", "train")
    args, config, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert (args.num_machines, args.machine_rank, args.main_process_ip) == (4, 2, "10.0.0.1")
    args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    return args


def test_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate reads all fields: layers are sharded one by one, recomputed, and saved in parts."""
    config = load_config_from_file(str(accelerate_config("fsdp2")))
    assert (config.distributed_type, config.mixed_precision) == (DistributedType.FSDP, "bf16")
    args = parsed("fsdp2")
    assert args.use_fsdp
    environment = prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("4", "8", 2)
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, True)
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert set(plugin.transformer_cls_names_to_wrap) == set(tiny_model()._no_split_modules)
    plugin.set_auto_wrap_policy(tiny_model())  # raises for an unknown class


def test_zero3(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration that DeepSpeed gets."""
    config = load_config_from_file(str(accelerate_config("zero3")))
    assert (config.distributed_type, config.mixed_precision) == (DistributedType.DEEPSPEED, "bf16")
    args = parsed("zero3")
    assert args.use_deepspeed
    command, environment = prepare_deepspeed_cmd_env(args)
    assert command is None  # each machine is started separately
    for name, value in environment.items():
        if name.startswith("ACCELERATE_DEEPSPEED_"):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert (plugin.zero_stage, plugin.zero3_init_flag, plugin.zero3_save_16bit_model) == (3, False, False)


def test_number_of_processes_must_be_given() -> None:
    """A shipped configuration does not depend on the machine."""
    arguments = ("--config_file", str(accelerate_config("fsdp2")), "-m", "gda.cli")
    with pytest.raises(ValueError, match="--num_processes"):
        _validate_launch_command(launch_command_parser().parse_args(arguments))


def test_unknown_configuration() -> None:
    """The error lists the names."""
    with pytest.raises(ValueError, match="'fsdp1'; available: fsdp2, zero3"):
        accelerate_config("fsdp1")


# ------------------------------------------------------------------------------------------------- several processes


class Trained(NamedTuple):
    """An engine, the folder of its results, and their names."""

    engine: str
    folder: Path
    names: list[str]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, models, and the results of training in one process."""
    folder = tmp_path_factory.mktemp("alone")
    save_inputs(folder)
    gda.grow(folder / "gda", folder / "grown", signal=2, depth=3, verify=False)
    for name in RUNS:
        gda.train(**placed(folder, folder / name, name))
    return folder


def placed(folder: Path, out: Path, name: str, processes: int = 1, **options: Any) -> dict[str, Any]:
    """The arguments of `gda.train` for a run, as JSON-ready values."""
    options = COMMON | RUNS[name] | options
    options["batch_size"] = 8 // processes // options.get("accumulation", 1)
    paths = {key: str(folder / options[key]) for key in ("model", "data", "eval_data", "teacher") if key in options}
    return options | paths | {"out": str(out)}


def launch(engine: str, runs: list[dict[str, Any]], folder: Path, processes: int = 2) -> None:
    """Train in several processes with `accelerate launch`, into `folder`; what they hold is written into "held" there.

    Processes on CPUs crash in torch's C++ at times (SIGSEGV, SIGABRT). Then a warning shows the stack, and they are
    started once more, with the same files.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCHES[engine]]
    command += ["--num_processes", str(processes)]
    script = str(Path(__file__).parents[1] / "support" / "in_processes.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    environment |= {"OMP_NUM_THREADS": "1", "HELD": str(folder / "held")}
    environment |= {"DS_ACCELERATOR": "cpu", "PYTHONFAULTHANDLER": "1"}
    if engine != "zero3":
        environment["ACCELERATE_USE_CPU"] = "true"
    (folder / "held").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as before:
        shutil.copytree(folder, before, dirs_exist_ok=True)
        for may_crash in (True, False):
            arguments = ["--main_process_port", str(free_port()), script, json.dumps(runs)]
            ran = subprocess.run(command + arguments, env=environment, capture_output=True, text=True, timeout=600)
            crash = re.search("Fatal Python error: (Segmentation fault|Aborted).*", ran.stderr, re.DOTALL)
            if ran.returncode == 0 or crash is None or not may_crash:
                break
            warnings.warn(f"{engine}, {processes} processes: {crash[0][:4000]}", stacklevel=2)
            shutil.rmtree(folder)
            shutil.copytree(before, folder)
    assert ran.returncode == 0, ran.stderr[-4000:]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def require_equal(here: Path, there: Path, engine: str) -> None:
    """Equal models, losses and, where they are measured, layers."""
    got, expected = tensors_of(here), tensors_of(there)
    assert got.keys() == expected.keys()
    for tensor in expected:
        torch.testing.assert_close(got[tensor], expected[tensor], rtol=0, atol=1e-5, msg=f"{here.name}: {tensor}")
    for ours, theirs in zip(log_of(here), log_of(there), strict=True):
        for key in ("loss", "eval_loss"):
            assert ours.get(key, 0) == pytest.approx(theirs.get(key, 0), abs=1e-5)
        if engine == "zero3":
            continue
        assert ours.keys() == theirs.keys()
        for layer, other in zip(ours.get("layers", []), theirs.get("layers", []), strict=True):
            assert layer == pytest.approx(other, rel=1e-3, abs=1e-6)


@pytest.fixture(scope="module", params=["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def trained(request: pytest.FixtureRequest, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """All runs in two processes with half of the batch each, and one that is interrupted, in one launch."""
    engine, folder = request.param, tmp_path_factory.mktemp(request.param)
    names = [name for name in RUNS if (engine, name) != ("zero3", "new")]  # which is refused
    runs = [placed(alone, folder / "all", "all", 2, interrupt_at=5)]
    runs += [placed(alone, folder / name, name, 2, resume=name == "all") for name in names]
    runs += [placed(alone, folder / "continued", "stream", 2, interrupt_at=3)]
    runs += [placed(alone, folder / "continued", "stream", 2, resume=True)]
    runs += [placed(alone, folder / "still", "all", 2, learning_rate=1e-12, precision="bfloat16")]
    runs += [placed(alone, folder / "interrupted", INTERRUPTED, 2, interrupt_at=4)]
    launch(engine, runs, folder)
    folders = [*names, "continued", "held", "still", ".interrupted.partial"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(folders)
    return Trained(engine, folder, names)


def test_two_processes_equal_one(trained: Trained, alone: Path) -> None:
    """Equal losses, layers and models, also if the run is stopped and resumed."""
    engine, folder, names = trained
    for name in names:
        require_equal(folder / name, alone / name, engine)
        require_sharded(folder / "held", name, engine, RUNS[name].get("train", "all"))
    assert json.loads((folder / "all" / "training.json").read_text())["report"]["resumed_from"] == 5
    stream, continued = tensors_of(folder / "stream"), tensors_of(folder / "continued")
    assert all(torch.equal(stream[tensor], continued[tensor]) for tensor in stream)
    if "new" in names:
        old_stays_bit_for_bit(alone / "grown", folder / "new")
    before = tensors_of(alone / RUNS["all"]["model"])
    for tensor, after in tensors_of(folder / "still").items():  # computed in bfloat16, but not stored in it
        torch.testing.assert_close(after, before[tensor], rtol=0, atol=1e-9, msg=tensor)


def require_sharded(folder: Path, name: str, engine: str, trained: str) -> None:
    """Each process holds half of the weights and of Adam's moments; with data parallelism, it holds all of them."""
    parts = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    total = sum(whole for _, whole in parts[0]["parameters"].values())
    shares = [sum(here for here, _ in part["parameters"].values()) / total for part in parts]
    assert shares == ([1, 1] if engine == "ddp" else pytest.approx([0.5, 0.5], abs=0.01))
    assert all(part["dtypes"] == ["torch.float32"] for part in parts)
    if trained == "all":
        assert [part["moments"] / total for part in parts] == pytest.approx(shares, abs=0.01)


def test_resume_with_more_processes(trained: Trained, alone: Path) -> None:
    """The checkpoint of two processes is continued by four, to the same model."""
    engine, folder, _ = trained
    run = placed(alone, folder / "interrupted", INTERRUPTED, 4, resume=True)
    launch(engine, [run], folder, 4)
    require_equal(folder / "interrupted", alone / INTERRUPTED, engine)


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (FSDP2 | {"FSDP_VERSION": "1"}, "FSDP1 is not supported"),
        (FSDP2, "accelerate ignores FSDP2 here"),
        (DEEPSPEED, "accelerate ignores DeepSpeed's ZeRO"),
    ],
)
def test_sharding_is_never_ignored(
    environment: dict[str, str], message: str, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate would go on with data parallelism."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        gda.train(**placed(alone, tmp_path / "out", "all"))


@pytest.mark.parametrize(
    ("environment", "name", "options", "message"),
    [
        (
            FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "all",
            {"gradient_checkpointing": True},
            "the configuration for FSDP recomputes activations",
        ),
        (DEEPSPEED, "new", {}, "--train new does not work with DeepSpeed"),
    ],
)
def test_refusals_name_the_option(
    environment: dict[str, str],
    name: str,
    options: dict[str, Any],
    message: str,
    alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What an engine cannot do is refused before the data is read, if the engine is in force."""
    monkeypatch.setattr(Processes, "require_sharding", lambda _: None)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        gda.train(**placed(alone, tmp_path / "out", name, **options))
    assert list(tmp_path.iterdir()) == []


def test_what_a_resumed_run_must_have_in_common(tmp_path: Path) -> None:
    """Which process reads which sequences makes no difference, and after training no file does."""
    settings = TrainSettings(**COMMON, batch_size=4)
    begun = RunIdentity(settings, None, [], [], [], 2, "FSDP2", "float32")
    same = replace(begun, settings=replace(settings, batch_size=8), processes=1)
    other_data = replace(same, data=[["text.txt", 9, 5]])
    stored = json.loads(json.dumps(asdict(begun)))
    same.require_same(stored, tmp_path)
    other_data.require_same(stored | {"report": {}}, tmp_path)  # nothing is read any more
    differing = {
        r"processes\) was 8, and is now 16": replace(same, processes=2),
        "sharding was FSDP2, and is now DeepSpeed's ZeRO-3": replace(same, keeper="DeepSpeed's ZeRO-3"),
        "--precision auto was float32, and is now bfloat16": replace(same, auto_precision="bfloat16"),
        r"--warmup was 0\.02, and is now 0\.0; pass the same value": replace(
            same, settings=replace(same.settings, warmup=0.0)
        ),
        "commit of the model was not given, and is now abc; pass the former as --rev": replace(same, commit="abc"),
        "text.txt of the data was added, removed or changed": other_data,
    }
    for message, other in differing.items():
        with pytest.raises(ValueError, match=message):
            other.require_same(stored, tmp_path)
    pairs = {"settings": [[1, 2], ["batch_size", 1], ["accumulation", 1]]}
    huge = {"settings": stored["settings"] | {"batch_size": 10**4200, "accumulation": 10**4200}}
    malformed = ({"settings": []}, {"data": [[]]}, {"model": 3}, pairs, huge)
    for each in ({}, *(stored | fields for fields in malformed)):
        with pytest.raises(ValueError, match=r"training\.json does not describe a run; start over with --overwrite"):
            same.require_same(each, tmp_path)


def old_stays_bit_for_bit(grown: Path, trained: Path) -> None:
    before, after, in_part = tensors_of(grown), tensors_of(trained), 0
    for name, tensor in before.items():
        new = Trainable.read(grown).new_entries(name, tensor)
        old = torch.ones_like(tensor, dtype=torch.bool) if new is None else ~new
        assert torch.equal(tensor[old], after[name][old]), name
        in_part += bool(old.any()) and not bool(old.all())
    assert in_part
