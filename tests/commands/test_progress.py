"""Progress without a terminal: log lines on standard error for commands, and through `logging` in Python."""

import io
import logging
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

import gda
from gda.common import progress
from gda.common.progress import LoggedProgress, log_on_stderr, time_left
from gda.common.screen import progress_bars
from gda.eval.evaluate import evaluate_with_baseline
from gda.eval.options import EvaluateOptions
from gda.training.callbacks.progress import ProgressCallback

from ..support.llamas import byte_tokenizer, llama_model, save_llama

LINE = re.compile(r"step (\d) of 4: loss \d+\.\d{4}, rate \d\.\d\de-\d\d, [\d,]+ tokens/s, \d+ s left")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("progress")
    gda.convert(save_llama(folder / "llama"), folder / "gda", verify=False)
    (folder / "text.txt").write_text("A text of several words, again and again. " * 60)
    return folder


@pytest.mark.slow
def test_training_logs_a_line_for_each_entry(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Step, loss, learning rate, tokens per second and remaining time; held-out loss with its time."""
    with caplog.at_level(logging.INFO, "gda"):
        text = folder / "text.txt"
        gda.train(folder / "gda", tmp_path / "out", data=text, eval_data=text, steps=4, batch_size=2, context=32)
    steps = [found[1] for line in caplog.messages if (found := LINE.fullmatch(line))]
    assert steps == ["1", "2", "3", "4"]
    assert any(re.fullmatch(r"step 4 of 4: held-out loss .*, perplexity .*; \d+ s", line) for line in caplog.messages)


@pytest.mark.slow
def test_command_writes_lines_to_a_file(folder: Path, tmp_path: Path) -> None:
    """Standard error is a file, as with nohup or Slurm."""
    arguments = ["train", str(folder / "gda"), str(tmp_path / "out"), "--data", str(folder / "text.txt")]
    options = ["--steps", "4", "--batch-size", "2", "--context", "32"]
    with open(tmp_path / "log", "w") as log:
        subprocess.run([sys.executable, "-m", "gda.cli", *arguments, *options], stderr=log, check=True)
    assert [found[1] for line in (tmp_path / "log").read_text().splitlines() if (found := LINE.fullmatch(line))] == [
        *"1234"
    ]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that training reads, in seconds; a test can change it."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_run_says_how_long_it_takes(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """After two steps, since the first one warms up: 98 steps of 3 s, and 20 s of evaluation after 40, 80 and 100."""
    args = TrainingArguments(max_steps=100, eval_strategy="steps", eval_steps=40, disable_tqdm=True)
    state, callback = TrainerState(max_steps=100, eval_steps=40), ProgressCallback()
    with caplog.at_level(logging.INFO, "gda"):
        callback.on_train_begin(args, state, TrainerControl())
        clock[0] += 20
        callback.on_log(args, state, TrainerControl(), {"eval_loss": 2.0, "eval_runtime": 20.0})
        for seconds in (30, 3, 3):
            clock[0] += seconds
            state.global_step += 1
            callback.on_step_end(args, state, TrainerControl())
            callback.on_log(args, state, TrainerControl(), {"loss": 1.0})
    shown = [line.rsplit(", ")[-1] for line in caplog.messages[1:]]
    assert shown == ["50 min left", "the other 98 steps and 3 evaluations take about 6 min", "6 min left", "6 min left"]


@pytest.mark.parametrize("steps", [19, 22])
def test_short_run_says_nothing_before(steps: int, clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """Less than a minute remains after the second of 19 steps of 3.1 s, and more after the second of 22."""
    args, state = TrainingArguments(max_steps=steps, disable_tqdm=True), TrainerState(max_steps=steps)
    callback = ProgressCallback()
    with caplog.at_level(logging.INFO, "gda"):
        callback.on_train_begin(args, state, TrainerControl())
        for _ in range(4):
            clock[0] += 3.1
            state.global_step += 1
            callback.on_step_end(args, state, TrainerControl())
    assert caplog.messages == (["the other 20 steps take about 62 s"] if steps == 22 else [])


def test_long_evaluation_logs_lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The share of the held-out data, and the time left."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    args, state, callback = TrainingArguments(disable_tqdm=True), TrainerState(), ProgressCallback()
    with caplog.at_level(logging.INFO, "gda"):
        callback.on_train_begin(args, state, TrainerControl())
        for _ in range(2):
            callback.on_prediction_step(args, state, TrainerControl(), eval_dataloader=[{}] * 2)
    assert caplog.messages == [f"measuring the held-out loss: {share} %, 0 s left" for share in (50, 100)]


@pytest.mark.parametrize(("seconds", "logged"), [(9, []), (50, [10, 30]), (100, [2, 22, 52, 92])])
def test_log_lines_grow_rarer(seconds: int, logged: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """After 10 seconds, and then 20, 30 … seconds later. Work of a minute or more has a line after two seconds."""
    now, lines = 0.0, []
    with caplog.at_level(logging.INFO, "gda"), LoggedProgress(disable=True, get_time=lambda: now) as bar:
        task = bar.add_task("work", total=seconds)
        for _ in range(seconds):
            now += 1
            bar.advance(task)
            lines += [now] * (len(caplog.messages) - len(lines))
    assert lines == logged


def test_slow_items_are_logged_one_by_one(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Each takes longer than the period in which rich counts them."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "gda"), LoggedProgress(disable=True) as bar:
        for _ in bar.track(range(2), description="work", update_period=0.01):
            time.sleep(0.05)
    assert caplog.messages == ["work: 50 %, 0 s left", "work: 100 %, 0 s left"]


@pytest.mark.parametrize("work", ["convert", "grow", "verify", "layers", "tensors"])
def test_long_conversion_logs_amounts(
    work: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Writing and comparing: bytes, of how many, bytes per second, time left. Verification: share and time left."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "gda"):
        if work in ("convert", "grow"):
            function = {"convert": gda.convert, "grow": partial(gda.grow, depth=3)}[work]
            function(folder / "llama", tmp_path / "out", verify=False)
        else:
            gda.verify(folder / "llama", folder / "gda", method="full" if work == "verify" else work)
    amounts = r"[\d.]+/[\d.]+ [kM]B, ([\d.]+ [kMG]?B/s|\?), "
    line = {
        "verify": r"verifying: [\d]+ %, \d+ s left",
        "layers": r"verifying, layer: [\d]+ %, +\d/4, \d+ s left",
        "tensors": rf"comparing: [\d]+ %, +{amounts}\d+ s left",
    }.get(work, rf"writing: [\d]+ %, +{amounts}\d+ s left")
    assert caplog.messages
    assert [found for found in caplog.messages if not re.fullmatch(line, found)] == []


def test_second_model_is_announced_with_the_time_of_the_first(folder: Path) -> None:
    """`gda eval` with a baseline."""
    console = Console(file=io.StringIO())
    options = EvaluateOptions(folder / "gda", baseline=folder / "llama", perplexity=folder / "text.txt")
    evaluate_with_baseline.run(options, console=console)
    assert re.search(r"running gda \(1 of 2\)\nrunning llama \(2 of 2; gda took \d+ s\)\n", console.file.getvalue())


def test_long_work_logs_share_and_time_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """At most one line per interval. Without a total, the line has the amount that is done."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "gda"), LoggedProgress(disable=True) as bar:
        known, unknown = bar.add_task("writing", total=4), bar.add_task("tokens", total=None)
        bar.advance(known)
        bar.update(unknown, advance=1500)
        monkeypatch.setattr(progress, "LOG_SECONDS", 1e9)
        bar.advance(known)
    assert caplog.messages == ["writing: 25 %, 0 s left", "tokens: 1,500"]


def test_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal that draws no bars, such as the shell in Emacs."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "dumb")
    with log_on_stderr(), progress_bars(Console(stderr=True)) as bars:
        bars.advance(bars.add_task("writing", total=4))
    assert "writing: 25 %" in capsys.readouterr().err


def test_time_left_after_resuming(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What an earlier run has done took no time in this one: the third of 4 units takes 30 s."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    now = [0.0]
    with caplog.at_level(logging.INFO, "gda"), LoggedProgress(disable=True, get_time=lambda: now[0]) as bar:
        task = bar.add_task("training", total=4, completed=2)
        now[0] = 30.0
        bar.advance(task)
    assert caplog.messages == ["training: 75 %, 30 s left"]


@pytest.mark.parametrize("kind", ["scoring", "generating"])
def test_tasks_log_share_and_time_left(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Six requests in batches of two, without a terminal."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from gda.eval.lm_eval.harness import GDALM

    lm = GDALM(llama_model(), tokenizer=byte_tokenizer(), batch_size=2, progress=False)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "gda"):
        if kind == "scoring":
            texts = [("a" * length, "b") for length in range(1, 7)]
            lm.loglikelihood([Instance("loglikelihood", {}, text, 0) for text in texts])
        else:
            asked = [("a" * length, {"until": ["."], "max_gen_toks": 2}) for length in range(1, 7)]
            lm.generate_until([Instance("generate_until", {}, text, 0) for text in asked])
    shown = [line for line in caplog.messages if line.startswith(f"{kind}: ")]
    assert [line.split(",")[0] for line in shown] == [f"{kind}: 33 %", f"{kind}: 67 %", f"{kind}: 100 %"]
    assert all(line.endswith("s left") for line in shown)


def test_time_left_is_in_words() -> None:
    """Seconds, minutes or hours."""
    assert [time_left(seconds) for seconds in (7.4, 300, 9000)] == ["7 s left", "5 min left", "2.5 h left"]
