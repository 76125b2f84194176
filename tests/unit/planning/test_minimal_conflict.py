"""Kinds of conflict, each with exactly the requests that make it."""

import itertools

import pytest

from shardc.errors import ConstraintError
from shardc.planning.minimal_conflict import LayoutRequest, minimal_conflict

MESH = {"dp": 2, "tp": 4, "pp": 3}
SHAPES = {"x": (8, 64), "y": (8, 64), "z": (8, 64), "w": (64, 12), "odd": (7, 6), "v": (4, 64)}


def ask(label: str, value: str, *dims: tuple[str, ...] | None) -> LayoutRequest:
    return LayoutRequest(label, value, dims)


OPEN = ask("open", "x", None, None)
ROWS = ask("rows over dp", "x", ("dp",), None)
Conflict = tuple[list[LayoutRequest], list[tuple[str, str]], set[str]]

CONFLICTS: dict[str, Conflict] = {
    "an axis on two dims": ([ROWS, ask("columns", "x", None, ("dp",)), OPEN], [], {"rows over dp", "columns"}),
    "an axis twice in one request": ([ask("both", "x", ("dp",), ("dp",)), ROWS], [], {"both"}),
    "fewer elements than ranks": ([ROWS, ask("seven", "odd", ("dp", "tp"), None)], [], {"seven"}),
    "fewer only by the product": ([ask("six", "odd", None, ("pp", "tp")), ROWS], [], {"six"}),
    "split and whole": ([OPEN, ROWS, ask("whole", "x", (), None)], [], {"rows over dp", "whole"}),
    "two orders": ([ask("a", "x", None, ("dp", "tp")), ask("b", "x", None, ("tp", "dp")), ROWS], [], {"a", "b"}),
    "exactly one axis, and another": ([ROWS, ask("tp", "x", ("tp",), None)], [], {"rows over dp", "tp"}),
    "through a tie": ([ROWS, ask("whole y", "y", (), None)], [("x", "y")], {"rows over dp", "whole y"}),
    "through a chain of ties": (
        [ask("z", "z", None, ("tp",)), ROWS, ask("x", "x", None, ("dp",)), OPEN],
        [("x", "y"), ("y", "z")],
        {"z", "x"},
    ),
    "an order through a tie": (
        [ask("a", "x", ("dp", "tp"), None), ask("b", "y", ("tp", "dp"), None), ask("w", "w", ("dp",), None)],
        [("y", "x")],
        {"a", "b"},
    ),
    "a tied value that cannot follow": ([ask("eight", "x", ("dp", "tp"), None), ROWS], [("x", "v")], {"eight"}),
    "tied, an axis on two dims": (
        [ROWS, ask("y columns", "y", None, ("dp", "tp")), ask("w", "w", None, ("pp",))],
        [("x", "y")],
        {"rows over dp", "y columns"},
    ),
}


@pytest.mark.parametrize("kind", CONFLICTS)
def test_conflict_is_minimal(kind: str) -> None:
    requests, ties, expected = CONFLICTS[kind]
    core = minimal_conflict(SHAPES, MESH, requests, ties)
    assert core is not None
    assert {request.label for request in core} == expected
    assert core == [request for request in requests if request in core]
    for request in core:
        assert minimal_conflict(SHAPES, MESH, [r for r in core if r != request], ties) is None


def test_feasible() -> None:
    requests = [ROWS, ask("tp", "x", None, ("tp",)), ask("w", "w", ("tp", "dp"), ("pp",)), OPEN]
    assert minimal_conflict(SHAPES, MESH, requests, [("x", "y")]) is None
    assert minimal_conflict(SHAPES, MESH, []) is None
    assert minimal_conflict({"s": ()}, MESH, [LayoutRequest("scalar", "s", ())]) is None


def test_agrees_with_enumeration() -> None:
    """Every pair of requests on one small value, against all its layouts."""
    mesh, shape = {"a": 2, "b": 2}, (4, 2)
    orders: list[tuple[str, ...]] = [(), ("a",), ("b",), ("a", "b"), ("b", "a")]
    layouts = [
        (rows, columns)
        for rows, columns in itertools.product(orders, orders)
        if not set(rows) & set(columns) and shape[0] % 2 ** len(rows) == 0 and shape[1] % 2 ** len(columns) == 0
    ]
    asked = [LayoutRequest("r", "t", dims) for dims in itertools.product([None, *orders], repeat=2)]
    for one, two in itertools.combinations(asked, 2):
        feasible = any(
            all(want is None or want == have for r in (one, two) for want, have in zip(r.dims, layout, strict=True))
            for layout in layouts
        )
        assert (minimal_conflict({"t": shape}, mesh, [one, two]) is None) == feasible


@pytest.mark.parametrize(
    ("request_", "ties", "says"),
    [
        (ask("r", "nothing", ()), [], "no value"),
        (ask("r", "x", ()), [], "1 dims given"),
        (ask("r", "x", ("ep",), None), [], "no mesh axis 'ep'"),
        (ask("r", "x", ("dp", "dp"), None), [], "once"),
        (OPEN, [("x", "nothing")], "no such value"),
    ],
)
def test_mistakes(request_: LayoutRequest, ties: list[tuple[str, str]], says: str) -> None:
    with pytest.raises(ConstraintError, match=says):
        minimal_conflict(SHAPES, MESH, [request_], ties)


def test_ties_need_equal_rank() -> None:
    with pytest.raises(ConstraintError, match="share a split"):
        minimal_conflict({"a": (2,), "b": (2, 2)}, MESH, [], [("a", "b")])
