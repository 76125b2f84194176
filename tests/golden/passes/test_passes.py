"""Every pass on small printed programs: text in, text out. Read the cases in the order of the pipeline to learn it.

The cases called `mlp` are one program on its way: what a pass is given there is what the one before it made.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from checks.parsed import compilation, read
from checks.shown import before
from shardc.passes.pipeline import NAMES, PIPELINE, run
from shardc.planning.compilation import Compilation

HERE = Path(__file__).parent
CASES = sorted(HERE.glob("*/*.txt"), key=lambda path: (path.parent.name, path.name))


def test_one_program_through_all_passes(request: pytest.FixtureRequest) -> None:
    snapshots: dict[str, Compilation] = {}
    run(PIPELINE, compilation(read(HERE / "capture" / "mlp.txt")), snapshots)
    for name in NAMES[1:]:
        path = HERE / name / "mlp.txt"
        head, _, rest = path.read_text().partition("\nbefore\n")
        given = before(snapshots, name)
        if request.config.getoption("--update-golden"):
            path.write_text(f"{head}\nbefore\n{given}")
            path.write_text(read(path).run())
        else:
            assert rest.partition("\n\nafter\n")[0] == given.rstrip(), f"{name}/mlp.txt: the pass before made another"


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
