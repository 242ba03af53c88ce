"""A conversion that is killed, interrupted or out of disk space leaves a complete OUT or none.

Processes are really killed: a forked child counts its changes of the file system (Python's audit events) and sends
itself SIGKILL at a given one, so that every moment between two operations is tested.
"""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import gda
from gda.cli import main
from gda.common.files import StagedFolder, refuse_overlap, write_text
from gda.conversion.verify import VerificationFailed
from gda.conversion.writing import stream
from gda.conversion.writing import write_model as write_module

from ..support.children import ENDED, FAILED, in_child, killed_at
from ..support.commands import Command, assert_refused
from ..support.llamas import files_of, save_llama

pytestmark = pytest.mark.slow

SHARD_SIZE = "20KB"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Llama that converts to several shards."""
    return save_llama(tmp_path / "llama", dtype=torch.bfloat16, max_shard_size=SHARD_SIZE)


def convert(source: Path, out: Path, **options: Any) -> Any:
    """Convert into several shards, without verification."""
    return gda.convert(source, out, **({"verify": False, "max_shard_size": SHARD_SIZE} | options))


def test_source_in_what_is_overwritten(source: Path, tmp_path: Path) -> None:
    """A checkpoint of an unfinished training is a model, and lies in the folder that --overwrite removes."""
    checkpoint = tmp_path / ".out.partial" / "checkpoint-5"
    convert(source, checkpoint)
    before = files_of(checkpoint)
    with pytest.raises(ValueError, match=r"\.out\.partial is the source, is inside it or contains it"):
        gda.export(checkpoint, tmp_path / "out", overwrite=True)
    assert files_of(checkpoint) == before


def test_source_under_another_name(source: Path, tmp_path: Path) -> None:
    """Two names may be one file, as `model` and `MODEL` on macOS are one folder; a hard link stands for them here."""
    os.link(source / "config.json", tmp_path / "CONFIG.json")
    with pytest.raises(ValueError, match="is the source, is inside it or contains it"):
        refuse_overlap(source / "config.json", tmp_path / "CONFIG.json")


def reference(source: Path, place: Path, **options: Any) -> dict[str, bytes]:
    """The files of an undisturbed conversion."""
    convert(source, place / "reference", **options)
    files = files_of(place / "reference")
    shutil.rmtree(place / "reference")
    return files


def finished_shards(partial: Path) -> dict[str, tuple[int, int]]:
    """Inode and change time of each shard that the manifest of an unfinished folder lists."""
    manifest = partial / "manifest.json"
    names = json.loads(manifest.read_text())["finished"] if manifest.exists() else []
    return {name: ((partial / name).stat().st_ino, (partial / name).stat().st_mtime_ns) for name in names}


# --------------------------------------------------------------------------------------------------------------- killed


def test_killed_at_any_moment_and_resumed(source: Path, tmp_path: Path) -> None:
    """OUT is complete or absent, --resume gives the same bytes, and finished shards are not written again."""
    place = tmp_path / "place"
    expected = reference(source, place)
    out, partial = place / "gda", place / ".gda.partial"
    moment, kept, whole = 0, set(), 0
    while True:
        moment += 1
        if not killed_at(moment, place, lambda: convert(source, out)):
            break
        assert set(os.listdir(place)) <= {"gda", ".gda.partial", ".gda.lock"}
        if out.exists():
            whole += 1
            assert files_of(out) == expected, moment
        else:
            before = finished_shards(partial)
            kept.add(len(before))
            assert in_child(lambda: convert(source, out, resume=True)) == ENDED, moment
            assert files_of(out) == expected, moment
            for name, identity in before.items():
                assert ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) == identity, (moment, name)
            assert os.listdir(place) == ["gda"], moment
        shutil.rmtree(place)
        place.mkdir()
    assert files_of(out) == expected
    shards = sum(name.endswith(".safetensors") for name in expected)
    assert shards >= 4
    assert kept >= set(range(shards + 1))  # killed before, between and after all of the shards
    assert moment > 2 * shards


@pytest.mark.parametrize("resume", [False, True])
def test_killed_and_run_again_with_other_settings(resume: bool, source: Path, tmp_path: Path) -> None:
    """With --overwrite, OUT contains nothing of the killed run. With --resume, the run is refused or does the same."""
    place = tmp_path / "place"
    other = {"max_shard_size": "5GB", "seed": 1}
    expected = reference(source, place, **other)
    out = place / "gda"
    outcomes = set()
    moment = 0
    while True:
        moment += 4
        if not killed_at(moment, place, lambda: convert(source, out)):
            break
        if not out.exists():
            outcome = in_child(lambda: convert(source, out, resume=resume, overwrite=not resume, **other))
            outcomes.add(outcome)
            if outcome == ENDED:
                assert sorted(files_of(out)) == sorted(expected), moment
                assert files_of(out) == expected, moment
                assert os.listdir(place) == ["gda"], moment
            else:
                assert not out.exists()
        shutil.rmtree(place)
        place.mkdir()
    assert outcomes == ({ENDED, FAILED} if resume else {ENDED})


def test_unfinished_work_is_kept_without_a_word_of_the_user(source: Path, tmp_path: Path) -> None:
    """The same command again names both remedies, also with --dry-run, and touches nothing; each of them gives OUT."""
    place = tmp_path / "place"
    expected = reference(source, place)
    for remedy in ({"resume": True}, {"overwrite": True}):
        assert killed_at(9, place, lambda: convert(source, place / "gda"))
        before = files_of(place / ".gda.partial")
        assert before
        with pytest.raises(FileExistsError, match="--resume to continue it, or --overwrite to start over"):
            convert(source, place / "gda")
        assert "--resume to continue it" in convert(source, place / "gda", dry_run=True).notes[-1]
        assert convert(source, place / "gda", dry_run=True, **remedy).notes == []
        assert files_of(place / ".gda.partial") == before
        convert(source, place / "gda", **remedy)
        assert files_of(place / "gda") == expected
        shutil.rmtree(place)
        place.mkdir()


@pytest.mark.parametrize("resume", [False, True])
def test_unfinished_training_is_not_discarded(resume: bool, source: Path, tmp_path: Path) -> None:
    """Only with --overwrite."""
    partial = tmp_path / ".gda.partial"
    (partial / "checkpoint-1").mkdir(parents=True)
    (partial / "training.json").write_text("{}")
    with pytest.raises(FileExistsError, match="gda was begun by `gda train`, which did not finish; continue that"):
        convert(source, tmp_path / "gda", resume=resume)
    assert (partial / "checkpoint-1").is_dir()
    assert "continue that" in convert(source, tmp_path / "gda", dry_run=True, resume=resume).notes[-1]
    convert(source, tmp_path / "gda", resume=resume, overwrite=True)
    assert not {"checkpoint-1", "training.json"} & set(os.listdir(tmp_path / "gda"))
    assert not partial.exists()


def test_unfinished_split_is_not_discarded_by_another_mode(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".gda.partial"
    (partial / "work").mkdir(parents=True)
    (partial / "manifest.json").write_text('{"mode": "split", "finished": {}}')
    with pytest.raises(ValueError, match=r"\.gda\.partial was begun with mode 'split', not 'expand'"):
        convert(source, tmp_path / "gda", resume=True)
    assert (partial / "work").is_dir()


def test_split_does_not_continue_another_conversion(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before hours of fitting, not after them."""
    with monkeypatch.context() as patch:
        patch.setattr(write_module, "write_provenance", lambda *a, **k: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "gda")
    monkeypatch.setattr("gda.conversion.split.splitter.Splitter.run", lambda *a, **k: pytest.fail("it is fitted"))
    with pytest.raises(ValueError, match="was begun with mode 'expand', not 'split'"):
        gda.convert(source, tmp_path / "gda", mode="split", resume=True)


def test_ctrl_c_while_the_old_model_is_removed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT is complete, and the interrupt is reported as one."""
    convert(source, tmp_path / "gda")

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gda.common.files.remove", lambda path: interrupted(path) if path.exists() else None)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "gda", overwrite=True)
    assert gda.verify(source, tmp_path / "gda").passed


@pytest.mark.parametrize("limit", [1, 5_000, 12_000])
def test_killed_during_a_write(limit: int, source: Path, tmp_path: Path) -> None:
    """The torn file is neither in OUT nor counted as finished."""
    place = tmp_path / "place"
    expected = reference(source, place)

    def torn() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills a process that writes past the limit
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        convert(source, place / "gda")

    assert in_child(torn) == -signal.SIGXFSZ
    assert not (place / "gda").exists()
    assert (place / ".gda.partial").exists() == (
        limit == 12_000
    )  # the tokenizer, written before, takes more than 5,000
    convert(source, place / "gda", resume=True)
    assert files_of(place / "gda") == expected
    assert os.listdir(place) == ["gda"]


def test_killed_while_overwriting_keeps_a_complete_model(source: Path, tmp_path: Path) -> None:
    """The old or the new folder is complete at every moment, and a later run cleans up."""
    place = tmp_path / "place"
    new = reference(source, place)
    out, replaced = place / "gda", place / ".gda.replaced"
    moment, states = 0, set()
    while True:
        moment += 1
        convert(source, out, seed=9)
        old = files_of(out)
        assert old != new
        if not killed_at(moment, (out, replaced), lambda: convert(source, out, overwrite=True)):
            break
        if out.exists():
            states.add("old" if files_of(out) == old else "new")
            assert files_of(out) in (old, new), moment
        else:
            states.add("between")
            assert files_of(replaced) == old, moment
        convert(source, out, overwrite=True)
        assert files_of(out) == new, moment
        assert os.listdir(place) == ["gda"], moment
        shutil.rmtree(place)
        place.mkdir()
    assert files_of(out) == new
    assert os.listdir(place) == ["gda"]
    assert states == {"old", "between", "new"}


def test_failed_rename_restores_the_old_model(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "place" / "gda"
    convert(source, out)
    old = files_of(out)
    rename = os.rename

    def failing(before: Any, after: Any) -> None:
        if str(before).endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(before))
        rename(before, after)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="partial"):
        convert(source, out, overwrite=True, seed=1)
    assert files_of(out) == old
    assert os.listdir(out.parent) == ["gda"]


def test_resumed_model_loads_and_verifies(source: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    assert killed_at(12, place, lambda: convert(source, place / "gda"))
    report = gda.convert(source, place / "gda", resume=True, max_shard_size=SHARD_SIZE)
    assert report.verification is not None
    assert report.verification.passed
    assert isinstance(AutoModelForCausalLM.from_pretrained(place / "gda"), gda.GDAForCausalLM)


# --------------------------------------------------------------------------------------------------------------- resume


def interrupt_at_shard(monkeypatch: pytest.MonkeyPatch, shard: int, error: BaseException | None = None) -> None:
    """Interrupt the conversion (with SIGINT, or `error`) just before it writes that shard."""
    write = stream.write_safetensors
    written = 0

    def interrupted(*arguments: Any) -> str:
        nonlocal written
        written += 1
        if written == shard:
            monkeypatch.setattr(stream, "write_safetensors", write)
            if error is not None:
                raise error
            signal.raise_signal(signal.SIGINT)
        return write(*arguments)

    monkeypatch.setattr(stream, "write_safetensors", interrupted)


def test_damaged_finished_shard_is_written_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hash differs. Intact shards are kept."""
    place = tmp_path / "place"
    expected = reference(source, place)
    interrupt_at_shard(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        convert(source, place / "gda")
    before = finished_shards(place / ".gda.partial")
    assert len(before) == 3
    damaged, removed, intact = sorted(before)
    content = bytearray((place / ".gda.partial" / damaged).read_bytes())
    content[-1] ^= 1
    (place / ".gda.partial" / damaged).write_bytes(content)
    (place / ".gda.partial" / removed).unlink()
    convert(source, place / "gda", resume=True)
    assert files_of(place / "gda") == expected
    assert (place / "gda" / intact).stat().st_ino == before[intact][0]
    assert (place / "gda" / intact).stat().st_mtime_ns == before[intact][1]


@pytest.mark.parametrize("difference", ["seed", "noise_heads", "lambda_type", "dtype", "max_shard_size", "source"])
def test_resume_with_other_source_or_settings_is_refused(
    difference: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the remedy, and the work is kept."""
    place = tmp_path / "place"
    expected = reference(source, place)
    interrupt_at_shard(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        convert(source, place / "gda")
    before = finished_shards(place / ".gda.partial")
    assert len(before) == 2
    changes: dict[str, Any] = {
        "seed": 1,
        "noise_heads": 4,
        "lambda_type": "tanh",
        "dtype": "float32",
        "max_shard_size": "5GB",
    }
    if difference == "source":
        other = save_llama(tmp_path / "other", seed=1, dtype=torch.bfloat16, max_shard_size=SHARD_SIZE)
        with pytest.raises(ValueError, match="--overwrite instead of --resume"):
            convert(other, place / "gda", resume=True)
    else:
        with pytest.raises(ValueError, match="--overwrite instead of --resume"):
            convert(source, place / "gda", resume=True, **{difference: changes[difference]})
    assert not (place / "gda").exists()
    assert finished_shards(place / ".gda.partial") == before
    convert(source, place / "gda", resume=True)
    assert files_of(place / "gda") == expected


def test_resume_with_another_spelling_of_the_source_path(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished shards are not written again."""
    expected = reference(source, tmp_path / "place")
    monkeypatch.chdir(source.parent)
    assert killed_at(20, tmp_path / "place", lambda: convert(Path(source.name), tmp_path / "place" / "gda"))
    kept = finished_shards(tmp_path / "place" / ".gda.partial")
    assert kept
    monkeypatch.chdir(tmp_path / "place")
    convert(source.absolute(), Path("gda"), resume=True)
    assert files_of(tmp_path / "place" / "gda") == expected
    for name, identity in kept.items():
        held = (tmp_path / "place" / "gda" / name).stat()
        assert (held.st_ino, held.st_mtime_ns) == identity


def test_resume_with_a_changed_source_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of old and new weights are never mixed."""
    place = tmp_path / "place"
    interrupt_at_shard(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        convert(source, place / "gda")
    shutil.rmtree(source)
    save_llama(source, seed=1, dtype=torch.bfloat16, max_shard_size=SHARD_SIZE)
    with pytest.raises(ValueError, match="another source"):
        convert(source, place / "gda", resume=True)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"fingerprint": 1}', '{"finished": {}}', "\0"])
def test_damaged_manifest(manifest: str, source: Path, tmp_path: Path) -> None:
    """ValueError or a fresh start, and never a wrong OUT."""
    place = tmp_path / "place"
    expected = reference(source, place)
    (place / ".gda.partial").mkdir(parents=True)
    (place / ".gda.partial" / "manifest.json").write_text(manifest)
    reason = None
    try:
        convert(source, place / "gda", resume=True)
    except ValueError as error:
        reason = str(error)
    if reason is None:
        assert files_of(place / "gda") == expected
    else:
        assert ".gda.partial" in reason
        assert not (place / "gda").exists()


def test_resume_without_earlier_work_starts_over(source: Path, tmp_path: Path) -> None:
    expected = reference(source, tmp_path / "place")
    convert(source, tmp_path / "place" / "gda", resume=True)
    assert files_of(tmp_path / "place" / "gda") == expected


# -------------------------------------------------------------------------------------------------------- two processes


def test_second_process_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It exits with code 2 and one line, and the first process is not affected."""
    place = tmp_path / "place"
    expected = reference(source, place)
    write = stream.write_safetensors
    outcomes = []

    def second() -> None:
        error_file = os.open(tmp_path / "error", os.O_WRONLY | os.O_CREAT)
        os.dup2(error_file, 2)
        sys.stderr = os.fdopen(2, "w")
        sys.argv = ["gda", "convert", str(source), str(place / "gda"), "--overwrite"]
        try:
            main()
        except SystemExit as exit_:
            sys.stderr.flush()
            os._exit(int(exit_.code or 0))

    def meanwhile(*arguments: Any) -> str:
        if len(outcomes) < 2:
            outcomes.append(in_child(second))
        return write(*arguments)

    monkeypatch.setattr(stream, "write_safetensors", meanwhile)
    convert(source, place / "gda")
    assert outcomes == [2, 2]
    lines = (tmp_path / "error").read_text().splitlines()
    assert len(lines) == 1
    assert "another process" in lines[0]
    assert str(place / "gda") in lines[0]
    assert files_of(place / "gda") == expected


def test_lock_is_held_until_out_is_renamed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just before the rename, a second process cannot lock and empty the folder."""
    out = tmp_path / "place" / "gda"
    expected = reference(source, tmp_path / "place")
    rename = os.rename
    refused = []

    def crowded(before: Any, after: Any) -> None:
        if Path(after) == out:
            try:
                StagedFolder(out, foreign=write_module.OF_TRAINING)
            except BlockingIOError:
                refused.append(True)
        rename(before, after)

    monkeypatch.setattr(os, "rename", crowded)
    convert(source, out)
    assert files_of(out) == expected
    assert refused == [True]


def test_lock_on_a_renamed_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the first process finishes between open and lock of the second, the second gets its own folder and lock."""
    out = tmp_path / "gda"
    first = StagedFolder(out, foreign=write_module.OF_TRAINING)
    (first.folder / "weights").write_text("whole")
    flock = fcntl.flock

    def late(file: Any, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.finish()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    second = StagedFolder(out, foreign=write_module.OF_TRAINING)
    assert files_of(out) == {"weights": b"whole"}
    assert second.folder.is_dir()
    with pytest.raises(BlockingIOError):
        StagedFolder(out, overwrite=True, foreign=write_module.OF_TRAINING)
    with pytest.raises(FileExistsError):
        second.finish()
    second.discard()
    assert os.listdir(tmp_path) == ["gda"]


def test_out_that_appears_during_the_conversion_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --overwrite."""
    out = tmp_path / "place" / "gda"
    write_provenance = write_module.write_provenance

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        out.mkdir()
        (out / "precious").write_text("mine")
        return write_provenance(*arguments, **options)

    monkeypatch.setattr(write_module, "write_provenance", meanwhile)
    with pytest.raises(FileExistsError, match="exists"):
        convert(source, out)
    assert files_of(out) == {"precious": b"mine"}


# ------------------------------------------------------------------------------------------- failures and interruptions


@pytest.mark.parametrize(
    "error",
    [
        VerificationFailed.__new__(VerificationFailed),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("a tensor cannot be read"),
        RuntimeError("anything"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_failure_leaves_no_files(
    error: BaseException, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No OUT, nothing beside it, and no parents created for it."""
    interrupt_at_shard(monkeypatch, 2, error)
    with pytest.raises(type(error)):
        convert(source, tmp_path / "deep" / "er" / "gda")
    assert os.listdir(tmp_path) == ["llama"]


def test_missing_disk_space_is_reported_first(
    source: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, one line with the free and the required space, and no files."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert_refused(command("convert", source, tmp_path / "deep" / "gda"), "free", str(tmp_path / "deep"))
    assert os.listdir(tmp_path) == ["llama"]


def test_disk_full_while_writing(
    source: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, one line, and no files."""
    interrupt_at_shard(monkeypatch, 2, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    outcome = command("convert", source, tmp_path / "deep" / "gda", "--max-shard-size", SHARD_SIZE)
    assert_refused(outcome, "No space left")
    assert os.listdir(tmp_path) == ["llama"]


def test_failed_write_leaves_no_files(source: Path, tmp_path: Path) -> None:
    """The kernel refuses a write in the middle of a shard (file-size limit), and the message names the file."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # the tokenizer fits
        try:
            convert(source, tmp_path / "deep" / "gda")
        except OSError as error:
            os._exit(error.errno or 1 if "model-00001" in str(error) else 99)

    assert in_child(limited) == errno.EFBIG
    assert os.listdir(tmp_path) == ["llama"]


def test_failed_write_of_a_small_file_is_named(tmp_path: Path) -> None:
    """It is written when it is closed, which would fail once more and without the name."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        try:
            write_text(tmp_path / "config.json", "more than ten bytes")
        except OSError as error:
            os._exit(error.errno or 1 if "config.json" in str(error) else 99)

    assert in_child(limited) == errno.EFBIG
    assert os.listdir(tmp_path) == []


def test_ctrl_c_keeps_finished_shards(
    source: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 130 and a line that names --resume."""
    out = tmp_path / "gda"
    expected = reference(source, tmp_path / "place")
    interrupt_at_shard(monkeypatch, 3)
    arguments = ("convert", source, out, "--max-shard-size", SHARD_SIZE, "--no-verify")
    outcome = command(*arguments)
    assert outcome.code == 130
    assert "--resume" in outcome.error
    assert "Traceback" not in outcome.error
    assert not out.exists()
    before = finished_shards(tmp_path / ".gda.partial")
    assert len(before) == 2
    assert command(*arguments, "--resume").code == 0
    assert files_of(out) == expected
    for name, identity in before.items():
        assert ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) == identity


def test_killed_export_is_complete_or_absent(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "gda")
    place = tmp_path / "place"
    gda.export(tmp_path / "gda", place / "llama", max_shard_size=SHARD_SIZE)
    expected = files_of(place / "llama")
    shutil.rmtree(place)
    place.mkdir()
    moment, absent = 0, 0

    def export(overwrite: bool = False) -> None:
        gda.export(tmp_path / "gda", place / "llama", max_shard_size=SHARD_SIZE, overwrite=overwrite)

    while True:
        moment += 3
        if not killed_at(moment, place, export):
            break
        if (place / "llama").exists():
            assert files_of(place / "llama") == expected, moment
        else:
            absent += 1
            export(overwrite=True)
            assert files_of(place / "llama") == expected, moment
        shutil.rmtree(place)
        place.mkdir()
    assert absent >= 5


# ------------------------------------------------------------------------------------------------------ several workers


@pytest.mark.parametrize("workers", [2, 3, 50])
def test_several_workers_write_the_same_bytes(workers: int, source: Path, tmp_path: Path) -> None:
    """With fewer workers than shards, as many, and more."""
    expected = reference(source, tmp_path / "place")
    convert(source, tmp_path / "gda", workers=workers)
    assert files_of(tmp_path / "gda") == expected


def test_killed_with_several_workers_and_resumed(source: Path, tmp_path: Path) -> None:
    """OUT is complete or absent, and finished shards are not written again."""
    place = tmp_path / "place"
    expected = reference(source, place)
    moment, kept = 0, set()
    while killed_at(moment := moment + 3, place, lambda: convert(source, place / "gda", workers=3)):
        if not (place / "gda").exists():
            before = finished_shards(place / ".gda.partial")
            kept.add(len(before))
            assert in_child(lambda: convert(source, place / "gda", workers=2, resume=True)) == ENDED, moment
            after = {name: (place / "gda" / name).stat() for name in before}
            assert {name: (each.st_ino, each.st_mtime_ns) for name, each in after.items()} == before, moment
        assert files_of(place / "gda") == expected, moment
        shutil.rmtree(place)
        place.mkdir()
    assert files_of(place / "gda") == expected
    assert max(kept) >= 3


def test_failed_shard_stops_the_other_workers(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of the shard, and no files are left."""
    interrupt_at_shard(monkeypatch, 2, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(OSError, match="No space left"):
        convert(source, tmp_path / "gda", workers=2)
    assert os.listdir(tmp_path) == ["llama"]


def test_ctrl_c_stops_several_workers(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker is left running, and a run with one worker can resume."""
    expected = reference(source, tmp_path / "place")
    interrupt_at_shard(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "gda", workers=2)
    assert set(os.listdir(tmp_path)) == {"llama", "place", ".gda.partial"}
    convert(source, tmp_path / "gda", resume=True)
    assert files_of(tmp_path / "gda") == expected
