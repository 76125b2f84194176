"""Golden texts: what a plan or a graph prints, kept beside the tests. `pytest --update-golden` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """In `test_bucket.py`, `golden("levels", text)` compares with `bucket/levels.txt` beside that file.

    Line numbers of sources are left out, so that tests may grow.
    """
    folder = request.path.with_name(request.path.stem.removeprefix("test_"))

    def compare(name: str, text: str) -> None:
        path = folder / f"{name}.txt"
        text = re.sub(r"(\w+\.py):\d+", r"\1", text)
        if request.config.getoption("--update-golden"):
            folder.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path} is missing: run pytest --update-golden, and read what it writes"
        assert text == path.read_text(), f"{path} differs; if the new text is right, run pytest --update-golden"

    return compare
