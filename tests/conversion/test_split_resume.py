"""A split that is killed, interrupted or out of disk space resumes from finished work, and OUT is complete or absent.

Processes are really killed, as in test_convert_crash_safety.
"""

import ctypes
import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gda.conversion.split import fit
from gda.conversion.split import splitter as split_module
from gda.conversion.split.distill import Distillation
from gda.conversion.writing import write_model as write_module

from ..support.children import ENDED, in_child, killed_at
from ..support.commands import Command, assert_refused
from ..support.llamas import change_config, files_of, save_llama
from ..support.splitting import CONTEXT, STEPS, TOKENS, brief, save_text, split

__all__ = ["brief"]
pytestmark = [pytest.mark.slow, pytest.mark.early, pytest.mark.usefixtures("brief")]

LAYERS = 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers, beside a text."""
    folder = tmp_path_factory.mktemp("source")
    save_text(folder / "text.txt")
    return save_llama(folder / "llama", num_hidden_layers=LAYERS)


@pytest.fixture(autouse=True)
def place(tmp_path: Path) -> Path:
    """The folder in which results appear."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture(scope="module")
def known() -> dict[str, bytes]:
    """Empty at first; `expected` fills it once."""
    return {}


@pytest.fixture
def expected(llama: Path, known: dict[str, bytes], tmp_path: Path) -> dict[str, bytes]:
    """The files of an undisturbed split."""
    if not known:
        trained(llama, tmp_path / "expected" / "gda")
        known |= files_of(tmp_path / "expected" / "gda")
    return known


def trained(llama: Path, out: Path, **options: Any) -> Any:
    return split(llama, out, **({"effort": "default", "calibration": llama.parent / "text.txt"} | options))


def after(times: int, right: Callable[..., Any], happens: Callable[[], object]) -> Callable[..., Any]:
    """`right`, with an action before call number `times` + 1."""
    called = 0

    def function(*arguments: Any, **options: Any) -> Any:
        nonlocal called
        called += 1
        if called == times + 1:
            happens()
        return right(*arguments, **options)

    return function


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Stages in which a run may be stopped: the function, and how often it is called in total.
STAGES: dict[str, tuple[Any, str, int]] = {
    "sampling": (split_module, "sampled", 1),
    "dividing": (fit, "_fit_layer", LAYERS),
    "training": (Distillation, "_train_on", STEPS),
    "verifying": (write_module, "write_provenance", 1),
}
each_stop = pytest.mark.parametrize(
    ("stage", "done"),
    [("sampling", 0), ("dividing", 0), ("dividing", 2), ("training", 0), ("training", 2), ("verifying", 0)],
)


def calls_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count calls of each stage."""
    counts = dict.fromkeys(STAGES, 0)

    def counted(stage: str, of: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any, **options: Any) -> Any:
            counts[stage] += 1
            return of(*arguments, **options)

        return function

    for stage, (owner, name, _) in STAGES.items():
        monkeypatch.setattr(owner, name, counted(stage, getattr(owner, name)))
    return counts


def expected_calls(stage: str, done: int) -> dict[str, int]:
    """Calls that remain if a run was stopped in that stage."""
    at = list(STAGES).index(stage)
    return {
        name: 0 if index < at else total - done if index == at else total
        for index, (name, (_, _, total)) in enumerate(STAGES.items())
    }


@each_stop
def test_killed_and_resumed(
    stage: str,
    done: int,
    llama: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The files equal those of an uninterrupted run, and finished layers and saved steps are not repeated."""
    out = tmp_path / "place" / "gda"
    owner, name, _ = STAGES[stage]

    def killed() -> None:
        setattr(owner, name, after(done, getattr(owner, name), kill_me))
        trained(llama, out)

    assert in_child(killed) == -signal.SIGKILL
    assert os.listdir(tmp_path / "place") == [".gda.partial"]
    counts = calls_of(monkeypatch)
    trained(llama, out, resume=True)
    assert counts == expected_calls(stage, done)
    assert files_of(out) == expected
    assert os.listdir(tmp_path / "place") == ["gda"]


@each_stop
def test_ctrl_c_keeps_the_work(
    stage: str,
    done: int,
    llama: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
) -> None:
    """Exit code 130, a line that names --resume, and no OUT; --resume continues."""
    out = tmp_path / "place" / "gda"
    owner, name, _ = STAGES[stage]
    arguments = (
        *("convert", llama, out, "--mode", "split", "--effort", "default", "--no-verify"),
        *("--calibration", llama.parent / "text.txt", "--calibration-tokens", TOKENS),
    )
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, after(done, getattr(owner, name), lambda: signal.raise_signal(signal.SIGINT)))
        outcome = command(*arguments)
    assert outcome.code == 130
    assert "--resume" in outcome.error
    assert "Traceback" not in outcome.error
    assert os.listdir(tmp_path / "place") == [".gda.partial"]
    counts = calls_of(monkeypatch)
    assert command(*arguments, "--resume").code == 0
    assert counts == expected_calls(stage, done)
    assert files_of(out) == expected


def test_memory_is_needed_once(
    llama: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To write text; a resumed run has it."""
    out = tmp_path / "place" / "gda"
    with monkeypatch.context() as patch:
        patch.setattr(fit, "_fit_layer", after(0, fit._fit_layer, lambda: signal.raise_signal(signal.SIGINT)))
        with pytest.raises(KeyboardInterrupt):
            trained(llama, out)
    monkeypatch.setattr(split_module, "free_memory", lambda device="cpu": 0)
    trained(llama, out, resume=True)
    assert files_of(out) == expected
    for resume in (False, True):
        with pytest.raises(ValueError, match="GB of memory to write calibration text"):
            trained(llama, tmp_path / "place" / "other", resume=resume)


def test_killed_at_any_moment_between_files(llama: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """OUT is complete or absent, and never contains `work`."""
    place = tmp_path / "place"
    out = place / "gda"
    moment, absent = 1, 0
    while killed_at(moment, place, lambda: trained(llama, out)):
        if out.exists():
            assert files_of(out) == expected, moment
        else:
            absent += 1
            assert in_child(lambda: trained(llama, out, resume=True)) == ENDED, moment
            assert files_of(out) == expected, moment
        assert set(os.listdir(place)) <= {"gda", ".gda.lock"}, moment
        shutil.rmtree(place)
        place.mkdir()
        moment += 79
    assert files_of(out) == expected
    assert absent >= 4


def test_other_settings_are_refused(
    llama: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line names the remedy, and the work is kept."""
    out = tmp_path / "place" / "gda"
    with monkeypatch.context() as patch:
        owner, name, _ = STAGES["training"]
        patch.setattr(owner, name, after(2, getattr(owner, name), lambda: signal.raise_signal(signal.SIGINT)))
        with pytest.raises(KeyboardInterrupt):
            trained(llama, out)
    changes: tuple[dict[str, Any], ...] = (
        {"seed": 1},
        {"effort": "fast"},
        {"lambda_type": "tanh"},
        {"calibration_tokens": TOKENS - 200},
        {"calibration": save_text(tmp_path / "other.txt", 11_000)},
        {"llama": save_llama(tmp_path / "other", seed=1, num_hidden_layers=LAYERS)},
    )
    for change in changes:
        with pytest.raises(ValueError, match="another source, text or setting; pass --overwrite instead of --resume"):
            trained(**{"llama": llama, "calibration": llama.parent / "text.txt"} | change, out=out, resume=True)
        assert not out.exists(), change
    counts = calls_of(monkeypatch)
    trained(llama, out, resume=True)
    assert counts == expected_calls("training", 2)
    assert files_of(out) == expected


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_another_config_or_tokenizer_is_refused(
    file: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that were fitted before are not mixed with those fitted after."""
    copied = shutil.copytree(llama, tmp_path / "llama")
    with monkeypatch.context() as patch:
        owner, name, _ = STAGES["dividing"]
        patch.setattr(owner, name, after(1, getattr(owner, name), lambda: signal.raise_signal(signal.SIGINT)))
        with pytest.raises(KeyboardInterrupt):
            trained(copied, tmp_path / "gda", calibration=llama.parent / "text.txt")
    if file == "config.json":
        change_config(copied, rms_norm_eps=1e-3)
    else:
        tokenizer = json.loads((copied / file).read_text())
        tokenizer["model"]["merges"].pop()
        (copied / file).write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="another source, text or setting; pass --overwrite instead of --resume"):
        trained(copied, tmp_path / "gda", calibration=llama.parent / "text.txt", resume=True)


def test_work_is_not_used_with_overwrite(
    llama: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the settings differed."""
    out = tmp_path / "place" / "gda"
    owner, name, _ = STAGES["training"]

    def killed() -> None:
        setattr(owner, name, after(2, getattr(owner, name), kill_me))
        trained(llama, out, seed=1)

    assert in_child(killed) == -signal.SIGKILL
    counts = calls_of(monkeypatch)
    trained(llama, out, overwrite=True)
    assert counts == {stage: total for stage, (_, _, total) in STAGES.items()}
    assert files_of(out) == expected


@pytest.mark.parametrize("content", ["", "[]", "{}", "\0"])
def test_damaged_fingerprint_file(content: str, llama: Path, tmp_path: Path, command: Command) -> None:
    """One line."""
    work = tmp_path / "place" / ".gda.partial" / "work"
    work.mkdir(parents=True)
    (work / "begun.json").write_text(content)
    outcome = command(
        *("convert", llama, tmp_path / "place" / "gda", "--mode", "split", "--effort", "fast", "--resume"),
        *("--calibration", llama.parent / "text.txt"),
    )
    assert_refused(outcome, ".gda.partial")
    assert not (tmp_path / "place" / "gda").exists()


# ------------------------------------------------------------------------------------------------------------ disk full


@pytest.mark.parametrize("limit", [1_000, 20_000, 150_000])
def test_full_disk_names_the_file(limit: int, llama: Path, tmp_path: Path) -> None:
    """The kernel refuses larger files; writing to unallocated mapped memory would kill the process.

    The tokenizer is written first, to a temporary folder, and does not fit the smallest limit. Later, the work is kept.
    """
    named = ["assets"] if limit == 1_000 else [".gda.partial", "pass --resume to go on"]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            trained(llama, tmp_path / "place" / "gda")
        except OSError as error:
            os._exit(errno.EFBIG if all(each in str(error) for each in ("File too large", *named)) else 99)

    assert in_child(limited) == errno.EFBIG
    assert os.listdir(tmp_path / "place") == ([] if limit == 1_000 else [".gda.partial"])


def test_disk_full_while_training(
    llama: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """Exit code 2, one line that names --resume, and work from which the same model follows."""
    from gda.conversion.split import work

    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")

    plain = work.write_safetensors
    monkeypatch.setattr(work, "write_safetensors", after(LAYERS, plain, full))
    outcome = command(
        *("convert", llama, tmp_path / "place" / "gda", "--mode", "split", "--effort", "default"),
        *("--calibration", llama.parent / "text.txt", "--calibration-tokens", TOKENS),
    )
    assert_refused(outcome, "No space left", "pass --resume")
    assert os.listdir(tmp_path / "place") == [".gda.partial"]
    monkeypatch.setattr(work, "write_safetensors", plain)
    trained(llama, tmp_path / "place" / "gda", resume=True)
    assert files_of(tmp_path / "place" / "gda") == expected


def test_failure_leaves_no_files(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss becomes NaN during training."""
    monkeypatch.setattr(Distillation, "_train_on", lambda *_: float("nan"))
    with pytest.raises(ValueError, match="training loss is not finite"):
        trained(llama, tmp_path / "place" / "gda")
    assert os.listdir(tmp_path / "place") == []


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
def test_peak_memory_is_bounded(tmp_path: Path) -> None:
    """For a Llama of 300 MB, with training, in a process that does not cache tensors.

    Memory mapped from files is not counted, because the system reclaims it when needed.
    """
    save_text(tmp_path / "text.txt")
    save_llama(
        tmp_path / "llama",
        num_hidden_layers=24,
        hidden_size=512,
        intermediate_size=1408,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
    )
    source = (tmp_path / "llama" / "model.safetensors").stat().st_size
    assert source > 250e6
    figures = tmp_path / "figures.json"

    def measured() -> None:
        split_module.memory_to_use = lambda *_: 0
        split_module.EFFORTS = {"default": 1}
        before = anonymous_memory()
        most = [before]
        real = Distillation._update, fit.split_layer

        def update(*arguments: Any) -> None:
            most.append(anonymous_memory())
            real[0](*arguments)

        def divided(*arguments: Any, **options: Any) -> Any:
            most.append(anonymous_memory())
            return real[1](*arguments, **options)

        Distillation._update, fit.split_layer = update, divided  # type: ignore[method-assign]
        texts = (str(tmp_path / "text.txt"), "sampled:0")  # to write text, the whole source is loaded
        trained(tmp_path / "llama", tmp_path / "gda", calibration=texts, calibration_tokens=2 * CONTEXT)
        figures.write_text(json.dumps({"before": before, "most": max(most)}))

    assert in_child(measured) == ENDED
    output = json.loads(figures.read_text())
    grown = output["most"] - output["before"]
    print(f"source {source / 1e6:.0f} MB, memory grew by {grown / 1e6:.0f} MB")
    assert grown < source / 2  # both models and Adam would take more than three times the source


def anonymous_memory() -> int:
    """Bytes of this process that do not belong to a file, without those that the allocator of glibc keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")
