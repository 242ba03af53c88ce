"""Progress without a terminal: log lines on standard error for commands, and through `logging` in Python."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gda
from gda.common import progress
from gda.common.progress import LoggedProgress, time_left

from ..support.llamas import byte_tokenizer, llama_model, save_llama

LINE = re.compile(r"step (\d) of 4: loss \d+\.\d{4}, rate \d\.\d\de-\d\d, [\d,]+ tokens/s, \d+ s left")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("progress")
    gda.convert(save_llama(folder / "llama"), folder / "gda", verify=False)
    (folder / "text.txt").write_text("A text of several words, again and again. " * 60)
    return folder


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
