"""No link between the Markdown files of the project is broken, on a code host or on the site."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests.documents import ROOT, name_of

TOPS = [ROOT, *(ROOT / name for name in ("docs", "examples", "src", "tests", "benchmarks"))]
FILES = sorted(
    {ROOT / name.name for name in ROOT.glob("*.md")}
    | {page for top in TOPS[1:] for page in top.rglob("*.md")}
)
_CODE = re.compile(r"^( *)(`{3,}|~{3,}).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
_INLINE = re.compile(r"\]\(\s*<?([^()\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_DEFINED = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?(\S+?)>?(?:\s|$)", re.MULTILINE)
_HTML = re.compile(r"<(?:a|img)\s[^>]*(?:href|src)=\"([^\"]+)\"")
_ELSEWHERE = re.compile(r"[a-z][a-z+.-]*:|//")


@cache
def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return _CODE.sub("", page.read_text(encoding="utf-8"))


def links_of(page: Path) -> list[str]:
    """Return where a page leads to inside of the project."""
    text = _SPAN.sub("code", prose(page))
    found = [link for pattern in (_INLINE, _DEFINED, _HTML) for link in pattern.findall(text)]
    return [link for link in found if not _ELSEWHERE.match(link)]


@cache
def anchors(page: Path) -> frozenset[str]:
    """Return the anchors that a code host makes of a page's headings."""
    made: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", prose(page), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        made.append(f"{slug}-{made.count(slug)}" if slug in made else slug)
    return frozenset(made)


def broken(page: Path) -> list[str]:
    """Return the links of a page that lead nowhere."""
    return [link for link in links_of(page) if not leads_somewhere(page, link)]


def leads_somewhere(page: Path, link: str) -> bool:
    """Return whether there is such a file, with such a heading."""
    file, _, anchor = link.partition("#")
    target = (page.parent / file).resolve() if file else page
    if not target.exists():
        return False
    return not anchor or (target.suffix == ".md" and anchor in anchors(target))


@pytest.mark.parametrize("page", FILES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken(page) == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=name_of)
def test_the_pages_of_the_site_stay_on_the_site(page: Path) -> None:
    """The builder looks at links to pages alone: one to a file of the source is a 404 there."""
    docs = ROOT / "docs"
    outside = [
        link
        for link in links_of(page)
        if not (page.parent / link.partition("#")[0]).resolve().is_relative_to(docs)
    ]
    assert outside == []


def test_what_is_broken_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`, three\n[a](page.md#one-two-three) [b](#one-two-three) [c](gone.md)\n"
        "[d](page.md#gone) `[e](code.md)` [f](https://example.org/x.md)\n"
        '```text\n[g](block.md)\n```\n[h]\n\n[h]: gone-too.md\n<a href="gone-three.md">i</a>\n',
        encoding="utf-8",
    )
    assert broken(page) == ["gone.md", "page.md#gone", "gone-too.md", "gone-three.md"]


def test_there_are_pages_to_look_at() -> None:
    assert {"README.md", "docs/index.md", "examples/shop/README.md"} <= {*map(name_of, FILES)}
