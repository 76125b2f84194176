"""The table of lines reads back what is written, and refuses everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardc.source.grammar import LineKind, SourceError, read
from shardc.source.text import WIDTH, arguments, listed, written

ROOT = Path(__file__).parents[3]
GOLDEN = sorted((ROOT / "tests/golden/passes/codegen").glob("*.txt"))


def source(path: Path) -> str:
    return path.read_text().partition("\nafter\n")[2]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_what_codegen_writes_is_in_the_table(path: Path) -> None:
    functions = read(source(path))
    assert functions["forward"][-1].kind is LineKind.RETURN
    assert max(map(len, source(path).splitlines())) <= WIDTH


@pytest.mark.parametrize(
    "line",
    [
        "x.add_(1)",
        "y = print(x)",
        "if x: pass",
        "y = x + 1",
        "import os",
        "y.data = aten.relu.default(x)",
        "while x: pass",
    ],
)
def test_a_line_outside_of_the_table_is_refused(line: str) -> None:
    (mlp,) = [path for path in GOLDEN if path.stem == "mlp"]
    text = source(mlp).replace("    return (ar,)", f"    {line}\n    return (ar,)")
    with pytest.raises(SourceError, match="is no line of generated code"):
        read(text)


def test_what_stands_outside_of_functions_is_refused() -> None:
    with pytest.raises(SourceError, match="line 1 stands outside of a function: print"):
        read("print(1)")


def test_the_docs_list_every_kind_with_its_example() -> None:
    text = (ROOT / "docs/design/lowering.md").read_text()
    for kind in LineKind:
        assert f"| `{kind.example}` | {kind.meaning} |" in text, f"| `{kind.example}` | {kind.meaning} |"


def test_long_lines_break_as_ruff_breaks_them() -> None:
    names = [f"a_name_of_some_length_{number}" for number in range(4)]
    assert written(["y = f", arguments(names)], 1) == [f"    y = f({', '.join(names)})"]
    assert written(["y = f", arguments([*names, "k=12345678"])], 1) == [
        "    y = f(", f"        {', '.join(names)}, k=12345678", "    )"
    ]  # fmt: skip
    assert written(["y = ", listed([*names, *names[:1]])], 1)[1] == f"        {names[0]},"


def test_many_names_fill_lines() -> None:
    names = [f"a_name_of_some_length_{number}" for number in range(4)]
    assert written(["y = ", listed([*names, *names])], 1) == [
        "    y = [", *2 * [f"        {', '.join(names)},"], "    ]  # fmt: skip"
    ]  # fmt: skip
