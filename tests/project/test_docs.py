"""The documentation: links lead to existing files and headings, and README stays short and right."""

import re
from pathlib import Path
from typing import Any

import pytest

import gda

from ..support.repository import ROOT

PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "eval/tasks/*.md", "tests/upstream/*.md")
    for page in ROOT.glob(pattern)
)
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, in GitHub's spelling."""
    lines = FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_exist(page: str) -> None:
    assert broken_links(ROOT / page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One, two\n[a](#one-two) [b](#three) [c](page.md) [d](other.md) [e](https://example.org/x)\n")
    assert broken_links(page) == ["#three", "other.md"]


def test_every_guide_is_linked_from_the_readme() -> None:
    linked = set(LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {page for page in PAGES if page.startswith("docs/")} <= linked


def test_the_readme_stays_short() -> None:
    """At most 200 lines; details belong to the guides."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_readme_config_from_scratch() -> None:
    """Its special tokens have embeddings, so that transformers does not warn."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text[text.index("small = gda.GDAConfig(") : text.index("model = gda.GDAForCausalLM(small)")]
    names: dict[str, Any] = {"gda": gda}
    exec(code, names)
    small = names["small"]
    assert max(small.bos_token_id, small.eos_token_id) < small.vocab_size
    assert (small.num_signal_heads, small.num_noise_heads) == (8, 2)
