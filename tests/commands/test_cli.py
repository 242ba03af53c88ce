"""The command line: help, start-up, JSON on standard output, and exit codes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gda
from gda.cli import app, main

from ..support.commands import Command, Outcome, assert_refused
from ..support.llamas import VARIANTS, files_of, save_llama

COMMANDS = (
    "convert",
    "push",
    "verify",
    "inspect",
    "export",
    "fold",
    "grow",
    "train",
    "eval",
    "attention",
    "serve",
    "demo",
)
FOUND = shutil.which("gda") or str(Path(sys.executable).with_name("gda"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama, `llama`, and its conversion, `gda`. Tests must not change it."""
    folder = tmp_path_factory.mktemp("models")
    gda.convert(save_llama(folder / "llama"), folder / "gda", verify=False)
    return folder


def tamper(folder: Path) -> None:
    """Change one weight that affects the output."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ----------------------------------------------------------------------------------------------------- help and version


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str, option: str, command: Command) -> None:
    """Each command's help has examples and lists its arguments."""
    outcome = command(name, option)
    assert outcome.code == 0
    assert "Example" in outcome.out
    assert f"gda {name}" in outcome.out.split("Example")[1]
    assert outcome.error == ""


def test_every_command_is_listed_and_tested_here(command: Command) -> None:
    """`gda --help` lists exactly the commands that this file tests."""
    registered = {info.name or info.callback.__name__ for info in app.registered_commands if info.callback}
    assert registered == set(COMMANDS)
    help_ = command("--help")
    assert help_.code == 0
    for name in COMMANDS:
        assert name in help_.out


@pytest.mark.parametrize("name", ["", "convert", "train", "eval"])
def test_help_imports_nothing_heavy(name: str) -> None:
    """Neither transformers nor torch, nor modules of ours that need them."""
    script = (
        "import sys\n"
        "sys.argv[0] = 'gda'\n"
        "from gda.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    heavy = {'transformers', 'torch', 'numpy', 'huggingface_hub', 'gda.configuration.configuration_gda',\n"
        "             'accelerate', 'gguf', 'datasets', 'lm_eval', 'matplotlib'}\n"
        "    print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *filter(None, [name]), "--help"], capture_output=True, text=True, check=True
    )
    assert "HEAVY []" in done.stdout
    assert "Usage" in done.stdout
    assert done.stderr == ""


def test_help_in_an_encoding_without_greek() -> None:
    """As in a locale of ISO 8859-1. The letters that it lacks are escaped."""
    done = subprocess.run(
        [sys.executable, "-m", "gda.cli", "convert", "--help"],
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
    )
    assert rb"How \u03bb is computed" in done.stdout


def test_closed_standard_error() -> None:
    """As some daemons leave it to a command."""
    script = f"{shlex.quote(sys.executable)} -m gda.cli --version 2>&-"
    assert subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, text=True).stdout == f"{gda.__version__}\n"


def test_version(command: Command) -> None:
    assert command("--version") == Outcome(0, f"{gda.__version__}\n", "")


@pytest.mark.slow
def test_installed_command(models: Path) -> None:
    """The console script: the version, and an error with its exit code in one line."""
    done = subprocess.run([FOUND, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{gda.__version__}\n"
    bad = subprocess.run([FOUND, "inspect", str(models / "llama")], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert len(bad.stderr.splitlines()) == 1


def test_gda_alone_shows_the_help(command: Command) -> None:
    outcome = command()
    assert "convert" in outcome.out + outcome.error
    assert "Traceback" not in outcome.error


# ----------------------------------------------------------------------------------------------------------------- JSON


def test_json_output(models: Path, tmp_path: Path, command: Command) -> None:
    """Each command with --json prints one JSON value, equal to the report from Python."""
    converted = command("convert", models / "llama", tmp_path / "gda", "--json", "--ratio", "2:1")
    assert converted.code == 0
    output = json.loads(converted.out)
    assert output["verification"]["passed"] is True
    assert output["num_noise_heads"] == 2

    dry = json.loads(command("convert", models / "llama", tmp_path / "dry", "--json", "--dry-run").out)
    assert dry["dry_run"] is True
    assert not (tmp_path / "dry").exists()

    verified = json.loads(command("verify", models / "llama", tmp_path / "gda", "--json").out)
    assert verified == gda.verify(models / "llama", tmp_path / "gda").to_dict()
    assert verified == output["verification"] | {"tokenizers_compared": True}  # a conversion compares them itself

    inspected = json.loads(command("inspect", tmp_path / "gda", "--json").out)
    assert inspected == gda.inspect(tmp_path / "gda").to_dict()

    exported = json.loads(command("export", tmp_path / "gda", tmp_path / "back", "--json").out)
    assert exported["sha256"] == gda.export(tmp_path / "gda", tmp_path / "again").sha256


@pytest.mark.slow
def test_progress_goes_to_standard_error(models: Path, tmp_path: Path) -> None:
    """On a terminal, standard output still parses as JSON."""
    done = subprocess.run(
        [FOUND, "convert", str(models / "llama"), str(tmp_path / "gda"), "--json"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"},
    )
    assert json.loads(done.stdout)["num_files"] == 1
    assert "writing" in done.stderr


def test_log_files_get_no_progress_bars(models: Path, tmp_path: Path, command: Command) -> None:
    """If standard error is not a terminal, quick commands print nothing to it."""
    assert command("convert", models / "llama", tmp_path / "gda").error == ""
    assert command("verify", models / "llama", tmp_path / "gda").error == ""
    assert command("export", tmp_path / "gda", tmp_path / "back").error == ""
    assert command("inspect", tmp_path / "gda").error == ""


# ----------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize("as_json", [False, True], ids=["", "json"])
@pytest.mark.parametrize("method", ["full", "layers", "tensors"])
def test_failed_check_exits_1(method: str, as_json: bool, models: Path, tmp_path: Path, command: Command) -> None:
    """Numbers on standard output, and one line on standard error."""
    folder = Path(shutil.copytree(models / "gda", tmp_path / "gda"))
    options = ["--method", method, *["--json"] * as_json]
    assert command("verify", models / "llama", folder, *options).code == 0
    tamper(folder)
    outcome = command("verify", models / "llama", folder, *options)
    assert outcome.code == 1
    assert len(outcome.error.splitlines()) == 1
    assert "verification failed" in outcome.error
    if as_json:
        assert json.loads(outcome.out)["passed"] is False
    else:
        assert "compared" in outcome.out
        assert "verified" not in outcome.out


def test_failed_conversion_exits_1_without_files(
    models: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --json too: one line on standard error, and no OUT."""
    from gda.conversion.modes import expand

    right = expand._with_noise_rows
    monkeypatch.setattr(expand, "_with_noise_rows", lambda *args, **options: right(*args, **options).flip(0))
    for options in ([], ["--json"], ["--resume"]):
        outcome = command("convert", models / "llama", tmp_path / "deep" / "gda", *options)
        assert outcome.code == 1, options
        assert outcome.out == ""
        assert len(outcome.error.splitlines()) == 1
        assert list(tmp_path.iterdir()) == [], options


def test_threshold_option(models: Path, tmp_path: Path, command: Command) -> None:
    """Exit 0 above the difference, and 1 below it."""
    gda.convert(models / "llama", tmp_path / "gda", dtype="bfloat16", verify=False)
    assert command("verify", models / "llama", tmp_path / "gda").code == 0
    assert command("verify", models / "llama", tmp_path / "gda", "--threshold", "0.9").code == 0
    assert command("verify", models / "llama", tmp_path / "gda", "--threshold", "1e-6").code == 1


@pytest.mark.parametrize("threshold", ["nan", "-1", "inf", "x"])
def test_invalid_threshold(threshold: str, models: Path, command: Command) -> None:
    """NaN, negative, infinite: exit code 2."""
    outcome = command("verify", models / "llama", models / "gda", "--threshold", threshold)
    assert outcome.code == 2
    assert "threshold" in outcome.error


@pytest.mark.parametrize("name", ["convert", "grow", "verify", "export"])
def test_interruption_exits_130(
    name: str, models: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a traceback."""
    from gda.conversion.tensors.safetensors_io import SafetensorsReader

    monkeypatch.setattr(SafetensorsReader, "read", lambda self, name: signal.raise_signal(signal.SIGINT))
    arguments = {
        "convert": ("convert", models / "llama", tmp_path / "out"),
        "grow": ("grow", models / "llama", tmp_path / "out", "--signal", 2),
        "verify": ("verify", models / "llama", models / "gda", "--method", "layers"),
        "export": ("export", models / "gda", tmp_path / "out"),
    }[name]
    outcome = command(*arguments)
    assert outcome.code == 130
    assert "interrupted" in outcome.error
    assert "Traceback" not in outcome.error
    assert ("--resume" in outcome.error) == (name in ("convert", "export", "grow"))
    assert not (tmp_path / "out").exists()


def test_out_of_memory_is_one_line(models: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch raises on a CPU."""
    from gda.conversion.tensors.safetensors_io import SafetensorsReader

    def allocate(self: SafetensorsReader, name: str) -> torch.Tensor:
        return torch.empty(2**60)

    monkeypatch.setattr(SafetensorsReader, "read", allocate)
    outcome = command("verify", models / "llama", models / "gda", "--method", "layers")
    assert_refused(outcome, "not enough memory: ", "allocate memory")


def test_unexpected_exceptions_are_not_caught(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug must not look like bad input."""
    from gda.conversion.tensors.safetensors_io import SafetensorsReader

    def broken(self: SafetensorsReader, name: str) -> torch.Tensor:
        raise AttributeError("a bug")

    monkeypatch.setattr(SafetensorsReader, "read", broken)
    monkeypatch.setattr(sys, "argv", ["gda", "convert", str(models / "llama"), str(tmp_path / "gda")])
    with pytest.raises(AttributeError, match="a bug"):
        main()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.usefixtures("whole_verification")
def test_output_of_convert(tmp_path: Path, command: Command) -> None:
    """Head map, notes, verification and size, as in the report."""
    source = save_llama(tmp_path / "llama", attention_dropout=0.25)
    outcome = command("convert", source, tmp_path / "gda", "--max-shard-size", "20KB")
    assert outcome.code == 0
    assert "query heads  s s n  s s n" in outcome.out
    assert "note: attention_dropout=0.25" in outcome.out
    assert "verified (full, 407 tokens of text)" in outcome.out
    number = len(list((tmp_path / "gda").glob("*.safetensors")))
    assert f"{number} files" in outcome.out


def test_output_of_inspect(models: Path, command: Command) -> None:
    """Parts, KV cache beside the source's, and λ."""
    outcome = command("inspect", models / "gda")
    report = gda.inspect(models / "gda")
    assert outcome.code == 0
    assert report.head_map in outcome.out
    for part, number in report.parameters.items():
        assert (part in outcome.out) == (number > 0), part
    assert f"{report.num_parameters:,}" in outcome.out
    assert f"{report.kv_cache_bytes_per_token:,} bytes per token (source: " in outcome.out
    assert "0 in every layer" in outcome.out


@pytest.mark.parametrize("option", ["--no-verify", "--verify"])
def test_options_match_the_function_arguments(option: str, tmp_path: Path, command: Command) -> None:
    """Byte for byte the same result."""
    source = save_llama(tmp_path / "llama", **VARIANTS["shards"])
    outcome = command(
        *("convert", source, tmp_path / "gda", "--mode", "expand", "--noise-heads", 1, "--lambda-type", "tanh"),
        *("--seed", 4, "--dtype", "float16", "--max-shard-size", "20KB", option),
    )
    assert outcome.code == 0, outcome
    gda.convert(
        source,
        tmp_path / "python",
        noise_heads=1,
        lambda_type="tanh",
        seed=4,
        dtype="float16",
        max_shard_size="20KB",
        verify=option == "--verify",
    )
    assert files_of(tmp_path / "gda") == files_of(tmp_path / "python")
    assert command("convert", source, tmp_path / "gda", "--overwrite", option).code == 0
    assert (tmp_path / "gda" / "model.safetensors").exists()
