"""Every pass on small printed programs: text in, text out. Read the cases in the order of the pipeline to learn it."""

from __future__ import annotations

from pathlib import Path

import pytest

from checks.parsed import read
from shardc.passes.pipeline import NAMES

HERE = Path(__file__).parent
CASES = sorted(HERE.glob("*/*.txt"), key=lambda path: (path.parent.name, path.name))


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_pass(path: Path, request: pytest.FixtureRequest) -> None:
    text = read(path).run()
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs; if the new text is right, run pytest --update-golden"


@pytest.mark.parametrize("name", NAMES)
def test_every_pass_has_cases(name: str) -> None:
    assert sum(path.parent.name == name for path in CASES) >= 3


def test_every_folder_is_that_of_a_pass() -> None:
    assert {path.parent.name for path in CASES} == set(NAMES)
