"""The markdown of the project: what it shows runs, what it says was printed is printed, and it reads in short pieces.

The python blocks of a page run in order, in one namespace a page. A block that cannot run is preceded by a line
`<!-- no-run: reason -->`. One after `<!-- file: name -->` is also written to a file, which blocks below may import. A
text block after the line `<!-- printed -->` holds lines that the blocks above it printed: each line a beginning of one
of theirs, in order; runs of spaces count as one, a line `…` stands for lines left out.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shardc

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROSE = [
    *PAGES,
    *(ROOT / page for page in ("CONTRIBUTING.md", "tests/README.md", "benchmarks/README.md") if (ROOT / page).exists()),
]
BLOCK = re.compile(
    r"(?:^<!-- no-run:(?P<reason>.*?)-->\n+|^<!-- file: (?P<file>\w+\.py) -->\n+)?^```python\n(?P<code>.*?)^```$"
    r"|^<!-- printed -->\n+```text\n(?P<printed>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
DATA = re.compile(r"^`.*$", re.MULTILINE)
"""A line of names in a page that a program writes (opinfo.md): as a row of a table."""

LINE, PARAGRAPH = 100, 80
"""Most characters of a line, most words of a paragraph."""


def blocks(page: Path) -> Iterator[tuple[int, re.Match[str]]]:
    """The python and the printed blocks of a page, each with the line that it starts on."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        yield text.count("\n", 0, match.start("printed" if match["code"] is None else "code")), match


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


RUNNABLE = [page for page in PAGES if any(match["code"] is not None for _, match in blocks(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_blocks_run_and_print_what_the_page_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a snippet saves goes there
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}
    linecache.checkcache(str(page))
    printed = io.StringIO()
    for line, match in blocks(page):
        if match["code"] is None:
            missing = first_missing(match["printed"], printed.getvalue())
            assert missing is None, f"{name_of(page)}:{line}: not printed above: {missing}\n\n{printed.getvalue()}"
        elif match["reason"] is None:
            if match["file"]:
                Path(match["file"]).write_text(match["code"])
                monkeypatch.delitem(sys.modules, Path(match["file"]).stem, raising=False)
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * line + match["code"], str(page), "exec"), namespace)


def first_missing(shown: str, printed: str) -> str | None:
    """The first line of `shown` with which no line of `printed` begins, after those of the lines before it."""
    lines = iter([" ".join(line.split()) for line in printed.splitlines()])
    for line in shown.splitlines():
        wanted = " ".join(line.split())
        if wanted and wanted != "…" and not any(have.startswith(wanted) for have in lines):
            return wanted
    return None


def test_a_line_that_was_not_printed_is_told() -> None:
    printed = "%a = relu(%x)    f32[4]    # model.py:3\n%b = neg(%a)    f32[4]\n"
    assert first_missing("%a = relu(%x)  f32[4]\n…\n%b = neg(%a)\n", printed) is None
    assert first_missing("%b = neg(%a)\n%a = relu(%x)\n", printed) == "%a = relu(%x)"
    assert first_missing("%a = relu(%y)\n", printed) == "%a = relu(%y)"


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_blocks_that_do_not_run_say_why(page: Path) -> None:
    found = [(line, match) for line, match in blocks(page) if match["code"] is not None]
    for line, match in found:
        assert match["reason"] is None or len(match["reason"].strip()) > 10, f"{page.name}:{line}: give a reason"
    fences = re.findall(r"^```python$", page.read_text(), re.MULTILINE)
    assert len(fences) == len(found), f"{page.name}: a python block does not close"


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a page, numbered from 1, that are neither code nor part of a table, nor comments."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith(("|", "<!--")):
            yield number, line
        if line.lstrip().startswith("```"):
            yield number, ""  # a block ends the paragraph before it


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """The paragraphs of a page, each with the line that it starts on; every item of a list is one."""
    start, words = 0, list[str]()
    for number, line in [*prose(text), (0, "")]:
        item = re.match(r"\s*([-*]|\d+\.)\s", line) is not None
        if words and (not line.strip() or item or line.startswith("#")):
            yield start, " ".join(words)
            words = []
        if line.strip():
            start = start if words else number
            words.append(line.strip())


def too_long(text: str) -> list[str]:
    """What is longer on a page than it may be."""
    lines = [
        f"line {number} has {len(line)} characters, more than {LINE}"
        for number, line in prose(text)
        if len(line) > LINE
    ]
    pieces = [
        f"the paragraph at line {number} has {len(piece.split())} words, more than {PARAGRAPH}"
        for number, piece in paragraphs(text)
        if len(piece.split()) > PARAGRAPH
    ]
    return lines + pieces


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_lines_and_paragraphs_are_short(page: Path) -> None:
    text = page.read_text()
    assert not too_long(DATA.sub("", text) if page.name == "opinfo.md" else text), name_of(page)


def test_what_is_too_long_is_told() -> None:
    short, long = "word " * PARAGRAPH, "word " * (PARAGRAPH + 1)
    wrap = re.compile(r"(.{1,90}) ")
    assert too_long(wrap.sub(r"\1\n", short)) == []
    assert too_long("\n" + wrap.sub(r"\1\n", long)) == [
        f"the paragraph at line 2 has {PARAGRAPH + 1} words, more than {PARAGRAPH}"
    ]
    assert too_long("x" * (LINE + 1)) == [f"line 1 has {LINE + 1} characters, more than {LINE}"]
    items = "- " + "one " * 60 + "\n- " + "two " * 60
    assert too_long(wrap.sub(r"\1\n", items)) == []  # every item counts by itself
    table, code = "| " + "cell " * 90 + "|", "```text\n" + "x " * 90 + "\n```"
    assert too_long(f"{table}\n\n{code}") == []


def test_links_between_pages_lead_somewhere() -> None:
    for page in PROSE:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def test_the_reference_has_every_public_name() -> None:
    headings = re.findall(r"^##+ (\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert set(shardc.__all__) <= set(headings)


def test_the_site_has_every_page() -> None:
    nav = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]]
    assert sorted(nav) == sorted([*pages, "benchmarks.md", "index.md"])
