"""What runs of `gda train` in the tests read."""

from pathlib import Path

import gda

from .llamas import save_llama


def sentences(count: int) -> str:
    """A text that a tiny model can learn from."""
    return "".join(f"{i} times {i} is {i * i}, and the other way round it is the same. " for i in range(count))


def save_inputs(folder: Path, count: int = 200) -> None:
    """A text.txt of that many sentences, and a model `gda` that is converted from `llama`."""
    (folder / "text.txt").write_text(sentences(count))
    gda.convert(save_llama(folder / "llama"), folder / "gda", verify=False)
