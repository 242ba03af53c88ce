"""Print a table of every kind of model: its format, how far its logits are from the GDA model's, and where it runs.

python -m tests.engines.table [ENGINE ...]
"""

import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from gda.common.screen import quiet_transformers

from .engines import ENGINES, Results, run_engine
from .kinds import NUM_TOKENS, PROMPTS, config_of, difference, export_all, run_transformers

HEADER = ["model", "format", "worst relative Δlogit", "same greedy text", "cannot run it"]


def rows(folders: list[Path], expected: Results, computed: dict[str, Results]) -> Iterator[list[str]]:
    """A row for each exported folder; AssertionError if an engine generates different text."""
    for folder in folders:
        name, config = folder.parent.name, config_of(folder)
        same, unable, worst = [], [], 0.0
        for engine, results in computed.items():
            if engine in ENGINES and (reason := ENGINES[engine].limit(config)) is not None:
                unable.append(f"{engine}: {reason}")
                continue
            got = results[name]
            assert got.get("tokens") == expected[name]["tokens"], f"{name}, {engine}: {got.get('error', 'other text')}"
            worst = max(worst, difference(got, expected[name]))
            same.append(engine)
        yield [name, config["model_type"], f"{worst:.0e}", ", ".join(same), "; ".join(unable)]


def main(engines: Iterable[str]) -> None:
    with tempfile.TemporaryDirectory() as root:
        with quiet_transformers():
            folders = export_all(Path(root))
            expected = run_transformers(folder.with_name("gda") for folder in folders)
            computed = {"transformers": run_transformers(folders)}
        for engine in engines:
            able = [folder for folder in folders if ENGINES[engine].limit(config_of(folder)) is None]
            computed[engine] = run_engine(engine, able, PROMPTS, NUM_TOKENS)
        for row in [HEADER, ["---"] * len(HEADER), *rows(folders, expected, computed)]:
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main(sys.argv[1:] or ENGINES)
