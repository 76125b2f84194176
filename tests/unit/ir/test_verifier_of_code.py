"""The verifier on generated code: names are read while they live."""

from __future__ import annotations

from checks.verifying import Left, left, message_of
from shardc.ir.invariants import order


def generated() -> tuple[Left, list[str]]:
    code = left("mlp", "codegen")
    return code, code.source.splitlines()


def test_a_name_that_is_read_after_it_is_deleted() -> None:
    code, lines = generated()
    place = next(place for place, line in enumerate(lines) if line.startswith("    relu = "))
    lines.insert(place, "    del up")
    code.source = "\n".join(lines)
    shown = message_of(code, order.names_are_read_while_they_live)
    at = shown.index("    ^ reads up, which is not there")
    assert shown[at - 2 : at] == ["        del up", f"    {lines[place + 1]}"]


def test_a_name_that_is_deleted_twice() -> None:
    code, lines = generated()
    place = next(place for place, line in enumerate(lines) if line.startswith("    relu = ")) + 1
    lines[place:place] = ["    del up", "    del up"]
    code.source = "\n".join(lines)
    assert any("^ deletes " in line for line in message_of(code, order.names_are_read_while_they_live))


def test_a_name_that_is_read_before_it_is_there() -> None:
    code, lines = generated()
    product, reader = (
        next(place for place, line in enumerate(lines) if line.startswith(f"    {name} = ")) for name in ("up", "relu")
    )
    lines.insert(product, lines.pop(reader))
    code.source = "\n".join(lines)
    assert any(
        "^ reads up, which is not there" in line for line in message_of(code, order.names_are_read_while_they_live)
    )
