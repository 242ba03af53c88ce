"""The report of `gda attention`, and how it is written."""

from html import escape
from pathlib import Path

from gda.common.files import written_beside
from gda.common.places import check_output
from gda.eval.attention.data import AttentionData
from gda.eval.attention.page import to_html


class AttentionReport(AttentionData):
    """A model's attention in one text, to be written as a page or a picture. Notebooks show the page."""

    def __repr__(self) -> str:
        baseline = "" if self.baseline_name is None else f", baseline {self.baseline_name}"
        size = f"{len(self.token_ids)} tokens, {self.arrays.num_layers} layers of {self.arrays.num_groups} groups"
        return f"<{type(self).__name__} of {self.name}{baseline}: {size}>"

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for notebooks."""
        return f'<iframe srcdoc="{escape(self.to_html())}" width="100%" height="900" style="border: 0"></iframe>'

    def to_html(self) -> str:
        """A self-contained page: a navigator, maps on hover, and every number of the report."""
        return to_html(self)

    def write_html(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the page. The file appears whole.

        Raises:
            FileExistsError: if `out` exists and `overwrite` is False.
        """
        path = check_output(out, overwrite, "--out")
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as file:
            file.write(self.to_html().encode())
        return path

    def write_png(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Draw the numbers by layer and the maps of the group that cancels most. The file appears whole.

        Raises:
            FileExistsError: if `out` exists and `overwrite` is False.
            ImportError: without matplotlib.
        """
        from gda.eval.attention.picture import draw  # needs matplotlib, which is optional

        path = check_output(out, overwrite, "--png")
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as file:
            draw(self, file)
        return path
