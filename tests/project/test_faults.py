"""Kills at random moments, unreadable and truncated sources, read-only sources, odd names, locales and clocks, and
equal bytes for any number of threads.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import gda
from gda.conversion.tensors.safetensors_io import SafetensorsReader

from ..support.children import ENDED, FAILED, in_child, killed_at
from ..support.llamas import files_of, save_llama, tensors_of
from ..support.splitting import save_text

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("GDA_FUZZ_SEED", "0"))
SHORT, LONG = 2, 50
MOST_CHANGES = 40  # changes of the file system in such a run
ODD = "a b 'ü' 模型 #%"
Make = Callable[[Path, bool], object]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in shards, a text and a GDA model. Tests must not change it."""
    folder = tmp_path_factory.mktemp("sources")
    save_llama(folder / "llama", dtype=torch.bfloat16, max_shard_size="20KB")
    save_text(folder / "text.txt", 3000)
    gda.convert(folder / "llama", folder / "gda", verify=False)
    return folder


def makers(sources: Path) -> dict[str, Make]:
    """Functions that create a folder, from scratch or resumed."""
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
    """OUT is complete or absent, and --resume gives the same bytes, also after several kills."""
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


@pytest.mark.parametrize("name", ["split", "grow"])
def test_bytes_do_not_depend_on_threads(name: str, sources: Path, tmp_path: Path) -> None:
    """Every file, in separate processes."""

    def on(threads: int) -> None:
        torch.set_num_threads(threads)
        makers(sources)[name](tmp_path / str(threads), False)

    for threads in (1, 2):
        assert in_child(lambda threads=threads: on(threads)) == ENDED
    made = [files_of(tmp_path / str(threads)) for threads in (1, 2)]
    differing = [file for file in made[0] if made[0][file] != made[1].get(file)]
    assert made[0].keys() == made[1].keys()
    assert not differing


def test_read_only_source(sources: Path, tmp_path: Path) -> None:
    """Nothing tries to write to it, without permissions or on a read-only file system."""
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


# ------------------------------------------------------------------------------------------------------------- training


TINY: dict[str, Any] = {"steps": 6, "batch_size": 2, "context": 16, "learning_rate": 1e-2, "save_every": 2}


@pytest.mark.parametrize("kills", [SHORT, pytest.param(LONG, marks=pytest.mark.long)])
def test_training_killed_at_random_moments(kills: int, sources: Path, tmp_path: Path) -> None:
    """Once or repeatedly: --resume gives the weights of an undisturbed run."""

    def train(out: Path, resume: bool) -> object:
        return gda.train(sources / "gda", out, data=sources / "text.txt", resume=resume, **TINY)

    began = time.monotonic()
    assert in_child(lambda: train(tmp_path / "whole" / "out", False)) == ENDED
    whole, lasts = tensors_of(tmp_path / "whole" / "out"), time.monotonic() - began
    chance, died = random.Random(f"{SEED} train"), 0
    print(f"seed {SEED}")
    while died < kills:
        place = tmp_path / "place"
        place.mkdir()
        for _ in range(chance.choice((1, 1, 2, 3))):
            work = partial(train, place / "out", True)
            if chance.random() < 0.5:
                died += in_child(work, kill_after=chance.uniform(0, lasts)) == -signal.SIGKILL
            else:
                died += killed_at(chance.randint(1, 120), place, work)
            if (place / "out").exists():
                break
        if not (place / "out").exists():
            assert in_child(lambda place=place: train(place / "out", True)) == ENDED
        found = tensors_of(place / "out")
        assert {name for name in whole if not torch.equal(found[name], whole[name])} == set()
        assert found.keys() == whole.keys()
        assert os.listdir(place) == ["out"]
        shutil.rmtree(place)


# ---------------------------------------------------------------------------------------------------------- read errors


@pytest.mark.parametrize("name", ["expand", "split", "grow"])
def test_read_error_in_a_shard(name: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No OUT, and --resume continues when the file is readable again."""
    make = makers(sources)[name]
    make(tmp_path / "whole" / "out", False)
    read, left = SafetensorsReader.read, 1

    def fails(self: SafetensorsReader, tensor: str) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self.folder))
        return read(self, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsReader, "read", fails)
        with pytest.raises(OSError, match="Input/output error"):
            make(tmp_path / "out", False)
    assert not (tmp_path / "out").exists()
    make(tmp_path / "out", True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole" / "out")


@pytest.mark.parametrize("after", [1, 2])
def test_shard_truncated_while_it_is_read(after: int, sources: Path, tmp_path: Path) -> None:
    """An error instead of SIGBUS, and no OUT; --resume reports another source."""
    source = Path(shutil.copytree(sources / "llama", tmp_path / "llama"))
    read, done = SafetensorsReader.read, 0

    def cut(self: SafetensorsReader, tensor: str) -> torch.Tensor:
        nonlocal done
        done += 1
        if done == after:
            os.truncate(self._ranges[tensor].path, 4096)
        return read(self, tensor)

    def work() -> None:
        SafetensorsReader.read = cut  # type: ignore[method-assign]
        makers(tmp_path)["expand"](tmp_path / "place" / "out", False)

    (tmp_path / "place").mkdir()
    assert in_child(work) == FAILED
    assert not (tmp_path / "place" / "out").exists()
    with pytest.raises(ValueError, match="is damaged"):
        makers(tmp_path)["expand"](tmp_path / "place" / "out", True)
    shutil.rmtree(source)
    shutil.copytree(sources / "llama", source)
    makers(tmp_path)["expand"](tmp_path / "place" / "out", True)
    makers(tmp_path)["expand"](tmp_path / "afresh", False)
    assert files_of(tmp_path / "place" / "out") == files_of(tmp_path / "afresh")


# ----------------------------------------------------------------------------------------------- names, locales, clocks


def test_odd_names_and_c_locale(sources: Path, tmp_path: Path) -> None:
    """Spaces, quotes and other scripts in names, with LANG=C: the files are the same."""
    source = Path(shutil.copytree(sources / "llama", tmp_path / ODD / "llama ü"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "PYTHON"))}
    environment |= {"LANG": "C"}  # Python treats it as UTF-8; otherwise torch cannot be imported
    out = tmp_path / ODD / "模型"
    done = subprocess.run(
        [sys.executable, "-m", "gda.cli", "convert", source, out, "--no-verify"],
        env=environment,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done
    assert b"Traceback" not in done.stderr
    gda.convert(source, tmp_path / "again", verify=False)
    again = files_of(tmp_path / "again")
    assert {name for name, content in files_of(out).items() if content != again.get(name)} == set()
    assert files_of(out).keys() == again.keys()


def test_wrong_clock(sources: Path, tmp_path: Path) -> None:
    """Files from the future, and a clock that goes backwards: --resume does not depend on it."""
    source = Path(shutil.copytree(sources / "llama", tmp_path / "llama"))
    future = time.time() + 100 * 365 * 86400
    for path in source.iterdir():
        os.utime(path, (future, future))
    make = makers(tmp_path)["expand"]
    make(tmp_path / "whole", False)
    assert killed_at(20, tmp_path / "place", partial(make, tmp_path / "place" / "out", False))
    for path in sorted((tmp_path / "place").rglob("*")):
        os.utime(path, (future, future) if path.suffix == ".safetensors" else (0, 0))
    real = time.time
    time.time = lambda: real() - 10 * 365 * 86400
    try:
        make(tmp_path / "place" / "out", True)
    finally:
        time.time = real
    assert files_of(tmp_path / "place" / "out") == files_of(tmp_path / "whole")
