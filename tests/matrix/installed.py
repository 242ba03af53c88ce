"""Run the installed package's commands on tiny models with the transformers at hand.

    python installed.py FOLDERS OUT.json

It is run by `run.py` in a process of its own, with FOLDERS from `folders.py`.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from outcomes import Checks, run_checks

FOLDERS, OUT = Path(sys.argv[1]), Path(sys.argv[2])
SOURCES = ("llama", "mistral", "qwen3", "diffllama")
TEXT = FOLDERS / "text.txt"


def gda(*arguments: object) -> None:
    """Run a command as `gda` does; it must end with 0, and call nothing that transformers has deprecated."""
    from gda.cli import main

    sys.argv = ["gda", *map(str, arguments)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code = main_code(main)
    assert code == 0, f"exit code {code}; --verbose shows why"
    for warning in caught:
        if issubclass(warning.category, FutureWarning | DeprecationWarning):
            raise AssertionError(f"gda {arguments[0]}: {warning.category.__name__}: {warning.message}")


def main_code(main: Callable[[], None]) -> int:
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def checks(work: Path) -> Checks:
    """By name, what is run. Later ones need what earlier ones leave in `work`."""
    perplexity = ("--perplexity", TEXT, "--context", 32)
    training = ("--data", TEXT, "--steps", 3, "--context", 16, "--batch-size", 2)

    def convert() -> None:
        for name in SOURCES:
            gda("convert", FOLDERS / name / "source", work / name)

    def verify() -> None:
        for name in SOURCES:
            gda("verify", FOLDERS / name / "source", work / name)
            gda("verify", FOLDERS / name / "source", work / name, "--method", "layers")

    def export() -> None:
        for name in SOURCES:
            gda("export", work / name, work / f"{name}-again", "--format", name)

    def fold() -> None:
        gda("convert", work / "llama", work / "factored", "--qk-rank", 4)
        gda("fold", work / "factored", work / "folded")

    def grow() -> None:
        gda("grow", work / "llama", work / "wider", "--signal", 2, "--width", 2)
        gda("grow", work / "qwen3", work / "deeper", "--depth", 3, "--masked", "--signal", 2)

    def split() -> None:
        options = ("--mode", "split", "--calibration", TEXT, "--calibration-tokens", 1024, "--effort", "fast")
        gda("convert", FOLDERS / "llama" / "source", work / "split", *options)

    def train() -> None:
        gda("train", work / "llama", work / "trained", *training, "--gradient-checkpointing")
        gda("train", work / "deeper", work / "grown", *training, "--train", "new")
        gda("train", work / "split", work / "taught", *training, "--teacher", FOLDERS / "llama" / "source")

    def evaluate() -> None:
        gda("eval", work / "llama", *perplexity, "--output", work / "scores")
        metadata = '{"length": 320}'  # tokens of the synthetic prompts
        gda("eval", work / "qwen3", "--diagnostics", "--metadata", metadata, "--limit", 2, "--output", work / "maps")

    return {
        "convert": convert,
        "verify": verify,
        "inspect": partial(gda, "inspect", work / "llama"),
        "export": export,
        "fold": fold,
        "grow": grow,
        "split": split,
        "train": train,
        "eval": evaluate,
        "attention": partial(gda, "attention", work / "llama", "--text", "A cat.", "--out", work / "a.html"),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run_checks(checks(Path(folder)), OUT)
