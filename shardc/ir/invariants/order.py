"""What holds of buckets, of collectives that are started ahead, and of the generated code."""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterator, Sequence
from typing import Any

from shardc.ir.facts import dtype_of, lowered
from shardc.ir.invariants.invariant import Broken, Checked, Invariant, invariant, quoted
from shardc.runtime.collectives.bucket import Bucket
from shardc.runtime.collectives.collective import Collective, wait


@invariant
def bucket_members_are_alike(checked: Checked) -> Iterator[Broken]:
    """The members of a bucket have one dtype, and the bucket's facts name the value of each."""
    for node in checked.calls:
        if not isinstance(node.target, Bucket):
            continue
        dtypes = {dtype_of(member) for member in checked.operands[node]}
        if len(dtypes) != 1:
            yield Broken(node, f"has members of dtype {', '.join(sorted(map(str, dtypes))) or 'none'}")
        named, count = len(lowered(node).members), len(checked.operands[node])
        if named != count:
            yield Broken(node, f"its facts name {named} members, it has {count}")


@invariant
def bucket_pieces_are_taken_once(checked: Checked) -> Iterator[Broken]:
    """Every piece of a bucket is taken once, as the value of the member at its place, and nothing else reads it."""
    for node in checked.calls:
        if not isinstance(node.target, Bucket):
            continue
        landed = next((user for user in node.users if user.target is wait), node)
        pieces = [user for user in landed.users if user.target is operator.getitem]
        taken = [piece.args[1] for piece in pieces]
        members = lowered(node).members
        for index in range(len(members)):
            if taken.count(index) != 1:
                yield Broken(node, f"its piece {index} is taken {taken.count(index)} times")
        if len(taken) != len(landed.users) or len(taken) != len(members):
            yield Broken(node, f"has {len(members)} pieces, and {len(landed.users)} readers")
        for piece in pieces:
            index: Any = piece.args[1]
            if lowered(piece).base != members[index]:
                yield Broken(piece, f"is of another value than member {index} of %{node.name}")


@invariant
def what_is_started_is_awaited(checked: Checked) -> Iterator[Broken]:
    """A collective that is started is awaited once, and nobody reads it but by its wait; nothing else is awaited."""
    for node in checked.calls:
        if node.target is wait:
            (operand,) = checked.operands[node]
            if not isinstance(operand.target, Collective) or operand.target.local:
                yield Broken(node, f"awaits %{operand.name}, which is no collective")
            continue
        waits = [user for user in node.users if user.target is wait]
        if len(waits) > 1:
            yield Broken(node, f"is awaited by {quoted(waits)}")
        if waits and isinstance(node.target, Collective):
            readers = [user for user in node.users if user.target is not wait]
            if readers:
                yield Broken(readers[0], f"reads %{node.name}, which is under way until %{waits[0].name}")
            if lowered(node).kept:
                yield Broken(node, "is kept for backward, and is under way: what is kept is its wait")


@invariant
def forward_runs_before_backward(checked: Checked) -> Iterator[Broken]:
    """All of forward stands before all of backward."""
    place = {node: number for number, node in enumerate(checked.nodes)}
    end = max((place[node] for node in checked.forward_and_backward.forward), default=-1)
    for node in checked.forward_and_backward.backward:
        if place[node] < end:
            yield Broken(node, f"is of backward, and stands before %{checked.nodes[end].name} of forward")
            return


@invariant
def names_are_read_while_they_live(checked: Checked) -> Iterator[Broken]:
    """Generated code reads no name before it is assigned, nor after it is deleted, and deletes none twice."""
    for function in ast.parse(checked.source).body:
        if isinstance(function, ast.FunctionDef):
            named = {name.id for statement in function.body for name in _names(statement) if not _reads(name)}
            arguments = [*function.args.args, *([function.args.vararg] if function.args.vararg else [])]
            yield from _read_alive(function.body, {argument.arg for argument in arguments}, named)


def _read_alive(body: Sequence[ast.stmt], alive: set[str], local: set[str]) -> Iterator[Broken]:
    """What statements read or delete of `local` names that are not `alive`; leaves in `alive` what lives after them."""
    for statement in body:
        looping = isinstance(statement, ast.For)
        names = [*_names(statement.iter), *_names(statement.target)] if looping else list(_names(statement))
        for name in names:
            if not isinstance(name.ctx, ast.Store) and name.id in local and name.id not in alive:
                what = "reads" if _reads(name) else "deletes"
                yield Broken(statement.lineno - 1, f"{what} {name.id}, which is not there")
        alive.difference_update(name.id for name in names if isinstance(name.ctx, ast.Del))
        alive.update(name.id for name in names if isinstance(name.ctx, ast.Store))
        if looping:
            yield from _read_alive(statement.body, alive, local)


def _names(tree: ast.AST) -> Iterator[ast.Name]:
    """The names in a statement, but for those that a comprehension gives to itself; constants and contexts, which hold
    none, are not walked."""
    if isinstance(tree, ast.Name):
        yield tree
        return
    own = {
        name.id
        for turn in getattr(tree, "generators", ())
        for name in ast.walk(turn.target)
        if isinstance(name, ast.Name)
    }
    for field in tree._fields:
        value = getattr(tree, field, None)
        for item in value if isinstance(value, list) else (value,):  # pyright: ignore[reportUnknownVariableType]
            if isinstance(item, ast.AST) and not isinstance(item, (ast.Constant, ast.expr_context)):
                yield from (name for name in _names(item) if name.id not in own)


def _reads(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Load)


BUCKETS: tuple[Invariant, ...] = (bucket_members_are_alike, bucket_pieces_are_taken_once)
OVERLAP: tuple[Invariant, ...] = (
    what_is_started_is_awaited, forward_runs_before_backward,
)  # fmt: skip
CODE: tuple[Invariant, ...] = (names_are_read_while_they_live,)
