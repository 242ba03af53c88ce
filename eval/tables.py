"""Tables of text, for the screen and in Markdown."""

import html
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

NAMES = ("metric",)  # columns that hold names, like the first one


@dataclass(frozen=True)
class TextTable:
    """A table whose cells are text, with an optional title."""

    headings: list[str]
    rows: list[list[str]]
    title: str | None = None

    def for_screen(self) -> Table:
        """The table for a terminal. Names are never read as markup."""
        table = Table(title=self.title)
        for index, heading in enumerate(self.headings):
            is_name = index == 0 or heading in NAMES
            justify = "left" if is_name else "right"
            table.add_column(Text(heading), justify=justify, overflow="fold", no_wrap=not is_name)  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def to_markdown(self) -> str:
        """The table in Markdown, below its title."""
        rules = ["---" if index == 0 or heading in NAMES else "---:" for index, heading in enumerate(self.headings)]
        lines = [f"| {' | '.join(map(escaped, row))} |" for row in (self.headings, rules, *self.rows)]
        return "\n".join(lines if self.title is None else [self.title, "", *lines])


def escaped(text: str) -> str:
    """Text that stays in its table cell and is not markup."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")
