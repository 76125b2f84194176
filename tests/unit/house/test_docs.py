"""Every python block of the README and of docs/ runs, in order, in one namespace a file.

A block that cannot run is preceded by a line `<!-- no-run: reason -->`.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- no-run:(?P<reason>.*?)-->\n+)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
CONTRACTS = {"design.md"}  # shows what generated code looks like: an outline, not a program


def blocks(page: Path) -> Iterator[tuple[int, str, str | None]]:
    """Per python block: the line it starts on, its text, and the reason why it does not run, if it does not."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        yield text.count("\n", 0, match.start("code")), match["code"], match["reason"]


RUNNABLE = [page for page in PAGES if page.name not in CONTRACTS and any(True for _ in blocks(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a snippet saves goes there
    namespace: dict[str, Any] = {"__name__": "docs"}
    linecache.checkcache(str(page))
    for line, code, reason in blocks(page):
        if reason is None:
            exec(compile("\n" * line + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_blocks_that_do_not_run_say_why(page: Path) -> None:
    for line, _, reason in blocks(page):
        assert reason is None or len(reason.strip()) > 10, f"{page.name}:{line}: give a reason"
    fences = re.findall(r"^```python$", page.read_text(), re.MULTILINE)
    assert len(fences) == len(list(blocks(page))), f"{page.name}: a python block does not close"
