"""One source for all sizes."""

from __future__ import annotations

import pytest

from shardc.analysis.sized_source import Sizes, samples, sized_source
from shardc.runtime.execute.sizes import for_sizes

BASE = {"batch": 12, "seq": 20}


def source(sizes: Sizes, line: str) -> str:
    text = line.format(**sizes, twice=2 * sizes["batch"], area=sizes["batch"] * sizes["seq"] + 3,
                       part=-(-sizes["batch"] // 4), inverse=1 / sizes["seq"], pieces=sizes["seq"] // 3,
                       capped=min(sizes["seq"], 24))  # fmt: skip
    return f'"""Head."""\nMESH = {{}}\nRANDOM = False\nINPUTS = ()\nVALUE = {text}\n'


def found(line: str, step: int = 1) -> str | None:
    chosen, checks = samples(BASE, dict.fromkeys(BASE, step), 4 if step == 1 else 1)
    points = [*chosen, *checks]
    return sized_source([source(point, line) for point in points], points, len(chosen))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[{batch}, {seq}, 64]", "[batch, seq, 64]"),
        ("[{twice}, -{area}]", "[2 * batch, -(batch * seq + 3)]"),
        ("{inverse!r} * {batch}.0", "(1 / (seq)) * (float(batch))"),
        ("1  # f32[{area}, 8@tp]", "1  # f32[batch * seq + 3, 8@tp]"),
    ],
)
def test_numbers_become_polynomials(line: str, says: str) -> None:
    text = found(line)
    assert text is not None
    assert f"VALUE = {says}\n" in text
    assert "SIZES = {'batch': 12, 'seq': 20}\nbatch = SIZES['batch']\nseq = SIZES['seq']\n" in text
    other = {"batch": 13, "seq": 31}
    space: dict[str, object] = {}
    exec(source(other, line), space)
    assert space["VALUE"] == for_sizes(text)(other).VALUE


@pytest.mark.parametrize("line", ["{part}", "{pieces}", "{capped}", "'input {batch}'"])
def test_what_is_no_polynomial(line: str) -> None:
    assert found(line) is None


def test_parts_are_polynomials_among_sizes_of_one_remainder() -> None:
    text = found("{part}", step=4)
    assert text is not None
    assert "VALUE = batch // 4\n" in text


def test_variables_have_names_of_their_own() -> None:
    text = found("[batch_ for batch_ in range({batch})]")
    assert text is not None
    assert found("(batch := {batch})") is not None
    assert "batch_ = SIZES['batch']" in (found("(batch := {batch})") or "")
