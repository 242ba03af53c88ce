"""Print a table of every kind of model: its format, how far its logits are from the GDA model's, and where it runs.

python -m tests.engines.table [ENGINE ...]
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gda.common.screen import quiet_transformers

from .engines import ENGINES, Results, run_engine
from .kinds import NUM_TOKENS, PROMPTS, config_of, difference, export_all, run_transformers
from .llama_cpp import continue_prompts, llama_cpp_limit, same_text

HEADER = ["model", "format", "worst relative Δlogit", "same greedy text", "cannot run it"]
LIMITS = {name: engine.limit for name, engine in ENGINES.items()} | {"llama.cpp": llama_cpp_limit}


def rows(folders: list[Path], expected: Results, computed: dict[str, Results]) -> Iterator[list[str]]:
    """A row for each exported folder; AssertionError if an engine generates different text."""
    for folder in folders:
        name, config = folder.parent.name, config_of(folder)
        same, unable, worst = [], [], 0.0
        for engine, results in computed.items():
            if engine in LIMITS and (reason := LIMITS[engine](config)) is not None:
                unable.append(f"{engine}: {reason}")
                continue
            got, wanted = results[name], expected[name]
            assert "error" not in got, f"{name}, {engine}: {got['error']}"
            assert all(map(same_text, got["tokens"], wanted["tokens"])), f"{name}, {engine}: different text"
            same.append(engine)
            if "logits" in got:  # llama.cpp gives none
                worst = max(worst, difference(got, wanted))
        yield [name, config["model_type"], f"{worst:.0e}", ", ".join(same), "; ".join(unable)]


def run(engine: str, folders: list[Path]) -> Results:
    """What an engine computes with those exported models that it can run."""
    able = [folder for folder in folders if LIMITS[engine](config_of(folder)) is None]
    if engine == "llama.cpp":
        return continue_prompts(able, PROMPTS, NUM_TOKENS)
    return run_engine(engine, able, PROMPTS, NUM_TOKENS)


def main(engines: list[str]) -> None:
    with tempfile.TemporaryDirectory() as root, quiet_transformers():
        folders = export_all(Path(root))
        expected = run_transformers(folder.with_name("gda") for folder in folders)
        computed = {"transformers": run_transformers(folders)} | {name: run(name, folders) for name in engines}
        for row in [HEADER, ["---"] * len(HEADER), *rows(folders, expected, computed)]:
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main(sys.argv[1:] or [*LIMITS])
