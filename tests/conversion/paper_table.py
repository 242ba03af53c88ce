"""Print how exact conversions to the paper's layouts are: a row for each layout and λ, a column for each source.

python -m tests.conversion.paper_table
"""

import tempfile
from pathlib import Path

from gda.common.screen import quiet_transformers

from ..support.paper_layouts import LAMBDAS, LAYOUTS, SOURCES, Exactness, measure

HEADER = ["keys", "head norm", "λ", *(f"start, {name}" for name in SOURCES), "end", "change"]


def row(layout: str, lambda_: str, measured: list[Exactness]) -> list[str]:
    """A row of the table: each start, the worst end, and the range of changes."""
    keys = "paired" if layout in ("paired", "both") else "shared"
    norm = "yes" if layout in ("head norm", "both") else "no"
    ends = max(each.end for each in measured)
    changes = [each.change for each in measured if each.change is not None]
    change = f"{min(changes):.2f} to {max(changes):.2f}" if changes else "nothing is faded in"
    exactness = [*(each.start for each in measured), ends]
    return [keys, norm, lambda_, *(f"{error:.0e}" if error else "0" for error in exactness), change]


def main() -> None:
    for cells in [HEADER, ["---"] * len(HEADER)]:
        print(f"| {' | '.join(cells)} |")
    with tempfile.TemporaryDirectory() as root, quiet_transformers():
        sources = {name: save(Path(root, name)) for name, save in SOURCES.items()}
        for layout in ("neither", "head norm", "paired", "both"):
            for lambda_ in LAMBDAS:
                options = LAYOUTS[layout] | LAMBDAS[lambda_]
                places = {name: Path(root, f"{name}, {layout}, {lambda_}") for name in SOURCES}
                measured = [measure(sources[name], places[name], options) for name in SOURCES]
                print(f"| {' | '.join(row(layout, lambda_, measured))} |", flush=True)


if __name__ == "__main__":
    main()
