"""`gda.training.plot.plot`: the content of a log, thinned with a note, on a page in a browser."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from gda.training.plot import MOST_COLUMNS, MOST_POINTS, averaged, plot, read_log, thinned

from ..support.browser import opened
from ..support.commands import Command

pytestmark = pytest.mark.slow


def line(step: int, **more: Any) -> dict[str, Any]:
    """A logged step of three layers."""
    layers = [
        {"layer": layer, "lambda": 0.01 * step * layer, "signal_norm": 1.0, "noise_norm": 0.5, "subtracted": 0.1}
        for layer in range(3)
    ]
    return {"step": step, "loss": 4 - 0.01 * step, "learning_rate": 1e-4, "grad_norm": 1.0, "layers": layers} | more


def write_log(path: Path, rows: list[Any], end: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end, encoding="utf-8")
    return path


def test_page_matches_the_log(tmp_path: Path) -> None:
    """Curves and layers of each step; entries of evaluation and of a resumed run are merged by step."""
    rows = [line(10), line(20), {"step": 20, "eval_loss": 5.0, "perplexity": math.exp(5)}, line(30), line(20, loss=9.0)]
    found = read_log(write_log(tmp_path / "training_log.jsonl", rows))
    assert found.curves["loss"] == [(10, 3.9), (20, 9.0), (30, 3.7)]
    assert found.curves["eval_loss"] == [(20, 5.0)]
    assert found.layers["lambda"][2] == (30, pytest.approx([0, 0.3, 0.6]))
    assert (found.last_step, found.notes) == (30, [])
    path = plot(tmp_path)
    assert path == tmp_path / "training.html"
    assert plot(tmp_path / "training_log.jsonl") == tmp_path / "training_log.html"
    assert plot(tmp_path, tmp_path / "new" / "a.html").is_file()
    with opened(path) as page:
        titles = page.eval_on_selector_all("h3", "all => all.map(one => one.textContent)")
        assert titles[:2] == ["Loss", "Learning rate"]
        assert {"λ, by layer", "λ", "Subtracted share"} <= set(titles)
        drawn = json.loads(page.inner_text("#data") or page.evaluate("document.getElementById('data').textContent"))
        assert drawn["charts"][0]["series"][0] == {"name": "loss", "x": [10, 20, 30], "y": [3.9, 9.0, 3.7]}
        page.hover("#curves svg")
        assert re.search(r"step 20: loss 9\.0000", page.inner_text("#curves"))
        page.hover("#maps canvas")
        assert re.search(r"layer 1, step 20: 0\.2000", page.inner_text("#maps"))
    with opened(path, scheme="dark", width=420) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 420


def test_long_logs_are_thinned_with_a_note(tmp_path: Path) -> None:
    """Spikes are kept, and layers are averaged over intervals."""
    rows = [line(step) for step in range(1, 5001)]
    rows[3210]["loss"] = 77.0
    text = plot(write_log(tmp_path / "log.jsonl", rows)).read_text()
    assert "5,000 steps were logged; curves show the means of 500 intervals" in text
    assert "layers were measured in 5,000 steps" in text
    curve = [(row["step"], row["loss"]) for row in rows]
    kept = thinned(curve)
    assert len(kept) <= MOST_POINTS
    assert set(kept) <= set(curve)
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    assert (3211, 77.0) in kept
    assert min(kept, key=lambda point: point[1]) == min(curve, key=lambda point: point[1])
    columns = averaged([(step, [float(step), None]) for step, _ in curve])
    assert len(columns) == MOST_COLUMNS
    assert columns[0] == (12, [pytest.approx(6.5), None])
    assert thinned(curve[:9]) == curve[:9]
    assert len(text) < 1_000_000


def test_nonfinite_values(tmp_path: Path) -> None:
    """A loss that is not finite is a gap with a note, and the data of the page is valid JSON."""
    rows = [line(1), line(2, loss=math.nan), line(3, loss=math.inf), line(4)]
    path = plot(write_log(tmp_path / "log.jsonl", rows))
    assert "loss is not finite at 2 step(s), first at 2" in path.read_text()
    with opened(path) as page:
        assert page.evaluate("data.charts[0].series[0].y") == [3.99, None, None, 3.96]


def test_an_incomplete_last_line_is_ignored_with_a_note(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.jsonl", [line(1), line(2)], end='{"step": 3, "lo')
    assert read_log(path).last_step == 2
    assert "the last line of the log is incomplete and ignored" in plot(path).read_text()


def test_names_are_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    write_log(folder / "training_log.jsonl", [line(1), line(2)])
    with opened(plot(folder)) as page:
        assert folder.name in page.inner_text("h1")
        assert page.locator("img").count() == 0


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "nothing to draw"),
        ('{"step": 1}\n', "nothing to draw"),
        ("not\n{}\n", "line 1 is not a line of a training log: JSONDecodeError"),
        ("[" * 100_000 + "\n{}\n", "line 1 is not a line of a training log: RecursionError"),
        ("{}\n", "line 1 is not a line of a training log: KeyError: 'step'"),
        ("[1]\n", "line 1 is not a line"),
        ('{"step": 1, "loss": "low"}\n', "could not convert string to float: 'low'"),
        ('{"step": 1, "loss": 1}\n{"step": 2, "loss": "low"}', "line 2 is not a line of a training log: ValueError"),
        ('{"step": 1.5, "loss": 1}\n', "line 1 is not a line of a training log: TypeError"),
        ('{"step": 1, "loss": 1' + "0" * 400 + "}\n", "line 1 is not a line of a training log: OverflowError"),
        ('{"step": 1, "loss": 1}\n{"step": 2, "layers": 3}\n', "line 2 is not a line"),
        ('{"step": 1, "loss": 1, "layers": [{"layer": 0, "lambda": []}]}\n', "line 1 is not a line"),
    ],
)
def test_invalid_logs(content: str, named: str, tmp_path: Path) -> None:
    """The error names file and line."""
    path = tmp_path / "log.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        plot(path)
    assert str(path) in str(caught.value)
    assert not path.with_suffix(".html").exists()


def test_invalid_places(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"training_log\.jsonl"):
        plot(tmp_path)
    path = write_log(tmp_path / "training_log.jsonl", [line(1)])
    for out in (tmp_path, path):
        with pytest.raises(ValueError, match="folder or the log itself"):
            plot(path, out)


def test_plot_command(tmp_path: Path, command: Command) -> None:
    """It prints the path of the page, or JSON."""
    write_log(tmp_path / "training_log.jsonl", [line(1), line(2)])
    page = tmp_path / "training.html"
    assert command("train", tmp_path, "--plot") == (0, f"{page}\n", "")
    assert json.loads(command("train", tmp_path, "--plot", "--json").out) == {"page": str(page)}
    assert command("train", tmp_path) == (2, "", "gda: OUT is missing; name the folder to create\n")
