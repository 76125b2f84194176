"""Golden files: what a pass prints, kept beside the tests. `pytest --update-golden` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden("mlp", text)` compares with mlp.txt. Line numbers of sources are left out, so that tests may grow."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / f"{name}.txt"
        text = re.sub(r"(\w+\.py):\d+", r"\1", text)
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert path.exists(), f"{path} is missing: run pytest --update-golden, and read what it writes"
        assert text == path.read_text(), f"{path.name} differs; if the new text is right, run pytest --update-golden"

    return compare
