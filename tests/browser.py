"""Pages in headless Chromium: what they show, and whatever they complain about."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("GDA_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def opened(path: Path, *, width: int = 1440, height: int = 1000, scheme: str = "light") -> Iterator[Any]:
    """The page of a file, once its script has run; an error on its console, or a request that leaves it, fails.

    Skips the test where there is no Chromium, or no playwright to drive it.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="drives Chromium; pip install playwright")
    if CHROMIUM is None:
        pytest.skip(f"needs Chromium: one of {', '.join(NAMES)} on the PATH, or GDA_CHROMIUM")
    complaints: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: None if request.url == path.as_uri() else complaints.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]", timeout=60_000)
        yield page
        page.wait_for_timeout(100)
        browser.close()
    assert complaints == []


def number(text: str) -> float:
    """A number as pages write it."""
    return float(text.replace("−", "-").replace(",", ""))


class Page(HTMLParser):
    """The tags of a page, and the addresses in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href") or name.startswith("on")]
