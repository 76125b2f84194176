"""Lines of printed graphs: what each says, and the operator that its call names.

    %v = view(%x, [16, 8])        f32[32@dp, 8]        # layers.0, model.py, kept

Cells are two blanks or more apart. A call has the arguments as `shardc.ir.printing` shows them: strings without quotes,
no `device`. What is wrong is an AssertionError that names file and line.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

import shardc.runtime
from shardc.runtime import Part

ARITHMETIC = {"add", "sub", "mul", "div"}
"""Whose `Tensor` overload takes a plain number too, as capture writes it."""


@dataclass(frozen=True)
class Line:
    """A line of a case's file."""

    path: Path
    number: int
    text: str

    def refuse(self, reason: str) -> NoReturn:
        raise AssertionError(f"{self.path.parent.name}/{self.path.name}:{self.number}: {reason}\n    {self.text}")


@dataclass(frozen=True)
class Assigned:
    """`%name = call    type    more ...    # place`: the cells of a line."""

    line: Line
    name: str
    call: str
    type: str
    more: tuple[str, ...]
    place: str


def assigned(line: Line) -> Assigned:
    """The cells of a line that gives a value a name."""
    text, _, place = line.text.partition("  # ")
    match = re.fullmatch(r"%(\w+) = (.+)", text.strip())
    if match is None:
        line.refuse("write `%name = call(...)    f32[32, 64]`, or `return [%name]`")
    call, *cells = re.split(r"\s{2,}", match[2])
    return Assigned(line, match[1], call, cells[0] if cells else "", tuple(cells[1:]), place.strip())


class Call:
    """The name and the arguments of a printed call; `nodes` are the values so far, by name."""

    def __init__(self, given: Assigned, nodes: Mapping[str, fx.Node]) -> None:
        self.line, self._nodes = given.line, nodes
        match = re.fullmatch(r"(\w+)\((.*)\)", given.call)
        if match is None:
            given.line.refuse(f"cannot read the call {given.call!r}")
        self.name, text = match[1], match[2]
        if self.name == "constrain":  # its second argument is a string with commas
            text = re.sub(r", (.*)", r", '\1'", text)
        try:
            tree = ast.parse(re.sub(r"%(\w+)", r"value_\1", f"call({text})"), mode="eval").body
        except SyntaxError:
            given.line.refuse(f"cannot read the arguments of {given.call!r}")
        assert isinstance(tree, ast.Call)
        self.args = tuple(self._read(argument) for argument in tree.args)
        self.kwargs = {str(keyword.arg): self._read(keyword.value) for keyword in tree.keywords}

    def _read(self, tree: ast.expr) -> Any:
        match tree:
            case ast.Constant():
                return tree.value
            case ast.Name(id=name) if name.startswith("value_"):
                return self.node(name.removeprefix("value_"))
            case ast.Name(id="inf" | "nan" as name):
                return float(name)
            case ast.Name(id=name):
                return name
            case ast.Attribute(value=ast.Name(id="torch"), attr=name):
                return getattr(torch, name)
            case ast.List(elts=items):
                return [self._read(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self._read(item) for item in items)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._read(operand)
            case ast.Call(func=ast.Name(id="Part"), args=items):
                return Part(*[self._read(item) for item in items])
            case _:
                self.line.refuse(f"cannot read the argument {ast.unparse(tree)!r}")

    def node(self, name: str) -> fx.Node:
        """The value called so."""
        if name not in self._nodes:
            self.line.refuse(f"%{name} is not assigned above")
        return self._nodes[name]

    def function(self) -> Callable[..., Any] | None:
        """The function of the runtime that has the call's name; None if there is none."""
        made = getattr(shardc.runtime, self.name, None)
        return made if self.name in shardc.runtime.__all__ and callable(made) else None

    def resolve(self, fake: Callable[[fx.Node], Tensor], wanted: Callable[[Any], str]) -> Made | None:
        """The first overload that takes the arguments and of whose result `wanted` has no complaint; None for a
        function of the runtime. `fake` gives the fake tensor of an operand."""
        known = {argument.name for overload in _overloads(self.name) for argument in overload._schema.arguments}
        if not self.kwargs.keys() <= known and self.function() is not None:
            return None  # `softmax(%x, 1, False, s=Part(...))` has a namesake in torch
        reasons: list[str] = []
        args, kwargs = fx.map_arg((self.args, self.kwargs), fake)
        for overload in _overloads(self.name):
            told = dict(kwargs)
            schema = {argument.name: argument for argument in overload._schema.arguments}
            if "device" in schema and not _tensors(args):
                told["device"] = torch.device("cpu")
            if not _fits(overload, args):
                continue
            try:
                made = overload(*args, **told)
            except Exception as error:
                reasons.append(f"{overload}: {str(error).splitlines()[0]}")
                continue
            reason = wanted(made)
            if not reason:
                return Made(overload, {**self.kwargs, **{k: v for k, v in told.items() if k == "device"}}, made)
            reasons.append(f"{overload} {reason}")
        if not reasons and (self.function() is not None or not _overloads(self.name)):
            return None
        self.line.refuse("; ".join(reasons) or f"no overload of {self.name} takes such arguments")


@dataclass(frozen=True)
class Made:
    """The overload that a call names, its keywords, the fake result."""

    target: OpOverload
    kwargs: dict[str, Any]
    value: Any


def _overloads(name: str) -> list[OpOverload]:
    """The overloads of an operator of torch or of ours, those that captures use most first."""
    for namespace in (torch.ops.aten, torch.ops.shardc):
        packet = getattr(namespace, name, None)
        if packet is not None:
            names = sorted(packet.overloads(), key=lambda one: (one != "default", one != "Tensor"))
            return [getattr(packet, one) for one in names if "out" not in one.split("_")]
    return []


def _fits(overload: OpOverload, args: Sequence[Any]) -> bool:
    """Whether the arguments have the schema's kinds: torch itself takes a number for any tensor."""
    expected = overload._schema.arguments
    if len(args) > len(expected):
        return False
    lenient = overload._overloadname == "Tensor" and overload._schema.name.split("::")[-1] in ARITHMETIC
    for argument, given in zip(expected, args, strict=False):
        kind = str(argument.type)
        number = isinstance(given, (int, float)) and not isinstance(given, bool)
        if number and "Tensor" in kind and not lenient:
            return False
        if isinstance(given, Tensor) and "Tensor" not in kind:
            return False
    return True


def _tensors(value: Any) -> list[Tensor]:
    return list(_found(value))


def _found(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _found(item)
