"""Pages in headless Chromium: their content, and everything they complain about."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import psutil
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("GDA_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


SECONDS_TO_START = 90
TRIAL = """
import sys
from playwright.sync_api import sync_playwright
with sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=sys.argv[1])
    page = browser.new_page()
    page.set_content("<canvas></canvas>")
    page.evaluate("document.querySelector('canvas').getContext('2d').fillRect(0, 0, 9, 9)")
    page.keyboard.press("End")
    page.screenshot()
    browser.close()
"""


@cache
def what_is_missing() -> str | None:
    """The reason why no page can be opened; None if one can.

    Where a browser must not start processes, it hangs, so this is tried first in a process that can be killed.
    """
    if CHROMIUM is None:
        return f"needs Chromium: one of {', '.join(NAMES)} on the PATH, or GDA_CHROMIUM"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    trial = subprocess.Popen([sys.executable, "-c", TRIAL, CHROMIUM], **quiet)
    try:
        code = trial.wait(SECONDS_TO_START)
    except subprocess.TimeoutExpired:
        code = None
        for process in (*psutil.Process(trial.pid).children(recursive=True), trial):
            process.kill()
    if code == 0:
        return None
    how = f"has not opened a page in {SECONDS_TO_START} s" if code is None else "opens no page"
    return f"{CHROMIUM} {how} here"


@contextmanager
def opened(
    path: Path,
    *,
    width: int = 1440,
    height: int = 1000,
    scheme: str = "light",
    ready: str = "body[data-ready]",  # what a page's script sets last
) -> Iterator[Any]:
    """Open a page and wait for the element `ready`; console errors and requests to other addresses fail.

    Skips the test without a working Chromium or without playwright.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="drives Chromium; pip install playwright")
    if missing := what_is_missing():
        pytest.skip(missing)
    complaints: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: None if request.url == path.as_uri() else complaints.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector(ready, timeout=60_000)
        yield page
        page.wait_for_timeout(100)
        browser.close()
    assert complaints == []


def expect_text(page: Any, selector: str, text: str | re.Pattern[str]) -> None:
    """Wait until an element has this text.

    Playwright's `wait_for_function` needs eval, which our pages forbid.
    """
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(text, timeout=60_000)


def number(text: str) -> float:
    """A number in the format of the pages."""
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
