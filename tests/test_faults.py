"""Faults that others do not try: kills at random moments, sources that cannot be written, and
the same bytes whatever the number of threads."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import gda

from .llamas import files_of, save_llama
from .splitting import save_text
from .test_convert_crash_safety import killed_at

SEED = int(os.environ.get("GDA_FUZZ_SEED", "0"))
SHORT, LONG = 2, 50
MOST_CHANGES = 40  # of the file system, that a run of these makes
Make = Callable[[Path, bool], object]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in shards, a text and a GDA model; not to be changed."""
    folder = tmp_path_factory.mktemp("sources")
    save_llama(folder / "llama", dtype=torch.bfloat16, max_shard_size="20KB")
    save_text(folder / "text.txt", 3000)
    gda.convert(folder / "llama", folder / "gda", verify=False)
    return folder


def makers(sources: Path) -> dict[str, Make]:
    """What makes a folder, afresh or resumed."""
    return {
        "expand": lambda out, resume: gda.convert(
            sources / "llama", out, max_shard_size="20KB", verify=False, resume=resume
        ),
        "split": lambda out, resume: gda.convert(
            sources / "llama",
            out,
            mode="split",
            effort="fast",
            calibration=sources / "text.txt",
            calibration_tokens=512,
            max_shard_size="20KB",
            verify=False,
            resume=resume,
        ),
        "grow": lambda out, resume: gda.grow(
            sources / "gda", out, signal=2, depth=3, max_shard_size="20KB", verify=False, resume=resume
        ),
    }


@pytest.mark.parametrize("name", ["expand", "split", "grow"])
@pytest.mark.parametrize("kills", [SHORT, pytest.param(LONG, marks=pytest.mark.long)])
def test_killed_at_random_moments(name: str, kills: int, sources: Path, tmp_path: Path) -> None:
    """OUT is absent or whole, and --resume ends in the same bytes, also after several kills in a row."""
    make = makers(sources)[name]
    make(tmp_path / "whole" / "out", False)
    whole = files_of(tmp_path / "whole" / "out")
    chance = random.Random(f"{SEED} {name}")
    print(f"seed {SEED}")
    for number in range(kills):
        place = tmp_path / str(number)
        place.mkdir()
        for resume in (False, True)[: chance.choice((1, 2))]:
            moment = chance.randint(1, MOST_CHANGES)
            killed_at(moment, place, partial(make, place / "out", resume))
            if (place / "out").exists():
                assert files_of(place / "out") == whole, (number, moment)
                break
        if not (place / "out").exists():
            make(place / "out", True)
        assert files_of(place / "out") == whole, number
        assert os.listdir(place) == ["out"]
        shutil.rmtree(place)


CALIBRATED = ["--mode", "split", "--effort", "fast", "--calibration", "text.txt", "--calibration-tokens", "512"]
COMMANDS = {
    "expand": ["convert", "llama"],
    "split": ["convert", "llama", *CALIBRATED],
    "grow": ["grow", "gda", "--signal", "2", "--depth", "3"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_bytes_on_one_thread_and_on_two(name: str, sources: Path, tmp_path: Path) -> None:
    """One source, one seed: every file is the same, in processes of their own."""
    made = []
    for threads in ("1", "2"):
        command, source, *options = COMMANDS[name]
        command_line = [
            sys.executable,
            "-P",
            "-m",
            "gda.cli",
            command,
            source,
            tmp_path / threads,
            *options,
            "--no-verify",
        ]
        subprocess.run(command_line, cwd=sources, env=os.environ | {"OMP_NUM_THREADS": threads}, check=True)
        made.append(files_of(tmp_path / threads))
    differing = [file for file in made[0] if made[0][file] != made[1].get(file)]
    assert made[0].keys() == made[1].keys()
    assert not differing


def test_a_source_that_cannot_be_written(sources: Path, tmp_path: Path) -> None:
    """Nothing is tried to be written into a source, with its rights taken or on a medium that is read only."""
    source = Path(shutil.copytree(sources / "llama", tmp_path / "llama"))
    before = {path: path.stat().st_mtime_ns for path in (source, *source.iterdir())}
    for path in (*source.iterdir(), source):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        gda.convert(source, tmp_path / "gda", verify=False)
        gda.verify(source, tmp_path / "gda", method="tensors")
    finally:
        source.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in (source, *source.iterdir())} == before
    assert all(os.access(path, os.W_OK) for path in (tmp_path / "gda").iterdir())
