"""A machine is killed, silent or asked to stop in the middle: the others name it and end, and the run goes on."""

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from gda.training.runs import watch
from gda.training.runs.checkpoints import last_checkpoint

from ..support.llamas import tensors_of
from ..support.machines import Fault, on_two_machines, with_torchrun
from ..support.training import save_inputs

HOST = socket.gethostname()
OPTIONS = ("--context=32", "--steps=10", "--learning-rate=1e-2", "--batch-size=4", "--save-every=2", "--resume")
# Each launch resumes the run that the fault before it has ended. Even steps are saved.
FAULTS = {
    "killed": Fault("SIGKILL", process=1, step=4),
    "main machine killed": Fault("SIGKILL", process=0, step=5),
    "silent": Fault("SIGSTOP", process=1, step=7),
    "asked to stop": Fault("SIGTERM", process=1, step=9, whom="launcher"),
}
LINES = {
    "killed": f"gda: process 1 on {HOST} was killed or crashed; continue with --resume",
    "main machine killed": f"gda: process 0 on {HOST} was killed or crashed; continue with --resume",
    "silent": f"gda: process 1 on {HOST} has not answered for 8 s; continue with --resume",
    "asked to stop": f"gda: stopped by SIGTERM on {HOST}; continue with --resume",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a model, and the result of an uninterrupted run in two processes."""
    folder = tmp_path_factory.mktemp("machines")
    save_inputs(folder)
    ended = with_torchrun(arguments(folder, folder / "whole"))
    assert ended.code == 0, ended.error
    return folder


def arguments(folder: Path, out: Path) -> list[str]:
    return ["train", str(folder / "gda"), str(out), "--data", str(folder / "text.txt"), *OPTIONS]


def assert_same_result(folder: Path, out: Path, *, resumed_from: int) -> None:
    expected, got = tensors_of(folder / "whole"), tensors_of(out)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert json.loads((out / "training.json").read_text())["report"]["resumed_from"] == resumed_from


@pytest.mark.slow
@pytest.mark.early
def test_lost_machine(folder: Path, tmp_path: Path) -> None:
    """One line names it, the last checkpoint is complete, and the run ends with the weights of an uninterrupted one."""
    saved = {"killed": 2, "main machine killed": 4, "silent": 6, "asked to stop": 9}
    for name, fault in FAULTS.items():
        ended = on_two_machines(arguments(folder, tmp_path / "out"), fault)
        assert all(each.code for each in ended.values()), name
        assert [line for each in ended.values() for line in each.lines] == [LINES[name]]
        last = last_checkpoint(tmp_path / ".out.partial")
        assert last is not None
        assert last.name == f"checkpoint-{saved[name]}", name
    ended = on_two_machines(arguments(folder, tmp_path / "out"))
    assert [each.code for each in ended.values()] == [0, 0], ended
    assert_same_result(folder, tmp_path / "out", resumed_from=9)


@pytest.mark.slow
def test_elastic_restart(folder: Path, tmp_path: Path) -> None:
    """torchrun starts killed processes again, and they go on from the last checkpoint."""
    ended = with_torchrun(arguments(folder, tmp_path / "out"), Fault("SIGKILL", process=0, step=6, whom="process"))
    assert ended.code == 0, ended.error
    assert_same_result(folder, tmp_path / "out", resumed_from=4)


class Pair:
    """One of two processes, which are threads here."""

    count = 2
    barrier = threading.Barrier(2)
    values: dict[int, Any] = {}

    def __init__(self, index: int):
        self.index, self.is_main = index, index == 0

    def gather(self, value: Any) -> list[Any]:
        self.values[self.index] = value
        self.barrier.wait()
        gathered = [self.values[0], self.values[1]]
        self.barrier.wait()
        return gathered


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (None, ""),
        (ValueError("reported by the process itself"), ""),
        (KeyboardInterrupt(), f"gda: process 1 on {HOST} was stopped; continue with --resume\n"),
    ],
)
def test_how_a_process_leaves(
    error: BaseException | None, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The main process ends if another one has ended with an error, and prints a line unless that one does."""
    exits: list[int] = []
    monkeypatch.setattr(watch, "BEAT", 0.05)
    monkeypatch.setattr(watch, "GRACE", 0.3)
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    left = threading.Event()

    def other() -> None:
        try:
            with watch.watched(Pair(1)):  # type: ignore[arg-type]
                if error is not None:
                    raise error
        except BaseException:
            assert error is not None
        left.set()

    thread = threading.Thread(target=other)
    thread.start()
    with watch.watched(Pair(0)):  # type: ignore[arg-type]
        assert left.wait(10)
        threading.Event().wait(1)  # as in a collective that hangs
    thread.join()
    assert capsys.readouterr().err == line
    assert exits == ([] if error is None else [2])
