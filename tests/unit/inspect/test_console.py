"""What commands print: plain where nobody looks, laid out for the width of a terminal where somebody does."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from shardc.inspect.console import THEME, show, show_code
from shardc.ir.report import Columns, Report, Section

ROWS = [
    ("parameter", "model.layers.*.self_attn.q_proj.weight", "bf16[4096, 4096@tp]", "x32"),
    ("input", "input:0", "i64[32@dp, 4096]", ""),
]
REPORT = Report(
    ["plan for mesh dp=4 on h100", "  predicted  1.50 ms a step, proven optimal"],
    [Section("tensors", Columns(ROWS, "<<<>")), Section("notes", ["a [note] in brackets"])],
    ["compiled in 0.10 CPU-seconds"],
)
PLAIN = """\
plan for mesh dp=4 on h100
  predicted  1.50 ms a step, proven optimal

tensors
  parameter  model.layers.*.self_attn.q_proj.weight  bf16[4096, 4096@tp]  x32
  input      input:0                                 i64[32@dp, 4096]

notes
  a [note] in brackets

compiled in 0.10 CPU-seconds"""


def console(width: int, terminal: bool = True) -> Console:
    return Console(
        file=io.StringIO(), width=width, force_terminal=terminal, theme=THEME, color_system="standard", no_color=False
    )


def shown(what: Report | str, width: int) -> str:
    at = console(width)
    show(what, at)
    assert isinstance(at.file, io.StringIO)
    return at.file.getvalue()


def without_colours(text: str) -> list[str]:
    return [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()]


def test_a_report_is_plain_as_a_string() -> None:
    assert str(REPORT) == PLAIN
    assert str(Report(["alone"], [])) == "alone"


def test_what_is_piped_is_the_string(capsys: pytest.CaptureFixture[str]) -> None:
    show(REPORT)
    assert capsys.readouterr().out == PLAIN + "\n"
    show_code("x = 1")
    assert capsys.readouterr().out == "x = 1\n"


def test_a_wide_terminal_shows_the_same_in_colours() -> None:
    text = shown(REPORT, 120)
    assert without_colours(text) == PLAIN.splitlines()
    for coloured in (
        "\x1b[36mbf16[4096, 4096@tp]\x1b[0m",
        "\x1b[35m1.50 ms\x1b[0m",
        "\x1b[32mproven optimal\x1b[0m",
        "\x1b[1mtensors\x1b[0m",
    ):
        assert coloured in text


def test_columns_fit_a_narrow_terminal_and_nothing_is_lost() -> None:
    lines = without_colours(shown(Report([], [Section("", Columns(ROWS, "<<<>"))]), 60))
    assert max(map(len, lines)) <= 60
    assert any(line.startswith("  parameter  ") for line in lines)
    letters = sorted("".join("".join(row) for row in ROWS).replace(" ", ""))
    assert sorted("".join(lines).replace(" ", "")) == letters


def test_a_long_line_is_left_to_the_terminal() -> None:
    assert without_colours(shown("word " * 40, 60)) == [("word " * 40).rstrip()]


def test_code_is_coloured_on_a_terminal() -> None:
    at = console(120)
    show_code("def forward(x):\n    return x", at)
    assert isinstance(at.file, io.StringIO)
    assert "\x1b[" in at.file.getvalue()
    assert without_colours(at.file.getvalue()) == ["def forward(x):", "    return x"]
