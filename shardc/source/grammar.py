"""The lines that may occur in the functions of generated code: one table. Code is written by it and read back by it.

A form is Python with holes: `X` stands for anything, `XS` for any number of arguments, `TARGETS` for one or several
names. What is called says which kind a call is.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import shardc.runtime
from shardc.errors import ShardcError
from shardc.runtime.collectives.collective import Collective
from shardc.source.calls import METHODS


class LineKind(Enum):
    """A kind of line: its form, an example, and what it does."""

    OPERATOR = "TARGETS = OPERATOR(XS)", "y = aten.mm.default(x, w)", "an operator of torch on the rank's parts"
    BODY = "TARGETS = BODY(XS)", 'y = rebase(x, part=Part(("tp",), 64))', "a function of the runtime, or of the user's"
    VIEW = "TARGETS = X.METHOD(XS)", "y = x.reshape(32, 64)", "a view; also within the line that reads it"
    COLLECTIVE = "TARGETS = COLLECTIVE(XS)", 'y = all_reduce(x, axis="dp")', "a collective, started and awaited"
    START = "TARGETS = STARTED.start(XS)", 'y_started = all_reduce.start(x, axis="dp")', "a collective is started"
    WAIT = "TARGETS = wait(X)", "y = wait(y_started)", "the result of a collective that was started"
    EACH = "TARGETS = [x.METHOD(XS) for x in X]", "y = [x.reshape(64) for x in made]", "a view of each of a list"
    WAITS = "TARGETS = [wait(X) for x in X]", "y = [wait(x) for x in made]", "collectives of a list are awaited"
    ITEM = "TARGETS = X[X]", "y = made[0]", "one of several results"
    LAYER = "TARGETS = LAYER(XS)", "x, kept = layer(x, *layers[9 * i : 9 * i + 9])", "one run of a repeated layer"
    LOOP = "for i in range(X): ...", "for i in range(32):", "the runs of a repeated layer"
    COLLECT = "X += X", "saved += kept", "what a run leaves goes to a list"
    EMPTY = "X: X = []", "saved: list[Tensor] = []", "a list for what runs leave"
    UNPACK = "TARGETS = PLACES", "a, *saved, b = given", "values get names, or a list"
    TAKE = "TARGETS = take(XS)", "saved_2 = take(saved, 40)", "the last values of a list, which loses them"
    CLEAR = "X.clear()", "given.clear()", "a list lets go of its values"
    DEL = "del XS", "del x, y", "values are freed before the function ends"
    RETURN = "return X", "return (y,), (x,)", "the results"

    @property
    def form(self) -> str:
        return self.value[0]

    @property
    def example(self) -> str:
        return self.value[1]

    @property
    def meaning(self) -> str:
        return self.value[2]


@dataclass(frozen=True)
class SourceLine:
    """One statement of a function: its kind, and where it stands."""

    kind: LineKind
    number: int
    text: str


class SourceError(ShardcError):
    """A line that is not in the table."""


def read(source: str) -> Mapping[str, Sequence[SourceLine]]:
    """The statements of every function of a generated module, by the name of the function, with those in loops behind
    their loop. Raises SourceError at the first line that the table does not know, at a function that is not annotated,
    and at what stands outside of functions and is neither an import, nor a constant."""
    tree = ast.parse(source)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    reader = _SourceReader(source, {function.name for function in functions}, _imported(tree))
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            reader.outside(node)
    return {function.name: list(reader.function(function)) for function in functions}


def _imported(tree: ast.Module) -> dict[str, str]:
    """The names that a module imports, and from which module each comes."""
    return {
        alias.asname or alias.name: statement.module or ""
        for statement in tree.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


class _SourceReader:
    def __init__(self, source: str, layers: set[str], imports: Mapping[str, str]) -> None:
        self.lines = source.splitlines()
        self.layers, self.imports = layers, imports

    def outside(self, node: ast.stmt) -> None:
        """Refuse what may not stand outside of functions."""
        constant = isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        if not (constant or docstring or main or isinstance(node, (ast.Import, ast.ImportFrom))):
            raise self._error(node, "stands outside of a function")

    def function(self, node: ast.FunctionDef) -> Iterator[SourceLine]:
        arguments = [*node.args.args, *([node.args.vararg] if node.args.vararg else [])]
        if node.returns is None or any(argument.annotation is None for argument in arguments):
            raise self._error(node, "is a function without annotations")
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        yield from self._statements(body)

    def _statements(self, body: Sequence[ast.stmt]) -> Iterator[SourceLine]:
        for statement in body:
            kind = next((kind for kind, fits in _FITS if fits(self, statement)), None)
            if kind is None:
                raise self._error(statement, "is no line of generated code")
            yield SourceLine(kind, statement.lineno, self.lines[statement.lineno - 1].strip())
            if isinstance(statement, ast.For):
                yield from self._statements(statement.body)

    def called(self, node: ast.AST | None) -> str:
        """What a statement assigns the result of: `aten.mm.default`; "" if it is no call."""
        return ast.unparse(node.func) if isinstance(node, ast.Call) else ""

    def calls(self, node: ast.AST | None) -> LineKind | None:
        """The kind of a call, by what is called."""
        called = self.called(node)
        if called.startswith(("aten.", "torch.ops.")):
            return LineKind.OPERATOR
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            return LineKind.VIEW
        name, _, started = called.partition(".")
        ours = getattr(shardc.runtime, name, None) if self.imports.get(name) == "shardc.runtime" else None
        if started:
            return LineKind.START if started == "start" and isinstance(ours, Collective) else None
        if name in ("wait", "take") and ours is not None:
            return LineKind.WAIT if name == "wait" else LineKind.TAKE
        if isinstance(ours, Collective):
            return LineKind.COLLECTIVE
        if name in self.layers:
            return LineKind.LAYER
        return LineKind.BODY if name in self.imports else None

    def _error(self, node: ast.stmt, what: str) -> SourceError:
        return SourceError(f"line {node.lineno} {what}: {self.lines[node.lineno - 1].strip()}")


Fits = Callable[[_SourceReader, ast.stmt], bool]


def _assigns(node: ast.stmt) -> bool:
    """Whether names, and names alone, are assigned."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1:
        return False
    parts = [part for part in ast.walk(node.targets[0]) if isinstance(part, ast.expr)]
    return all(isinstance(part, (ast.Name, ast.Tuple, ast.Starred)) for part in parts)


def _places(node: ast.AST) -> bool:
    """Whether an expression only says where values are."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "take"
    return isinstance(node, (ast.Name, ast.Tuple, ast.List, ast.Subscript))


def _call(kind: LineKind) -> Fits:
    return lambda reader, node: isinstance(node, ast.Assign) and _assigns(node) and reader.calls(node.value) is kind


def _each(kind: LineKind) -> Fits:
    def fits(reader: _SourceReader, node: ast.stmt) -> bool:
        made = node.value if isinstance(node, ast.Assign) else None
        return _assigns(node) and isinstance(made, ast.ListComp) and reader.calls(made.elt) is kind

    return fits


def _item(_: _SourceReader, node: ast.stmt) -> bool:
    taken = node.value if isinstance(node, ast.Assign) else None
    return _assigns(node) and isinstance(taken, ast.Subscript) and isinstance(taken.slice, ast.Constant)


def _loop(_: _SourceReader, node: ast.stmt) -> bool:
    return isinstance(node, ast.For) and ast.unparse(node.iter).startswith("range(") and not node.orelse


def _clear(_: _SourceReader, node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node).endswith(".clear()")


_FITS: tuple[tuple[LineKind, Fits], ...] = (
    *(
        (kind, _call(kind))
        for kind in (
            LineKind.OPERATOR,
            LineKind.BODY,
            LineKind.VIEW,
            LineKind.COLLECTIVE,
            LineKind.START,
            LineKind.WAIT,
            LineKind.LAYER,
        )
    ),
    (LineKind.TAKE, _call(LineKind.TAKE)),
    (LineKind.EACH, _each(LineKind.VIEW)),
    (LineKind.WAITS, _each(LineKind.WAIT)),
    (LineKind.ITEM, _item),
    (LineKind.LOOP, _loop),
    (LineKind.COLLECT, lambda _, node: isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add)),
    (LineKind.EMPTY, lambda _, node: isinstance(node, ast.AnnAssign) and ast.unparse(node.value or node) == "[]"),
    (LineKind.UNPACK, lambda _, node: isinstance(node, ast.Assign) and _assigns(node) and _places(node.value)),
    (LineKind.CLEAR, _clear),
    (LineKind.DEL, lambda _, node: isinstance(node, ast.Delete)),
    (LineKind.RETURN, lambda _, node: isinstance(node, ast.Return)),
)
